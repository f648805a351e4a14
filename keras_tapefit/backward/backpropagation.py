"""Plain reverse-mode differentiation."""

from __future__ import annotations

from typing import Any

from keras_tapefit.backward.base import GradientMethod, Objective, register
from keras_tapefit.gradients import Gradients


@register
class Backpropagation(GradientMethod):
    """The gradient of the loss, by one forward and one backward pass: the default.

    Example:

    ```python
    model.compile("sgd", "mse", backward=backward.Backpropagation())
    ```
    """

    def compute(self, objective: Objective, batch: tuple[Any, Any, Any]) -> tuple[Gradients, Any]:
        with objective.tape() as tape:
            loss, outputs = objective.loss(batch)
        variables = objective.variables()
        gradients = tape.gradient(loss, variables)
        return Gradients(zip(gradients, variables, strict=True)), outputs
