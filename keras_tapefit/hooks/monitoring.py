"""Observing: gradients and updates reported, not changed."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets, variable_path
from keras_tapefit.gradients.norms import joint_norm
from keras_tapefit.hooks.base import GradientHook


@keras.saving.register_keras_serializable("keras_tapefit")
class GradientMonitor(GradientHook):
    """Logs the norm of the gradients at its place in the list.

    The epoch mean appears in the progress bar, in `History` and to every callback, so
    `EarlyStopping(monitor="gradient_norm")` works. Two monitors, one before and one
    after a clipping hook, show what the clipping does.

    Args:
        per_variable: whether each variable's norm is logged too, as
            `"<entry>/<variable.path>"`.
        targets: the variables to look at; `None`: all.
        name: the hook's name. The log entry is `gradient_norm`, or `<name>_norm` when a
            name is given.

    Raises:
        TypeError: when `per_variable` is no bool.

    Example:

    ```python
    model.compile(
        "adam",
        "mse",
        gradient_hooks=[
            hooks.GradientMonitor(),
            hooks.GlobalNormClipping(1.0),
            hooks.GradientMonitor(name="clipped"),
        ],
    )
    ```
    """

    def __init__(
        self, per_variable: bool = False, targets: Targets = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, name=name)
        if not isinstance(per_variable, bool):
            raise TypeError(
                f"`per_variable` must be a bool. Received: per_variable={per_variable!r}."
            )
        self.per_variable = per_variable

    def apply(self, gradients: Gradients) -> Gradients:
        entry = "gradient_norm" if self._name is None else f"{self._name}_norm"
        self.report(entry, gradients.global_norm())
        if self.per_variable:
            for path, norm in gradients.norms().items():
                self.report(f"{entry}/{path}", norm)
        return gradients


@keras.saving.register_keras_serializable("keras_tapefit")
class UpdateMonitor(GradientHook):
    """Logs how far a step moves the weights, relative to their size.

    A learning rate that suits the model gives about 1e-3 as a rule of thumb; far above it
    the training is about to diverge, far below it hardly moves. It sees what the
    optimizer made of the weights, weight decay included, at its place in the list: put
    it after hooks such as `LearningRateMultiplier`.

    Formula: `‖v_new − v_old‖ / ‖v_old‖`, the norms over all its variables; 0 where the
    weights are zero.

    Args:
        per_variable: whether each variable's ratio is logged too, as
            `"<entry>/<variable.path>"`.
        targets: the variables to look at; `None`: all.
        name: the hook's name. The log entry is `update_ratio`, or `<name>_ratio` when a
            name is given.

    Raises:
        TypeError: when `per_variable` is no bool.

    Example:

    ```python
    model.register_gradient_hook(hooks.UpdateMonitor())
    ```
    """

    watches_update = True

    def __init__(
        self, per_variable: bool = False, targets: Targets = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, name=name)
        if not isinstance(per_variable, bool):
            raise TypeError(
                f"`per_variable` must be a bool. Received: per_variable={per_variable!r}."
            )
        self.per_variable = per_variable

    def apply(self, gradients: Gradients) -> Gradients:
        return gradients

    def after_update(self, before: Sequence[tf.Tensor], variables: Sequence[Any]) -> None:
        entry = "update_ratio" if self._name is None else f"{self._name}_ratio"
        after = [tf.convert_to_tensor(variable.value) for variable in variables]
        changes = [new - old for new, old in zip(after, before, strict=True)]
        self.report(entry, _ratio(changes, before))
        if self.per_variable:
            for variable, change, old in zip(variables, changes, before, strict=True):
                self.report(f"{entry}/{variable_path(variable)}", _ratio([change], [old]))


def _ratio(changes: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.math.divide_no_nan(joint_norm(changes), joint_norm(weights))
