"""Gradients in which no example counts for more than any other: DP-SGD."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.backward.base import (
    Batch,
    Computed,
    GradientMethod,
    LiveNumber,
    Objective,
    register,
)
from keras_tapefit.gradients import draws
from keras_tapefit.gradients.checks import check_count, check_integer
from keras_tapefit.gradients.norms import rows_norm, wide
from keras_tapefit.gradients.sparse import to_dense

_MIXING = (keras.layers.BatchNormalization, keras.layers.MixUp, keras.layers.CutMix)


@register
class PerExampleClipping(GradientMethod):
    """Clips the gradient of every example by itself, and adds noise: DP-SGD.

    For outliers that must not steer the model, and as the mechanism of differentially
    private training. No privacy figure is claimed: that takes an accountant who knows
    how batches were drawn, and the shuffled batches of `fit` are no Poisson samples. A
    model's logs, loss and metrics are not protected at all.

    Formula: `g = (Σ_i g_i / max(1, ‖g_i‖/C) + N(0, σ²C²)) / L`, with `g_i` the gradient
    of the loss on a batch of one, weight regularization included, and the norm over all
    variables being trained. An example whose gradient is not finite counts as zero.
    The noise comes once for the whole batch: on several replicas from the first one.

    Every example has a gradient in memory of its own, so `chunk_size` bounds the memory
    where `micro_batches` cannot. One more forward pass, on the whole batch, is what
    outputs, metrics, logs and random seeds come from. Examples must not influence each
    other: BatchNormalization that trains, `MixUp`, `CutMix` and stateful recurrent
    layers are refused, and layers of one's own that do so must be left out. Recurrent
    layers must be made with `unroll=True`. With
    `gradient_accumulation_steps` every step is a lot of its own, with noise of its own.
    With a dynamic loss scale, an overflow in any example skips the step.

    Reference: Abadi et al., 2016, "Deep learning with differential privacy",
    arXiv:1607.00133.

    Args:
        max_norm: `C`, the largest norm that the gradient of an example keeps. May be
            assigned at any time.
        noise_multiplier: `σ`, the standard deviation of the noise in units of
            `max_norm`. May be assigned at any time.
        expected_batch_size: `L`, the number of examples expected in the batch of all
            replicas. `None`: the number there are, which tells how many there are.
        chunk_size: the number of examples whose gradients are in memory at a time.
            `None`: all of the batch.
        seed: an integer, which the noise depends on together with the number of updates
            made. `None`: one drawn anew each time the object is made, and not saved.

    Raises:
        TypeError: when an argument is of the wrong type.
        ValueError: when a number is out of bounds; in the first step, when a layer
            mixes examples or a loss is a sum over them.

    Example:

    ```python
    method = backward.PerExampleClipping(
        max_norm=1.0, noise_multiplier=1.1, expected_batch_size=256, chunk_size=32
    )
    model.compile("sgd", "sparse_categorical_crossentropy", backward=method)
    ```
    """

    takes_parts: ClassVar[bool] = False
    has_outputs: ClassVar[bool] = False
    max_norm = LiveNumber(above=0)
    noise_multiplier = LiveNumber(minimum=0)

    def __init__(
        self,
        max_norm: float,
        noise_multiplier: float = 0.0,
        expected_batch_size: int | None = None,
        chunk_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        if expected_batch_size is not None:
            check_count("expected_batch_size", expected_batch_size)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        if seed is not None:
            check_integer("seed", seed)
        self.max_norm = max_norm
        self.noise_multiplier = noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.chunk_size = chunk_size
        self.seed = seed
        self._drawn = random.SystemRandom().getrandbits(62) if seed is None else seed

    def compute(self, objective: Objective, batch: Batch) -> Computed:
        _refuse(objective.layers())
        state = objective.state()
        forward = objective.forward(batch)
        variables = objective.variables()
        size = objective.batch_size(batch)
        sums, overflow = self._clipped_sums(objective, batch, state, size)
        lot = self.expected_batch_size
        if lot is None:
            lot = objective.sum_over_replicas(tf.cast(size, tf.float32))
        scale, _ = objective.loss_scale()
        factor = (1.0 if scale is None else tf.cast(scale, tf.float32)) / tf.cast(lot, tf.float32)
        noise = self._noise(objective, variables)

        def finished(total: Any, noise: tf.Tensor, variable: Any) -> Any:
            if total is None:
                return None
            total = (total + tf.cast(noise, total.dtype)) * tf.cast(factor, total.dtype)
            return tf.cast(
                tf.where(overflow, tf.constant(math.nan, total.dtype), total), variable.dtype
            )

        values = [finished(*row) for row in zip(sums, noise, variables, strict=True)]
        return forward.computed([values], variables)

    def _clipped_sums(
        self, objective: Objective, batch: Batch, state: Any, size: Any
    ) -> tuple[list[Any], tf.Tensor]:
        """Returns the sum of the clipped gradients, by variable, and whether one of them
        overflowed for the loss scale alone."""
        missing: list[bool] = []

        def one(inputs: Any) -> Any:
            example, index = inputs
            example = _with_values(batch, [tf.expand_dims(value, 0) for value in example])
            loss, [gradients] = objective.gradients_at(example, None, state, index)
            missing[:] = [g is None for g in gradients]
            return loss, [to_dense(g) for g in gradients if g is not None]

        def chunk(rows: tf.Tensor, counted: tf.Tensor) -> Any:
            examples = [tf.gather(value, rows) for value in _values(batch)]
            losses, gradients = tf.vectorized_map(one, (examples, rows), warn=False)
            return self._sums(objective, losses, gradients, counted)

        if self.chunk_size is None or (isinstance(size, int) and size <= self.chunk_size):
            sums, overflow = chunk(tf.range(size), tf.fill([size], True))
        else:
            sums, overflow = _over_chunks(chunk, size, self.chunk_size)
        left = iter(sums)
        return [None if gone else next(left) for gone in missing], overflow

    def _sums(
        self, objective: Objective, losses: tf.Tensor, gradients: list[tf.Tensor], counted: Any
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        scale, is_dynamic = objective.loss_scale()
        factor = 1.0 if scale is None else 1.0 / tf.cast(scale, tf.float32)
        gradients = [wide(g) for g in gradients]
        norms = rows_norm([tf.reshape(g, [tf.shape(g)[0], -1]) for g in gradients])
        dtype = norms.dtype
        norms *= tf.cast(factor, dtype)
        max_norm = tf.cast(LiveNumber.of(self, "max_norm"), dtype)
        finite = tf.math.is_finite(norms)
        kept = finite & counted
        shares = tf.where(kept, max_norm / tf.maximum(norms, max_norm), 0.0)
        shares *= tf.cast(factor, dtype)

        def total(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
            return [tf.tensordot(tf.cast(shares, g.dtype), g, 1) for g in gradients]

        def selected() -> list[tf.Tensor]:
            # 0 · NaN is NaN, and a pass over all examples more.
            rows = [tf.reshape(kept, [-1] + [1] * (g.shape.rank - 1)) for g in gradients]
            return total([tf.where(row, g, 0.0) for row, g in zip(rows, gradients, strict=True)])

        sums = tf.cond(tf.reduce_all(finite), lambda: total(gradients), selected)

        overflow = tf.constant(False)
        if is_dynamic and scale is not None:
            # Where the loss is a number the fault is the scale's, while there is one.
            lost = counted & ~finite & tf.math.is_finite(losses)
            overflow = tf.reduce_any(lost) & (scale > 1.0)
        return sums, overflow

    def _noise(self, objective: Objective, variables: list[Any]) -> list[tf.Tensor]:
        streams = np.random.SeedSequence([abs(self._drawn), self._drawn < 0])
        seeds = streams.generate_state(max(1, len(variables)))
        stddev = LiveNumber.of(self, "noise_multiplier") * LiveNumber.of(self, "max_norm")
        stddev = tf.where(objective.is_first_replica(), stddev, 0.0)
        return [
            stddev * draws.normal(v.shape, (seed, objective.steps()))
            for v, seed in zip(variables, seeds, strict=False)
        ]


def _over_chunks(
    chunk: Callable[[tf.Tensor, tf.Tensor], Any], size: Any, chunk_size: int
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Adds up chunk after chunk; the last one is filled up with rows that do not count."""

    def at(start: Any) -> Any:
        rows = start + tf.range(chunk_size)
        return chunk(tf.minimum(rows, size - 1), rows < size)

    def body(start: tf.Tensor, sums: list[tf.Tensor], overflow: tf.Tensor) -> Any:
        found, overflowed = at(start)
        added = [a + b for a, b in zip(sums, found, strict=True)]
        return start + chunk_size, added, overflow | overflowed

    sums, overflow = at(tf.constant(0))
    _, sums, overflow = tf.while_loop(
        lambda start, *_: start < size,
        body,
        (tf.constant(chunk_size), sums, overflow),
        parallel_iterations=1,
    )
    return sums, overflow


