"""Traces that go from trial to trial change no score, and nothing else either."""

from __future__ import annotations

import gc
import threading
import weakref

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from keras_tapefit import TapeModel, backward, hooks, tuning
from keras_tapefit.tuning import fingerprint


def hp_of(**values):
    hp = keras_tuner.HyperParameters()
    for name, value in values.items():
        hp.Fixed(name, value)
    return hp


def fresh(hypermodel, **values):
    """Builds a model as a tuner does for a trial."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    return hypermodel.build(hp_of(**values))


def train(model, data, **kwargs):
    x, y = data
    kwargs = {"epochs": 2, "batch_size": 16, "verbose": 0, "validation_data": data, **kwargs}
    return model.fit(x, y, **kwargs).history


VALUES = [(0.01, 1.0), (0.05, 0.2), (0.002, 5.0)]


def runs(build, data, reuse, values=VALUES):
    hypermodel = tuning.TapeHyperModel(build, reuse=reuse)
    found = []
    for learning_rate, max_norm in values:
        model = fresh(hypermodel, learning_rate=learning_rate, max_norm=max_norm)
        history = train(model, data)
        found.append((history, model.get_weights(), [v.numpy() for v in model.optimizer.variables]))
    return hypermodel, found


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert one[0] == other[0]
        for a, b in zip(one[1] + one[2], other[1] + other[2], strict=True):
            np.testing.assert_array_equal(a, b)


def test_models_train_bit_for_bit_as_without_reuse(build, data):
    hypermodel, reused = runs(build, data, True)
    _, plain = runs(build, data, False)

    assert hypermodel.history == ["traced", "reused", "reused"]
    assert_equal(reused, plain)


class Lazy(TapeModel):
    def __init__(self, units):
        super().__init__()
        self.hidden = keras.layers.Dense(units, activation="tanh")
        self.dropout = keras.layers.Dropout(0.3)
        self.last = keras.layers.Dense(1)

    def call(self, x, training=False):
        return self.last(self.dropout(self.hidden(x), training=training))


def lazy(hp):
    model = Lazy(3)
    model.compile(
        keras.optimizers.SGD(hp.get("learning_rate"), momentum=0.9),
        "mse",
        gradient_hooks=[hooks.GlobalNormClipping(hp.get("max_norm")), hooks.GradientNoise(0.01)],
        backward=backward.SharpnessAware(rho=hp.get("max_norm") / 50),
    )
    return model


def test_a_lazy_subclass_with_random_hooks_and_a_live_rho(data):
    hypermodel, reused = runs(lazy, data, True, VALUES[:2])
    _, plain = runs(lazy, data, False, VALUES[:2])

    assert hypermodel.history == ["traced", "reused"]
    assert_equal(reused, plain)


def test_a_reused_trace_is_not_traced_again(data):
    # Where the walk does not look: what a call changes else, is traced for each model.
    seen = threading.local()

    class Counted(TapeModel):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            seen.calls.append(hasattr(x, "numpy"))
            return self.dense(x)

    def counted(hp):
        model = Counted()
        model.compile("sgd", "mse")
        return model

    counts = []
    hypermodel = tuning.TapeHyperModel(counted, reuse=True)
    for _ in range(2):
        seen.calls = []
        train(fresh(hypermodel), data)
        counts.append((seen.calls.count(False), seen.calls.count(True)))
    assert hypermodel.history == ["traced", "reused"]
    # Each has two symbolic calls, which make its weights; the first has two traces besides,
    # and the second two calls that check these.
    assert counts == [(4, 0), (2, 2)]


def test_models_stay_independent_of_each_other(light, data):
    hypermodel = tuning.TapeHyperModel(light, reuse=True)
    x, y = data
    first = fresh(hypermodel, learning_rate=0.01, max_norm=1.0)
    train(first, data)
    before = first.get_weights(), first.predict(x, verbose=0), first.evaluate(x, y, verbose=0)

    second = fresh(hypermodel, learning_rate=0.05, max_norm=0.5)
    train(second, data)
    assert hypermodel.history == ["traced", "reused"]
    after = first.get_weights(), first.predict(x, verbose=0), first.evaluate(x, y, verbose=0)
    for a, b in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2] == after[2]

    # Both go on, each as if the other were not there.
    train(first, data)
    assert float(first.optimizer.learning_rate) == pytest.approx(0.01)
    assert int(first.optimizer.iterations) == 12
    assert int(second.optimizer.iterations) == 6
    assert second.gradient_hooks["global_norm_clipping"].max_norm == 0.5
    assert second.predict(x, verbose=0).shape == (48, 1)


def test_a_model_that_was_replaced_goes_on_as_it_would_have(build, data):
    ends = []
    for reuse in (True, False):
        hypermodel = tuning.TapeHyperModel(build, reuse=reuse)
        first = fresh(hypermodel, learning_rate=0.01, max_norm=1.0)
        train(first, data, shuffle=False)
        second = fresh(hypermodel, learning_rate=0.05, max_norm=0.5)
        train(second, data, shuffle=False)
        history = train(first, data, shuffle=False)
        ends.append((history, first.get_weights(), [v.numpy() for v in first.optimizer.variables]))
    assert_equal(ends[:1], ends[1:])


def test_other_shapes_of_data_are_traced_and_not_mixed_up(light, data):
    hypermodel = tuning.TapeHyperModel(light, reuse=True)
    train(fresh(hypermodel, learning_rate=0.01), data)
    model = fresh(hypermodel, learning_rate=0.01)
    history = train(model, data, batch_size=32)
    plain = fresh(tuning.TapeHyperModel(light), learning_rate=0.01)

    assert hypermodel.history == ["traced", "traced: the batches have other shapes"]
    assert history == train(plain, data, batch_size=32)


def _dense(activation="tanh", rate=0.0, loss="mse", layer=None, jit_compile="auto"):
    inputs = keras.Input((4,))
    h = keras.layers.Dense(3, activation=activation)(inputs)
    h = layer(h) if layer is not None else keras.layers.Dropout(rate)(h)
    model = TapeModel(inputs, keras.layers.Dense(1)(h))
    model.compile("sgd", loss, jit_compile=jit_compile)
    return model


class Hidden(keras.layers.Layer):
    """A layer whose config does not tell all."""

    def __init__(self, factor):
        super().__init__()
        self._factor = factor

    def call(self, x):
        return x * self._factor

    def get_config(self):
        return {}


class Drawing(keras.layers.Layer):
    """A layer with an initializer for its weights."""

    def __init__(self, seed):
        super().__init__()
        self.kernel_initializer = keras.initializers.RandomNormal(seed=seed)

    def build(self, shape):
        self.kernel = self.add_weight(shape=(3,), initializer=self.kernel_initializer)

    def call(self, x):
        return x * self.kernel


def _lambda_loss(factor):
    return lambda y, p: factor * keras.ops.mean((y - p) ** 2)


DIFFERENT = {
    "activation": lambda i: _dense(activation=["tanh", "relu"][i]),
    "rate of dropout": lambda i: _dense(rate=[0.1, 0.2][i]),
    "loss": lambda i: _dense(loss=["mse", "mae"][i]),
    "closure of a loss": lambda i: _dense(loss=_lambda_loss(1.0 + i)),
    "config that omits": lambda i: _dense(layer=Hidden(1.0 + i)),
    "what XLA compiles": lambda i: _dense(jit_compile=[False, "update"][i]),
    "Lambda layer": lambda i: _dense(layer=keras.layers.Lambda(lambda x, f=1.0 + i: f * x)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_baked_into_a_trace_is_not_reused(what, data):
    index = iter([0, 1])
    hypermodel = tuning.TapeHyperModel(lambda hp: DIFFERENT[what](next(index)), reuse=True)
    for _ in range(2):
        train(fresh(hypermodel), data, epochs=1, validation_data=None)
    assert len(hypermodel.history) == 2
    assert hypermodel.history[1].startswith("traced")


def test_initial_weights_are_no_part_of_a_trace(data):
    seeds = iter([0, 1])
    hypermodel = tuning.TapeHyperModel(lambda hp: _dense(layer=Drawing(next(seeds))), reuse=True)
    for _ in range(2):
        train(fresh(hypermodel), data, epochs=1, validation_data=None)
    assert hypermodel.history == ["traced", "reused"]


def test_models_die_with_their_trials(light, data):
    hypermodel = tuning.TapeHyperModel(light, reuse=True)
    references = []
    for learning_rate, _ in VALUES:
        model = fresh(hypermodel, learning_rate=learning_rate)
        train(model, data, epochs=1)
        references.append(weakref.ref(model))
        references += [weakref.ref(v.value) for v in model.variables]
    assert hypermodel.history == ["traced", "reused", "reused"]
    del model
    keras.utils.clear_session()
    gc.collect()
    assert not any(reference() for reference in references)


def test_kinds_are_bounded(data):
    losses = iter(["mse", "mae", "mae", "mse"])
    hypermodel = tuning.TapeHyperModel(lambda hp: _dense(loss=next(losses)), reuse=1)
    references = []
    for _ in range(4):
        model = fresh(hypermodel)
        train(model, data, epochs=1, validation_data=None)
        references.append(weakref.ref(model))
    found = [entry.partition(":")[0] for entry in hypermodel.history]
    assert found == ["traced", "traced", "reused", "traced"]
    del model
    keras.utils.clear_session()
    gc.collect()
    assert not any(reference() for reference in references)


def test_private_names_mean_what_they_did(light, data):
    """Says which name changed, where the tests above only say that nothing is reused."""
    assert op_def_registry.get("RandomStandardNormal").is_stateful
    assert not op_def_registry.get("StatelessRandomNormalV2").is_stateful
    assert op_def_registry.get("NoSuchOperation") is None

    model = fresh(tuning.TapeHyperModel(light))
    there = set()
    recurrent = keras.layers.LSTM(2)
    recurrent(np.zeros((1, 2, 2)))
    decaying = keras.optimizers.AdamW()
    decaying.apply([v.value for v in recurrent.trainable_variables], recurrent.trainable_variables)

    def look(*_):
        parts = [model, *model.layers, model.optimizer, *model.metrics, recurrent.cell, decaying]
        there.update(name for part in parts for name in vars(part))

    train(model, data, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=look)])
    model.predict(data[0], verbose=0)
    for layer in model.layers:
        if layer.weights:
            store = {}
            layer.save_own_variables(store)
            layer.load_own_variables(store)
    look()
    of_classes = fingerprint._PASSED_OVER[type]
    passed_over = set().union(*fingerprint._PASSED_OVER.values()) - of_classes
    if keras.__version__ < "3.15":
        # Not there yet.
        passed_over.discard("_compiled_trainable_state")
    assert passed_over <= there, passed_over - there
    concrete = tf.function(lambda: model.trainable_variables[0].value).get_concrete_function()
    assert concrete.captured_inputs and concrete.graph._function_captures.by_val_external


def test_the_parts_of_the_search_space_are_reused(data):
    """Eight kinds of clipping times three gates: all may be kept."""

    def build(hp):
        inputs = keras.Input((4,))
        model = TapeModel(inputs, keras.layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
        return model

    hypermodel = tuning.TapeHyperModel(build, reuse=True, parts=("clipping", "gate"))
    kinds = [("norm", "none"), ("value", "spikes"), ("norm", "non_finite"), ("adaptive", "none")]
    for clipping, gate in kinds + kinds:
        values = {"gradient_hooks/clipping": clipping, "gradient_hooks/gate": gate}
        train(fresh(hypermodel, **values), data, epochs=1, validation_data=None)
    found = [entry.partition(":")[0] for entry in hypermodel.history]
    assert found == ["traced"] * 4 + ["reused"] * 4
    assert hypermodel._pool.num_kinds >= len(tuning.search_space.CLIPPING) * 3


def test_arguments_are_checked(build):
    with pytest.raises(TypeError, match="`build` must be a function"):
        tuning.TapeHyperModel(3)
    with pytest.raises(ValueError, match="`reuse` must not be negative"):
        tuning.TapeHyperModel(build, reuse=-1)
    with pytest.raises(ValueError, match="`parts` must be some of"):
        tuning.TapeHyperModel(build, parts=("clip",))
