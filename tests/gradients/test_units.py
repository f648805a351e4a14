"""`units`: the axes of a unit, proven from what the layers compute."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit.gradients import units


class Case(NamedTuple):
    """One kernel, a computation that meets all of it, and the axes worked by hand.

    `run` looks at one position of the output, the one that all taps reach. `direct`:
    each output is one unit's weighted sum, with nothing in between.
    """

    layer: Any
    variable: Any
    run: Callable[[], Any]
    axes: tuple[int, ...]
    direct: bool = True


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng([0, *shape]).normal(size=shape)


def _called(layer: Any, *inputs: Any) -> Any:
    layer(*inputs)
    for variable in layer.trainable_variables:
        variable.assign(0.3 * _random(*variable.shape))
    return layer


def _dense() -> Case:
    x = _random(1, 4)
    layer = _called(layers.Dense(3, activation="tanh", dtype="float64"), x)
    return Case(layer, layer.kernel, lambda: layer(x), (0,))


def _convolution(name: str, axes: tuple[int, ...], **options: Any) -> Case:
    rank = int(name[4])
    x = _random(1, *[3] * rank, 4)
    cls = getattr(layers, name)
    layer = _called(cls(6, 3, dtype="float64", **options), x)
    # The middle of a full (transposed) convolution; a valid one has one position.
    middle = (0, *[2 if name.endswith("Transpose") else 0] * rank)
    return Case(layer, layer.kernel, lambda: layer(x)[middle], axes)


def _depthwise(rank: int, axes: tuple[int, ...]) -> Case:
    x = _random(1, *[3] * rank, 4)
    cls = getattr(layers, f"DepthwiseConv{rank}D")
    layer = _called(cls(3, depth_multiplier=2, dtype="float64"), x)
    return Case(layer, layer.kernel, lambda: layer(x), axes)


def _separable(rank: int, which: str, axes: tuple[int, ...]) -> Case:
    x = _random(1, *[3] * rank, 4)
    cls = getattr(layers, f"SeparableConv{rank}D")
    layer = _called(cls(5, 3, depth_multiplier=2, dtype="float64"), x)
    direct = which == "pointwise_kernel"
    return Case(layer, getattr(layer, which), lambda: layer(x), axes, direct)


def _einsum(
    equation: str, input_shape: tuple[int, ...], output_shape: Any, axes: tuple[int, ...]
) -> Case:
    x = _random(*input_shape)
    layer = _called(layers.EinsumDense(equation, output_shape, dtype="float64"), x)
    return Case(layer, layer.kernel, lambda: layer(x), axes)


def _attention(which: str, axes: tuple[int, ...], grouped: bool = False) -> Case:
    """What is looked at gets one token in all examples, so that it is one sum."""
    num_examples = 1 if which == "attention_output" else 16
    query = _random(num_examples, 1, 5)
    key, value = _random(num_examples, 3, 5)[:, :, ::-1], _random(num_examples, 3, 5)
    token = _random(5)
    if which == "query":
        query = np.broadcast_to(token, query.shape)
    elif which in ("key", "value"):
        alone = np.zeros_like(key)
        alone[:, 0] = token
        key, value = (alone, value) if which == "key" else (key, alone)
    if grouped:
        layer = layers.GroupQueryAttention(2, 4, 2, dtype="float64")
    else:
        layer = layers.MultiHeadAttention(4, 2, dtype="float64")
    _called(layer, query, value, key)
    (variable,) = [v for v in layer.variables if f"/{which}/kernel" in v.path]
    direct = which == "attention_output"
    return Case(layer, variable, lambda: layer(query, value, key), axes, direct)


def _recurrent(name: str, which: str) -> Case:
    """One step. What meets the kernel is one in all examples, the rest varies."""
    x, states = _random(16, 4), [_random(16, 3), _random(16, 3)[::-1]]
    if which == "kernel":
        x = np.broadcast_to(x[:1], x.shape)
    else:
        states[0] = np.broadcast_to(states[0][:1], states[0].shape)
    layer = getattr(layers, name)(3, dtype="float64")
    _called(layer, x[:, np.newaxis])
    states = [tf.constant(s) for s in states[: 2 if name == "LSTM" else 1]]

    def run() -> Any:
        return tf.concat(layer.cell(x, states)[1], -1)

    return Case(layer, getattr(layer.cell, which), run, (0,), name == "SimpleRNN")


def _conv_lstm(which: str) -> Case:
    x, states = _random(8, 5, 5, 2), [_random(8, 3, 3, 2), _random(8, 3, 3, 2)[::-1]]
    if which == "kernel":
        x = np.broadcast_to(x[:1], x.shape)
    else:
        states[0] = np.broadcast_to(states[0][:1], states[0].shape)
    layer = _called(layers.ConvLSTM2D(2, 3, dtype="float64"), x[:, np.newaxis])
    tensors = [tf.constant(s) for s in states]

    def run() -> Any:
        return tf.concat(layer.cell(tf.constant(x), tensors)[1], -1)[:, 1, 1]

    return Case(layer, getattr(layer.cell, which), run, (0, 1, 2), direct=False)


CASES = {
    "Dense": _dense,
    "Conv1D": lambda: _convolution("Conv1D", (0, 1)),
    "Conv2D": lambda: _convolution("Conv2D", (0, 1, 2)),
    "Conv2D grouped": lambda: _convolution("Conv2D", (0, 1, 2), groups=2),
    "Conv3D": lambda: _convolution("Conv3D", (0, 1, 2, 3)),
    "Conv1DTranspose": lambda: _convolution("Conv1DTranspose", (0, 2)),
    "Conv2DTranspose": lambda: _convolution("Conv2DTranspose", (0, 1, 3)),
    "Conv3DTranspose": lambda: _convolution("Conv3DTranspose", (0, 1, 2, 4)),
    "DepthwiseConv1D": lambda: _depthwise(1, (0,)),
    "DepthwiseConv2D": lambda: _depthwise(2, (0, 1)),
    "SeparableConv1D depthwise": lambda: _separable(1, "depthwise_kernel", (0,)),
    "SeparableConv1D pointwise": lambda: _separable(1, "pointwise_kernel", (0, 1)),
    "SeparableConv2D depthwise": lambda: _separable(2, "depthwise_kernel", (0, 1)),
    "SeparableConv2D pointwise": lambda: _separable(2, "pointwise_kernel", (0, 1, 2)),
    "MultiHeadAttention query": lambda: _attention("query", (0,)),
    "MultiHeadAttention key": lambda: _attention("key", (0,)),
    "MultiHeadAttention value": lambda: _attention("value", (0,)),
    "MultiHeadAttention output": lambda: _attention("attention_output", (0, 1)),
    "GroupQueryAttention query": lambda: _attention("query", (0,), grouped=True),
    "GroupQueryAttention key": lambda: _attention("key", (0,), grouped=True),
    "GroupQueryAttention value": lambda: _attention("value", (0,), grouped=True),
    "GroupQueryAttention output": lambda: _attention("attention_output", (0, 1), grouped=True),
    "SimpleRNN kernel": lambda: _recurrent("SimpleRNN", "kernel"),
    "SimpleRNN recurrent": lambda: _recurrent("SimpleRNN", "recurrent_kernel"),
    "LSTM kernel": lambda: _recurrent("LSTM", "kernel"),
    "LSTM recurrent": lambda: _recurrent("LSTM", "recurrent_kernel"),
    "GRU kernel": lambda: _recurrent("GRU", "kernel"),
    "GRU recurrent": lambda: _recurrent("GRU", "recurrent_kernel"),
    "ConvLSTM2D kernel": lambda: _conv_lstm("kernel"),
    "ConvLSTM2D recurrent": lambda: _conv_lstm("recurrent_kernel"),
    "ab,bc->ac": lambda: _einsum("ab,bc->ac", (1, 4), 3, (0,)),
    "ab,cb->ac": lambda: _einsum("ab,cb->ac", (1, 4), 3, (1,)),
    "abc,cde->abde": lambda: _einsum("abc,cde->abde", (1, 1, 4), (1, 2, 3), (0,)),
    "abcd,cde->abe": lambda: _einsum("abcd,cde->abe", (1, 1, 2, 4), (1, 3), (0, 1)),
    "abc,dbce->ade": lambda: _einsum("abc,dbce->ade", (1, 2, 4), (3, 5), (1, 2)),
    "abc,bcd->abd": lambda: _einsum("abc,bcd->abd", (1, 3, 4), (3, 2), (1,)),
    "...x,xy->...y": lambda: _einsum("...x,xy->...y", (1, 1, 1, 4), 3, (0,)),
    "...x,yx->...y": lambda: _einsum("...x,yx->...y", (1, 4), 3, (1,)),
    "ab...,bc->ac...": lambda: _einsum("ab...,bc->ac...", (1, 4, 1, 1), 3, (0,)),
}


def _jacobian(case: Case) -> np.ndarray:
    """Returns the derivatives of outputs (rows) by kernel entries (columns)."""
    with tf.GradientTape(persistent=True) as tape:
        outputs = tf.reshape(case.run(), [-1])
    jacobian = tape.jacobian(outputs, case.variable.value, experimental_use_pfor=False).numpy()
    assert jacobian.dtype == np.float64
    return jacobian.reshape(len(jacobian), -1)


def _unit_numbers(variable: Any, axes: tuple[int, ...]) -> np.ndarray:
    """Returns for each entry of the variable which unit it belongs to."""
    shape = tuple(variable.shape)
    kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
    numbers = np.arange(np.prod(kept)).reshape(kept)
    return np.broadcast_to(numbers, shape).ravel()


# Keras's own `quantize` warns, under NumPy 2, on its way from a tensor to an array.
keras_copies_a_tensor = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)


@pytest.mark.parametrize("name", CASES)
def test_axes_are_those_worked_by_hand(name):
    case = CASES[name]()
    assert units.unit_axes(case.layer)[id(case.variable)] == (case.axes, True)


@pytest.mark.parametrize("name", CASES)
def test_a_unit_is_the_weights_of_one_weighted_sum(name):
    """Weights of one sum, and no others, move all outputs in the same proportion."""
    case = CASES[name]()
    axes, _ = units.unit_axes(case.layer)[id(case.variable)]
    numbers = _unit_numbers(case.variable, axes)
    jacobian = _jacobian(case)
    lengths = np.linalg.norm(jacobian, axis=0)
    assert lengths.min() > 1e-6, "the computation must meet every weight"
    directions = jacobian / lengths
    same_sum = np.abs(directions.T @ directions) > 1 - 1e-8
    np.testing.assert_array_equal(same_sum, numbers[:, None] == numbers)
    if case.direct:
        for derivatives in jacobian:
            touched = derivatives != 0
            np.testing.assert_array_equal(touched, numbers == numbers[touched][0])


# `ReversibleEmbedding` came to Keras later than int4, and both after 3.8.
newer_keras = pytest.mark.skipif(
    not hasattr(layers, "ReversibleEmbedding"), reason="needs a newer Keras"
)


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=newer_keras)])
def test_a_unit_of_an_embedding_is_what_one_token_depends_on(reverse):
    if reverse:
        layer = layers.ReversibleEmbedding(4, 3, tie_weights=False, dtype="float64")
    else:
        layer = layers.Embedding(4, 3, dtype="float64")
    _called(layer, np.arange(4))
    variable = layer.reverse_embeddings if reverse else layer.embeddings

    def run() -> Any:
        if reverse:
            return layer(tf.constant(_random(1, 3)), reverse=True)[0]
        return tf.reduce_sum(layer(np.arange(4)), -1)

    axes = (0,) if reverse else (1,)
    assert units.unit_axes(layer)[id(variable)] == (axes, False)
    numbers = _unit_numbers(variable, axes)
    jacobian = _jacobian(Case(layer, variable, run, axes))
    for token, derivatives in enumerate(jacobian):
        np.testing.assert_array_equal(derivatives != 0, numbers == token)


def test_biases_and_normalization_weights_are_one_unit_each():
    x = tf.constant(_random(2, 5, 4), tf.float32)
    built = [
        _called(layers.Dense(3), x),
        _called(layers.GRU(3), x),
        _called(layers.MultiHeadAttention(2, 3), x, x),
        _called(layers.EinsumDense("abc,cde->abde", (5, 2, 3), bias_axes="de"), x),
        _called(layers.BatchNormalization(), x),
        _called(layers.LayerNormalization(axis=(1, 2)), x),
        _called(layers.PReLU(), x),
    ]
    ranks = []
    for layer in built:
        found = units.unit_axes(layer)
        for variable in layer.variables:
            if not variable.name.endswith("kernel"):
                rank = len(variable.shape)
                assert found[id(variable)] == (tuple(range(rank)), False)
                ranks.append(rank)
    assert set(ranks) == {1, 2}


def _nested_model() -> Any:
    cells = [layers.LSTMCell(3, name="lstm"), layers.GRUCell(2, name="gru")]
    inner_inputs = keras.Input((4,))
    inner = keras.Model(inner_inputs, layers.Dense(3, name="deep")(inner_inputs))
    x = inputs = keras.Input((6, 4))
    x = layers.TimeDistributed(inner)(x)
    x = layers.Bidirectional(layers.RNN(cells, return_sequences=True))(x)
    x = layers.Dropout(0.5)(x)
    x = layers.SeparableConv1D(4, 3, name="separable")(x)
    x = layers.MultiHeadAttention(2, 3)(x, x)
    transpose = layers.Conv1DTranspose(5, 3, name="transpose")
    x = layers.SpectralNormalization(transpose)(x)
    return keras.Sequential([keras.Model(inputs, x), layers.GlobalAveragePooling1D()])


def test_every_sublayer_is_found():
    model = _nested_model()
    model.build((None, 6, 4))
    found = units.unit_axes(model)
    assert set(found) == {id(variable) for variable in model.variables}
    axes = {}
    for variable in model.trainable_variables:
        if found[id(variable)].is_kernel:
            path = variable.path.split("/")
            axes.setdefault("/".join(path[-2:]), set()).add(found[id(variable)].axes)
    assert axes == {
        "deep/kernel": {(0,)},
        "lstm/kernel": {(0,)},
        "lstm/recurrent_kernel": {(0,)},
        "gru/kernel": {(0,)},
        "gru/recurrent_kernel": {(0,)},
        "separable/depthwise_kernel": {(0,)},
        "separable/pointwise_kernel": {(0, 1)},
        "query/kernel": {(0,)},
        "key/kernel": {(0,)},
        "value/kernel": {(0,)},
        "attention_output/kernel": {(0, 1)},
        "transpose/kernel": {(0, 2)},
    }


@pytest.mark.parametrize("name", ["Conv1DTranspose", "Embedding"])
def test_a_wrapper_does_not_hide_the_class_of_its_layer(name):
    inner = {
        "Conv1DTranspose": lambda: layers.Conv1DTranspose(2, 3),
        "Embedding": lambda: layers.Embedding(4, 3),
    }[name]()
    wrapped = layers.SpectralNormalization(inner)
    wrapped.build((None, 5, 4) if name == "Conv1DTranspose" else (None, 5))
    # What makes this hard: the wrapper holds the variable too, as its `kernel`.
    found = units.unit_axes(wrapped)[id(wrapped.kernel)]
    assert found == {"Conv1DTranspose": ((0, 2), True), "Embedding": ((1,), False)}[name]


def test_lora_leaves_the_axes_of_the_kernel():
    x = tf.ones((2, 5, 4))
    for layer, axes in [
        (layers.Dense(3), (0,)),
        (layers.EinsumDense("abc,cde->abde", (5, 2, 3)), (0,)),
        (layers.Conv1D(3, 2), (0, 1)),
    ]:
        layer(x)
        (kernel,) = [v for v in layer.variables if v.name == "kernel"]
        layer.enable_lora(2)
        found = units.unit_axes(layer)
        assert found[id(kernel)] == (axes, True)
        factor = layer.lora_kernel_a
        assert found[id(factor)] == (tuple(range(len(factor.shape))), False)


@keras_copies_a_tensor
@pytest.mark.parametrize("mode", ["int8", pytest.param("int4", marks=newer_keras), "float8"])
def test_quantized_layers_have_units_too(mode):
    for layer in [layers.Dense(4), layers.EinsumDense("abc,cde->abde", (5, 2, 4))]:
        layer(tf.ones((2, 5, 4)))
        layer.quantize(mode)
        found = units.unit_axes(layer)
        assert set(found) == {id(v) for v in layer.variables}
        (kernel,) = [v for v in layer.variables if v.name == "kernel"]
        every = tuple(range(len(kernel.shape)))
        # Integers get no gradient, and may be packed into another shape.
        expected = ((0,), True) if mode == "float8" else (every, False)
        assert found[id(kernel)] == expected


class Unknown(layers.Layer):
    """Weights that only the fallback can judge, with an output-first kernel."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(3, input_shape[-1]))
        self.inner_kernel = self.add_weight(shape=(2, 3, 4))
        self.small_kernel = self.add_weight(shape=(3,))
        self.scale = self.add_weight(shape=())
        self.positions = self.add_weight(shape=(5, 4))
        self.bias = None

    def call(self, inputs):
        return inputs @ keras.ops.transpose(self.kernel)


