"""Layers without a rule: run again on each example, alone, against a loop over examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
from keras import layers
from test_ghost_norms import SIZE, floats, loop

from keras_tapefit import TapeModel, TapeSequential, backward
from keras_tapefit.backward.replays import for_each


def tokens(length):
    """Sequences of different lengths, filled up with 0."""
    ids = np.random.default_rng(2).integers(1, 5, (SIZE, length))
    return ids * (np.arange(length) < 1 + np.arange(SIZE)[:, None] % length)


def slopes():
    return TapeSequential(
        [
            keras.Input((5, 4, 2)),
            layers.Conv2D(3, 2),
            layers.PReLU(shared_axes=[1], alpha_initializer="ones", alpha_regularizer="l2"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def convolutions():
    return TapeSequential(
        [
            keras.Input((7, 6, 4)),
            layers.Conv2D(4, 3, groups=2, padding="same", activation="tanh"),
            layers.GroupNormalization(2),
            layers.DepthwiseConv2D(2, depth_multiplier=2, activation="relu"),
            layers.SeparableConv2D(3, 2, strides=2),
            layers.Conv2DTranspose(2, 2),
            layers.GlobalAveragePooling2D(),
            layers.RMSNormalization(),
            layers.Dense(3),
        ]
    )


def recurrent(dropout=0.0, **options):
    inputs = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(5, 4, mask_zero=True)(inputs)
    hidden = layers.LSTM(3, return_sequences=True, dropout=dropout, **options)(hidden)
    hidden = layers.Bidirectional(layers.GRU(2, **options))(hidden)
    return TapeModel(inputs, layers.Dense(3)(hidden))


def state_of_another():
    inputs = keras.Input((6, 4))
    first, *state = layers.LSTM(3, return_state=True)(inputs)
    second = layers.LSTM(3)(inputs, initial_state=state)
    return TapeModel(inputs, layers.Dense(3)(first + second))


def transformer():
    inputs = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(5, 4, mask_zero=True)(inputs)
    attended = layers.MultiHeadAttention(2, 3)(hidden, hidden, use_causal_mask=True)
    hidden = layers.LayerNormalization()(hidden + attended)
    wide = layers.PReLU(shared_axes=[1])(layers.Dense(7)(hidden))
    hidden = layers.RMSNormalization()(hidden + layers.Dense(4)(wide))
    return TapeModel(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(hidden)))


def resnet():
    inputs = keras.Input((6, 6, 3))
    hidden = layers.Conv2D(4, 3, padding="same")(inputs)
    norm = layers.BatchNormalization()
    norm.trainable = False
    hidden = hidden + layers.ReLU()(norm(layers.Conv2D(4, 3, padding="same")(hidden)))
    return TapeModel(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(hidden)))


class Scaled(layers.Layer):
    """A product of rank three by two, and a layer in it; one weight without influence."""

    def __init__(self, units):
        super().__init__()
        self.units = units
        self.inner = layers.Dense(units, "tanh")

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], self.units), regularizer="l2")
        self.unused = self.add_weight(shape=(2,))
        self.inner.build((*shape[:-1], self.units))

    def call(self, inputs):
        return self.inner(inputs @ self.w)


def twice():
    inputs = keras.Input((4, 3))
    hidden, scaled = layers.Dense(5)(inputs), Scaled(5)
    hidden = Scaled(4)(scaled(scaled(hidden)))
    return TapeModel(inputs, layers.Dense(3)(layers.Flatten()(hidden)))


class Gate(layers.Layer):
    """Two tensors, and an argument that is none."""

    def build(self, x_shape, context_shape):
        self.w = self.add_weight(shape=(5,), initializer="ones")

    def call(self, x, context, factor=1.0):
        return x * tf.sigmoid(context * self.w) * factor


class Gated(TapeModel):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.gate = layers.Dense(5), layers.Dense(5), Gate()
        self.end = layers.Dense(3)

    def call(self, x):
        hidden = self.gate(self.one(x), self.other(x), factor=2.0)
        return self.end(hidden + self.gate(self.other(x), context=x))


class Pooled(layers.Layer):
    """A layer in it sees the mask; another one, whether the model trains."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.pool, self.switch = layers.GlobalAveragePooling1D(), Switch()

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, inputs):
        return self.switch(self.pool(inputs)) * self.w

    def compute_mask(self, inputs, previous_mask):
        return None


class Switch(layers.Layer):
    def call(self, inputs, training=None):
        return inputs * 3.0 if training else inputs


def pooled():
    inputs = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(5, 4, mask_zero=True)(inputs)
    return TapeModel(inputs, layers.Dense(3)(Pooled()(hidden)))


