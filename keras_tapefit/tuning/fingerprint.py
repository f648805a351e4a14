"""What two models are compared by before one runs what was traced for the other.

A model is walked through, attribute by attribute, into a flat list of tokens: shapes,
dtypes, plain values, functions by their code and what they close over, classes by their
methods. What lives in variables is no part of it. What cannot be looked into is passed
over: the first step of the model tells (see `keras_tapefit.tuning.check`).

Private names used here: attributes of Keras objects that say nothing about a step
(`_PASSED_OVER`). Checked with Keras 3.15.1; `tests/tuning/test_fingerprint.py` fails when
they change.
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
from keras.src.ops.function import Function
from keras.src.utils.tracking import Tracker

from keras_tapefit.backward.base import GradientMethod
from keras_tapefit.hooks import Freezing, GradientHook, GradualUnfreezing
from keras_tapefit.training.runtime import Runtime, runtime_of

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_BY_REPR = (tf.DType, tf.TensorShape, np.dtype, np.generic, slice, range, np.random.Generator)
# Packages whose classes and functions no search changes, and those whose objects are
# not looked into.
_KNOWN = {"keras", "keras_tapefit", "tensorflow", "numpy", "keras_tuner", "optree", "ml_dtypes"}
_KNOWN |= set(sys.stdlib_module_names) - {"__main__"}
_OPAQUE = {"tensorflow", "keras_tuner", "_thread", "threading", "_weakref", "weakref", "optree"}
_OF_CLASS = set("__dict__ __weakref__ __doc__ __module__ __annotations__ __qualname__".split())
# Attributes that say nothing about a step: of what, and which.
_PASSED_OVER: list[tuple[type, frozenset[str]]] = [
    (
        keras.Model,
        frozenset(
            "train_function test_function predict_function history stop_training "
            "stop_evaluating stop_predicting _compile_config _compiled_trainable_state "
            "_eval_epoch_iterator _initial_epoch _tapefit_runtime _tapefit_state".split()
        ),
    ),
    (keras.optimizers.Optimizer, frozenset(["_trainable_variables_indices"])),
    (
        keras.Layer,
        frozenset("_auto_config _build_shapes_dict _inbound_nodes _outbound_nodes _losses".split()),
    ),
    (
        tf.__internal__.tracking.AutoTrackable,
        frozenset(
            "_self_unconditional_checkpoint_dependencies _self_unconditional_dependency_names "
            "_self_unconditional_deferred_dependencies _self_name_based_restores "
            "_self_saveable_object_factories _self_update_uid _self_setattr_tracking".split()
        ),
    ),
]
_PASSED_OVER.append((Function, frozenset(["_nodes"])))
_NUMBERS_OF_SCHEDULE = ("initial_learning_rate", "end_learning_rate", "warmup_target")
# Where containers come from that TensorFlow makes of those assigned to a layer.
_WRAPPERS = "tensorflow.python.trackable.data_structures"
_MAX_TOKENS = 300_000
Path = tuple[Any, str]


class Incomparable(Exception):
    """A model that shares no trace; the message says why."""


class Fingerprint:
    """The tokens of a compiled model whose state is made, and its variables.

    Args:
        model: a `TapeModel`.

    Attributes:
        tokens: two models with equal ones are taken to have the same step.
        variables: all that the walk came across, in its order, and numbers of learning
            rate schedules, as `tf.Variable`s.
        names: of the variables.

    Raises:
        Incomparable: when the model shares no trace.
    """

    def __init__(self, model: Any) -> None:
        self.tokens: list[Any] = []
        self.variables: list[tf.Variable] = []
        self.names: list[str] = []
        # Numbers of schedules: a schedule, an attribute, and the variable for it.
        self.numbers: list[tuple[Any, str, tf.Variable]] = []
        self._paths: list[Any] = []
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []
        self._walk(_parts(model))
        # A number that is the address of something is no more than its place here.
        self.tokens = [
            ("id", self._seen[t[1]]) if t[0] is int and t[1] in self._seen else t
            for t in self.tokens
        ]
        self._kept.clear()

    def difference(self, other: Fingerprint) -> str:
        """Returns where the first difference from another one is, `""` where there is none."""
        for mine, theirs, path in zip(self.tokens, other.tokens, self._paths, strict=False):
            if mine != theirs:
                return f"{_text(path)}: {_shown(mine)} is not {_shown(theirs)}"
        return "" if len(self.tokens) == len(other.tokens) else "one of them has more parts"

    def _walk(self, parts: dict[str, Any]) -> None:
        todo = [((None, name), part) for name, part in reversed(parts.items())]
        while todo:
            path, value = todo.pop()
            token, children = self._visit(path, value)
            self.tokens.append(token)
            self._paths.append(path)
            if len(self.tokens) > _MAX_TOKENS:
                raise Incomparable(f"there is more to {_text(path)} than can be compared")
            todo += [((path, step), child) for step, child in reversed(children)]

    def _visit(self, path: Any, value: Any) -> tuple[Any, list[tuple[str, Any]]]:
        """Returns the token of a value, and what is to be visited next."""
        kind = type(value)
        if kind in _PLAIN:
            return (kind, repr(value) if kind in (float, complex) else value), []
        if isinstance(value, types.ModuleType):
            return ("module", value.__name__), []
        if issubclass(kind, _BY_REPR):
            state = value.bit_generator.state if kind is np.random.Generator else value
            return (kind.__name__, repr(state)), []
        if kind.__module__ == _WRAPPERS:
            value = list(value) if isinstance(value, list) else value.__wrapped__
            kind = type(value)
        if kind is tuple:
            return ("tuple", len(value)), _items(value)
        if id(value) in self._seen:
            return ("seen", self._seen[id(value)]), []
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        for cls, visit in _VISITS:
            if issubclass(kind, cls):
                return visit(self, path, value)
        return self._object(value)

    def _variable(self, path: Any, variable: Any) -> Any:
        raw = variable if isinstance(variable, tf.Variable) else variable._value
        if not isinstance(raw, tf.Variable) or not hasattr(raw, "handle"):
            raise Incomparable(f"the variable {_text(path)} has no value, or several")
        self._seen.setdefault(id(raw), len(self._seen))
        self.variables.append(raw)
        name = getattr(variable, "path", variable.name)
        self.names.append(name)
        dtype = keras.backend.standardize_dtype(variable.dtype)
        token = (name, tuple(variable.shape), dtype, variable.trainable)
        return ("variable", token), [
            (f".{n}", getattr(variable, n, None)) for n in ("constraint", "regularizer")
        ]

    def _class(self, path: Any, cls: Any) -> Any:
        token = ("class", cls.__module__, cls.__qualname__)
        if _is_known(cls):
            return token, []
        members = [(f".{n}", v) for n, v in sorted(vars(cls).items()) if n not in _OF_CLASS]
        return token, [(".__class__", type(cls)), (".__bases__", cls.__bases__), *members]

    def _function(self, path: Any, function: Any) -> Any:
        code = function.__code__
        children: list[tuple[str, Any]] = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                children.append((f"<{name}>", cell.cell_contents))
            except ValueError:
                children.append((f"<{name}>", "not set"))
        for name in ("__defaults__", "__kwdefaults__", "__dict__"):
            children.append((f".{name}", getattr(function, name)))
        around = function.__globals__
        if str(around.get("__name__")).partition(".")[0] not in _KNOWN:
            names = _names(code)
            for name in sorted(names & around.keys()):
                value = around[name]
                children.append((f"<global {name}>", value))
                if isinstance(value, types.ModuleType) and not _is_installed(value):
                    asked = sorted(names & vars(value).keys())
                    children += [(f"<{name}>.{n}", vars(value)[n]) for n in asked]
        return ("function", code), children

    def _mapping(self, path: Any, value: Any) -> Any:
        items = [(f"[{key!r:.40}]", (key, item)) for key, item in dict.items(value)]
        return ("dict", len(items)), [*items, *self._beyond(value)]

    def _sequence(self, path: Any, value: Any) -> Any:
        base = next(cls for cls in (list, tuple, deque, set, frozenset) if isinstance(value, cls))
        items = list(base.__iter__(value))
        if base in (set, frozenset):
            items = sorted(items, key=lambda item: repr(item) if type(item) in _PLAIN else "")
        return ("items", len(items)), [*_items(items), *self._beyond(value)]

    def _array(self, path: Any, value: Any) -> Any:
        plain = np.asarray(value)
        digest = None if plain.dtype.hasobject else hashlib.sha256(plain.tobytes()).digest()
        return ("array", plain.dtype.str, plain.shape, digest), self._beyond(value)

    def _tensor(self, path: Any, value: Any) -> Any:
        if not hasattr(value, "numpy") or value.dtype in (tf.resource, tf.variant):
            return ("tensor", value.dtype, str(value.shape)), []
        return ("tensor",), [(".numpy()", np.asarray(value.numpy()))]

    def _object(self, value: Any) -> Any:
        cls = type(value)
        base = next((b for b in (int, float, complex, str, bytes) if isinstance(value, b)), None)
        token = ("object", cls.__module__, cls.__qualname__, base and base.__repr__(value))
        if _package(cls) in _OPAQUE or isinstance(value, Runtime | Tracker):
            return token, []
        return token, self._beyond(value)

    def _beyond(self, value: Any) -> list[tuple[str, Any]]:
        """Returns the class and the attributes of an object."""
        cls = type(value)
        known = _is_known(cls)
        if known and isinstance(value, (dict, list, set, np.ndarray)):
            return []
        attributes = dict(_attributes(value))
        for kind, names in _PASSED_OVER:
            if isinstance(value, kind):
                attributes = {n: v for n, v in attributes.items() if n not in names}
        if known:
            attributes = self._without_live(value, attributes)
        elif isinstance(value, GradientHook):
            attributes = {n: v for n, v in attributes.items() if n not in value._number_variables}
        return [
            *([] if known else [(".__class__", cls)]),
            *((f".{name}", attributes[name]) for name in sorted(attributes)),
        ]

    def _without_live(self, value: Any, attributes: dict[str, Any]) -> dict[str, Any]:
        """Leaves out what is in a variable, or has a part outside of steps only."""
        left_out: set[str] = set()
        if isinstance(value, keras.random.SeedGenerator):
            return {"state": value.state}
        if isinstance(value, keras.KerasTensor):
            left_out = {"name"}
        elif isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
            left_out = {n for n in _NUMBERS_OF_SCHEDULE if type(attributes.get(n)) is float}
            for name in sorted(left_out):
                self._number(value, name)
        elif isinstance(value, GradientHook):
            left_out = {*value._number_variables, "_structure", "seed"}
            if isinstance(value, Freezing | GradualUnfreezing):
                left_out |= {"epochs", "steps", "every", "uses_step_count", "_last_chosen"}
        elif isinstance(value, GradientMethod):
            left_out = set(value._live)
        elif isinstance(value, keras.Layer | keras.Initializer):
            left_out = {"seed", "_init_seed"}
        return {n: v for n, v in attributes.items() if n not in left_out}

    def _number(self, schedule: Any, name: str) -> None:
        number = tf.Variable(getattr(schedule, name), dtype=keras.config.floatx(), trainable=False)
        self.numbers.append((schedule, name, number))
        self.variables.append(number)
        self.names.append(f"{type(schedule).__name__}.{name}")


_VISITS: list[tuple[Any, Any]] = [
    ((keras.Variable, tf.Variable), Fingerprint._variable),
    (type, Fingerprint._class),
    (types.FunctionType, Fingerprint._function),
    (types.MethodType, lambda s, p, v: (("method",), [(".f", v.__func__), (".self", v.__self__)])),
    (types.CodeType, lambda s, p, v: (("code", v), [])),
    (
        types.BuiltinFunctionType,
        lambda s, p, v: (("builtin", v.__qualname__), [(".self", v.__self__)]),
    ),
    ((staticmethod, classmethod), lambda s, p, v: (("wrapped",), [(".f", v.__func__)])),
    (property, lambda s, p, v: (("property",), [(".get", v.fget), (".set", v.fset)])),
    (functools.cached_property, lambda s, p, v: (("property",), [(".get", v.func)])),
    (
        functools.partial,
        lambda s, p, v: (("partial",), [(".f", v.func), (".args", v.args), (".kw", v.keywords)]),
    ),
    (enum.Enum, lambda s, p, v: (("enum", type(v).__qualname__, v.name), [])),
    (dict, Fingerprint._mapping),
    ((list, tuple, deque, set, frozenset), Fingerprint._sequence),
    (np.ndarray, Fingerprint._array),
    (tf.Tensor, Fingerprint._tensor),
    (
        tf.types.experimental.PolymorphicFunction,
        lambda s, p, v: (("tf.function",), [(".f", v.python_function)]),
    ),
]


def random_state() -> Any:
    """Returns the state of Python's and NumPy's own random numbers."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tobytes(), rest


