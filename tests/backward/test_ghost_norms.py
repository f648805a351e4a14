"""Norms from layer inputs and output gradients, against a loop over examples in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, backward, callbacks

SIZE = 6


def mlp():
    return TapeSequential(
        [
            keras.Input((5,)),
            layers.Dense(7, "relu", kernel_regularizer=keras.regularizers.L2(0.1)),
            layers.LayerNormalization(gamma_regularizer="l2"),
            layers.Dense(3, use_bias=False, activation="softmax"),
        ]
    )


def images():
    return TapeSequential(
        [
            keras.Input((7, 6, 2)),
            layers.Conv2D(3, (3, 2), strides=2, padding="same", activation="tanh"),
            layers.Conv2D(4, 2, dilation_rate=(1, 2), padding="same"),
            layers.AveragePooling2D(2, padding="same"),
            layers.LayerNormalization(axis=(-2, -1), scale=False),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def series():
    return TapeSequential(
        [
            keras.Input((9, 2)),
            layers.Conv1D(3, 3, padding="causal", dilation_rate=2, activation="gelu"),
            layers.Conv1D(3, 2, strides=2),
            layers.GlobalMaxPooling1D(),
            layers.Dense(3),
        ]
    )


def volume():
    return TapeSequential(
        [
            keras.Input((4, 4, 4, 1)),
            layers.Conv3D(2, 2, activation="softplus"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def transformer():
    inputs = keras.Input((8,), dtype="int32")
    hidden = layers.Embedding(5, 6)(inputs)
    attended = layers.MultiHeadAttention(2, 3)(hidden, hidden)
    hidden = layers.LayerNormalization()(hidden + attended)
    wide = layers.Dense(12, "gelu")(hidden)
    hidden = layers.LayerNormalization()(hidden + layers.Dense(6)(wide))
    return TapeModel(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(hidden)))


class Twice(TapeModel):
    """One layer called twice, with other places each time; a weight without influence."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(5, 4)
        self.both = layers.Dense(4, "tanh", bias_regularizer="l2")
        self.product = layers.EinsumDense("...ab,bcd->...acd", (None, 2, 2), bias_axes="d")
        self.end = layers.Dense(3)
        self.unused = layers.Dense(2)
        self.unused.build((None, 4))

    def call(self, inputs):
        hidden = self.both(self.table(inputs))
        hidden = self.both(hidden[:, :3]) + self.table(inputs[:, :3])
        flat = self.product(hidden)
        return self.end(tf.reshape(flat, [-1, 12]))


class Einsums(TapeModel):
    """Equations with several axes in and out."""

    def __init__(self):
        super().__init__()
        self.first = layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de")
        self.second = layers.EinsumDense("abde,dec->abc", (None, 4), bias_axes="c")
        self.third = layers.EinsumDense("abc,bcf->af", (3,))

    def call(self, inputs):
        return self.third(tf.tanh(self.second(self.first(inputs))))


def floats(*shape):
    return np.random.default_rng(1).normal(size=(SIZE, *shape))


def tokens(length):
    return np.random.default_rng(2).integers(0, 5, (SIZE, length))


MODELS = {
    "mlp": (mlp, lambda: floats(5)),
    "images": (images, lambda: floats(7, 6, 2)),
    "series": (series, lambda: floats(9, 2)),
    "volume": (volume, lambda: floats(4, 4, 4, 1)),
    "transformer": (transformer, lambda: tokens(8)),
    "twice": (Twice, lambda: tokens(7)),
    "einsums": (Einsums, lambda: floats(5, 4)),
}


def loop(model, loss, x, y, max_norm, weights=None):
    """Returns the mean of the clipped gradients of batches of one, and the share clipped."""
    total, clipped = None, 0
    for i in range(len(x)):
        part = slice(i, i + 1)
        with tf.GradientTape() as tape:
            outputs = model(x[part], training=True)
            value = loss(y[part], outputs, None if weights is None else weights[part])
            value += sum(model.losses)
        found = tape.gradient(value, [v.value for v in model.trainable_variables])
        found = [
            np.zeros(v.shape) if g is None else tf.convert_to_tensor(g).numpy().astype("float64")
            for g, v in zip(found, model.trainable_variables, strict=True)
        ]
        norm = np.sqrt(sum(np.sum(g**2) for g in found))
        clipped += norm > max_norm
        found = [g * min(1.0, max_norm / norm) for g in found]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    return [g / len(x) for g in total], clipped / len(x)


