"""Models that are built by their first batch; each test is named by its fault.

What is right is the same training of a model that was built before, to the bit.
"""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, callbacks, hooks

from .support import X, Y, assert_same_bits, assert_same_logs, fit, scope, weights

pytestmark = [pytest.mark.slow, pytest.mark.long]

MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "several": {"steps_per_execution": 3},
    "replicas": {},
}


class Net(TapeModel):
    """Layers `a` and `b`, BatchNormalization between them, and what a subclass adds."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a = layers.Dense(3, name="a")
        self.norm = layers.BatchNormalization(name="norm")
        self.b = layers.Dense(2, name="b")

    def call(self, x, training=False):
        return self.b(self.norm(self.a(x), training=training))


class WithBareVariable(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = tf.Variable(1.5, name="scale")

    def call(self, x, training=False):
        return super().call(x, training=training) * self.scale


class WithWeight(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.shift = self.add_weight(shape=(2,), initializer="ones", name="shift")

    def call(self, x, training=False):
        return super().call(x, training=training) + self.shift


class WithBuiltLayer(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.b.build((None, 3))


def sequential(**kwargs):
    return TapeSequential(
        [
            layers.Dense(3, name="a"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="b"),
        ],
        **kwargs,
    )


KINDS = {
    "sequential": sequential,
    "subclass": Net,
    "bare": WithBareVariable,
    "weight": WithWeight,
    "layer": WithBuiltLayer,
}

# Every kind and every mode, and what is most often met in all modes.
both = pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("sequential", mode) for mode in MODES),
        ("subclass", "several"),
        ("bare", "graph"),
        ("weight", "eager"),
        ("bare", "replicas"),
        ("layer", "several"),
    ],
)
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("mode", MODES)


def made(kind, mode="graph", built=False, optimizer="adam", gradient_hooks=None, **options):
    """Returns a compiled model, built or not, with the same first weights."""
    if gradient_hooks is not None:
        # A hook belongs to one model.
        gradient_hooks = [type(hook).from_config(hook.get_config()) for hook in gradient_hooks]
    keras.utils.set_random_seed(5)
    with scope(2 if mode == "replicas" else None):
        model = KINDS[kind](name="net")
        if built:
            model(X[:1])
        options = {"jit_compile": False, **MODES[mode], **options}
        model.compile(optimizer, "mse", gradient_hooks=gradient_hooks, **options)
    return model


def pair(*args, **options):
    """Returns a model that its first batch builds, and one that is built before."""
    return made(*args, **options), made(*args, built=True, **options)


def with_nan(rows):
    x = X.copy()
    x[rows] = np.nan
    return x


# --- M1: records


@both
def test_M1_a_history_of_every_step(kind, mode):
    histories = []
    for model in pair(kind, mode):
        histories.append(callbacks.GradientHistory())
        fit(model, epochs=2, callbacks=histories[-1:])
    ours, theirs = (each.to_numpy() for each in histories)
    assert ours.keys() == theirs.keys()
    assert len(ours["step"]) == 12
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@both
def test_M1_a_file_with_every_step(kind, mode, tmp_path):
    paths = [tmp_path / "ours.csv", tmp_path / "theirs.csv"]
    for model, path in zip(pair(kind, mode), paths, strict=True):
        fit(model, epochs=2, callbacks=[callbacks.GradientCSV(path, per_variable=True)])
    ours, theirs = (path.read_text() for path in paths)
    assert [row["step"] for row in csv.DictReader(ours.splitlines())] == [*map(str, range(12))]
    assert ours == theirs


def events(folder):
    """Returns the scalars in a folder of TensorBoard, and the tags of its histograms."""
    found, histograms = {}, set()
    for path in sorted((folder / "gradients").iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                tensor = tf.make_ndarray(value.tensor)
                if tensor.ndim == 0:
                    found[value.tag, event.step] = float(tensor)
                elif tensor.ndim == 2:
                    histograms.add((value.tag, event.step))
    return found, histograms


@modes
@pytest.mark.parametrize("kind", ["sequential", "bare"])
def test_M1_scalars_and_histograms_of_every_step(kind, mode, tmp_path):
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for model, folder in zip(pair(kind, mode), folders, strict=True):
        board = callbacks.GradientTensorBoard(folder, write_every=1, histograms_every=2)
        fit(model, epochs=2, callbacks=[board])
    ours, theirs = map(events, folders)
    assert {step for tag, step in ours[0] if tag == "gradient_norm"} == set(range(1, 13))
    assert ours == theirs


def test_M1_two_callbacks_validation_and_a_window(tmp_path):
    """Steps that accumulate, and `evaluate` in the middle."""
    found = []
    for i, built in enumerate([False, True]):
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
        model = made("weight", built=built, optimizer=optimizer)
        history = callbacks.GradientHistory(per_variable=False)
        both = [history, callbacks.GradientCSV(tmp_path / f"{i}.csv")]
        fit(model, epochs=2, callbacks=both, validation_data=(X, Y))
        found.append(((tmp_path / f"{i}.csv").read_text(), history.to_numpy(), model))
    (text, ours, model), (expected, theirs, other) = found
    assert text == expected
    assert_same_bits(model, other)
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_M1_of_train_on_batch():
    """A loop of `train_on_batch`, with the callback's methods called by hand."""
    found = []
    for model in pair("sequential"):
        history = callbacks.GradientHistory()
        history.set_model(model)
        history.on_train_begin()
        for i in range(3):
            history.on_train_batch_begin(i)
            model.train_on_batch(X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8])
            history.on_train_batch_end(i)
        history.on_train_end()
        found.append(history.to_numpy())
    for name, values in found[1].items():
        np.testing.assert_array_equal(found[0][name], values, err_msg=name)
    assert list(found[0]["step"]) == [0, 1, 2]


