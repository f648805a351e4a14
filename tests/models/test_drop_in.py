"""Without hooks, `TapeModel` is `keras.Model` to the bit: each case runs on both."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from . import support
from .support import LABELS, OURS, RNG, STOCK, X, Y

WEIGHTS = RNG.uniform(0.5, 2.0, size=10).astype("float32")
TOKENS = RNG.integers(1, 7, size=(10, 5))
TOKENS[:, 3:] = 0
STEPS = RNG.normal(size=(10, 5, 1)).astype("float32")


def dict_outputs(kit):
    inputs = keras.Input((6,))
    hidden = layers.Dense(4, activation="tanh")(inputs)
    outputs = {"a": layers.Dense(1, name="a")(hidden), "b": layers.Dense(3, name="b")(hidden)}
    model = kit.Model(inputs, outputs)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        "adam",
        {"a": "mse", "b": cross_entropy},
        loss_weights={"a": 0.3, "b": 2.0},
        metrics={"a": ["mae"], "b": ["accuracy"]},
    )
    return model, X, {"a": Y, "b": LABELS}, {}


def list_outputs(kit):
    inputs = [keras.Input((6,)), keras.Input((1,))]
    hidden = layers.Concatenate()(inputs)
    model = kit.Model(inputs, [layers.Dense(1)(hidden), layers.Dense(1)(hidden)])
    model.compile("sgd", ["mse", "mae"], loss_weights=[1.0, 0.1], metrics=[["mae"], ["mse"]])
    return model, [X, Y], [Y, 2 * Y], {}


def dict_inputs_and_tuples(kit):
    inputs = {"u": keras.Input((6,), name="u"), "v": keras.Input((1,), name="v")}
    hidden = layers.Concatenate()([inputs["v"], inputs["u"]])
    model = kit.Model(inputs, (layers.Dense(1)(hidden), layers.Activation("tanh")(hidden)))
    model.compile("rmsprop", ("mse", None))
    return model, {"u": X, "v": Y}, (Y, np.zeros((10, 7), "float32")), {}


def lazy_with_training(kit):
    class Net(kit.Model):
        def __init__(self):
            super().__init__()
            self.hidden = layers.Dense(5)
            self.norm = layers.BatchNormalization()
            self.dropout = layers.Dropout(0.4, seed=3)
            self.noise = layers.GaussianNoise(0.1)
            self.last = [layers.Dense(4), {"out": layers.Dense(1)}]

        def call(self, x, training=False):
            x = self.noise(self.norm(self.hidden(x), training=training), training=training)
            x = self.last[0](self.dropout(x, training=training))
            return self.last[1]["out"](x)

    model = Net()
    model.compile("adam", "mse", metrics=["mae"])
    return model, X, Y, {}


def lazy_without_training(kit):
    class Net(kit.Model):
        def __init__(self):
            super().__init__()
            self.dropout = layers.Dropout(0.4)
            self.last = layers.Dense(1)

        def call(self, x):
            return self.last(self.dropout(x))

    model = Net()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model, X, Y, {}


def lazy_sequential(kit):
    model = kit.Sequential([layers.Dense(4, activation="relu"), layers.BatchNormalization()])
    model.add(layers.Dense(3, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, X, LABELS, {}


def nested_sequential(kit):
    inner = kit.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dropout(0.2)])
    model = kit.Sequential([inner, layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    return model, X, Y, {"validation_split": 0.3}


def graph_in_init(kit):
    class Net(kit.Model):
        def __init__(self, units):
            inputs = keras.Input((6,))
            hidden = layers.Dense(units, activation="relu")(inputs)
            super().__init__(inputs=inputs, outputs=layers.Dense(1)(hidden), name="net")
            self.units = units

    model = Net(4)
    model.compile("adam", "mse")
    return model, X, Y, {}


class Penalised(layers.Layer):
    def call(self, x):
        self.add_loss(0.01 * keras.ops.mean(keras.ops.square(x)))
        return x


def regularizers_and_add_loss(kit):
    inputs = keras.Input((6,))
    hidden = layers.Dense(4, kernel_regularizer="l2", activity_regularizer="l1")(inputs)
    model = kit.Model(inputs, layers.Dense(1, bias_regularizer="l1l2")(Penalised()(hidden)))
    model.compile("adam", "mse", metrics=["mae"])
    return model, X, Y, {}


def sample_weights(kit):
    model = kit.Sequential([layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"], weighted_metrics=["mse"])
    return model, X, Y, {"sample_weight": WEIGHTS}


def class_weights(kit):
    model = kit.Sequential([layers.Dense(3, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
    return model, X, LABELS, {"class_weight": {0: 1.0, 1: 3.0, 2: 0.25}}


def masks(kit):
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 3, mask_zero=True)(inputs)
    hidden = layers.LSTM(4, return_sequences=True)(hidden)
    model = kit.Model(inputs, layers.Dense(1)(hidden))
    model.compile("adam", "mse", metrics=["mae"])
    return model, TOKENS, STEPS, {}


def no_targets(kit):
    inputs = keras.Input((6,))
    model = kit.Model(inputs, Penalised()(layers.Dense(2)(inputs)))
    model.compile("adam")
    return model, X, None, {}


def old_compute_loss(kit):
    class Net(kit.Model):
        def compute_loss(self, x, y, y_pred, sample_weight):
            return keras.ops.mean((y - y_pred) ** 4) + keras.ops.mean(x) * 0.0

    inputs = keras.Input((6,))
    model = Net(inputs, layers.Dense(1)(inputs))
    model.compile("adam")
    return model, X, Y, {}


def new_compute_loss(kit):
    class Net(kit.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss * (3.0 if training else 1.0)

    inputs = keras.Input((6,))
    model = Net(inputs, layers.Dense(1)(inputs))
    model.compile("adam", "mse")
    return model, X, Y, {"sample_weight": WEIGHTS}


def own_compute_metrics(kit):
    class Net(kit.Model):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            logs = super().compute_metrics(x, y, y_pred, sample_weight)
            self.largest.update_state(keras.ops.max(y_pred))
            return {**logs, "largest": self.largest.result()}

    inputs = keras.Input((6,))
    model = Net(inputs, layers.Dense(1)(inputs))
    model.largest = keras.metrics.Mean(name="largest")
    model.compile("adam", "mse", metrics=["mae"])
    return model, X, Y, {}


def own_trackers(kit):
    """The pattern of Keras's guide: a step, trackers and a `metrics` property."""

    class Net(kit.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)
            self.total_tracker = keras.metrics.Mean(name="total_loss")
            self.error = keras.metrics.MeanAbsoluteError(name="error")

        def call(self, x):
            return self.dense(x)

        @property
        def metrics(self):
            return [self.total_tracker, self.error]

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = keras.ops.mean(keras.losses.mean_squared_error(y, y_pred))
            gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
            self.total_tracker.update_state(loss)
            self.error.update_state(y, y_pred)
            return {"loss": self.total_tracker.result(), "error": self.error.result()}

        def test_step(self, data):
            x, y = data
            self.error.update_state(y, self(x, training=False))
            return {"error": self.error.result()}

    model = Net()
    model.compile("adam")
    return model, X, Y, {}


