"""Traced functions that go from one model to the next like it.

A trace is tied to the `tf.Variable`s that it reads and writes. So it is these that move:
a model that is like an earlier one exchanges its own for those of the trace, with its
values put in, and finds its first step traced already. Every model stays what it was, one
with weights of its own.

Private names used here: `keras.Variable._value`, `tf.Variable._unique_id`, of TensorFlow's
functions `_list_all_concrete_functions`, and `op_def_registry`. Checked with Keras 3.15.1 and
TensorFlow 2.21; `tests/tuning/test_reuse.py` fails when they change.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.tuning.fingerprint import Fingerprint, Incomparable, Slot

# What a trace may do beside computing: use variables and take batches. Random numbers of
# Keras are stateless operations on a variable.
_HARMLESS = (
    "ReadVariableOp Assert PrintV2 NoOp Placeholder PartitionedCall StatefulPartitionedCall "
    "If While Case VarIsInitializedOp VariableShape IteratorGetNext IteratorGetNextAsOptional "
    "OptionalFromValue OptionalGetValue OptionalHasValue OptionalNone CudnnRNN CudnnRNNBackprop"
).split()
_HARMLESS_PREFIXES = ("Assign", "ResourceGather", "ResourceScatter", "ResourceApply", "CudnnRNN")


class Storage:
    """The traces of one kind of model, and the variables that they are tied to.

    Args:
        model: the first of its kind, which uses them now.
        fingerprint: its fingerprint.
    """

    def __init__(self, model: Any, fingerprint: Fingerprint) -> None:
        self.tokens = fingerprint.tokens
        self.traces: dict[Any, Any] = {}
        self.flaw: str | None = None
        self._values = [slot.value for slot in fingerprint.slots]
        self._user = weakref.ref(model)
        self._slots: list[Slot] = fingerprint.slots
        reports = runtime_of(model)._reports
        self._entries = None if reports is None else reports._entries
        self._checked: set[Any] = set()

    @property
    def user(self) -> Any:
        """The model whose values the variables hold, or `None` where it is gone."""
        return self._user()

    def check(self) -> None:
        """Raises `Incomparable` where a trace has to do with more than the variables."""
        if self.flaw is None:
            handles = {id(value.handle) for value in self._values}
            for key, (function, _) in self.traces.items():
                if key not in self._checked:
                    self._checked.add(key)
                    self.flaw = self.flaw or _flaw(function, handles)
            if self.flaw is not None:
                self.traces.clear()
        if self.flaw is not None:
            raise Incomparable(self.flaw)

    def move_to(self, model: Any, fingerprint: Fingerprint) -> None:
        """Gives the variables to a model, with its values; the last user gets others.

        Args:
            model: the new user.
            fingerprint: its fingerprint, equal to that of the others.

        Raises:
            Incomparable: when models share variables.
        """
        last, shared = self.user, {id(value) for value in self._values}
        if any(id(slot.value) in shared for slot in fingerprint.slots):
            raise Incomparable("models share variables with each other")
        if last is not None and any(
            slot.value is not value for slot, value in zip(self._slots, self._values, strict=True)
        ):
            raise Incomparable("the variables of an earlier model were replaced")
        for new, old, value in zip(fingerprint.slots, self._slots, self._values, strict=True):
            own = new.value
            before = None if last is None else tf.identity(value)
            value.assign(own)
            new.value = value
            # Optimizers find the state of a variable by this.
            own._unique_id, value._unique_id = value._unique_id, own._unique_id
            if before is not None:
                own.assign(before)
                old.value = own
        for changed in (model, last):
            if changed is not None:
                runtime_of(changed).forget_traces()
        if self._entries is not None:
            if last is not None:
                runtime_of(last).reports._entries = dict(self._entries)
            runtime_of(model).reports._entries = self._entries
        self._user, self._slots = weakref.ref(model), fingerprint.slots


class TracePool:
    """The traces that are kept, of a bounded number of kinds.

    Args:
        num_kinds: how many; the one that was used longest ago is let go first.
    """

    def __init__(self, num_kinds: int) -> None:
        self.num_kinds = num_kinds
        self.history: list[str] = []
        self._storages: list[Storage] = []

    def __len__(self) -> int:
        return len(self._storages)

    def lend(self, model: Any) -> None:
        """Has a model look for traces here when its train function is made."""
        runtime_of(model).shared = Tenancy(self)

    def clear(self) -> None:
        """Lets go of all traces and of the models that they hold."""
        self._storages.clear()

    def storage_for(self, model: Any) -> Storage | None:
        """Returns the traces that a model may use from now on, if any."""
        runtime_of(model).make_reports()
        try:
            fingerprint = Fingerprint(model)
            fingerprint.forget_model()
            storage = self._find(fingerprint)
            if storage is not None:
                storage.check()
                storage.move_to(model, fingerprint)
                self.history.append("reused")
                return storage
        except Incomparable as reason:
            self.history.append(f"traced anew: {reason}")
            return None
        near = [s for s in self._storages if s.flaw is None]
        why = f": {fingerprint.difference(near[-1].tokens)}" if near else ""
        self.history.append(f"traced{why}")
        storage = Storage(model, fingerprint)
        self._storages.append(storage)
        del self._storages[: -self.num_kinds]
        return storage

    def _find(self, fingerprint: Fingerprint) -> Storage | None:
        for storage in self._storages:
            if storage.tokens == fingerprint.tokens:
                self._storages.remove(storage)
                self._storages.append(storage)
                return storage
        return None


class Tenancy:
    """The traces that one model uses; see `keras_tapefit.training.shared.SharedTraces`."""

    def __init__(self, pool: TracePool) -> None:
        self._pool = pool
        self._storage: Storage | None = None
        self._structure: Any = None
        self._settled: Any = None
        self._entry = -1

    def settle(self, model: Any) -> None:
        if self._settled is model.train_function:
            return
        self._settled = model.train_function
        self._structure = runtime_of(model).hooks.structure()
        self._storage = self._pool.storage_for(model)
        self._entry = len(self._pool.history) - 1

    def place(self, model: Any, kind: str, flags: Any, structure: Any, iterator: Any) -> Any:
        storage = self._storage
        if storage is not None and structure != self._structure:
            self._pool.history[self._entry] = "traced anew: hooks or records came after the build"
            return None
        spec = getattr(iterator, "element_spec", None)
        if (
            storage is None
            or storage.user is not model
            or storage.flaw is not None
            or spec is None
            or not isinstance(iterator, tf.data.Iterator)
        ):
            return None
        return storage.traces, (kind, flags, repr(spec))

    def is_user(self, model: Any) -> bool:
        return self._storage is not None and self._storage.user is model


def _flaw(function: Any, handles: set[int]) -> str | None:
    """Returns what ties a traced function to more than the variables, or `None`."""
    for traced in _functions_in(function, set()):
        for concrete in traced._list_all_concrete_functions():
            for captured in concrete.captured_inputs:
                if captured.dtype == tf.variant or (
                    captured.dtype == tf.resource and id(captured) not in handles
                ):
                    return "the step uses a variable or table that is no part of the model"
            graph = concrete.graph.as_graph_def()
            nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
            for name in {node.op for node in nodes}:
                if not _is_harmless(name):
                    return f"the step has the operation {name}, which keeps a state"
    return None


def _is_harmless(name: str) -> bool:
    definition = op_def_registry.get(name)
    if definition is None:
        # A function of the graph's own library, whose operations are looked at too.
        return True
    return not definition.is_stateful or name in _HARMLESS or name.startswith(_HARMLESS_PREFIXES)


def _functions_in(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yields the `tf.function`s that a function of Keras calls."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, tf.types.experimental.PolymorphicFunction):
        yield value
        return
    for cell in getattr(value, "__closure__", None) or ():
        if callable(cell.cell_contents) and not isinstance(cell.cell_contents, type):
            yield from _functions_in(cell.cell_contents, seen)
