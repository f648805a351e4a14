"""`LearningRateMultiplier`: exact for every optimizer."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, hooks

RNG = np.random.default_rng(29)
X, Y = RNG.normal(size=(32, 4)), RNG.normal(size=(32, 2))
TOKENS = RNG.integers(0, 5, size=(32, 3))


def _model(optimizer, gradient_hooks, **options):
    keras.utils.set_random_seed(2)
    tokens, features = keras.Input((3,), dtype="int32"), keras.Input((4,))
    embedded = layers.Flatten()(layers.Embedding(5, 2, name="table")(tokens))
    hidden = layers.Dense(4, activation="tanh", name="first")(
        layers.Concatenate()([embedded, features])
    )
    model = TapeModel([tokens, features], layers.Dense(2, name="second")(hidden))
    model.compile(optimizer, "mse", gradient_hooks=gradient_hooks, **options)
    return model


OPTIMIZERS = {
    "SGD momentum": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "Adam": lambda rate: keras.optimizers.Adam(rate),
    "AdamW EMA": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.1, use_ema=True),
    "RMSprop": lambda rate: keras.optimizers.RMSprop(rate, momentum=0.5),
    "Lion": lambda rate: keras.optimizers.Lion(rate, weight_decay=0.1),
    "loss scale": lambda rate: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(rate)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_multiplied_rate_is_a_smaller_rate(name):
    """All variables at half of 0.02: as with 0.01, moving averages included."""
    make = OPTIMIZERS[name]
    reference = _model(make(0.01), [hooks.GradientScaling(1.0)])
    model = _model(make(0.02), [hooks.LearningRateMultiplier(0.5)])
    for _ in range(3):
        reference.train_on_batch([TOKENS, X], Y)
        model.train_on_batch([TOKENS, X], Y)
    for a, b in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    pairs = zip(model.optimizer.variables, reference.optimizer.variables, strict=True)
    averages = [(a, b) for a, b in pairs if "average" in a.path]
    assert bool(averages) == ("EMA" in name)
    for a, b in averages:
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-5, atol=1e-7)


def test_a_factor_of_one_changes_nothing_and_zero_keeps_the_weights():
    plain = _model("adamw", [hooks.GradientScaling(1.0)])
    one = _model("adamw", [hooks.LearningRateMultiplier(1.0)])
    zero = _model("adamw", [hooks.LearningRateMultiplier(0.0, targets="first/*")])
    before = zero.get_weights()
    for model in (plain, one):
        model.train_on_batch([TOKENS, X], Y)
    with pytest.warns(UserWarning, match="factor of 0 is no freezing"):
        zero.train_on_batch([TOKENS, X], Y)
    for a, b in zip(plain.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    after = zero.get_weights()
    for i, variable in enumerate(zero.weights):
        assert np.array_equal(before[i], after[i]) == variable.path.startswith("first/")


def test_factors_multiply_and_may_change(line):
    line.gradient_hooks.set([hooks.LearningRateMultiplier(0.5), hooks.LearningRateMultiplier(0.5)])
    x, y = np.array([[3.0, 4.0]]), np.array([[0.0]])
    line.train_on_batch(x, y)
    np.testing.assert_allclose(line.get_weights()[0], [[1 - 42 / 4], [1 - 56 / 4]])
    line.set_weights([np.ones((2, 1))])
    line.gradient_hooks[0].factor = lambda step: 2 * step
    line.train_on_batch(x, y)
    np.testing.assert_allclose(line.get_weights()[0], [[1 - 42.0], [1 - 56.0]])


def test_a_skipped_step_moves_nothing():
    model = _model("adamw", [hooks.SkipNonFinite(), hooks.LearningRateMultiplier(0.5)])
    model.train_on_batch([TOKENS, X], Y)
    before = model.get_weights() + [v.numpy() for v in model.optimizer.variables]
    model.train_on_batch([TOKENS, np.nan * X], Y)
    after = model.get_weights() + [v.numpy() for v in model.optimizer.variables]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_by_depth():
    model = _model("sgd", None)
    found = hooks.learning_rates_by_depth(model, decay=0.5)
    assert [(h.factor, h.targets.name) for h in found] == [(0.25, "table"), (0.5, "first")]
    model.gradient_hooks.set(found)
    plain = _model("sgd", [])
    before = plain.get_weights()
    for m in (model, plain):
        m.train_on_batch([TOKENS, X], Y)
    moved = [b - a for a, b in zip(before, plain.get_weights(), strict=True)]
    for i, factor in enumerate((0.25, 0.5, 0.5, 1.0, 1.0)):
        np.testing.assert_allclose(
            model.get_weights()[i] - before[i], factor * moved[i], rtol=1e-5, atol=1e-7
        )
    by_target = hooks.learning_rates_by_depth(["table/*", ["first/*", "second/*"]])
    assert [(h.factor, h.targets) for h in by_target] == [(1 / 2.6, "table/*")]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: hooks.LearningRateMultiplier(-1), ValueError, "`factor` must be zero or a pos"),
        (lambda: hooks.LearningRateMultiplier("1"), TypeError, "`factor` must be a number"),
        (lambda: hooks.learning_rates_by_depth("a/*"), TypeError, "`layers` must be a model or a"),
        (lambda: hooks.learning_rates_by_depth([]), ValueError, "There are no layers with weights"),
        (lambda: hooks.learning_rates_by_depth(["a"], 0), ValueError, "`decay` must be a positive"),
    ],
)
def test_wrong_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()
