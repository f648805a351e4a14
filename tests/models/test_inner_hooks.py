"""Hooks of a model inside another: one warning names them and says what to do."""

import re
import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, hooks
from keras_tapefit.training import building

from . import support
from .support import X, Y


def _outer(inner):
    inputs = keras.Input((6,))
    return TapeModel(inputs, layers.Dense(1)(inner(inputs)), name="outer")


def _inner(**options):
    model = TapeSequential([keras.Input((6,)), layers.Dense(3)], name="inner")
    model.compile("sgd", "mse", **options)
    return model


def test_they_are_found_at_any_depth():
    inner = _inner(gradient_hooks=[hooks.ValueClipping(1e-9)])
    middle = keras.Sequential([keras.Input((6,)), inner, layers.Dense(6)], name="middle")
    outer = _outer(middle)
    assert building.inner_hooks(outer) == ["inner"]
    # One's own are no inner ones; an inner model without any is none.
    outer.gradient_hooks = [hooks.GradientMonitor()]
    assert building.inner_hooks(outer) == ["inner"]
    assert building.inner_hooks(inner) == []
    assert building.inner_hooks(_outer(_inner())) == []
    inner.gradient_hooks = []
    assert building.inner_hooks(outer) == []


def test_the_warning_is_said_once_and_its_advice_works():
    support.begin()
    inner = _inner(gradient_hooks=[hooks.ValueClipping(1e-9)])
    outer = _outer(inner)
    outer.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=r"hooks of 'inner' are not applied.*'outer'") as told:
        support.fit(outer)
    assert len(told) == 1
    before = inner.get_weights()
    model = outer
    advice = re.search(r"`(model.register_gradient_hook.*)`", str(told[0].message))
    inner.gradient_hooks = []
    exec(advice.group(1), {"model": model, "hook": hooks.ValueClipping(1e-9)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        support.fit(outer)
    np.testing.assert_allclose(inner.get_weights()[0], before[0], atol=1e-7)
    assert X.shape[0] == Y.shape[0]