def _unknown(cls: type = Unknown) -> Any:
    layer = type("Unknown", (cls,), {})()
    layer.build((None, 4))
    return layer


def test_fallback_for_unknown_layers():
    layer = _unknown()
    found = units.unit_axes(layer)
    assert found[id(layer.kernel)] == ((0,), True)
    assert found[id(layer.inner_kernel)] == ((0, 1), True)
    assert found[id(layer.small_kernel)] == ((0,), False)
    assert found[id(layer.scale)] == ((), False)
    assert found[id(layer.positions)] == ((0, 1), False)


def test_subclasses_have_the_units_of_their_base():
    layer = type("Mine", (layers.Conv1DTranspose,), {})(2, 3)
    layer.build((None, 5, 4))
    assert units.unit_axes(layer)[id(layer.kernel)] == ((0, 2), True)


def test_register_unit_axes():
    layer = _unknown()
    unit = units.Unit((-1,), is_kernel=True)
    axes = {"kernel": (1,), "positions": unit, "bias": (0,)}
    units.register_unit_axes(type(layer), lambda layer: axes)
    found = units.unit_axes(keras.Sequential([keras.Input((4,)), layer]))
    assert found[id(layer.kernel)] == ((1,), True)
    assert found[id(layer.positions)] == ((1,), True)
    assert found[id(layer.inner_kernel)] == ((0, 1), True)

    subclass = _unknown(type(layer))
    assert units.unit_axes(subclass)[id(subclass.kernel)] == ((1,), True)
    units.register_unit_axes(type(subclass), lambda layer: {"kernel": (0, 1)})
    assert units.unit_axes(subclass)[id(subclass.kernel)] == ((0, 1), True)
    assert units.unit_axes(layer)[id(layer.kernel)] == ((1,), True)