class Looped(layers.Layer):
    """A loop over examples, around a dense layer; it hands on a mask."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.dense = layers.Dense(4, "tanh")

    def build(self, shape):
        self.dense.build((None, 4))

    def call(self, inputs):
        return tf.map_fn(self.dense, inputs)


def looped():
    inputs = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(5, 4, mask_zero=True)(inputs)
    hidden = layers.GlobalAveragePooling1D()(Looped()(hidden))
    return TapeModel(inputs, layers.Dense(3)(hidden))


def constant():
    table = tf.constant(floats(20)[:1], "float32")

    class Added(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=shape[1:], initializer="ones")

        def call(self, inputs):
            return (inputs + tf.cast(table, inputs.dtype)) * self.w

    return TapeSequential([keras.Input((20,)), layers.Dense(20), Added(), layers.Dense(3)])


ALONE = {
    "slopes": (slopes, lambda: floats(5, 4, 2), "PReLU"),
    "convolutions": (convolutions, lambda: floats(7, 6, 4), "Conv2D"),
    "recurrent": (recurrent, lambda: tokens(6), "LSTM"),
    "unrolled": (lambda: recurrent(unroll=True), lambda: tokens(6), "LSTMCell"),
    "state": (state_of_another, lambda: floats(6, 4), "LSTM"),
    "transformer": (transformer, lambda: tokens(6), "RMSNormalization"),
    "resnet": (resnet, lambda: floats(6, 6, 3), None),
    "twice": (twice, lambda: floats(4, 3), "Scaled"),
    "gated": (Gated, lambda: floats(5), "Gate"),
    "pooled": (pooled, lambda: tokens(6), "Pooled"),
    "looped": (looped, lambda: tokens(6), "Looped"),
    "constant": (constant, lambda: floats(20), "Added"),
}


class Output(layers.Layer):
    """The table of an embedding as the weights of the output, a bias besides."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def build(self, shape):
        self.bias = self.add_weight(shape=(5,))

    def call(self, inputs):
        return tf.matmul(inputs, self.table.embeddings, transpose_b=True) + self.bias


class Hidden(Output):
    """The same, but Keras does not see the table."""

    def __init__(self, table):
        layers.Layer.__init__(self)
        self.found = lambda: table

    @property
    def table(self):
        return self.found()


def tied(output):
    inputs = keras.Input((6,), dtype="int32")
    table = layers.Embedding(5, 4)
    hidden = layers.GlobalAveragePooling1D()(table(inputs))
    return TapeModel(inputs, layers.Dense(3)(output(table)(hidden)))


class Bare(TapeModel):
    """A weight read by the model itself."""

    def __init__(self):
        super().__init__()
        self.table, self.end = layers.Embedding(5, 4), layers.Dense(3)

    def call(self, inputs):
        hidden = tf.reduce_mean(self.table(inputs), 1)
        return self.end(keras.ops.matmul(hidden, keras.ops.transpose(self.table.embeddings)))


class Taker(layers.Layer):
    """Takes something of the batch that it is not given."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def build(self, shape):
        self.w = self.add_weight(shape=(5,), initializer="ones")

    def call(self, inputs):
        return inputs * self.w * self.found()


class Noted(TapeModel):
    def __init__(self):
        super().__init__()
        self.noted = {}
        self.dense, self.end = layers.Dense(5), layers.Dense(3)
        self.taker = Taker(lambda: self.noted["x"])

    def call(self, x):
        self.noted = {"x": 2.0 * x}
        return self.end(self.taker(self.dense(x)))


class TimeFirst(TapeModel):
    """As many time steps as examples, and they come first."""

    def __init__(self):
        super().__init__()
        self.dense, self.end = layers.Dense(5, "tanh"), layers.Dense(3)

    def call(self, x):
        hidden = self.dense(tf.transpose(x, [1, 0, 2]))
        return self.end(tf.reduce_mean(hidden, 0))


class Counting(layers.Layer):
    """Rank three by two once more, and a state."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 8))
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.count.assign_add(1.0)
        return keras.ops.einsum("btd,de->bte", inputs, self.w)


def counted():
    inputs = keras.Input((64, 8))
    hidden = Counting()(layers.MultiHeadAttention(2, 4)(inputs, inputs))
    hidden = layers.Conv1D(4, 3, groups=2)(layers.Dense(8)(hidden))
    return TapeModel(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(hidden)))


def mask_of_another_shape():
    inputs = keras.Input((SIZE,), dtype="int32")
    pool = layers.GlobalAveragePooling1D()
    pool.compute_mask = lambda inputs, mask=None: mask
    hidden = pool(layers.Embedding(5, 4, mask_zero=True)(inputs))
    return TapeModel(inputs, layers.Dense(3)(hidden))


