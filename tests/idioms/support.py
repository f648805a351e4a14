"""What a program gives back: a model, how it is compiled, and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

BATCH_SIZE = 4
EPOCHS = 2


@dataclass
class Program:
    """One training.

    Args:
        model: what is trained.
        data: what `fit` gets.
        compile: arguments of the model's `compile`.
        train: instead of `fit`; returns the logs.
        holds: models whose weights are compared too.
    """

    model: Any
    data: tuple[Any, ...]
    compile: dict[str, Any] = field(default_factory=lambda: {"optimizer": "adam", "loss": "mse"})
    train: Callable[[Any], dict[str, Any]] | None = None
    holds: tuple[Any, ...] = ()


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns float32 numbers around zero, the same for each seed."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def tokens(*shape: int, high: int = 9, seed: int = 0) -> np.ndarray:
    """Returns int32 tokens from 0 up, the same for each seed."""
    return np.random.default_rng(seed).integers(0, high, size=shape).astype("int32")


def run(make: Callable[[Any], Program], base: Any, gradient_hooks: Any = None) -> Any:
    """Trains a program on a base class.

    Returns:
        The program, its logs, and all weights and bare variables by name.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    program = make(base)
    model = program.model
    model.compile(**program.compile)
    if gradient_hooks is not None:
        model.gradient_hooks = gradient_hooks
    if program.train is not None:
        logs = program.train(model)
    else:
        options = {"epochs": EPOCHS, "verbose": 0, "shuffle": False}
        if not isinstance(program.data[0], tf.data.Dataset):
            options["batch_size"] = BATCH_SIZE
        logs = model.fit(*program.data, **options).history
    held = [model, *program.holds]
    state = {f"{i}": v for i, v in enumerate(v for each in held for v in each.variables)}
    state |= {name: v for name, v in vars(model).items() if isinstance(v, tf.Variable)}
    # Ours has a place for what is frozen, which may be trained later; else they are alike.
    if model.optimizer:
        state["iterations"] = model.optimizer.iterations
    return program, logs, {name: v.numpy() for name, v in state.items()}
