"""Training steps and loops of one's own: `gradient_tape`, `minimize`, and their logs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

from . import support
from .support import OURS, STOCK, X, Y

MEAN_SQUARE = float(np.mean(Y.astype("float64") ** 2))


def _with_tape(logs, base=TapeModel):
    """A class whose step takes our tape and returns `logs(model, batch, y_pred, loss)`."""

    class Net(base):
        def train_step(self, data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with self.gradient_tape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred, sample_weight)
            tape.minimize(loss)
            return logs(self, (x, y), y_pred, loss)

    return Net


def _with_stock_tape(logs, base):
    class Net(base):
        def train_step(self, data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred, sample_weight)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return logs(self, (x, y), y_pred, loss)

    return Net


def _trained(cls, optimizer=None, epochs=2, **options):
    support.begin()
    model = support.functional(support.Kit(cls, None))
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse", **options)
    return model, support.fit(model, epochs=epochs)


def _all_metrics(model, batch, y_pred, loss):
    return model.compute_metrics(*batch, y_pred)


def _only_loss(model, batch, y_pred, loss):
    return {"loss": loss}


def _guide(model, batch, y_pred, loss):
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss, sample_weight=tf.shape(batch[0])[0])
        else:
            metric.update_state(batch[1], y_pred)
    return {metric.name: metric.result() for metric in model.metrics}


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}])
def test_the_loss_is_logged_as_keras_logs_it(options):
    stock, expected = _trained(keras.Model, **options)
    model, history = _trained(_with_tape(_only_loss), **options)
    support.assert_same(support.values(model.variables), support.values(stock.variables))
    assert history == expected and list(history) == ["loss"]


@pytest.mark.parametrize("logs", [_all_metrics, _guide])
def test_a_loss_that_the_step_tracks_or_metrics_show(logs):
    _, expected = _trained(keras.Model, metrics=["mae"], run_eagerly=True)
    _, history = _trained(_with_tape(logs), metrics=["mae"], run_eagerly=True)
    assert history["loss"] == expected["loss"]
    if logs is _all_metrics:
        assert history == expected


def test_other_scalars_are_logged_as_epoch_means():
    def logs(model, batch, y_pred, loss):
        # A Python number, a tensor, and something that is no scalar.
        return {
            "loss": loss,
            "square": tf.reduce_mean(batch[1] ** 2),
            "two": 2,
            "norms": tf.norm(y_pred, axis=1),
        }

    model, history = _trained(_with_tape(logs), epochs=3)
    np.testing.assert_allclose(history["square"], [MEAN_SQUARE] * 3, rtol=1e-6)
    assert history["two"] == [2.0] * 3
    # The last batch has 2 of the 10 examples: a mean of batches would be another number.
    batches = [np.mean(Y[i : i + 4] ** 2) for i in (0, 4, 8)]
    assert abs(np.mean(batches) - MEAN_SQUARE) > 0.01
    assert history["norms"][0].shape == (2,)


def test_a_skipped_step_is_in_no_mean():
    def logs(model, batch, y_pred, loss):
        return {"loss": loss, "square": tf.reduce_mean(batch[1] ** 2)}

    support.begin()
    model = support.functional(support.Kit(_with_tape(logs), None))
    model.compile("sgd", "mse", gradient_hooks=[hooks.SkipNonFinite()])
    y = Y.copy()
    y[5] = np.nan
    history = support.fit(model, y=y, shuffle=False)
    good = np.r_[0:4, 8:10]
    np.testing.assert_allclose(history["square"], [np.mean(Y[good] ** 2)], rtol=1e-6)
    assert np.isfinite(history["loss"][0])
    assert history["skipped_steps"] == [1.0]


def test_extra_scalars_on_replicas_are_those_of_the_global_batch():
    def logs(model, batch, y_pred, loss):
        return {"loss": loss, "square": tf.reduce_mean(batch[1] ** 2)}

    support.begin()
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        inputs = keras.Input((6,))
        model = _with_tape(logs)(inputs, layers.Dense(1)(inputs))
        model.compile(keras.optimizers.SGD(0.0), "mse")
    history = support.fit(model, shuffle=False, epochs=2)
    np.testing.assert_allclose(history["square"], [MEAN_SQUARE] * 2, rtol=1e-6)
    expected = np.mean((model(X).numpy() - Y) ** 2)
    np.testing.assert_allclose(history["loss"], [expected] * 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["same name", "another name"])
def test_what_own_trackers_give_is_not_averaged_again(name):
    """The step of Keras's VAE example: `{"loss": self.total_loss_tracker.result(), ...}`."""

    def logs(model, batch, y_pred, loss):
        model.total.update_state(loss)
        model.error.update_state(batch[1], y_pred)
        return {"loss": model.total.result(), "e": model.error.result()}

    def with_metrics(cls):
        class Net(cls):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.total = keras.metrics.Mean(name="loss" if name == "same name" else "total")
                self.error = keras.metrics.MeanAbsoluteError(name="error")

            @property
            def metrics(self):
                return [self.total, self.error]

        return Net

    _, expected = _trained(with_metrics(_with_stock_tape(logs, keras.Model)))
    _, history = _trained(with_metrics(_with_tape(logs)))
    assert history == expected and history["loss"][0] > 0


def test_a_step_with_keras_own_tape_stays_as_it_is():
    def logs(model, batch, y_pred, loss):
        return {"loss": loss, "last": loss}

    _, expected = _trained(_with_stock_tape(logs, keras.Model))
    _, history = _trained(_with_stock_tape(logs, TapeModel))
    assert history == expected