def _parts(model: Any) -> dict[str, Any]:
    """Returns what the step of a model is made of."""
    runtime = runtime_of(model)
    if getattr(model, "_distribute_strategy", None) is not None or tf.distribute.has_strategy():
        raise Incomparable("the model is trained under a `tf.distribute` strategy")
    if model.run_eagerly or tf.config.functions_run_eagerly():
        raise Incomparable("with `run_eagerly=True` nothing is traced")
    return {
        type(model).__name__: model,
        "gradient_hooks": list(runtime.hooks),
        "backward": runtime.backward,
        "micro_batches": runtime.micro_batches,
        "jit_compile": runtime.jit_compile,
        "state": own_state(model),
        "settings": [
            keras.config.floatx(),
            keras.config.image_data_format(),
            keras.config.epsilon(),
            keras.config.dtype_policy().name,
            tf.config.optimizer.get_jit() or "",
        ],
    }


def own_state(model: Any) -> dict[str, Any]:
    """Returns what our step keeps beside what Keras knows of, by stable names."""
    runtime = runtime_of(model)
    window, records, reports = runtime.window, runtime.recording.records, runtime._reports
    return {
        "window": window and [window.num_steps, *window.variables],
        "records": records and [vars(records)[n] for n in sorted(vars(records))],
        "reports": reports and reports._state,
    }


def _items(values: Any) -> list[tuple[str, Any]]:
    return [(f"[{i}]", value) for i, value in enumerate(values)]


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
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


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Returns the names that a function, or one inside it, may ask for."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _is_known(cls: type) -> bool:
    return _package(cls) in _KNOWN


def _is_installed(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or "site-packages" in file or module.__name__.partition(".")[0] in _KNOWN


def _text(path: Any) -> str:
    steps = []
    while path is not None:
        path, step = path
        steps.append(step)
    return "".join(reversed(steps))


def _shown(token: Any) -> str:
    return f"{token[-1]!r:.60}"
