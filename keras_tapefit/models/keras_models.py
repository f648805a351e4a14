"""Access to the private side of Keras models.

Private names used here: `keras.src.models.functional.Functional`,
`keras.src.models.cloning._clone_sequential_model` and `_clone_functional_model`,
`keras.src.utils.naming.auto_name`,
`keras.src.saving.keras_saveable.KerasSaveable`, `_unpickle_model`,
`keras.src.legacy.saving.saving_utils`, `Sequential._layers`,
`Layer._trainable_variables`, `_non_trainable_variables`, `_track_variable`,
`_untrack_variable`, `_tracker` and `_lock_violation_msg`. Checked with Keras 3.15.1;
`tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras.src.legacy.saving import saving_utils
from keras.src.models import cloning
from keras.src.models.functional import Functional as KerasFunctional
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils.naming import auto_name as auto_name

__all__ = [
    "KerasFunctional",
    "adopt",
    "auto_name",
    "has_own_build",
    "is_functional_call",
    "keep_class_in_legacy_files",
    "keep_class_when_cloned",
    "reduced",
    "release",
    "route_functional_calls",
    "share",
    "takes_weights",
    "unpickle",
    "without",
]


def is_functional_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether arguments are those of a functional model, by Keras's own rule."""
    return (
        len(args) == 2
        or (len(args) == 1 and "outputs" in kwargs)
        or ("inputs" in kwargs and "outputs" in kwargs)
    )


def route_functional_calls(ours: type, functional_class: Callable[[type], type]) -> None:
    """Has `keras.Model.__init__` leave the classes of our models as they are.

    Where it gets inputs and outputs, Keras puts its functional class among the bases of
    the model's class and of all classes below it, for the whole process. However such a
    call comes there (by `super()`, through another library's class, by name), a model of
    ours gets its own class instead. Other models are made as before.

    Args:
        ours: the class of our models.
        functional_class: returns the functional class that stands in for a class.
    """
    original = keras.Model.__init__
    # Some libraries take back what Keras did to their classes before they make the next
    # model, and count on Keras to do it again.
    rewritten: weakref.WeakSet[type] = weakref.WeakSet()

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not is_functional_call(args, kwargs):
            original(self, *args, **kwargs)
        elif not isinstance(self, ours):
            original(self, *args, **kwargs)
            rewritten.update(c for c in type(self).__mro__ if KerasFunctional in c.__bases__)
        else:
            if not isinstance(self, KerasFunctional):
                self.__class__ = functional_class(type(self))
            KerasFunctional.__init__(self, *args, **kwargs)
            for cls in rewritten.intersection(type(self).__mro__):
                cls.__bases__ = tuple(
                    KerasFunctional if base is keras.Model else base for base in cls.__bases__
                )

    keras.Model.__init__ = __init__


def reduced(model: Any, parts: Iterable[Any]) -> tuple[Any, Any]:
    """Returns what pickle keeps of a model.

    Keras's own way, past what a library may have set for all of `keras.Model`; and made
    again by a function that pickle finds: a class that stands in for another has its name.

    Args:
        model: the model.
        parts: what is in it. Where their classes are defined is imported before the model
            is made again.
    """
    _, (saved,) = KerasSaveable.__reduce__(model)
    classes = {cls: None for part in parts for cls in type(part).__mro__ if _is_users(cls)}
    return unpickle, (saved, tuple(classes))


def _is_users(cls: type) -> bool:
    """Whether a class is a user's, and can be imported by its name."""
    if cls.__module__.split(".")[0] in ("keras", "keras_tapefit", "tensorflow", "builtins"):
        return False
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def unpickle(saved: Any, classes: tuple[type, ...] = ()) -> Any:
    """Makes a model of what pickle kept of it."""
    # Those that are registered are found by it.
    names = {c.__name__: c for c in classes if keras.saving.get_registered_name(c) == c.__name__}
    with keras.saving.custom_object_scope(names):
        return KerasSaveable._unpickle_model(saved)


def takes_weights(model: Any) -> bool:
    """Whether new weights may be added to a model: not once it is built."""
    return not model._tracker.locked


def adopt(model: Any, variable: Any, make: Callable[[], keras.Variable]) -> Any:
    """Has a model own a `tf.Variable`, by the `keras.Variable` made for it.

    Returns:
        The `keras.Variable`; `None` where the model owns the variable already.
    """
    tracked = [*model._trainable_variables, *model._non_trainable_variables]
    if any(v.value is variable for v in tracked):
        return None
    with keras.name_scope(model.name, caller=model):
        adopted = make()
    model._track_variable(adopted)
    return adopted


