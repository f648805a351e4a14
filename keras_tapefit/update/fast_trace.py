"""An optimizer's `update_step`, traced once for variables that are alike.

Keras traces the update of each variable again, some 65 operations with Adam, which for a
deep network is most of the time before the first step. Here it is traced once for each
kind of variable (its shape and dtype, those of its slots and of its gradient), and the
operations are then copied for the other variables of the kind, with their own
handles instead of those that the trace captured; small variables share them where they
can (`copies.py`). All copies of one `apply` are imported at once: each import looks at every
node of the graph. What depends on no variable, such as Adam's powers of beta, is in the
graph once instead of once a variable. No optimizer's mathematics is written again, so it
works for any optimizer, one of the user's own too. Where it cannot be shown that two
variables are treated alike, Keras's own tracing takes over.

`optimizer.trace_update_once = False` turns it off for an optimizer.

Private names used here: `TFOptimizer._distributed_tf_update_step` (that it calls
`self.update_step(gradient, variable, learning_rate)` with a `tf.Variable`, for all
variables of one `apply`),
`BaseOptimizer._get_variable_index`, `_trainable_variables_indices`,
`_trainable_variables` and `_variables`. Checked with Keras 3.15.1 and TensorFlow 2.21;
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

from keras_tapefit.update.copies import Copies, Differs, Template, in_graph, maker

# What an optimizer may ask a variable for without learning which one it is.
_ALIKE = frozenset(
    "shape dtype assign assign_add assign_sub scatter_add scatter_sub scatter_update "
    "value read_value ndim numpy __class__ __array_priority__ __dict__ "
    "_should_act_as_resource_variable".split()
)
# Attributes that have to do with all variables and not with one after the other.
_NOT_BY_INDEX = ("_variables", "_trainable_variables", "_trainable_variables_indices")


class _Index(int):
    """The place of a variable, good for looking into lists and for nothing else."""

    def _refuse(self, *_: Any) -> Any:
        raise Differs

    __hash__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = _refuse
    __bool__ = __int__ = __str__ = __repr__ = __float__ = __format__ = _refuse
    __truediv__ = __floordiv__ = __pow__ = __neg__ = __and__ = __or__ = _refuse


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
        update_step = _UpdateStep(optimizer)
        optimizer.__dict__["update_step"] = update_step
        optimizer.__dict__["_distributed_tf_update_step"] = update_step.all_steps
    try:
        yield
    finally:
        for optimizer in patched:
            optimizer.__dict__.pop("update_step", None)
            optimizer.__dict__.pop("_distributed_tf_update_step", None)


class _UpdateStep:
    """Stands in for the `update_step` of an optimizer during one `apply`."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._original = optimizer.update_step
        self._all_steps = optimizer._distributed_tf_update_step
        self._copies: Copies | None = None
        self._index = optimizer._get_variable_index
        self._by_index = _lists_by_index(optimizer)
        self._functions: dict[Any, _Function] = {}
        self._templates: dict[Any, Template] = {}
        self._gave_up = self._by_index is None

    def all_steps(self, *args: Any, **kwargs: Any) -> None:
        """Updates all variables, as Keras does, and makes the copies at the end."""
        self._copies = Copies()
        try:
            self._all_steps(*args, **kwargs)
            self._copies.make()
        finally:
            self._copies = None

    def __call__(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if not self._gave_up and _is_plain(gradient, variable):
            try:
                self._call(gradient, variable, learning_rate)
                return
            except Differs:
                self._gave_up = True
        self._original(gradient, variable, learning_rate)

    def _call(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._index(variable)
        row = [values[index] for values in self._by_index or ()]
        # A branch has its own graph, and so does its function.
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
            self._functions[kind].share(self._templates)
        copies = self._copies or Copies()
        self._functions[kind](gradient, variable, row, copies)
        if self._copies is None:
            copies.make()


class _Function:
    """The update of one kind of variable, to be copied for each.

    Raises:
        Differs: when it may be another one for another variable of the kind.
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
        # Kept, so that their ids stay taken.
        self._kept = tf.compat.v1.get_default_graph(), learning_rate
        before = dict(vars(optimizer))

        def body(gradient: tf.Tensor) -> None:
            update_step(gradient, _stand_in(variable), learning_rate)

        optimizer.__dict__["_get_variable_index"] = lambda _: _Index(index)
        try:
            spec = tf.TensorSpec(gradient.shape, gradient.dtype)
            function = tf.function(body, autograph=False).get_concrete_function(spec)
        except Exception as error:
            # Keras's own tracing shows what is wrong, if anything is.
            raise Differs from error
        finally:
            vars(optimizer).pop("_get_variable_index", None)
            if "_get_variable_index" in before:
                optimizer.__dict__["_get_variable_index"] = before["_get_variable_index"]
            changed = _restore(optimizer, before)
        if changed:
            raise Differs
        shared = [learning_rate, *before.values()]
        own, common = _captures(function, [variable, *row], shared)
        self._gradient = function.inputs[0].name
        self._own = {self._gradient: 0, **own}
        self._template = Template(function.graph, list(self._own), common)
        self._can_be_shared = self._template.can_be_shared(gradient.shape)

    def share(self, templates: dict[Any, Template]) -> None:
        """Takes the template of another kind of variable where it is the same."""
        places = tuple(sorted(self._own.items()))
        key = id(self._kept[0]), places, self._template.key()
        self._template = templates.setdefault(key, self._template)

    def __call__(self, gradient: tf.Tensor, variable: Any, row: list[Any], copies: Copies) -> None:
        values = [gradient, _handle(variable), *map(_handle, row)]
        tensors = {name: in_graph(values[place]) for name, place in self._own.items()}
        if self._template.may_merge(self._gradient, maker(tensors[self._gradient])):
            copies.keep_apart()
        device = tuple(h.device for h in values[1:] if h is not None)
        copies.add(self._template, tensors, gradient.shape, device if self._can_be_shared else None)


def _captures(
    function: Any, own: list[Any], shared: list[Any]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Tells apart what a trace captured.

    Returns:
        By the name of the tensor in the trace, the places (from 1) of what is the
        variable's own, and the tensors that are the same for all variables.
    """
    places = {id(_handle(v)): i for i, v in enumerate(own, 1) if _is_variable(v)}
    common = {id(_handle(v)) for v in shared if _is_variable(v)}
    common |= {id(v) for v in shared if tf.is_tensor(v)}
    outside = function.captured_inputs
    inside = function.inputs[len(function.inputs) - len(outside) :]
    own_names, common_tensors = {}, {}
    for outer, inner in zip(outside, inside, strict=True):
        if (id(outer) in places) == (id(outer) in common):
            raise Differs
        if id(outer) in places:
            own_names[inner.name] = places[id(outer)]
        else:
            common_tensors[inner.name] = outer
    return own_names, common_tensors


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
    # What several variables write to is another thing for each of them.
    slots = [id(_handle(v)) for values in found for v in values if _is_variable(v)]
    return found if len(set(slots)) == len(slots) else None


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
    kind: Any = type(variable)
    stand_in: Any = object.__new__(_anonymous(kind))
    object.__getattribute__(stand_in, "__dict__").update(vars(variable))
    return stand_in


@functools.cache
def _anonymous(cls: Any) -> type:
    def get(self: Any, name: str) -> Any:
        if name not in _ALIKE:
            asking = sys._getframe(1).f_globals.get("__name__", "")
            if not asking.startswith("tensorflow."):
                raise Differs(name)
        return cls.__getattribute__(self, name)

    return type(cls.__name__, (cls,), {"__getattribute__": get})
