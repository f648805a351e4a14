"""The models and batches that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np


@dataclass(frozen=True)
class Workload:
    """A model and a batch for it.

    Attributes:
        name: as in the tables.
        outputs: makes the outputs of a functional model of its inputs.
        x: a batch of inputs.
        y: a batch of labels.
    """

    name: str
    outputs: Callable[[Any], Any]
    x: np.ndarray
    y: np.ndarray

    def build(self, cls: Any) -> Any:
        """Returns a model of a class, the weights the same each time."""
        keras.utils.set_random_seed(0)
        inputs = keras.Input(self.x.shape[1:], dtype=self.x.dtype.name)
        return cls(inputs, self.outputs(inputs))


def loss() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dense_stack(num_layers: int) -> Workload:
    """A deep network of small layers: 2 variables a layer."""

    def outputs(x: Any) -> Any:
        for _ in range(num_layers):
            x = keras.layers.Dense(32, "relu")(x)
        return keras.layers.Dense(10)(x)

    return Workload(f"{2 * num_layers + 2} variables", outputs, _normal(32, 32), _labels(32))


def small_mlp() -> Workload:
    def outputs(x: Any) -> Any:
        return keras.layers.Dense(10)(keras.layers.Dense(32, "relu")(x))

    return Workload("small MLP", outputs, _normal(32, 16), _labels(32))


def mlp() -> Workload:
    """Three layers of 512, 0.8 M weights, 64 examples."""

    def outputs(x: Any) -> Any:
        for _ in range(3):
            x = keras.layers.Dense(512, "relu")(x)
        return keras.layers.Dense(10)(x)

    return Workload("MLP", outputs, _normal(64, 512), _labels(64))


def recurrent() -> Workload:
    """A GRU of 64 over 16 steps of 128 numbers, between dense layers of 512."""

    def outputs(x: Any) -> Any:
        x = keras.layers.Dense(512, "relu")(x)
        x = keras.layers.GRU(64)(x)
        x = keras.layers.Dense(512, "relu")(x)
        return keras.layers.Dense(10)(keras.layers.Dense(512, "relu")(x))

    return Workload("GRU classifier", outputs, _normal(32, 16, 128), _labels(32))


def slopes() -> Workload:
    """Three layers of 512, each with a PReLU, 64 examples."""

    def outputs(x: Any) -> Any:
        for _ in range(3):
            x = keras.layers.PReLU()(keras.layers.Dense(512)(x))
        return keras.layers.Dense(10)(x)

    return Workload("MLP with PReLU", outputs, _normal(64, 512), _labels(64))


def conv_classifier() -> Workload:
    """MNIST-sized, 2.8 M weights."""

    def outputs(x: Any) -> Any:
        x = keras.layers.Conv2D(32, 3, activation="relu")(x)
        x = keras.layers.Conv2D(64, 3, activation="relu")(x)
        x = keras.layers.Flatten()(keras.layers.MaxPooling2D()(x))
        return keras.layers.Dense(10)(keras.layers.Dense(300, "relu")(x))

    return Workload("conv classifier", outputs, _normal(32, 28, 28, 1), _labels(32))


def resnet() -> Workload:
    def outputs(x: Any) -> Any:
        backbone = keras.applications.ResNet50(
            include_top=False, weights=None, input_tensor=x, pooling="avg"
        )
        return keras.layers.Dense(10)(backbone.output)

    return Workload("ResNet50, 64×64", outputs, _normal(8, 64, 64, 3), _labels(8))


def transformer() -> Workload:
    """Two blocks and an embedding of 20,000 × 128."""

    def outputs(x: Any) -> Any:
        x = keras.layers.Embedding(20_000, 128)(x)
        for _ in range(2):
            mixed = keras.layers.MultiHeadAttention(4, 32)(x, x)
            x = keras.layers.LayerNormalization()(x + mixed)
            hidden = keras.layers.Dense(128)(keras.layers.Dense(256, "relu")(x))
            x = keras.layers.LayerNormalization()(x + hidden)
        return keras.layers.Dense(10)(keras.layers.GlobalAveragePooling1D()(x))

    return Workload("Transformer", outputs, _words(16, 64), _labels(16))


def lstm() -> Workload:
    def outputs(x: Any) -> Any:
        x = keras.layers.Embedding(20_000, 128)(x)
        return keras.layers.Dense(10)(keras.layers.LSTM(64)(x))

    return Workload("LSTM", outputs, _words(16, 32), _labels(16))


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def _labels(number: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 10, number).astype("int32")


def _words(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 20_000, shape).astype("int32")
