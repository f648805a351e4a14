"""Which parameters of a test are tried every day."""

from collections.abc import Iterable
from typing import Any

import pytest


def everyday(chosen: Iterable[Any], of: Iterable[Any]) -> list[Any]:
    """Returns the parameters of a test, those not chosen as slow tests."""
    chosen = list(chosen)
    return [p if p in chosen else pytest.param(p, marks=pytest.mark.slow) for p in of]
