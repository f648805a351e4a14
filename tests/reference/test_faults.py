"""What combinations once computed silently wrong; each test is named by its fault.

The right values come from `keras.Model` on whole batches, from NumPy in float64, or from a
loop that is written out.
"""

import functools
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, backward, callbacks, hooks

from .support import (
    TOKENS,
    Loop,
    X,
    Y,
    assert_near,
    assert_same_bits,
    assert_same_logs,
    check_parts,
    clip,
    dense,
    fit,
    scope,
    square,
    train,
    weights,
)

pytestmark = pytest.mark.slow

IN_PARTS = ["micro-batches", "accumulated", "replicas"]
# Of 8 rows; halves and pairs of replicas have unequal shares of them.
LENGTHS = np.array([6, 6, 5, 6, 1, 2, 1, 1] * 2)
IS_TOKEN = np.arange(6) < LENGTHS[:, None]
PADDED = np.where(IS_TOKEN, 1 + TOKENS[:16] % 4, 0).astype("int32")
RNG = np.random.default_rng(3)
LABELS = RNG.integers(0, 3, size=(16, 6))
# Of each example, in [0, 1].
SHARE = np.array([1, 1, 0, 1, 0, 0, 0, 1] * 2, "float32")
PARTLY = RNG.uniform(0.1, 2.0, size=16).astype("float32") * np.array([3, 1] * 4 + [1, 5] * 4)


# --- A, B: terms of a loss that divide differently


@pytest.mark.parametrize("parts", IN_PARTS)
def test_A1_ignored_labels(parts):
    """In NumPy: one softmax layer on one-hot tokens, labels padded with -1."""
    labels = np.where(IS_TOKEN, LABELS, -1)

    def make(kind):
        inputs = keras.Input((6,), dtype="int32")
        hidden = layers.Embedding(5, 3, embeddings_initializer="zeros")(inputs)
        return kind(inputs, hidden)

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    found, logs = train(
        make, {"x": TOKENS[:16], "y": labels}, 8, parts, loss=loss, epochs=1, momentum=0.0
    )
    table, losses = np.zeros((5, 3)), []
    for rows in (slice(0, 8), slice(8, 16)):
        kept = labels[rows] >= 0
        tokens, wanted = TOKENS[rows][kept], labels[rows][kept]
        odds = np.exp(table[tokens])
        odds /= odds.sum(-1, keepdims=True)
        losses.append(-np.log(odds[np.arange(len(wanted)), wanted]).mean())
        gradient = np.zeros_like(table)
        np.add.at(gradient, tokens, (odds - np.eye(3)[wanted]) / len(wanted))
        table = table - 0.2 * gradient
    assert_near(found, table.ravel())
    if parts != "accumulated":
        np.testing.assert_allclose(logs["loss"], [np.mean(losses)], rtol=1e-5)


def masked_and_not(kind):
    """An output with a mask, `a`, beside one without, `b`, on a common table."""
    tokens, numbers = keras.Input((6,), dtype="int32", name="t"), keras.Input((6,), name="n")
    hidden = layers.Embedding(5, 4, mask_zero=True)(tokens)
    a = layers.Dense(1, name="a")(layers.Dense(4, activation="tanh", name="common")(hidden))
    b = layers.Dense(2, name="b")(layers.Dense(4, activation="tanh", name="own")(numbers))
    return kind({"t": tokens, "n": numbers}, {"a": a, "b": b})


MASKED = {
    "x": {"t": PADDED, "n": X[:16]},
    "y": {"a": RNG.normal(size=(16, 6, 1)).astype("float32"), "b": Y[:16]},
}


@pytest.mark.parametrize("parts", IN_PARTS)
def test_A2_a_masked_output_beside_another(parts):
    check_parts(masked_and_not, MASKED, 8, parts, loss={"a": "mse", "b": "mse"})


def two_heads(kind):
    inputs = keras.Input((6,))
    hidden = layers.Dense(4, activation="tanh")(inputs)
    heads = {name: layers.Dense(2, name=name)(hidden) for name in ("a", "b")}
    return kind(inputs, heads)


