"""What was removed, replaced or deleted is let go; `leaks.py` measures memory."""

import gc
import os
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday

from keras_tapefit import TapeModel, backward, callbacks, hooks
from keras_tapefit.training.runtime import runtime_of

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 4)).astype("float32")
Y = RNG.normal(size=(12, 1)).astype("float32")


def network(steps=None, **options):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, activation="tanh")(inputs)
    model = TapeModel(inputs, keras.layers.Dense(1)(hidden))
    model.compile(sgd(steps), "mse", **options)
    return model


def sgd(steps=None):
    return keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=steps)


def fit(model, **options):
    return model.fit(X, Y, **{"batch_size": 4, "shuffle": False, "verbose": 0, **options})


def graphs():
    gc.collect()
    return sum(issubclass(type(value), tf.Graph) for value in gc.get_objects())


def alive(references):
    gc.collect()
    return [reference() for reference in references if reference() is not None]


HOOKS = {
    "function": lambda: hooks.LambdaHook(lambda g, v: g * 0.5),
    "logs": lambda: hooks.GradientMonitor(per_variable=True),
    "outputs": lambda: hooks.OutputMonitor(),
    "replaced outputs": lambda: hooks.OutputGradient(lambda g, layer: g * 0.9),
    "state": lambda: hooks.PercentileClipping(30, history=4),
    "gate": lambda: hooks.SkipNonFinite(),
    "update": lambda: hooks.UpdateMonitor(),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("steps", [None, 2])
def test_hooks_traces_and_optimizers_go_when_the_model_is_compiled_again(kind, steps):
    """In a window with steps left over, and recorded."""
    # Without any hook the update is Keras's, which keeps graphs for ever.
    model = network(steps, gradient_hooks=[hooks.GradientScaling(0.5)])
    fit(model)
    before = graphs()
    handle = model.register_gradient_hook(HOOKS[kind]())
    fit(model, callbacks=[callbacks.GradientHistory()])
    gone = [weakref.ref(handle.hook), weakref.ref(model.optimizer)]
    assert graphs() > before
    handle.remove()
    del handle
    model.compile(sgd(steps), "mse")
    fit(model)
    assert alive(gone) == []
    assert graphs() == before


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_of_many_hooks_some_are_kept(eager):
    """As many as there are traces, for the case that they come back."""
    model = network(2, run_eagerly=eager)
    gone = []
    for i in range(24):
        hook = hooks.OutputMonitor(name=f"outputs_{i}")
        gone.append(weakref.ref(hook))
        with model.register_gradient_hook(hook):
            # One step is left over, and windows of one kind of records are traced each.
            fit(model, callbacks=[callbacks.GradientHistory()])
    del hook
    assert 1 <= len(alive(gone)) <= 17
    runtime = runtime_of(model)
    assert len(runtime.recording._kept) <= 17
    entries = runtime.logs.made
    assert len(entries._of_training) <= 2 * 17 * len(model.layers)


def test_the_window_of_an_optimizer_goes_with_it():
    """What it had accumulated belongs to no update, as in Keras."""
    model, other = network(2), network(2)
    other.set_weights(model.get_weights())
    model.train_on_batch(X[:4], Y[:4])
    model.compile(sgd(2), "mse")
    for each in (model, other):
        fit(each)
    for a, b in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    names = {n for n in runtime_of(model).state.variables() if n.startswith("window")}
    assert names == {n for n in runtime_of(other).state.variables() if n.startswith("window")}


def test_numbers_of_optimizers_that_are_gone_are_forgotten():
    """Another one may have their identity."""
    model = network()
    for steps in (None, 2, None, 3, None):
        model.compile(sgd(steps), "mse")
        fit(model)
    gc.collect()
    assert len(runtime_of(model).windows._steps) == 1


METHODS = {
    "plain": {},
    "sharpness": {"backward": backward.SharpnessAware(0.05), "micro_batches": 2},
    "examples": {"backward": backward.PerExampleClipping(1.0)},
}


@pytest.mark.parametrize(
    "method",
    everyday(["sharpness"], of=METHODS),
)
def test_models_are_let_go(method):
    """With all that they were trained with."""
    counts = []
    for _ in range(3):
        made = [hooks.SkipNonFinite(), hooks.GradientMonitor()]
        if method != "examples":
            made += [hooks.OutputMonitor(), hooks.PercentileClipping(30, history=4)]
        model = network(2, gradient_hooks=made, **METHODS[method])
        fit(model, callbacks=[callbacks.GradientHistory()], validation_data=(X, Y))
        model.compute_gradients(X, Y)
        gone = [weakref.ref(each) for each in (model, model.optimizer, *made)]
        gone += [weakref.ref(each.value) for each in model.variables]
        del model, made
        keras.utils.clear_session()
        assert alive(gone) == []
        counts.append(graphs())
    assert counts[1] == counts[2]


def test_files_and_threads_are_closed(tmp_path):
    model = network(gradient_hooks=[hooks.GradientMonitor()])
    fit(model)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(3):
        watchers = [
            callbacks.GradientHistory(),
            callbacks.GradientCSV(tmp_path / f"{number}.csv"),
            callbacks.GradientTensorBoard(tmp_path / f"{number}"),
        ]
        fit(model, callbacks=watchers)
        # What was interrupted closes its files with the next training, or its end.
        with pytest.raises(KeyboardInterrupt):
            fit(model, callbacks=[*watchers, Interrupts()])
    del watchers
    fit(model)
    gc.collect()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


class Interrupts(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt
