"""An older Keras or TensorFlow is refused at import, and a newer one gets a word."""

import runpy
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from keras_tapefit import versions


def imported(monkeypatch, name: str, version: str) -> None:
    """Imports the check anew, with another version of a package."""
    monkeypatch.setattr(sys.modules[name], "__version__", version)
    runpy.run_path(versions.__file__)


@pytest.mark.parametrize("name, version", [("keras", "3.13.2"), ("tensorflow", "2.19.1")])
def test_older_ones_are_refused(monkeypatch, name, version):
    with pytest.raises(
        ImportError, match=rf"needs {name} \d\.\d\d or later. Received: {name} {version}"
    ):
        imported(monkeypatch, name, version)


@pytest.mark.parametrize(
    "name, version, tried",
    [("keras", "4.0.1", "3.14 to 3.15"), ("tensorflow", "2.22.0-rc0", "2.20 to 2.21")],
)
def test_newer_ones_are_named(monkeypatch, name, version, tried):
    with pytest.warns(
        UserWarning, match=f"tried with {name} {tried}, and {name} {version} is newer"
    ):
        imported(monkeypatch, name, version)


def test_what_was_tried_gets_no_word(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, tried in versions.TRIED.items():
            for version in tried:
                imported(monkeypatch, name, f"{version[0]}.{version[1]}.9")


def test_the_lower_bounds_are_those_of_the_project():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    bounds = tomllib.loads(text)["project"]["dependencies"]
    for name, (oldest, _) in versions.TRIED.items():
        assert f"{name}>={'.'.join(map(str, oldest))}" in bounds