TWO_HEADS = {"x": X[:16], "y": {"a": Y[:16], "b": Y[16:32]}}


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
@pytest.mark.parametrize("parts", IN_PARTS)
def test_A3_each_example_is_for_one_head(parts, reduction):
    data = {**TWO_HEADS, "sample_weight": {"a": SHARE, "b": 1 - SHARE}}
    loss = {name: keras.losses.MeanSquaredError(reduction=reduction) for name in "ab"}
    check_parts(two_heads, data, 8, parts, loss=loss, loss_weights={"a": 1.0, "b": 0.7})


@pytest.mark.parametrize("parts", IN_PARTS)
def test_A4_a_mask_and_the_mean_by_weight(parts):
    def make(kind):
        tokens = keras.Input((6,), dtype="int32")
        hidden = layers.Embedding(5, 4, mask_zero=True)(tokens)
        return kind(tokens, layers.Dense(1)(hidden))

    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    data = {"x": PADDED, "y": MASKED["y"]["a"], "sample_weight": np.tile(PARTLY[:, None], (1, 6))}
    check_parts(make, data, 8, parts, loss=loss)


@pytest.mark.parametrize("parts", IN_PARTS)
def test_A5_a_sum_beside_a_mean(parts):
    """15 examples: of the last batch, of 7, one part has 4 and the other 3."""
    data = keras.tree.map_structure(lambda v: v[:15], TWO_HEADS)
    loss = {"a": keras.losses.MeanSquaredError(reduction="sum"), "b": "mse"}
    check_parts(two_heads, data, 8, parts, loss=loss, loss_weights={"a": 0.05, "b": 1.0})


@pytest.mark.parametrize("parts", IN_PARTS)
def test_A6_regularizers_and_added_losses(parts):
    """A regularizer counts once; what a layer adds, by the examples that it has seen."""

    class Activity(layers.Layer):
        def call(self, inputs):
            self.add_loss(0.3 * tf.reduce_mean(tf.square(inputs)))
            return inputs

    def make(kind):
        tokens, numbers = keras.Input((6,), dtype="int32", name="t"), keras.Input((6,), name="n")
        hidden = layers.Embedding(5, 4, mask_zero=True)(tokens)
        a = layers.Dense(1, name="a", kernel_regularizer=keras.regularizers.L2(0.1))(hidden)
        b = Activity(name="b")(layers.Dense(2, name="own")(numbers))
        return kind({"t": tokens, "n": numbers}, {"a": a, "b": b})

    check_parts(make, MASKED, 8, parts, loss={"a": "mse", "b": "mse"})


@pytest.mark.parametrize("batch_size", [7, 5])
def test_B_each_outputs_own_loss_in_the_logs(batch_size):
    options = {"loss": {"a": "mse", "b": "mae"}, "epochs": 1}
    data = {**TWO_HEADS, "sample_weight": PARTLY.astype("float32")}
    _, logs = train(two_heads, data, batch_size, "micro-batches", **options)
    _, right = train(two_heads, data, batch_size, kind=keras.Model, **options)
    assert right.keys() == {"loss", "a_loss", "b_loss"}
    assert_same_logs(logs, right)


# --- C, D, E: windows


class Turns(keras.callbacks.Callback):
    """Freezes layer a in even epochs and b in odd ones."""

    def on_epoch_begin(self, epoch, logs=None):
        now, other = ("a/*", "b/*") if epoch % 2 == 0 else ("b/*", "a/*")
        self.model.unfreeze(other)
        self.model.freeze(now)


def _three_layers(kind):
    """Layers a and b have unequal numbers of variables."""
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="tanh", name="a")(inputs)
    hidden = layers.Dense(5, activation="tanh", use_bias=False, name="b")(hidden)
    return kind(inputs, layers.Dense(2, name="end")(hidden))


