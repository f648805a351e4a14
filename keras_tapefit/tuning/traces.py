"""Traced functions that are called with the variables of one model after the other.

A trace reads and writes the variables that it captured. It is called here with others in
their place, those of a model like the one that it was made for; no variable changes its
owner, and no model outlives its trial.

Private names used here: `FuncGraph._function_captures` and `op_def_registry`. Checked with
Keras 3.15.1 and TensorFlow 2.21; `tests/tuning/test_reuse.py` fails when they change.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from keras_tapefit.training.keras_trainer import Fetched, on_each
from keras_tapefit.tuning.check import Check
from keras_tapefit.tuning.fingerprint import Fingerprint, Incomparable, random_state

# What a trace may do besides computing: use variables and take batches. Random numbers of
# Keras are stateless operations on a variable.
_HARMLESS = (
    "ReadVariableOp Assert PrintV2 NoOp Placeholder PartitionedCall StatefulPartitionedCall "
    "If While Case VarIsInitializedOp VariableShape IteratorGetNext IteratorGetNextAsOptional "
    "OptionalFromValue OptionalGetValue OptionalHasValue OptionalNone CudnnRNN CudnnRNNBackprop"
).split()
_HARMLESS_PREFIXES = ("Assign", "ResourceGather", "ResourceScatter", "ResourceApply", "CudnnRNN")


class Trace:
    """A traced function of an iterator, kept for models like the one it was made for.

    Args:
        concrete: the function; calls return an optional with the logs.
        fingerprint: of the model that it was traced for.
        kind: `"train"` or `"test"`.
        spec: of the iterator, see `_spec_of`.

    Attributes:
        flaw: why it may not be used for another model, or `None`.
        noise: for each variable how far rounding alone was seen to carry it.
        uncompiled: the same, traced without XLA, which draws other random numbers than
            eager steps do; `None` where this one is.

    Raises:
        Incomparable: when it has to do with more than the variables of the model.
    """

    def __init__(self, concrete: Any, fingerprint: Fingerprint, kind: str, spec: Any) -> None:
        places = {id(v.handle): i for i, v in enumerate(fingerprint.variables)}
        captured = concrete.captured_inputs
        self._captured = [places.get(id(tensor), tensor) for tensor in captured]
        for tensor in self._captured:
            if not isinstance(tensor, int) and tensor.dtype in (tf.resource, tf.variant):
                raise Incomparable("the step uses a variable or table that is no part of the model")
        _check_operations(concrete.graph)
        self._concrete = copy.copy(concrete)
        # Else the values of the first model stay as long as the trace.
        self._concrete.set_external_captures([])
        self._concrete.graph._function_captures.clear()
        self.fingerprint = copy.copy(fingerprint)
        self.fingerprint.variables, self.fingerprint.numbers = [], []
        self.kind, self.spec = kind, spec
        self.flaw: str | None = None
        self.noise: dict[str, float] = {}
        self.uncompiled: Trace | None = None

    def lend(self, variables: list[tf.Variable]) -> Callable[[Any], Any]:
        """Returns the function with other variables instead of those it captured."""
        lent = copy.copy(self._concrete)
        lent.set_external_captures(
            [variables[c].handle if isinstance(c, int) else c for c in self._captured]
        )
        return _runs(lent, variables, self.spec)


class TracePool:
    """The traces that are kept; see `keras_tapefit.training.runtime.TraceSource`.

    Args:
        num_kinds: of how many kinds of models; the one that was used longest ago is let
            go first.
    """

    def __init__(self, num_kinds: int) -> None:
        self.num_kinds = num_kinds
        self.history: list[str] = []
        self._traces: list[Trace] = []

    def clear(self) -> None:
        """Lets go of all traces."""
        self._traces.clear()

    def function(
        self, model: Any, kind: str, key: Any, make: Callable[[], Callable[[Any], Any]]
    ) -> Callable[[Any], Any]:
        return _Execution(self, model, kind, make)

    def keep(self, trace: Trace) -> None:
        """Adds a trace, and drops the oldest of too many."""
        self._traces.append(trace)
        alike = [kept for kept in self._traces if kept.kind == trace.kind]
        if len(alike) > self.num_kinds:
            self._traces.remove(alike[0])

    def find(self, fingerprint: Fingerprint, kind: str, spec: Any) -> tuple[Trace | None, str]:
        """Returns a trace for a model like this, or why there is none."""
        why = ""
        for trace in reversed(self._traces):
            if trace.kind != kind:
                continue
            if trace.spec != spec:
                why = why or "the batches have other shapes"
                continue
            difference = fingerprint.difference(trace.fingerprint)
            if not difference:
                self._traces.remove(trace)
                self._traces.append(trace)
                return trace, ""
            why = why or difference
        return None, why

    def note(self, kind: str, entry: str, unlike: bool = False) -> None:
        """Adds an entry to the history; of evaluations what the check found only."""
        if kind == "train":
            self.history.append(entry)
        elif unlike:
            self.history.append(f"evaluation {entry}")


class _Execution:
    """The function of an iterator for an execution of one model, found at its first call.

    Args:
        pool: where to look for a trace.
        model: the model, which holds this.
        kind: `"train"` or `"test"`.
        make: makes such a function afresh.
    """

    def __init__(self, pool: TracePool, model: Any, kind: str, make: Callable[[], Any]) -> None:
        self._pool, self._model, self._kind, self._make = pool, model, kind, make
        self._own: Callable[[Any], Any] | None = None
        self._spec: Any = None
        self._found: Callable[[Any], Any] | None = None

    def __call__(self, iterator: Any) -> Any:
        spec = _spec_of(iterator)
        if self._found is not None and spec == self._spec:
            return self._found(iterator)
        if self._found is not None or spec is None:
            return self._afresh()(iterator)
        self._spec = spec
        try:
            fingerprint = Fingerprint(self._model)
        except Exception as reason:
            return self._alone(iterator, reason)
        trace, why = self._pool.find(fingerprint, self._kind, self._spec)
        if trace is None:
            return self._traced(iterator, fingerprint, f"traced: {why}" if why else "traced")
        if trace.flaw is not None:
            return self._alone(iterator, trace.flaw)
        return self._checked(iterator, trace, fingerprint)

    def _afresh(self) -> Callable[[Any], Any]:
        if self._own is None:
            self._own = self._make()
        return self._own

    def _alone(self, iterator: Any, reason: Any) -> Any:
        """Has the model keep its traces to itself."""
        if not isinstance(reason, str | Incomparable):
            reason = f"{type(reason).__name__}: {reason}"
        self._pool.note(self._kind, f"traced again: {reason}")
        self._found = self._afresh()
        return self._found(iterator)

    def _traced(self, iterator: Any, fingerprint: Fingerprint, entry: str) -> Any:
        """Traces the step, and keeps it for others where it has to do with the model only."""
        before = random_state()
        try:
            concrete = _trace(self._afresh(), iterator, fingerprint)
        except Exception as reason:
            # Where it is the user's, it is raised again.
            return self._alone(iterator, reason)
        self._found = _runs(concrete, fingerprint.variables, self._spec)
        try:
            if random_state() != before:
                raise Incomparable("numbers are drawn with NumPy or `random` while it is traced")
            changed = Fingerprint(self._model).difference(fingerprint)
            if changed:
                raise Incomparable(f"a call of the model changes it, {changed}")
            trace = Trace(concrete, fingerprint, self._kind, self._spec)
            if self._model.jit_compile:
                trace.uncompiled = self._uncompiled(iterator, fingerprint)
            self._pool.keep(trace)
        except Exception as reason:
            entry = f"{entry.partition(':')[0]} again: {reason}"
        self._pool.note(self._kind, entry)
        return self._found(iterator)

    def _uncompiled(self, iterator: Any, fingerprint: Fingerprint) -> Trace:
        model = self._model
        model.jit_compile, before = False, model.jit_compile
        try:
            concrete = _trace(self._make(), iterator, fingerprint)
        finally:
            model.jit_compile = before
        return Trace(concrete, fingerprint, self._kind, self._spec)

    def _checked(self, iterator: Any, trace: Trace, fingerprint: Fingerprint) -> Any:
        """Makes the first execution by a trace of an earlier model, and checks it."""
        try:
            check = Check(self._model, fingerprint, trace.noise)
        except Exception as reason:
            return self._alone(iterator, reason)
        check.take_batches(iterator)
        checked = (trace.uncompiled or trace).lend(fingerprint.variables)
        difference = check.compare(checked, self._afresh())
        if difference is None:
            self._found = trace.lend(fingerprint.variables)
            self._pool.note(self._kind, "reused")
            return self._found(check.iterator())
        trace.flaw = f"a model like it was found to be another: {difference}"
        warnings.warn(
            f"The step that was traced for an earlier trial is not reused: {difference}. Either "
            "it reads something that is no part of the model, such as a setting in a module or "
            "a file, or it cannot be run eagerly. It is traced again for this trial and all "
            "further ones of the kind.",
            stacklevel=2,
        )
        self._pool.note(self._kind, f"traced again: {difference}", unlike=True)
        self._found = self._afresh()
        return self._found(check.iterator())


def _spec_of(iterator: Any) -> Any:
    """Returns whether batches are fetched, and what they are like; `None`: not known."""
    kinds = Fetched | tf.data.Iterator | tf.distribute.DistributedIterator
    spec = iterator.element_spec if isinstance(iterator, kinds) else None
    return None if spec is None else (isinstance(iterator, Fetched), spec)


def _trace(function: Any, iterator: Any, fingerprint: Fingerprint) -> Any:
    """Returns the concrete function in Keras's function of an iterator."""
    is_fetched = isinstance(iterator, Fetched)
    inner = getattr(function, "on_batch" if is_fetched else "on_iterator", None)
    if not isinstance(inner, tf.types.experimental.PolymorphicFunction):
        raise Incomparable("the step is not traced as one function")
    with _numbers_in(fingerprint):
        return inner.get_concrete_function(iterator.element_spec if is_fetched else iterator)


