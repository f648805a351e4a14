"""An older Keras or TensorFlow is refused, and a newer one gets a word."""

import tomllib
import warnings
from pathlib import Path

import pytest

from keras_tapefit import versions


@pytest.mark.parametrize("installed", [{"keras": "3.10.0"}, {"tensorflow": "2.18.1"}])
def test_older_ones_are_refused(installed):
    with pytest.raises(ImportError, match="needs .* or later. Received"):
        versions.check(installed)


def test_newer_ones_are_named():
    with pytest.warns(UserWarning, match="was tried with keras 3.15, and keras 4.0.1 is newer"):
        versions.check({"keras": "4.0.1"})


def test_what_is_installed_was_tried():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check()
        versions.check({"keras": "nightly"})


def test_the_lower_bounds_are_those_of_the_project():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    bounds = tomllib.loads(text)["project"]["dependencies"]
    for name, (oldest, _) in versions.TRIED.items():
        assert f"{name}>={'.'.join(map(str, oldest))}" in bounds