AS_A_WHOLE = {
    "tied": (lambda: tied(Output), lambda: tokens(6), "is read in several layers"),
    "hidden": (lambda: tied(Hidden), lambda: tokens(6), "depends on more than what it is given"),
    "bare": (Bare, lambda: tokens(6), "outside of the one that holds it"),
    "noted": (Noted, lambda: floats(5), "what it is given|something else"),
    "time first": (TimeFirst, lambda: floats(SIZE, 4), "the first axis"),
    "counted": (counted, lambda: floats(64, 8), "changes variables"),
    "dropout": (lambda: recurrent(1e-9), lambda: tokens(6), "draws random numbers"),
    "mask": (mask_of_another_shape, lambda: tokens(SIZE), "a mask, or weights, have more axes"),
}

MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "unknown size": {"jit_compile": False},
}


def stepped(make, data, mode, dtype, **options):
    """Returns the method, and how a step differs from the mean of a loop, relatively."""
    keras.utils.set_random_seed(4)
    model, x, y = make(), data(), floats(3).astype(dtype)
    weights = np.random.default_rng(5).uniform(0.5, 2.0, SIZE).astype(dtype)
    x = x.astype(dtype) if x.dtype.kind == "f" else x
    model(x[:1])
    for v in model.trainable_variables:
        # None at a special value, such as 0.
        v.assign(v + np.random.default_rng(3).normal(size=v.shape) * 0.1)
    before = [v.numpy() for v in model.variables]
    loss = keras.losses.MeanSquaredError()
    alone = [
        loop(model, loss, *(v[i : i + 1] for v in (x, y)), 1e9, weights[i : i + 1])[0]
        for i in range(SIZE)
    ]
    norms = [np.sqrt(sum(np.sum(g**2) for g in found)) for found in alone]
    max_norm = float(np.float32(np.median(norms)))
    expected, share = loop(model, loss, x, y, max_norm, weights)
    for v, value in zip(model.variables, before, strict=True):
        v.assign(value)
    method = backward.PerExampleClipping(max_norm, **options)
    model.compile(keras.optimizers.SGD(1.0), "mse", backward=method, **MODES[mode])
    places = {id(v): i for i, v in enumerate(model.variables)}
    batches = tf.data.Dataset.from_tensor_slices((x, y, weights))
    batches = batches.batch(SIZE, drop_remainder=mode != "unknown size")
    logs = model.fit(batches, shuffle=False, verbose=0).history
    assert logs["clipped_examples"] == [pytest.approx(share)] and 0.0 < share < 1.0
    moved = [before[places[id(v)]].astype("float64") - v.numpy() for v in model.trainable_variables]
    error = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(moved, expected, strict=True)))
    size = np.sqrt(sum(np.sum(np.square(b)) for b in expected))
    return method, error / size


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("mode", everyday(["graph"], of=MODES))
@pytest.mark.parametrize("name", everyday(["slopes", "twice", "pooled"], of=ALONE))
def test_a_step_equals_a_loop(name, mode):
    make, data, layer = ALONE[name]
    method, error = stepped(make, data, mode, "float32")
    if layer is None:
        assert method.fell_back is None
    else:
        assert method.fell_back.startswith("the layers ") and f"({layer})" in method.fell_back
    assert error < 1e-6


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("name", everyday(["convolutions"], of=ALONE))
def test_equals_a_loop_in_float64(name, float64):
    make, data, _ = ALONE[name]
    method, error = stepped(make, data, "graph", "float64")
    assert method.fell_back is None or method.fell_back.startswith("the layers ")
    assert error < 1e-9


@pytest.mark.parametrize("mode", everyday(["graph"], of=MODES))
@pytest.mark.parametrize(
    "name", everyday(["tied", "noted", "time first", "counted"], of=AS_A_WHOLE)
)
def test_as_a_whole_where_a_layer_alone_is_not_right(name, mode, caplog):
    make, data, text = AS_A_WHOLE[name]
    method, error = stepped(make, data, mode, "float32")
    assert method.fell_back.startswith("the whole model: ")
    assert any(part in method.fell_back for part in text.split("|"))
    assert error < 1e-6
    ours = [r.getMessage() for r in caplog.records if r.name == "keras_tapefit"]
    assert len(ours) == 1 and method.fell_back in ours[0]


@pytest.mark.parametrize("mode", everyday(["graph"], of=MODES))
@pytest.mark.parametrize("name", everyday(["slopes"], of=["slopes", "recurrent", "convolutions"]))
def test_in_chunks_as_a_whole(name, mode):
    make, data, layer = ALONE[name]
    method, error = stepped(make, data, mode, "float32", chunk_size=4)
    assert "the whole model: in chunks" in method.fell_back and layer in method.fell_back
    assert error < 1e-6


