"""What decides how a model is traced, and the variables that a trace is tied to.

A model is walked through, attribute by attribute, into a flat list of tokens. Two models
with equal lists have the same graph, so one may run what was traced for the other; what
lives in variables (weights, the learning rate, numbers of hooks) is no part of it. What
cannot be compared raises `Incomparable`: then nothing is reused.

Private names used here: attributes of Keras objects, which are passed over when they hold
no more than bookkeeping (`_BOOKKEEPING`). Checked with Keras 3.15.1 and TensorFlow 2.21;
`tests/tuning/test_reuse.py` fails when they change.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.backward.base import GradientMethod, LiveNumber
from keras_tapefit.hooks import GradientHook, Number
from keras_tapefit.training.runtime import runtime_of

_TRUSTED = ("keras.", "keras_tapefit.", "tensorflow.", "numpy.", "optree.", "ml_dtypes.")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_BY_VALUE = (tf.DType, tf.TensorShape, np.dtype, np.generic, slice, range)
_BY_IDENTITY = (type, types.ModuleType, types.BuiltinFunctionType, np.ufunc, types.CodeType)
# Modules that give other numbers each time.
_CHANGING = ("random", "numpy.random", "secrets")
_PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
_INSTALLED = tuple(sysconfig.get_paths()[place] for place in _PLACES)
_READS = {"LOAD_GLOBAL": 0, "LOAD_NAME": 0, "IMPORT_NAME": 1}
_READS |= {"LOAD_ATTR": 2, "LOAD_METHOD": 2, "IMPORT_FROM": 2}
# Of objects of Keras: what is derived, is of no consequence for a trace, or has a token
# of its own.
_BOOKKEEPING = frozenset(
    "_tracker _tracked _lock _auto_config _compile_config _initial_epoch _eval_epoch_iterator "
    "_tapefit_runtime _tapefit_state _tapefit_variables _trainable_variables_indices "
    "_compiled_trainable_state "
    "_call_signature _call_context_args _inbound_nodes _outbound_nodes _nodes _build_shapes_dict "
    "_distribution_strategy _self_setattr_tracking _self_unconditional_checkpoint_dependencies "
    "_self_unconditional_dependency_names _self_unconditional_deferred_dependencies "
    "_self_name_based_restores _self_saveable_object_factories _self_update_uid".split()
)
# The same of models.
_OF_MODEL = frozenset(
    "train_function test_function predict_function history stop_training stop_evaluating "
    "stop_predicting".split()
)
# Of layers: absent, or false once weights were loaded, where nothing is quantized.
_CALIBRATED = ("is_awq_calibrated", "is_gptq_calibrated")
# Of a hook: what is derived from the model that it is built for.
_OF_HOOK = frozenset("_built_for _model_variables _units _owners _structure _watched".split())


class Incomparable(Exception):
    """Something that may differ between two models and cannot be looked into."""


class _Same:
    """Equal to a token of the same object only, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"{self.value!r}"


class Slot:
    """A variable, and the place that holds the `tf.Variable` with its value.

    Args:
        holder: a `keras.Variable`, or a dictionary.
        key: of the dictionary.
    """

    def __init__(self, holder: Any, key: str | None = None) -> None:
        self._holder = holder
        self._key = key

    @property
    def value(self) -> tf.Variable:
        return self._holder._value if self._key is None else self._holder[self._key]

    @value.setter
    def value(self, value: tf.Variable) -> None:
        if self._key is None:
            self._holder._value = value
        else:
            self._holder[self._key] = value


