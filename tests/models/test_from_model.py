"""`TapeModel.from_model`: any model made into one of ours, weights shared."""

import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
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
    everyday(["functional", "subclass"], of=MODELS),
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


class OwnStep(keras.Model):
    """A step, a test step and a metric of its own, in Keras's words."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(1)
        self.mine = keras.metrics.Mean(name="mine")

    def call(self, x):
        return self.dense(x)

    @property
    def metrics(self):
        return [self.mine]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = 2.0 * keras.ops.mean(keras.ops.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.mine.update_state(loss)
        return {"mine": self.mine.result()}

    def test_step(self, data):
        return {"tested": keras.ops.mean(self(data[0]))}


class OwnLoss(Lazy):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 3.0 * keras.ops.mean(keras.ops.square(y - y_pred["out"]))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {**self.get_metrics_result(), "largest": keras.ops.max(y_pred["out"])}


class OwnFit(Lazy):
    """Preprocesses in its own `fit`, of another signature; has a `compile` of its own."""

    def __init__(self, scale=2.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def fit(self, raw, labels, **kwargs):
        return super().fit(self.scale * raw, {"out": labels}, **kwargs)

    def compile(self, rate=0.1, **kwargs):
        super().compile(optimizer=keras.optimizers.SGD(rate), loss="mse", **kwargs)


class OwnCompile(keras.Model):
    """Two optimizers and two parts, in the form of the GAN guide."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = layers.Dense(4), layers.Dense(1)

    def call(self, x):
        return self.second(self.first(x))

    def compile(self, first_optimizer, second_optimizer):
        super().compile()
        self.first_optimizer, self.second_optimizer = first_optimizer, second_optimizer

    def train_step(self, data):
        x, y = data
        for part, optimizer in (
            (self.first, self.first_optimizer),
            (self.second, self.second_optimizer),
        ):
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(keras.ops.square(self(x, training=True) - y))
            variables = part.trainable_variables
            gradients = tape.gradient(loss, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"mse": loss}


class Builds(keras.Model):
    """Makes its layers, and a weight of its own, once it knows the shape."""

    def build(self, input_shape):
        self.dense = layers.Dense(input_shape[-1])
        self.dense.build(input_shape)
        self.scale = self.add_weight(shape=(1,), initializer="ones", name="scale")

    def call(self, x):
        return keras.ops.mean(self.dense(x), axis=-1, keepdims=True) * self.scale

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.abs(y - y_pred))


class Task(keras.Model):
    """In the form of KerasHub's tasks: functional, with a preprocessor for raw strings."""

    def __init__(self, width=4, **kwargs):
        inputs = keras.Input((3,), dtype="int32")
        hidden = layers.GlobalAveragePooling1D()(layers.Embedding(9, width)(inputs))
        super().__init__(inputs=inputs, outputs=layers.Dense(1)(hidden), **kwargs)
        self.width = width
        self.compile()

    def preprocess(self, texts):
        lengths = [[min(len(word), 8) for word in text.split()] for text in texts]
        return np.array(lengths, "int32")

    def fit(self, x=None, y=None, batch_size=None, **kwargs):
        return super().fit(self.preprocess(x), y, batch_size=batch_size, **kwargs)

    def compile(self, optimizer="auto", loss="auto", *, metrics="auto", **kwargs):
        super().compile(
            optimizer="sgd" if optimizer == "auto" else optimizer,
            loss="mse" if loss == "auto" else loss,
            metrics=["mae"] if metrics == "auto" else metrics,
            **kwargs,
        )

    def get_config(self):
        return {"width": self.width, "name": self.name}


TEXTS = np.array(["one two three", "a bb ccc", "four fives six", "x yy zzz"])
OWN = {
    "step": (OwnStep, lambda m, **o: m.compile("adam", "mse", **o), (X, Y)),
    "loss": (OwnLoss, lambda m, **o: m.compile("adam", **o), (X, Y)),
    "fit": (OwnFit, lambda m, **o: m.compile(0.05, **o), (X, Y)),
    "compile": (OwnCompile, lambda m: m.compile(*map(keras.optimizers.SGD, (0.1, 0.2))), (X, Y)),
    "build": (Builds, lambda m, **o: m.compile("adam", **o), (X, Y)),
    "task": (Task, lambda m, **o: m.compile(**o), (TEXTS, Y[:4])),
}


