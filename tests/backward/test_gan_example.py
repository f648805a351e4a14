"""Several optimizers in one model: the GAN of `examples/gan.py`, stopped and resumed."""

import importlib.util
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

SOURCE = Path(__file__).parents[2] / "examples" / "gan.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("examples_gan_parts", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(example):
    def build():
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = example.build_model()
        noise = hooks.GradientNoise(0.01, seed=None, targets="generator/*")
        model.register_gradient_hook(noise)
        return model

    return build


def fit(model, epochs, **kwargs):
    x = np.random.default_rng(0).uniform(size=(32, 64)).astype("float32")
    return model.fit(x, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs)


def state(model):
    optimizers = [model.critic_optimizer, model.generator_optimizer]
    hook_state = [v for hook in model.gradient_hooks for v in hook.variables]
    slots = [v for optimizer in optimizers for v in optimizer.variables]
    return [v.numpy() for v in (*model.variables, *slots, *hook_state)]


def assert_same_state(one, other):
    for a, b in zip(state(one), state(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["weights", "model", "checkpoint"])
def test_resumed_equals_uninterrupted(build, tmp_path, by):
    path = str(tmp_path / ("gan.keras" if by == "model" else "gan.weights.h5"))
    # The noise has a seed drawn by chance, which is saved with the hook.
    whole = build()
    callbacks = []
    if by == "checkpoint":
        callbacks = [keras.callbacks.ModelCheckpoint(path, save_weights_only=True)]
    fit(whole, 2, callbacks=callbacks)
    if by == "weights":
        whole.save_weights(path)
    if by == "model":
        whole.save(path)
        resumed = keras.models.load_model(path)
    else:
        resumed = build()
        resumed.load_weights(path)
    fit(whole, 2)
    fit(resumed, 2)
    assert int(resumed.critic_optimizer.iterations) == 4 * 4 * resumed.critic_steps
    assert_same_state(resumed, whole)


@pytest.mark.slow
def test_hooks_tell_the_networks_apart(build):
    model = build()
    logs = fit(model, 1).history
    assert {"critic_norm", "generator_norm", "critic_loss", "generator_loss"} == set(logs)
    nothing = hooks.LambdaHook(lambda g, v: tf.zeros_like(g), targets="critic/*")
    model.gradient_hooks.set([nothing])
    before = [w.copy() for w in model.critic.get_weights()]
    model.critic_optimizer = keras.optimizers.SGD(0.1)
    start = model.generator.get_weights()
    fit(model, 1)
    for a, b in zip(before, model.critic.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(start[0] - model.generator.get_weights()[0]).max() > 0


@pytest.mark.slow
def test_a_full_checkpoint_every_epoch(build, tmp_path):
    path = str(tmp_path / "gan.keras")
    model = build()
    fit(model, 2, callbacks=[keras.callbacks.ModelCheckpoint(path)])
    loaded = keras.models.load_model(path)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_that_are_built_by_the_first_step(tmp_path):
    """A `call` that never runs, and layers that no `Input` tells their shape."""

    class Parts(TapeModel):
        def __init__(self):
            super().__init__()
            self.body = layers.Dense(3)
            self.head = layers.Dense(1)

        def call(self, x):
            raise AssertionError("never called")

        def train_step(self, data):
            x, y = data
            with self.gradient_tape() as tape:
                loss = tf.reduce_mean(tf.square(self.head(self.body(x)) - y))
            tape.minimize(loss)
            return {"mean": loss}

    model = Parts()
    model.compile("sgd", jit_compile=False)
    path = str(tmp_path / "parts.weights.h5")
    saver = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    with warnings.catch_warnings():
        # Keras, where it looks in vain for the shapes of a model that is never called.
        warnings.filterwarnings("ignore", message=".*never called|.*does not have a `build\\(\\)`")
        model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=4, verbose=0, callbacks=[saver])
    assert model.built and Path(path).exists()


def test_seeds_of_dropout_are_saved(tmp_path):
    def build():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((4,))
        model = TapeModel(inputs, layers.Dense(1)(layers.Dropout(0.5)(inputs)))
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        return model

    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    path = str(tmp_path / "model.weights.h5")
    whole = build()
    whole.fit(x, x[:, :1], shuffle=False, verbose=0)
    whole.save_weights(path)
    resumed = build()
    resumed.optimizer.build(resumed.trainable_variables)
    resumed.load_weights(path)
    for model in (whole, resumed):
        model.fit(x, x[:, :1], shuffle=False, verbose=0)
    for a, b in zip(whole.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
