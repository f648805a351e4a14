"""`tf.Variable` attributes, in the style of TensorFlow's guides, train and are saved."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

from . import support

TRUE_W, TRUE_B = 3.0, 2.0
X = np.linspace(-2, 2, 201, dtype="float32")
Y = X * TRUE_W + TRUE_B


class MyModel(TapeModel):
    """The class of TensorFlow's guide "Basic training loops", as it is written there."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Initialize the weights to `5.0` and the bias to `0.0`
        # In practice, these should be randomly initialized
        self.w = tf.Variable(5.0)
        self.b = tf.Variable(0.0)

    def call(self, x):
        return self.w * x + self.b


class Held(tf.Module):
    def __init__(self):
        super().__init__()
        self.scale = tf.Variable([1.0, 2.0], name="scale")
        self.fixed = tf.Variable(1.0, trainable=False, name="fixed")


@keras.saving.register_keras_serializable("bare_variables")
class Many(TapeModel):
    """Lists, dictionaries and modules of variables, beside a layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.listed = [tf.Variable([0.5, 0.5]), (tf.Variable(0.1),)]
        self.by_name = {"k": tf.Variable(0.2), "constant": tf.Variable(7.0, trainable=False)}
        self.module = Held()
        self.dense = layers.Dense(1)

    def call(self, x):
        x = x * self.listed[0] * self.module.scale + self.listed[1][0]
        return self.dense(x) + self.by_name["k"] * self.module.fixed


def test_the_guides_model_trains_as_its_loop_does():
    """The guide's loop by hand, on the whole batch with learning rate 0.1."""
    model = MyModel()
    model.compile(keras.optimizers.SGD(0.1), keras.losses.mean_squared_error)
    model.fit(X, Y, epochs=10, batch_size=len(X), verbose=0)

    w, b = tf.Variable(5.0), tf.Variable(0.0)
    for _ in range(10):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(Y - (w * X + b)))
        dw, db = tape.gradient(loss, [w, b])
        w.assign_sub(0.1 * dw)
        b.assign_sub(0.1 * db)
    np.testing.assert_allclose([model.w.numpy(), model.b.numpy()], [w.numpy(), b.numpy()], 1e-5)
    assert abs(model.b.numpy() - TRUE_B) < 0.5
    assert isinstance(model.w, tf.Variable)


def _many():
    support.begin()
    model = Many()
    model.compile("adam", "mse", gradient_hooks=[hooks.PercentileClipping()])
    return model


def _pairs():
    return np.stack([X, X**2], 1)


def test_every_kind_of_attribute():
    model = _many()
    model.fit(_pairs(), Y, verbose=0, epochs=1)
    paths = [v.path for v in model.trainable_variables]
    assert paths == [
        "many/listed_0",
        "many/listed_1_0",
        "many/by_name_k",
        "many/module_scale",
        "many/dense/kernel",
        "many/dense/bias",
    ]
    assert model.non_trainable_variables == []
    np.testing.assert_array_equal(model.listed[0], model.trainable_variables[0])
    assert all(model.listed[0].numpy() != 0.5) and all(model.module.scale.numpy() != [1.0, 2.0])
    assert model.listed[1][0].numpy() != np.float32(0.1) and model.by_name["k"].numpy() != 0.2
    assert model.by_name["constant"].numpy() == 7.0 and model.module.fixed.numpy() == 1.0


def test_saved_and_loaded(tmp_path):
    model = _many()
    model.fit(_pairs(), Y, verbose=0, epochs=1, shuffle=False)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    support.assert_same(support.values(loaded.variables), support.values(model.variables))
    np.testing.assert_array_equal(loaded.listed[0], model.listed[0])
    expected = model.fit(_pairs(), Y, verbose=0, epochs=2, shuffle=False).history
    assert loaded.fit(_pairs(), Y, verbose=0, epochs=2, shuffle=False).history == expected
    support.assert_same(support.values(loaded.variables), support.values(model.variables))

    other = Many()
    other(_pairs())
    other.load_weights(tmp_path / "model.weights.h5")
    assert support.differ(support.values(other.variables), support.values(model.variables))
    np.testing.assert_array_equal(other.by_name["constant"], 7.0)


def test_gradients_targets_and_freezing():
    model = _many()
    model(_pairs())
    gradients = model.compute_gradients(_pairs(), Y)
    assert gradients["listed_0"].shape == (2,)
    assert gradients[model.listed[0]] is gradients["listed_0"]
    model.freeze([model.listed[0], "many/module_*"])
    before = model.listed[0].numpy(), model.module.scale.numpy(), model.by_name["k"].numpy()
    model.fit(_pairs(), Y, verbose=0)
    np.testing.assert_array_equal(model.listed[0], before[0])
    np.testing.assert_array_equal(model.module.scale, before[1])
    assert model.by_name["k"].numpy() != before[2]


@pytest.mark.parametrize("when", ["twice", "replaced"])
def test_one_variable_counts_once(when):
    model = MyModel()
    if when == "twice":
        model.same = model.w
        model.again = [model.w]
    assert len(model.trainable_variables) == 2
    model.w.assign(4.0)
    assert float(model.trainable_variables[0].value) == 4.0