class Fingerprint:
    """The tokens and the variables of a compiled model whose state is made.

    Args:
        model: a `TapeModel`, built, its optimizer too.

    Raises:
        Incomparable: when a part of the model cannot be compared; the message names it.
    """

    def __init__(self, model: Any) -> None:
        self.tokens: list[Any] = []
        self.slots: list[Slot] = []
        self._paths: list[str] = []
        self._seen: dict[int, int] = {}
        self._path: list[str] = []
        self._kept: list[Any] = []
        runtime = runtime_of(model)
        if runtime.window is not None:
            raise Incomparable("`gradient_accumulation_steps` keeps a window of gradients")
        if getattr(model, "_distribute_strategy", None) is not None:
            raise Incomparable("the model is trained under a `tf.distribute` strategy")
        if model.run_eagerly:
            raise Incomparable("with `run_eagerly=True` nothing is traced")
        self._walk(type(model).__name__, model)
        self._walk("gradient_hooks", list(runtime.hooks))
        self._walk("backward", runtime.backward)
        self._walk("micro_batches", runtime.micro_batches)
        self._walk("jit_compile", runtime.jit_compile)
        self._walk("policy", _settings())
        if runtime._reports is not None:
            self._walk("reports", runtime._reports)

    def difference(self, tokens: list[Any]) -> str:
        """Returns where the first difference from other tokens is."""
        for mine, theirs, path in zip(self.tokens, tokens, self._paths, strict=False):
            if mine != theirs:
                return f"{path}: {mine!r} is not {theirs!r}"
        return "one of the models has more parts"

    def forget_model(self) -> None:
        """Lets go of what was needed while walking."""
        self._kept.clear()
        self._seen.clear()

    def _add(self, token: Any) -> None:
        self.tokens.append(token)
        self._paths.append("".join(self._path))

    @contextlib.contextmanager
    def _at(self, step: str) -> Iterator[None]:
        self._path.append(step)
        try:
            yield
        finally:
            self._path.pop()

    def _refuse(self, value: Any, why: str = "cannot be compared") -> None:
        where = "".join(self._path)
        raise Incomparable(f"`{where}` (of type {type(value).__name__}) {why}")

    def _walk(self, step: str, value: Any) -> None:
        with self._at(step):
            self._visit(value)

    def _visit(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self._add((type(value), repr(value) if isinstance(value, float | complex) else value))
            return
        if isinstance(value, enum.Enum) or isinstance(value, _BY_IDENTITY):
            self._add(_Same(value))
            self._visit_class(value)
            if isinstance(value, types.BuiltinFunctionType):
                # A method of an object, or the module that a function is in.
                self._walk(".__self__", value.__self__)
            return
        if isinstance(value, _BY_VALUE):
            self._add((type(value), repr(value)))
            return
        if id(value) in self._seen:
            self._add(("seen", self._seen[id(value)]))
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        self._visit_new(value)

    def _visit_new(self, value: Any) -> None:
        if isinstance(value, keras.Variable):
            self._variable(value)
        elif isinstance(value, tf.Variable):
            self._refuse(value, "is a `tf.Variable` outside Keras")
        elif isinstance(value, keras.random.SeedGenerator):
            self._add("seed generator")
            self._walk(".state", value.state)
        elif isinstance(value, keras.KerasTensor):
            self._add(("symbol", tuple(value.shape), value.dtype))
            self._walk("._keras_history", getattr(value, "_keras_history", None))
        elif isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                self._refuse(value)
            self._add((value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).digest()))
        elif tf.is_tensor(value):
            self._tensor(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._walk(".__func__", value.__func__)
            self._walk(".__self__", value.__self__)
        elif isinstance(value, functools.partial):
            self._walk(".partial", [value.func, list(value.args), dict(value.keywords)])
        elif isinstance(value, Mapping | Sequence) and _holds_more(value):
            self._refuse(value, "has attributes beside its items")
        elif isinstance(value, Mapping):
            self._add(("dict", len(value)))
            for key, item in value.items():
                self._walk("[key]", key)
                self._walk(f"[{key!r:.40}]", item)
        elif isinstance(value, set | frozenset):
            self._set(value)
        elif isinstance(value, Sequence):
            self._add(("sequence", isinstance(value, tuple), len(value)))
            for index, item in enumerate(value):
                self._walk(f"[{index}]", item)
        else:
            self._object(value)

    def _variable(self, variable: Any) -> None:
        if type(variable).__module__.startswith("keras_tapefit"):
            self._refuse(variable, "is a `tf.Variable` outside Keras")
        self._add(
            (
                "variable",
                variable.path,
                tuple(variable.shape),
                keras.backend.standardize_dtype(variable.dtype),
                variable.trainable,
                variable.aggregation,
            )
        )
        if not isinstance(variable._value, tf.Variable):
            self._refuse(variable, "has no value yet")
        self._walk(".constraint", variable.constraint)
        self._walk(".regularizer", getattr(variable, "regularizer", None))
        self.slots.append(Slot(variable))

    def _tensor(self, value: Any) -> None:
        if not isinstance(value, tf.Tensor) or not hasattr(value, "numpy"):
            self._refuse(value)
        if value.dtype in (tf.resource, tf.variant):
            self._refuse(value)
        self._walk(".numpy()", np.asarray(value.numpy()))

    def _set(self, values: Any) -> None:
        if not all(isinstance(value, str | int) for value in values):
            self._refuse(values)
        self._add(("set", frozenset(values)))

    def _function(self, function: Any) -> None:
        self._add(_Same(function.__code__))
        cells = function.__closure__ or ()
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
            try:
                content = cell.cell_contents
            except ValueError:
                self._add("empty cell")
                continue
            self._walk(f"<{name}>", content)
        self._walk(".__defaults__", function.__defaults__)
        self._walk(".__kwdefaults__", function.__kwdefaults__)
        attributes = {k: v for k, v in vars(function).items() if not k.startswith("__")}
        if not _is_trusted(function):
            self._walk(".__dict__", attributes)
            self._what_is_asked_for(function)

    def _what_is_asked_for(self, function: Any) -> None:
        """Looks at what a function reads from outside: globals, and names in modules."""
        names, imports, attributes = _names(function.__code__)
        around = function.__globals__
        found = {name: around[name] for name in names if name in around}
        for name, value in found.items():
            self._walk(f"<global {name}>", value)
        for name in imports:
            for full in (name, f"{around.get('__package__')}.{name}"):
                found[full] = sys.modules.get(full)
        for value in found.values():
            if isinstance(value, types.ModuleType):
                self._module(value, attributes)

    def _module(self, module: types.ModuleType, names: Sequence[str]) -> None:
        with self._at(f"<module {module.__name__}>"):
            if module.__name__ in _CHANGING:
                self._refuse(module, "gives other numbers each time")
            for name in names:
                value = vars(module).get(name)
                if isinstance(value, types.ModuleType):
                    if value.__name__ == f"{module.__name__}.{name}":
                        self._module(value, names)
                elif name in vars(module) and not _is_installed(module):
                    self._walk(f".{name}", value)

    def _visit_class(self, cls: Any) -> None:
        """Looks into the methods of a class that somebody wrote."""
        if not isinstance(cls, type) or id(cls) in self._seen:
            return
        self._seen[id(cls)] = len(self._seen)
        for base in cls.__mro__:
            if base is object or _is_trusted(base) or base.__module__ in ("builtins", "abc"):
                continue
            if not base.__flags__ & (1 << 9):
                self._refuse(cls)
            for name, value in vars(base).items():
                self._member(f"{base.__name__}.{name}", value)

    def _member(self, name: str, value: Any) -> None:
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, property):
            for part in (value.fget, value.fset):
                self._walk(name, part)
        elif isinstance(value, functools.cached_property):
            self._walk(name, value.func)
        elif isinstance(value, types.FunctionType):
            self._walk(name, value)
        elif isinstance(value, Number | LiveNumber):
            self._walk(name, vars(value))
        elif not name.rpartition(".")[2].startswith("__") and not name.endswith("_abc_impl"):
            self._walk(name, value)

    def _object(self, value: Any) -> None:
        cls: Any = type(value)
        if isinstance(value, tf.types.experimental.PolymorphicFunction):
            self._refuse(value, "is a `tf.function`, which holds traces of its own")
        if not cls.__flags__ & (1 << 9) or not hasattr(value, "__dict__"):
            self._refuse(value)
        self._add(_Same(cls))
        self._visit_class(cls)
        attributes = dict(vars(value))
        if isinstance(value, GradientHook):
            self._hook(value, attributes)
        elif isinstance(value, GradientMethod):
            for name in value._live:
                attributes.pop(name)
                self.slots.append(Slot(value._live, name))
            attributes["_live"] = list(value._live)
        passed_over = {name for name in _CALIBRATED if not attributes.get(name)}
        if any(_is_trusted(base) for base in cls.__mro__ if base is not object):
            passed_over |= _BOOKKEEPING
        if isinstance(value, keras.Model):
            passed_over |= _OF_MODEL
        for name in sorted(attributes.keys() - passed_over):
            item = attributes[name]
            if isinstance(item, keras.Initializer) and _only_makes_weights(cls, name):
                item = type(item)
            self._walk(f".{name}", item)
        if isinstance(value, keras.layers.Layer):
            self._add(("trainable", value.trainable))

    def _hook(self, hook: GradientHook, attributes: dict[str, Any]) -> None:
        for name in _OF_HOOK:
            attributes.pop(name, None)
        positions = {id(v): i for i, v in enumerate(hook._model_variables or [])}
        for name, value in attributes.items():
            if isinstance(value, dict) and value and value.keys() <= positions.keys():
                attributes[name] = {positions[key]: item for key, item in value.items()}
                self._kept.append(attributes[name])
        for name in hook._number_variables:
            # Live: its value is in a variable.
            attributes.pop(name, None)


