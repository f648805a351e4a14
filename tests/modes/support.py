"""What the tests of modes share: models, optimizers, data, and how far two runs differ."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
from keras import layers

from keras_tapefit import TapeModel, hooks

BATCH_SIZE = 12
NUM_EXAMPLES = 48
RNG = np.random.default_rng(31)
X = RNG.normal(size=(NUM_EXAMPLES, 6)).astype("float32")
# Five tokens, four a sequence: every batch repeats rows.
TOKENS = RNG.integers(0, 5, size=(NUM_EXAMPLES, 4)).astype("int32")
Y = RNG.normal(size=(NUM_EXAMPLES, 2)).astype("float32")


@functools.cache
def mirrored(num_replicas: int) -> Any:
    """Returns a strategy on CPU devices, one for the whole process."""
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(num_replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


# Arguments of `compile`, and the number of replicas.
MODES: dict[str, tuple[dict[str, Any], int]] = {
    "graph": ({"jit_compile": False}, 1),
    "eager": ({"run_eagerly": True}, 1),
    "xla": ({"jit_compile": True}, 1),
    "spe": ({"steps_per_execution": 3, "jit_compile": False}, 1),
    "mirrored": ({}, 2),
    "mirrored_spe": ({"steps_per_execution": 3}, 2),
    "mirrored_eager": ({"run_eagerly": True}, 2),
}


def optimizers_by_pattern(*args: Any) -> Any:
    """Makes a `MultiOptimizer`; a Keras without it skips the test."""
    module = pytest.importorskip("keras.src.optimizers.multi_optimizer")
    return module.MultiOptimizer(module.OptimizerMap(*args))


def multi_optimizer(**options: Any) -> Any:
    return optimizers_by_pattern(
        keras.optimizers.SGD(0.05, momentum=0.9, **options),
        {"end.*": keras.optimizers.Adam(0.01, **options)},
    )


def scaled(optimizer: Any, initial_scale: float = 2.0**12) -> Any:
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=initial_scale)


# SGD shows wrong factors, to which Adam is blind.
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw_ema": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True),
    "multi": multi_optimizer,
    "loss_scale": lambda: scaled(keras.optimizers.SGD(0.05, momentum=0.9)),
    "loss_scale_multi": lambda: scaled(multi_optimizer()),
    "loss_scale_factor": lambda: keras.optimizers.SGD(0.05, momentum=0.9, loss_scale_factor=128.0),
}


def sensitive(gradient: Any, variable: Any) -> Any:
    """Not linear: a wrong factor shows with every optimizer."""
    return gradient * (1.0 + 0.3 * tf.norm(gradient))


def sensitive_hooks() -> list[Any]:
    """They see the mean of all parts: of each part they would make something else."""
    return [
        hooks.GradientMonitor(),
        sensitive,
        hooks.GlobalNormClipping(0.8),
        hooks.GradientNoise(0.05, seed=3),
    ]


def dense(model_class: Any = TapeModel) -> Any:
    inputs = keras.Input((6,), name="x")
    hidden = layers.Dense(5, activation="tanh", name="hidden")(inputs)
    return model_class(inputs, layers.Dense(2, name="end")(hidden))


def embedding(model_class: Any = TapeModel) -> Any:
    inputs = keras.Input((4,), dtype="int32", name="x")
    flat = layers.Flatten()(layers.Embedding(5, 3, name="table")(inputs))
    hidden = layers.Dense(5, activation="tanh", name="hidden")(flat)
    return model_class(inputs, layers.Dense(2, name="end")(hidden))


def normalized(model_class: Any = TapeModel) -> Any:
    """With BatchNormalization and Dropout: state that the forward pass changes."""
    inputs = keras.Input((6,), name="x")
    hidden = layers.Dense(5, activation="tanh", name="hidden")(inputs)
    hidden = layers.Dropout(0.2, seed=3)(layers.BatchNormalization(name="norm")(hidden))
    return model_class(inputs, layers.Dense(2, name="end")(hidden))


MODELS: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
    "dense": (dense, X),
    "embedding": (embedding, TOKENS),
    "normalized": (normalized, X),
}


def trained(
    model: str,
    optimizer: Callable[[], Any],
    num_replicas: int = 1,
    y: np.ndarray = Y,
    batch_size: int = BATCH_SIZE,
    epochs: int = 1,
    model_class: Any = TapeModel,
    num_examples: int = NUM_EXAMPLES,
    fit: dict[str, Any] | None = None,
    policy: str = "float32",
    **options: Any,
) -> Any:
    """Trains a model on batches in a fixed order; `model.log` is the history."""
    make, x = MODELS[model]
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    scope = mirrored(num_replicas).scope() if num_replicas > 1 else contextlib.nullcontext()
    with dtype_policy(policy):
        with scope:
            made = make(model_class)
            if num_replicas == 1 and "run_eagerly" not in options:
                options = {"jit_compile": False, **options}
            made.compile(optimizer(), options.pop("loss", "mse"), **options)
        given = {"batch_size": batch_size, "epochs": epochs, "shuffle": False, "verbose": 0}
        given = {"x": x[:num_examples], "y": y[:num_examples], **given, **(fit or {})}
        made.log = made.fit(**given).history
    return made


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Sets a dtype policy for a while; `clear_session` inside would take it away again."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def vector(values: Any) -> np.ndarray:
    flat = [np.asarray(v, "float64").ravel() for v in values]
    return np.concatenate(flat) if flat else np.zeros(0)


def difference(found: Any, expected: Any) -> float:
    """Returns the distance of the weights of two models, relative to their length."""
    a, b = (vector(m.get_weights()) for m in (found, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_same_bits(found: Any, expected: Any) -> None:
    """Asserts that weights and optimizers of two models are equal to the bit."""
    pairs = [(found.variables, expected.variables)]
    pairs.append((found.optimizer.variables, expected.optimizer.variables))
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=b.path)


def hook_variables(model: Any) -> list[Any]:
    return [v for hook in model.gradient_hooks for v in hook.variables]


def assert_replicas_agree(model: Any, leave_out: str = "moving_") -> None:
    """Asserts that every replica has the same values, to the bit.

    BatchNormalization statistics are each replica's own in Keras; `leave_out` is them.
    """
    variables = [*model.variables, *model.optimizer.variables, *hook_variables(model)]
    for variable in variables:
        if leave_out in variable.path:
            continue
        copies = model.distribute_strategy.experimental_local_results(variable.value)
        assert len(copies) == model.distribute_strategy.num_replicas_in_sync, variable.path
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy.numpy(), copies[0].numpy(), variable.path)


def modes(*names: str) -> list[Any]:
    """Returns the names of all modes, those not named as slow tests."""
    return everyday(names, of=MODES)


def cells(
    names: Iterable[str], everyday: Iterable[tuple[str, str]], thorough: str, others: Iterable[str]
) -> list[Any]:
    """Returns pairs of a mode and a name, those not in `everyday` as slow tests.

    Args:
        names: of optimizers.
        everyday: the pairs that are tested every day.
        thorough: the name that is tested in all modes.
        others: the modes of the other names.
    """
    pairs = {(mode, n) for n in names for mode in (MODES if n == thorough else others)}
    slow = pytest.mark.slow
    rest = [pytest.param(*pair, marks=slow) for pair in sorted(pairs - set(everyday))]
    return [*everyday, *rest]


@contextlib.contextmanager
def no_rewriting() -> Iterator[None]:
    """Keeps TensorFlow from regrouping sums, by where in a graph they stand.

    Several steps in one graph are otherwise rounded by their places in it.
    """
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False, **before})