def built(name, method, loss="mse", **options):
    make, data = MODELS[name]
    keras.utils.set_random_seed(4)
    model, x = make(), data()
    model(x[:1])
    for v in model.trainable_variables:
        # None at a special value, such as 0.
        v.assign(v + np.random.default_rng(3).normal(size=v.shape) * 0.1)
    model.compile(keras.optimizers.SGD(0.1), loss, backward=method, **options)
    return model, x


def middle_norm(name, loss, y):
    model, x = built(name, None)
    norms = [loop(model, loss, x[i : i + 1], y[i : i + 1], 1e9)[0] for i in range(SIZE)]
    # A number that float32 has too, in which the method keeps it.
    return float(
        np.float32(np.median([np.sqrt(sum(np.sum(g**2) for g in found)) for found in norms]))
    )


@pytest.mark.parametrize("name", everyday(["mlp", "transformer", "twice", "images"], of=MODELS))
def test_equals_a_loop_in_float64(name, float64):
    y = floats(3)
    loss = keras.losses.MeanSquaredError()
    max_norm = middle_norm(name, loss, y)
    method = backward.PerExampleClipping(max_norm)
    model, x = built(name, method)
    expected, _ = loop(model, loss, x, y, max_norm)
    found = model.compute_gradients(x, y)
    assert method.fell_back is None
    for variable, wanted in zip(model.trainable_variables, expected, strict=True):
        gradient = found[variable]
        gradient = np.zeros(variable.shape) if gradient is None else np.asarray(gradient)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-11, err_msg=variable.path)


MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("mode", everyday(["graph"], of=MODES))
@pytest.mark.parametrize("name", everyday(["transformer"], of=MODELS))
def test_a_step_equals_a_loop(name, mode):
    y = floats(3)
    loss = keras.losses.MeanSquaredError()
    max_norm = middle_norm(name, loss, y)
    method = backward.PerExampleClipping(max_norm)
    model, x = built(name, method, **MODES[mode])
    before = model.get_weights()
    expected, share = loop(model, loss, x, y, max_norm)
    places = {id(v): i for i, v in enumerate(model.weights)}
    logs = model.fit(x, y, batch_size=SIZE, verbose=0).history
    assert method.fell_back is None and 0.0 < share < 1.0
    assert logs["clipped_examples"] == [pytest.approx(share)]
    after = model.get_weights()
    for variable, gradient in zip(model.trainable_variables, expected, strict=True):
        i = places[id(variable)]
        np.testing.assert_allclose(after[i], before[i] - 0.1 * gradient, rtol=1e-5, atol=1e-6)


def masked():
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(5, 4, mask_zero=True)(inputs)
    return TapeModel(inputs, layers.Dense(3, activation="softmax")(hidden))


