"""The steps that one update is made of: `gradient_accumulation_steps`, made right.

Keras counts schedules and averages per step instead of per update, weighs unequal
batches alike, carries leftovers into the next epoch, and lets one NaN into the whole
window. Here the optimizer sees one gradient an update, the mean over the window. What
Keras shows and saves stays what it is: the accumulators are the optimizer's own, and its
`_iterations` counts steps, so that `iterations` is the number of updates.

Private names used here: `BaseOptimizer._iterations`, `_accumulated_gradients` and
`_trainable_variables`. Checked with Keras 3.15.1; `tests/update/test_private_names.py`
fails when they change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.backward.base import Quotient
from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.update import optimizers, replicas


class Window:
    """The gradients of the steps since the last update of an optimizer, on each replica.

    A step may call the optimizer several times, for different variables. Of each call the
    window keeps the sums of the gradients, times what their quotient was divided by
    relative to the first step, and the sums of these weights.

    To be made in the strategy's scope, for an optimizer that is built.

    Args:
        optimizer: the optimizer; one of its leaves accumulates.
        num_steps: the number of steps that an update is made of.
    """

    def __init__(self, optimizer: Any, num_steps: int) -> None:
        self.num_steps = num_steps
        self._leaves = list(optimizers.leaves(optimizer))
        self.updates = [
            keras.Variable(
                np.int64(0), dtype="int64", trainable=False, aggregation="only_first_replica"
            )
            for _ in self._leaves
        ]
        self._sums: dict[int, Any] = {}
        # As the model has them: what an optimizer holds may be what they wrap.
        self._objects: dict[int, Any] = {}
        for leaf in self._leaves:
            with keras.name_scope(leaf.name, caller=leaf):
                _make_accumulators(leaf)
            pairs = zip(optimizers.all_variables(leaf), leaf._accumulated_gradients, strict=True)
            self._sums.update((id(_value(v)), total) for v, total in pairs)
        self._places = {key: place for place, key in enumerate(self._sums)}
        # For each variable the number of the call that gives it gradients, from 1.
        self._calls = _state((len(self._places),), "calls", "int32")
        # By call and quotient: what the first step was divided by, the weight of the
        # window in units of that, the sum of the losses, 1 once a step was added, and the
        # examples of this replica and of all.
        self._weights: dict[tuple[int, int], Any] = {}
        self._further: dict[tuple[int, int], Any] = {}
        self._known: dict[int, int] = {}
        # Made before a trace, which would be made twice: for most losses there is no other.
        self._weight(0, 0)

    @property
    def variables(self) -> dict[str, Any]:
        """The state that the optimizer does not hold, by stable names."""
        found = {"calls": self._calls}
        found.update((f"weight.{call}.{q}", v) for (call, q), v in self._weights.items())
        found.update((f"sum.{q}.{self._places[key]}", v) for (q, key), v in self._further.items())
        return found

    def trained(self, call: int, candidates: Sequence[Any]) -> list[Any]:
        """Returns the variables that a call has given gradients of and that are trained.

        Args:
            call: its number in the step.
            candidates: the model's variables; those of steps are known besides.
        """
        for variable in candidates:
            place = self._places.get(id(_value(variable)))
            if place is not None:
                self._objects.setdefault(place, variable)
        places = sorted(p for p in self._objects if self._known.get(p) == call)
        variables = [self._objects[place] for place in places]
        return [v for v in variables if getattr(v, "trainable", True)]

    def structure(self) -> Any:
        """Returns what of the window decides the traced graph."""
        return self.num_steps, tuple(sorted(self._known.items(), key=str))

    def make_room(self, saved: Sequence[str]) -> None:
        """Makes the variables that a saved window had, given their names."""
        for name in saved:
            kind, *numbers = name.split(".")
            if kind == "weight":
                self._weight(int(numbers[0]), int(numbers[1]))
            elif kind == "sum" and int(numbers[1]) < len(self._places):
                key = list(self._places)[int(numbers[1])]
                self._total(int(numbers[0]), key, self._sums[key])

    def begin_step(self) -> tf.Tensor:
        """Returns the number of steps in the window so far; asked once a step."""
        steps = tf.convert_to_tensor(leaf_iterations(self._leaves[0]).value)
        return tf.cast(steps, tf.int64) % self.num_steps

    def add(
        self,
        call: int,
        quotients: Sequence[Quotient],
        accepted: tf.Tensor | None,
        examples: tf.Tensor,
        all_examples: tf.Tensor,
        steps: tf.Tensor,
    ) -> tf.Tensor:
        """Adds the gradients of one call in one step.

        Args:
            call: its number in the step, from 0.
            quotients: of the loss, of this replica, without loss scale.
            accepted: scalar bool; a rejected step never happened. `None`: accepted.
            examples: the number of this replica's examples.
            all_examples: the number of those of all replicas.
            steps: as `begin_step` gave it.

        Returns:
            Whether the window is full now, a scalar bool.

        Raises:
            ValueError: when two calls in a step are for the same variable.
        """
        self._note(call, quotients)
        seen = tf.stack([examples, all_examples])
        for place, quotient in enumerate(quotients):
            self._add(call, place, quotient, accepted, steps, seen)
        counted = tf.constant(1, tf.int64) if accepted is None else tf.cast(accepted, tf.int64)
        if call == 0:
            for leaf in self._leaves:
                count = leaf_iterations(leaf)
                count.assign_add(tf.cast(counted, count.dtype))
        return steps + counted >= self.num_steps

    def _add(
        self,
        call: int,
        place: int,
        quotient: Quotient,
        accepted: tf.Tensor | None,
        steps: tf.Tensor,
        seen: tf.Tensor,
    ) -> None:
        row = self._weight(call, place)
        unit, weight, loss, begun, *before = tf.unstack(tf.convert_to_tensor(row.value))
        if quotient.divisor is None:
            factor = tf.constant(1.0)
        else:
            divisor = tf.cast(quotient.divisor, tf.float32)
            # A window that Keras began has sums, and no weights: it weighs steps alike.
            weight = tf.where(begun == 0.0, tf.cast(steps, tf.float32), weight)
            unit = tf.where((unit == 0.0) & (divisor > 0.0), divisor, unit)
            factor = tf.math.divide_no_nan(divisor, unit)
        if quotient.loss is not None:
            loss += tf.math.multiply_no_nan(tf.cast(quotient.loss, tf.float32), factor)
        changed = tf.stack([unit, weight + factor, loss, 1.0, *tf.unstack(seen + before)])
        row.assign(changed if accepted is None else tf.where(accepted, changed, row.value))
        assert quotient.gradients is not None
        for gradient, variable in quotient.gradients.pairs():
            if gradient is None:
                continue
            key = id(_value(variable))
            sums = self._total(place, key, self._sums[key])
            dense = tf.cast(to_dense(gradient), sums.dtype)
            total = sums.value + tf.math.multiply_no_nan(dense, tf.cast(factor, sums.dtype))
            sums.assign(total if accepted is None else tf.where(accepted, total, sums.value))

    def _note(self, call: int, quotients: Sequence[Quotient]) -> None:
        calls = np.zeros(len(self._places), "int32")
        for quotient in quotients:
            assert quotient.gradients is not None
            for gradient, variable in quotient.gradients.pairs():
                if gradient is None:
                    continue
                place = self._places.get(id(_value(variable)))
                if place is None:
                    raise ValueError(
                        f"The optimizer {self._leaves[0].name!r} accumulates gradients, and was "
                        f"not built for the variable {variable.name!r}."
                    )
                if self._known.setdefault(place, call) != call:
                    raise ValueError(
                        "A step updates the same variable twice with an optimizer that has "
                        f"`gradient_accumulation_steps={self.num_steps}`: the two updates "
                        "cannot be told apart in one window. Use two optimizers, or "
                        "`micro_batches`."
                    )
                self._objects.setdefault(place, variable)
                calls[place] = call + 1
        self._calls.assign(tf.maximum(self._calls.value, calls))

    def known_calls(self) -> list[int]:
        """Returns the calls that the window has gradients of; waits for the device."""
        for place, call in enumerate(_local(self._calls)):
            if call:
                self._known.setdefault(place, int(call) - 1)
        return sorted(set(self._known.values()))

    def leftover_steps(self) -> int:
        """Returns the number of steps without an update yet; waits for the device."""
        return int(self._leaves[0]._iterations.numpy()) % self.num_steps

    @contextlib.contextmanager
    def counting_updates(self, first: bool, full: bool) -> Iterator[None]:
        """Has the optimizer count updates, as one without accumulation does.

        Args:
            first: whether this is the first call of the step.
            full: whether the window is, whose last step is counted already.
        """
        if first:
            for leaf, updates in zip(self._leaves, self.updates, strict=True):
                made = tf.cast(leaf_iterations(leaf).value, tf.int64) // self.num_steps
                updates.assign(made - 1 if full else made)
        with _swapped(self._leaves, self.updates):
            yield
        for leaf, updates in zip(self._leaves, self.updates, strict=True):
            count = leaf_iterations(leaf)
            count.assign(tf.cast(updates.value * self.num_steps, count.dtype))

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Has the optimizer know of no window, in a call that makes no update."""
        with _swapped(self._leaves, self.updates):
            yield

    def mean(self, call: int, variables: Sequence[Any]) -> tuple[Gradients, tf.Tensor]:
        """Returns this replica's share of the mean gradient of a call, and of its loss.

        Args:
            call: its number in the step.
            variables: those being trained now.
        """
        total: Gradients | None = None
        losses = []
        for place in self._quotients_of(call):
            row = tf.convert_to_tensor(self._weight(call, place).value)
            # A sum, which nothing divides, has no unit.
            divisor = tf.where(row[0] == 0.0, 1.0, row[1])
            factor = tf.math.divide_no_nan(1.0, divisor)
            losses.append(row[2] * factor)
            pairs = []
            for variable in variables:
                key = id(_value(variable))
                there = self._known.get(self._places.get(key, -1)) == call
                sums = self._sums.get(key) if place == 0 else self._further.get((place, key))
                if not there or sums is None:
                    pairs.append((None, variable))
                    continue
                mean = sums.value * tf.cast(factor, sums.dtype)
                pairs.append((tf.cast(mean, variable.dtype), variable))
            found = Gradients(pairs)
            total = found if total is None else total.plus(found)
        assert total is not None
        return total, tf.add_n(losses)

    def norms(self, call: int, mean: Gradients) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Returns norm and size of this replica's part of the window, each `[1]`.

        Args:
            call: its number in the step.
            mean: this replica's share of the mean gradient.
        """
        if replicas.count() == 1:
            return None
        row = tf.convert_to_tensor(self._weight(call, 0).value)
        norm = tf.cast(mean.global_norm(), tf.float32) * tf.math.divide_no_nan(row[5], row[4])
        return tf.reshape(norm, [1]), tf.reshape(row[4], [1])

    def clear(self, call: int) -> None:
        """Empties the window of a call."""
        for place in self._quotients_of(call):
            row = self._weight(call, place)
            row.assign(tf.zeros(row.shape))
        places = {key for key, place in self._places.items() if self._known.get(place) == call}
        emptied = [self._sums[key] for key in self._places if key in places]
        emptied += [sums for (_, key), sums in self._further.items() if key in places]
        for sums in emptied:
            sums.assign(tf.zeros(sums.shape, sums.dtype))

    def gather(self) -> None:
        """Puts the sums of all replicas into the first one, from which Keras saves."""
        for sums in [*self._sums.values(), *self._further.values()]:
            copies = getattr(sums.value, "values", None)
            if copies is None or len(copies) < 2:
                continue
            total = tf.add_n([tf.identity(copy) for copy in copies])
            copies[0].assign(total)
            for copy in copies[1:]:
                copy.assign(tf.zeros_like(total))

    def loaded(self) -> None:
        """Leaves what was loaded to the first replica: each would count it again."""
        for sums in [*self._sums.values(), *self._further.values()]:
            for copy in getattr(sums.value, "values", ())[1:]:
                copy.assign(tf.zeros(copy.shape, copy.dtype))

    def _quotients_of(self, call: int) -> list[int]:
        return sorted(place for number, place in self._weights if number == call)

    def _weight(self, call: int, place: int) -> Any:
        make = functools.partial(_state, (6,), f"weight_{call}_{place}")
        return _make_late(self._weights, (call, place), make)

    def _total(self, place: int, key: int, like: Any) -> Any:
        if place == 0:
            return like
        make = functools.partial(_state, tuple(like.shape), "sum", like.dtype)
        return _make_late(self._further, (place, key), make)


def leaf_iterations(leaf: Any) -> Any:
    """Returns the variable of an optimizer that Keras counts calls in."""
    # Another replica may be inside `counting_updates`.
    return leaf.__dict__.get("_tapefit_iterations", leaf._iterations)


@contextlib.contextmanager
def _swapped(leaves: Sequence[Any], updates: Sequence[Any]) -> Iterator[None]:
    # As in `optimizers.already_reduced`: counted, for the threads of replicas interleave.
    for leaf, count in zip(leaves, updates, strict=True):
        state = leaf.__dict__
        if state.setdefault("_tapefit_swaps", 0) == 0:
            state["_tapefit_iterations"] = leaf._iterations
            state["_iterations"] = count
            state["_tapefit_steps"] = leaf.gradient_accumulation_steps
            state["gradient_accumulation_steps"] = None
        state["_tapefit_swaps"] += 1
    try:
        yield
    finally:
        for leaf in leaves:
            state = leaf.__dict__
            state["_tapefit_swaps"] -= 1
            if state["_tapefit_swaps"] == 0:
                state["_iterations"] = state.pop("_tapefit_iterations")
                state["gradient_accumulation_steps"] = state.pop("_tapefit_steps")
                del state["_tapefit_swaps"]


def _make_accumulators(leaf: Any) -> None:
    """Gives an optimizer the accumulators that Keras makes, where it was built without."""
    variables = optimizers.all_variables(leaf)
    if len(getattr(leaf, "_accumulated_gradients", ())) == len(variables):
        return
    leaf._accumulated_gradients = [
        leaf.add_variable_from_reference(variable, name="gradient_accumulator")
        for variable in variables
    ]


def _make_late(found: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """Makes a variable while a step is traced, inside one of several replicas too."""

    def lifted(strategy: Any = None) -> None:
        with tf.init_scope(), contextlib.nullcontext() if strategy is None else strategy.scope():
            found[key] = make()

    if key not in found:
        context = tf.distribute.get_replica_context()
        if context is None or not tf.distribute.has_strategy():
            lifted()
        else:
            # All replicas come here together, and one of them makes it.
            context.merge_call(lifted)
    return found[key]


def _state(shape: tuple[int, ...], name: str, dtype: str = "float32") -> Any:
    return keras.Variable(
        tf.zeros(shape, dtype),
        dtype=dtype,
        trainable=False,
        autocast=False,
        aggregation="none",
        name=name,
    )


def _local(variable: Any) -> np.ndarray:
    copies = getattr(variable.value, "values", None)
    return (variable.value if copies is None else copies[0]).numpy()


def _value(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def window_steps(optimizer: Any) -> int:
    """Returns `gradient_accumulation_steps` of an optimizer; 1: every step updates.

    Raises:
        ValueError: when the optimizers inside a `MultiOptimizer` differ in it.
    """
    found = {int(leaf.gradient_accumulation_steps or 1) for leaf in optimizers.leaves(optimizer)}
    if len(found) > 1:
        raise ValueError(
            "All optimizers of a MultiOptimizer must have the same "
            f"`gradient_accumulation_steps`. Received: {sorted(found)}."
        )
    return found.pop() if found else 1


def change_steps(optimizer: Any, before: int, after: int) -> None:
    """Keeps the number of updates when `gradient_accumulation_steps` changes."""
    for leaf in optimizers.leaves(optimizer):
        count = leaf._iterations
        count.assign(tf.cast(count.value // before * after, count.dtype))
