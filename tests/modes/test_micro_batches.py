"""`compile(micro_batches=k)`: the parts of a batch give what the whole batch gives."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from passes import watched

from keras_tapefit import TapeModel, backward, hooks

from . import support
from .support import OPTIMIZERS, X, Y, assert_replicas_agree, difference, trained


@functools.cache
def _whole(model, optimizer, batch_size=support.BATCH_SIZE, num_examples=48, num_replicas=1):
    return trained(
        model,
        OPTIMIZERS[optimizer],
        num_replicas,
        batch_size=batch_size,
        num_examples=num_examples,
        metrics=["mae"],
        gradient_hooks=support.sensitive_hooks(),
    )


def _in_parts(model, optimizer, micro_batches, num_replicas=1, **options):
    return trained(
        model,
        OPTIMIZERS[optimizer],
        num_replicas,
        metrics=["mae"],
        gradient_hooks=support.sensitive_hooks(),
        micro_batches=micro_batches,
        **options,
    )


def _assert_equal(found, expected):
    assert difference(found, expected) < 1e-6
    assert int(found.optimizer.iterations.numpy()) == int(expected.optimizer.iterations.numpy())
    for name, values in expected.log.items():
        np.testing.assert_allclose(found.log[name], values, rtol=1e-5, err_msg=name)


EVERYDAY = [("graph", "sgd"), ("eager", "adamw_ema")]
TESTED = ["sgd", "adam", "adamw_ema", "multi", "loss_scale"]


@pytest.mark.parametrize(
    ("mode", "optimizer"), support.cells(TESTED, EVERYDAY, "sgd", ["graph", "eager", "mirrored"])
)
def test_parts_are_the_whole(mode, optimizer):
    options, num_replicas = support.MODES[mode]
    found = _in_parts("embedding", optimizer, 3, num_replicas, **options)
    _assert_equal(found, _whole("embedding", optimizer))
    if num_replicas > 1:
        assert_replicas_agree(found)


# 46 by 10: the last batch has 6. Parts of 3, 3, 2, 2 and at last 2, 2, 1, 1; then of
# two and one example, and at last of one, with four parts empty.
@pytest.mark.parametrize("micro_batches", [4, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", support.modes("graph"))
def test_a_batch_that_does_not_divide(mode, micro_batches):
    options, num_replicas = support.MODES[mode]
    size = {"batch_size": 10, "num_examples": 46}
    found = _in_parts("dense", "sgd", micro_batches, num_replicas, **size, **options)
    _assert_equal(found, _whole("dense", "sgd", **size))


def _sequences():
    """Outputs with a mask, of which each example has as many as it has tokens."""
    inputs = keras.Input((4,), dtype="int32")
    embedded = layers.Embedding(5, 3, mask_zero=True)(inputs)
    hidden = layers.SimpleRNN(4, return_sequences=True)(embedded)
    return TapeModel(inputs, layers.Dense(2)(hidden))


def _regularized():
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, "tanh", kernel_regularizer="l2")(inputs)
    return TapeModel(inputs, layers.Dense(2, activity_regularizer="l1")(hidden))


WEIGHTS = np.random.default_rng(8).uniform(0, 3, size=48).astype("float32")
# Whole parts that count for nothing.
WEIGHTS[:4] = WEIGHTS[12:16] = 0.0
LOSSES = {
    "mean": keras.losses.MeanSquaredError,
    "weighted": functools.partial(
        keras.losses.MeanSquaredError, reduction="mean_with_sample_weight"
    ),
}


CASES = [
    (support.dense, "weighted", True),
    (_sequences, "mean", True),
    (_regularized, "mean", False),
    # Not the same cases with a loss by weights: Keras then divides by the weights of what
    # is unmasked, and a regularizer of outputs counts examples. A part has one weight.
    pytest.param(_sequences, "weighted", False, marks=pytest.mark.slow),
    pytest.param(_sequences, "mean", False, marks=pytest.mark.slow),
    pytest.param(_regularized, "mean", True, marks=pytest.mark.slow),
    pytest.param(support.dense, "mean", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make", "loss", "weighted"), CASES)
def test_weights_masks_and_regularizers(make, loss, weighted):
    """Each part counts as much as the loss of the whole batch counts it."""
    x, y = (X, Y)
    if make is _sequences:
        x, y = support.TOKENS, np.random.default_rng(0).normal(size=(48, 4, 2))
    runs = []
    for micro_batches in (1, 3):
        keras.utils.set_random_seed(5)
        model = make()
        model.compile(
            keras.optimizers.SGD(0.05, momentum=0.9),
            LOSSES[loss](),
            gradient_hooks=[support.sensitive],
            micro_batches=micro_batches,
            run_eagerly=True,
        )
        weights = WEIGHTS[:, np.newaxis] if weighted else None
        log = model.fit(
            x, y, sample_weight=weights, batch_size=12, shuffle=False, verbose=0
        ).history
        runs.append((model, log))
    (expected, expected_log), (found, found_log) = runs
    assert difference(found, expected) < 1e-6
    np.testing.assert_allclose(found_log["loss"], expected_log["loss"], rtol=1e-5)


@pytest.mark.parametrize("mode", support.modes("graph"))
def test_normalization_and_dropout_go_part_by_part(mode):
    """As if the parts came one after the other: their own statistics, their own draws."""
    options, num_replicas = support.MODES[mode]
    if num_replicas > 1:
        pytest.skip("each replica has statistics of its own, as in Keras")
    found = trained("normalized", OPTIMIZERS["sgd"], micro_batches=3, **options)
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    stock = support.normalized(keras.Model)
    optimizer = OPTIMIZERS["sgd"]()

    # XLA has random numbers of its own.
    @tf.function(jit_compile=mode == "xla")
    def gradient(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((stock(x, training=True) - y) ** 2)
        return tape.gradient(loss, stock.trainable_variables)

    for start in range(0, 48, 12):
        parts = [slice(part, part + 4) for part in range(start, start + 12, 4)]
        gradients = [gradient(tf.constant(X[part]), tf.constant(Y[part])) for part in parts]
        mean = [sum(column) / 3.0 for column in zip(*gradients, strict=True)]
        optimizer.apply(mean, stock.trainable_variables)
    assert difference(found, stock) < 1e-6
    for a, b in zip(found.variables, stock.variables, strict=True):
        if "seed" in a.path:
            np.testing.assert_array_equal(a.numpy(), b.numpy())


def _many_kinds(cls=TapeModel):
    """Sparse gradients, masks, statistics, random numbers, two losses divided apart."""
    tokens, values = keras.Input((4,), dtype="int32", name="t"), keras.Input((6,), name="x")
    embedded = layers.Embedding(5, 3, mask_zero=True, name="e")(tokens)
    sequence = layers.Dense(2, name="s")(layers.LSTM(4, return_sequences=True, name="l")(embedded))
    hidden = layers.Dense(5, "tanh", kernel_regularizer="l2", name="h")(values)
    hidden = layers.Dropout(0.3)(layers.BatchNormalization(name="n")(hidden))
    return cls({"t": tokens, "x": values}, {"s": sequence, "o": layers.Dense(2, name="o")(hidden)})


@pytest.mark.slow
@pytest.mark.parametrize("window", [False, True])
def test_a_loop_over_parts_is_the_parts_one_after_the_other(window):
    x = {"t": support.TOKENS[:46], "x": X[:46]}
    y = {"s": np.random.default_rng(0).normal(size=(46, 4, 2)), "o": Y[:46]}
    weights = {"s": np.ones((46, 4)), "o": WEIGHTS[:46]}
    found = []
    for eager in (True, False):
        keras.utils.set_random_seed(5)
        model = _many_kinds()
        model.compile(
            keras.optimizers.Adam(gradient_accumulation_steps=2 if window else None),
            "mse",
            gradient_hooks=[*support.sensitive_hooks(), *([] if window else [hooks.NoiseScale()])],
            weighted_metrics={"o": ["mae"], "s": ["mae"]},
            micro_batches=5,
            run_eagerly=eager,
        )
        options = {"batch_size": 12, "shuffle": False, "epochs": 2, "verbose": 0}
        log = model.fit(x, y, sample_weight=weights, **options).history
        # Keras weighs the logs of single losses by static shapes, which differ.
        log = {k: v for k, v in log.items() if k not in ("s_loss", "o_loss")}
        found.append((model, log))
    (eager, expected), (graph, log) = found
    for a, b in zip(eager.variables, graph.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=a.path)
    assert log.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(log[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("static", [False, True])
def test_one_part_is_traced_however_many_there_are(static):
    calls = []

    class Counted(layers.Dense):
        def call(self, inputs):
            calls.append(inputs.shape)
            return super().call(inputs)

    inputs = keras.Input((6,))
    model = TapeModel(inputs, Counted(2)(inputs))
    model.compile("sgd", "mse", micro_batches=6)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(24, drop_remainder=static)
    calls.clear()
    model.fit(data, shuffle=False, verbose=0)
    in_steps = [shape for shape in calls if shape[0] == (4 if static else None)]
    assert len(in_steps) == 2, calls


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_a_part_begins_after_the_one_before_has_ended(micro_batches):
    """Else the activations of two parts would be in memory."""
    order = []
    inputs = keras.Input((6,))
    hidden = layers.Lambda(watched(order), output_shape=(3,))(layers.Dense(3)(inputs))
    model = TapeModel(inputs, layers.Dense(2)(hidden))
    model.compile("sgd", "mse", micro_batches=micro_batches, jit_compile=False)
    model.fit(X[:12], Y[:12], batch_size=12, verbose=0)
    assert [name for name, _ in order] == ["forward", "backward"] * micro_batches


def test_metrics_of_the_models_own_may_read_what_a_layer_kept():
    class Keeping(TapeModel):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, inputs):
            self.kept = self.dense(inputs)
            self.add_loss(tf.reduce_mean(self.kept**2))
            return self.kept

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            of_last_part = tf.reduce_sum(self.kept), tf.add_n(self.losses)
            logs = super().compute_metrics(x, y, y_pred, sample_weight)
            return {**logs, "kept": of_last_part[0], "added": of_last_part[1]}

    model = Keeping()
    model.compile("sgd", "mse", micro_batches=4)
    last = model(X[9:12]).numpy()
    log = model.fit(X[:12], Y[:12], batch_size=12, shuffle=False, verbose=0).history
    np.testing.assert_allclose(log["kept"], [last.sum()], rtol=1e-5)
    np.testing.assert_allclose(log["added"], [(last**2).mean()], rtol=1e-5)


@pytest.mark.slow
def test_one_part_is_the_whole_to_the_bit():
    found = trained("normalized", OPTIMIZERS["adam"], micro_batches=1)
    stock = trained("normalized", OPTIMIZERS["adam"], model_class=keras.Model)
    support.assert_same_bits(found, stock)


def test_parts_of_a_perturbed_step():
    """Sharpness-aware steps perturb part by part."""
    model = support.dense()
    model.compile("sgd", "mse", backward=backward.SharpnessAware(0.05), micro_batches=2)
    start = [tf.identity(v.value) for v in model.trainable_variables]
    x, y = X[:8], Y[:8]
    parts = []
    for part in (slice(0, 4), slice(4, 8)):
        first = _gradients(model, start, x[part], y[part])
        norm = tf.linalg.global_norm(first)
        moved = [w + 0.05 * g / norm for w, g in zip(start, first, strict=True)]
        parts.append(_gradients(model, moved, x[part], y[part]))
    expected = [(a + b) / 2.0 for a, b in zip(*parts, strict=True)]
    for variable, value in zip(model.trainable_variables, start, strict=True):
        variable.assign(value)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    for variable, value, gradient in zip(model.trainable_variables, start, expected, strict=True):
        np.testing.assert_allclose(variable, value - 0.01 * gradient, rtol=1e-5, atol=1e-7)


def _gradients(model, values, x, y):
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(value)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    return tape.gradient(loss, model.trainable_variables)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"micro_batches": 0}, ValueError, "at least 1. Received: micro_batches=0"),
        ({"micro_batches": 2.0}, TypeError, "must be an integer"),
        ({"micro_batches": True}, TypeError, "must be an integer"),
        (
            {"backward": backward.PerExampleClipping(1.0), "micro_batches": 2},
            ValueError,
            "needs the whole batch at once, so `micro_batches` must be 1",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(options, error, text):
    model = support.dense()
    with pytest.raises(error, match=text):
        model.compile("sgd", **{"loss": "mse", **options})
        model.fit(X, Y, verbose=0)