def test_C1_leftovers_while_layers_freeze_by_turns():
    """Of 7 batches the first six are two windows, and the last is one by itself."""
    keras.utils.set_random_seed(5)
    model, expected = _three_layers(TapeModel), _three_layers(keras.Model)
    expected.set_weights(model.get_weights())
    optimizer = keras.optimizers.SGD(0.2, momentum=0.9, gradient_accumulation_steps=3)
    model.compile(optimizer, "mse")
    fit(model, X[:28], Y[:28], batch_size=4, epochs=4, callbacks=[Turns()])
    loop = Loop(momentum=0.9)
    for epoch in range(4):
        training = expected.get_layer("b" if epoch % 2 == 0 else "a").trainable_variables
        training = [*training, *expected.get_layer("end").trainable_variables]
        for start, stop in ((0, 12), (12, 24), (24, 28)):
            x, y = X[start:stop], Y[start:stop]
            loop.update(lambda x=x, y=y: square(y, expected(x)), training)
    assert int(model.optimizer.iterations.numpy()) == 12
    assert_near(model, expected)


class TwoUpdates(TapeModel):
    """Each of two parts has a loss and an update of its own."""

    def train_step(self, data):
        x, y = data
        a, b = self.parts
        with self.gradient_tape(persistent=True) as tape:
            loss_a = square(y, a(x, training=True))
            loss_b = square(y**2, b(x, training=True))
        tape.minimize(loss_a, a.trainable_variables)
        tape.minimize(loss_b, b.trainable_variables, optimizer=getattr(self, "second", None))
        return {"loss": loss_a + loss_b}

    def call(self, x):
        return self.parts[0](x) + self.parts[1](x)


def two_parts(kind=TwoUpdates):
    keras.utils.set_random_seed(5)
    model = kind()
    model.parts = [layers.Dense(2, name="a"), layers.Dense(2, name="b")]
    for part in model.parts:
        part.build((None, 6))
    model(X[:1])
    return model


def _parts_written_out(rows, clip_a=None, clip_b=None, rows_b=None):
    """Trains the two parts on batches, each a slice of rows."""
    model = two_parts(TwoUpdates)
    a, b = model.parts
    loops = Loop(), Loop()
    for r in rows:
        loops[0].update(
            lambda r=r: square(Y[r], a(X[r])),
            a.trainable_variables,
            (lambda g: clip(g, clip_a)) if clip_a else (lambda g: g),
        )
    for r in rows_b or rows:
        loops[1].update(
            lambda r=r: square(Y[r] ** 2, b(X[r])),
            b.trainable_variables,
            (lambda g: clip(g, clip_b)) if clip_b else (lambda g: g),
        )
    return model


def test_C2_two_updates_on_one_optimizer_with_a_window():
    model = two_parts()
    model.compile(keras.optimizers.SGD(0.2, gradient_accumulation_steps=2))
    fit(model, X[:20], Y[:20], batch_size=4)
    expected = _parts_written_out([slice(0, 8), slice(8, 16), slice(16, 20)])
    assert_near(model, expected)


def test_C3_the_second_optimizer_accumulates():
    model = two_parts()
    model.second = keras.optimizers.SGD(0.2, gradient_accumulation_steps=2)
    model.compile(keras.optimizers.SGD(0.2), gradient_hooks=[hooks.GlobalNormClipping(0.5)])
    fit(model, X[:20], Y[:20], batch_size=4)
    expected = _parts_written_out(
        [slice(i, i + 4) for i in range(0, 20, 4)],
        clip_a=0.5,
        clip_b=0.5,
        rows_b=[slice(0, 8), slice(8, 16), slice(16, 20)],
    )
    assert_near(model, expected)


def _with_window(steps=4):
    keras.utils.set_random_seed(5)
    model = dense()
    model.compile(keras.optimizers.Adam(0.05, gradient_accumulation_steps=steps), "mse")
    return model


def _steps(model, start, stop):
    for i in range(start, stop):
        model.train_on_batch(X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4])


