"""Clipping: gradients made shorter, their direction kept or nearly so.

A gradient whose norm is not finite is left as it is, for a gate to see.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets
from keras_tapefit.gradients.checks import check_bool
from keras_tapefit.gradients.norms import (
    axes_length,
    axes_norm,
    clamped,
    root_of_factor,
    shortened,
    times,
    wide,
)
from keras_tapefit.gradients.sparse import to_dense, values_of
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.number import Number


def bound() -> Number:
    """Returns the bound of a clip: a positive number, of any size; infinity is no bound."""
    return Number(above=0, neutral=math.inf, dtype="float64")


def shorten(gradients: Gradients, places: Sequence[Any], bounds: dict[Any, Any]) -> Gradients:
    """Scales gradients down together where their joint norm exceeds a bound.

    Args:
        gradients: the gradients.
        places: of each variable; those of one place are scaled together.
        bounds: of the norm at each place, scalars, positive or infinite.
    """
    unique = gradients.with_unique_rows()
    groups = [unique]
    if len(bounds) != 1:
        members = [[i for i, p in enumerate(places) if p == place] for place in bounds]
        groups = [unique._subset(chosen) for chosen in members]
    numbers = [group._numbers() for group in groups]
    lengths = [group._length_and_finite()[0] for group in groups]
    rows = list(zip(numbers, lengths, bounds.values(), strict=True))
    changed = iter(
        shortened(
            [value for values in numbers for value in values],
            [length for values, length, _ in rows for _ in values],
            [bound for values, _, bound in rows for _ in values],
        )
    )
    shorter = [
        group._with_numbers([next(changed) for _ in values])
        for group, values in zip(groups, numbers, strict=True)
    ]
    if len(shorter) == 1:
        return shorter[0]
    pairs = [pair for group in shorter for pair in group.pairs()]
    return unique.updated(Gradients(pairs, unique_rows=True))


class ClippingHook(GradientHook):
    """Base class of clipping: subclasses implement `clip`.

    Args:
        targets: the variables to clip; `None`: all.
        name: the hook's name.
        log_clipped: whether to log the share of steps that were clipped.
    """

    def __init__(
        self, targets: Targets = None, name: str | None = None, log_clipped: bool = False
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.log_clipped = check_bool("log_clipped", log_clipped)

    def clip(self, gradients: Gradients) -> Gradients:
        """Returns the gradients, shortened where they are too long."""
        raise NotImplementedError(f"{type(self).__name__} must implement `clip`.")

    def apply(self, gradients: Gradients) -> Gradients:
        clipped = self.clip(gradients)
        if self.log_clipped:
            entry = "clipped_steps" if self._name is None else f"{self._name}_clipped_steps"
            self.report(entry, tf.cast(_differ(gradients, clipped), tf.float32))
        return clipped


def _differ(before: Gradients, after: Gradients) -> tf.Tensor:
    """Returns whether any element that is a number was changed."""
    pairs = zip(before.present(), after.present(), strict=True)
    changed = [
        # What was not stored of a sparse gradient is 0, and stays so.
        tf.reduce_any((values_of(b) != values_of(a)) & ~tf.math.is_nan(values_of(b)))
        if isinstance(a, tf.IndexedSlices) == isinstance(b, tf.IndexedSlices)
        else tf.reduce_any(to_dense(b) != to_dense(a))
        for b, a in pairs
    ]
    return tf.reduce_any(tf.stack(changed)) if changed else tf.constant(False)


@keras.saving.register_keras_serializable("keras_tapefit")
class GlobalNormClipping(ClippingHook):
    """Scales all gradients down together where their joint norm exceeds a bound.

    The usual cure for loss spikes: the direction of the step is kept. Keras's own
    `global_clipnorm` does the same on one device for dense, moderate gradients.

    Formula: `g ← g · c / max(‖g‖, c)`, with the norm over all variables.

    Reference: Pascanu et al., 2013, "On the difficulty of training recurrent neural
    networks", arXiv:1211.5063.

    Args:
        max_norm: `c`, a positive number, a schedule or a callable of the step.
        targets: the variables the norm is taken over; `None`: all.
        name: the hook's name.
        log_clipped: whether to log the share of steps that were clipped, as `clipped_steps`,
            or `<name>_clipped_steps` when a name is given.

    Raises:
        ValueError: when `max_norm` is not positive.

    Example:

    ```python
    model.compile("adam", "mse", gradient_hooks=[hooks.GlobalNormClipping(1.0)])
    ```
    """

    max_norm = bound()

    def __init__(
        self,
        max_norm: Any,
        targets: Targets = None,
        name: str | None = None,
        log_clipped: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name, log_clipped=log_clipped)
        self.max_norm = max_norm

    def clip(self, gradients: Gradients) -> Gradients:
        return shorten(gradients, [None] * len(gradients), {None: self.max_norm})


@keras.saving.register_keras_serializable("keras_tapefit")
class NormClipping(ClippingHook):
    """Scales the gradient of each variable, or layer, down where its norm is too large.

    For models whose layers have gradients of very different sizes. It changes the
    direction of the whole step; with `per_layer=True` the kernel and the bias of a layer
    are scaled together. Keras's own `clipnorm` does it per variable, on one device and
    for dense gradients.

    Formula: `g_v ← g_v · c / max(‖g_v‖, c)`, with the norm over the variable or over
    all variables of its layer.

    Args:
        max_norm: `c`, a positive number, a schedule or a callable of the step.
        per_layer: whether the norm is taken over all the variables that a layer holds
            instead of over each one.
        targets: the variables to clip; `None`: all.
        name: the hook's name.
        log_clipped: whether to log the share of steps that were clipped, as `clipped_steps`,
            or `<name>_clipped_steps` when a name is given.

    Raises:
        TypeError: when `per_layer` is no bool.
        ValueError: when `max_norm` is not positive.

    Example:

    ```python
    model.register_gradient_hook(hooks.NormClipping(1.0), targets="encoder/*")
    model.register_gradient_hook(hooks.NormClipping(1.0, per_layer=True), targets="head/*")
    ```
    """

    max_norm = bound()

    def __init__(
        self,
        max_norm: Any,
        per_layer: bool = False,
        targets: Targets = None,
        name: str | None = None,
        log_clipped: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name, log_clipped=log_clipped)
        self.max_norm = max_norm
        self.per_layer = check_bool("per_layer", per_layer)

    def clip(self, gradients: Gradients) -> Gradients:
        places = [self.layer(v) if self.per_layer else id(v) for v in gradients.variables]
        return shorten(gradients, places, dict.fromkeys(places, self.max_norm))


@keras.saving.register_keras_serializable("keras_tapefit")
class ValueClipping(ClippingHook):
    """Clamps every element of the gradients.

    A blunt bound on single elements; it changes the direction. Keras's own `clipvalue`
    does the same on one device for dense gradients.

    Formula: `g ← min(max(g, −v), v)`; slices of a sparse gradient that share a row are
    summed before they are clamped.

    Args:
        max_value: `v`, a positive number, a schedule or a callable of the step.
        targets: the variables to clip; `None`: all.
        name: the hook's name.
        log_clipped: whether to log the share of steps that were clipped, as `clipped_steps`,
            or `<name>_clipped_steps` when a name is given.

    Raises:
        ValueError: when `max_value` is not positive.

    Example:

    ```python
    model.register_gradient_hook(hooks.ValueClipping(0.5))
    ```
    """

    max_value = bound()

    def __init__(
        self,
        max_value: Any,
        targets: Targets = None,
        name: str | None = None,
        log_clipped: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name, log_clipped=log_clipped)
        self.max_value = max_value

    def clip(self, gradients: Gradients) -> Gradients:
        unique = gradients.with_unique_rows()
        return unique._with_numbers(clamped(unique._numbers(), self.max_value))


@keras.saving.register_keras_serializable("keras_tapefit")
class BlockRMSClipping(ClippingHook):
    """Scales each variable's gradient down where its root mean square is too large.

    Like `NormClipping`, with a bound that does not depend on the variable's size.

    Formula: `g_v ← g_v / max(1, rms(g_v) / τ)`, `rms(g) = sqrt(mean(g²))`.

    Reference: Shazeer and Stern, 2018, "Adafactor", arXiv:1804.04235, section 6.

    Args:
        max_rms: `τ`, a positive number, a schedule or a callable of the step.
        targets: the variables to clip; `None`: all.
        name: the hook's name.
        log_clipped: whether to log the share of steps that were clipped, as `clipped_steps`,
            or `<name>_clipped_steps` when a name is given.

    Raises:
        ValueError: when `max_rms` is not positive.

    Example:

    ```python
    model.register_gradient_hook(hooks.BlockRMSClipping(1.0))
    ```
    """

    max_rms = bound()

    def __init__(
        self,
        max_rms: Any,
        targets: Targets = None,
        name: str | None = None,
        log_clipped: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name, log_clipped=log_clipped)
        self.max_rms = max_rms

    def clip(self, gradients: Gradients) -> Gradients:
        max_rms = self.max_rms
        # As a bound on the norm: `rms(g) = ‖g‖ / sqrt(n)`, with n elements.
        bounds = {id(v): max_rms * _root_of_size(v) for v in gradients.variables}
        return shorten(gradients, list(bounds), bounds)


def _root_of_size(variable: Any) -> float:
    return math.sqrt(max(math.prod(variable.shape), 1))


@keras.saving.register_keras_serializable("keras_tapefit")
class AdaptiveClipping(ClippingHook):
    """Clips each unit's gradient relative to the norm of the unit's weights (AGC).

    For networks without normalisation layers, and where one bound does not suit all
    layers. A unit is what feeds one output of the layer: its axes come from the layer's
    class, never from the rank of the variable.

    Formula, for unit i with `W* = max(‖W_i‖, 1e-3)`: where `‖G_i‖ / W* > λ`,
    `G_i ← λ · W* / ‖G_i‖ · G_i`.

    Reference: Brock et al., 2021, "High-performance large-scale image recognition
    without normalization", arXiv:2102.06171, equation 3.

    Args:
        max_ratio: `λ`, a positive number, a schedule or a callable of the step.
        targets: the variables to clip; `None`: all. The paper leaves out the last
            layer.
        name: the hook's name.
        log_clipped: whether to log the share of steps that were clipped, as `clipped_steps`,
            or `<name>_clipped_steps` when a name is given.

    Raises:
        ValueError: when `max_ratio` is not positive.

    Example:

    ```python
    model.register_gradient_hook(hooks.AdaptiveClipping(0.02), targets="encoder/*")
    ```
    """

    max_ratio = bound()

    def __init__(
        self,
        max_ratio: Any = 0.01,
        targets: Targets = None,
        name: str | None = None,
        log_clipped: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name, log_clipped=log_clipped)
        self.max_ratio = max_ratio

    def clip(self, gradients: Gradients) -> Gradients:
        max_ratio = self.max_ratio

        def clip(gradient: tf.Tensor, weights: Any, axes: Sequence[int]) -> tf.Tensor:
            sizes = tf.maximum(axes_norm(tf.convert_to_tensor(weights), axes), 1e-3)
            bounds = max_ratio * tf.cast(sizes, tf.float64)
            root = root_of_factor(axes_length(gradient, axes), bounds)
            product = tf.cast(times(wide(gradient), root, 1.0 / root), gradient.dtype)
            return tf.where(root < 1.0, product, gradient)

        axes = [tuple(self.unit(v).axes) for v in gradients.variables]
        by_row = [0 not in a for a in axes]
        return gradients.map(clip, gradients.variables, axes, keeps_zero=by_row)
