"""With the import swapped, programs in the idioms of the field compute the same."""

import inspect
import warnings

import keras
import numpy as np
import pytest

from keras_tapefit import TapeModel, hooks

from . import generative, supervised
from .support import run

PROGRAMS = {
    name: thing
    for module in (generative, supervised)
    for name, thing in vars(module).items()
    if inspect.isfunction(thing) and thing.__module__ == module.__name__
}

pytestmark = pytest.mark.slow


def test_there_are_twenty():
    assert len(PROGRAMS) == 20


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_hooks_it_is_plain_keras_to_the_bit(name):
    _, expected, truth = run(PROGRAMS[name], keras.Model)
    _, logs, found = run(PROGRAMS[name], TapeModel)
    assert logs.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(logs[key], values, err_msg=key)
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key, strict=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_with_a_hook_it_is_applied_or_said(name):
    """The monitor sees gradients within the bound; or a warning names the way out."""
    bound = [hooks.GlobalNormClipping(1e-3), hooks.GradientMonitor()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, logs, _ = run(PROGRAMS[name], TapeModel, bound)
    texts = [str(warning.message) for warning in told]
    if "gradient_norm" in logs:
        norms = np.asarray(logs["gradient_norm"])
        assert np.all(norms > 0) and np.all(norms < 1.01e-3), norms
        assert not texts
    else:
        assert any("hook" in text and "tape" in text for text in texts), texts
