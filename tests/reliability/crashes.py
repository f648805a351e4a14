"""Steps of odd shapes, in a process that may die: `python -m tests.reliability.crashes CASE ...`.

Without arguments all cases are made. Of each, a line is written before and one after it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).parent.parent.parent
SECONDS = 900

# --- The models: layers, the shape of an example, the number of examples


def models() -> dict[str, tuple[Callable[[], Any], tuple[int, ...], int]]:
    from keras import Sequential, layers, ops

    class Scales(layers.Layer):
        """Weights of rank 0 and 1."""

        def build(self, shape: Any) -> None:
            self.scalar = self.add_weight(shape=(), initializer="ones")
            self.vector = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x: Any) -> Any:
            return x * self.scalar * self.vector

    class Einsum(layers.Layer):
        def build(self, shape: Any) -> None:
            self.kernel = self.add_weight(shape=(shape[-1], 2, 3))

        def call(self, x: Any) -> Any:
            return ops.einsum("...i,iab->...ba", x, self.kernel)

    class Block(layers.Layer):
        """A block of a Transformer."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.attention = layers.MultiHeadAttention(4, width // 4)
            self.norm = layers.LayerNormalization()
            self.inner, self.outer = layers.Dense(2 * width, "relu"), layers.Dense(width)

        def build(self, shape: Any) -> None:
            self.attention.build(shape, shape)
            self.norm.build(shape)
            self.inner.build(shape)
            self.outer.build((*shape[:-1], 2 * shape[-1]))

        def call(self, x: Any) -> Any:
            x = self.norm(x + self.attention(x, x))
            return x + self.outer(self.inner(x))

    dense = layers.Dense
    return {
        "dense": (lambda: dense(3), (4,), 4),
        "one example": (lambda: dense(3), (4,), 1),
        "no example": (lambda: dense(3), (4,), 0),
        # A batch of no features ends the process in plain Keras's `predict` already.
        "no times": (lambda: dense(3), (0, 4), 4),
        "one feature": (lambda: dense(1), (1,), 4),
        "rank 3": (lambda: dense(3), (1, 4), 4),
        "rank 4": (lambda: dense(3), (2, 1, 4), 4),
        "rank 5": (lambda: dense(3), (2, 3, 1, 4), 4),
        "rank 6": (lambda: dense(3), (1, 2, 3, 2, 4), 4),
        "large": (lambda: dense(256, use_bias=False), (64, 128), 16),
        "large of rank 4": (lambda: dense(128), (1, 64, 128), 16),
        "block": (lambda: Block(128), (64, 128), 16),
        "block, one example": (lambda: Block(32), (5, 32), 1),
        "rank 0 and 1": (Scales, (3, 4), 4),
        "einsum": (Einsum, (3, 4), 4),
        "EinsumDense": (lambda: layers.EinsumDense("abc,cde->abde", (3, 2, 5)), (3, 4), 4),
        "conv, strides": (lambda: layers.Conv2D(2, 3, strides=2), (7, 8, 3), 4),
        "conv, dilation": (lambda: layers.Conv2D(2, 3, dilation_rate=2), (7, 8, 3), 4),
        "conv, groups": (lambda: layers.Conv2D(4, 3, groups=2), (7, 8, 4), 4),
        "conv, 1 by 1": (lambda: layers.Conv2D(2, 1), (1, 1, 3), 1),
        "conv, no example": (lambda: layers.Conv2D(2, 3, padding="same"), (4, 4, 3), 0),
        "conv, no width": (lambda: layers.Conv2D(2, 3, padding="same"), (4, 0, 3), 4),
        "conv 1d, causal": (
            lambda: layers.Conv1D(2, 3, padding="causal", dilation_rate=2),
            (9, 3),
            4,
        ),
        "conv 3d": (lambda: layers.Conv3D(2, 2, strides=2), (4, 5, 3, 2), 4),
        "conv 3d, dilation": (lambda: layers.Conv3D(2, 2, dilation_rate=2), (4, 5, 4, 2), 4),
        "depthwise": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 6, 3), 4),
        "separable": (lambda: layers.SeparableConv2D(2, 3, padding="same"), (5, 6, 3), 4),
        "transposed": (lambda: layers.Conv2DTranspose(2, 3, strides=2), (5, 4, 3), 4),
        "embedding": (lambda: layers.Embedding(10, 3), (5,), 4),
        "embedding, no times": (lambda: layers.Embedding(10, 3), (0,), 4),
        "embedding, no example": (lambda: layers.Embedding(10, 3), (5,), 0),
        "embedding, rank 4": (lambda: layers.Embedding(10, 3), (2, 1, 5), 4),
        "lstm": (lambda: layers.LSTM(3, unroll=True), (2, 4), 4),
        "lstm, one time": (lambda: layers.LSTM(3), (1, 4), 1),
        "gru, return all": (lambda: layers.GRU(3, return_sequences=True), (2, 4), 2),
        "layer norm, no axis": (lambda: layers.LayerNormalization(axis=(1, 2)), (3, 4), 1),
        "group norm": (lambda: layers.GroupNormalization(2), (3, 4), 4),
        "batch norm, one example": (layers.BatchNormalization, (4,), 1),
        "prelu": (layers.PReLU, (3, 4), 4),
        "pooling": (lambda: Sequential([dense(2), layers.MaxPooling1D(2)]), (5, 4), 4),
        "resizing": (lambda: Sequential([dense(2), layers.UpSampling2D(2)]), (2, 3, 4), 4),
    }