@pytest.mark.parametrize("form", OWN)
def test_what_a_model_does_in_its_own_way_is_kept(form):
    cls, compile, data = OWN[form]

    def trained(convert):
        support.begin()
        source = cls()
        model = TapeModel.from_model(source) if convert else source
        compile(model)
        history = model.fit(*data, batch_size=4, epochs=2, verbose=0).history
        return source, model, history

    _, original, expected = trained(False)
    source, model, history = trained(True)
    assert history == expected
    assert isinstance(model, TapeModel) and isinstance(model, cls) and type(source) is cls
    # Shared with the source, which is as it was; and equal to what plain Keras made of it.
    support.assert_same(model.get_weights(), original.get_weights())
    support.assert_same(source.get_weights(), original.get_weights())
    pairs = zip(model.variables, source.variables, strict=True)
    assert all(a is b for a, b in pairs)
    if form != "compile":
        paths = [v.path for v in original.optimizer.variables]
        assert [v.path for v in model.optimizer.variables] == paths
    assert source is not model and source.compiled == (form == "task")
    if form == "step":
        assert "tested" in model.evaluate(X, Y, verbose=0, return_dict=True)
    assert callable(model.gradient_hooks.append)


@pytest.mark.parametrize("form", ["loss", "fit", "build", "task"])
def test_with_hooks_of_ours_it_is_saved_and_loaded(form, tmp_path):
    cls, compile, data = OWN[form]
    support.begin()
    model = TapeModel.from_model(cls())
    compile(model, gradient_hooks=[hooks.GlobalNormClipping(1e-3), hooks.GradientMonitor()])
    history = model.fit(*data, batch_size=4, epochs=1, verbose=0).history
    assert 0 < history["gradient_norm"][0] < 1.1e-3
    with support.custom_objects(cls), warnings.catch_warnings():
        # Keras's word on a `compile` of the model's own.
        warnings.filterwarnings("ignore", message="`compile\\(\\)` was not called")
        warnings.filterwarnings("ignore", message="(?s).*Skipping variable loading")
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        clone = keras.models.clone_model(model)
    assert isinstance(loaded, TapeModel) and isinstance(loaded, cls)
    support.assert_same(loaded.get_weights(), model.get_weights())
    assert [hook.name for hook in loaded.gradient_hooks] == [h.name for h in model.gradient_hooks]
    # Keras makes a plain functional model of one with an `__init__` of its own.
    assert isinstance(clone, TapeModel) and isinstance(clone, cls) == (form != "task")
    assert len(clone.gradient_hooks) == 2
    compile(loaded)
    assert "gradient_norm" in loaded.fit(*data, batch_size=4, verbose=0).history


def test_methods_on_the_instance_and_what_it_is_compiled_with():
    """A step put on the instance is the new model's; compiling one leaves the other."""
    support.begin()
    source = OwnLoss()
    source.mine = 1.0

    def train_step(self, data):
        self.seen = self.mine
        return type(self).train_step(self, data)

    source.train_step = types.MethodType(train_step, source)
    source.compile("sgd")
    optimizer = source.optimizer
    model = TapeModel.from_model(source)
    assert not model.compiled and source.optimizer is optimizer
    model.extra = keras.metrics.Mean()
    assert len(model.metrics) == len(source.metrics)
    model.mine = 2.0
    model.compile("adam")
    support.fit(model, y=Y)
    assert model.seen == 2.0 and not hasattr(source, "seen")
    assert source.optimizer is optimizer and int(optimizer.iterations) == 0
    support.fit(source, y=Y)
    assert source.seen == 1.0 and int(optimizer.iterations) == 3


def test_one_that_inherits_from_a_converted_functional_model():
    """Inputs, outputs and layers of a functional model with a class of its own."""
    support.begin()
    model = TapeModel.from_model(Task())
    inputs = keras.Input((3,), dtype="int32")
    outer = TapeModel(inputs, layers.Dense(2)(model(inputs)))
    assert outer(np.zeros((2, 3), "int32")).shape == (2, 2)
    inner = TapeModel(model.input, model.layers[1].output)
    assert inner(np.zeros((2, 3), "int32")).shape == (2, 3, 4)


def test_of_one_of_ours_and_of_what_is_no_model():
    model = support.functional()
    assert TapeModel.from_model(model) is model
    with pytest.raises(TypeError, match="must be a `keras.Model`.*Received: 3"):
        TapeModel.from_model(3)
    with pytest.raises(TypeError, match="Did you mean an instance of it"):
        TapeModel.from_model(Lazy)
