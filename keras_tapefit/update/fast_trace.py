"""An optimizer's `update_step`, traced once for variables that are alike.

Keras traces the update of each variable anew, some 65 operations with Adam, which for a
deep network is most of the time before the first step. Here it is traced once for each
kind of variable (its shape and dtype, those of its slots and of its gradient) into a
function, which for the other variables of the kind is called with their handles in the
place of those that the trace captured. No optimizer's mathematics is written again, so
it works for any optimizer, one of the user's own too. Where it cannot be shown that two
variables are treated alike, Keras's own tracing takes over.

`optimizer.trace_update_once = False` turns it off for an optimizer.

Private names used here: `TFOptimizer._distributed_tf_update_step` (that it calls
`self.update_step(gradient, variable, learning_rate)` with a `tf.Variable`),
`BaseOptimizer._get_variable_index`, `_trainable_variables`, `_variables`, and of
TensorFlow `ConcreteFunction._call_flat`. Checked with Keras 3.15.1 and TensorFlow 2.21;
`tests/update/test_fast_trace.py` fails when they change.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# What an optimizer may ask a variable for without learning which one it is.
_ALIKE = frozenset(
    "shape dtype assign assign_add assign_sub scatter_add scatter_sub scatter_update "
    "value read_value ndim numpy __class__ __array_priority__ __dict__ "
    "_should_act_as_resource_variable".split()
)
# What an update may be made of beside operations without side effects.
_READS = frozenset({"ReadVariableOp", "ResourceGather"})
_WRITES = frozenset(
    {"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"}
    | {f"ResourceScatter{kind}" for kind in ("Add", "Sub", "Update")}
)
# Attributes that have to do with all variables and not with one after the other.
_NOT_BY_INDEX = ("_variables", "_trainable_variables", "_trainable_variables_indices")


class _Differs(Exception):
    """The update of a variable may differ from that of another one like it."""


class _Index(int):
    """The place of a variable, good for looking into lists and for nothing else."""

    def _refuse(self, *_: Any) -> Any:
        raise _Differs

    __hash__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse  # type: ignore[assignment]
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = _refuse  # type: ignore[assignment]
    __bool__ = __str__ = __repr__ = __float__ = __format__ = _refuse  # type: ignore[assignment]
    __truediv__ = __floordiv__ = __pow__ = __neg__ = __and__ = __or__ = _refuse  # type: ignore[assignment]


@contextlib.contextmanager
def traced_once(optimizers: Sequence[Any]) -> Iterator[None]:
    """Has optimizers trace the updates of variables that are alike once.

    It stays aside in eager mode, under strategies, and for an optimizer that is not
    built.

    Args:
        optimizers: those that update weights, wrappers opened.
    """
    if tf.executing_eagerly() or tf.distribute.has_strategy():
        yield
        return
    patched = [
        optimizer
        for optimizer in optimizers
        if optimizer.built
        and getattr(optimizer, "trace_update_once", True)
        and "update_step" not in optimizer.__dict__
    ]
    for optimizer in patched:
        # Past Keras's attribute tracking.
        optimizer.__dict__["update_step"] = _UpdateStep(optimizer)
    try:
        yield
    finally:
        for optimizer in patched:
            optimizer.__dict__.pop("update_step", None)


class _UpdateStep:
    """Stands in for the `update_step` of an optimizer during one `apply`."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._original = optimizer.update_step
        self._index = optimizer._get_variable_index
        self._by_index = _lists_by_index(optimizer)
        self._functions: dict[Any, _Function] = {}
        self._counts: dict[Any, int] = {}
        self._gave_up = self._by_index is None

    def __call__(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if not self._gave_up and _is_plain(gradient, variable):
            try:
                self._call(gradient, variable, learning_rate)
                return
            except _Differs:
                self._gave_up = True
        self._original(gradient, variable, learning_rate)

    def _call(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._index(variable)
        row = [values[index] for values in self._by_index or ()]
        # A branch is a graph of its own, and so is its function.
        kind = (
            id(tf.compat.v1.get_default_graph()),
            id(learning_rate),
            _kind(variable),
            (gradient.dtype, tuple(gradient.shape)),
            tuple(_kind(value) for value in row),
        )
        if kind not in self._functions:
            self._functions[kind] = _Function(
                self._optimizer, self._original, index, row, gradient, variable, learning_rate
            )
        self._functions[kind](gradient, variable, row)


class _Function:
    """The update of one kind of variable as a function of handles.

    Raises:
        _Differs: when it may be another one for another variable of the kind.
    """

    def __init__(
        self,
        optimizer: Any,
        update_step: Any,
        index: int,
        row: list[Any],
        gradient: tf.Tensor,
        variable: Any,
        learning_rate: Any,
    ) -> None:
        self._kept = tf.compat.v1.get_default_graph(), learning_rate
        before = dict(vars(optimizer))

        def body(gradient: tf.Tensor) -> None:
            update_step(gradient, _stand_in(variable), learning_rate)

        optimizer.__dict__["_get_variable_index"] = lambda _: _Index(index)
        try:
            spec = tf.TensorSpec(gradient.shape, gradient.dtype)
            function = tf.function(body, autograph=False)
            self._function = function.get_concrete_function(spec)
        except Exception as error:
            # Keras's own tracing shows what is wrong, if anything is.
            raise _Differs from error
        finally:
            vars(optimizer).pop("_get_variable_index", None)
            if "_get_variable_index" in before:
                optimizer.__dict__["_get_variable_index"] = before["_get_variable_index"]
            changed = _restore(optimizer, before)
        if changed:
            raise _Differs
        shared = [learning_rate, *before.values()]
        self._places = _places(self._function, variable, row, shared)

    def __call__(self, gradient: tf.Tensor, variable: Any, row: list[Any]) -> None:
        handles: list[Any] = [_handle(variable), *map(_handle, row)]
        captured = self._function.captured_inputs
        inputs = [
            given if place is None else handles[place]
            for given, place in zip(captured, self._places, strict=True)
        ]
        self._function._call_flat([gradient], inputs)


def _places(
    function: Any, variable: Any, row: list[Any], shared: list[Any]
) -> list[int | None]:
    """Returns for each capture which of the variable and its slots it is.

    `None`: it is the same for all variables.
    """
    own = {id(_handle(value)): i for i, value in enumerate([variable, *row]) if _is_variable(value)}
    common = {id(_handle(value)) for value in shared if _is_variable(value)}
    common |= {id(value) for value in shared if tf.is_tensor(value)}
    places: list[int | None] = []
    inner_common = set()
    for outer, inner in zip(
        function.captured_inputs, function.inputs[-len(function.captured_inputs) :], strict=True
    ) if function.captured_inputs else ():
        if id(outer) in own and id(outer) not in common:
            places.append(own[id(outer)])
        elif id(outer) in common and id(outer) not in own:
            places.append(None)
            inner_common.add(inner.name)
        else:
            raise _Differs
    for op in function.graph.get_operations():
        if op.type in _WRITES and op.inputs[0].name not in inner_common:
            continue
        if op.type in _READS or op.type == "Placeholder":
            continue
        if op.op_def is None or op.op_def.is_stateful or _calls_functions(op):
            raise _Differs
    return places


def _calls_functions(op: Any) -> bool:
    return any(attribute.type in ("func", "list(func)") for attribute in op.op_def.attr)


def _lists_by_index(optimizer: Any) -> list[Any] | None:
    """Returns what an optimizer keeps a list of, one element a variable.

    `None`: it may keep some where they cannot be seen.
    """
    length = len(optimizer._trainable_variables_indices)
    found = []
    for name, value in vars(optimizer).items():
        if name in _NOT_BY_INDEX or name.startswith(("_self_", "_tapefit_", "_tracker")):
            continue
        if isinstance(value, dict):
            value = list(value.values())
        elif not isinstance(value, list | tuple | np.ndarray) or (
            isinstance(value, np.ndarray) and value.ndim == 0
        ):
            continue
        elif len(value) == length:
            found.append(value)
        if any(isinstance(v, list | tuple | dict | np.ndarray) for v in value):
            return None
    return found


def _kind(value: Any) -> Any:
    if _is_variable(value):
        return "variable", tuple(value.shape), keras.backend.standardize_dtype(value.dtype)
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    return id(value)


def _is_variable(value: Any) -> bool:
    return isinstance(value, keras.Variable | tf.Variable)


def _handle(value: Any) -> Any:
    value = value.value if isinstance(value, keras.Variable) else value
    return value.handle if isinstance(value, tf.Variable) else None


def _is_plain(gradient: Any, variable: Any) -> bool:
    return (
        isinstance(gradient, tf.Tensor)
        and gradient.shape.is_fully_defined()
        and isinstance(variable, tf.Variable)
        and hasattr(variable, "handle")
    )


def _restore(optimizer: Any, before: dict[str, Any]) -> bool:
    """Undoes changed attributes; returns whether there were any."""
    after = vars(optimizer)
    if after.keys() == before.keys() and all(after[k] is v for k, v in before.items()):
        return False
    after.clear()
    after.update(before)
    return True


def _stand_in(variable: Any) -> Any:
    """Returns a variable with the same handle that does not tell who it is."""
    stand_in = object.__new__(_anonymous(type(variable)))
    object.__getattribute__(stand_in, "__dict__").update(vars(variable))
    return stand_in


@functools.cache
def _anonymous(cls: type) -> type:
    def get(self: Any, name: str) -> Any:
        if name not in _ALIKE:
            asking = sys._getframe(1).f_globals.get("__name__", "")
            if not asking.startswith("tensorflow."):
                raise _Differs(name)
        return cls.__getattribute__(self, name)

    return type(cls.__name__, (cls,), {"__getattribute__": get})