@pytest.mark.parametrize("how", ["keras", "weights", "pickle"])
def test_D_saved_in_the_middle_of_a_window(how, tmp_path):
    model, through = _with_window(), _with_window()
    _steps(through, 0, 9)
    _steps(model, 0, 3)
    if how == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    elif how == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = _with_window()
        _steps(loaded, 5, 6)
        loaded.load_weights(tmp_path / "model.weights.h5")
    else:
        loaded = pickle.loads(pickle.dumps(model))
    _steps(loaded, 3, 9)
    assert int(through.optimizer.iterations.numpy()) == 2
    assert_same_bits(loaded, through)


@pytest.mark.parametrize("fitted", [False, True])
def test_E1_the_config_of_the_optimizer_keeps_the_window(fitted):
    model = _with_window()
    if fitted:
        fit(model)
    optimizer = model.optimizer
    again = type(optimizer).from_config(optimizer.get_config())
    assert again.gradient_accumulation_steps == optimizer.gradient_accumulation_steps == 4


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, None), (None, 2)])
def test_E2_another_number_after_a_first_fit(before, after):
    keras.utils.set_random_seed(5)
    model = dense()
    model.compile(
        keras.optimizers.SGD(0.2, momentum=0.9, gradient_accumulation_steps=before), "mse"
    )
    expected = dense(keras.Model)
    expected.set_weights(model.get_weights())
    expected.compile(keras.optimizers.SGD(0.2, momentum=0.9), "mse")
    for number in (before, after):
        model.optimizer.gradient_accumulation_steps = number
        fit(model, X[:32], Y[:32], batch_size=4)
        fit(expected, X[:32], Y[:32], batch_size=4 * (number or 1))
    assert_near(model, expected)


# --- F: a step that is rejected as a whole


class MeanTeacher(TapeModel):
    """The teacher is a moving average of the student."""

    def train_step(self, data):
        x, y = data
        student, teacher = self.parts
        with self.gradient_tape() as tape:
            loss = square(y, student(x, training=True))
        tape.minimize(loss)
        for slow, fast in zip(teacher.weights, student.weights, strict=True):
            slow.assign(0.9 * slow + 0.1 * fast)
        return {"loss": loss}

    def call(self, x):
        return self.parts[1](x)


def _bad_second_batch():
    y = Y[:12].copy()
    y[4:8] = np.nan
    return y


KEPT = np.r_[0:4, 8:12]


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_F1_what_the_step_assigns_after_a_rejected_update(options):
    runs = []
    for x, y in ((X[:12], _bad_second_batch()), (X[KEPT], Y[KEPT])):
        model = two_parts(MeanTeacher)
        model.parts[1].trainable = False
        model.compile(keras.optimizers.SGD(0.2), gradient_hooks=[hooks.SkipNonFinite()], **options)
        fit(model, x, y, batch_size=4, epochs=2)
        runs.append(model)
    assert_same_bits(*runs)


class CriticAndGenerator(TwoUpdates):
    """The second update alone meets what is not finite."""

    def train_step(self, data):
        x, y = data
        a, b = self.parts
        with self.gradient_tape(persistent=True) as tape:
            loss_a = tf.reduce_mean(tf.square(a(x, training=True)))
            loss_b = square(y, b(x, training=True))
        tape.minimize(loss_a, a.trainable_variables)
        tape.minimize(loss_b, b.trainable_variables, optimizer=getattr(self, "second", None))
        return {"loss": loss_a}


@pytest.mark.parametrize("num_optimizers", [1, 2])
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_F2_two_updates_of_which_the_second_is_rejected(num_optimizers, options):
    runs = []
    for x, y in ((X[:12], _bad_second_batch()), (X[KEPT], Y[KEPT])):
        model = two_parts(CriticAndGenerator)
        if num_optimizers == 2:
            model.second = keras.optimizers.Adam(0.1)
        model.compile(
            keras.optimizers.SGD(0.2, momentum=0.9),
            gradient_hooks=[hooks.SkipNonFinite()],
            **options,
        )
        fit(model, x, y, batch_size=4, epochs=2)
        runs.append(model)
    assert_same_bits(*runs)
    if num_optimizers == 2:
        for found, expected in zip(*(m.second.variables for m in runs), strict=True):
            np.testing.assert_array_equal(found.numpy(), expected.numpy(), expected.path)


