"""`TapeModel`: `keras.Model` with the training step written out.

Private names used here: `Sequential._layers`. Checked with Keras 3.15.1;
`tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

import functools
import types
import warnings
from typing import TYPE_CHECKING, Any

import keras

from keras_tapefit.gradients import layers_of
from keras_tapefit.models import keras_models
from keras_tapefit.models.keras_models import KerasFunctional
from keras_tapefit.training import bare_variables, building, compile_arguments, files
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.training.trainer import TapeTrainer
from keras_tapefit.update import loaded_optimizers

if TYPE_CHECKING:
    from typing import Self


class TapeModel(TapeTrainer, keras.Model):
    """A `keras.Model` whose gradients can be seen, changed, gated and logged in `fit`.

    A drop-in replacement: functional, as a base class, in any place where
    `keras.Model` stands. Without gradient hooks it computes, bit for bit, what
    `keras.Model` computes.

    Args:
        inputs: of a functional model: `keras.Input`s, alone or in a list or dict.
        outputs: of a functional model: what layers made of the inputs.
        name: of the model.

    Example:

    ```python
    inputs = keras.Input((8,))
    outputs = keras.layers.Dense(1)(inputs)
    model = TapeModel(inputs, outputs)
    model.compile("adam", "mse", gradient_hooks=[hooks.GlobalNormClipping(1.0)])
    ```
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Not for subclasses: two arguments of theirs need not be inputs and outputs.
        # Where they are, `keras.Model.__init__` is where it shows.
        if cls is TapeModel and keras_models.is_functional_call(args, kwargs):
            cls = Functional
        return super().__new__(cls, *args, **kwargs)

    if TYPE_CHECKING:
        # None here: bases after this class must receive their arguments.
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __reduce__(self) -> Any:
        return keras_models.reduced(self, [*layers_of(self), *runtime_of(self).hooks])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Libraries set these two and the next for all of `keras.Model`.
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        remake, arguments = self.__reduce__()
        twin = memo[id(self)] = remake(*arguments)
        return twin

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self._follow_attribute(name, value)
        if name != "optimizer":
            loaded_optimizers.watch(value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._follow_attribute(name, None)

    def _follow_attribute(self, name: str, value: Any) -> None:
        """Adopts the bare variables that an attribute holds now, releases those it held."""
        if type(self) in (Functional, Sequential):
            # Nothing reads their attributes.
            return
        found = list(bare_variables.find(name, value))
        held = self.__dict__.get("_tapefit_variables")
        if held is None and found:
            # Past Keras's attribute tracking.
            held = self.__dict__["_tapefit_variables"] = bare_variables.BareVariables()
        if held is None:
            return
        released = held.follow(name, found)
        for variable in released:
            keras_models.release(self, variable)
        if not keras_models.takes_weights(self):
            if released and found:
                warnings.warn(
                    f"The variable in `{name}` was trained, the one put in its place is "
                    "not: a model that is built takes no new weights. Assign the value: "
                    f"`model.{name}.assign(...)`.",
                    stacklevel=3,
                )
            return
        for path, variable in found:
            make = functools.partial(bare_variables.AdoptedVariable, variable, path)
            adopted = keras_models.adopt(self, variable, make)
            if adopted is not None:
                held.adopted.append(adopted)

    def save(self, filepath: Any, overwrite: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Saves the model as Keras does; a file is written whole or not at all."""
        with files.written_whole(filepath, overwrite) as path:
            return super().save(path, overwrite, *args, **kwargs)

    def save_weights(self, filepath: Any, overwrite: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Saves the weights as Keras does; a file is written whole or not at all."""
        with files.written_whole(filepath, overwrite) as path:
            return super().save_weights(path, overwrite, *args, **kwargs)

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads weights as Keras does; where that raises, the model is what it was."""
        with files.unchanged_on_error(runtime_of(self)):
            return super().load_weights(filepath, *args, **kwargs)

    def set_weights(self, weights: Any) -> None:
        """Sets all weights as Keras does; where that raises, the model is what it was."""
        with files.unchanged_on_error(runtime_of(self)):
            super().set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        """Saves the model's own variables, as Keras would: bare ones go elsewhere."""
        with keras_models.without(self, bare_variables.AdoptedVariable):
            super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Loads the model's own variables; see `save_own_variables`."""
        with keras_models.without(self, bare_variables.AdoptedVariable):
            super().load_own_variables(store)

    def get_build_config(self) -> dict[str, Any] | None:
        """Returns how the model was built; where it never was called, how its parts were."""
        config = super().get_build_config()
        return building.parts_config(self) if config is None and self.built else config

    def build_from_config(self, config: dict[str, Any] | None) -> None:
        """Builds the model as `get_build_config` says."""
        # KerasTuner asks for it outside the scope that the model was made in.
        with self.distribute_strategy.scope():
            if config and "parts" in config:
                building.build_parts(self, config["parts"])
            else:
                super().build_from_config(config)
        building.complete(self)

    @classmethod
    def from_model(cls, model: keras.Model) -> TapeModel:
        """Returns a model of this kind that shares the layers and weights of another.

        What the model does in a way of its own is kept: it is as if its class had been
        written with `TapeModel` instead of `keras.Model`. That goes for `call`,
        `train_step`, `compute_loss`, `compute_metrics`, `fit`, `compile`, metrics,
        preprocessors and whatever else there is.

        Args:
            model: any `keras.Model`: functional, Sequential or subclassed, built or not,
                from `keras.applications` too. It stays as it is, and must be compiled
                again.

        Returns:
            A model with the same inputs and the same structure of outputs.

        Raises:
            TypeError: when `model` is no `keras.Model`.

        Example:

        ```python
        model = TapeModel.from_model(keras.applications.ResNet50(weights=None))
        ```
        """
        if not isinstance(model, keras.Model):
            hint = " Did you mean an instance of it?" if isinstance(model, type) else ""
            raise TypeError(
                f"`model` must be a `keras.Model`.{hint} Received: {model!r} (of type "
                f"{type(model).__name__})."
            )
        if isinstance(model, TapeModel):
            return model
        if type(model) is keras.Sequential:
            return Sequential(model._layers, trainable=model.trainable, name=model.name)
        if type(model) is KerasFunctional:
            return Functional(model.input, model.output, name=model.name)
        return _converted(model)


@keras.saving.register_keras_serializable("keras_tapefit")
class Functional(TapeModel, KerasFunctional):
    """The class of `TapeModel(inputs, outputs)`.

    It has the name of Keras's own functional class, because the names of classes are in
    automatic model names, variable paths and weight files.
    """


@keras.saving.register_keras_serializable("keras_tapefit")
class Sequential(keras.Sequential, TapeModel):
    """`keras.Sequential` with the training step of `TapeModel`.

    Exported as `TapeSequential`. It has the name of Keras's own class, because the
    names of classes are in automatic model names, variable paths and weight files.

    Args:
        layers: the layers, in order.
        trainable: whether its weights are trained.
        name: of the model.

    Example:

    ```python
    model = TapeSequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("adam", "mse", gradient_hooks=[hooks.GlobalNormClipping(1.0)])
    ```
    """


TapeSequential = Sequential


@keras.saving.register_keras_serializable("keras_tapefit")
class ConvertedModel:
    """The class that is saved for another library's class with `TapeModel` under it."""

    # Of the class that it stands in front of.
    _source_class: Any

    def get_config(self) -> dict[str, Any]:
        # The same object, looked at as one of its class: what Keras saves depends on it.
        source = object.__new__(self._source_class)
        object.__setattr__(source, "__dict__", self.__dict__)
        config = keras.saving.serialize_keras_object(source)
        config.pop("compile_config", None)
        return {"converted_model": config}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        if "converted_model" not in config:
            return cls._source_class.from_config.__func__(cls, config)
        source = keras.saving.deserialize_keras_object(config["converted_model"], custom_objects)
        model = TapeModel.from_model(source)
        if source.compiled:
            # By its own `__init__`: how it was compiled when it was saved comes later.
            arguments = keras.saving.deserialize_keras_object(source.get_compile_config())
            model._compile((), arguments, None, None, 1)
        return model


def _converted(source: keras.Model) -> Any:
    kind: Any = type(source)
    cls = _converted_class(kind, isinstance(source, KerasFunctional))
    model = cls.__new__(cls)
    with source.distribute_strategy.scope():
        keras.Model.__init__(model, name=source.name)
    keras_models.share(source, model)
    return model


@functools.cache
def _converted_class(cls: Any, is_functional: bool) -> Any:
    below = Sequential if issubclass(cls, keras.Sequential) else TapeModel
    # Named once more, as some libraries take it out of their classes at times.
    functional = (KerasFunctional,) if is_functional else ()
    converted = _stand_in(cls, (ConvertedModel, cls, below, *functional))
    converted._source_class = cls
    keras.saving.register_keras_serializable("keras_tapefit", "ConvertedModel")(converted)
    keras.saving.register_keras_serializable("keras_tapefit")(ConvertedModel)
    return converted


@functools.cache
def _functional_variant(cls: Any) -> Any:
    """Returns the functional model class of a user's subclass.

    Keras puts its functional class among the bases of the user's class itself; every
    other use of that class fails afterwards. Here the user's class stays as it is.
    """
    variant = _stand_in(cls, (cls, KerasFunctional))
    registered = keras.saving.get_registered_name(cls)
    if ">" in registered:
        package, name = registered.split(">", maxsplit=1)
        keras.saving.register_keras_serializable(package, name)(variant)
        keras.saving.register_keras_serializable(package, name)(cls)
    return variant


def _stand_in(cls: Any, bases: tuple[type, ...]) -> Any:
    """Returns a class with these bases that goes by the name of another."""
    copied = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}

    class Empty:
        pass

    made = types.new_class(
        cls.__name__, (Empty,), {"metaclass": type(cls)}, lambda names: names.update(copied)
    )
    # Afterwards, so that no `__init_subclass__` takes it for a class of the user's.
    made.__bases__ = bases
    return made


keras_models.route_functional_calls(TapeModel, _functional_variant)
keras_models.keep_class_when_cloned(TapeModel, TapeModel.from_model)
keras_models.keep_class_in_legacy_files(
    TapeModel, lambda model: compile_arguments.serialize(runtime_of(model))
)
