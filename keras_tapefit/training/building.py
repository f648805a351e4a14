"""Models whose parts are called but never they themselves, and models built from a file.

Keras counts neither as built, and then refuses to save or load their weights.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_tapefit.gradients import layers_of


def is_assembly(model: Any) -> bool:
    """Whether a model is nothing but its parts, and these are built: a GAN, say.

    Its step calls the parts, never the model itself, which so is never built.
    """
    return type(model).call is keras.Model.call and parts_are_built(model)


def parts_are_built(model: Any) -> bool:
    """Whether a model that does not build any layer itself has all its weights."""
    if type(model).build is not keras.Model.build:
        return False
    parts = [layer for layer in layers_of(model) if layer is not model]
    return bool(parts or model.weights) and all(part.built for part in parts)


def complete(model: Any) -> bool:
    """Marks a model as built when all layers in it are; returns whether it did."""
    if model.built:
        return False
    inside = [layer for layer in layers_of(model) if layer is not model]
    if not inside or not all(layer.built for layer in inside):
        return False
    model.built = True
    return True


def parts_config(model: Any) -> dict[str, Any] | None:
    """Returns how the parts of a model are built, where it was never called itself."""
    parts = [part.get_build_config() for part in _parts(model)]
    return {"parts": parts} if any(parts) else None


def build_parts(model: Any, configs: list[Any]) -> None:
    """Builds the parts of a model as `parts_config` describes."""
    for part, config in zip(_parts(model), configs, strict=True):
        if not part.built and config:
            build(part, config)


def build(layer: Any, config: dict[str, Any]) -> None:
    """Builds a layer or model as its `get_build_config` says."""
    layer.build_from_config(config)
    if isinstance(layer, keras.Model):
        complete(layer)


def _parts(model: Any) -> list[Any]:
    return [layer for layer in model.layers if layer is not model]


def inner_hooks(model: Any) -> list[str]:
    """Returns the names of the models inside of one that have gradient hooks of their own.

    A step applies the hooks of the model that is trained, and of no other.
    """
    # Asked for only where it is made: a user's attribute may hide `gradient_hooks`.
    inside = [layer for layer in layers_of(model) if layer is not model]
    runtimes = [(layer.name, vars(layer).get("_tapefit_runtime")) for layer in inside]
    return [name for name, runtime in runtimes if runtime is not None and runtime.hooks]


def inner_hooks_finding(model: Any) -> str | None:
    """Returns what to say of hooks that are not applied, for they are of a model inside."""
    names = inner_hooks(model)
    if not names:
        return None
    return (
        f"The gradient hooks of {', '.join(map(repr, names))} are not applied: a step "
        f"applies those of the model that is trained, which is {model.name!r}. Register "
        "them there, for the inner model's weights: "
        f"`model.register_gradient_hook(hook, targets=model.get_layer({names[0]!r}))`."
    )
