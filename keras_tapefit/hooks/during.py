"""Hooks that act only for a while."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.checks import check_count
from keras_tapefit.gradients.layers import NamedLayer
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.freezing import FreezingSchedule, epochs_or_steps
from keras_tapefit.hooks.function import LambdaHook
from keras_tapefit.hooks.outputs import OutputGradient
from keras_tapefit.hooks.step import LogEntry, Outputs, current_step


@keras.saving.register_keras_serializable("keras_tapefit")
class During(GradientHook):
    """Has a hook act in some epochs or steps only.

    For noise that ends, clipping for the first steps, a monitor that looks now and then. In
    all other steps it is as if the hook were not there: gradients and weights pass as they
    are, its state stays, it skips nothing, and its log entries are means over the steps in
    which it acts (NaN in an epoch without any). Numbers of the hook may be assigned at any
    time: `during.hook.max_norm = 0.5`. Which steps those are is decided on the device, so it
    holds with `steps_per_execution` too. `Freezing` has epochs and steps itself.

    Formula: `g ← hook(g)` where the epoch is in `epochs`, the step in `steps` and
    `(step − start of steps) mod every = 0`, else `g ← g`.

    Args:
        hook: a gradient hook, or a function of `(gradient, variable)`. It has its own
            targets and name.
        epochs: an integer n: epochs 0 to n − 1 of `fit`. A pair `(start, stop)`: epochs start
            to stop − 1. `None`: all.
        steps: the same in updates that the optimizer has made. `None`: all.
        every: the number of updates from one in which it acts to the next.
        name: the name of both; by default that of the hook.

    Raises:
        TypeError, ValueError: when `hook` is none, or one that freezes; when an argument is
            no range; and for `OutputGradient` with `steps` or `every`, which its backward
            pass does not know.

    Example:

    ```python
    noise = hooks.GradientNoise(0.01, seed=1)
    model.register_gradient_hook(hooks.During(noise, epochs=(0, 2), every=2))
    ```
    """

    def __init__(
        self,
        hook: Any,
        epochs: int | Sequence[int] | None = None,
        steps: int | Sequence[int] | None = None,
        every: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if callable(hook) and not isinstance(hook, GradientHook | type):
            hook = LambdaHook(hook)
        if not isinstance(hook, GradientHook):
            raise TypeError(
                "`hook` must be a gradient hook or a function of `(gradient, variable)`. "
                f"Received: hook={hook!r} (of type {type(hook).__name__})."
            )
        if isinstance(hook, FreezingSchedule | During):
            raise ValueError(
                f"{type(hook).__name__} says itself when it acts. Pass `epochs` or `steps` to "
                "it instead."
            )
        epochs_or_steps("epochs", epochs)
        epochs_or_steps("steps", steps)
        check_count("every", every)
        if isinstance(hook, OutputGradient) and (steps is not None or every != 1):
            raise ValueError(
                "The backward pass does not know the step, so OutputGradient can act in some "
                "`epochs` only. Use those, or have its function look at a variable."
            )
        self.hook = hook
        self.epochs = epochs
        self.steps = steps
        self.every = every

    def __copy__(self) -> During:
        return During(copy.copy(self.hook), self.epochs, self.steps, self.every, self._name)

    def _default_name(self) -> str:  # type: ignore[override]
        return self.hook._name or self.hook._default_name()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        self.hook._check_arguments()

    # What the hook is asked, and answers through this one.
    may_skip_steps = property(lambda self: self.hook.may_skip_steps)
    uses_loss = property(lambda self: self.hook.uses_loss)
    uses_parts = property(lambda self: self.hook.uses_parts)
    watches_update = property(lambda self: self.hook.watches_update)
    watches_validation = property(lambda self: self.hook.watches_validation)
    _watches_outputs = property(lambda self: self.hook._watches_outputs)
    _names_layers = property(lambda self: self.hook._names_layers)
    _replaces_outputs = property(lambda self: self.hook._replaces_outputs)
    _trace_key = property(lambda self: (self._structure, self.hook._trace_key))
    _watcher = property(lambda self: self.hook)

    @property
    def variables(self) -> list[keras.Variable]:
        """Its own state, then that of the hook."""
        return [*self._variables, *self.hook.variables]

    @property
    def _kept_when_skipped(self) -> list[keras.Variable]:
        return [*self._lasting, *self.hook._kept_when_skipped]

    def _prepare(
        self,
        variables: Sequence[Any],
        units: Callable[[Any], Any],
        owners: Callable[[Any], Any],
    ) -> None:
        if self.hook._registered_name not in (None, self.name):
            raise ValueError(
                f"The hook {self.hook.name!r} belongs to a list of its own already. Make "
                "another for `During`: `copy.copy(hook)`."
            )
        self.hook._prepare(variables, units, owners)
        self.hook._registered_name = self.name
        self.hook._gate = self
        super()._prepare(variables, units, owners)
        self._positions = list(self.hook._positions)
        self._number_variables = self.hook._number_variables

    def _leave(self) -> None:
        super()._leave()
        self.hook._leave()

    @property
    def targets(self) -> Any:
        """Those of the hook."""
        return self.hook.targets

    @targets.setter
    def targets(self, value: Any) -> None:
        if value is not None:
            self.hook.targets = value

    def build(self, variables: Sequence[Any]) -> None:
        self._in_epoch = self.add_variable(dtype="int32", initializer="ones", name="in_epoch")
        self._last_epoch: int | None = None

    def frozen_positions(self, epoch: int, step: int) -> list[int]:
        if self._built_for is not None and epoch != self._last_epoch:
            self._in_epoch.assign(int(epoch in epochs_or_steps("epochs", self.epochs)))
            self._last_epoch = epoch
        return []

    def is_active(self, index: Any = None) -> tf.Tensor:
        """Returns whether the hook acts, a scalar bool.

        Args:
            index: of the step; `None`: it is not known.
        """
        active = tf.convert_to_tensor(self._in_epoch.value) > 0
        if index is None:
            return active
        steps = epochs_or_steps("steps", self.steps)
        active &= (index >= steps.start) & (index < steps.stop)
        return active & ((index - steps.start) % self.every == 0)

    def apply(self, gradients: Gradients) -> Gradients:
        found = self._acting(lambda: self.hook.apply(gradients))
        active = self.is_active(self.step)

        def chosen(before: Any, after: Any) -> Any:
            sparse = isinstance(before, tf.IndexedSlices) and isinstance(after, tf.IndexedSlices)
            if sparse and before.indices is after.indices:
                values = tf.where(active, after.values, before.values)
                return tf.IndexedSlices(values, before.indices, before.dense_shape)
            return tf.where(active, to_dense(after), to_dense(before))

        given = gradients.present()
        if len(found) != len(gradients) or len(found.present()) != len(given):
            return found
        pairs = zip(given, found.present(), strict=True)
        return gradients.with_present([b if b is a else chosen(b, a) for b, a in pairs])

    def after_update(self, before: Sequence[tf.Tensor], variables: Sequence[Any]) -> None:
        made = [tf.identity(v.value) for v in variables]
        self._acting(lambda: self.hook.after_update(before, variables))
        active = self.is_active(self.step)
        for value, variable in zip(made, variables, strict=True):
            variable.assign(tf.where(active, tf.convert_to_tensor(variable.value), value))

    def on_validation(self, gradients: Gradients) -> None:
        self._acting(lambda: self.hook.on_validation(gradients))

    def check_state(self) -> None:
        self.hook.check_state()

    def _chosen_layers(self, layers: Sequence[NamedLayer]) -> list[NamedLayer]:
        return self.hook._chosen_layers(layers)

    def _see_outputs(self, outputs: Outputs) -> None:
        self._acting(lambda: self.hook._see_outputs(outputs))

    def _recorded_entries(self, layers: Sequence[NamedLayer]) -> list[str]:
        return self.hook._recorded_entries(layers)

    def _acting(self, call: Callable[[], Any]) -> Any:
        """Calls the hook in its own name, and undoes what it does where it is not to act."""
        step = current_step()
        assert step is not None
        active = self.is_active(step.index)
        entries, rejections = len(step.entries), len(step.rejections)
        before = [(v, tf.identity(v.value)) for v in self.hook.variables]
        step.hook = self.hook
        try:
            found = call()
        finally:
            step.hook = self
        for variable, value in before:
            variable.assign(tf.where(active, tf.convert_to_tensor(variable.value), value))
        step.entries[entries:] = [
            LogEntry(
                self,
                entry.name,
                tf.where(active, entry.value, tf.zeros_like(entry.value)),
                entry.reduction,
                tf.cast(entry.weight, tf.float32) * tf.cast(active, tf.float32),
            )
            for entry in step.entries[entries:]
        ]
        step.rejections[rejections:] = [r & active for r in step.rejections[rejections:]]
        return found
