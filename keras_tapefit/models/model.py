"""`TapeModel`: `keras.Model` with the training step written out."""

from __future__ import annotations

import functools
from typing import Any

import keras

from keras_tapefit.models import keras_models
from keras_tapefit.training import bare_variables, building
from keras_tapefit.training.trainer import TapeTrainer
from keras_tapefit.update import loaded_optimizers


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

    # Keras's `from_config` looks for these two names in the signatures.
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Not for subclasses: two arguments of theirs need not be inputs and outputs.
        if cls is TapeModel and is_functional_call(args, kwargs):
            cls = _functional_class()
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not is_functional_call(args, kwargs):
            super().__init__(*args, **kwargs)
            return
        functional = _functional_class()
        if not isinstance(self, functional):
            # A subclass, of whose `__init__` it is known only now what it passes on.
            self.__class__ = functional_variant(type(self))  # type: ignore[arg-type]
        functional.__init__(self, *args, **kwargs)

    def __reduce__(self) -> Any:
        # By the method of a class that pickle finds: a stand-in of `functional_variant`
        # has the name of another.
        _, arguments = super().__reduce__()
        return keras_models.unpickle, arguments

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        for path, variable in bare_variables.find(name, value):
            adopted = functools.partial(bare_variables.AdoptedVariable, variable, path)
            keras_models.adopt(self, variable, adopted)
        if name != "optimizer":
            loaded_optimizers.watch(value)

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
    def from_model(cls, model: keras.Model) -> Any:
        """Returns a model of this kind that shares the layers and weights of another.

        Args:
            model: any `keras.Model`: functional, Sequential or subclassed, built or not,
                from `keras.applications` too. It stays as it is, and is to be compiled
                anew.

        Returns:
            A model with the same inputs and the same structure of outputs.

        Raises:
            TypeError: when `model` is no `keras.Model`.

        Example:

        ```python
        model = TapeModel.from_model(keras.applications.ResNet50(weights=None))
        ```
        """
        from keras_tapefit.models.conversion import convert

        return convert(model)


def is_functional_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether arguments are those of a functional model, by Keras's own rule."""
    return (
        len(args) == 2
        or (len(args) == 1 and "outputs" in kwargs)
        or ("inputs" in kwargs and "outputs" in kwargs)
    )


def _functional_class() -> Any:
    from keras_tapefit.models.functional import Functional

    return Functional


@functools.cache
def functional_variant(cls: Any) -> type:
    """Returns the functional model class of a user's subclass.

    Keras puts its functional class among the bases of the user's class itself, for the
    whole process; every other use of that class fails afterwards. Here the user's class
    stays as it is, and a subclass with its name stands in for it.
    """
    copied = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(cls, name) for name in copied}
    variant = type(cls.__name__, (cls, _functional_class()), namespace)
    registered = keras.saving.get_registered_name(cls)
    if ">" in registered:
        package, name = registered.split(">", maxsplit=1)
        keras.saving.register_keras_serializable(package, name)(variant)
        keras.saving.register_keras_serializable(package, name)(cls)
    return variant
