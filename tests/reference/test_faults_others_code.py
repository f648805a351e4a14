"""Other people's code, failed calls and first hours; each test is named by its fault."""

import gc
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, backward, callbacks, hooks

from .support import (
    X,
    Y,
    assert_near,
    assert_same_bits,
    assert_same_logs,
    dense,
    fit,
    scope,
    square,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.long]


def built(make, kind=TapeModel, **options):
    keras.utils.set_random_seed(5)
    model = make(kind)
    model.compile(keras.optimizers.SGD(0.2, momentum=0.9), "mse", jit_compile=False, **options)
    return model


# --- N3: a base class whose `fit` has other arguments


class Simulator(keras.Model):
    """As in BayesFlow: `fit` takes a data set by keyword, and its own arguments."""

    def fit(self, *, dataset, keep_optimizer=False, **kwargs):
        self.kept = keep_optimizer
        return super().fit(dataset.batch(8), shuffle=False, **kwargs)


class Renamed(keras.Model):
    """`fit` without `**kwargs`, and the callbacks in another place."""

    def fit(self, data, callbacks=None, rounds=1):
        options = {"epochs": rounds, "callbacks": callbacks, "verbose": 0, "shuffle": False}
        return super().fit(data.batch(8), **options)


class Positional(keras.Model):
    def fit(self, x, y, *args, callbacks=(), **kwargs):
        return super().fit(x, y, 8, *args, callbacks=list(callbacks), **kwargs)


DATA = tf.data.Dataset.from_tensor_slices((X, Y))
CALLS = {
    Simulator: lambda m, **more: m.fit(
        dataset=DATA, keep_optimizer=True, epochs=2, verbose=0, **more
    ),
    Renamed: lambda m, **more: m.fit(DATA, rounds=2, **more),
    Positional: lambda m, **more: m.fit(X, Y, 2, 0, shuffle=False, **more),
}


def subclass(base, ours):
    bases = (TapeModel, base) if ours else (base,)

    class Net(*bases):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers.Dense(5, activation="tanh", name="a"), layers.Dense(2)

        def call(self, x):
            return self.b(self.a(x))

    return Net()


@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize("base", CALLS)
def test_N3_a_fit_with_other_arguments(base, with_history):
    ours, theirs = (built(lambda _, o=o: subclass(base, o)) for o in (True, False))
    history = callbacks.GradientHistory()
    logs = CALLS[base](ours, **({"callbacks": [history]} if with_history else {})).history
    expected = CALLS[base](theirs).history
    assert_same_bits(ours, theirs)
    assert_same_logs(logs, expected, rtol=0)
    assert len(history) == (12 if with_history else 0)


@pytest.mark.parametrize("base", [Simulator, Renamed])
def test_N3_with_a_freezing_schedule_and_a_window(base):
    """The clock is among the callbacks whatever `fit` looks like: leftovers, epochs."""
    ours = built(lambda _: subclass(base, True), gradient_hooks=[hooks.Freezing("*a/*", epochs=1)])
    CALLS[base](ours)
    theirs = built(lambda _: subclass(keras.Model, False))
    theirs(X[:1])
    theirs.a.trainable = False
    fit(theirs)
    optimizer = theirs.optimizer
    theirs.a.trainable = True
    theirs.compile(optimizer, "mse", jit_compile=False)
    # Of SGD the momentum is the state, and Keras makes it for what is trained only.
    again = keras.optimizers.SGD(0.2, momentum=0.9)
    again.build(theirs.trainable_variables)
    for new, old in zip(again.variables[-2:], optimizer.variables[-2:], strict=True):
        new.assign(old)
    theirs.compile(again, "mse", jit_compile=False)
    fit(theirs)
    assert_near(ours, theirs)


@pytest.mark.parametrize("base", CALLS)
def test_N3_wrong_arguments_are_refused_as_there(base):
    ours = built(lambda _: subclass(base, True))
    with pytest.raises(TypeError):
        ours.fit(nonsense=3)


# --- N4: `@tf.function` on `train_step`


