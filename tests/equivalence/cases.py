"""What the table is made of: hooks, modes, optimizers, models. Each is one list.

A hook, a mode or an optimizer is added by one line.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, backward, hooks
from keras_tapefit.update import optimizers

BATCH_SIZE = 12
NUM_EPOCHS = 2


@dataclass(frozen=True)
class Mode:
    """A way to run the same training.

    Args:
        name: in tests and in the table.
        compile: arguments of `compile`.
        strategy: makes the strategy in whose scope the model is made.
        optimizer: what is put around the optimizer.
        feed: takes the data, and returns what `fit` gets.
        body: what stands in the place of a model's first layers, by its name.
        tolerance: the largest relative difference of weights and logs to the reference.
        leaves_out: names of hooks and optimizers that have no meaning here, by reason.
        everyday: whether it is in the slice that runs with the everyday tests.
    """

    name: str
    compile: dict[str, Any] = field(default_factory=dict)
    strategy: Callable[[], Any] = contextlib.nullcontext
    optimizer: Callable[[Any], Any] = lambda optimizer: optimizer
    feed: Callable[[dict[str, Any]], dict[str, Any]] = lambda data: {
        **data,
        "batch_size": BATCH_SIZE,
        "shuffle": False,
    }
    body: dict[str, Callable[[], Any]] = field(default_factory=dict)
    tolerance: float = 1e-6
    leaves_out: dict[str, str] = field(default_factory=dict)
    everyday: bool = False


@functools.cache
def mirrored(num_replicas: int) -> Any:
    """Returns a strategy on CPU devices, one for the whole process."""
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(num_replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def _accumulating(optimizer: Any, steps: int = 4) -> Any:
    for leaf in optimizers.leaves(optimizer):
        leaf.gradient_accumulation_steps = steps
    return optimizer


def _loss_scale(optimizer: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**12)


REFERENCE = Mode("graph", {"jit_compile": False})

_OF_PARTS = {
    "SharpnessAware": "each part has a point uphill of its own",
    "ProjectedConflicts": "the conflicts are those of each part",
    "PerExampleClipping": "refused, since its `chunk_size` bounds the memory already",
}
_MORE_PARTS = {"NoiseScale": "there are other parts, so it is another estimate"}
_OF_OUTPUTS = {
    "OutputGradient of examples": "its function sees the gradient of each part's own loss"
}
# Accumulated gradients are of batches, and it is a batch that is bad.
_OF_WINDOWS = {
    **_OF_PARTS,
    **_MORE_PARTS,
    **_OF_OUTPUTS,
    "OutputMonitor": "it logs each batch, as the loss is logged",
    "PerExampleClipping": "each batch is a lot with noise of its own",
    "SkipNonFinite": "a bad batch costs itself, and not the window that it is in",
    "SkipNonFinite that locates": "as SkipNonFinite",
    "SkipSpikes": "of a window that is rejected the metrics of its earlier batches count",
    "SkipSpikes of the loss": "as SkipSpikes",
}


class OneHot(layers.Layer):
    """What `layers.Embedding(5, 3)` computes, without a lookup: gradients are dense."""

    def build(self, input_shape: Any) -> None:
        self.embeddings = self.add_weight(shape=(5, 3), initializer="uniform", name="embeddings")

    def call(self, inputs: Any) -> Any:
        # Not `@`: its gradient, vectorised, crashes oneDNN (TensorFlow 2.21).
        return keras.ops.matmul(tf.one_hot(inputs, 5), self.embeddings)


def _embedding(layer: Callable[..., Any] = lambda **name: layers.Embedding(5, 3, **name)) -> Any:
    # Five tokens, four a sequence: every batch repeats rows.
    inputs = keras.Input((4,), dtype="int32", name="x")
    flat = layers.Flatten()(layer(name="table")(inputs))
    return inputs, layers.Dense(5, activation="tanh", name="hidden")(flat)


MODES = [
    Mode("eager", {"run_eagerly": True}),
    Mode("XLA", {"jit_compile": True}, everyday=True),
    Mode("3 steps per execution", {"steps_per_execution": 3, "jit_compile": False}),
    Mode(
        "2 replicas",
        strategy=lambda: mirrored(2).scope(),
        leaves_out=_MORE_PARTS,
        everyday=True,
    ),
    Mode("loss scale", {"jit_compile": False}, optimizer=_loss_scale),
    Mode("update in XLA", {"jit_compile": "update"}),
    Mode(
        "one-hot product",
        {"jit_compile": False},
        body={"embedding": functools.partial(_embedding, OneHot)},
        leaves_out={
            "dense": "has no embedding",
            "AdaptiveClipping": "a row of an embedding is a unit, one of a weight is not",
        },
    ),
    Mode(
        "4 micro-batches",
        {"jit_compile": False, "micro_batches": 4},
        leaves_out={**_OF_PARTS, **_MORE_PARTS, **_OF_OUTPUTS},
    ),
    Mode(
        "4 accumulated",
        {"jit_compile": False},
        optimizer=_accumulating,
        feed=lambda data: {**data, "batch_size": BATCH_SIZE // 4, "shuffle": False},
        leaves_out=_OF_WINDOWS,
        everyday=True,
    ),
    Mode(
        "2 accumulated on 2 replicas",
        strategy=lambda: mirrored(2).scope(),
        optimizer=functools.partial(_accumulating, steps=2),
        feed=lambda data: {**data, "batch_size": BATCH_SIZE // 2, "shuffle": False},
        leaves_out=_OF_WINDOWS,
    ),
]


@dataclass(frozen=True)
class Case:
    """One or more hooks, and the data that give them something to do.

    Args:
        hooks: makes them.
        bad_target: the target of one example, in the second half of the third batch.
        backward: makes the way in which gradients are computed.
        compile: more arguments of `compile`.
    """

    hooks: Callable[[], list[Any]]
    bad_target: float | None = None
    backward: Callable[[], Any] | None = None
    compile: dict[str, Any] = field(default_factory=dict)


def grow(gradient: Any, variable: Any) -> Any:
    """Not linear, so that a wrong factor shows with every optimizer."""
    return gradient * (1.0 + tf.norm(gradient))


def break_large(gradient: Any, variable: Any) -> Any:
    """Makes NaN of the largest elements."""
    return tf.where(tf.abs(gradient) > 0.3, math.nan, gradient)


def bend(gradient: Any, layer: Any) -> Any:
    """Not linear, example by example."""
    return gradient * (1.0 + 20.0 * tf.reduce_sum(tf.square(gradient), axis=-1, keepdims=True))


def _columns(y: Any, y_pred: Any) -> list[Any]:
    """Two tasks: each column of the targets is one."""
    return tf.unstack(tf.reduce_mean(tf.square(y - y_pred), axis=0))


def _warmed_up() -> dict[str, Any]:
    return {"num_warmup_steps": 2, "momentum": 0.9}


HOOKS = {
    "LambdaHook": Case(lambda: [grow]),
    "GlobalNormClipping": Case(lambda: [grow, hooks.GlobalNormClipping(0.5)]),
    "GlobalNormClipping that logs": Case(
        lambda: [grow, hooks.GlobalNormClipping(0.5, log_clipped=True)]
    ),
    "NormClipping": Case(lambda: [hooks.NormClipping(0.2)]),
    "NormClipping per layer": Case(lambda: [hooks.NormClipping(0.3, per_layer=True)]),
    "ValueClipping": Case(lambda: [hooks.ValueClipping(0.05)]),
    "BlockRMSClipping": Case(lambda: [hooks.BlockRMSClipping(0.05)]),
    "AdaptiveClipping": Case(lambda: [hooks.AdaptiveClipping(0.1)]),
    "PercentileClipping": Case(lambda: [hooks.PercentileClipping(30, history=4)]),
    "ZScoreClipping": Case(lambda: [hooks.ZScoreClipping(1.0, **_warmed_up())], 30.0),
    "SkipNonFinite": Case(lambda: [hooks.SkipNonFinite(), grow], math.nan),
    "SkipNonFinite that locates": Case(lambda: [hooks.SkipNonFinite(locate=True)], math.nan),
    "SkipSpikes": Case(lambda: [hooks.SkipSpikes(40.0, **_warmed_up())], 300.0),
    "SkipSpikes of the loss": Case(
        lambda: [hooks.SkipSpikes(40.0, monitor="loss", **_warmed_up())], 300.0
    ),
    "ZeroNonFinite": Case(lambda: [break_large, hooks.ZeroNonFinite()]),
    "GradientScaling": Case(lambda: [hooks.GradientScaling(0.5), grow]),
    "GradientNoise": Case(lambda: [hooks.GradientNoise(0.1, seed=3)]),
    "Centralization": Case(lambda: [hooks.Centralization(), grow]),
    "LearningRateMultiplier": Case(lambda: [hooks.LearningRateMultiplier(0.3, targets="end/*")]),
    "Freezing": Case(lambda: [hooks.Freezing("hidden/*", epochs=1), grow]),
    "GradualUnfreezing": Case(lambda: [hooks.GradualUnfreezing(["end/*", "*"]), grow]),
    "GradientMonitor": Case(lambda: [hooks.GradientMonitor(per_variable=True), grow]),
    "GradientMonitor per layer": Case(lambda: [hooks.GradientMonitor(per_layer=True), grow]),
    "UpdateMonitor": Case(lambda: [hooks.UpdateMonitor(per_variable=True)]),
    "During": Case(lambda: [hooks.During(hooks.GradientNoise(0.1, seed=3), steps=(2, 9), every=2)]),
    "OutputGradient": Case(
        lambda: [hooks.OutputGradient(lambda g, layer: -2.0 * g, "hidden"), grow]
    ),
    "OutputGradient of examples": Case(lambda: [hooks.OutputGradient(bend, "hidden"), grow]),
    "OutputMonitor": Case(lambda: [hooks.OutputMonitor(["hidden", "end"]), grow]),
    "NoiseScale": Case(lambda: [hooks.NoiseScale(0.9), grow], compile={"micro_batches": 6}),
    "SharpnessAware": Case(
        lambda: [grow], backward=lambda: backward.SharpnessAware(0.1, synchronize=True)
    ),
    "ProjectedConflicts": Case(
        lambda: [grow], backward=lambda: backward.ProjectedConflicts(_columns, seed=3)
    ),
    "PerExampleClipping": Case(
        lambda: [grow], backward=lambda: backward.PerExampleClipping(0.5, 0.1, seed=3)
    ),
}


def _multi_optimizer() -> Any:
    module = pytest.importorskip("keras.src.optimizers.multi_optimizer")
    by_pattern = {"end.*": keras.optimizers.Adam()}
    return module.MultiOptimizer(
        module.OptimizerMap(keras.optimizers.SGD(0.05, momentum=0.9), by_pattern)
    )


# SGD shows wrong factors, to which Adam is blind.
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AdamW EMA": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True),
    "MultiOptimizer": _multi_optimizer,
}


def _dense() -> tuple[Any, Any]:
    inputs = keras.Input((6,), name="x")
    return inputs, layers.Dense(5, activation="tanh", name="hidden")(inputs)


MODELS = {"embedding": _embedding, "dense": _dense}


def _data(model: str, bad_target: float | None) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    shapes = {"dense": (48, 6), "embedding": (48, 4)}
    x = rng.normal(size=shapes[model]).astype("float32")
    if model == "embedding":
        x = rng.integers(0, 5, size=shapes[model]).astype("int32")
    y = rng.normal(size=(48, 2)).astype("float32")
    if bad_target is not None:
        y[2 * BATCH_SIZE + BATCH_SIZE * 3 // 4] = bad_target
    return {"x": x, "y": y}


@dataclass(frozen=True)
class Result:
    """What a training left.

    Args:
        weights: all in one vector.
        logs: epoch by epoch.
        state: of the hooks, all in one vector.
    """

    weights: np.ndarray
    logs: dict[str, list[float]]
    state: np.ndarray


def train(hook: str, mode: Mode, optimizer: str, model: str) -> Result:
    """Runs the training of one cell."""
    case = HOOKS[hook]
    keras.utils.set_random_seed(5)
    with mode.strategy():
        inputs, hidden = mode.body.get(model, MODELS[model])()
        trained = TapeModel(inputs, layers.Dense(2, name="end")(hidden))
        trained.compile(
            mode.optimizer(OPTIMIZERS[optimizer]()),
            "mse",
            gradient_hooks=case.hooks(),
            backward=None if case.backward is None else case.backward(),
            **{**case.compile, **mode.compile},
        )
    fed = mode.feed(_data(model, case.bad_target))
    history = trained.fit(**fed, epochs=NUM_EPOCHS, verbose=0).history
    state = [v.numpy() for h in trained.gradient_hooks for v in h.variables]
    return Result(_vector(trained.get_weights()), history, _vector(state))


@functools.cache
def reference(hook: str, optimizer: str, model: str) -> Result:
    """Runs the training in a plain graph, once."""
    return train(hook, REFERENCE, optimizer, model)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the distance of two vectors, relative to the length of the second."""
    if a.size == 0:
        return 0.0
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def differences(hook: str, mode: Mode, optimizer: str, model: str) -> dict[str, float]:
    """Returns how far a mode is from the reference: weights, logs, state of hooks."""
    found, expected = train(hook, mode, optimizer, model), reference(hook, optimizer, model)
    # A dynamic loss scale is a gate of its own: its zero is in the logs.
    names = sorted(found.logs.keys() | expected.logs.keys())
    missing = {name for name in names if name not in expected.logs or name not in found.logs}
    assert missing <= {"skipped_steps"}, missing
    none = [0.0] * NUM_EPOCHS
    logs = [_vector([r.logs.get(name, none) for name in names]) for r in (found, expected)]
    return {
        "weights": difference(found.weights, expected.weights),
        "logs": difference(*logs),
        "state": difference(found.state, expected.state),
    }


def _vector(values: list[Any]) -> np.ndarray:
    flat = [np.asarray(v, "float64").ravel() for v in values]
    return np.concatenate(flat) if flat else np.zeros(0)
