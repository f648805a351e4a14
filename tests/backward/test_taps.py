"""Taps against gradients that a plain tape takes at the same places."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
from keras import layers
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from tensorflow.python.eager.record import could_possibly_record

from keras_tapefit import TapeModel, TapeSequential, hooks
from keras_tapefit.backward.taps import Taps
from keras_tapefit.gradients.layers import layers_of, named_layers

RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(8, 4)).astype("float32"), RNG.normal(size=(8, 2)).astype("float32")


class Twice(layers.Layer):
    """Calls one layer twice, and returns a dictionary and a tuple."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(4, activation="tanh", name="inner")

    def call(self, inputs):
        once = self.inner(inputs)
        return {"first": once, "rest": (self.inner(once), once[:, :1])}


class Subclassed(TapeModel):
    def __init__(self):
        super().__init__()
        self.twice = Twice(name="twice")
        self.end = layers.Dense(2, name="end")

    def call(self, inputs):
        found = self.twice(inputs)
        return self.end(found["first"] + found["rest"][0] * found["rest"][1])


def functional():
    inputs = keras.Input((4,))
    found = Twice(name="twice")(inputs)
    hidden = found["first"] + found["rest"][0] * found["rest"][1]
    return TapeModel(inputs, layers.Dense(2, name="end")(hidden))


def nested():
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, activation="relu", name="a"),
            layers.Dense(4, name="c"),
        ],
        name="inside",
    )
    return TapeSequential([keras.Input((4,)), inner, layers.Dense(2, name="end")])


MODELS = {"functional": functional, "subclassed": Subclassed, "nested": nested}


class Everything(hooks.OutputMonitor):
    """Also takes up the gradients themselves, eagerly."""

    def _see_outputs(self, outputs):
        self.seen = [(t.path, t.call, t.passed_on, t.gradient(self)) for t, _ in outputs.of(self)]


def no_wrapper_is_left(model):
    return not any("call" in vars(layer) for layer in layers_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_at_outputs_are_those_of_a_plain_tape(name):
    keras.utils.set_random_seed(1)
    model = MODELS[name]()
    model(X)
    hook = Everything()
    model.compile(keras.optimizers.SGD(0.0), "mse", gradient_hooks=[hook], run_eagerly=True)
    model.train_on_batch(X, Y)
    assert no_wrapper_is_left(model)
    # A pass of our own, with taps of our own, on a tape that watches what they hand on.
    taps = Taps([hook], named_layers(model))
    with tf.GradientTape() as tape, taps.tapping():
        loss = tf.reduce_mean(tf.square(model(X, training=True) - Y))
    expected = tape.gradient(loss, [tap.passed_on for tap in taps.taps])
    assert len(hook.seen) == len(expected) >= 3
    for (path, call, _, found), tap, gradient in zip(hook.seen, taps.taps, expected, strict=True):
        assert (path, call) == (tap.path, tap.call)
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-7)
    if name != "nested":
        assert [(p, c) for p, c, *_ in hook.seen][:2] == [("twice/inner", 0), ("twice/inner", 1)]


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}])
@pytest.mark.parametrize("name", everyday(["functional"], of=MODELS))
def test_modes_log_the_same(name, options):
    def train(**kwargs):
        keras.utils.set_random_seed(1)
        model = MODELS[name]()
        model.compile("sgd", "mse", gradient_hooks=[hooks.OutputMonitor()], **kwargs)
        logs = model.fit(X, Y, epochs=2, batch_size=4, shuffle=False, verbose=0).history
        assert no_wrapper_is_left(model)
        return logs

    expected, found = train(jit_compile=False), train(**options)
    assert found.keys() == expected.keys() and len(found) > 6
    for entry in expected:
        np.testing.assert_allclose(found[entry], expected[entry], rtol=1e-5, err_msg=entry)


def test_an_exception_leaves_no_wrapper():
    class Failing(layers.Layer):
        def call(self, inputs):
            raise RuntimeError("by intent")

        def compute_output_shape(self, shape):
            return shape

    model = TapeSequential([layers.Dense(3), Failing()])
    model.compile("sgd", "mse", gradient_hooks=[hooks.OutputMonitor()], run_eagerly=True)
    with pytest.raises(RuntimeError, match="by intent"):
        model.train_on_batch(X, Y)
    assert no_wrapper_is_left(model)


def test_a_call_of_the_users_own_on_the_instance_stays():
    model = nested()
    layer = model.get_layer("end")
    mine = vars(layer)["call"] = lambda inputs, training=None: (
        layers.Dense.call(layer, inputs) * 2.0
    )
    hook = Everything("end")
    model.compile("sgd", "mse", gradient_hooks=[hook], run_eagerly=True)
    expected = model(X)
    model.train_on_batch(X, Y)
    np.testing.assert_array_equal(hook.seen[0][2], expected)
    assert vars(layer)["call"] is mine


