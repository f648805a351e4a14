"""Gradients in which no example counts for more than any other: DP-SGD."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
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
from keras_tapefit.backward.replays import for_each, is_floating, of_replays
from keras_tapefit.backward.weight_calls import WeightCalls
from keras_tapefit.backward.weight_gradients import (
    NotUnderstood,
    WeightGradient,
    is_understood,
    of_layer,
)
from keras_tapefit.gradients import draws
from keras_tapefit.gradients.checks import check_count, check_integer
from keras_tapefit.gradients.norms import rows_norm, wide
from keras_tapefit.gradients.sparse import to_dense

_logger = logging.getLogger("keras_tapefit")
_MIXING = (keras.layers.BatchNormalization, keras.layers.MixUp, keras.layers.CutMix)


@register
class PerExampleClipping(GradientMethod):
    """Clips the gradient of every example separately, and adds noise: DP-SGD.

    For outliers that must not steer the model, and as the mechanism of differentially
    private training. No privacy figure is claimed: that takes an accountant who knows
    how batches were drawn, and the shuffled batches of `fit` are no Poisson samples. A
    model's logs, loss and metrics are not protected at all.

    Formula: `g = (Σ_i g_i / max(1, ‖g_i‖/C) + N(0, σ²C²)) / L`, with `g_i` the gradient
    of the loss on a batch of one, weight regularization included, and the norm over all
    variables being trained. An example whose gradient is not finite counts as zero.
    The noise comes once for the whole batch: on several replicas from the first one.

    Norms come from the inputs of layers and the gradients at their outputs, and the
    clipped sum from the same: one forward and one backward pass on the whole batch, and no
    gradient of a single example in memory. That is known for Dense, EinsumDense (and
    attention, which is made of it), Conv1D to Conv3D without groups, Embedding and
    LayerNormalization, with Keras's own losses. Another layer with weights is run once more
    on each example, alone. Where that would not be the same (it draws random numbers, changes
    variables or takes more than it is given; its weights are read elsewhere too), and for
    another loss, that is so of the whole model, which is slow. `fell_back` says which layers
    or why, and a log message once. Vectorised where TensorFlow can: recurrent layers are
    faster here with `unroll=True`.

    Examples must not influence each other: BatchNormalization that trains, `MixUp`,
    `CutMix` and stateful recurrent layers are refused, and custom layers that do so must be
    left out. The log entry `clipped_examples` is the share of examples that were clipped. With
    `gradient_accumulation_steps` every step is a lot of its own, with noise of its own.
    With a dynamic loss scale, an overflow in any example skips the step.

    Reference: Abadi et al., 2016, "Deep learning with differential privacy",
    arXiv:1607.00133; for the norms Goodfellow, 2015, arXiv:1510.01799, Li et al., 2022,
    arXiv:2110.05679, and Bu et al., 2022, arXiv:2205.10683.

    Args:
        max_norm: `C`, the largest norm that the gradient of an example keeps. May be
            assigned at any time.
        noise_multiplier: `σ`, the standard deviation of the noise in units of
            `max_norm`. May be assigned at any time.
        expected_batch_size: `L`, the number of examples expected in the batch of all
            replicas. `None`: the number there are, which tells how many there are.
        chunk_size: the number of examples whose gradients are in memory at a time, where
            they are computed for the whole model; which they then are as soon as there is
            one layer that would be run again. Bounds the memory, as `micro_batches` cannot.
            `None`: all of the batch.
        seed: an integer, which the noise depends on together with the number of updates
            made. `None`: one drawn each time the object is made, and not saved.

    Attributes:
        fell_back: of what a gradient was computed for each example, a text: "the layers"
            and which, or "the whole model" and why; `None`: of nothing, or there was no
            step yet.

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
        self.fell_back: str | None = None
        self._drawn = random.SystemRandom().getrandbits(62) if seed is None else seed

    def compute(self, objective: Objective, batch: Batch) -> Computed:
        layers = objective.layers()
        _refuse(layers)
        # Refuses what has no examples one by one.
        _values(batch)
        state = objective.state()
        calls = WeightCalls([layer for layer in layers[1:] if layer.trainable_variables])
        with calls.tape:
            forward, losses, reason = objective.by_example(batch, calls.watching)
        variables = objective.variables()
        size = objective.batch_size(batch)
        examples = objective.sum_over_replicas(tf.cast(size, tf.float32))
        lot = examples if self.expected_batch_size is None else self.expected_batch_size
        scale, _ = objective.loss_scale()
        factor = tf.cast(1.0 if scale is None else scale, tf.float64) / tf.cast(lot, tf.float64)
        try:
            if losses is None:
                raise NotUnderstood(reason)
            calls.check(variables)
            names = [f"{v.name!r} ({type(v).__name__})" for v in calls.replayed]
            if names and self.chunk_size is not None:
                raise NotUnderstood(f"in chunks, for nothing is known of {', '.join(names)}")
            if not _keep_examples_first(objective, batch, calls, size):
                raise NotUnderstood(
                    "the first axis of what a layer gets is not known to be the batch"
                )
            sums, clipped = self._from_calls(objective, calls, losses, factor)
            self._say(f"the layers {', '.join(names)}" if names else None)
        except NotUnderstood as error:
            self._say(f"the whole model: {error}")
            sums, clipped = self._clipped_sums(objective, batch, state, size, factor)
        sums = self._with_noise(objective, variables, sums, factor)
        values = [
            None if total is None else tf.cast(total, variable.dtype)
            for total, variable in zip(sums, variables, strict=True)
        ]
        computed = forward.computed([values], variables)
        share = tf.math.divide_no_nan(objective.sum_over_replicas(clipped), examples)
        computed.logged["clipped_examples"] = share, examples
        return computed

    def _say(self, what: str | None) -> None:
        # Once, not at each trace.
        if what not in (None, self.fell_back):
            _logger.warning(
                "PerExampleClipping computes a gradient for each example, which is slow, of %s.",
                what,
            )
        self.fell_back = what

    def _from_calls(
        self,
        objective: Objective,
        calls: WeightCalls,
        losses: tf.Tensor,
        factor: tf.Tensor,
    ) -> tuple[list[Any], tf.Tensor]:
        """Returns what `_clipped_sums` does, from layer inputs and output gradients."""
        variables = objective.variables()
        scale, _ = objective.loss_scale()
        with calls.tape:
            scaled = _times(losses, scale)
            total = tf.reduce_sum(scaled)
        wanted = {id(v) for v in variables}
        found: dict[int, WeightGradient] = {}
        factors: list[tf.Tensor] = []
        for layer, pairs in calls.gradients(total):
            known = _of_layer(layer, pairs)
            found |= {id(v): gradient for v, gradient in known if id(v) in wanted}
            both = [v for given, gradients in pairs for v in (given, *gradients)]
            factors += filter(is_floating, both)
        # The same for all examples.
        constant = [
            g if g is None else _times(wide(to_dense(g)), scale) for g in objective.regularization()
        ]
        rows = [(found.get(id(v)), c) for v, c in zip(variables, constant, strict=True)]
        bound = _times(LiveNumber.of(self, "max_norm"), scale)
        norms = _norms(rows, tf.zeros_like(losses, tf.float64), factors, bound)
        counted = tf.ones_like(norms, tf.bool)
        shares, kept, clipped = self._shares(objective, scaled, norms, counted, factor)

        def summed(gradient: WeightGradient | None, other: Any, kept: Any) -> tf.Tensor:
            whole = None if gradient is None else gradient.total(shares, kept)
            if other is None:
                return whole
            rest = tf.cast(tf.reduce_sum(shares), other.dtype) * other
            return rest if whole is None else whole + tf.cast(rest, whole.dtype)

        def sums(kept: Any) -> list[tf.Tensor]:
            return [summed(*row, kept) for row in rows if any(v is not None for v in row)]

        # One branch for all, which a bad example alone takes.
        left = iter(tf.cond(tf.reduce_all(kept), lambda: sums(None), lambda: sums(kept)))
        found_any = [any(v is not None for v in row) for row in rows]
        return [next(left) if there else None for there in found_any], clipped

    def _shares(
        self,
        objective: Objective,
        losses: tf.Tensor,
        norms: tf.Tensor,
        counted: tf.Tensor,
        factor: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns what each gradient counts for, times a factor; which ones count; and how
        many are clipped. Where one overflowed for the loss scale alone, NaN."""
        scale, is_dynamic = objective.loss_scale()
        dtype = norms.dtype
        unscaled = tf.cast(1.0 if scale is None else 1.0 / tf.cast(scale, tf.float32), dtype)
        norms *= unscaled
        max_norm = tf.cast(LiveNumber.of(self, "max_norm"), dtype)
        finite = tf.math.is_finite(norms)
        kept = finite & counted
        shares = tf.where(kept, max_norm / tf.maximum(norms, max_norm), tf.zeros((), dtype))
        # Here, and not on sums as large as the weights.
        shares *= unscaled * tf.cast(factor, dtype)
        if is_dynamic and scale is not None:
            # Where the loss is a number the fault is the scale's, while there is one.
            lost = counted & ~finite & tf.math.is_finite(losses)
            overflow = tf.reduce_any(lost) & (scale > 1.0)
            shares = tf.where(overflow, tf.constant(math.nan, dtype), shares)
        clipped = tf.reduce_sum(tf.cast(kept & (norms > max_norm), tf.float32))
        return shares, kept, clipped

    def _clipped_sums(
        self, objective: Objective, batch: Batch, state: Any, size: Any, factor: tf.Tensor
    ) -> tuple[list[Any], tf.Tensor]:
        """Returns the sum of the clipped gradients, by variable and times a factor, and how
        many were clipped."""
        missing: list[bool] = []

        def one(inputs: Any) -> Any:
            example, index = inputs
            example = _with_values(batch, [tf.expand_dims(value, 0) for value in example])
            loss, [gradients] = objective.gradients_at(example, None, state, index)
            missing[:] = [g is None for g in gradients]
            return loss, [to_dense(g) for g in gradients if g is not None]

        def chunk(rows: tf.Tensor, counted: tf.Tensor) -> Any:
            examples = [tf.gather(value, rows) for value in _values(batch)]
            losses, gradients = for_each(one, (examples, rows))
            return self._sums(objective, losses, gradients, counted, factor)

        if self.chunk_size is None or (isinstance(size, int) and size <= self.chunk_size):
            sums, clipped = chunk(tf.range(size), tf.fill([size], True))
        else:
            sums, clipped = _over_chunks(chunk, size, self.chunk_size)
        left = iter(sums)
        return [None if gone else next(left) for gone in missing], clipped

    def _sums(
        self,
        objective: Objective,
        losses: tf.Tensor,
        gradients: list[tf.Tensor],
        counted: tf.Tensor,
        factor: tf.Tensor,
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        gradients = [wide(g) for g in gradients]
        norms = rows_norm([tf.reshape(g, [tf.shape(g)[0], -1]) for g in gradients])
        shares, kept, clipped = self._shares(objective, losses, norms, counted, factor)

        def total(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
            return [tf.tensordot(tf.cast(shares, g.dtype), g, 1) for g in gradients]

        def selected() -> list[tf.Tensor]:
            # 0 · NaN is NaN, and a pass over all examples more.
            rows = [tf.reshape(kept, [-1] + [1] * (g.shape.rank - 1)) for g in gradients]
            return total([tf.where(row, g, 0.0) for row, g in zip(rows, gradients, strict=True)])

        # The last chunk is filled up with rows that do not count.
        usable = tf.reduce_all(kept | ~counted)
        sums = tf.cond(usable, lambda: total(gradients), selected)
        return sums, clipped

    def _with_noise(
        self, objective: Objective, variables: list[Any], sums: list[Any], factor: tf.Tensor
    ) -> list[Any]:
        streams = np.random.SeedSequence([abs(self._drawn), self._drawn < 0])
        seeds = streams.generate_state(max(1, len(variables)))
        stddev = LiveNumber.of(self, "noise_multiplier") * LiveNumber.of(self, "max_norm")
        stddev = tf.where(objective.is_first_replica(), stddev, 0.0)

        rows = list(zip(sums, variables, seeds, strict=False))
        present = [total for total, *_ in rows if total is not None]

        def noisy() -> list[tf.Tensor]:
            size = tf.cast(stddev, tf.float64) * factor
            return [
                total + tf.cast(size, total.dtype) * _normal(v.shape, seed, objective, total.dtype)
                for total, v, seed in rows
                if total is not None
            ]

        # What is multiplied by 0 need not be drawn.
        left = iter(tf.cond(stddev > 0, noisy, lambda: present) if present else ())
        return [None if total is None else next(left) for total in sums]


def _normal(shape: Any, seed: Any, objective: Objective, dtype: Any) -> tf.Tensor:
    return tf.cast(draws.normal(shape, (seed, objective.steps())), dtype)


def _of_layer(layer: Any, calls: Any) -> Iterator[tuple[Any, WeightGradient]]:
    if is_understood(layer):
        return of_layer(layer, [(given, gradient) for given, [gradient] in calls])
    return of_replays(layer, calls)


def _keep_examples_first(objective: Objective, batch: Batch, calls: WeightCalls, size: Any) -> bool:
    """Whether what layers get and return has the examples as its first axis."""
    size = size if isinstance(size, int) else None
    # In code of the user's own the batch may be folded, or be another axis that happens to be
    # as large: tried with one of another size.
    other = 11 if size == 7 else 7
    return calls.first_axes() <= {size} and objective.first_axes(batch, calls, other) <= {other}


def _times(value: tf.Tensor, scale: Any) -> tf.Tensor:
    return value if scale is None else value * tf.cast(scale, value.dtype)


def _norms(
    rows: list[tuple[WeightGradient | None, Any]],
    zeros: tf.Tensor,
    factors: Sequence[tf.Tensor],
    bound: tf.Tensor,
) -> tf.Tensor:
    """Returns the norm of the gradient of each example, as far as the bound needs it.

    Args:
        rows: for each weight the part that depends on the example, and the one that does
            not, both with the loss scale.
        zeros: of shape `[batch]`.
        factors: the floating-point tensors that gradients are products of.
        bound: of the norm, with the loss scale, a scalar.
    """
    known = [(gradient, other) for gradient, other in rows if gradient is not None]
    products = [2.0 * gradient.products(other) for gradient, other in known if other is not None]
    products += [
        zeros + tf.reduce_sum(tf.square(tf.cast(other, zeros.dtype)))
        for _, other in rows
        if other is not None
    ]
    rest = tf.add_n([zeros, *products])
    squares = [tf.cast(gradient.squares(), zeros.dtype) for gradient, _ in known]
    plain = tf.add_n([zeros, *squares])
    # Far from where float32 loses a square; and nothing else is lost.
    in_range = tf.reduce_all(tf.math.is_finite(plain) & (plain > 1e-25))

    def exact() -> tf.Tensor:
        return tf.add_n([zeros, *(tf.square(gradient.norms()) for gradient, _ in known)])

    def safe() -> tf.Tensor:
        # An example that the model has learned has next to no gradient. Of factors of moderate
        # size float32 loses so little that the norm stays below the bound.
        is_far = tf.reduce_all(tf.math.is_finite(plain)) & (bound > 1e-3)
        for factor in factors:
            is_far &= tf.cast(tf.reduce_max(tf.abs(factor)), tf.float32) < 1e6
        return tf.cond(is_far, lambda: plain, exact)

    return tf.sqrt(tf.nn.relu(tf.cond(in_range, lambda: plain, safe) + rest))


def _over_chunks(
    chunk: Callable[[tf.Tensor, tf.Tensor], Any], size: Any, chunk_size: int
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Adds up chunk after chunk; the last one is filled up with rows that do not count."""

    def at(start: Any) -> Any:
        rows = start + tf.range(chunk_size)
        return chunk(tf.minimum(rows, size - 1), rows < size)

    def body(start: tf.Tensor, sums: list[tf.Tensor], clipped: tf.Tensor) -> Any:
        found, more = at(start)
        added = [a + b for a, b in zip(sums, found, strict=True)]
        return start + chunk_size, added, clipped + more

    sums, clipped = at(tf.constant(0))
    # It begins with what is ready: without the tie, during the first chunk.
    with tf.control_dependencies([*sums, clipped]):
        _, sums, clipped = tf.while_loop(
            lambda start, *_: start < size,
            body,
            (tf.constant(chunk_size), sums, clipped),
            parallel_iterations=1,
        )
    return sums, clipped


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
