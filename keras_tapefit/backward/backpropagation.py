"""Plain reverse-mode differentiation."""

from __future__ import annotations

from keras_tapefit.backward.base import Batch, Computed, GradientMethod, Objective, register


@register
class Backpropagation(GradientMethod):
    """The gradient of the loss, by one forward and one backward pass: the default.

    Example:

    ```python
    model.compile("sgd", "mse", backward=backward.Backpropagation())
    ```
    """

    def compute(self, objective: Objective, batch: Batch) -> Computed:
        with objective.tape() as tape:
            forward = objective.forward(batch)
        variables = objective.variables()
        return forward.computed([tape.gradient(q, variables) for q in forward.scaled], variables)