def test_predicting_evaluating_and_saving_see_nothing(tmp_path):
    model = nested()
    calls = []
    hook = hooks.OutputGradient(lambda g, layer: calls.append(layer.name), "end")
    model.compile("sgd", "mse", gradient_hooks=[hook], run_eagerly=True)
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(X, training=True))
    tape.gradient(loss, model.trainable_variables)
    assert calls == []
    model.train_on_batch(X, Y)
    assert calls == ["end"]


def test_another_thread_sees_nothing():
    started, go_on = threading.Event(), threading.Event()

    class Waiting(layers.Layer):
        def call(self, inputs):
            if threading.current_thread() is not other:
                started.set()
                assert go_on.wait(30)
            return inputs

    model = TapeSequential([layers.Dense(3, name="a"), Waiting(), layers.Dense(2, name="b")])
    found = []

    def predict():
        assert started.wait(30)
        try:
            found.append(model(X))
        finally:
            go_on.set()

    other = threading.Thread(target=predict)
    hook = Everything()
    model.compile("sgd", "mse", gradient_hooks=[hook], run_eagerly=True)
    go_on.set()
    model(X)
    started.clear()
    go_on.clear()
    other.start()
    model.train_on_batch(X, Y)
    other.join()
    assert len(found) == 1 and [path for path, *_ in hook.seen][::2] == ["a", "b"]
    assert no_wrapper_is_left(model)


def test_masks_reach_the_loss():
    def train(*gradient_hooks):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((3,), dtype="int32")
        hidden = layers.Embedding(5, 4, mask_zero=True)(inputs)
        model = TapeModel(inputs, layers.Dense(2)(hidden))
        model.compile("sgd", "mse", gradient_hooks=gradient_hooks)
        tokens = np.array([[1, 2, 0], [3, 0, 0]])
        targets = np.ones((2, 3, 2), "float32")
        return model.fit(tokens, targets, epochs=2, verbose=0).history["loss"]

    np.testing.assert_allclose(train(hooks.OutputMonitor()), train(), rtol=1e-6)


def test_inside_a_loop_only_what_is_named_is_an_error():
    def model(hook):
        built = TapeSequential(
            [keras.Input((5, 4)), layers.RNN(layers.LSTMCell(3, name="cell"), name="rnn")]
        )
        built.compile("sgd", "mse", gradient_hooks=[hook])
        return built

    data = RNG.normal(size=(8, 5, 4)), RNG.normal(size=(8, 3))
    logs = model(hooks.OutputMonitor()).fit(*data, verbose=0).history
    assert "output_gradient_norm/rnn" in logs and "output_gradient_norm/rnn/cell" not in logs
    with pytest.raises(ValueError, match=r"layer 'rnn/cell' \(LSTMCell\) cannot.*a loop, a branch"):
        model(hooks.OutputMonitor("rnn/cell")).fit(*data, verbose=0)


def test_rematerialized_layers_are_refused_by_name():
    class Doubled(layers.Layer):
        def call(self, inputs):
            return tf.tanh(2.0 * inputs)

    def model(hook):
        with keras.RematScope(mode="full"):
            again = Doubled(name="again")
        built = TapeSequential([keras.Input((4,)), again, layers.Dense(2, name="end")])
        built.compile("sgd", "mse", gradient_hooks=[hook])
        return built

    logs = model(hooks.OutputMonitor()).fit(X, Y, verbose=0).history
    assert "output_gradient_norm/end" in logs and "output_gradient_norm/again" not in logs
    with pytest.raises(ValueError, match="'again'.* cannot be looked at.*RematScope"):
        model(hooks.OutputMonitor("again")).fit(X, Y, verbose=0)