# --- G: data of unknown length


def _batches(known):
    # Not by 4: a known number is divided by as it is, a power of two is multiplied by.
    data = tf.data.Dataset.from_tensor_slices((X[:14], Y[:14])).batch(3)
    data = data.filter(lambda *batch: True)
    return data.apply(tf.data.experimental.assert_cardinality(5)) if known else data


UNKNOWN_LENGTH = {
    "no hooks": ({}, None, None),
    "gate": ({"gradient_hooks": [hooks.SkipNonFinite]}, None, None),
    "eager": ({"run_eagerly": True}, None, None),
    "three steps per execution": ({"steps_per_execution": 3}, None, None),
    "accumulated": ({}, 2, None),
    "replicas": ({}, None, 2),
}


# Keras says so of all data of unknown length, once.
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("mode", UNKNOWN_LENGTH)
def test_G_steps_without_data(mode):
    options, accumulation, num_replicas = UNKNOWN_LENGTH[mode]
    runs, records = [], []
    for known in (True, False):
        keras.utils.set_random_seed(5)
        rate = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
        with scope(num_replicas):
            model = dense()
            optimizer = keras.optimizers.Adam(rate, gradient_accumulation_steps=accumulation)
            made = {
                k: [kind() for kind in v] if isinstance(v, list) else v for k, v in options.items()
            }
            model.compile(optimizer, "mse", **made)
        history = callbacks.GradientHistory()
        # A first fit without a callback: nothing but the model is looked at.
        fit(model, _batches(known), None, batch_size=None)
        fit(model, _batches(known), None, batch_size=None, epochs=2, callbacks=[history])
        runs.append(model)
        records.append(history.to_numpy())
    assert int(runs[1].optimizer.iterations.numpy()) == (9 if accumulation else 15)
    assert_same_bits(runs[1], runs[0])
    for name, values in records[0].items():
        np.testing.assert_array_equal(records[1][name], values, err_msg=name)
    assert list(records[1]["step"]) == list(range(5, 15))
    assert np.isfinite(records[1]["loss"]).all()


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("mode", ["graph", "xla", "three steps per execution", "replicas"])
def test_G_the_losses_of_two_heads(mode):
    """Of the same trace: one for the shapes of the first batch would weigh it otherwise."""
    options = {
        "xla": {"jit_compile": True},
        "three steps per execution": {"steps_per_execution": 3},
    }
    logs = []
    for known in (True, False):
        keras.utils.set_random_seed(5)
        with scope(2 if mode == "replicas" else None):
            inputs = keras.Input((X.shape[1],))
            heads = {name: layers.Dense(Y.shape[1], name=name)(inputs) for name in "ab"}
            model = TapeModel(inputs, heads)
            model.compile("sgd", {"a": "mse", "b": "mae"}, **options.get(mode, {}))
        data = _batches(known).map(lambda x, y: (x, {"a": y, "b": y}))
        logs.append(model.fit(data, epochs=2, verbose=0, shuffle=False).history)
    assert logs[0].keys() == {"loss", "a_loss", "b_loss"}
    assert logs[0] == logs[1]


# --- H: XLA, and the bits of a gate


def _embedding(kind=TapeModel):
    tokens = keras.Input((6,), dtype="int32")
    hidden = layers.Flatten()(layers.Embedding(5, 3, name="e")(tokens))
    return kind(tokens, layers.Dense(2, name="end")(hidden))