# --- M2: what is frozen at first


def frozen_in_keras(kind, epochs, mode):
    """`keras` in the sense of Keras: `trainable` by hand, and compiled anew."""
    model = made(kind, mode, built=True)
    a = next(layer for layer in model.layers if layer.name == "a")
    first = [np.array(w) for w in a.get_weights()]
    model.freeze("*a/*")
    fit(model, epochs=epochs)
    for found, expected in zip(a.get_weights(), first, strict=True):
        np.testing.assert_array_equal(found, expected)
    return model


@both
def test_M2_frozen_from_the_first_step_on(kind, mode):
    ours, theirs = pair(kind, mode, gradient_hooks=[hooks.Freezing("*a/*", epochs=1)])
    fit(ours), fit(theirs)
    assert_same_bits(ours, theirs)
    assert_same_bits(ours, frozen_in_keras(kind, 1, mode))
    fit(ours, epochs=2, initial_epoch=1), fit(theirs, epochs=2, initial_epoch=1)
    assert_same_bits(ours, theirs)


@both
def test_M2_batch_normalization_stays(kind, mode):
    ours, theirs = pair(kind, mode, gradient_hooks=[hooks.Freezing("*norm/*", epochs=(0, 1))])
    logs = [fit(model, callbacks=[callbacks.GradientHistory()]) for model in (ours, theirs)]
    norm = next(layer for layer in ours.layers if layer.name == "norm")
    for found, expected in zip(norm.get_weights(), [1.0, 0.0, 0.0, 1.0], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert_same_bits(ours, theirs)
    assert_same_logs(*logs, rtol=0)


def test_M2_stages_micro_batches_and_a_gate():
    stages = [["*b/*"], ["*norm/*"], ["*a/*"]]
    options = {"micro_batches": 2, "steps_per_execution": 2}
    ours, theirs = (
        made(
            "bare",
            built=built,
            gradient_hooks=[hooks.GradualUnfreezing(stages, every=1), hooks.SkipNonFinite()],
            **options,
        )
        for built in (False, True)
    )
    for model in (ours, theirs):
        fit(model, with_nan(20), epochs=3)
    assert_same_bits(ours, theirs)


def test_M2_by_steps_in_train_on_batch():
    ours, theirs = pair("sequential", gradient_hooks=[hooks.Freezing("*a/*", steps=2)])
    for model in (ours, theirs):
        for i in range(4):
            model.train_on_batch(X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8])
    assert_same_bits(ours, theirs)


# --- M3: models that own a variable already


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("bare", "graph"), ("bare", "replicas"), ("weight", "several"), ("layer", "eager")],
)
def test_M3_an_optimizer_knows_all_variables(kind, mode):
    """Every callback and hooks at once, and weights as with none of them."""
    ours, theirs = (
        made(
            kind,
            mode,
            built=built,
            gradient_hooks=[hooks.GlobalNormClipping(0.5), hooks.UpdateMonitor(per_variable=True)],
        )
        for built in (False, True)
    )
    logs = [fit(model, callbacks=[callbacks.GradientHistory()]) for model in (ours, theirs)]
    assert_same_bits(ours, theirs)
    assert_same_logs(*logs, rtol=0)
    assert len(ours.optimizer.variables) == 2 + 2 * len(ours.trainable_variables)


