"""The place of the first value of a step that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_tapefit.gradients import variable_path
from keras_tapefit.gradients.layers import NamedLayer
from keras_tapefit.hooks.step import Outputs

INPUT, WEIGHT, OUTPUT, LOSS, OUTPUT_GRADIENT, GRADIENT = range(1, 7)
NUM_EXAMPLES = 8
_PARTS_OF_BATCH = ("x", "y", "sample_weight")


class Place(NamedTuple):
    """The place of values in a step.

    Attributes:
        kind: one of the numbers above, in the order in which a step computes them.
        number: of the input, the variable or the layer.
        call: the number of the call of the layer.
        passes_back: the number of the only layer that takes the output, whose backward pass
            gives the gradient there; −1: none, or several.
        value: a tensor; `None` in a description.
    """

    kind: int
    number: int
    call: int = 0
    passes_back: int = -1
    value: Any = None


def places(taps: Any, watcher: Any, layers: Sequence[Any], variables: Sequence[Any]) -> list[Place]:
    """Returns where values of one forward and backward pass are, in their order.

    Args:
        taps: of the pass.
        watcher: who looks at the gradients.
        layers: of the model, which give the indices.
        variables: the weights.
    """
    index = {id(layer): i for i, layer in enumerate(layers)}
    found = [
        Place(INPUT, i, value=tf.convert_to_tensor(value))
        for i, part in enumerate(taps.inputs or ())
        for value in keras.tree.flatten(part)
        if value is not None and not isinstance(value, tf.SparseTensor | tf.RaggedTensor)
    ]
    found += [Place(WEIGHT, i, value=tf.convert_to_tensor(v)) for i, v in enumerate(variables)]
    found += [Place(OUTPUT, index[id(t.layer)], t.call, value=t.value) for t in taps.taps]
    if taps.loss is not None:
        found.append(Place(LOSS, 0, value=taps.loss))
    for tap in taps.returning:
        back = index.get(id(_passes_back(tap, taps.taps)), -1)
        gradient = tap.gradient(watcher)
        found.append(Place(OUTPUT_GRADIENT, index[id(tap.layer)], tap.call, back, gradient))
    return [place for place in found if place.value is not None and place.value.dtype.is_floating]


def _passes_back(tap: Any, taps: Sequence[Any]) -> Any:
    """Returns the only layer that takes a tensor, the innermost; `None`: there is none."""
    taking = {t.path: t.layer for t in taps if any(v is tap.passed_on for v in t.inputs)}
    inner = [p for p in taking if not any(q.startswith(f"{p}/") for q in taking)]
    return taking[inner[0]] if len(inner) == 1 else None


class Locator:
    """Keeps on the device where a run of steps that are not finite began.

    Args:
        hook: the gate, whose state it adds to; to be made in its `build`.
        variables: the weights.
    """

    def __init__(self, hook: Any, variables: Sequence[Any]) -> None:
        def state(shape: Sequence[int], name: str) -> keras.Variable:
            return hook.add_variable(shape, dtype="int64", name=name, kept_when_skipped=True)

        self._hook = hook
        self._variables = list(variables)
        self._paths = [variable_path(v) for v in variables]
        # Kind, index, call, layer that passes back, step.
        self._where = state((5,), "where")
        # Their numbers in the batch, from 1; 0: none.
        self._examples = state((NUM_EXAMPLES,), "examples")
        self._num_examples = state((), "num_examples")
        self._found = state((), "found_in_last_step")
        self._steps = state((), "steps")

    def look(self, outputs: Outputs, layers: Sequence[NamedLayer]) -> None:
        """Looks at the values of a step."""
        known = [layer for _, layer in layers]
        table: list[Place] = []
        flags: list[tf.Tensor] = []
        parts: list[tuple[int, tf.Tensor]] = []
        for taps in outputs.passes:
            found = places(taps, self._hook, known, self._variables)
            size = _batch_size(taps)
            bad = [_bad(place, size) for place in found]
            if bad:
                parts.append((len(table), tf.stack([rows for _, rows in bad])))
            flags += [flag for flag, _ in bad]
            table += [place._replace(value=None) for place in found]
        self._steps.assign(self._steps.value + 1)
        if not table:
            return
        bad = outputs.sum_over(tf.cast(tf.stack(flags), tf.int32)) > 0
        numbers = tf.range(len(table), dtype=tf.int64)
        last = tf.constant(len(table) - 1, tf.int64)
        # Not `argmin`; see `SkipNonFinite`.
        first = tf.reduce_min(tf.where(bad, numbers, last))
        examples, count = _examples(parts, first, outputs)
        is_bad = tf.reduce_any(bad)
        begins = is_bad & (self._found.value == 0)
        described = tf.constant([place[:4] for place in table], tf.int64)
        where = tf.concat([tf.gather(described, first), [self._steps.value - 1]], axis=0)
        for state, new in (
            (self._where, where),
            (self._examples, examples),
            (self._num_examples, count),
        ):
            state.assign(tf.where(begins, new, tf.convert_to_tensor(state.value)))
        self._found.assign(tf.cast(is_bad, tf.int64))

    def look_at_gradients(self, begins: tf.Tensor, first: tf.Tensor) -> None:
        """Keeps that only the gradient of a weight was not finite.

        Args:
            begins: scalar bool, whether a run of bad steps begins.
            first: the index of the first such weight.
        """
        alone = begins & (self._found.value == 0)
        none = tf.zeros((), tf.int64)
        where = tf.stack([none + GRADIENT, first, none, none - 1, self._steps.value - 1])
        self._where.assign(tf.where(alone, where, tf.convert_to_tensor(self._where.value)))
        self._num_examples.assign(tf.where(alone, none, self._num_examples.value))

    def text(self, layers: Sequence[NamedLayer]) -> str | None:
        """Returns where the last run of bad steps began, in words; waits for the device."""
        kind, index, call, back, step = (int(v) for v in self._where.numpy())
        if kind == 0:
            return None
        paths = [path for path, _ in layers]
        what = describe(Place(kind, index, call, back), paths, self._paths)
        count = int(self._num_examples.numpy())
        examples = [int(v) - 1 for v in self._examples.numpy()[:count]]
        where = f", {in_words(examples, count)} of the batch" if count else ""
        return f"The first value that was not finite was {what}, at step {step}{where}."


def describe(place: Place, layers: Sequence[str], variables: Sequence[str]) -> str:
    """Returns a place in words.

    Args:
        place: the place.
        layers: the paths of the layers.
        variables: the paths of the weights.
    """
    kind, index, call = place.kind, place.number, place.call
    if kind == INPUT:
        return f"in the data: `{_PARTS_OF_BATCH[index]}`"
    if kind == WEIGHT:
        return f"in the weight {variables[index]!r}, before the step"
    if kind == LOSS:
        return "the loss (forward), computed of finite outputs"
    if kind == GRADIENT:
        return f"the gradient of the weight {variables[index]!r} (backward)"
    layer = f"layer {layers[index]!r}" + (f", call {call}" if call else "")
    if kind == OUTPUT:
        return f"the output of {layer} (forward)"
    if place.passes_back >= 0:
        return (
            f"the gradient that layer {layers[place.passes_back]!r} passes back to the output "
            f"of {layer} (backward)"
        )
    return f"the gradient at the output of {layer} (backward)"


def in_words(examples: Sequence[int], count: int) -> str:
    """Returns the numbers of examples as a sentence has them."""
    listed = [str(number) for number in examples]
    if count > len(listed):
        listed.append(f"{count - len(listed)} more")
    joined = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    return f"example{'s' if count > 1 else ''} {joined}"


def _batch_size(taps: Any) -> tf.Tensor:
    for value in keras.tree.flatten(taps.inputs or ()):
        if value is not None and value.shape.rank:
            return tf.cast(tf.shape(value)[0], tf.int64)
    return tf.zeros((), tf.int64)


def _bad(place: Place, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns whether values are bad, and for each example of the batch whether its are."""
    bad = ~tf.math.is_finite(place.value)
    none = tf.zeros(tf.reshape(size, [1]), tf.bool)
    if bad.shape.rank in (0, None) or place.kind in (WEIGHT, LOSS):
        return tf.reduce_any(bad), none
    rows = tf.reduce_any(bad, axis=list(range(1, bad.shape.rank)))
    # The first axis need not be that of the examples.
    is_batch = tf.cast(tf.shape(rows)[0], tf.int64) == size
    return tf.reduce_any(rows), tf.concat([rows, none], axis=0)[
        : tf.cast(size, tf.int32)
    ] & is_batch


