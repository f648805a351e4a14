"""A check of the callbacks of `fit`: hooks are none."""

from __future__ import annotations

from typing import Any

import keras

from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.hook_list import HookList


def check_callbacks(callbacks: Any) -> None:
    """Raises `TypeError` where a hook, or a class, is among the callbacks of `fit`."""
    for value in keras.tree.flatten(callbacks):
        if isinstance(value, type) and issubclass(value, keras.callbacks.Callback):
            raise TypeError(
                f"A callback must be an instance. Did you mean `{value.__name__}(...)`? "
                f"Received: {value!r}."
            )
        is_class = isinstance(value, type) and issubclass(value, GradientHook)
        if is_class or isinstance(value, GradientHook | HookList):
            raise TypeError(
                f"{value!r} is a gradient hook and no callback. Pass it to "
                "`compile(gradient_hooks=[...])` or `model.register_gradient_hook(...)`."
            )
        if value is not None and not hasattr(value, "set_model"):
            raise TypeError(
                "`callbacks` must be a list of `keras.callbacks.Callback`. "
                f"Received: {value!r} (of type {type(value).__name__})."
            )
