"""What a type checker knows of the library: correct uses pass, mistakes are found."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USES = Path(__file__).with_name("typed_uses.py")


def test_mypy_finds_the_mistakes_and_nothing_else(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", tmp_path, USES],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    found = {int(n) for n in re.findall(r"typed_uses\.py:(\d+): error", done.stdout)}
    lines = USES.read_text(encoding="utf-8").splitlines()
    expected = {i for i, line in enumerate(lines, 1) if line.endswith("# error")}
    assert found == expected and expected, done.stdout + done.stderr


def test_all_public_names_are_listed_before_they_are_imported():
    code = (
        "import sys, keras_tapefit; names = dir(keras_tapefit); "
        "assert set(keras_tapefit.__all__) <= set(names), names; "
        "assert {'callbacks', 'plots', 'tuning'} <= set(names), names; "
        "assert not {'keras', 'importlib', 'Any'} & set(names), names; "
        "assert 'keras_tapefit.tuning' not in sys.modules; "
        "from keras_tapefit import *; print(tuning.__name__, plots.__name__, TapeModel.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["keras_tapefit.tuning", "keras_tapefit.plots", "TapeModel"], (
        done.stderr
    )


@pytest.mark.parametrize("name", ["backward", "callbacks", "hooks", "plots", "tuning"])
def test_dir_shows_what_is_for_users(name):
    room = importlib.import_module(f"keras_tapefit.{name}")
    assert sorted(dir(room)) == sorted(room.__all__)
    assert all(getattr(room, each).__doc__ for each in room.__all__)
