"""All that a step changes is in one list, by names that do not depend on order."""

from __future__ import annotations

import gc
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, backward, callbacks, hooks
from keras_tapefit.training.runtime import runtime_of

X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(24, 2)).astype("float32")

EVERY_HOOK = [
    lambda: hooks.SkipNonFinite(max_consecutive=5, locate=True),
    lambda: hooks.SkipSpikes(),
    lambda: hooks.ZeroNonFinite(),
    lambda: hooks.GlobalNormClipping(1.0),
    lambda: hooks.NormClipping(1.0),
    lambda: hooks.ValueClipping(1.0),
    lambda: hooks.BlockRMSClipping(1.0),
    lambda: hooks.AdaptiveClipping(),
    lambda: hooks.PercentileClipping(history=8),
    lambda: hooks.ZScoreClipping(num_warmup_steps=2),
    lambda: hooks.Centralization(),
    lambda: hooks.GradientScaling(0.5),
    lambda: hooks.GradientNoise(0.1, seed=1),
    lambda: hooks.LearningRateMultiplier(0.5),
    lambda: hooks.Freezing("a/*", epochs=1),
    lambda: hooks.GradualUnfreezing(["b/*", "a/*"]),
    lambda: hooks.LambdaHook(lambda g, v: g),
    lambda: hooks.GradientMonitor(),
    lambda: hooks.UpdateMonitor(),
    lambda: hooks.NoiseScale(),
    lambda: hooks.OutputGradient(lambda gradient, layer: gradient),
    lambda: hooks.OutputMonitor(),
]


def model_of(optimizer=None, normalization=layers.BatchNormalization, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = layers.Dropout(0.2)(layers.Dense(3, name="a")(inputs))
    model = TapeModel(inputs, layers.Dense(2, name="b")(normalization()(hidden)))
    model.compile(optimizer or keras.optimizers.Adam(), "mse", metrics=["mae"], **options)
    return model


def reachable():
    """Returns every variable that is alive, by its identity."""
    gc.collect()
    found = {}
    for value in gc.get_objects():
        if isinstance(value, keras.Variable):
            found[id(value.value)] = value
    return found


def listed(model):
    runtime = runtime_of(model)
    everything = [
        *model.variables,
        *model.metrics_variables,
        *(v for metric in model.metrics for v in metric.variables),
        *model.optimizer.variables,
        *runtime.state.variables().values(),
    ]
    return {id(v.value) for v in everything}


def check(model):
    model.fit(X, Y, batch_size=8, verbose=0)
    known = listed(model)
    before = {key: (v, np.array(v.value.numpy())) for key, v in reachable().items()}
    model.fit(X, Y, batch_size=8, verbose=0)
    changed = [
        v.path
        for key, (v, value) in before.items()
        if not np.array_equal(value, v.value.numpy(), equal_nan=value.dtype.kind == "f")
        and key not in known
    ]
    assert not changed


def test_with_every_hook():
    model = model_of(gradient_hooks=[make() for make in EVERY_HOOK], micro_batches=2)
    known = {type(hook).__name__ for hook in model.gradient_hooks}
    assert known == {n for n in hooks.__all__ if _is_hook(getattr(hooks, n))}
    with warnings.catch_warnings():
        # The order makes no sense, and says so.
        warnings.simplefilter("ignore", UserWarning)
        check(model)


def _is_hook(value):
    abstract = (hooks.GradientHook,)
    return (
        isinstance(value, type) and issubclass(value, hooks.GradientHook) and value not in abstract
    )


@pytest.mark.parametrize(
    "method",
    [
        backward.Backpropagation(),
        backward.SharpnessAware(0.05),
        backward.ProjectedConflicts(
            tasks=lambda y, p: list(tf.unstack(tf.reduce_mean((y - p) ** 2, 0)))
        ),
    ],
    ids=lambda method: type(method).__name__,
)
def test_with_every_method(method):
    check(model_of(backward=method))


def test_with_every_example_clipped_and_noise():
    method = backward.PerExampleClipping(1.0, noise_multiplier=0.5, seed=1)
    check(model_of(normalization=layers.LayerNormalization, backward=method))


def test_with_windows_and_records():
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)
    model = model_of(optimizer, gradient_hooks=[hooks.SkipNonFinite()], micro_batches=2)
    history = callbacks.GradientHistory()
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[history])
    check(model)


def test_names_do_not_depend_on_order():
    model = model_of(gradient_hooks=[hooks.SkipSpikes(), hooks.SkipSpikes()])
    model.fit(X, Y, batch_size=8, verbose=0)
    state = runtime_of(model).state
    before = {name: id(v) for name, v in state.variables().items()}
    model.gradient_hooks.reverse()
    assert {name: id(v) for name, v in state.variables().items()} == before