def _values(batch: Batch) -> list[tf.Tensor]:
    values = [v for v in keras.tree.flatten(batch) if v is not None]
    if any(isinstance(v, tf.SparseTensor | tf.RaggedTensor) for v in values):
        raise ValueError(
            "`PerExampleClipping` cannot take examples out of a sparse or ragged tensor one by "
            "one. Make the input dense, as `tf.sparse.to_dense` does."
        )
    return [tf.convert_to_tensor(v) for v in keras.tree.flatten(batch) if v is not None]


def _with_values(batch: Batch, values: list[tf.Tensor]) -> Any:
    left = iter(values)
    return keras.tree.map_structure(lambda v: None if v is None else next(left), batch)


def _refuse(layers: list[Any]) -> None:
    for layer in layers:
        mixing = isinstance(layer, _MIXING) and layer.trainable
        if mixing or (isinstance(layer, keras.layers.RNN) and layer.stateful):
            raise ValueError(
                "`PerExampleClipping` needs examples that do not influence each other, "
                f"and the layer {layer.name!r} ({type(layer).__name__}) mixes them. Use "
                "LayerNormalization or GroupNormalization in place of "
                "BatchNormalization, or freeze the layer."
            )
        if isinstance(layer, keras.layers.RNN) and not layer.unroll:
            raise ValueError(
                "TensorFlow cannot vectorise the gradient of a loop over time steps, as "
                f"the layer {layer.name!r} ({type(layer).__name__}) has it. Make it with "
                "`unroll=True`."
            )
