"""Existing models made into ours."""

from __future__ import annotations

from typing import Any

import keras

from keras_tapefit.models.functional import Functional
from keras_tapefit.models.keras_models import KerasFunctional
from keras_tapefit.models.model import TapeModel
from keras_tapefit.models.sequential import Sequential
from keras_tapefit.training import building, keras_trainer


def convert(model: Any) -> TapeModel:
    """Returns a model that shares layers and weights; see `TapeModel.from_model`."""
    if not isinstance(model, keras.Model):
        hint = " Did you mean an instance of it?" if isinstance(model, type) else ""
        raise TypeError(
            f"`model` must be a `keras.Model`.{hint} Received: {model!r} (of type "
            f"{type(model).__name__})."
        )
    if isinstance(model, TapeModel):
        return model
    if isinstance(model, keras.Sequential) and _keeps_methods(model, keras.Sequential):
        return Sequential(model._layers, trainable=model.trainable, name=model.name)
    if isinstance(model, KerasFunctional) and _keeps_methods(model, KerasFunctional):
        return Functional(model.input, model.output, name=model.name)
    return ModelWrapper(model)


def _keeps_methods(model: Any, base: type) -> bool:
    return type(model).call is base.call  # type: ignore[attr-defined]


@keras.saving.register_keras_serializable("keras_tapefit")
class ModelWrapper(TapeModel):
    """A model of ours around one with a `call` of its own.

    Args:
        model: the model inside.
        name: of the model; by default that of the one inside.
    """

    def __init__(self, model: keras.Model, name: str | None = None) -> None:
        super().__init__(name=name or model.name)
        self.inner_model = model

    def build(self, input_shape: Any) -> None:
        if not self.inner_model.built:
            building.build(self.inner_model, {"input_shape": input_shape})

    def call(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        if training is not None and keras_trainer.takes_training(self.inner_model):
            kwargs["training"] = training
        return self.inner_model(inputs, **kwargs)

    def get_config(self) -> dict[str, Any]:
        return {
            "model": keras.saving.serialize_keras_object(self.inner_model),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"), custom_objects)
        return cls(model, **config)