def test_a_variable_that_is_replaced_is_let_go():
    model = MyModel()
    old = model.w
    model.w = tf.Variable(1.0)
    assert [v.value for v in model.trainable_variables] == [model.b, model.w]
    # By something that is no variable, and by deleting it; held twice, let go once.
    model.b = 0.0
    assert [v.value for v in model.trainable_variables] == [model.w]
    del model.w
    assert model.trainable_variables == []
    model.list = [old, old]
    model.again = old
    model.list = None
    assert [v.value for v in model.trainable_variables] == [old]
    model.list = [tf.Variable(1.0)]
    model.list = [model.list[0], tf.Variable(2.0)]
    assert [float(v) for v in model.trainable_variables] == [5.0, 1.0, 2.0]


def test_a_built_model_takes_no_new_ones():
    """As with Keras, which does not see them at all."""
    model = MyModel()
    model.compile(keras.optimizers.SGD(0.1), keras.losses.mean_squared_error)
    model.fit(X, Y, verbose=0)
    model.best = tf.Variable(1.0)
    assert len(model.trainable_variables) == 2
    with pytest.warns(UserWarning, match=r"`w` was trained.*`model.w.assign"):
        model.w = tf.Variable(1.0)
    assert [v.value for v in model.trainable_variables] == [model.b]
    functional = support.functional()
    functional.note = tf.Variable(1.0)
    assert len(functional.trainable_variables) == 6


def _counting(base):
    """What a model keeps that is no weight: a counter, a queue, a table, an average."""

    class Counting(base):
        def __init__(self):
            super().__init__()
            self.steps = tf.Variable(0, dtype=tf.int64)
            self.flag = tf.Variable(True)
            self.names = tf.Variable(["a", "b"])
            self.queue = tf.Variable(tf.ones((4, 2)), trainable=False)
            self.parts = {"calls": tf.Variable(0), "mean": [tf.Variable(0.0, trainable=False)]}
            self.last = None
            self.dense = layers.Dense(1)

        def call(self, x):
            self.steps.assign_add(1)
            return self.dense(x)

        def train_step(self, data):
            self.queue.assign(tf.concat([self.queue[1:], data[0][:1]], 0))
            self.parts["mean"][0].assign(tf.reduce_mean(data[0]))
            return super().train_step(data)

    return Counting


def test_counters_and_queues_are_as_in_keras(tmp_path):
    """The same weights, optimizer and files, in both directions; no warning (an error here)."""

    def trained(base):
        support.begin()
        model = _counting(base)()
        model.compile(keras.optimizers.Adam(0.1), keras.losses.mean_squared_error)
        history = model.fit(_pairs(), Y, verbose=0, epochs=2).history
        model.last = tf.Variable([1, 2])
        model.last = tf.Variable([3, 4])
        state = [v.numpy() for v in (model.queue, model.parts["mean"][0], model.steps)]
        return model, history, state

    plain, expected, state = trained(keras.Model)
    model, history, found = trained(TapeModel)
    assert history == expected
    support.assert_same(found, state)
    support.assert_same(support.state_of(model), support.state_of(plain))
    assert [v.path for v in model.variables] == [v.path for v in plain.variables]
    for one, other in ((plain, model), (model, plain)):
        one.save_weights(tmp_path / "one.weights.h5")
        one.dense.kernel.assign(one.dense.kernel + 1.0)
        one.save_weights(tmp_path / "two.weights.h5")
        other.load_weights(tmp_path / "one.weights.h5")
        assert support.differ(one.get_weights(), other.get_weights())
        other.load_weights(tmp_path / "two.weights.h5")
        support.assert_same(one.get_weights(), other.get_weights())


class Plain(keras.Model):
    """The layers of `Many`, and a weight of its own, on plain Keras."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(shape=(2,), initializer="ones", name="scale")
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x * self.scale)


class WithBare(TapeModel):
    def __init__(self):
        super().__init__()
        self.bare = tf.Variable([3.0, 4.0])
        self.scale = self.add_weight(shape=(2,), initializer="ones", name="scale")
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x * self.scale * self.bare)


def test_files_of_plain_keras_fit_where_more_is_trained(tmp_path):
    """What Keras does not know lies beside the weights: it passes over it, both ways."""
    support.begin()
    plain, model = Plain(), WithBare()
    for each in (plain, model):
        each.compile("sgd", keras.losses.mean_squared_error)
        each.fit(_pairs(), Y, verbose=0)
    bare = model.bare.numpy()
    assert not np.array_equal(bare, [3.0, 4.0])
    assert len(model.trainable_variables) == 4
    plain.save_weights(tmp_path / "plain.weights.h5")
    model.save_weights(tmp_path / "model.weights.h5")
    model.bare.assign([0.0, 0.0])
    before = plain.get_weights()
    plain.load_weights(tmp_path / "model.weights.h5")
    assert support.differ(plain.get_weights(), before)
    np.testing.assert_array_equal(plain.dense.kernel, model.dense.kernel)
    np.testing.assert_array_equal(plain.scale, model.scale)
    np.testing.assert_array_equal(model.bare, [0.0, 0.0])
    model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(model.bare, bare)
    model.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_array_equal(model.bare, bare)
    support.assert_same([model.scale.numpy(), model.dense.kernel.numpy()], before[:2])


def test_names_that_meet(tmp_path):
    """An attribute may be named like the first variable of a list."""

    class Meeting(TapeModel):
        def __init__(self, start):
            super().__init__()
            self.a_0 = tf.Variable(start)
            self.a = [tf.Variable(start + 1.0), {"b": tf.Variable(start + 2.0)}]
            self.a_1_b = tf.Variable(start + 3.0)

    model, other = Meeting(1.0), Meeting(10.0)
    for each in (model, other):
        each.built = True
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert [float(v) for v in other.trainable_variables] == [1.0, 2.0, 3.0, 4.0]