OPTIMIZERS = {
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5),
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True),
    "Muon": lambda: keras.optimizers.Muon(0.01),
    "Lion": lambda: keras.optimizers.Lion(0.003),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_H_a_learning_rate_of_its_own_under_XLA(optimizer):
    """In eager mode there is nothing that a compiler could make of it."""
    runs, logs, start = [], [], None
    for options in ({"jit_compile": True}, {"run_eagerly": True}):
        keras.utils.set_random_seed(5)
        model = _embedding()
        start = weights(model)
        model.compile(
            OPTIMIZERS[optimizer](),
            "mse",
            gradient_hooks=[
                hooks.SkipNonFinite(),
                hooks.LearningRateMultiplier(0.3, "e/*"),
                hooks.UpdateMonitor(),
            ],
            **options,
        )
        logs.append(fit(model, TOKENS, Y, epochs=2))
        runs.append(model)
    assert np.abs(weights(runs[0]) - start)[:15].max() > 1e-3
    assert_near(*runs)
    assert_same_logs(*logs, rtol=1e-4)


def _optimizers_of_keras():
    # Wrappers, and the one whose averages Keras's graph begins with zeros: a departure.
    others = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer", "ScheduleFreeAdamW"}
    found = (name for name in dir(keras.optimizers) if name not in others)
    kinds = {n: getattr(keras.optimizers, n) for n in found}
    base = keras.optimizers.Optimizer
    return sorted(n for n, k in kinds.items() if isinstance(k, type) and issubclass(k, base))


@pytest.mark.parametrize("name", _optimizers_of_keras())
def test_H2_a_gate_that_lets_all_through_changes_no_bit(name):
    runs = []
    for kind, options in (
        (TapeModel, {"gradient_hooks": [hooks.SkipNonFinite()]}),
        (keras.Model, {}),
    ):
        keras.utils.set_random_seed(5)
        model = dense(kind)
        model.compile(getattr(keras.optimizers, name)(0.05), "mse", jit_compile=False, **options)
        fit(model, epochs=10)
        runs.append(model)
    assert_same_bits(*runs)


# --- I to L


@pytest.mark.parametrize("how", ["keras", "clone", "pickle"])
@pytest.mark.parametrize("targets", ["*/bias", "a/*"])
def test_I_frozen_variables_stay_so(how, targets, tmp_path):
    keras.utils.set_random_seed(5)
    model = dense()
    model.compile(keras.optimizers.SGD(0.2, momentum=0.9), "mse")
    fit(model)
    model.freeze(targets)
    if how == "keras":
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        again = keras.models.clone_model(model)
        again.set_weights(model.get_weights())
        again.compile(keras.optimizers.SGD(0.2, momentum=0.9), "mse")
    before = {v.path: v.numpy() for v in again.variables}
    fit(again)
    for variable in again.variables:
        frozen = "bias" in variable.path if targets == "*/bias" else variable.path[0] == "a"
        assert np.array_equal(variable.numpy(), before[variable.path]) == frozen, variable.path
    again.unfreeze(targets)
    fit(again)
    for variable in again.variables:
        assert not np.array_equal(variable.numpy(), before[variable.path]), variable.path


def _own_step(kind):
    class Net(kind):
        def train_step(self, data):
            x, y = data
            with self.gradient_tape() as tape:
                loss = square(y, self(x, training=True))
            tape.minimize(loss)
            return {"loss": loss}

    return Net


def _own_loss(kind):
    class Net(kind):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return square(y, y_pred)

    return Net


@pytest.mark.parametrize("parts", ["accumulated", "replicas"])
@pytest.mark.parametrize("own", [_own_step, _own_loss])
def test_J_a_mean_of_the_users_own(parts, own):
    """15 examples: the last batch has 7, of which one part has 4 and the other 3."""
    data = {"x": X[:15], "y": Y[:15]}
    found, logs = train(lambda kind: dense(own(kind)), data, 8, parts)
    expected, right = train(dense, data, 8, kind=keras.Model, loss="mse")
    assert_near(found, expected)
    assert_same_logs(logs, right)