def test_functions_with_a_gradient_of_their_own_are_refused_by_name():
    class Again(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = layers.Dense(4, name="inner")

        def call(self, inputs):
            return keras.remat(self.inner)(inputs)

    for options in ({}, {"run_eagerly": True}):
        model = TapeSequential([Again(name="again"), layers.Dense(2)])
        model(X)
        model.compile("sgd", "mse", gradient_hooks=[hooks.OutputMonitor("*inner")], **options)
        with pytest.raises(ValueError, match="'again/inner'.* a function with a gradient of its"):
            model.train_on_batch(X, Y)


def test_a_gradient_that_the_model_takes_itself_is_left_alone():
    """A penalty on the gradient at the input: the inner backward pass is none of ours."""

    class Penalized(TapeModel):
        def __init__(self):
            super().__init__()
            self.a = layers.Dense(4, activation="tanh", name="a")
            self.b = layers.Dense(2, name="b")

        def call(self, inputs):
            inputs = tf.convert_to_tensor(inputs)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = self.b(self.a(inputs))
            slope = tape.gradient(outputs, inputs)
            self.add_loss(tf.reduce_mean(tf.square(slope)))
            return outputs

    def weights(*gradient_hooks):
        keras.utils.set_random_seed(4)
        model = Penalized()
        model(X)
        model.compile("sgd", "mse", gradient_hooks=gradient_hooks)
        model.train_on_batch(X, Y)
        return model.get_weights()

    seen = []

    def look(gradient, layer):
        seen.append(layer.name)

    for a, b in zip(weights(hooks.OutputGradient(look)), weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert seen == ["b", "a"]


def test_without_hooks_nothing_is_tapped(monkeypatch):
    monkeypatch.setattr(Taps, "__init__", lambda *a: pytest.fail("taps were made"))
    model = nested()
    model.compile("sgd", "mse", gradient_hooks=[hooks.GradientMonitor()])
    model.fit(X, Y, verbose=0)


def one_row(dense):
    return lambda row: dense(row[None])[0]


# Runs a layer where a graph has another graph, or where all examples are computed as one.
APART = {
    "a recurrent layer": lambda rnn, x: rnn(x[:, None]),
    "tf.cond": lambda dense, x: tf.cond(x[0, 0] < 9.0, lambda: dense(x), lambda: x),
    "keras.ops.cond": lambda dense, x: keras.ops.cond(x[0, 0] < 9.0, lambda: dense(x), lambda: x),
    "tf.switch_case": lambda dense, x: tf.switch_case(tf.size(x) * 0, [lambda: dense(x)] * 2),
    "tf.case": lambda dense, x: tf.case([(x[0, 0] < 9.0, lambda: dense(x))], lambda: x),
    "keras.ops.fori_loop": lambda dense, x: keras.ops.fori_loop(0, 2, lambda _, x: dense(x), x),
    "tf.map_fn": lambda dense, x: tf.map_fn(one_row(dense), x),
    "tf.vectorized_map": lambda dense, x: tf.vectorized_map(one_row(dense), x),
}


class Apart(layers.Layer):
    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how, is_cell = how, how == "a recurrent layer"
        self.inner = layers.LSTMCell(4, name="i") if is_cell else layers.Dense(4, name="i")
        self.called = layers.RNN(self.inner, name="rnn") if is_cell else self.inner

    def build(self, shape):
        self.called.build((None, 1, 4) if self.called is not self.inner else shape)

    def call(self, x):
        return APART[self.how](self.called, x)


@pytest.mark.parametrize("how", APART)
def test_what_cannot_be_looked_at_in_a_graph_cannot_in_eager_mode(how):
    found = {}
    for eager in (False, True):
        keras.utils.set_random_seed(4)
        inputs = keras.Input((4,))
        model = TapeModel(inputs, layers.Dense(2, name="end")(Apart(how, name="apart")(inputs)))
        halve = hooks.OutputGradient(lambda g, _: 0.5 * g)
        given = [halve, hooks.OutputMonitor()]
        model.compile("sgd", "mse", gradient_hooks=given, run_eagerly=eager, jit_compile=False)
        log = model.fit(X, Y, epochs=2, shuffle=False, verbose=0).history
        assert not [name for name in log if name.endswith("/i")]
        found[eager] = {**log, **{v.path: v.numpy() for v in model.trainable_variables}}
        model.gradient_hooks.set([hooks.OutputMonitor(layers="apart/*i")])
        with pytest.raises(
            ValueError, match="'apart/.*i' .* cannot be looked at.*a loop, a branch"
        ):
            model.train_on_batch(X, Y)
        # Nothing is left behind in TensorFlow.
        with tf.distribute.OneDeviceStrategy("cpu:0").scope():
            pass
    assert found[False].keys() == found[True].keys()
    for name, value in found[False].items():
        np.testing.assert_allclose(found[True][name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_private_names():
    layer = layers.Dense(2)
    assert layer._remat_mode is None and not in_symbolic_scope()
    with keras.RematScope(mode="full"):
        assert layers.Dense(2)._remat_mode is not None
    assert not could_possibly_record()
    with tf.GradientTape() as tape:
        assert could_possibly_record()
        with tape.stop_recording():
            assert not could_possibly_record()
    mask = layers.Embedding(3, 2, mask_zero=True)(np.array([[0, 1]]))
    assert get_keras_mask(mask) is not None
    paths = [path for path, _ in named_layers(nested())]
    assert paths[:2] == ["inside", "inside/a"] and paths[-1] == "end" and len(paths) == 4