def release(model: Any, variable: keras.Variable) -> None:
    """Has a model no longer own a variable."""
    model._untrack_variable(variable)


@contextlib.contextmanager
def without(model: Any, kind: type) -> Iterator[None]:
    """Has a model own no variable of this kind for the time being."""
    lists = (model._trainable_variables, model._non_trainable_variables)
    kept = [list(variables) for variables in lists]
    for variables in lists:
        variables[:] = [v for v in variables if not isinstance(v, kind)]
    try:
        yield
    finally:
        for variables, before in zip(lists, kept, strict=True):
            variables[:] = before


@functools.cache
def _names_of_training() -> frozenset[str]:
    """Returns the attributes that a model has because it is trained."""
    # With names, so that nobody else's automatic name is another one for it.
    model = keras.Model(name="model")
    model.compile(keras.optimizers.SGD(name="sgd"), "mse")
    names = vars(model).keys() - vars(keras.layers.Layer(name="layer")).keys()
    return frozenset(names | {"history", "stop_training"})


def share(source: Any, model: Any) -> None:
    """Has a model hold what another holds: layers, weights, state and attributes.

    All but how it is compiled and trained, and what is bound to the other.
    """
    theirs, own = source._tracker, model._tracker
    lists = {id(variables) for _, variables in theirs.config.values()}
    for name, (_, things) in theirs.config.items():
        own.config[name][1][:] = things
        own.stored_ids[name] = set(theirs.stored_ids[name])
    own.locked, own._lock_violation_msg = theirs.locked, theirs._lock_violation_msg
    kept = _names_of_training() | {"build", "quantize", "_tracker"}
    for name, value in vars(source).items():
        if name in kept or name.startswith("_tapefit_") or id(value) in lists:
            continue
        if isinstance(value, types.MethodType) and value.__self__ is source:
            value = types.MethodType(value.__func__, model)
        elif type(value) in (list, dict, set):
            value = value.copy()
        model.__dict__[name] = value
    if source.built or not has_own_build(type(source)):
        return
    of_model = model.build

    @functools.wraps(of_model)
    def build(*args: Any, **kwargs: Any) -> None:
        of_model(*args, **kwargs)
        share(model, source)

    model.__dict__["build"] = build


def has_own_build(cls: type) -> bool:
    """Whether a model class builds its weights in a `build` of its own."""
    return cls.build is not keras.Model.build  # type: ignore[attr-defined]


def keep_class_when_cloned(ours: Any, convert: Callable[[Any], Any]) -> None:
    """Makes `keras.models.clone_model` return a `TapeModel` for a `TapeModel`.

    Keras makes a plain model of any Sequential, and of a functional one with an
    `__init__` of its own, and compiles it with a config that a plain one does not
    understand. Other models are cloned as before.

    Args:
        ours: the class of our models.
        convert: returns a plain model as a `TapeModel`.
    """

    def keeping(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clone_model(model: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(model, ours):
                return original(model, *args, **kwargs)
            compiled, model.compiled = model.compiled, False
            try:
                clone = original(model, *args, **kwargs)
            finally:
                model.compiled = compiled
            clone = convert(clone)
            if compiled:
                clone.compile_from_config(model.get_compile_config())
            return clone

        return clone_model

    cloning._clone_sequential_model = keeping(cloning._clone_sequential_model)
    cloning._clone_functional_model = keeping(cloning._clone_functional_model)


def keep_class_in_legacy_files(ours: type, arguments_of: Callable[[Any], dict[str, Any]]) -> None:
    """Has `.h5` files keep the class of our models, and our arguments of `compile`.

    Keras writes the bare name of the class, which is that of a class of its own, and
    reads five arguments of `compile`. Files of other models are written as before.

    Args:
        ours: the class of our models.
        arguments_of: returns our arguments of a model's `compile`, as configs.
    """
    written, read = saving_utils.model_metadata, saving_utils.compile_args_from_training_config

    @functools.wraps(written)
    def model_metadata(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metadata = written(model, *args, **kwargs)
        if isinstance(model, ours):
            name = keras.saving.get_registered_name(type(model))
            metadata["model_config"]["class_name"] = name
            if "training_config" in metadata:
                metadata["training_config"]["keras_tapefit"] = arguments_of(model)
        return metadata

    @functools.wraps(read)
    def compile_args_from_training_config(
        training_config: dict[str, Any], custom_objects: Any = None
    ) -> dict[str, Any]:
        arguments = read(training_config, custom_objects)
        more = training_config.get("keras_tapefit")
        if more:
            arguments |= keras.saving.deserialize_keras_object(more, custom_objects)
        return arguments

    saving_utils.model_metadata = model_metadata
    saving_utils.compile_args_from_training_config = compile_args_from_training_config