def test_J_micro_batches_of_a_loss_of_the_users_own():
    data = {"x": X[:15], "y": Y[:15]}
    found, logs = train(lambda kind: dense(_own_loss(kind)), data, 8, "micro-batches")
    expected, right = train(dense, data, 8, kind=keras.Model, loss="mse")
    assert_near(found, expected)
    assert_same_logs(logs, right)


@pytest.mark.parametrize("parts", ["accumulated", "replicas"])
def test_J_a_divisor_that_the_step_says(parts):
    """A sum over what is labelled, divided by its number; parts have unequal numbers."""
    labelled = np.array([1, 1, 1, 1, 0, 1, 0, 0] * 2, "float32")

    class Net(TapeModel):
        def train_step(self, data):
            x, y, is_there = data
            with self.gradient_tape() as tape:
                error = tf.reduce_mean(tf.square(y - self(x, training=True)), -1)
                number = tf.reduce_sum(is_there)
                loss = tf.reduce_sum(error * is_there) / number
            tape.minimize(loss, weight=number)
            return {"loss": loss}

    data = {"x": X[:16], "y": Y[:16], "sample_weight": labelled}
    found, _ = train(lambda kind: dense(Net), data, 8, parts)
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    expected, _ = train(dense, data, 8, kind=keras.Model, loss=loss)
    assert_near(found, expected)


@pytest.mark.parametrize(
    "options",
    [{"backward": backward.SharpnessAware(0.5)}, {"micro_batches": 4}],
    ids=["backward", "micro_batches"],
)
def test_K_what_a_custom_step_cannot_use_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"(?s)train_step.*{name}|{name}.*train_step"):
        train(lambda kind: dense(_own_step(kind)), {"x": X, "y": Y}, 8, **options)


@pytest.mark.parametrize(
    "options",
    [{"backward": backward.SharpnessAware(0.5)}, {"micro_batches": 4}],
    ids=["backward", "micro_batches"],
)
def test_K_a_loss_of_the_users_own_uses_them(options):
    data = {"x": X, "y": Y}
    found, _ = train(lambda kind: dense(_own_loss(kind)), data, 8, **options)
    expected, _ = train(dense, data, 8, loss="mse", **options)
    assert_near(found, expected)
    plain, _ = train(dense, data, 8, loss="mse")
    if "backward" in options:
        assert np.abs(weights(plain) - weights(found)).max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"backward": backward.SharpnessAware(0.5)}, {"micro_batches": 4}],
    ids=["backward", "micro_batches"],
)
def test_L_compute_gradients_gives_what_the_first_hook_gets(options):
    seen, sizes = {}, []

    class Watching(layers.Layer):
        def call(self, inputs):
            sizes.append(inputs.shape[0])
            return inputs

    def keep(gradient, variable):
        seen[variable.path] = np.asarray(gradient)

    inputs = keras.Input((6,))
    hidden = layers.Dense(3, activation="tanh", name="a")(Watching()(inputs))
    model = TapeModel(inputs, layers.Dense(2, name="b")(hidden))
    model.compile("sgd", "mse", run_eagerly=True, gradient_hooks=[keep], **options)
    sizes.clear()
    gradients = model.compute_gradients(X[:8], Y[:8])
    largest = max(sizes)
    model.train_on_batch(X[:8], Y[:8])
    assert len(seen) == 4
    for path, value in seen.items():
        np.testing.assert_allclose(np.asarray(gradients[path]), value, rtol=1e-5, atol=1e-7)
    assert largest == 8 // options.get("micro_batches", 1)


def test_L_of_one_example_where_parts_are_more():
    """A batch that is smaller than the number of parts: no empty part counts."""
    runs = [
        functools.reduce(
            lambda model, i: (model.train_on_batch(X[i : i + 1], Y[i : i + 1]), model)[1],
            range(3),
            train(dense, {"x": X, "y": Y}, 8, loss="mse", **options)[0],
        )
        for options in ({"micro_batches": 4}, {})
    ]
    assert_near(*runs)