def test_two_outputs_and_frozen_weights():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = layers.PReLU(alpha_initializer="ones")(layers.Dense(4)(inputs))
    outputs = {"a": layers.Dense(1)(hidden), "b": layers.PReLU()(layers.Dense(2)(hidden))}
    model = TapeModel(inputs, outputs)
    model.layers[1].bias.trainable = False
    method = backward.PerExampleClipping(0.25)
    model.compile("sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 0.3, "b": 2}, backward=method)
    x, y = floats(5).astype("float32"), {"a": floats(1), "b": floats(2)}

    def loss(targets, found, weights):
        value = 0.3 * tf.reduce_mean((found["a"] - targets["a"]) ** 2)
        return value + 2.0 * tf.reduce_mean(tf.abs(found["b"] - targets["b"]))

    total = None
    for i in range(SIZE):
        targets = {k: v[i : i + 1].astype("float32") for k, v in y.items()}
        with tf.GradientTape() as tape:
            value = loss(targets, model(x[i : i + 1]), None)
        found = [g.numpy() for g in tape.gradient(value, model.trainable_variables)]
        norm = np.sqrt(sum(np.sum(g**2) for g in found))
        found = [g * min(1.0, 0.25 / norm) / SIZE for g in found]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    gradients = model.compute_gradients(x, y)
    assert method.fell_back.count("(PReLU)") == 2 and len(gradients) == len(total) == 7
    for a, b in zip(gradients.values(), total, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_that_is_not_finite_counts_as_zero(bad):
    keras.utils.set_random_seed(0)
    model, x, y = slopes(), floats(5, 4, 2).astype("float32"), floats(3).astype("float32")
    method = backward.PerExampleClipping(0.5)
    model.compile("sgd", "mse", backward=method)
    others = [0, 1, 3, 4, 5]
    expected = model.compute_gradients(x[others], y[others]).scale(5 / 6)
    x[2] = bad
    found = model.compute_gradients(x, y)
    assert method.fell_back.startswith("the layers ")
    for a, b in zip(found.values(), expected.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_half_precision():
    def computed(policy):
        keras.config.set_dtype_policy(policy)
        try:
            keras.utils.set_random_seed(0)
            model = twice()
        finally:
            keras.config.set_dtype_policy("float32")
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=64.0)
        method = backward.PerExampleClipping(0.25)
        model.compile(optimizer, "mse", backward=method)
        found = model.compute_gradients(floats(4, 3), floats(3))
        assert method.fell_back.startswith("the layers ")
        return [np.zeros(1) if g is None else np.asarray(g) for g in found.values()]

    for a, b in zip(computed("mixed_float16"), computed("float32"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=2e-3)


@pytest.mark.slow
def test_replicas():
    def train(strategy=None):
        keras.utils.set_random_seed(4)
        with strategy.scope() if strategy else tf.name_scope(""):
            model = slopes()
            method = backward.PerExampleClipping(0.2)
            model.compile(keras.optimizers.SGD(0.1), "mse", backward=method)
        model.fit(floats(5, 4, 2), floats(3), batch_size=SIZE, shuffle=False, verbose=0)
        assert method.fell_back.startswith("the layers ")
        return model.get_weights()

    two = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    for a, b in zip(train(two), train(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weights_that_a_forward_pass_assigns_are_refused():
    dense = layers.SpectralNormalization(layers.Dense(4))
    model = TapeSequential([keras.Input((5,)), dense, layers.Dense(3)])
    for method in (backward.PerExampleClipping(1.0), backward.SharpnessAware(0.1)):
        model.compile("sgd", "mse", backward=method)
        with pytest.raises(ValueError, match="/kernel' is assigned in the forward pass"):
            model.train_on_batch(floats(5), floats(3))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_what_tensorflow_cannot_vectorise(jit_compile):
    """Of rank three by two it would end the process; of loops XLA would raise an error."""
    w = tf.random.stateless_normal([128, 256], [0, 1])
    x = tf.random.stateless_normal([16, 64, 128], [1, 2])

    @tf.function(jit_compile=jit_compile)
    def products(x):
        return for_each(lambda v: v[None] @ w, x)

    @tf.function(jit_compile=jit_compile)
    def powers(x):
        def slope(v):
            with tf.GradientTape() as tape:
                tape.watch(v)
                step = lambda i, u: (i + 1, u * v)  # noqa: E731
                _, y = tf.while_loop(lambda i, u: i < 2, step, (0, v), maximum_iterations=2)
            return tape.gradient(y, v)

        return for_each(slope, x)

    np.testing.assert_allclose(products(x)[:, 0], x.numpy() @ w.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(powers(x[:, 0]), 3 * x[:, 0].numpy() ** 2, rtol=1e-4)


def test_private_names():
    from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

    seen = []

    class Layer(layers.Layer):
        def call(self, inputs):
            seen.append(self._get_call_context().get_value("training"))
            return inputs

    Layer()(tf.ones([2]), training=True)
    assert seen == [True]
    value, mask = tf.ones([2]), tf.constant([True, False])
    set_keras_mask(value, mask)
    assert get_keras_mask(value) is mask
