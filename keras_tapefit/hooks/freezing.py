"""Freezing by epoch or step, exact in value and in the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_tapefit.gradients import Gradients, Targets, matching
from keras_tapefit.gradients.checks import check_count
from keras_tapefit.gradients.targets import check_targets
from keras_tapefit.hooks.base import GradientHook


class FreezingSchedule(GradientHook):
    """Base class of hooks that freeze: subclasses say which positions, and when."""

    def build(self, variables: Sequence[Any]) -> None:
        self._held = self.add_variable((len(variables),), dtype="int32", name="frozen")
        self._last_chosen: list[int] | None = None

    def chosen_positions(self, epoch: int, step: int) -> list[int]:
        """Positions in the hook's variables to be frozen now."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement `chosen_positions(self, epoch, step)`."
        )

    def frozen_positions(self, epoch: int, step: int) -> list[int]:
        if self._built_for is None:
            return []
        chosen = self.chosen_positions(epoch, step)
        if chosen != self._last_chosen:
            held = np.zeros(self._held.shape, "int32")
            held[chosen] = 1
            self._held.assign(held)
            self._last_chosen = chosen
        return [self._positions[i] for i in chosen]

    def held_positions(self) -> list[int]:
        if self._built_for is None:
            return []
        return [self._positions[i] for i in np.flatnonzero(self._held.numpy())]

    def apply(self, gradients: Gradients) -> Gradients:
        return gradients


@keras.saving.register_keras_serializable("keras_tapefit")
class Freezing(FreezingSchedule):
    """Freezes variables for some epochs or steps of `fit`.

    Frozen variables are absent from the tape and from the update: their values and the
    optimizer's state for them stay bit for bit, and their part of the backward pass is
    not computed. A layer that is frozen whole runs as with `trainable = False`. For good,
    `model.freeze(targets)` is enough.

    Args:
        targets: what to freeze: a layer, a variable, a predicate on a variable, a glob
            on `variable.path`, or a list of these.
        epochs: how long. An integer n: the first n epochs, 0 to n − 1. A pair
            `(start, stop)`: epochs start to stop − 1. `None`: all epochs.
        steps: the same in training steps, over all calls of `fit`; give one of the two.
            Skipped steps do not count. With `steps_per_execution=K` a range begins and
            ends with an execution.
        name: the hook's name.

    Raises:
        TypeError, ValueError: when `targets` is missing or `epochs` or `steps` is no
            range.

    Example:

    ```python
    model.register_gradient_hook(hooks.Freezing(backbone, epochs=2))
    model.fit(x, y, epochs=5)       # the backbone trains from the third epoch on
    ```
    """

    keeps_state = ("epochs", "steps")

    def __init__(
        self,
        targets: Targets,
        epochs: int | Sequence[int] | None = None,
        steps: int | Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        if targets is None:
            raise ValueError("`targets` must say what to freeze. Received: targets=None.")
        if epochs is not None and steps is not None:
            raise ValueError(
                f"Give `epochs` or `steps`, not both. Received: epochs={epochs!r}, steps={steps!r}."
            )
        epochs_or_steps("epochs", epochs)
        epochs_or_steps("steps", steps)
        self.epochs = epochs
        self.steps = steps
        self.uses_step_count = steps is not None

    def chosen_positions(self, epoch: int, step: int) -> list[int]:
        in_epochs = epoch in epochs_or_steps("epochs", self.epochs)
        in_steps = step in epochs_or_steps("steps", self.steps)
        return list(range(len(self._positions))) if in_epochs and in_steps else []


@keras.saving.register_keras_serializable("keras_tapefit")
class GradualUnfreezing(FreezingSchedule):
    """Lets the parts of a model join the training one after the other.

    For fine-tuning: the new head first, then the pretrained layers from the last to the
    first, so that early noise does not wash out what they know. Variables in no stage
    train all the time. What is not in training yet is frozen as by `Freezing`.

    Reference: Howard and Ruder, 2018, "Universal language model fine-tuning for text
    classification", arXiv:1801.06146, section 3.3.

    Args:
        stages: a list of targets, those that train first at the front. Stage i trains
            from epoch `i * every` on.
        every: the number of epochs from one stage to the next; a positive integer.
        targets: the variables that stages select from; `None`: all.
        name: the hook's name.

    Raises:
        TypeError, ValueError: when `stages` is no list of targets or `every` no positive
            integer.
        ValueError: when a stage matches no variable of the model.

    Example:

    ```python
    stages = ["head/*", "block_2/*", ["block_1/*", "stem/*"]]
    model.register_gradient_hook(hooks.GradualUnfreezing(stages, every=2))
    model.fit(x, y, epochs=8)       # from epoch 4 on everything trains
    ```
    """

    _target_arguments = ("stages", "targets")

    def __init__(
        self,
        stages: Sequence[Targets],
        every: int = 1,
        targets: Targets = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        if (
            not isinstance(stages, list | tuple)
            or not stages
            or any(stage is None for stage in stages)
        ):
            raise TypeError(
                "`stages` must be a list of targets, one for each stage. "
                f"Received: stages={stages!r}."
            )
        for stage in stages:
            check_targets(stage)
        check_count("every", every)
        self.stages = stages
        self.every = every

    def build(self, variables: Sequence[Any]) -> None:
        super().build(variables)
        self._stage_positions = [matching(stage, variables) for stage in self.stages]

    def chosen_positions(self, epoch: int, step: int) -> list[int]:
        num_training = 1 + epoch // self.every
        training = {i for stage in self._stage_positions[:num_training] for i in stage}
        waiting = {i for stage in self._stage_positions[num_training:] for i in stage}
        return sorted(waiting - training)


def epochs_or_steps(name: str, given: Any) -> range:
    """Returns the epochs or steps that an argument stands for."""
    if given is None:
        return range(2**62)
    bounds = (0, given) if isinstance(given, int) else given
    whole = isinstance(bounds, list | tuple) and all(
        isinstance(b, int) and not isinstance(b, bool) for b in bounds
    )
    if isinstance(given, bool) or not whole or len(bounds) != 2:
        raise TypeError(
            f"`{name}` must be an integer, a pair of integers `(start, stop)`, or None. "
            f"Received: {name}={given!r}."
        )
    if not 0 <= bounds[0] < bounds[1]:
        raise ValueError(
            f"`{name}` must be positive, and a pair ascending. Received: {name}={given!r}."
        )
    return range(*bounds)
