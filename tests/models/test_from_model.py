"""`TapeModel.from_model`: any model made into one of ours, weights shared."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, hooks

from . import support
from .support import STOCK, X, Y


def _structured():
    inputs = {"u": keras.Input((6,), name="u"), "v": keras.Input((1,), name="v")}
    hidden = layers.Concatenate()([inputs["u"], inputs["v"]])
    outputs = {"a": layers.Dense(1)(hidden), "b": [layers.Dense(2)(hidden)] * 2}
    return keras.Model(inputs, outputs, name="structured")


class Lazy(keras.Model):
    """A subclass whose outputs are a dictionary."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dropout = layers.Dropout(0.5)
        self.dense = layers.Dense(1)

    def call(self, x, training=None):
        return {"out": self.dense(self.dropout(x, training=training))}


class NoTraining(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x)


class Doubled(keras.Sequential):
    """A Sequential with a `call` of its own."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


MODELS = {
    "functional": lambda: support.functional(STOCK),
    "sequential": lambda: keras.Sequential([keras.Input((6,)), layers.Dense(1)], name="stack"),
    "sequential not built": lambda: keras.Sequential([layers.Dense(1)], name="stack"),
    "subclass": Lazy,
    "subclass without training": NoTraining,
    "sequential with a call": lambda: Doubled([layers.Dense(1)]),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("functional", "subclass") else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_it_shares_weights_and_trains_like_the_original(name):
    def trained(convert):
        support.begin()
        source = MODELS[name]()
        model = TapeModel.from_model(source) if convert else source
        y = {"out": Y} if name == "subclass" else Y
        model.compile("adam", "mse")
        history = support.fit(model, y=y, epochs=2)
        return source, model, history

    original, _, expected = trained(False)
    source, model, history = trained(True)
    assert isinstance(model, TapeModel) and model.name == source.name
    assert isinstance(model, TapeSequential) == name.startswith("sequential")
    assert history == expected
    support.assert_same(source.get_weights(), original.get_weights())
    shared = zip(model.trainable_variables, source.trainable_variables, strict=True)
    assert all(a is b for a, b in shared)
    support.assert_same(
        keras.tree.map_structure(np.asarray, model(X)),
        keras.tree.map_structure(np.asarray, source(X)),
    )


def test_the_structure_of_inputs_and_outputs_is_kept():
    source = _structured()
    model = TapeModel.from_model(source)
    outputs = model({"v": Y, "u": X})
    assert outputs.keys() == {"a", "b"} and len(outputs["b"]) == 2
    assert [v.path for v in model.variables] == [v.path for v in source.variables]
    assert model.name == "structured" and model.output_names == source.output_names


def test_keras_applications():
    support.begin()
    base = keras.applications.MobileNetV2(
        (32, 32, 3), alpha=0.35, weights=None, classes=2, include_top=True
    )
    model = TapeModel.from_model(base)
    model.compile(
        "sgd", "sparse_categorical_crossentropy", gradient_hooks=[hooks.GradientMonitor()]
    )
    model.freeze([layer for layer in model.layers[:-1] if layer.trainable_variables])
    x = support.RNG.normal(size=(2, 32, 32, 3)).astype("float32")
    before = base.get_weights()
    history = model.fit(x, np.array([1, 1]), verbose=0, batch_size=2).history
    assert history["gradient_norm"][0] > 0
    moved = [
        v.path
        for v, value in zip(base.weights, before, strict=True)
        if not np.array_equal(v.numpy(), value)
    ]
    # Nothing of what is frozen; the kernel only where its inputs are not all zero.
    assert moved and set(moved) <= {"predictions/kernel", "predictions/bias"}


@pytest.mark.parametrize("name", ["functional", "subclass", "sequential with a call"])
def test_a_converted_model_is_saved_and_loaded(name, tmp_path):
    support.begin()
    with support.custom_objects(Lazy, Doubled):
        model = TapeModel.from_model(MODELS[name]())
        model.compile("sgd", "mse", gradient_hooks=[hooks.GradientMonitor()])
        support.fit(model, y={"out": Y} if name == "subclass" else Y)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model) and len(loaded.gradient_hooks) == 1
    support.assert_same(loaded.get_weights(), model.get_weights())
    support.assert_same(
        keras.tree.map_structure(np.asarray, loaded(X)),
        keras.tree.map_structure(np.asarray, model(X)),
    )


def test_of_one_of_ours_and_of_what_is_no_model():
    model = support.functional()
    assert TapeModel.from_model(model) is model
    with pytest.raises(TypeError, match="must be a `keras.Model`.*Received: 3"):
        TapeModel.from_model(3)
    with pytest.raises(TypeError, match="Did you mean an instance of it"):
        TapeModel.from_model(Lazy)
