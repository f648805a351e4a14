"""One record a step: equal to the same training in float64 NumPy, in every mode."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, callbacks, hooks
from keras_tapefit.callbacks.reader import RecordReader
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.update.watch import RecordRequest, _histogram

from . import support
from .support import PATHS, STEPS_PER_EPOCH

# Arguments of `compile`, and the number of replicas.
MODES = {
    "graph": ({}, 1),
    "xla": ({"jit_compile": True}, 1),
    "eager": ({"run_eagerly": True}, 1),
    # Four steps in executions of three: the last one has a step of its own.
    "several steps an execution": ({"steps_per_execution": 3}, 1),
    "replicas": ({}, 2),
}
SLOW = {
    "replicas, several steps": ({"steps_per_execution": 3}, 2),
    "xla of the update": ({"jit_compile": "update"}, 1),
    "xla, several steps": ({"jit_compile": True, "steps_per_execution": 3}, 1),
    "replicas, eager": ({"run_eagerly": True}, 2),
    "three replicas": ({}, 3),
}


@functools.cache
def run(mode):
    """Trains in a mode; returns the records, those expected, and the logs."""
    options, num_replicas = {**MODES, **SLOW}[mode]
    model = support.network(num_replicas, gradient_hooks=support.hook_list(), **options)
    truth = support.expected(support.weights_of(model), support.BAD_Y)
    history = callbacks.GradientHistory(weights="end/*")
    log = support.fit(model, [history], support.BAD_Y, epochs=support.EPOCHS)
    return history.to_numpy(), truth, log.history


@pytest.fixture(
    scope="module", params=[*MODES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def trained(request):
    return run(request.param)


def check(records, truth, names, rtol=1e-5):
    for name in names:
        np.testing.assert_allclose(records[name], truth[name], rtol, 1e-7, err_msg=name)


def test_there_is_a_record_of_every_step(trained):
    records, truth, _ = trained
    num_steps = support.EPOCHS * STEPS_PER_EPOCH
    assert records["step"].tolist() == list(range(num_steps))
    assert records["epoch"].tolist() == [i // STEPS_PER_EPOCH for i in range(num_steps)]
    assert {len(values) for values in records.values()} == {num_steps}
    assert set(records) == {n for n in truth if not n.startswith("weight/hidden")}


def test_losses_and_learning_rates(trained):
    records, truth, _ = trained
    check(records, truth, ["loss", "learning_rate"])


def test_norms_before_and_after_hooks(trained):
    records, truth, _ = trained
    names = ["gradient_norm", "gradient_norm_after"]
    check(records, truth, [*names, *(f"{name}/{path}" for name in names for path in PATHS)])
    clipped = truth["gradient_norm"] > support.MAX_NORM
    assert clipped.any() and not clipped.all()


def test_skipped_steps(trained):
    records, truth, log = trained
    assert records["skipped"].dtype == bool
    bad = np.arange(len(records["skipped"])) % STEPS_PER_EPOCH == support.BAD_STEP
    np.testing.assert_array_equal(records["skipped"], bad)
    np.testing.assert_array_equal(truth["skipped"] > 0, bad)
    np.testing.assert_array_equal(log["skipped_steps"], [1.0] * support.EPOCHS)
    assert (records["update_ratio"][bad] == 0).all()


def test_updates_and_weights(trained):
    records, truth, _ = trained
    names = ["update_ratio", *(f"update_ratio/{path}" for path in PATHS)]
    # A difference of weights: float32 leaves fewer figures of it.
    check(records, truth, names, rtol=1e-4)
    check(records, truth, [name for name in records if name.startswith("weight/")])


def test_a_frozen_variable_is_nan(trained):
    records, _, _ = trained
    first = records["epoch"] == 0
    for kind in ("gradient_norm", "gradient_norm_after", "update_ratio"):
        values = records[f"{kind}/end/bias"]
        assert np.isnan(values[first]).all()
        assert np.isfinite(values[~first & ~records["skipped"]]).all()


def test_more_steps_than_the_buffer_keeps():
    """600 steps of one example each, and a buffer of 256: it wraps twice between epochs."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(600, 6)).astype("float32")
    y = rng.normal(size=(600, 2)).astype("float32")
    model = support.network(optimizer=keras.optimizers.SGD(0.002, 0.9))
    begin = support.weights_of(model)
    history = callbacks.GradientHistory(updates=False)
    support.fit(model, [history], y, x=x, batch_size=1)

    records = runtime_of(model).recording.records
    assert records.size == 256
    assert history["step"].tolist() == list(range(600))
    weights, velocity = dict(begin), {path: 0.0 for path in PATHS}
    norms = []
    for i in range(600):
        _, gradients = support.gradients_of(weights, x[i : i + 1], y[i : i + 1])
        norms.append({path: support.joint([g]) for path, g in gradients.items()})
        for path, gradient in gradients.items():
            velocity[path] = 0.9 * velocity[path] - 0.002 * gradient
            weights[path] = weights[path] + velocity[path]
    for path in PATHS:
        truth = [row[path] for row in norms]
        np.testing.assert_allclose(history[f"gradient_norm/{path}"], truth, 1e-3, 1e-6)
    # What a reader finds that comes too late: the last ones, with their true numbers.
    steps, rows = records.read(0)
    assert steps.tolist() == list(range(600 - 256, 600))
    np.testing.assert_array_equal(
        rows[:, records.columns.index("gradient_norm")], history["gradient_norm"][-256:]
    )