def _examples(
    parts: Sequence[tuple[int, tf.Tensor]], first: tf.Tensor, outputs: Outputs
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the numbers of the bad examples at a place, from 1, and how many there are.

    Args:
        parts: of the batch: the number of its first place, and bools of shape
            `[num_places, num_examples]`.
        first: the number of the place.
        outputs: of the step.
    """
    found = []
    for start, rows in parts:
        place = first - start
        here = (place >= 0) & (place < rows.shape[0])
        found.append(tf.gather(rows, tf.clip_by_value(place, 0, rows.shape[0] - 1)) & here)
    flags = tf.concat(found, axis=0)
    size = tf.shape(flags, tf.int64)[0]
    numbers = tf.range(1, size + 1) * tf.cast(flags, tf.int64)
    count = tf.math.count_nonzero(numbers)
    if outputs.num_replicas > 1:
        mine = tf.one_hot(outputs.replica, outputs.num_replicas, dtype=tf.int64)
        sizes, counts = tf.unstack(outputs.sum_over(tf.stack([mine * size, mine * count])))
        before = tf.reduce_sum(tf.where(tf.range(outputs.num_replicas) < outputs.replica, sizes, 0))
        own = _leading(tf.where(numbers > 0, numbers + before, 0))
        numbers = tf.reshape(outputs.sum_over(mine[:, None] * own), [-1])
        count = tf.reduce_sum(counts)
    return _leading(numbers), count


def _leading(numbers: tf.Tensor) -> tf.Tensor:
    """Returns the first numbers that are not 0, and zeros after them."""
    place = tf.cumsum(tf.cast(numbers > 0, tf.int32)) - 1
    place = tf.where(numbers > 0, tf.minimum(place, NUM_EXAMPLES), NUM_EXAMPLES)
    return tf.math.unsorted_segment_sum(numbers, place, NUM_EXAMPLES + 1)[:NUM_EXAMPLES]
