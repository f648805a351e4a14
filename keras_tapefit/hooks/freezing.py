"""Freezing by epoch."""

from typing import Any

import keras

from keras_tapefit.gradients import Gradients, Targets
from keras_tapefit.hooks.base import GradientHook


@keras.saving.register_keras_serializable("keras_tapefit")
class Freezing(GradientHook):
    """Freezes variables for some epochs of `fit`.

    Frozen variables are absent from the tape and from the update: their values and the
    optimizer's state for them stay bit for bit, and their part of the backward pass is
    not computed. A layer that is frozen whole runs as with `trainable = False`.

    Args:
        targets: what to freeze: a layer, a variable, a predicate on a variable, a glob
            on `variable.path`, or a list of these.
        epochs: how long. An integer n: the first n epochs, 0 to n − 1. A pair
            `(start, stop)`: epochs start to stop − 1. `None`: all epochs.
        name: the hook's name.

    Raises:
        TypeError, ValueError: when `targets` is missing or `epochs` is neither.

    Example:

    ```python
    model.register_gradient_hook(hooks.Freezing(backbone, epochs=2))
    model.fit(x, y, epochs=5)       # the backbone trains from the third epoch on
    ```
    """

    def __init__(self, targets: Targets, epochs: Any = None, name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        if targets is None:
            raise ValueError("`targets` must say what to freeze. Received: targets=None.")
        _epoch_range(epochs)
        self.epochs = epochs

    def frozen_positions(self, epoch: int, step: int) -> list[int]:
        start, stop = _epoch_range(self.epochs)
        inside = start <= epoch and (stop is None or epoch < stop)
        return self._positions if inside else []

    def apply(self, gradients: Gradients) -> Gradients:
        return gradients


def _epoch_range(epochs: Any) -> tuple[int, int | None]:
    if epochs is None:
        return 0, None
    bounds = (0, epochs) if isinstance(epochs, int) else epochs
    whole = isinstance(bounds, list | tuple) and all(
        isinstance(b, int) and not isinstance(b, bool) for b in bounds
    )
    if isinstance(epochs, bool) or not whole or len(bounds) != 2:
        raise TypeError(
            "`epochs` must be an integer, a pair of integers `(start, stop)`, or None. "
            f"Received: epochs={epochs!r}."
        )
    if not 0 <= bounds[0] < bounds[1]:
        raise ValueError(
            "`epochs` must be positive, and a pair ascending. "
            f"Received: epochs={epochs!r}."
        )
    return bounds[0], bounds[1]