@pytest.mark.parametrize("kind", ["bare", "weight", "layer"])
def test_M3_percentiles_per_layer_keep_their_variables(kind):
    """State of a hook for each variable, frozen ones among them."""
    gradient_hooks = [hooks.PercentileClipping(50.0, history=4), hooks.AdaptiveClipping(0.01)]
    found = []
    for built in (False, True):
        model = made(kind, built=built, gradient_hooks=gradient_hooks)
        model.register_gradient_hook(hooks.Freezing("*b/*", epochs=1))
        fit(model, epochs=2)
        found.append(model)
    assert_same_bits(*found)


# --- M4: a first batch that is not finite


@both
def test_M4_a_bad_first_batch_leaves_nothing(kind, mode):
    ours, theirs = pair(kind, mode, gradient_hooks=[hooks.SkipNonFinite()])
    logs = [fit(model, with_nan(3)) for model in (ours, theirs)]
    assert np.isfinite(weights(ours)).all()
    assert_same_bits(ours, theirs)
    assert_same_logs(*logs, rtol=0)
    if mode != "replicas":
        plain = made(kind, mode, built=True)
        fit(plain, X[8:], Y[8:])
        for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def by_hand(model, x, y):
    with model.gradient_tape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
    tape.minimize(loss)


@pytest.mark.parametrize("traced", [False, True])
@kinds
def test_M4_in_a_loop_by_hand(kind, traced):
    found = []
    for model in pair(kind, gradient_hooks=[hooks.SkipNonFinite()]):
        step = tf.function(by_hand) if traced else by_hand
        for rows in (slice(0, 8), slice(8, 16)):
            step(model, tf.constant(with_nan(3)[rows]), tf.constant(Y[rows]))
        found.append(model)
    assert np.isfinite(weights(found[0])).all()
    assert_same_bits(*found)


@kinds
def test_M4_in_a_loop_by_hand_with_compute_gradients(kind):
    found = []
    for model in pair(kind, gradient_hooks=[hooks.SkipNonFinite()]):
        for rows in (slice(0, 8), slice(8, 16)):
            model.apply_gradients(model.compute_gradients(with_nan(3)[rows], Y[rows]))
        found.append(model)
    assert np.isfinite(weights(found[0])).all()
    assert_same_bits(*found)


class CustomStep(Net):
    def train_step(self, data):
        x, y = data
        with self.gradient_tape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        tape.minimize(loss)
        return {"loss": loss}


@modes
def test_M4_in_a_custom_step(mode, monkeypatch):
    monkeypatch.setitem(KINDS, "custom", CustomStep)
    ours, theirs = pair("custom", mode, gradient_hooks=[hooks.SkipNonFinite()])
    logs = [fit(model, with_nan(3)) for model in (ours, theirs)]
    assert np.isfinite(weights(ours)).all()
    assert_same_bits(ours, theirs)
    assert_same_logs(*logs, rtol=0)


@pytest.mark.parametrize("eager", [False, True])
def test_M4_in_train_on_batch_with_dropout_and_random_numbers(eager):
    """Seeds go back too."""
    found = []
    for built in (False, True):
        keras.utils.set_random_seed(5)
        model = TapeSequential([layers.Dense(5), layers.Dropout(0.5), layers.BatchNormalization()])
        if built:
            model.build((None, 6))
        gradient_hooks = [hooks.GradientNoise(0.1, seed=3), hooks.SkipNonFinite()]
        model.compile("sgd", "mse", run_eagerly=eager, gradient_hooks=gradient_hooks)
        for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
            model.train_on_batch(with_nan(3)[rows], np.tile(Y, 3)[rows, :5])
        found.append(model)
    assert_same_bits(*found)