LOSSES = {
    "masked": {},
    "ignored": {"ignore_class": 1},
    "sum": {"reduction": "sum"},
    "weighted": {"reduction": "mean_with_sample_weight"},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_batch_of_one(name, weighted, float64):
    x = tokens(5)
    x[0, 1:] = 0
    y = np.random.default_rng(5).integers(0, 3, (SIZE, 5))
    weights = np.random.default_rng(6).uniform(0.5, 2.0, (SIZE, 1)) if weighted else None
    keras.utils.set_random_seed(1)
    model = masked()
    method = backward.PerExampleClipping(0.25)
    loss = keras.losses.SparseCategoricalCrossentropy(**LOSSES[name])
    model.compile("sgd", loss, backward=method)
    expected, _ = loop(model, loss, x, y, 0.25, weights)
    found = model.compute_gradients(x, y, weights)
    assert method.fell_back is None
    for gradient, wanted in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(np.asarray(gradient), wanted, rtol=1e-8, atol=1e-10)


def test_several_outputs_with_weights(float64):
    inputs = keras.Input((5,))
    hidden = layers.Dense(4, "tanh")(inputs)
    model = TapeModel(inputs, {"a": layers.Dense(1)(hidden), "b": layers.Dense(2)(hidden)})
    method = backward.PerExampleClipping(0.25)
    model.compile(
        "sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 0.3, "b": 2.0}, backward=method
    )
    x, y = floats(5), {"a": floats(1), "b": floats(2)}
    total = None
    for i in range(SIZE):
        with tf.GradientTape() as tape:
            out = model(x[i : i + 1])
            value = 0.3 * tf.reduce_mean((out["a"] - y["a"][i]) ** 2)
            value += 2.0 * tf.reduce_mean(tf.abs(out["b"] - y["b"][i]))
        found = [g.numpy() for g in tape.gradient(value, model.trainable_variables)]
        norm = np.sqrt(sum(np.sum(g**2) for g in found))
        found = [g * min(1.0, 0.25 / norm) / SIZE for g in found]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    gradients = model.compute_gradients(x, y).values()
    assert method.fell_back is None
    for a, b in zip(gradients, total, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


class Elsewhere(TapeModel):
    """Reads the kernel of a layer outside of its call."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)
        self.dense.build((None, 5))
        self.end = layers.Dense(3)

    def call(self, inputs):
        return self.end(self.dense(inputs) + tf.reduce_sum(self.dense.kernel))


class Tied(TapeModel):
    """Two layers with one kernel."""

    def __init__(self):
        super().__init__()
        self.one, self.other = layers.Dense(5), layers.Dense(5)
        self.one.build((None, 5))
        self.other.build((None, 5))
        self.other._tracker.unlock()
        self.other._kernel = self.one._kernel
        self.end = layers.Dense(3)

    def call(self, inputs):
        return self.end(self.other(tf.tanh(self.one(inputs))))


class Folded(TapeModel):
    """Gives a layer the places of all examples as rows."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4, "tanh")
        self.end = layers.Dense(3)

    def call(self, inputs):
        rows = self.dense(tf.reshape(inputs, [-1, 2]))
        return self.end(tf.reshape(rows, [-1, 8]))


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": False}])
def test_a_layer_that_gets_other_rows_than_examples(options):
    keras.utils.set_random_seed(0)
    model = Folded()
    x, y = floats(2, 2).astype("float32"), floats(3).astype("float32")
    model(x)
    method = backward.PerExampleClipping(0.25)
    model.compile(keras.optimizers.SGD(1.0), "mse", backward=method, **options)
    before = model.get_weights()
    expected, _ = loop(model, lambda y, p, w: tf.reduce_mean(tf.square(y - p)), x, y, 0.25)
    model.fit(x, y, batch_size=SIZE, verbose=0)
    assert "first axis" in method.fell_back
    for new, old, wanted in zip(model.get_weights(), before, expected, strict=True):
        np.testing.assert_allclose(new, old - wanted, rtol=1e-4, atol=1e-6)


def test_unfrozen_after_it_was_built():
    """Reads of weights outside of their layer are seen then too."""
    keras.utils.set_random_seed(0)
    model = Elsewhere()
    model.trainable = False
    x, y = floats(5).astype("float32"), floats(3).astype("float32")
    model(x)
    model.trainable = True
    method = backward.PerExampleClipping(0.25)
    model.compile("sgd", "mse", backward=method)
    model.compute_gradients(x, y)
    assert method.fell_back is not None


def fallen(name):
    if name == "elsewhere":
        return Elsewhere(), "outside of the one that holds it"
    if name == "tied":
        return Tied(), "is read in several layers"
    if name == "activity":
        stack = [keras.Input((5,)), layers.Dense(4, activity_regularizer="l2"), layers.Dense(3)]
        return TapeSequential(stack), "a loss that a layer adds"
    if name == "loss":
        return TapeSequential([keras.Input((5,)), layers.Dense(3)]), "may mix examples"
    raise KeyError(name)


@pytest.mark.parametrize(
    "name",
    everyday(["elsewhere"], of=["elsewhere", "tied", "activity", "loss"]),
)
def test_what_is_not_known_is_computed_the_slow_way(name, caplog):
    keras.utils.set_random_seed(0)
    model, text = fallen(name)
    x, y = floats(5).astype("float32"), floats(3).astype("float32")
    method = backward.PerExampleClipping(0.25)
    plain = lambda y, p: tf.reduce_mean(tf.square(y - p), axis=-1)  # noqa: E731
    model.compile("sgd", plain if name == "loss" else "mse", backward=method)
    expected, _ = loop(model, lambda y, p, w: tf.reduce_mean(tf.square(y - p)), x, y, 0.25)
    for _ in range(2):
        found = model.compute_gradients(x, y)
    assert text in method.fell_back
    ours = [r.getMessage() for r in caplog.records if r.name == "keras_tapefit"]
    assert len(ours) == 1 and text in ours[0]
    for variable, wanted in zip(model.trainable_variables, expected, strict=True):
        gradient = found[variable]
        gradient = np.zeros(variable.shape) if gradient is None else np.asarray(gradient)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_norms_neither_overflow_nor_underflow(size):
    keras.utils.set_random_seed(0)
    model = TapeSequential(
        [keras.Input((3, 4)), layers.Dense(8), layers.Flatten(), layers.Dense(1)]
    )
    x, y = floats(3, 4).astype("float32"), floats(1).astype("float32")
    for chosen in (1.0, size):
        method = backward.PerExampleClipping(0.5 * chosen)
        model.compile("sgd", "mae", loss_weights=[chosen], backward=method)
        found = [np.asarray(g, "float64") / chosen for g in model.compute_gradients(x, y).values()]
        assert method.fell_back is None
        if chosen == 1.0:
            expected = found
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1e18])
def test_squares_that_float32_loses_count_where_they_matter(size, jit_compile):
    """Output gradients of 2e-20 and less: of the large inputs they make more than the bound."""
    x = np.array([[3.0, 4.0], [0.3, 0.4], [3e-9, 4e-9]]) * size
    model = TapeSequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.0], [0.0]])
    method = backward.PerExampleClipping(0.02)
    arguments = {"loss_weights": [1e-20], "backward": method, "jit_compile": jit_compile}
    model.compile("sgd", "mse", **arguments)
    [found] = model.compute_gradients(x.astype("float32"), np.full((3, 1), -1.0)).values()
    each = 2e-20 * x
    norms = np.linalg.norm(each, axis=1, keepdims=True)
    expected = (each * np.minimum(1.0, 0.02 / norms)).mean(0)
    assert method.fell_back is None and (norms[0] > 0.02) == (size > 1.0)
    np.testing.assert_allclose(np.asarray(found)[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["mlp", "images", "einsums"])
def test_an_example_that_is_not_finite_counts_as_zero(name, bad):
    y = floats(3)
    method = backward.PerExampleClipping(0.5)
    model, x = built(name, method)
    others = [0, 1, 3, 4, 5]
    expected = model.compute_gradients(x[others], y[others]).scale(5 / 6)
    x[2] = bad
    found = model.compute_gradients(x, y)
    assert method.fell_back is None
    constant = [v.regularizer is not None for v in model.trainable_variables]
    for a, b, _ in zip(found.values(), expected.values(), constant, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_frozen_weights_count_for_nothing(float64):
    y = floats(3)
    loss = keras.losses.MeanSquaredError()
    method = backward.PerExampleClipping(0.25)
    model, x = built("transformer", method)
    model.layers[1].trainable = False
    expected, _ = loop(model, loss, x, y, 0.25)
    found = model.compute_gradients(x, y)
    assert method.fell_back is None and len(found) == len(expected)
    for a, b in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_half_precision():
    y, loss = floats(3), keras.losses.MeanSquaredError()
    expected, _ = loop(built("transformer", None)[0], loss, tokens(8), y, 0.25)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        method = backward.PerExampleClipping(0.25)
        model, x = built("transformer", method)
    finally:
        keras.config.set_dtype_policy(before)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=64.0)
    model.compile(optimizer, "mse", backward=method)
    found = model.compute_gradients(x, y)
    assert method.fell_back is None
    for a, b in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=2e-3)