@pytest.mark.slow
def test_an_execution_longer_than_the_buffer():
    """The buffer grows with `steps_per_execution`."""
    x, y = np.tile(support.X, (15, 1)), np.tile(support.Y, (15, 1))
    model = support.network(steps_per_execution=300, optimizer=keras.optimizers.SGD(0.01))
    history = callbacks.GradientHistory(per_variable=False)
    support.fit(model, [history], y, x=x, batch_size=1)
    assert history["step"].tolist() == list(range(720))
    assert np.isfinite(history["loss"]).all()
    assert len(np.unique(history["loss"])) > 700


@pytest.mark.parametrize("with_hooks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recording_has_no_hand_in_the_training(with_hooks):
    models = []
    for watched in (False, True):
        given = [hooks.GlobalNormClipping(0.3)] if with_hooks else []
        models.append(support.network(gradient_hooks=given))
        support.fit(models[-1], [callbacks.GradientHistory()] * watched)
    # TensorFlow multiplies in another order where a product is used once more.
    rtol = 1e-5 if with_hooks else 0
    for ours, theirs in zip(models[1].variables, models[0].variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol, rtol / 10, err_msg=ours.path)
    assert int(models[1].optimizer.iterations) == int(models[0].optimizer.iterations) == 4


def test_without_hooks():
    model = support.network()
    truth = support.expected(support.weights_of(model), epochs=1, max_norm=None, held_back=None)
    history = callbacks.GradientHistory(weights="end/*")
    support.fit(model, [history])
    check(history, truth, [n for n in history if "ratio" not in n])
    check(history, truth, [n for n in history if "ratio" in n], rtol=1e-4)


def test_a_loss_scale_is_out_of_the_norms_and_overflows_are_skipped():
    y = support.BAD_Y
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.2), 2.0**12)
    model = support.network(optimizer=optimizer)
    loss, gradients = support.gradients_of(support.weights_of(model), support.X[:12], y[:12])
    history = callbacks.GradientHistory()
    support.fit(model, [history], y)
    assert history["skipped"].tolist() == [False, True, False, False]
    np.testing.assert_allclose(history["loss"][0], loss, 1e-5)
    for path in PATHS:
        norm = support.joint([gradients[path]])
        np.testing.assert_allclose(history[f"gradient_norm/{path}"][0], norm, 1e-5)
    np.testing.assert_allclose(history["learning_rate"], 0.2, 1e-6)
    assert history["update_ratio"][1] == 0 < history["update_ratio"][0]


def test_accumulated_gradients():
    """Before the hooks of each step, after them of each window, whose update it is."""
    optimizer = keras.optimizers.SGD(0.2, gradient_accumulation_steps=2)
    model = support.network(optimizer=optimizer, gradient_hooks=[hooks.GradientScaling(0.5)])
    begin = support.weights_of(model)
    history = callbacks.GradientHistory()
    support.fit(model, [history])
    both = [
        support.gradients_of(begin, support.X[i : i + 12], support.Y[i : i + 12]) for i in (0, 12)
    ]
    norms = [support.joint(gradients.values()) for _, gradients in both]
    np.testing.assert_allclose(history["gradient_norm"][:2], norms, 1e-5)
    mean = {path: (both[0][1][path] + both[1][1][path]) / 2 for path in PATHS}
    after = history["gradient_norm_after"]
    np.testing.assert_array_equal(np.isnan(after), [True, False, True, False])
    np.testing.assert_allclose(after[1], 0.5 * support.joint(mean.values()), 1e-5)
    np.testing.assert_array_equal(np.isnan(history["update_ratio"]), [True, False, True, False])
    kernel = "end/kernel"
    ratio = 0.2 * 0.5 * support.joint([mean[kernel]]) / support.joint([begin[kernel]])
    np.testing.assert_allclose(history[f"update_ratio/{kernel}"][1], ratio, 1e-4)
    assert not history["skipped"].any()