def stock_custom_step(kit):
    """The step of Keras's guide that leaves metrics to `compile`; extra keys as they are."""

    class Net(kit.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics} | {"last": loss}

    inputs = keras.Input((6,))
    model = Net(inputs, layers.Dense(1)(inputs))
    model.compile("adam", "mse", metrics=["mae"])
    return model, X, Y, {}


def frozen_layer(kit):
    model = support.functional(kit)
    model.get_layer("norm").trainable = False
    model.compile("adam", "mse")
    return model, X, Y, {}


def _modes(**options):
    def mode(kit):
        model = support.functional(kit)
        model.compile("adam", "mse", metrics=["mae"], **options)
        return model, X, Y, {}

    return mode


def _optimizers(make):
    def optimized(kit):
        model = support.functional(kit)
        model.compile(make(), "mse")
        return model, X, Y, {}

    return optimized


o = keras.optimizers
CASES = {
    function.__name__: function
    for function in (
        dict_outputs,
        list_outputs,
        dict_inputs_and_tuples,
        lazy_with_training,
        lazy_without_training,
        lazy_sequential,
        nested_sequential,
        graph_in_init,
        regularizers_and_add_loss,
        sample_weights,
        class_weights,
        masks,
        no_targets,
        old_compute_loss,
        new_compute_loss,
        own_compute_metrics,
        own_trackers,
        stock_custom_step,
        frozen_layer,
    )
} | {
    "steps_per_execution": _modes(steps_per_execution=3),
    "jit_compile": _modes(jit_compile=True),
    "run_eagerly": _modes(run_eagerly=True),
    "clipnorm": _optimizers(lambda: o.Adam(0.01, global_clipnorm=0.5, amsgrad=True)),
    "schedule_and_ema": _optimizers(
        lambda: o.AdamW(o.schedules.ExponentialDecay(0.1, 2, 0.5), use_ema=True, clipvalue=0.1)
    ),
    "momentum": _optimizers(lambda: o.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "rmsprop": _optimizers(lambda: o.RMSprop(0.01, momentum=0.5, centered=True)),
}


def _outcome(kit, case):
    """Everything that a user can see of a training."""
    support.begin()
    model, x, y, options = case(kit)
    few = keras.tree.map_structure(lambda v: None if v is None else v[:3], (x, y))
    if "validation_split" not in options:
        options = {"validation_data": few if y is not None else few[0], **options}
    outcome = {
        "history": support.fit(model, x, y, epochs=2, **options),
        "evaluate": model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True),
        "names": [(model.name, v.path) for v in model.variables],
    }
    if case in (dict_outputs, lazy_with_training, masks):
        # These trace everything once more, so not for all.
        outcome["train_on_batch"] = model.train_on_batch(*few, return_dict=True)
        outcome["test_on_batch"] = model.test_on_batch(*few)
        outcome["predict"] = model.predict(few[0], verbose=0)
    outcome |= support.state_of(model)
    if case is frozen_layer:
        # Ours has state for what may be unfrozen later; Keras's cannot unfreeze.
        del outcome["optimizer"]
    return outcome


