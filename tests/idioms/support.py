"""What a program gives back: a model, how it is compiled, and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

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
        The program, its logs, and all weights and optimizer variables as arrays.
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
        options = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "verbose": 0}
        if len(program.data) == 1 and not isinstance(program.data[0], np.ndarray | dict | list):
            options.pop("batch_size")
        logs = model.fit(*program.data, **options).history
    held = [model, *program.holds]
    state = [v for each in held for v in each.variables]
    state += model.optimizer.variables if model.optimizer is not None else []
    state += [v for v in vars(model).values() if hasattr(v, "assign_add")]
    return program, logs, [keras.ops.convert_to_numpy(v) for v in state]