def methods() -> dict[str, dict[str, Any]]:
    import tensorflow as tf

    from keras_tapefit import backward, hooks

    def tasks(y: Any, y_pred: Any) -> list[Any]:
        return [tf.reduce_mean(tf.square(y_pred)), tf.reduce_mean(y_pred)]

    clipping = backward.PerExampleClipping
    return {
        "plain": {},
        "micro-batches": {"micro_batches": 3},
        "taps": {"gradient_hooks": [hooks.OutputMonitor()]},
        "sharpness": {"backward": backward.SharpnessAware(0.05)},
        "conflicts": {"backward": backward.ProjectedConflicts(tasks)},
        "examples": {"backward": clipping(0.1)},
        "examples in chunks": {"backward": clipping(0.1, chunk_size=3), "loss": squares},
        "examples in micro-batches": {"backward": clipping(0.1), "micro_batches": 3},
        "examples, float16": {
            "backward": clipping(0.1),
            "loss": squares,
            "policy": "mixed_float16",
        },
    }


def squares(y: Any, y_pred: Any) -> Any:
    """A loss that is not Keras's own: examples are taken one by one."""
    import tensorflow as tf

    return tf.reduce_mean(tf.square(y_pred), axis=-1)


def make(case: str) -> str:
    """Makes two steps; returns what came of them."""
    import keras
    import numpy as np

    from keras_tapefit import TapeModel

    model_name, _, method = case.partition(" | ")
    layer, shape, number = models()[model_name]
    options = methods()[method]
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(options.pop("policy", "float32"))
    rng = np.random.default_rng(0)
    try:
        is_index = model_name.startswith("embedding")
        inputs = keras.Input(shape, dtype="int32" if is_index else "float32")
        outputs = keras.layers.Dense(2, dtype="float32")(layer()(inputs))
        x = rng.normal(size=(number, *shape)).astype("float32")
        x = rng.integers(0, 10, size=x.shape).astype("int32") if is_index else x
        y = np.zeros((number, *outputs.shape[1:]), "float32")
        model = TapeModel(inputs, outputs)
        model.compile(**{"optimizer": "sgd", "loss": "mse", **options})
        for _ in range(2):
            model.train_on_batch(x, y)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        keras.config.set_dtype_policy("float32")
        keras.utils.clear_session()
    finite = all(np.isfinite(w).all() for w in model.get_weights())
    return "trained" if finite else "not finite"


def cases() -> list[str]:
    return [f"{model} | {method}" for model in models() for method in methods()]


def outcomes(of: list[str]) -> dict[str, str]:
    """Makes cases in child processes; returns what came of each.

    Where a process dies, the case that it was at is "killed by" its signal, and another
    process goes on.
    """
    found: dict[str, str] = {}
    while left := [case for case in of if case not in found]:
        command = [sys.executable, "-m", "tests.reliability.crashes", *left]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        begun = ""
        for line in done.stdout.splitlines():
            kind, _, rest = line.partition("\t")
            if kind == "begins":
                begun = rest
            elif kind == "ends":
                found[begun], begun = rest, ""
        if begun:
            found[begun] = f"killed by {-done.returncode}"
        elif done.returncode or not found:
            raise RuntimeError(done.stderr[-3000:])
    return found


def main(chosen: list[str]) -> None:
    warnings.simplefilter("ignore")
    for case in chosen or cases():
        print(f"begins\t{case}", flush=True)
        print(f"ends\t{make(case)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