# What others have in them too, or what takes long.
SLOW = """jit_compile dict_outputs steps_per_execution clipnorm rmsprop list_outputs momentum
lazy_without_training nested_sequential class_weights graph_in_init own_trackers""".split()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, case in CASES.items()
    ],
)
def test_without_hooks_it_is_keras_model(case):
    expected = _outcome(STOCK, case)
    found = _outcome(OURS, case)
    support.assert_same(found, expected)
    assert len(expected["weights"]) and expected["history"]


def test_the_hand_written_loop_of_the_guides():
    """Tape, optimizer, metrics, as TensorFlow's guide writes them: same weights as `fit`."""

    def make():
        support.begin()
        model = support.functional()
        model.compile(keras.optimizers.Adam(0.01), "mse")
        return model

    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    model = make()
    loss_of = keras.losses.MeanSquaredError()
    mean = keras.metrics.Mean()

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        mean.update_state(loss, sample_weight=tf.shape(x)[0])

    means = []
    for _ in range(3):
        mean.reset_state()
        for x, y in batches:
            train_step(x, y)
        means.append(float(mean.result()))

    fitted = make()
    history = support.fit(fitted, batches, None, epochs=3, batch_size=None, shuffle=False)
    support.assert_same(support.values(fitted.variables), support.values(model.variables))
    assert history["loss"] == means


@pytest.mark.parametrize("kit", [STOCK, OURS], ids=["keras", "ours"])
def test_the_comparison_sees_a_difference(kit):
    """The table above would prove nothing if another seed gave the same."""
    expected = _outcome(kit, lazy_without_training)
    support.begin()
    keras.utils.set_random_seed(6)
    model, x, y, _ = lazy_without_training(kit)
    support.fit(model, x, y, epochs=2)
    assert support.differ(support.values(model.variables), expected["weights"])
