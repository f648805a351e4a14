"""Optimizers besides the model's own: what is loaded into them before they are built.

Keras loads a model's optimizers with the model. One that is not built yet it passes
over, and only the step that uses an optimizer knows which variables it is for.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def watch(value: Any) -> None:
    """Has optimizers keep what is loaded into them until they are built.

    Args:
        value: an optimizer, a container of optimizers, or anything else.
    """
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else [value]:
        for optimizer in _nested(item):
            optimizer.__dict__["load_own_variables"] = types.MethodType(_load, optimizer)


def restore(optimizer: Any) -> None:
    """Gives a newly built optimizer what was loaded into it before."""
    for each in _nested(optimizer):
        kept = each.__dict__.pop("_tapefit_loaded", None)
        if kept is not None:
            with tf.init_scope():
                type(each).load_own_variables(each, kept)


def _load(optimizer: Any, store: Any) -> None:
    if optimizer.built or len(store.keys()) == len(optimizer.variables):
        type(optimizer).load_own_variables(optimizer, store)
    else:
        kept = {key: np.asarray(store[key]) for key in store.keys()}
        optimizer.__dict__["_tapefit_loaded"] = kept


def _nested(value: Any) -> Iterator[Any]:
    if isinstance(value, keras.optimizers.Optimizer):
        yield value
        yield from _nested(getattr(value, "inner_optimizer", None))