@functools.cache
def _names(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """Returns what a function, or one inside it, reads: globals, imports, attributes."""
    found: tuple[set[str], ...] = (set(), set(), set())
    for instruction in dis.get_instructions(code):
        if instruction.opname in _READS:
            found[_READS[instruction.opname]].add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            for mine, others in zip(found, _names(constant), strict=True):
                mine.update(others)
    return tuple(tuple(sorted(names)) for names in found)


def _holds_more(value: Any) -> bool:
    return bool(getattr(value, "__dict__", None)) and not _is_trusted(type(value))


@functools.cache
def _only_makes_weights(cls: Any, initializer: str) -> bool:
    """Whether an initializer of a layer has no part in its steps, as far as names tell."""
    methods = [
        value
        for base in cls.__mro__
        if not _is_trusted(base)
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType) and name not in ("__init__", "build", "get_config")
    ]
    asked = {name for method in methods for name in _names(method.__code__)[2]}
    return initializer.endswith("initializer") and initializer not in asked


def _is_installed(module: types.ModuleType) -> bool:
    """Whether a module is Python's own or a package's: not one that a search changes."""
    file = getattr(module, "__file__", None)
    return file is None or file.startswith(_INSTALLED)


def _settings() -> list[Any]:
    return [
        keras.config.floatx(),
        keras.config.image_data_format(),
        keras.config.epsilon(),
        keras.config.dtype_policy().name,
        tf.config.optimizer.get_jit() or "",
        tf.config.functions_run_eagerly(),
    ]


def _is_trusted(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return f"{module}.".startswith(_TRUSTED)