def test_a_step_of_ones_own_goes_through_the_hooks():
    ours, _ = _trained(
        _with_tape(_only_loss),
        keras.optimizers.SGD(1.0),
        epochs=1,
        gradient_hooks=[hooks.GlobalNormClipping(0.01), hooks.GradientMonitor()],
    )
    stock, _ = _trained(keras.Model, keras.optimizers.SGD(1.0, global_clipnorm=0.01), epochs=1)
    for value, truth in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_allclose(value, truth, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(ours.history.history["gradient_norm"], 0.01, rtol=1e-5)


@pytest.mark.parametrize("way", ["graph", "AutoGraph", "eager"])
def test_minimize_in_a_loop_of_ones_own(way):
    """Bit for bit what tape and optimizer do by hand, hooks in a second training."""
    rows = [slice(0, 4), slice(4, 8), slice(8, 10)]

    def run(step, model):
        if way != "eager":
            step = tf.function(step, autograph=way == "AutoGraph")
        for row in rows:
            step(tf.constant(X[row]), tf.constant(Y[row]))
        return support.values(model.variables)

    def make(**options):
        support.begin()
        model = support.functional()
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", **options)
        model.optimizer.build(model.trainable_variables)
        return model

    def loss_of(model, x, y):
        return tf.reduce_mean((model(x, training=True) - y) ** 2)

    model = make()

    def ours(x, y):
        with model.gradient_tape() as tape:
            loss = loss_of(model, x, y)
        tape.minimize(loss)

    found = run(ours, model)
    by_hand = make()

    def theirs(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(by_hand, x, y)
        gradients = tape.gradient(loss, by_hand.trainable_variables)
        by_hand.optimizer.apply(gradients, by_hand.trainable_variables)

    support.assert_same(found, run(theirs, by_hand))

    model = make(gradient_hooks=[lambda g, v: tf.zeros_like(g)])
    before = support.values(model.trainable_variables)
    run(ours, model)
    support.assert_same(support.values(model.trainable_variables), before)
    model = make(jit_compile="update")
    for value, truth in zip(run(ours, model), found, strict=True):
        np.testing.assert_allclose(value, truth, rtol=1e-5, atol=1e-6)


def test_two_optimizers_as_in_a_gan():
    """Two `minimize` in one step, against Keras alone; neither model is called itself."""

    def networks():
        support.begin()
        return (
            keras.Sequential([keras.Input((3,)), layers.Dense(6, name="g")]),
            keras.Sequential([keras.Input((6,)), layers.Dense(1, name="d")]),
        )

    cross_entropy = keras.losses.BinaryCrossentropy(from_logits=True)
    noise = support.RNG.normal(size=(4, 3)).astype("float32")

    def discriminator_loss(g, d, real):
        scores = tf.concat([d(real), d(g(noise))], 0)
        return cross_entropy(tf.repeat([[1.0], [0.0]], [4, 4], axis=0), scores)

    def generator_loss(g, d):
        return cross_entropy(tf.ones((4, 1)), d(g(noise)))

    class GAN(TapeModel):
        def __init__(self, g, d):
            super().__init__()
            self.g, self.d = g, d

        def compile(self, g_optimizer, d_optimizer):
            super().compile()
            self.g_optimizer, self.d_optimizer = g_optimizer, d_optimizer

        def train_step(self, real):
            with self.gradient_tape() as tape:
                d_loss = discriminator_loss(self.g, self.d, real)
            tape.minimize(d_loss, self.d.trainable_variables, self.d_optimizer)
            with self.gradient_tape() as tape:
                g_loss = generator_loss(self.g, self.d)
            tape.minimize(g_loss, self.g.trainable_variables, self.g_optimizer)
            return {"d_loss": d_loss, "g_loss": g_loss}

    gan = GAN(*networks())
    gan.compile(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1))
    gan.register_gradient_hook(lambda g, v: 2.0 * g, targets="*/g/*")
    batches = tf.data.Dataset.from_tensor_slices(X[:8]).batch(4)
    history = gan.fit(batches, verbose=0, shuffle=False).history

    g, d = networks()
    g_optimizer, d_optimizer = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1)
    losses = []
    for row in (slice(0, 4), slice(4, 8)):
        with tf.GradientTape() as tape:
            d_loss = discriminator_loss(g, d, tf.constant(X[row]))
        gradients = tape.gradient(d_loss, d.trainable_variables)
        d_optimizer.apply(gradients, d.trainable_variables)
        with tf.GradientTape() as tape:
            g_loss = generator_loss(g, d)
        gradients = tape.gradient(g_loss, g.trainable_variables)
        g_optimizer.apply([2 * v for v in gradients], g.trainable_variables)
        losses.append((float(d_loss), float(g_loss)))
    for model, truth in ((gan.g, g), (gan.d, d)):
        for value, expected in zip(model.get_weights(), truth.get_weights(), strict=True):
            np.testing.assert_allclose(value, expected, atol=1e-6)
    means = np.mean(losses, axis=0)
    np.testing.assert_allclose([history["d_loss"][0], history["g_loss"][0]], means, rtol=1e-5)


def test_a_step_that_passes_over_the_hooks_is_told():
    with pytest.warns(UserWarning, match="hooks 'value_clipping': they do nothing"):
        _trained(
            _with_stock_tape(_only_loss, TapeModel),
            epochs=1,
            gradient_hooks=[hooks.ValueClipping(1.0)],
        )


@pytest.mark.parametrize("kit", [STOCK, OURS], ids=["keras", "ours"])
def test_super_train_step(kit):
    """A step that only adds to the logs; its extra key is the last batch's, as in Keras."""

    class Net(kit.Model):
        def train_step(self, data):
            return {**super().train_step(data), "first": data[1][0, 0]}

    support.begin()
    model = support.functional(support.Kit(Net, None))
    model.compile("sgd", "mse")
    history = support.fit(model, shuffle=False)
    assert history["first"] == [float(Y[8, 0])]
