"""The arguments of a hook: which there are, and how a config and a `repr` hold them."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import keras

from keras_tapefit.gradients.targets import describe, is_variable
from keras_tapefit.hooks.number import Number

_plain: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def arguments_of(hook: Any) -> dict[str, Any]:
    """Returns the arguments of a hook's `__init__`, as they are now.

    Raises:
        AttributeError: when one was not kept as an attribute.
    """
    found = {}
    for argument in init_arguments(type(hook)):
        if argument == "name":
            found["name"] = hook._name
        elif isinstance(getattr(type(hook), argument, None), Number):
            found[argument] = vars(hook).get(argument)
        elif hasattr(hook, argument):
            found[argument] = getattr(hook, argument)
        else:
            raise AttributeError(
                f"{type(hook).__name__}.__init__ takes `{argument}` but keeps no "
                f"attribute of that name, so its config cannot be saved. Assign "
                f"`self.{argument} = {argument}`, or implement `get_config`."
            )
    return found


def plain_arguments(cls: type) -> frozenset[str]:
    """Returns the arguments that a hook of a class keeps as plain attributes."""
    if cls not in _plain:
        names = set(init_arguments(cls)) - {"name"}
        # Numbers and properties see to themselves.
        _plain[cls] = frozenset(n for n in names if not hasattr(getattr(cls, n, None), "__set__"))
    return _plain[cls]


def shown(value: Any) -> str:
    """Returns a value as a `repr` shows it, without addresses."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, keras.layers.Layer) or is_variable(value):
        return f"<{describe(value)}>"
    if inspect.isroutine(value):
        return f"<function {value.__name__}>"
    is_default = type(value).__repr__ is object.__repr__
    return f"<{type(value).__name__}>" if is_default else repr(value)


def numbers(cls: type) -> list[Number]:
    names = {name for base in cls.__mro__ for name in vars(base)}
    found = (getattr(cls, name, None) for name in sorted(names))
    return [value for value in found if isinstance(value, Number)]


def init_arguments(cls: type) -> list[str]:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds]


def serialized(value: Any) -> Any:
    plain = value is None or isinstance(value, bool | int | float | str)
    if plain or (
        isinstance(value, list | tuple) and all(isinstance(v, int | float | str) for v in value)
    ):
        return value
    return keras.saving.serialize_keras_object(value)


def deserialized(value: Any) -> Any:
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(value)
    return value