def stepping(decorate, own_loss=False, dropout=0.2):
    class Net(TapeModel):
        @decorate
        def train_step(self, data):
            x, y = data
            with self.gradient_tape() as tape:
                y_pred = self(x, training=True)
                loss = square(y, y_pred) if own_loss else self.compute_loss(x, y, y_pred)
            tape.minimize(loss)
            return {"loss": loss}

    inputs = keras.Input((6,))
    hidden = layers.BatchNormalization(name="norm")(
        layers.Dense(5, activation="tanh", name="a")(inputs)
    )
    return Net(inputs, layers.Dense(2, name="b")(layers.Dropout(dropout, seed=3)(hidden)))


DECORATORS = {
    "function": tf.function,
    "options": tf.function(reduce_retracing=True, autograph=False),
    "jit": tf.function(jit_compile=True),
}
CHOSEN = {
    "monitor": lambda: [hooks.GradientMonitor()],
    "gate": lambda: [hooks.SkipNonFinite()],
    "both and clipping": lambda: [
        hooks.SkipNonFinite(),
        hooks.GlobalNormClipping(0.3),
        hooks.GradientMonitor(per_variable=True),
    ],
}


@pytest.mark.parametrize("mode", [{}, {"steps_per_execution": 3}, {"run_eagerly": True}])
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("decorator", ["function"])
def test_N4_a_decorated_step(decorator, chosen, mode):
    x = X.copy()
    if "gate" in chosen or "both" in chosen:
        x[17] = np.nan
    runs = []
    for decorate in (DECORATORS[decorator], lambda f: f):
        model = built(lambda _, d=decorate: stepping(d), gradient_hooks=CHOSEN[chosen](), **mode)
        history = callbacks.GradientHistory()
        runs.append((model, fit(model, x, epochs=2, callbacks=[history]), history.to_numpy()))
    (ours, logs, records), (theirs, right, expected) = runs
    assert_near(ours, theirs)
    assert_same_logs(logs, right)
    for name, values in expected.items():
        np.testing.assert_allclose(records[name], values, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("decorator", ["options", "jit"])
def test_N4_with_options_of_its_own(decorator):
    runs = []
    for decorate in (DECORATORS[decorator], lambda f: f):
        chosen = [hooks.SkipNonFinite(), hooks.GradientMonitor()]
        # XLA draws other random numbers.
        make = lambda _, d=decorate: stepping(d, dropout=0.0)  # noqa: E731
        model = built(make, gradient_hooks=chosen)
        runs.append((model, fit(model, epochs=2)))
    assert_near(runs[0][0], runs[1][0])
    assert_same_logs(runs[0][1], runs[1][1])


@pytest.mark.parametrize("accumulation", [None, 2])
def test_N4_on_replicas_and_in_a_window(accumulation):
    runs = []
    for decorate in (tf.function, lambda f: f):
        keras.utils.set_random_seed(5)
        with scope(None if accumulation else 2):
            model = stepping(decorate, own_loss=True)
            optimizer = keras.optimizers.SGD(0.2, gradient_accumulation_steps=accumulation)
            model.compile(optimizer, "mse", gradient_hooks=[hooks.GradientMonitor()])
        runs.append((model, fit(model, X[:40], Y[:40], epochs=2)))
    assert_near(runs[0][0], runs[1][0])
    assert_same_logs(runs[0][1], runs[1][1])


# --- N5: a step of the user's own without our tape is left as it is


def own_step(kind, autoencoder=False):
    class Net(kind):
        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="gelu", name="a")(inputs)
    hidden = layers.LayerNormalization()(hidden)
    return Net(inputs, layers.Dense(2, name="b")(layers.Dropout(0.2, seed=3)(hidden)))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adam", {}),
        ("rmsprop", {"steps_per_execution": 3}),
        ("adagrad", {"run_eagerly": True}),
        ("nadam", {"jit_compile": True}),
    ],
)
def test_N5_to_the_bit(optimizer, options):
    runs = []
    for kind in (TapeModel, keras.Model):
        keras.utils.set_random_seed(5)
        model = own_step(kind)
        model.compile(optimizer, "mse", metrics=["mae"], **{"jit_compile": False, **options})
        runs.append((model, fit(model, epochs=3, validation_data=(X, Y))))
    assert_same_bits(runs[0][0], runs[1][0])
    assert_same_logs(runs[0][1], runs[1][1], rtol=0)