def test_sparse_gradients_are_summed_by_row():
    """An embedding of which rows come several times; the oracle multiplies by one-hots."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    tokens = np.random.default_rng(1).integers(0, 5, (12, 4))
    inputs = keras.Input((4,), dtype="int32")
    flat = layers.Flatten()(layers.Embedding(5, 3, name="table")(inputs))
    model = TapeModel(inputs, layers.Dense(2, name="end")(flat))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    table, kernel, bias = (w.astype("float64") for w in model.get_weights())
    hot = np.eye(5)[tokens]
    error = (hot @ table).reshape(12, 12) @ kernel + bias - support.Y[:12]
    of_rows = (2 * error / error.size @ kernel.T).reshape(12, 4, 3)
    gradient = np.einsum("bte,btd->ed", hot, of_rows)

    history = callbacks.GradientHistory()
    support.fit(model, [history], support.Y[:12], x=tokens)
    truth = support.joint([gradient])
    np.testing.assert_allclose(history["gradient_norm/table/embeddings"], truth, 1e-5)
    ratio = 0.1 * truth / support.joint([table])
    np.testing.assert_allclose(history["update_ratio/table/embeddings"], ratio, 1e-4)


class OwnStep(TapeModel):
    """Keras's step, written by a user."""

    def train_step(self, data):
        x, y = data
        with self.gradient_tape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        tape.minimize(loss)
        return self.compute_metrics(x, y, y_pred)


@pytest.mark.slow
def test_a_train_step_of_ones_own():
    plain = support.network(gradient_hooks=support.hook_list())
    truth = support.expected(support.weights_of(plain), support.BAD_Y)
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="tanh", name="hidden")(inputs)
    model = OwnStep(inputs, layers.Dense(2, name="end")(hidden))
    model.compile(
        plain.optimizer.from_config(plain.optimizer.get_config()),
        "mse",
        jit_compile=False,
        gradient_hooks=support.hook_list(),
    )
    model.set_weights(plain.get_weights())
    history = callbacks.GradientHistory()
    support.fit(model, [history], support.BAD_Y, epochs=support.EPOCHS)
    check(history, truth, [n for n in history if "ratio" not in n])


class TwoOptimizers(TapeModel):
    """Each layer has an optimizer of its own, as the two halves of a GAN do."""

    def train_step(self, data):
        x, y = data
        for layer, optimizer in zip(self.layers[1:], (self.optimizer, self.other), strict=True):
            with self.gradient_tape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            tape.minimize(loss, layer.trainable_variables, optimizer)
        return {"loss": loss}


@pytest.mark.slow
def test_two_updates_in_one_step():
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="tanh", name="hidden")(inputs)
    model = TwoOptimizers(inputs, layers.Dense(2, name="end")(hidden))
    model.other = keras.optimizers.SGD(0.1)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    weights = support.weights_of(model)
    history = callbacks.GradientHistory()
    support.fit(model, [history], support.Y[:12], x=support.X[:12])
    _, first = support.gradients_of(weights, support.X[:12], support.Y[:12])
    for path in PATHS[:2]:
        weights[path] = weights[path] - 0.1 * first[path]
    _, second = support.gradients_of(weights, support.X[:12], support.Y[:12])
    truth = {**second, **{path: first[path] for path in PATHS[:2]}}
    for path in PATHS:
        norm = support.joint([truth[path]])
        np.testing.assert_allclose(history[f"gradient_norm/{path}"], [norm], 1e-5)
    np.testing.assert_allclose(history["gradient_norm"], [support.joint(truth.values())], 1e-5)


def test_histograms_are_of_all_values():
    """Counts in thirty equal bins between the least and the largest value."""
    model = support.network(gradient_hooks=[hooks.GlobalNormClipping(1e-3)])
    begin = support.weights_of(model)
    callback = Histograms()
    support.fit(model, [callback], epochs=2)
    assert [step for step, _ in callback.found] == [2, 5]

    model = support.network()
    callback = Histograms(every=1)
    support.fit(model, [callback], support.Y[:12], x=support.X[:12])
    _, gradients = support.gradients_of(begin, support.X[:12], support.Y[:12])
    ((step, table),) = callback.found
    assert step == 0
    for path, row in zip(PATHS, table, strict=True):
        values = gradients[path].ravel()
        np.testing.assert_allclose(row[:2], [values.min(), values.max()], 1e-5)
        counts, _ = np.histogram(values, 30, (values.min(), values.max()))
        assert row[2:].sum() == values.size
        # A value on the edge of two bins may fall to either side.
        assert np.abs(np.cumsum(row[2:]) - np.cumsum(counts)).max() <= 1