class Parts(TapeModel):
    """Calls its parts and never itself, so that nothing builds it before the first step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a = layers.Dense(3, name="a")
        self.norm = layers.BatchNormalization(name="norm")
        self.b = keras.Sequential([layers.Dense(2, name="last")], name="b")

    def train_step(self, data):
        x, y = data
        with self.gradient_tape() as tape:
            y_pred = self.b(self.norm(self.a(x), training=True))
            loss = tf.reduce_mean(tf.square(y_pred - y))
        tape.minimize(loss)
        return {"loss": loss}


def parts(built, **options):
    keras.utils.set_random_seed(5)
    model = Parts(name="net")
    if built:
        model.b(model.norm(model.a(X[:1])))
    model.compile("adam", gradient_hooks=[hooks.SkipNonFinite()], **options)
    return model


@pytest.mark.parametrize("options", [MODES["eager"], MODES["several"], {"jit_compile": False}])
def test_M1_M4_parts_that_their_step_builds(options):
    """All at once: no weights until the first step, which is not finite."""
    found = []
    for built in (False, True):
        model, history = parts(built, **options), callbacks.GradientHistory()
        logs = fit(model, with_nan(3), epochs=2, callbacks=[history])
        found.append((model, history.to_numpy(), logs))
    (ours, records, logs), (theirs, expected, right) = found
    assert np.isfinite(weights(ours)).all()
    assert_same_bits(ours, theirs)
    assert_same_logs(logs, right, rtol=0)
    assert list(records["step"]) == list(range(12))
    for name, values in expected.items():
        np.testing.assert_array_equal(records[name], values, err_msg=name)


# --- M5: an evaluation first


@both
def test_M5_evaluate_before_fit(kind, mode):
    """Logs of `evaluate` and of `fit`, and weights, as when the model was built."""
    found = []
    for built in (False, True):
        monitor = hooks.GradientMonitor(validation=True, per_variable=True)
        model = made(kind, mode, built=built, gradient_hooks=[monitor])
        before = model.evaluate(X, Y, verbose=0, return_dict=True)
        logs = fit(model, epochs=2, validation_data=(X, Y))
        found.append((before, logs, model))
    ours, theirs = found
    assert ours[0].keys() == theirs[0].keys() and "gradient_norm" in ours[0]
    assert_same_logs(ours[0], theirs[0], rtol=1e-6)
    assert_same_logs(ours[1], theirs[1], rtol=1e-6)
    assert_same_bits(ours[2], theirs[2])


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_M5_test_on_batch_predict_and_gradients_first(mode):
    """Whatever comes first, with a window and records."""
    found = []
    for built in (False, True):
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        monitor = hooks.GradientMonitor(validation=True)
        model = made("bare", mode, built=built, optimizer=optimizer, gradient_hooks=[monitor])
        model.test_on_batch(X[:8], Y[:8])
        model.predict(X, verbose=0)
        model.compute_gradients(X[:8], Y[:8])
        fit(model, callbacks=[callbacks.GradientHistory()])
        found.append(model)
    assert_same_bits(*found)


class Odd(Net):
    """Looks at numbers, so that Keras can build it by a batch only, and eagerly."""

    def call(self, x, training=False):
        return super().call(x * 2.0 if np.asarray(x).sum() == 1e9 else x, training=training)


def test_M1_M4_M5_a_model_that_only_a_batch_can_build(monkeypatch):
    """An evaluation, records, and a first batch that is not finite."""
    monkeypatch.setitem(KINDS, "odd", Odd)
    monitor = hooks.GradientMonitor(validation=True)
    found = []
    for evaluates in (True, False):
        for model in pair("odd", "eager", gradient_hooks=[monitor, hooks.SkipNonFinite()]):
            history = callbacks.GradientHistory()
            if evaluates:
                model.evaluate(X, Y, verbose=0)
            logs = fit(model, with_nan(3), callbacks=[history], validation_data=(X, Y))
            found.append((model, logs, history["gradient_norm"]))
    for ours, theirs in (found[:2], found[2:], found[::2]):
        assert_same_bits(ours[0], theirs[0])
        assert_same_logs(ours[1], theirs[1], rtol=0)
        np.testing.assert_array_equal(ours[2], theirs[2])
    assert len(found[0][2]) == 6


# --- M6: targets of what is to come


@both
def test_M6_a_hook_for_weights_to_come(kind, mode):
    ours, theirs = pair(kind, mode)
    for model in (ours, theirs):
        model.register_gradient_hook(lambda g, v: g * 0.1, targets="*kernel")
        model.register_gradient_hook(hooks.Freezing(["*b/*", "*norm/gamma"], epochs=1))
        fit(model, epochs=2)
    assert_same_bits(ours, theirs)


@kinds
def test_M6_a_target_that_matches_nothing_is_said_when_the_model_is_built(kind):
    ours, theirs = pair(kind)
    hook = hooks.GlobalNormClipping(1.0)
    with pytest.raises(ValueError, match="a/kernel"):
        theirs.register_gradient_hook(hook, targets="typo/*")
    ours.register_gradient_hook(hook, targets="typo/*")
    before = [(v, v.numpy()) for v in ours.variables]
    with pytest.raises(ValueError, match="a/kernel"):
        fit(ours)
    # The call never happened.
    for variable, value in before:
        np.testing.assert_array_equal(variable.numpy(), value)
    ours.compile("adam", "mse", jit_compile=False, gradient_hooks=[])
    fit(ours), fit(theirs)
    assert_same_bits(ours, theirs)