def test_N5_of_train_on_batch():
    runs = []
    for kind in (TapeModel, keras.Model):
        keras.utils.set_random_seed(5)
        model = own_step(kind)
        model.compile(keras.optimizers.Lion(1e-2), "mse", jit_compile=False)
        logs = [model.train_on_batch(X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]
        runs.append((model, logs))
    assert_same_bits(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


# --- N8: inputs that are not dense


def optional(kind):
    """The second input may be left out."""

    class Net(kind):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers.Dense(5, activation="tanh", name="a"), layers.Dense(2)

        def call(self, inputs):
            x, more = inputs
            hidden = self.a(x)
            return self.b(hidden if more is None else hidden + more)

    return Net()


def sparse_net(kind):
    inputs = keras.Input((6,), sparse=True)
    return kind(inputs, layers.Dense(2)(layers.Dense(5, activation="tanh")(inputs)))


SPARSE = np.where(np.abs(X) > 0.7, X, 0.0).astype("float32")
WAYS = {
    "plain": {},
    "micro-batches": {"micro_batches": 2},
    "per example": {"backward": backward.PerExampleClipping(1e6)},
    "both": {"backward": backward.PerExampleClipping(1e6), "micro_batches": 2},
    "sharpness": {"backward": backward.SharpnessAware(0.0)},
}


def sparse_data():
    return (
        tf.data.Dataset.from_tensor_slices((SPARSE, Y))
        .batch(8)
        .map(lambda x, y: (tf.sparse.from_dense(x), y))
    )


def trained_or_refused(model, train):
    """Trains, or gets a refusal in words; returns whether it trained."""
    try:
        train(model)
    except (ValueError, TypeError) as error:
        assert "PerExampleClipping" in str(error) or "micro_batches" in str(error), error
        return False
    return True


@pytest.mark.parametrize("way", WAYS)
def test_N8_sparse_inputs(way):
    expected = built(sparse_net, keras.Model)
    fit(expected, SPARSE)
    options = dict(WAYS[way])
    if way == "sharpness":
        options = {"backward": backward.SharpnessAware(1e-12)}
    model = built(sparse_net, **options, gradient_hooks=[hooks.GradientMonitor()])
    done = trained_or_refused(model, lambda m: m.fit(sparse_data(), shuffle=False, verbose=0))
    assert done or "per" in way or way == "both"
    if done:
        assert_near(model, expected)


@pytest.mark.parametrize("way", WAYS)
def test_N8_an_optional_input(way):
    options = {"backward": backward.SharpnessAware(1e-12)} if way == "sharpness" else WAYS[way]
    model, expected = built(optional, **options), built(optional, keras.Model)
    for each in (model, expected):
        if each is model:
            done = trained_or_refused(
                each, lambda m: m.fit((X, None), Y, batch_size=8, shuffle=False, verbose=0)
            )
        else:
            each.fit((X, None), Y, batch_size=8, shuffle=False, verbose=0)
    # Micro-batches of single examples are refused, whatever the input is.
    assert done or way == "both"
    if done:
        assert_near(model, expected, 2e-6)


@pytest.mark.parametrize("options", [{}, {"micro_batches": 3}])
def test_N8_compute_gradients(options):
    model = built(sparse_net, **options)
    x = tf.sparse.from_dense(SPARSE[:8])
    with tf.GradientTape() as tape:
        loss = square(Y[:8], model(x))
    right = tape.gradient(loss, [v.value for v in model.trainable_variables])
    found = model.compute_gradients(x, Y[:8])
    for gradient, expected in zip(found.values(), right, strict=True):
        np.testing.assert_allclose(
            tf.convert_to_tensor(gradient), tf.convert_to_tensor(expected), rtol=1e-5, atol=1e-7
        )
    model = built(optional, **options)
    found = model.compute_gradients((X[:8], None), Y[:8])
    with tf.GradientTape() as tape:
        loss = square(Y[:8], model((X[:8], None)))
    right = tape.gradient(loss, [v.value for v in model.trainable_variables])
    for gradient, expected in zip(found.values(), right, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("data", ["sparse", "optional"])
def test_N8_on_replicas(data):
    def train(model):
        if data == "sparse":
            model.fit(sparse_data(), shuffle=False, verbose=0)
        else:
            model.fit((X, None), Y, batch_size=8, shuffle=False, verbose=0)

    make = sparse_net if data == "sparse" else optional
    expected = built(make, keras.Model)
    train(expected)
    keras.utils.set_random_seed(5)
    with scope(2):
        model = make(TapeModel)
        model.compile(
            keras.optimizers.SGD(0.2, momentum=0.9),
            "mse",
            gradient_hooks=[hooks.GradientMonitor()],
        )
    try:
        train(model)
    except (ValueError, TypeError) as error:
        # TensorFlow itself cannot share out such data.
        assert "replica" in str(error) or "strategy" in str(error).lower(), error
        return
    assert_near(model, expected)


# --- O5: a new hook for each fit


@pytest.mark.parametrize("kind", ["function", "hook", "freezing"])
def test_O5_a_new_hook_for_each_fit(kind):
    """Neither traces nor names of log entries pile up."""
    model = built(dense)
    make = {
        "function": lambda i: lambda g, v: g * (1.0 + i / 100),
        "hook": lambda i: hooks.GradientMonitor(per_variable=True, name=f"monitor_{i}"),
        "freezing": lambda i: hooks.Freezing("a/*", steps=i + 1, name=f"freezing_{i}"),
    }[kind]
    entries = set()
    for i in range(40):
        with model.register_gradient_hook(make(i)):
            logs = fit(model, X[:8], Y[:8])
        entries |= logs.keys()
        if kind == "hook":
            assert f"monitor_{i}_norm" in logs
            assert np.isfinite(logs[f"monitor_{i}_norm"]).all()
    assert len(model.train_function._traces) <= 16
    assert len(model.test_function._traces if model.test_function else ()) <= 16


def test_O5_log_entries_do_not_run_out():
    model = built(dense)
    for i in range(200):
        with model.register_gradient_hook(hooks.GradientMonitor(name=f"m{i}")):
            logs = model.train_on_batch(X[:8], Y[:8], return_dict=True)
        assert f"m{i}_norm" in logs and np.isfinite(logs[f"m{i}_norm"])
    assert "m3_norm" not in logs


def test_O5_old_hooks_are_let_go():
    import weakref

    model = built(dense)
    kept = []
    for i in range(24):
        hook = hooks.GradientMonitor(name=f"m{i}")
        kept.append(weakref.ref(hook))
        with model.register_gradient_hook(hook):
            model.train_on_batch(X[:8], Y[:8])
    del hook
    gc.collect()
    assert sum(ref() is not None for ref in kept) <= 17


# --- O7: hooks of a model inside


@pytest.mark.parametrize("through", ["fit", "train_on_batch"])
def test_O7_hooks_of_an_inner_model_are_not_silent(through):
    inner = TapeSequential([keras.Input((6,)), layers.Dense(5)], name="inner")
    inner.register_gradient_hook(hooks.GlobalNormClipping(1e-3))
    outer = built(lambda kind: kind(x := keras.Input((6,)), layers.Dense(2)(inner(x))))
    with pytest.warns(UserWarning, match="gradient hooks of 'inner' are not applied"):
        if through == "fit":
            fit(outer)
        else:
            outer.train_on_batch(X[:8], Y[:8])


def test_O7_no_word_where_there_is_none():
    inner = TapeSequential([keras.Input((6,)), layers.Dense(5)], name="inner")
    model = built(lambda kind: kind(x := keras.Input((6,)), layers.Dense(2)(inner(x))))
    model.register_gradient_hook(hooks.GlobalNormClipping(0.1), targets=inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model)


# --- Q3: an epoch of which every step is skipped


class Best(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.losses = []

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs["loss"])


@pytest.mark.parametrize(
    "options",
    [{}, {"steps_per_execution": 3}, {"run_eagerly": True}, {"micro_batches": 2}],
)
def test_Q3_all_steps_skipped(options, tmp_path):
    model = built(
        dense,
        gradient_hooks=[hooks.SkipNonFinite(), hooks.GradientMonitor()],
        metrics=["mae"],
        **options,
    )
    x = np.full_like(X, np.nan)
    best = Best()
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.weights.h5", monitor="loss", save_best_only=True, save_weights_only=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, callbacks=[checkpoint])
    before = checkpoint.best
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logs = fit(model, x, epochs=1, callbacks=[best, checkpoint])
    assert len([w for w in caught if "6 of 6 steps" in str(w.message)]) == 1
    for name in ("loss", "mae", "gradient_norm"):
        assert np.isnan(logs[name]).all(), name
    assert logs["skipped_steps"] == [6.0]
    assert np.isnan(best.losses).all() and checkpoint.best == before


def test_Q3_a_callback_sees_it_and_one_good_step_counts():
    model = built(dense, gradient_hooks=[hooks.SkipNonFinite()])
    x = np.full_like(X, np.nan)
    with pytest.warns(UserWarning, match="of 6 steps"):
        logs = fit(model, x, epochs=3, callbacks=[Ender()])
    assert len(logs["loss"]) == 1
    expected = built(dense, keras.Model)
    model = built(dense, gradient_hooks=[hooks.SkipNonFinite()])
    x[:8] = X[:8]
    with pytest.warns(UserWarning, match="5 of 6 steps"):
        logs = fit(model, x)
    assert_same_logs(logs, fit(expected, X[:8], Y[:8]))
    assert_near(model, expected)


class Ender(keras.callbacks.Callback):
    """What looks for NaN at the end of an epoch."""

    def on_epoch_end(self, epoch, logs=None):
        if np.isnan(logs["loss"]):
            self.model.stop_training = True


def test_Q3_with_replicas_a_window_and_a_custom_step():
    for own in (False, True):
        keras.utils.set_random_seed(5)
        with scope(2):
            model = stepping(lambda f: f) if own else dense()
            model.compile(keras.optimizers.SGD(0.2), "mse", gradient_hooks=[hooks.SkipNonFinite()])
        with pytest.warns(UserWarning, match="6 of 6 steps"):
            logs = fit(model, np.full_like(X, np.nan))
        assert np.isnan(logs["loss"]).all()
    optimizer = keras.optimizers.SGD(0.2, gradient_accumulation_steps=2)
    model = dense()
    model.compile(optimizer, "mse", gradient_hooks=[hooks.SkipNonFinite()])
    with pytest.warns(UserWarning, match="6 of 6 steps"):
        logs = fit(model, np.full_like(X, np.nan))
    assert np.isnan(logs["loss"]).all()


# --- Q5: nothing to train


def freeze_by(how, model):
    if how == "freeze":
        model.freeze("*")
    elif how == "layers":
        for layer in model.layers:
            layer.trainable = False
    else:
        model.trainable = False


@pytest.mark.parametrize("how", ["freeze", "layers", "model"])
@pytest.mark.parametrize(
    "options", [{}, {"run_eagerly": True}, {"gradient_hooks": [], "micro_batches": 2}]
)
def test_Q5_all_frozen(how, options):
    model = built(dense, **options)
    expected = built(dense, keras.Model)
    before = weights(model)
    freeze_by(how, model)
    with pytest.warns(UserWarning) as caught:
        logs = fit(model)
    words = [str(w.message) for w in caught]
    assert any("All of the model's weights are frozen" in w for w in words), words
    assert not any("train_step" in w for w in words), words
    np.testing.assert_array_equal(weights(model), before)
    expected.trainable = False
    with pytest.warns(UserWarning):
        assert_same_logs(logs, fit(expected))


@pytest.mark.parametrize("chosen", [hooks.GradientMonitor, hooks.SkipNonFinite])
def test_Q5_all_frozen_with_hooks_and_records(chosen):
    model = built(dense, gradient_hooks=[chosen()])
    before = weights(model)
    model.freeze("*")
    with pytest.warns(UserWarning, match="frozen"):
        fit(model, callbacks=[callbacks.GradientHistory()])
    np.testing.assert_array_equal(weights(model), before)
    model.unfreeze("*")
    fit(model)
    assert np.abs(weights(model) - before).max() > 0


def test_Q5_frozen_for_an_epoch_by_a_hook():
    model = built(dense, gradient_hooks=[hooks.Freezing("*", epochs=1)])
    before = weights(model)
    with pytest.warns(UserWarning, match="frozen"):
        fit(model)
    np.testing.assert_array_equal(weights(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, epochs=2, initial_epoch=1)
    expected = built(dense, keras.Model)
    fit(expected)
    assert_near(model, expected)
