"""Observing: gradients reported, not changed."""

import keras

from keras_tapefit.gradients import Gradients, Targets
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