def _runs(concrete: Any, kept: Any, spec: Any) -> Callable[[Any], Any]:
    """Returns the function of an iterator that Keras makes of a traced one.

    Args:
        concrete: the traced function.
        kept: objects that must live as long as the function, which captures handles only.
        spec: of the iterator, see `_spec_of`.
    """
    is_fetched, _ = spec

    def function(iterator: Any, kept: Any = kept) -> Any:
        if is_fetched:
            return on_each(concrete, iterator)
        logs = concrete(iterator)
        if not logs.has_value():
            raise StopIteration
        return logs.get_value()

    return function


@contextmanager
def _numbers_in(fingerprint: Fingerprint) -> Iterator[None]:
    """Has schedules read their numbers from variables while they are traced."""
    given = [getattr(schedule, name) for schedule, name, _ in fingerprint.numbers]
    for schedule, name, number in fingerprint.numbers:
        setattr(schedule, name, number)
    try:
        yield
    finally:
        for (schedule, name, _), value in zip(fingerprint.numbers, given, strict=True):
            setattr(schedule, name, value)


def _check_operations(graph: Any) -> None:
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    for name in {node.op for node in nodes}:
        # An unknown one is a function of the library, whose operations are looked at too.
        known = op_def_registry.get(name)
        harmless = name in _HARMLESS or name.startswith(_HARMLESS_PREFIXES)
        if known is not None and known.is_stateful and not harmless:
            raise Incomparable(f"the step has the operation {name}, which keeps a state")
