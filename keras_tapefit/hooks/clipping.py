"""Clipping: gradients made shorter, their direction kept or nearly so."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets
from keras_tapefit.gradients.checks import check_bool
from keras_tapefit.gradients.norms import axes_norm, joint_norm, wide
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.number import Number


@keras.saving.register_keras_serializable("keras_tapefit")
class GlobalNormClipping(GradientHook):
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

    Raises:
        ValueError: when `max_norm` is not positive.

    Example:

    ```python
    model.compile("adam", "mse", gradient_hooks=[hooks.GlobalNormClipping(1.0)])
    ```
    """

    max_norm = Number(above=0)

    def __init__(self, max_norm: Any, targets: Targets = None, name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        self.max_norm = max_norm

    def apply(self, gradients: Gradients) -> Gradients:
        max_norm = self.max_norm
        norm = tf.cast(gradients.global_norm(), tf.float32)
        return gradients.scale(max_norm / tf.maximum(norm, max_norm))


@keras.saving.register_keras_serializable("keras_tapefit")
class NormClipping(GradientHook):
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

    Raises:
        TypeError: when `per_layer` is no bool.
        ValueError: when `max_norm` is not positive.

    Example:

    ```python
    model.register_gradient_hook(hooks.NormClipping(1.0), targets="encoder/*")
    model.register_gradient_hook(hooks.NormClipping(1.0, per_layer=True), targets="head/*")
    ```
    """

    max_norm = Number(above=0)

    def __init__(
        self,
        max_norm: Any,
        per_layer: bool = False,
        targets: Targets = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.max_norm = max_norm
        self.per_layer = check_bool("per_layer", per_layer)

    def apply(self, gradients: Gradients) -> Gradients:
        max_norm = self.max_norm
        variables = gradients.variables
        places = [self.layer(v) if self.per_layer else id(v) for v in variables]

        def factor(place: Any) -> tf.Tensor:
            members = [v for v, p in zip(variables, places, strict=True) if p == place]
            norm = tf.cast(gradients.select(members).global_norm(), tf.float32)
            return max_norm / tf.maximum(norm, max_norm)

        factors = {place: factor(place) for place in dict.fromkeys(places)}
        return gradients.map(_times, [factors[place] for place in places], keeps_zero=True)


@keras.saving.register_keras_serializable("keras_tapefit")
class ValueClipping(GradientHook):
    """Clamps every element of the gradients.

    A blunt bound on single elements; it changes the direction. Keras's own `clipvalue`
    does the same on one device for dense gradients.

    Formula: `g ← min(max(g, −v), v)`; slices of a sparse gradient that share a row are
    summed before they are clamped.

    Args:
        max_value: `v`, a positive number, a schedule or a callable of the step.
        targets: the variables to clip; `None`: all.
        name: the hook's name.

    Raises:
        ValueError: when `max_value` is not positive.

    Example:

    ```python
    model.register_gradient_hook(hooks.ValueClipping(0.5))
    ```
    """

    max_value = Number(above=0)

    def __init__(self, max_value: Any, targets: Targets = None, name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        self.max_value = max_value

    def apply(self, gradients: Gradients) -> Gradients:
        max_value = self.max_value

        def clip(gradient: tf.Tensor) -> tf.Tensor:
            bound = tf.cast(max_value, gradient.dtype)
            return tf.clip_by_value(gradient, -bound, bound)

        return gradients.map(clip, keeps_zero=True)


@keras.saving.register_keras_serializable("keras_tapefit")
class BlockRMSClipping(GradientHook):
    """Scales each variable's gradient down where its root mean square is too large.

    Like `NormClipping`, with a bound that does not depend on the variable's size.

    Formula: `g_v ← g_v / max(1, rms(g_v) / τ)`, `rms(g) = sqrt(mean(g²))`.

    Reference: Shazeer and Stern, 2018, "Adafactor", arXiv:1804.04235, section 6.

    Args:
        max_rms: `τ`, a positive number, a schedule or a callable of the step.
        targets: the variables to clip; `None`: all.
        name: the hook's name.

    Raises:
        ValueError: when `max_rms` is not positive.

    Example:

    ```python
    model.register_gradient_hook(hooks.BlockRMSClipping(1.0))
    ```
    """

    max_rms = Number(above=0)

    def __init__(self, max_rms: Any, targets: Targets = None, name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        self.max_rms = max_rms

    def apply(self, gradients: Gradients) -> Gradients:
        max_rms = self.max_rms

        def clip(gradient: tf.Tensor, variable: Any) -> tf.Tensor:
            size = float(variable.shape.num_elements())
            rms = tf.cast(joint_norm([gradient]), tf.float32) / size**0.5
            return _times(gradient, 1.0 / tf.maximum(1.0, rms / max_rms))

        sizes = [_Size(v) for v in gradients.variables]
        return gradients.map(clip, sizes, keeps_zero=True)


class _Size:
    """A variable's shape, without the variable's values."""

    def __init__(self, variable: Any) -> None:
        self.shape = tf.TensorShape(variable.shape)


@keras.saving.register_keras_serializable("keras_tapefit")
class AdaptiveClipping(GradientHook):
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

    Raises:
        ValueError: when `max_ratio` is not positive.

    Example:

    ```python
    model.register_gradient_hook(hooks.AdaptiveClipping(0.02), targets="encoder/*")
    ```
    """

    max_ratio = Number(above=0)

    def __init__(
        self, max_ratio: Any = 0.01, targets: Targets = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.max_ratio = max_ratio

    def apply(self, gradients: Gradients) -> Gradients:
        max_ratio = self.max_ratio

        def clip(gradient: tf.Tensor, weights: Any, axes: Sequence[int]) -> tf.Tensor:
            weights = tf.convert_to_tensor(weights)
            bound = max_ratio * tf.cast(tf.maximum(axes_norm(weights, axes), 1e-3), tf.float32)
            norm = tf.cast(axes_norm(gradient, axes), tf.float32)
            return _times(gradient, tf.where(norm > bound, bound / norm, 1.0))

        axes = [tuple(self.unit(v).axes) for v in gradients.variables]
        by_row = [0 not in a for a in axes]
        return gradients.map(clip, gradients.variables, axes, keeps_zero=by_row)


def _times(gradient: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    product = wide(gradient) * tf.cast(factor, wide(gradient).dtype)
    return tf.cast(product, gradient.dtype)
