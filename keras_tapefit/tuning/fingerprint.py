"""The comparison of two models, before one runs a step that was traced for the other.

A model is walked through, attribute by attribute, into a flat list of tokens: shapes,
dtypes, plain values, functions by their code and what they close over, classes by their
methods. What lives in variables is no part of it. What cannot be looked into is passed
over: the first step of the model shows it (see `keras_tapefit.tuning.check`).

Private names used here: attributes of Keras objects that say nothing about a step
(`_PASSED_OVER`, `_OUTSIDE`), `keras.Variable._value`, `KerasTensor._keras_history`,
`Model._distribute_strategy`, the classes `Function`, `Tracker` and `DropoutRNNCell` of
Keras, and where TensorFlow has its containers (`_WRAPPERS`). Checked with Keras 3.15.1 and
TensorFlow 2.21; `tests/tuning/test_reuse.py` fails when they change.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell
from keras.src.ops.function import Function
from keras.src.utils.tracking import Tracker

from keras_tapefit.backward.base import GradientMethod
from keras_tapefit.hooks import Freezing, GradientHook, GradualUnfreezing
from keras_tapefit.training.runtime import Runtime, runtime_of

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_SEQUENCES: tuple[Any, ...] = (list, tuple, deque, set, frozenset)
_SCALARS: tuple[Any, ...] = (int, float, complex, str, bytes)
_BY_REPR = (tf.DType, tf.TensorShape, np.dtype, np.generic, slice, range)
# Packages whose classes and functions no search changes, and those whose objects are
# not looked into. TensorFlow makes containers of its own of those assigned to a layer.
_KNOWN = {"keras", "keras_tapefit", "tensorflow", "numpy", "keras_tuner", "optree", "ml_dtypes"}
_KNOWN |= set(sys.stdlib_module_names) - {"__main__"}
_OPAQUE = {"tensorflow", "keras_tuner", "_thread", "threading", "_weakref", "weakref", "optree"}
_WRAPPERS = "tensorflow.python.trackable.data_structures"
# What is asked of an object instead of its attributes.
_ASKED: dict[Any, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    types.BuiltinFunctionType: ("__qualname__", "__self__"),
    types.MethodWrapperType: ("__qualname__", "__self__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset"),
    functools.cached_property: ("func",),
    functools.partial: ("func", "args", "keywords"),
    tf.types.experimental.PolymorphicFunction: ("python_function",),
    enum.Enum: ("__class__", "name"),
    np.random.Generator: ("bit_generator",),
    np.random.BitGenerator: ("state",),
    keras.random.SeedGenerator: ("state",),
    keras.KerasTensor: ("shape", "dtype", "_keras_history"),
}
# Attributes that say nothing about a step: of what, and which.
_PASSED_OVER: dict[Any, frozenset[str]] = {
    kind: frozenset(names.split())
    for kind, names in {
        type: "__dict__ __weakref__ __doc__ __module__ __annotations__ __qualname__",
        Function: "_nodes",
        keras.optimizers.Optimizer: "_trainable_variables_indices _exclude_from_weight_decay_cache",
        keras.Model: "train_function test_function predict_function history stop_training "
        "stop_evaluating stop_predicting _compile_config _compiled_trainable_state "
        "_eval_epoch_iterator _initial_epoch _tapefit_runtime _tapefit_state",
        keras.Layer: "_called _auto_config _build_shapes_dict _inbound_nodes _outbound_nodes "
        "_losses _tracked is_awq_calibrated is_gptq_calibrated",
        DropoutRNNCell: "_dropout_mask _recurrent_dropout_mask",
        tf.__internal__.tracking.AutoTrackable: "_self_unconditional_checkpoint_dependencies "
        "_self_unconditional_dependency_names _self_unconditional_deferred_dependencies "
        "_self_name_based_restores _self_saveable_object_factories _self_update_uid "
        "_self_setattr_tracking",
    }.items()
}
# Those of our own and Keras's classes that make state or act outside of steps. A subclass
# may read them in a step.
_OUTSIDE: list[tuple[Any, set[str]]] = [
    (keras.Layer, {"seed"}),
    (keras.Initializer, {"seed", "_init_seed"}),
    (GradientHook, {"seed", "_structure"}),
    (Freezing, {"epochs", "steps", "uses_step_count", "_last_chosen"}),
    (GradualUnfreezing, {"every", "_last_chosen"}),
]
_NUMBERS_OF_SCHEDULE = ("initial_learning_rate", "end_learning_rate", "warmup_target")
_MAX_TOKENS = 300_000
Children = list[tuple[str, Any]]


class Incomparable(Exception):
    """A model that shares no trace; the message says why."""


class Fingerprint:
    """The tokens of a compiled model whose state is made, and its variables.

    Args:
        model: a `TapeModel`.

    Attributes:
        tokens: two models with equal ones are taken to have the same step.
        variables: all that the walk came across, as `tf.Variable`s, in its order.
        names: of the variables.
        numbers: of learning rate schedules: a schedule, an attribute, and a variable for
            it, which is among `variables`.

    Raises:
        Incomparable: when the model shares no trace.
    """

    def __init__(self, model: Any) -> None:
        self.tokens: list[Any] = []
        self.variables: list[tf.Variable] = []
        self.names: list[str] = []
        self.numbers: list[tuple[Any, str, tf.Variable]] = []
        self._paths: list[Any] = []
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []
        # Not by recursion: there may be long chains of objects.
        todo: list[Any] = [((None, name), part) for name, part in reversed(_parts(model).items())]
        while todo:
            path, value = todo.pop()
            token, children = self._visit(value)
            self.tokens.append(token)
            self._paths.append(path)
            if len(self.tokens) > _MAX_TOKENS:
                raise Incomparable(f"there is more to {_text(path)} than can be compared")
            todo += [((path, step), child) for step, child in reversed(children)]
        # A number that is the address of something is no more than its place here.
        seen = self._seen
        self.tokens = [
            ("id", seen[t[1]]) if t[0] is int and t[1] in seen else t for t in self.tokens
        ]
        self._kept.clear()

    def difference(self, other: Fingerprint) -> str:
        """Returns where the first difference from another one is, `""` where there is none."""
        for mine, theirs, path in zip(self.tokens, other.tokens, self._paths, strict=False):
            if mine != theirs:
                one, other = (t[1:] if mine[-1] == theirs[-1] else t[-1] for t in (mine, theirs))
                return f"{_text(path)}: {one!r:.60} is not {other!r:.60}"
        return "" if len(self.tokens) == len(other.tokens) else "one of them has more parts"

    def _visit(self, value: Any) -> tuple[tuple[Any, ...], Children]:
        """Returns the token of a value, and what to visit next."""
        kind = type(value)
        if kind in _PLAIN:
            return (kind, repr(value) if kind in (float, complex) else value), []
        if issubclass(kind, types.ModuleType):
            return ("module", value.__name__), []
        if issubclass(kind, _BY_REPR):
            return (kind.__name__, repr(value)), []
        if kind.__module__ == _WRAPPERS:
            value = list(value) if isinstance(value, list) else value.__wrapped__
            kind = type(value)
        if kind is not tuple:
            if id(value) in self._seen:
                return ("seen", self._seen[id(value)]), []
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
        if issubclass(kind, keras.Variable | tf.Variable):
            return self._variable(value)
        if issubclass(kind, types.FunctionType):
            return self._function(value)
        if issubclass(kind, type):
            known = _is_known(value)
            members = [] if known else _without(type, sorted(vars(value).items()))
            bases = [] if known else [("<class>", kind), ("<bases>", value.__bases__)]
            return ("class", value.__module__, value.__qualname__), [*bases, *members]
        for asked, names in _ASKED.items():
            if issubclass(kind, asked):
                return (asked.__name__,), [(f".{n}", getattr(value, n)) for n in names]
        if issubclass(kind, tf.Tensor):
            value = np.asarray(value.numpy() if hasattr(value, "numpy") else str(value.shape))
        return self._object(value)

    def _variable(self, variable: Any) -> Any:
        raw = variable if isinstance(variable, tf.Variable) else variable._value
        name = getattr(variable, "path", variable.name)
        if not isinstance(raw, tf.Variable) or not hasattr(raw, "handle"):
            raise Incomparable(f"the variable {name!r} has no value, or several")
        self._seen.setdefault(id(raw), len(self._seen))
        self._add_variable(raw, name)
        dtype = keras.backend.standardize_dtype(variable.dtype)
        more = [(f".{n}", getattr(variable, n, None)) for n in ("constraint", "regularizer")]
        return ("variable", (name, tuple(variable.shape), dtype, variable.trainable)), more

    def _add_variable(self, variable: tf.Variable, name: str) -> None:
        self.variables.append(variable)
        self.names.append(name)

    def _function(self, function: Any) -> Any:
        code, around = function.__code__, function.__globals__
        children: Children = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                children.append((f"<{name}>", cell.cell_contents))
            except ValueError:
                children.append((f"<{name}>", "not set"))
        for name in ("__defaults__", "__kwdefaults__", "__dict__"):
            children.append((f".{name}", getattr(function, name)))
        if not _is_known_module(around.get("__name__")):
            names = _names(code)
            for name in sorted(names & around.keys()):
                value = around[name]
                children.append((f"<global {name}>", value))
                if isinstance(value, types.ModuleType) and not _is_installed(value):
                    asked = sorted(names & vars(value).keys())
                    children += [(f"<{name}>.{n}", vars(value)[n]) for n in asked]
        return ("function", code), children

    def _object(self, value: Any) -> Any:
        """Visits a value of any class, by its items, its class and its attributes."""
        cls = type(value)
        items: Children = []
        content: Any = None
        if isinstance(value, dict):
            items = [(f"[{k!r:.40}]", (k, v)) for k, v in dict.items(value)]
        elif isinstance(value, np.ndarray):
            plain = np.asarray(value)
            digest = None if plain.dtype.hasobject else hashlib.sha256(plain.tobytes()).hexdigest()
            content = plain.dtype.str, plain.shape, digest
        for base in _SEQUENCES:
            if isinstance(value, base):
                items = [(f"[{i}]", item) for i, item in enumerate(base.__iter__(value))]
        if isinstance(value, set | frozenset):
            items.sort(key=lambda item: repr(item[1]) if type(item[1]) in _PLAIN else "")
            items = [("{}", item) for _, item in items]
        for base in _SCALARS:
            content = base.__repr__(value) if isinstance(value, base) else content
        token = ("object", cls.__module__, cls.__qualname__, len(items), content)
        if _is_known(cls):
            contained = isinstance(value, dict | list | tuple | set | frozenset | np.ndarray)
            if contained or _package(cls) in _OPAQUE or isinstance(value, Runtime | Tracker):
                return token, items
        else:
            items.append(("<class>", cls))
        return token, [*items, *sorted(self._attributes(value).items())]

    def _attributes(self, value: Any) -> dict[str, Any]:
        """Returns the attributes to compare."""
        found = dict(_stored(value))
        for kind in _PASSED_OVER:
            if isinstance(value, kind):
                found = dict(_without(kind, found.items()))
        live: set[str] = set()
        if isinstance(value, GradientHook):
            live |= value._number_variables.keys()
        if _is_known(type(value)):
            if isinstance(value, GradientMethod):
                live |= value._live.keys()
            if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
                for name in _NUMBERS_OF_SCHEDULE:
                    if type(found.get(name)) is float:
                        number = tf.Variable(found[name], dtype=keras.config.floatx())
                        self.numbers.append((value, name, number))
                        self._add_variable(number, f"{type(value).__name__}.{name}")
                        live.add(name)
            for kind, names in _OUTSIDE:
                live |= names if isinstance(value, kind) else set()
        return {f".{name}": item for name, item in found.items() if name not in live}


def random_state() -> Any:
    """Returns the state of Python's and NumPy's own random numbers."""
    state: Any = np.random.get_state(legacy=False)
    return random.getstate(), state["state"]["key"].tobytes(), state["state"]["pos"]


def _parts(model: Any) -> dict[str, Any]:
    """Returns what the step of a model is made of."""
    runtime = runtime_of(model)
    if getattr(model, "_distribute_strategy", None) is not None or tf.distribute.has_strategy():
        raise Incomparable("the model is trained under a `tf.distribute` strategy")
    if model.run_eagerly or tf.config.functions_run_eagerly():
        raise Incomparable("with `run_eagerly=True` nothing is traced")
    config = keras.config
    return {
        type(model).__name__: model,
        "gradient_hooks": list(runtime.hooks),
        "backward": runtime.backward,
        "compiled": [runtime.micro_batches, runtime.jit_compile],
        "state": _own_state(runtime),
        "settings": [config.floatx(), config.image_data_format(), config.epsilon()],
        "policy": [config.dtype_policy().name, tf.config.optimizer.get_jit() or ""],
    }


def _own_state(runtime: Any) -> dict[str, Any]:
    """Returns what our step keeps besides what Keras knows of, by stable names."""
    records = runtime.recording.records
    return {
        "windows": [window.num_steps for _, window in runtime.windows.named()],
        "records": records and [records.request, records.size],
        "variables": runtime.state.variables(),
    }


def _stored(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of an object, those in slots too."""
    # Not by `getattr`, which a class may have made its own.
    try:
        yield from object.__getattribute__(value, "__dict__").items()
    except AttributeError:
        pass
    for cls in type(value).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType) and cls.__module__ != "builtins":
                try:
                    yield name, member.__get__(value)
                except AttributeError:
                    continue


def _without(kind: Any, attributes: Any) -> Children:
    return [(name, value) for name, value in attributes if name not in _PASSED_OVER[kind]]


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Returns the names that a function, or one inside it, may ask for."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _is_known_module(name: Any) -> bool:
    return str(name).partition(".")[0] in _KNOWN


def _package(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


def _is_known(cls: type) -> bool:
    return _package(cls) in _KNOWN


def _is_installed(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or "site-packages" in file or _is_known_module(module.__name__)


def _text(path: Any) -> str:
    steps: list[str] = []
    while path is not None:
        path, step = path
        steps.insert(0, step)
    return "".join(steps)
