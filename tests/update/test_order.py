"""Orders that cannot be meant are found, explained, and told before the first trace."""

import warnings

import keras
import numpy as np
import pytest

from keras_tapefit import TapeSequential, backward, hooks
from keras_tapefit.update.order import order_findings


@pytest.fixture
def model():
    """Two dense layers; variable paths end in `first/kernel` to `second/bias`."""
    layers = [keras.layers.Dense(5, name="first"), keras.layers.Dense(2, name="second")]
    model = TapeSequential([keras.Input((4,)), *layers])
    model.compile("sgd", "mse")
    return model


X, Y = np.ones((2, 4)), np.ones((2, 2))
PRIVATE = backward.PerExampleClipping(1.0, 0.1)


def _find(*hook_list, optimizer=None, backward=None):
    return order_findings(list(hook_list), [optimizer or keras.optimizers.SGD()], backward)


FINDINGS = {
    "clip before NaN gate": (
        lambda: _find(hooks.ValueClipping(1.0), hooks.SkipNonFinite()),
        "ValueClipping .* comes before SkipNonFinite .*infinite.*Put SkipNonFinite .* first",
    ),
    "percentile before NaN gate": (
        lambda: _find(hooks.PercentileClipping(), hooks.SkipNonFinite()),
        "PercentileClipping .* comes before SkipNonFinite",
    ),
    "zeroed before NaN gate": (
        lambda: _find(hooks.ZeroNonFinite(), hooks.SkipNonFinite()),
        "no step is ever skipped. Keep one of the two",
    ),
    "clip before spike gate": (
        lambda: _find(hooks.GlobalNormClipping(1.0), hooks.SkipSpikes()),
        "in which no spike shows. Put SkipSpikes .* first",
    ),
    "noise before clip": (
        lambda: _find(hooks.GradientNoise(0.1), hooks.GlobalNormClipping(1.0)),
        "noise is clipped together with the gradient.*Put GradientNoise .* after GlobalNormClipp",
    ),
    "clip before learned clip": (
        lambda: _find(hooks.ValueClipping(1.0), hooks.ZScoreClipping()),
        "learns its bound from norms that are clipped already",
    ),
    "looser clip after": (
        lambda: _find(hooks.NormClipping(1.0), hooks.NormClipping(2.0)),
        "NormClipping .* does nothing: NormClipping .* before it clips .* to a smaller bound",
    ),
    "monitor before multiplier": (
        lambda: _find(hooks.UpdateMonitor(), hooks.LearningRateMultiplier(0.1, targets="a/*")),
        "measures the update that LearningRateMultiplier .* Put UpdateMonitor .* last",
    ),
    "scaled to zero after a norm": (
        lambda: _find(hooks.GlobalNormClipping(1.0), hooks.GradientScaling(0, targets="a/*")),
        "no freezing: .*momentum.* and GlobalNormClipping .* counts their gradients in its norm. "
        "Use `hooks.Freezing",
    ),
    "rate of zero": (
        lambda: _find(hooks.LearningRateMultiplier(0.0, targets="a/*")),
        "factor of 0 is no freezing: the optimizer's state",
    ),
    "own clip": (
        lambda: _find(hooks.GlobalNormClipping(1.0), optimizer=keras.optimizers.SGD(clipnorm=2.0)),
        "optimizer '(?i:sgd).*' has `clipnorm=2.0` and clips what GlobalNormClipping .* Remove it",
    ),
    "own clip of noise": (
        lambda: _find(hooks.GradientNoise(1.0), optimizer=keras.optimizers.Adam(clipvalue=2.0)),
        "has `clipvalue=2.0` and clips the noise of GradientNoise",
    ),
    "clip after private noise": (
        lambda: _find(hooks.NormClipping(1.0), backward=PRIVATE),
        "comes after the noise of PerExampleClipping.*remove it, or lower `max_norm`",
    ),
    "noise on private noise": (
        lambda: _find(hooks.GradientNoise(1.0), backward=PRIVATE),
        "which no accountant counts. Raise `noise_multiplier` instead",
    ),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_findings(name):
    find, text = FINDINGS[name]
    (finding,) = find()
    with pytest.raises(UserWarning, match=text):
        raise UserWarning(finding)


FINE = {
    "gate first": lambda: _find(
        hooks.SkipNonFinite(),
        hooks.SkipSpikes(),
        hooks.GlobalNormClipping(1.0),
        hooks.GradientNoise(0.1),
        hooks.GradientMonitor(),
        hooks.LearningRateMultiplier(0.1, targets="a/*"),
        hooks.UpdateMonitor(),
    ),
    "loss gate": lambda: _find(hooks.NormClipping(1.0), hooks.SkipSpikes(monitor="loss")),
    "other targets": lambda: _find(
        hooks.ValueClipping(1.0, targets="a/*"), hooks.ZScoreClipping(targets="b/*")
    ),
    "tighter clip after": lambda: _find(hooks.NormClipping(2.0), hooks.NormClipping(1.0)),
    "other scopes": lambda: _find(hooks.NormClipping(1), hooks.NormClipping(2, per_layer=True)),
    "other clips": lambda: _find(hooks.ValueClipping(1.0), hooks.GlobalNormClipping(1.0)),
    "live factor": lambda: _find(hooks.GradientScaling(lambda step: 0.0 * step)),
    "another class of that name": lambda: _find(
        hooks.NormClipping(1.0), backward=type("PerExampleClipping", (), {})()
    ),
    "nothing": lambda: _find(optimizer=keras.optimizers.SGD(clipnorm=1.0)),
    "no optimizer": lambda: order_findings([hooks.NormClipping(1.0)], [], None),
}


@pytest.mark.parametrize("name", FINE)
def test_no_findings(name):
    assert FINE[name]() == []


def test_targets_of_built_hooks_are_compared_by_variable(model):
    first, second = (hooks.NormClipping(1.0, targets="*first/*"), hooks.NormClipping(2.0))
    model.gradient_hooks.set([first, second])
    model.train_on_batch(X, Y)
    assert order_findings([first, second], [], None) == []


def test_fit_warns_once_before_the_first_step(model):
    model.gradient_hooks.set([hooks.GlobalNormClipping(1.0), hooks.SkipNonFinite()])
    before = model.get_weights()[0]
    with pytest.raises(UserWarning, match="comes before SkipNonFinite"):
        model.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before)
    model.compile("sgd", "mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, Y, verbose=0)
        model.gradient_hooks.add(hooks.GradientMonitor())
        model.fit(X, Y, verbose=0)
    assert len(caught) == 1
