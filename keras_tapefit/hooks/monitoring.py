"""Observing: gradients and updates reported, not changed."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets, variable_path
from keras_tapefit.gradients.checks import check_bool
from keras_tapefit.gradients.layers import layer_path
from keras_tapefit.gradients.norms import joint_norm
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.hooks.base import GradientHook

# Of the moving mean of the training gradients.
_MOMENTUM = 0.9


@keras.saving.register_keras_serializable("keras_tapefit")
class GradientMonitor(GradientHook):
    """Logs the norm of the gradients at its place in the list.

    The epoch mean appears in the progress bar, in `History` and to every callback, so
    `EarlyStopping(monitor="gradient_norm", mode="min")` works. Two monitors, one before
    and one after a clipping hook, show what the clipping does.

    With `validation=True` it looks at the batches of `evaluate` too, and so at the
    validation of `fit`: `val_gradient_norm`, and `val_gradient_cosine`, which is large
    where what is being learned helps the validation data too, and about 0 where it has
    nothing to do with them. That takes a forward and a backward pass more for each of
    these batches, and memory for a copy of the weights.

    Formula: the cosine is that of the angle between the gradient of the loss on the
    validation batch, with `training=False`, and the moving mean `m ← 0.9·m + 0.1·g` of
    the training gradients.

    Args:
        per_variable: whether each variable's norm is logged too, as
            `"<entry>/<variable.path>"`.
        validation: whether to look at the batches of `evaluate`.
        targets: the variables to look at; `None`: all.
        name: the hook's name. The log entries are `gradient_norm` and
            `gradient_cosine`, or `<name>_norm` and `<name>_cosine` when a name is given.
        per_layer: whether the joint norm of the variables that a layer holds is logged too,
            as `"<entry>/<path of the layer>"`.

    Raises:
        TypeError: when `per_variable`, `validation` or `per_layer` is no bool.

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

    keeps_state = ("per_variable", "per_layer")

    def __init__(
        self,
        per_variable: bool = False,
        validation: bool = False,
        targets: Targets = None,
        name: str | None = None,
        per_layer: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name)
        check_bool("per_variable", per_variable)
        check_bool("validation", validation)
        self.per_variable = per_variable
        self.validation = validation
        self.per_layer = check_bool("per_layer", per_layer)

    @property
    def watches_validation(self) -> bool:
        """Whether it is asked to look at the batches of `evaluate`."""
        return self.validation

    def build(self, variables: Sequence[Any]) -> None:
        self._means = self.add_variables(variables if self.validation else [], name="mean")

    def apply(self, gradients: Gradients) -> Gradients:
        self._report_norms(gradients)
        if self.validation:
            for gradient, variable in gradients.pairs():
                if gradient is not None:
                    mean = self._means[variable]
                    new = tf.cast(to_dense(gradient), tf.float32)
                    mean.assign(_MOMENTUM * mean.value + (1.0 - _MOMENTUM) * new)
        return gradients

    def on_validation(self, gradients: Gradients) -> None:
        self._report_norms(gradients)
        present = [(to_dense(g), v) for g, v in gradients.pairs() if g is not None]
        found = [tf.cast(gradient, tf.float32) for gradient, _ in present]
        means = [tf.convert_to_tensor(self._means[v].value) for _, v in present]
        self.report(f"{self._entry}_cosine", _cosine(found, means))

    @property
    def _entry(self) -> str:
        return "gradient" if self._name is None else self._name

    def _report_norms(self, gradients: Gradients) -> None:
        self.report(f"{self._entry}_norm", gradients.global_norm())
        if self.per_variable:
            for path, norm in gradients.norms().items():
                self.report(f"{self._entry}_norm/{path}", norm)
        if self.per_layer:
            places: dict[str, list[int]] = {}
            for i, variable in enumerate(gradients.variables):
                places.setdefault(layer_path(variable_path(variable)), []).append(i)
            for path, members in places.items():
                norm = gradients._subset(members).global_norm()
                self.report(f"{self._entry}_norm/{path}", norm)


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

    def __init__(
        self, per_variable: bool = False, targets: Targets = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, name=name)
        check_bool("per_variable", per_variable)
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


def _cosine(a: Sequence[tf.Tensor], b: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the cosine of the angle between two vectors in parts; 0 where one is zero."""
    if not a:
        return tf.zeros(())
    lengths = joint_norm(a), joint_norm(b)
    products = [
        # Along unit vectors, so that none overflows.
        tf.math.divide_no_nan(x, lengths[0]) * tf.math.divide_no_nan(y, lengths[1])
        for x, y in zip(a, b, strict=True)
    ]
    return tf.add_n([tf.reduce_sum(product) for product in products])


def _ratio(changes: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.math.divide_no_nan(joint_norm(changes), joint_norm(weights))