def test_no_noise_is_drawn_without_noise(monkeypatch):
    from keras_tapefit.gradients import draws

    drawn = []
    plain = draws.normal
    monkeypatch.setattr(draws, "normal", lambda *a: drawn.append(a) or plain(*a))
    method = backward.PerExampleClipping(0.5, seed=1)
    model, x = built("mlp", method)
    quiet = model.compute_gradients(x, floats(3))
    assert not drawn
    method.noise_multiplier = 1.0
    loud = model.compute_gradients(x, floats(3))
    assert drawn and np.abs(np.asarray(loud.values()[0]) - quiet.values()[0]).max() > 1e-3


@pytest.mark.slow
def test_one_trace_whatever_the_noise():
    method = backward.PerExampleClipping(0.5, seed=1)
    model, x = built("mlp", method, jit_compile=True)
    history = callbacks.GradientHistory()
    for noise in (0.0, 1.0):
        method.noise_multiplier = noise
        model.fit(x, floats(3), batch_size=3, verbose=0, callbacks=[history])
    assert len(model.train_function._traces) == 1


@pytest.mark.slow
def test_replicas_and_accumulated_steps():
    def train(strategy=None, steps=None):
        with strategy.scope() if strategy else tf.name_scope(""):
            method = backward.PerExampleClipping(0.2, expected_batch_size=6)
            model, x = built("transformer", method)
            optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
            model.compile(optimizer, "mse", backward=method)
        size = SIZE if steps is None else SIZE // steps
        logs = model.fit(x, floats(3), batch_size=size, shuffle=False, verbose=0).history
        assert method.fell_back is None
        return model.get_weights(), logs["clipped_examples"][0]

    weights, share = train()
    two = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    found, clipped = train(two)
    assert clipped == pytest.approx(share)
    for a, b in zip(found, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    _, clipped = train(steps=2)
    assert clipped == pytest.approx(share)
