"""The worked example of docs/choose.md: what an accountant makes of three numbers."""

import math
import re
from pathlib import Path

import pytest

from keras_tapefit import backward

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_says_what_the_accountant_says():
    dp_accounting = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    page = (DOCS / "choose.md").read_text("utf-8")
    block = re.search(r"```py\nimport dp_accounting\n(.*?)```", page, re.S)[1]
    *lines, last = block.strip().splitlines()
    space = {
        "dp_accounting": dp_accounting,
        "method": backward.PerExampleClipping(2.0, 1.1, expected_batch_size=256),
    }
    exec("\n".join(lines), space)
    call, _, told = last.partition("#")
    found = eval(call, space)
    assert math.floor(found * 1000) / 1000 == float(told.strip().rstrip("."))