@keras_copies_a_tensor
def test_registration_goes_before_the_table():
    layer = type("Mine", (layers.Dense,), {})(3)
    units.register_unit_axes(type(layer), lambda layer: {"kernel": (1,)})
    assert units.unit_axes(layer) == {}
    layer.build((None, 4))
    assert units.unit_axes(layer)[id(layer.kernel)] == ((1,), True)
    layer.quantize("int8", type_check=False)
    (kernel,) = [v for v in layer.variables if v.name == "kernel"]
    assert units.unit_axes(layer)[id(kernel)] == ((0, 1), False)


@pytest.mark.parametrize("axes", [{"kernels": (0,)}, {"kernel": (2,)}, {"kernel": 0}])
def test_registered_axes_must_fit_the_layer(axes):
    layer = _unknown()
    units.register_unit_axes(type(layer), lambda layer: axes)
    (name, value), *_ = axes.items()
    text = rf"axes registered for Unknown must.*Received: '{name}': .*'kernel' of rank 2"
    with pytest.raises(ValueError, match=text):
        units.unit_axes(layer)


@pytest.mark.parametrize(
    "arguments", [(int, lambda layer: {}), (Unknown(), dict), (Unknown, {"kernel": (0,)})]
)
def test_register_takes_a_layer_class_and_a_function(arguments):
    with pytest.raises(TypeError, match="Pass a subclass of .*Received: layer_class="):
        units.register_unit_axes(*arguments)


def test_unit_axes_takes_a_layer():
    with pytest.raises(TypeError, match="must be a Keras layer.*Received: layer='dense'"):
        units.unit_axes("dense")
