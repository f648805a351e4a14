"""Hooks on layer outputs, against gradients written out by hand in NumPy."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, backward, callbacks, hooks, plots

RNG = np.random.default_rng(5)
X, Y = RNG.normal(size=(12, 4)).astype("float32"), RNG.normal(size=(12, 2)).astype("float32")


COUNT = tf.Variable(0.0)


@keras.saving.register_keras_serializable("tests")
def reverse(gradient, layer):
    return -0.5 * gradient


@keras.saving.register_keras_serializable("tests")
def clip_examples(gradient, layer):
    norm = tf.norm(gradient, axis=-1, keepdims=True)
    return gradient / tf.maximum(1.0, norm / 0.05)


def make(seed=6, strategy=None):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, activation="relu", name="a")(inputs)
    return TapeModel(inputs, layers.Dense(2, name="b")(hidden))


def by_hand(weights, x=X, y=Y, fn=lambda g: g):
    """Returns gradients at the outputs of a and b, and of the four weights, in float64."""
    k1, b1, k2, b2 = (w.astype("float64") for w in weights)
    before = x @ k1 + b1
    hidden = np.maximum(before, 0)
    at_b = 2 * (hidden @ k2 + b2 - y) / y.size
    at_a = fn(at_b @ k2.T)
    back = at_a * (before > 0)
    return at_a, at_b, [x.T @ back, back.sum(0), hidden.T @ at_b, at_b.sum(0)], hidden


def compiled(*gradient_hooks, optimizer=None, **options):
    model = make()
    model.compile(
        optimizer or keras.optimizers.SGD(1.0), "mse", gradient_hooks=gradient_hooks, **options
    )
    return model


MODES = {
    "graph": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "update": {"jit_compile": "update"},
    "sharpness": {"backward": backward.SharpnessAware(0.0)},
    "parts": {"micro_batches": 3},
}


EVERYDAY = ("graph", "xla")


@pytest.mark.parametrize("mode", everyday(EVERYDAY, of=MODES))
def test_monitor(mode):
    model = compiled(hooks.OutputMonitor(), **MODES[mode])
    weights = model.get_weights()
    weights[1][:2] = -100.0
    model.set_weights(weights)
    at_a, at_b, _, hidden = by_hand(model.get_weights())
    logs = model.fit(X, Y, batch_size=12, verbose=0).history
    expected = {
        "output_gradient_norm/a": np.linalg.norm(at_a),
        "output_gradient_norm/b": np.linalg.norm(at_b),
        "output_dead_units/a": np.mean((hidden == 0).all(0)),
        "output_dead_units/b": 0.0,
    }
    assert expected["output_dead_units/a"] >= 0.4
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("mode", everyday(EVERYDAY, of=(m for m in MODES if m != "parts")))
@pytest.mark.parametrize("fn", [reverse, clip_examples])
def test_output_gradient(mode, fn):
    model = compiled(hooks.OutputGradient(fn, "a"), **MODES[mode])
    before = model.get_weights()
    model.fit(X, Y, batch_size=12, verbose=0)
    *_, gradients, _ = by_hand(before, fn=lambda g: np.asarray(fn(tf.constant(g), None)))
    for new, old, gradient in zip(model.get_weights(), before, gradients, strict=True):
        np.testing.assert_allclose(new, old - gradient, rtol=1e-5, atol=1e-6)


def test_the_second_pass_of_sharpness_aware_is_hooked_too():
    """With the branch of the head stopped, only the head moves, whatever pass it is."""
    stop = hooks.OutputGradient(lambda g, layer: tf.zeros_like(g), "a")
    for every in (1, 2):
        model = compiled(stop, backward=backward.SharpnessAware(0.5, every=every))
        before = model.get_weights()
        model.fit(X, Y, batch_size=4, verbose=0)
        for i, (new, old) in enumerate(zip(model.get_weights(), before, strict=True)):
            assert np.array_equal(new, old) == (i < 2)
        model.gradient_hooks.clear()


def test_a_monitor_sees_what_hooks_before_it_made():
    names = ("first", "second")
    model = compiled(
        hooks.OutputMonitor("a", name=names[0]),
        hooks.OutputGradient(reverse, "a"),
        hooks.OutputMonitor("a", name=names[1]),
    )
    logs = model.fit(X, Y, verbose=0).history
    first, second = (logs[f"{name}_gradient_norm/a"][0] for name in names)
    assert second == pytest.approx(0.5 * first)


def test_compute_gradients_is_hooked():
    model = compiled(hooks.OutputGradient(reverse, "a"))
    *_, expected, _ = by_hand(model.get_weights(), fn=lambda g: -0.5 * g)
    found = model.compute_gradients(X, Y).values()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_replicas_and_a_custom_step():
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )

    class Custom(TapeModel):
        def train_step(self, data):
            x, y = data
            with self.gradient_tape() as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            tape.minimize(loss)
            return {"loss": loss}

    def train(cls, with_replicas):
        with strategy.scope() if with_replicas else tf.name_scope(""):
            plain = make()
            model = cls(plain.inputs, plain.outputs[0])
            model.compile(
                keras.optimizers.SGD(0.5),
                "mse",
                gradient_hooks=[hooks.OutputGradient(clip_examples, "a"), hooks.OutputMonitor()],
            )
        # The last batch is uneven: 7 examples on two replicas.
        logs = model.fit(X[:11], Y[:11], batch_size=4, shuffle=False, verbose=0).history
        return model.get_weights(), logs

    weights, logs = train(TapeModel, False)
    for cls, with_replicas in ((TapeModel, True), (Custom, False), (Custom, True)):
        found, found_logs = train(cls, with_replicas)
        for a, b in zip(found, weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        for name in logs:
            if name != "loss":
                np.testing.assert_allclose(found_logs[name], logs[name], rtol=1e-5, err_msg=name)


def test_a_function_sees_true_gradients_under_a_loss_scale():
    seen = []

    def look(gradient, layer):
        seen.append(gradient.numpy())
        return gradient

    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=1024.0)
    weights = []
    for optimizer in (None, scaled):
        model = compiled(hooks.OutputGradient(look, "a"), optimizer=optimizer, run_eagerly=True)
        model.train_on_batch(X, Y)
        weights.append(model.get_weights())
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-6)
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_half_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        half = compiled(hooks.OutputMonitor(), hooks.OutputGradient(clip_examples, "a"))
        logs = half.fit(X, Y, batch_size=12, verbose=0).history
    finally:
        keras.config.set_dtype_policy(before)
    at_a, at_b, *_ = by_hand(make().get_weights())
    for name, value in (("a", at_a), ("b", at_b)):
        expected = np.linalg.norm(value)
        np.testing.assert_allclose(logs[f"output_gradient_norm/{name}"], expected, rtol=1e-2)


def test_a_window_logs_every_batch():
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    model = compiled(hooks.OutputMonitor(), optimizer=optimizer)
    history = callbacks.GradientHistory()
    weights = model.get_weights()
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0, callbacks=[history])
    expected = [np.linalg.norm(by_hand(weights, X[i : i + 4], Y[i : i + 4])[1]) for i in (0, 4, 8)]
    np.testing.assert_allclose(history["output_gradient_norm/b"], expected, rtol=1e-5)


def test_two_updates_in_one_step_each_count():
    """Of a custom step with two updates, each backward pass is logged; the mean is too."""

    class Two(TapeModel):
        def train_step(self, data):
            x, y = data
            for layer in self.layers[1:]:
                with self.gradient_tape() as tape:
                    loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
                tape.minimize(loss, variables=layer.trainable_variables)
            return {"loss": loss}

    plain = make()
    model = Two(plain.inputs, plain.outputs[0])
    model.compile(keras.optimizers.SGD(0.0), "mse", gradient_hooks=[hooks.OutputMonitor("b")])
    _, at_b, *_ = by_hand(model.get_weights())
    logs = model.fit(X, Y, batch_size=12, verbose=0).history
    assert logs["output_gradient_norm/b"][0] == pytest.approx(np.linalg.norm(at_b), rel=1e-5)


@pytest.mark.parametrize("in_step", [True, False])
def test_two_tapes_around_one_forward_pass_replace_once(in_step):
    """As a GAN has them: the gradient is not reversed twice."""

    def step(model, x, y):
        with model.gradient_tape() as one, model.gradient_tape() as other:
            loss = model.compute_loss(x=x, y=y, y_pred=model(x, training=True))
        one.minimize(loss, variables=model.layers[1].trainable_variables)
        other.minimize(loss, variables=model.layers[2].trainable_variables)
        return {"loss": loss}

    class Both(TapeModel):
        def train_step(self, data):
            return step(self, *data)

    plain = make()
    model = Both(plain.inputs, plain.outputs[0])
    watching = [hooks.OutputGradient(reverse, "a"), hooks.OutputMonitor("b")]
    model.compile(keras.optimizers.SGD(1.0), "mse", gradient_hooks=watching)
    before = model.get_weights()
    _, at_b, gradients, _ = by_hand(before, fn=lambda g: -0.5 * g)
    if in_step:
        logs = model.fit(X, Y, batch_size=12, verbose=0).history
        assert logs["output_gradient_norm/b"][0] == pytest.approx(np.linalg.norm(at_b), rel=1e-5)
    else:
        step(model, tf.constant(X), tf.constant(Y))
    # The second update is of weights that the first one has left alone.
    for new, old, gradient in zip(model.get_weights(), before, gradients, strict=True):
        np.testing.assert_allclose(new, old - gradient, rtol=1e-5, atol=1e-6)


def test_a_persistent_tape_that_is_asked_twice_counts_once():
    class Looking(TapeModel):
        def train_step(self, data):
            x, y = data
            with self.gradient_tape(persistent=True) as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            tape.gradient(loss, self.trainable_variables)
            tape.minimize(loss)
            return {"loss": loss}

    plain = make()
    model = Looking(plain.inputs, plain.outputs[0])
    model.compile(keras.optimizers.SGD(0.0), "mse", gradient_hooks=[hooks.OutputMonitor("b")])
    _, at_b, *_ = by_hand(model.get_weights())
    logs = model.fit(X, Y, batch_size=12, verbose=0).history
    assert logs["output_gradient_norm/b"][0] == pytest.approx(np.linalg.norm(at_b), rel=1e-5)


@pytest.mark.parametrize(
    ("fn", "error", "text"),
    [
        (lambda g, layer: g[:1], ValueError, r"output of layer 'a' in its shape .*\(1, 5\)"),
        (lambda g, layer: layer.bias.assign(g[0]), ValueError, r"layer 'a'.* shape \(5,\)"),
        (lambda g, layer: COUNT.assign_add(1.0), TypeError, "'a'. Received: a variable"),
        (lambda g, layer: "text", TypeError, "'a'. Received: 'text'"),
    ],
)
@pytest.mark.parametrize("eagerly", [True, False])
def test_errors_name_the_layer(fn, error, text, eagerly):
    model = compiled(hooks.OutputGradient(fn, "a", name="mine"), run_eagerly=eagerly)
    with pytest.raises(error, match=text):
        model.fit(X, Y, batch_size=12, verbose=0)
    model.gradient_hooks.clear()
    model.fit(X, Y, verbose=0)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="`fn` must be a function"):
        hooks.OutputGradient(3)
    with pytest.raises(TypeError, match="called with two arguments"):
        hooks.OutputGradient(lambda g: g)
    with pytest.raises(TypeError, match="`layers` must be a layer"):
        hooks.OutputMonitor(3)
    with pytest.raises(ValueError, match=r"looks at 'c\*'.*no layer.*\n  a\n  b"):
        compiled(hooks.OutputMonitor("c*")).fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="looks at layer 'other'"):
        compiled(hooks.OutputMonitor(layers.Dense(2, name="other"))).fit(X, Y, verbose=0)
    with pytest.raises(TypeError, match="takes no `targets`. Pass `layers`"):
        make().register_gradient_hook(hooks.OutputMonitor(), targets="a/*")


def test_what_cannot_be_is_refused_by_name():
    model = compiled(hooks.OutputMonitor(), backward=backward.PerExampleClipping(1.0))
    with pytest.raises(ValueError, match="'output_monitor' looks at.*PerExampleClipping"):
        model.fit(X, Y, verbose=0)

    class Past(TapeModel):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            self.apply_gradients(
                zip(
                    tape.gradient(loss, self.trainable_variables),
                    self.trainable_variables,
                    strict=True,
                )
            )
            return {"loss": loss}

    plain = make()
    model = Past(plain.inputs, plain.outputs[0])
    model.compile("sgd", "mse", gradient_hooks=[hooks.OutputGradient(reverse, "a")])
    with pytest.raises(ValueError, match="'output_gradient' looks at.*`train_step` of Past"):
        model.fit(X, Y, verbose=0)

    inputs = keras.Input((3,), dtype="int32")
    masked = layers.Dense(2, name="m")(layers.Embedding(5, 4, mask_zero=True)(inputs))
    single = layers.Dense(1, name="s")(layers.GlobalAveragePooling1D()(masked))
    model = TapeModel(inputs, {"m": masked, "s": single})
    model.compile(
        "sgd",
        {"m": "mse", "s": "mse"},
        gradient_hooks=[hooks.OutputGradient(reverse, "m")],
        micro_batches=2,
    )
    tokens = np.array([[1, 2, 0], [3, 0, 0], [1, 1, 1], [2, 0, 0]])
    targets = {"m": np.ones((4, 3, 2)), "s": np.ones((4, 1))}
    with pytest.raises(ValueError, match="'output_gradient'.*not all divided by the same number"):
        model.fit(tokens, targets, verbose=0)


def test_layers_are_saved_by_their_paths(tmp_path):
    model = make()
    chosen = [model.get_layer("a"), "b*"]
    model.compile("sgd", "mse", gradient_hooks=[hooks.OutputGradient(reverse, chosen)])
    model.fit(X, Y, verbose=0)
    config = json.loads(json.dumps(model.gradient_hooks[0].get_config()))
    assert config["layers"] == ["a", "b*"]
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.gradient_hooks[0].layers == ["a", "b*"]
    for each in (model, loaded):
        each.fit(X, Y, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_handles_and_names():
    model = compiled()
    handle = model.register_gradient_hook(hooks.OutputMonitor("a", name="mine"))
    assert "mine_gradient_norm/a" in model.fit(X, Y, verbose=0).history
    handle.remove()
    assert list(model.fit(X, Y, verbose=0).history) == ["loss"]
    model.gradient_hooks.add(hooks.OutputMonitor("a"))
    model.fit(X, Y, verbose=0)
    model.gradient_hooks["output_monitor"].layers = "b"
    assert "output_gradient_norm/b" in model.fit(X, Y, verbose=0).history


def test_a_picture_of_outputs():
    pytest.importorskip("matplotlib")
    model = TapeSequential([layers.Dense(3, name="a"), layers.Dense(2, name="b")])
    model.compile("sgd", "mse", gradient_hooks=[hooks.OutputMonitor()])
    history = callbacks.GradientHistory()
    model.fit(X, Y, verbose=0, callbacks=[history])
    (axes,) = plots.gradient_flow(history, of="outputs").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    (axes,) = plots.gradient_flow(history).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="`of` must be"):
        plots.gradient_flow(history, of="inputs")
    model.gradient_hooks.clear()
    model.fit(X, Y, verbose=0, callbacks=[history := callbacks.GradientHistory()])
    with pytest.raises(ValueError, match=r"Train with `hooks.OutputMonitor\(\)`"):
        plots.gradient_flow(history, of="outputs")
