"""Checks of hooks, of lists of hooks, and of the callbacks of `fit`."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Any

import keras

from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.function import LambdaHook


def as_hook(value: Any) -> GradientHook:
    """Returns a hook as it is, a function as a `LambdaHook`, a saved one with its name."""
    if isinstance(value, GradientHook):
        return value
    if isinstance(value, dict) and value.keys() == {"name", "hook"}:
        hook = as_hook(value["hook"])
        hook._saved_name = value["name"]
        return hook
    hint = ""
    if isinstance(value, keras.callbacks.Callback):
        hint = " This is a Keras callback: pass it to `fit(callbacks=[...])`."
    elif hasattr(value, "compute"):
        hint = " This is a gradient method: pass it to `compile(backward=...)`."
    elif isinstance(value, type):
        hint = f" Did you mean `{value.__name__}(...)`?"
    elif callable(value):
        return LambdaHook(value)
    raise TypeError(
        "A gradient hook must be a `GradientHook` or a function of "
        f"`(gradient, variable)`.{hint} Received: {value!r} (of type "
        f"{type(value).__name__})."
    )


def check_hooks(value: Any) -> list[GradientHook]:
    """Returns a list of hooks, made of a list of hooks and functions."""
    if not isinstance(value, tuple | MutableSequence):
        hint = ""
        if isinstance(value, GradientHook) or callable(value):
            hint = "Put it in brackets: `gradient_hooks=[hook]`. "
        raise TypeError(
            f"`gradient_hooks` must be a list of gradient hooks. {hint}"
            f"Received: {value!r} (of type {type(value).__name__})."
        )
    return [as_hook(hook) for hook in value]


def check_callbacks(callbacks: Any) -> None:
    """Raises `TypeError` where a hook, or a class, is among the callbacks of `fit`."""
    for value in keras.tree.flatten(callbacks):
        if isinstance(value, type) and issubclass(value, keras.callbacks.Callback):
            raise TypeError(
                f"A callback must be an instance. Did you mean `{value.__name__}(...)`? "
                f"Received: {value!r}."
            )
        is_class = isinstance(value, type) and issubclass(value, GradientHook)
        if is_class or isinstance(value, GradientHook | MutableSequence):
            raise TypeError(
                f"{value!r} is a gradient hook and no callback. Pass it to "
                "`compile(gradient_hooks=[...])` or `model.register_gradient_hook(...)`."
            )
        if value is not None and not hasattr(value, "set_model"):
            raise TypeError(
                "`callbacks` must be a list of `keras.callbacks.Callback`. "
                f"Received: {value!r} (of type {type(value).__name__})."
            )
