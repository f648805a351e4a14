"""What replicas and strategies once got wrong; each test is named by its fault."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, backward, hooks

from .support import (
    X,
    Y,
    assert_near,
    assert_same_logs,
    dense,
    fit,
    mirrored,
    scope,
    square,
    train,
    weights,
)

# Of 43 examples in batches of 12, the last one has 7: 4 and 3. Of 37, the last one has 1.
UNEVEN, EMPTY = 43, 37

pytestmark = [pytest.mark.slow, pytest.mark.long]


# --- R1: a strategy with one device


def _one_device(how):
    if how == "mirrored":
        return tf.distribute.MirroredStrategy(
            ["CPU:0"], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
    if how == "mirrored, default device":
        # What a machine with one GPU gets.
        return mirrored(1)
    return tf.distribute.OneDeviceStrategy("CPU:0")


OF_ONE = {
    "gate": (None, [hooks.SkipNonFinite]),
    "accumulated": (3, []),
    "both": (3, [hooks.SkipNonFinite]),
    "neither": (None, [functools.partial(hooks.GlobalNormClipping, 0.5)]),
}


@pytest.mark.parametrize("case", OF_ONE)
@pytest.mark.parametrize("how", ["mirrored", "mirrored, default device", "one device"])
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"steps_per_execution": 3}])
def test_R1_one_device(how, case, options):
    """The third batch of four is bad; windows of 3 leave one over."""
    accumulation, chosen = OF_ONE[case]
    y = Y[:32].copy()
    x = X[:32]
    if hooks.SkipNonFinite in chosen:
        y[17] = np.nan
    with _one_device(how).scope():
        keras.utils.set_random_seed(5)
        model = dense()
        optimizer = keras.optimizers.SGD(
            0.2, momentum=0.9, gradient_accumulation_steps=accumulation
        )
        model.compile(optimizer, "mse", gradient_hooks=[kind() for kind in chosen], **options)
    fit(model, x, y, epochs=2)
    if hooks.SkipNonFinite in chosen:
        kept = np.r_[0:16, 24:32]
        x, y = X[kept], Y[kept]
    keras.utils.set_random_seed(5)
    expected = dense(TapeModel if case == "neither" else keras.Model)
    more = {"gradient_hooks": [kind() for kind in chosen]} if case == "neither" else {}
    expected.compile(keras.optimizers.SGD(0.2, momentum=0.9), "mse", **more)
    fit(expected, x, y, epochs=2, batch_size=8 * (accumulation or 1))
    assert_near(model, expected)
    assert int(model.optimizer.iterations.numpy()) == int(expected.optimizer.iterations.numpy())


# --- R2 to R4: uneven batches, and replicas that have none of it


def _normalized(kind):
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, name="a")(inputs)
    hidden = layers.BatchNormalization(synchronized=True, momentum=0.7)(hidden)
    return kind(inputs, layers.Dense(2, name="b")(layers.Activation("tanh")(hidden)))


def _columns(y, y_pred):
    return tf.unstack(tf.reduce_mean(tf.square(y - y_pred), axis=0))


UPHILL = {
    "synchronized": (_normalized, lambda: {}),
    "sharpness": (dense, lambda: {"backward": backward.SharpnessAware(0.3, synchronize=True)}),
    "adaptive sharpness": (
        dense,
        lambda: {"backward": backward.SharpnessAware(0.8, adaptive=True, synchronize=True)},
    ),
    "conflicts": (dense, lambda: {"backward": backward.ProjectedConflicts(_columns, seed=3)}),
}


def _on(num_replicas, make, num_examples, epochs=2, kind=TapeModel, momentum=0.9, **options):
    keras.utils.set_random_seed(5)
    with scope(num_replicas):
        model = make(kind)
        model.compile(keras.optimizers.SGD(0.2, momentum=momentum), **{"loss": "mse", **options})
    x, y = X[:num_examples], Y[:num_examples]
    return model, fit(model, x, y, batch_size=12, epochs=epochs)


@pytest.mark.parametrize("num_replicas", [2, 3])
@pytest.mark.parametrize("num_examples", [UNEVEN, EMPTY])
@pytest.mark.parametrize("case", UPHILL)
def test_R2_uneven_batches_before_the_backward_pass(case, num_examples, num_replicas):
    make, options = UPHILL[case]
    found, logs = _on(num_replicas, make, num_examples, **options())
    expected, right = _on(None, make, num_examples, **options())
    # The way uphill amplifies what float32 rounds.
    assert_near(found, expected, 5e-6)
    assert_same_logs(logs, right)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 3}, {"run_eagerly": True}])
@pytest.mark.parametrize("chosen", [[], [hooks.GradientMonitor]])
def test_R3_statistics_of_a_replica_without_an_example(options, chosen):
    """Written out: each replica normalizes what it has, and only what it has."""

    def make(kind):
        inputs = keras.Input((6,))
        hidden = layers.Dense(5, name="a")(inputs)
        hidden = layers.BatchNormalization(momentum=0.7, name="n")(hidden)
        return kind(inputs, layers.Dense(2, name="b")(keras.ops.tanh(hidden)))

    model, logs = _on(
        2, make, EMPTY, momentum=0.0, gradient_hooks=[kind() for kind in chosen], **options
    )
    keras.utils.set_random_seed(5)
    stock = make(keras.Model)
    kernel, bias, gamma, beta, last, shift = (v.value for v in stock.trainable_variables)
    trained = (kernel, bias, gamma, beta, last, shift)
    # Of the first replica, which is the one that is read.
    moving_mean, moving_variance = (v.value for v in stock.non_trainable_variables[:2])
    losses = []
    for _ in range(2):
        total = 0.0
        for i in range(0, EMPTY, 12):
            rows = np.arange(i, min(i + 12, EMPTY))
            # A replica takes the larger half: of one example, all of it.
            half = -(-len(rows) // 2)
            with tf.GradientTape() as tape:
                loss = 0.0
                for own in (rows[:half], rows[half:]):
                    if not len(own):
                        continue
                    hidden = X[own] @ kernel + bias
                    mean, variance = tf.nn.moments(hidden, [0])
                    hidden = (hidden - mean) / tf.sqrt(variance + 1e-3) * gamma + beta
                    y_pred = tf.tanh(hidden) @ last + shift
                    loss += square(Y[own], y_pred) * len(own) / len(rows)
                    if own[0] == i:
                        moving_mean.assign(0.7 * moving_mean + 0.3 * mean)
                        moving_variance.assign(0.7 * moving_variance + 0.3 * variance)
            for v, g in zip(trained, tape.gradient(loss, trained), strict=True):
                v.assign_sub(0.2 * g)
            total += float(loss) * len(rows) / EMPTY
        losses.append(total)
    assert_near(model, stock, 2e-6)
    np.testing.assert_allclose(logs["loss"], losses, rtol=1e-5)


class Activity(layers.Layer):
    """Adds a loss that is a mean over examples."""

    def call(self, inputs):
        self.add_loss(0.3 * tf.reduce_mean(tf.square(inputs)))
        return inputs


def _with_added_losses(kind):
    inputs = keras.Input((6,))
    hidden = layers.Dense(
        5, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.1), name="a"
    )(inputs)
    return kind(inputs, layers.Dense(2, name="b")(Activity()(hidden)))


@pytest.mark.parametrize("num_examples", [UNEVEN, EMPTY])
@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 3}, {"run_eagerly": True}])
@pytest.mark.parametrize("chosen", [[], [hooks.GradientMonitor]])
def test_R4_added_losses_of_replicas_that_have_few_or_no_examples(num_examples, options, chosen):
    options = {**options, "gradient_hooks": [kind() for kind in chosen]}
    found, logs = _on(2, _with_added_losses, num_examples, **options)
    expected, right = _on(None, _with_added_losses, num_examples, kind=keras.Model)
    assert_near(found, expected)
    assert_same_logs(logs, right)


# --- R5, R6


@pytest.mark.parametrize("num_replicas", [None, 1, 2])
def test_R5_validation_is_that_without_the_monitor(num_replicas):
    runs = []
    for chosen in ([], [hooks.GradientMonitor(validation=True)]):
        keras.utils.set_random_seed(5)
        with scope(num_replicas):
            model = dense()
            model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"], gradient_hooks=chosen)
        validation = (X[:UNEVEN], Y[:UNEVEN])
        logs = fit(
            model, X[:UNEVEN], Y[:UNEVEN], batch_size=12, epochs=2, validation_data=validation
        )
        evaluated = model.evaluate(*validation, batch_size=12, verbose=0, return_dict=True)
        runs.append((model, {**logs, **{f"e_{k}": [v] for k, v in evaluated.items()}}))
    assert runs[0][1].keys() >= {"val_loss", "val_mae", "e_loss", "e_mae"}
    assert_same_logs(runs[1][1], runs[0][1], 1e-6)


class Reduced(keras.losses.Loss):
    """A loss whose `call` reduces to a scalar."""

    def call(self, y_true, y_pred):
        return tf.reduce_mean(tf.square(y_true - y_pred))


SCALARS = {
    "function": lambda: lambda y, y_pred: tf.reduce_mean(tf.square(y - y_pred)),
    "class": Reduced,
}


@pytest.mark.parametrize("num_examples", [48, UNEVEN])
@pytest.mark.parametrize("loss", SCALARS)
def test_R6_a_loss_that_is_a_scalar_already(loss, num_examples):
    """One device, or said."""
    expected, right = _on(None, dense, num_examples, kind=keras.Model)
    try:
        found, logs = _on(2, dense, num_examples, loss=SCALARS[loss]())
    except ValueError as error:
        assert "scalar" in str(error)
        return
    assert_near(found, expected)
    assert_same_logs(logs, right)


@pytest.mark.parametrize("parts", ["micro-batches", "accumulated"])
def test_R6_in_parts(parts):
    data = {"x": X[:UNEVEN], "y": Y[:UNEVEN]}
    found, logs = train(dense, data, 12, parts, loss=SCALARS["function"]())
    expected, right = train(dense, data, 12, kind=keras.Model, loss="mse")
    assert_near(found, expected)
    assert_same_logs(logs, right)


# --- R8, R9: loops by hand, other strategies


class Counting(hooks.GradientHook):
    """Keeps a state."""

    def build(self, variables):
        self.count = self.add_variable(dtype="int64", name="count")

    def apply(self, gradients):
        self.count.assign(self.count.value + 1)
        return gradients


def _with_tape(model):
    def step(data):
        x, y = data
        with model.gradient_tape() as tape:
            # As in TensorFlow's guide: a mean over the global batch.
            errors = tf.reduce_mean(tf.square(y - model(x, training=True)), axis=-1)
            loss = tf.nn.compute_average_loss(errors, global_batch_size=12)
        tape.minimize(loss)
        return loss

    return step


LOOPS = {"train_step": lambda model: model.train_step, "gradient_tape": _with_tape}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("in_graph", [True, False])
def test_R8_a_distributed_loop_by_hand(loop, in_graph):
    """It is `fit` on one device, or the sentence that says what to call."""
    counting = Counting()
    strategy = mirrored(2)
    with strategy.scope():
        keras.utils.set_random_seed(5)
        model = dense()
        model.compile(
            keras.optimizers.SGD(0.2, momentum=0.9),
            "mse",
            gradient_hooks=[hooks.GlobalNormClipping(0.5), counting],
        )
        step = LOOPS[loop](model)
        data = strategy.experimental_distribute_dataset(
            tf.data.Dataset.from_tensor_slices((X, Y)).batch(12)
        )

        def run(batch):
            strategy.run(step, args=(batch,))

        if in_graph:
            run = tf.function(run, autograph=False)
        try:
            for batch in data:
                run(batch)
        except (ValueError, RuntimeError) as error:
            assert "make_train_function" in str(error)
            return
    expected, _ = _on(None, dense, 48, 1, gradient_hooks=[hooks.GlobalNormClipping(0.5)])
    assert_near(model, expected)
    assert int(counting.count.numpy()) == 4


def test_R9_central_storage():
    """Right, or refused by name."""
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    chosen = [hooks.PercentileClipping(30, history=4), Counting()]
    expected, right = _on(
        None, dense, 48, gradient_hooks=[hooks.PercentileClipping(30, history=4), Counting()]
    )
    try:
        with strategy.scope():
            keras.utils.set_random_seed(5)
            model = dense()
            model.compile(keras.optimizers.SGD(0.2, momentum=0.9), "mse", gradient_hooks=chosen)
        logs = fit(model, X, Y, batch_size=12, epochs=2)
    except ValueError as error:
        assert "CentralStorageStrategy" in str(error)
        return
    assert_near(model, expected)
    assert_same_logs(logs, right)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_R9_gradients_inside_the_scope(num_replicas):
    with scope(num_replicas):
        keras.utils.set_random_seed(5)
        model = dense()
        model.compile(keras.optimizers.SGD(0.2), "mse")
        # On which replica, is not said: refused by name.
        with pytest.raises(ValueError, match="Call it outside of `with strategy.scope"):
            model.compute_gradients(X[:12], Y[:12])
    outside = model.compute_gradients(X[:12], Y[:12])
    keras.utils.set_random_seed(5)
    expected = dense(keras.Model)
    with tf.GradientTape() as tape:
        loss = square(Y[:12], expected(X[:12]))
    right = tape.gradient(loss, [v.value for v in expected.trainable_variables])
    for variable, gradient in zip(model.trainable_variables, right, strict=True):
        np.testing.assert_allclose(
            np.asarray(outside[variable]), gradient.numpy(), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("num_replicas", [None, 2])
def test_R10_evaluate_after_freezing_a_regularized_layer(num_replicas):
    """Keras counts the regularizers of what is trained."""
    with scope(num_replicas):
        keras.utils.set_random_seed(5)
        model = _with_added_losses(TapeModel)
        model.compile(keras.optimizers.SGD(0.1), "mse")
    stock = _with_added_losses(keras.Model)
    stock.set_weights(model.get_weights())
    for frozen in (False, True, False):
        if frozen:
            model.freeze("a/*")
        else:
            model.unfreeze("a/*")
        stock.get_layer("a").trainable = not frozen
        # Anew, so that nothing is left of an earlier trace.
        stock.compile(keras.optimizers.SGD(0.1), "mse")
        found, right = (m.evaluate(X, Y, batch_size=12, verbose=0) for m in (model, stock))
        np.testing.assert_allclose(found, right, rtol=1e-5)
    assert np.isfinite(weights(model)).all()
