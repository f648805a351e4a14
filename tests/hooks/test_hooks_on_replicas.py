"""What the table of `tests/equivalence` does not see of hooks on several replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

RNG = np.random.default_rng(47)
X, Y = RNG.normal(size=(24, 3)).astype("float32"), RNG.normal(size=(24, 2)).astype("float32")


@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


@pytest.fixture
def model(strategy):
    keras.utils.set_random_seed(9)
    with strategy.scope():
        inputs = keras.Input((3,))
        model = TapeModel(inputs, layers.Dense(2, name="end")(layers.Dense(4)(inputs)))
        model.compile(keras.optimizers.AdamW(0.01, use_ema=True), "mse")
    return model


def _assert_replicas_agree(variables):
    for variable in variables:
        first, second = (v.numpy() for v in variable.value.values)
        np.testing.assert_array_equal(first, second)


def test_state_and_weights_agree(model):
    """Noise, statistics, rates: what could run apart. The NaN is on the second replica."""
    model.gradient_hooks.set(
        [
            hooks.SkipNonFinite(),
            hooks.PercentileClipping(50, history=4),
            hooks.GradientNoise(0.1),
            hooks.LearningRateMultiplier(0.5, targets="end/*"),
            hooks.Freezing("end/bias", epochs=1),
        ]
    )
    y = Y.copy()
    y[6] = np.nan
    history = model.fit(X, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    assert history["skipped_steps"] == [1.0, 1.0]
    assert np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])).all()
    _assert_replicas_agree(model.variables)
    _assert_replicas_agree([v for h in model.gradient_hooks for v in h.variables])
    averages = [v for v in model.optimizer.variables if "average" in v.path]
    assert averages
    _assert_replicas_agree(averages)


def test_numbers_are_assigned_on_all_replicas(model):
    hook = hooks.LearningRateMultiplier(1.0)
    model.gradient_hooks.set([hook])
    model.fit(X, Y, batch_size=8, verbose=0)
    hook.factor = 0.0
    before = model.get_weights()
    # The trace is there already: a factor of 0 warns only where it is traced.
    model.fit(X, Y, batch_size=8, verbose=0)
    for a, b in zip(model.get_weights(), before, strict=True):
        # `fit` ends with the averages in place of the weights.
        np.testing.assert_allclose(a, b, rtol=1e-6)
    _assert_replicas_agree(model.variables)


def test_the_bad_variable_is_named(model):
    def spoil(gradient, variable):
        return gradient * np.nan if variable.path == "end/kernel" else None

    model.gradient_hooks.set([spoil, hooks.SkipNonFinite(max_consecutive=2)])
    with pytest.raises(FloatingPointError, match="beginning with 'end/kernel' at step 0"):
        model.fit(X, Y, batch_size=8, verbose=0)
