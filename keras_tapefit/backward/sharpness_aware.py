"""Gradients at a point uphill of the weights, for flat minima."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_tapefit.backward.base import (
    Batch,
    Computed,
    GradientMethod,
    LiveNumber,
    Objective,
    register,
)
from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.checks import check_bool, check_count
from keras_tapefit.gradients.norms import wide
from keras_tapefit.gradients.sparse import to_dense

FLOOR = 0.01


@register
class SharpnessAware(GradientMethod):
    """Sharpness-aware minimization: the gradient where the loss nearby is worst.

    For models that fit the training data too well: it looks for minima that are flat,
    at the price of a second forward and backward pass. That pass leaves nothing behind:
    BatchNormalization statistics, metrics, logs and random seeds are those of the first
    one, whose dropout it repeats, and the weights are never written to.

    Formula: `ε = ρ·g/‖g‖`, 0 where `‖g‖ = 0`, with `g = ∇L(w)` and the norm over all
    variables being trained; the result is `∇L(w + ε)`. With `adaptive=True` (ASAM)
    `ε = ρ·T²g/‖Tg‖`, with `T = |w| + 0.01` for kernels and `T = 1` for all else, so that
    rescaling a layer changes nothing.

    On several replicas each has an `ε` of its own, from its part of the batch, as in the
    paper; the smaller the part, the stronger the effect. The same holds for each of the
    `micro_batches`.

    References: Foret et al., 2021, "Sharpness-aware minimization for efficiently
    improving generalization", arXiv:2010.01412. Kwon et al., 2021, "ASAM: adaptive
    sharpness-aware minimization", arXiv:2102.11600.

    Args:
        rho: `ρ`, how far uphill, in units of the weights; for `adaptive=True` relative
            to them, and about ten times as large. May be assigned at any time.
        adaptive: whether to use ASAM.
        every: take the second pass at every n-th update only, and the plain gradient at
            the others. The first update, number 0, takes it.
        synchronize: whether replicas share one `ε`, that of the whole batch; training
            then does not depend on their number.

    Raises:
        TypeError: when an argument is of the wrong type.
        ValueError: when `rho` is negative or `every` is not positive.

    Example:

    ```python
    model.compile("sgd", "mse", backward=backward.SharpnessAware(rho=0.05))
    model.fit(x, y)
    ```
    """

    rho = LiveNumber(minimum=0)

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        every: int = 1,
        synchronize: bool = False,
    ) -> None:
        check_bool("adaptive", adaptive)
        check_count("every", every)
        check_bool("synchronize", synchronize)
        self.rho = rho
        self.adaptive = adaptive
        self.every = every
        self.synchronize = synchronize

    def compute(self, objective: Objective, batch: Batch) -> Computed:
        state = objective.state()
        with objective.tape() as tape:
            forward = objective.forward(batch)
        variables = objective.variables()
        clean = [tape.gradient(q, variables) for q in forward.scaled]
        computed = forward.computed(clean, variables)
        known = [[g is not None for g in row] for row in clean]

        def again() -> list[Any]:
            values = self._uphill(objective, computed.gradients)
            _, found = objective.gradients_at(batch, values, state, like=forward)
            rows = zip(found, known, strict=True)
            return [
                g for row, flags in rows for g, is_known in zip(row, flags, strict=True) if is_known
            ]

        present = [g for row in clean for g in row if g is not None]
        if self.every == 1:
            present = again()
        else:
            present = tf.cond(objective.steps() % self.every == 0, again, lambda: present)
        left = iter(present)
        uphill = [[next(left) if is_known else None for is_known in flags] for flags in known]
        return forward.computed(uphill, variables)

    def _uphill(self, objective: Objective, gradients: Gradients) -> list[tf.Tensor]:
        """Returns `w + ε` for each variable, `w` where the loss does not depend on it."""
        if self.synchronize:
            gradients = _summed(objective, gradients)
        slopes = gradients
        if self.adaptive:
            sizes = [_sizes(objective, v) for v in gradients.variables]
            slopes = gradients.map(lambda g, size: wide(g) * size, sizes)
        norm = slopes.global_norm()
        # At a norm that is no number the weights stay as they are: the second pass then
        # fails as the first one did, and the gate and the loss scale see it.
        usable = tf.math.is_finite(norm) & (norm > 0)
        rho, norm = LiveNumber.of(self, "rho"), tf.where(usable, norm, 1.0)

        def move(slope: Any, variable: Any, size: Any) -> tf.Tensor:
            value = tf.convert_to_tensor(variable.value)
            if slope is None:
                return value
            epsilon = tf.cast(rho, norm.dtype) * (tf.cast(to_dense(slope), norm.dtype) / norm)
            epsilon = tf.where(usable, epsilon, 0.0) * tf.cast(size, norm.dtype)
            return value + tf.cast(epsilon, value.dtype)

        factors = sizes if self.adaptive else [1.0] * len(gradients)
        triples = zip(slopes.values(), gradients.variables, factors, strict=True)
        return [move(*triple) for triple in triples]


def _summed(objective: Objective, gradients: Gradients) -> Gradients:
    return gradients.with_present(objective.sum_over_replicas(gradients.present()))


def _sizes(objective: Objective, variable: Any) -> Any:
    """Returns `T`."""
    if not objective.is_kernel(variable):
        return 1.0
    value = tf.convert_to_tensor(variable.value)
    return tf.abs(wide(value)) + FLOOR
