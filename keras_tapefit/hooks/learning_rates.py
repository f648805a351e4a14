"""Learning rates of single layers and variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.number import Number


@keras.saving.register_keras_serializable("keras_tapefit")
class LearningRateMultiplier(GradientHook):
    """Multiplies the learning rate of its targets, with any optimizer.

    For fine-tuning, where pretrained layers should move less than a new head. It works
    on what the optimizer makes of the weights, so it is exact for Adam-like optimizers too,
    which do not notice when a gradient is scaled; weight decay is multiplied as well.
    Several on one variable multiply.

    Formula, around the update of the optimizer: `v ← v_old + m · (v_new − v_old)`.

    Args:
        factor: `m`, zero or a positive number, a schedule or a callable of the step. Zero
            does not freeze: the optimizer's state continues. See `Freezing`.
        targets: the variables it is for; `None`: all.
        name: the hook's name.

    Raises:
        ValueError: when `factor` is negative.

    Example:

    ```python
    model.register_gradient_hook(hooks.LearningRateMultiplier(0.1), targets="backbone/*")
    ```
    """

    factor = Number(minimum=0, neutral=1, dtype="float64")

    def __init__(self, factor: Any, targets: Targets = None, name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        self.factor = factor

    def apply(self, gradients: Gradients) -> Gradients:
        return gradients

    def after_update(self, before: Sequence[tf.Tensor], variables: Sequence[Any]) -> None:
        for old, variable in zip(before, variables, strict=True):
            new = tf.convert_to_tensor(variable.value)
            factor = tf.cast(self.factor, new.dtype)
            # With a factor of one not even rounding changes the weights.
            variable.assign(tf.where(factor == 1.0, new, old + factor * (new - old)))


def _from_input_to_output(model: keras.Model) -> list[Any]:
    found: dict[int, Any] = {}
    for layer in model.layers:
        inside = _from_input_to_output(layer) if isinstance(layer, keras.Model) else []
        # A model that holds its weights itself is one layer.
        inside = inside or [layer]
        found.update((id(v), v) for v in inside if v.trainable_variables)
    return list(found.values())


def learning_rates_by_depth(
    layers: keras.Model | Sequence[Targets], decay: float = 1 / 2.6
) -> list[LearningRateMultiplier]:
    """Returns hooks that give earlier layers smaller learning rates.

    The last layer keeps the learning rate of the optimizer, and each one before it has
    `decay` times that of the one after it.

    Reference: Howard and Ruder, 2018, "Universal language model fine-tuning for text
    classification", arXiv:1801.06146, section 3.2.

    Args:
        layers: a built model, whose layers with weights count, those of the models in it
            too, such as a pretrained base; or a list of targets, from the input to the
            output.
        decay: a positive number; 1/2.6 in the paper.

    Returns:
        One `LearningRateMultiplier` for each layer but the last.

    Raises:
        TypeError: when `layers` is neither a model nor a list.
        ValueError: when `layers` is empty, or `decay` is not positive.

    Example:

    ```python
    model.compile("adamw", "mse", gradient_hooks=hooks.learning_rates_by_depth(model, 0.8))
    ```
    """
    if isinstance(layers, keras.Model):
        layers = _from_input_to_output(layers)
    if not isinstance(layers, list | tuple):
        raise TypeError(
            "`layers` must be a model or a list of targets, from the input to the output. "
            f"Received: layers={layers!r}."
        )
    if not layers:
        raise ValueError(
            "There are no layers with weights. Build the model first, or call it on a batch."
        )
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not decay > 0:
        raise ValueError(f"`decay` must be a positive number. Received: decay={decay!r}.")
    depth = len(layers) - 1
    return [
        LearningRateMultiplier(decay ** (depth - i), targets=target)
        for i, target in enumerate(layers[:-1])
    ]
