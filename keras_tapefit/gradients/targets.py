"""Which variables an operation is meant for."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients.layers import has_trainable_weights

Targets = Any
"""A layer, a variable, a predicate on a variable, a glob on `variable.path`, or a
list of these. `None` means every variable."""


def variable_path(variable: Any) -> str:
    """Returns the path of a Keras variable, or the name of a bare `tf.Variable`."""
    path = getattr(variable, "path", None)
    return path if path is not None else variable.name.split(":")[0]


def same_variable(a: Any, b: Any) -> bool:
    """Whether two variables are one, through the Keras wrapper or not."""
    return a is b or _native(a) is _native(b)


def _native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def is_variable(value: Any) -> bool:
    return isinstance(value, keras.Variable | tf.Variable)


def check_targets(targets: Targets) -> None:
    """Raises `TypeError` where `targets` holds anything that can select nothing."""
    for target in _as_list(targets):
        known = isinstance(target, str | keras.layers.Layer | _SavedTarget)
        if not (known or is_variable(target) or callable(target)):
            raise TypeError(
                "`targets` must be a layer, a variable, a predicate on a variable, a "
                "glob on `variable.path`, or a list of these. "
                f"Received: {target!r} (of type {type(target).__name__})."
            )


def matching(targets: Targets, variables: Sequence[Any]) -> list[int]:
    """Returns the positions in `variables` that `targets` selects, in their order.

    Args:
        targets: see `Targets`; `None` selects all.
        variables: the variables there are.

    Returns:
        Positions in ascending order.

    Raises:
        TypeError: when a target is of no known kind.
        ValueError: when a target matches nothing; the text lists the paths there are.
    """
    check_targets(targets)
    if targets is None:
        return list(range(len(variables)))
    selected: set[int] = set()
    nothing = []
    for target in _as_list(targets):
        matches = _predicate(target, variables)
        found = [i for i, variable in enumerate(variables) if matches(variable)]
        selected.update(found)
        if not found:
            nothing.append(target)
    # In a list, such as `model.layers[-20:]`, there may be layers without weights.
    faults = [target for target in nothing if not (selected and _is_weightless(target))]
    if faults:
        paths = [variable_path(v) for v in variables]
        listed = "\n  ".join(paths) or "(none)"
        raise ValueError(
            f"The target {describe(faults[0])} matches no variable.{_hint(faults[0], paths)} "
            "Pass a layer or a variable of this model, or a glob on one of the paths there "
            f"are:\n  {listed}"
        )
    return sorted(selected)


def _is_weightless(target: Any) -> bool:
    return isinstance(target, keras.layers.Layer) and not has_trainable_weights(target)


def _hint(target: Any, paths: Sequence[str]) -> str:
    """Returns the glob that was probably meant, if any."""
    if not isinstance(target, str) or not target:
        return ""
    name = target.strip("/")
    for glob in (f"{name}/*", f"*/{name}/*", f"*/{name}", f"{name}*", f"*{name}*"):
        if any(fnmatch.fnmatchcase(path, glob) for path in paths):
            return f" Did you mean {glob!r}?"
    return ""


def _as_list(targets: Targets) -> list[Any]:
    if targets is None:
        return []
    return list(targets) if isinstance(targets, list | tuple) else [targets]


def describe(target: Any) -> str:
    """Returns a target as a message names it."""
    if isinstance(target, keras.layers.Layer):
        return f"layer {target.name!r}"
    if is_variable(target):
        return f"variable {variable_path(target)!r}"
    return repr(target)


def _predicate(target: Any, variables: Sequence[Any]) -> Callable[[Any], bool]:
    if isinstance(target, str):
        return lambda variable: fnmatch.fnmatchcase(variable_path(variable), target)
    if isinstance(target, _SavedTarget):
        return target.resolve(variables)
    if isinstance(target, keras.layers.Layer):
        members = {id(v) for v in target.variables}
        return lambda variable: id(variable) in members
    if is_variable(target):
        return lambda variable: same_variable(variable, target)
    return lambda variable: bool(target(variable))


class _SavedTarget:
    """A layer or a variable as a saved model remembers it.

    Automatic names differ between two makings of one model, positions do not: the
    positions are used where the paths are not all there.
    """

    def __init__(self, paths: Sequence[str], positions: Sequence[int]) -> None:
        self.paths = list(paths)
        self.positions = list(positions)

    def resolve(self, variables: Sequence[Any]) -> Callable[[Any], bool]:
        paths = {variable_path(v) for v in variables}
        if paths.issuperset(self.paths):
            return lambda variable: variable_path(variable) in self.paths
        members = {id(variables[i]) for i in self.positions if i < len(variables)}
        return lambda variable: id(variable) in members


def serialize_targets(targets: Targets, variables: Sequence[Any] | None) -> Any:
    """Returns `targets` as a structure that fits in a model's config.

    Args:
        targets: see `Targets`.
        variables: the variables of the model, or `None` while it has none. Needed for
            targets that are layers or variables.

    Raises:
        ValueError: when a layer or variable is saved before the model is built.
    """
    if isinstance(targets, list | tuple):
        return [serialize_targets(target, variables) for target in targets]
    if targets is None or isinstance(targets, str):
        return targets
    if isinstance(targets, _SavedTarget):
        return {"paths": targets.paths, "positions": targets.positions}
    if isinstance(targets, keras.layers.Layer) or is_variable(targets):
        if variables is None:
            raise ValueError(
                f"The target {describe(targets)} can be saved only after the model is "
                "built and the hook belongs to it. Build the model first, or use a glob "
                "on the variable's path."
            )
        positions = matching(targets, variables)
        paths = [variable_path(variables[i]) for i in positions]
        return {"paths": paths, "positions": positions}
    return {"predicate": keras.saving.serialize_keras_object(targets)}


def deserialize_targets(config: Any) -> Targets:
    """Returns the targets that `serialize_targets` described."""
    if isinstance(config, list | tuple):
        return [deserialize_targets(target) for target in config]
    if not isinstance(config, dict):
        return config
    if "predicate" in config:
        return keras.saving.deserialize_keras_object(config["predicate"])
    if not {"paths", "positions"} <= config.keys():
        raise ValueError(
            "`targets` in a config must be a glob, or a dictionary with `predicate`, or with "
            f"`paths` and `positions`. Received: {config!r}."
        )
    return _SavedTarget(config["paths"], config["positions"])