class Histograms(RecordReader):
    """Reads what `GradientTensorBoard` writes."""

    def __init__(self, every=3):
        super().__init__()
        self.every, self.found = every, []

    def request(self):
        return RecordRequest(histograms_every=self.every)

    def take(self, steps, rows):
        self.found += self._records.read_histograms(int(steps[0]))


@pytest.mark.parametrize("size", [1, 1000, 2**17 + 3])
def test_a_histogram_counts_every_value(size):
    values = np.random.default_rng(0).normal(size=size).astype("float32")
    counted = _histogram(tf.constant(values)).numpy()
    assert counted[2:].sum() == size
    np.testing.assert_array_equal(counted[:2], [values.min(), values.max()])
    counts, _ = np.histogram(values, 30, (values.min(), values.max()) if size > 1 else None)
    if size > 1:
        assert np.abs(counted[2:] - counts).max() <= 1 + 1e-4 * size


def test_a_histogram_leaves_out_what_is_not_finite():
    values = [np.nan, -np.inf, np.inf, 1.0, 2.0, 2.0]
    counted = _histogram(tf.constant(values, tf.float32)).numpy()
    assert counted[:2].tolist() == [1.0, 2.0]
    assert counted[2] == 1 and counted[-1] == 2 and counted[2:].sum() == 3
    assert _histogram(tf.fill([4], np.float32(np.nan))).numpy()[2:].sum() == 0
    # Whose difference is no finite number.
    ends = _histogram(tf.constant([-3e38, 3e38])).numpy()
    assert ends[2] == ends[-1] == 1


def test_requests_are_merged_and_a_trace_is_kept_for_each():
    """Two callbacks ask for different things; each gets its own columns."""
    model = support.network()
    little = callbacks.GradientHistory(per_variable=False, updates=False)
    much = callbacks.GradientHistory()
    support.fit(model, [little, much])
    assert set(little) == {*"step epoch loss learning_rate gradient_norm".split()} | {
        "gradient_norm_after",
        "skipped",
    }
    assert set(much) - set(little) == {"update_ratio"} | {
        f"{kind}/{path}"
        for kind in ("gradient_norm", "gradient_norm_after", "update_ratio")
        for path in PATHS
    }
    np.testing.assert_array_equal(little["gradient_norm"], much["gradient_norm"])
    traces = model.train_function._traces
    num_traces = len(traces)
    support.fit(model, [little, much])
    assert len(traces) == num_traces
    assert little["step"].tolist() == list(range(8))
    # Nobody asks any more.
    support.fit(model, [])
    assert runtime_of(model).recording.records is None
    support.fit(model, [little])
    # The steps of the fit without it are counted, not recorded.
    assert little["step"].tolist() == [*range(8), *range(12, 16)]


@pytest.mark.parametrize("accumulating", [(2,), (2, 2), (None, 2)], ids=str)
def test_the_norm_after_hooks_is_of_all_updates_of_a_step(accumulating):
    """On one optimizer or two, with windows or without: as far as SGD moved the weights."""

    class Two(TapeModel):
        def train_step(self, data):
            x, y = data
            optimizers = [self.optimizer, getattr(self, "second", self.optimizer)]
            for layer, optimizer in zip(self.layers[1:], optimizers, strict=True):
                with self.gradient_tape() as tape:
                    loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
                tape.minimize(loss, layer.trainable_variables, optimizer)
            return {"loss": loss}

    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    model = Two(inputs, keras.layers.Dense(2)(keras.layers.Dense(3)(inputs)))
    first, *second = (
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps) for steps in accumulating
    )
    model.compile(first, gradient_hooks=[hooks.GlobalNormClipping(0.5)])
    if second:
        model.second = second[0]
    values = [model.get_weights()]
    history = callbacks.GradientHistory()
    seen = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: values.append(model.get_weights())
    )
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(24, 4)), rng.normal(size=(24, 2))
    model.fit(x, y, batch_size=6, shuffle=False, verbose=0, callbacks=[history, seen])
    moved = [
        np.sqrt(sum(((b - a) ** 2).sum() for a, b in zip(old, new, strict=True))) / 0.1
        for old, new in zip(values, values[1:], strict=False)
    ]
    found = history.to_numpy()["gradient_norm_after"]
    np.testing.assert_allclose(np.nan_to_num(found), moved, rtol=1e-4)
