"""`GradientHistory` as an object: what it gives, copies, refuses, and outlives."""

import copy
import pickle
import re

import keras
import numpy as np
import pytest

from keras_tapefit import TapeModel, callbacks, hooks
from keras_tapefit.training.runtime import runtime_of

from . import support
from .support import PATHS

SCALARS = ["step", "epoch", "loss", "learning_rate", "gradient_norm", "gradient_norm_after"]
SCALARS += ["skipped", "update_ratio"]


@pytest.fixture(scope="module")
def trained():
    history = callbacks.GradientHistory(weights="end/bias")
    model = support.network(gradient_hooks=[hooks.GlobalNormClipping(0.5)])
    support.fit(model, [history])
    return model, history


def test_what_a_notebook_shows(trained):
    _, history = trained
    shown = rf"<GradientHistory: {support.STEPS_PER_EPOCH} steps, median norm [\d.]+\.>"
    assert re.fullmatch(shown, repr(history))
    assert repr(callbacks.GradientHistory()) == "<GradientHistory: No step was recorded.>"
    report = history.report()
    assert repr(report) == str(report)


class Crash(keras.callbacks.Callback):
    """Breaks a training off at the end of a batch, the way Ctrl-C does."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            raise KeyboardInterrupt


def test_reads_like_a_data_frame(trained):
    _, history = trained
    names = list(history)
    assert names[: len(SCALARS)] == SCALARS
    assert list(history.keys()) == names == list(history.to_numpy())
    assert len(history) == support.STEPS_PER_EPOCH
    assert "loss" in history and "gradient_norm/end/bias" in history
    assert "nothing" not in history
    assert dict(history.items()).keys() == set(names)
    for name, values in history.items():
        np.testing.assert_array_equal(values, history[name])
        assert isinstance(values, np.ndarray) and values.shape == (4,)
    assert set(names[len(SCALARS) :]) == {
        "weight/end/bias[0]",
        "weight/end/bias[1]",
        *(f"{kind}/{path}" for kind in (*SCALARS[4:6], "update_ratio") for path in PATHS),
    }
    with pytest.raises(KeyError, match="'norm' is not recorded. There are: step, epoch"):
        history["norm"]


def test_is_one_callback_in_a_list_and_true_when_empty():
    history = callbacks.GradientHistory()
    assert history and len(history) == 0 and list(history) == []
    # A mapping would be taken apart.
    assert keras.tree.flatten([history, [history]]) == [history, history]
    with pytest.raises(KeyError, match="There are: none"):
        history["step"]


def test_pandas(trained):
    pandas = pytest.importorskip("pandas")
    _, history = trained
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.name == "step" and frame.index.tolist() == [0, 1, 2, 3]
    assert list(frame) == list(history)[1:]
    np.testing.assert_array_equal(frame["gradient_norm"], history["gradient_norm"])
    empty = callbacks.GradientHistory().to_pandas()
    assert len(empty) == 0 and empty.index.name == "step"


def test_pandas_is_not_needed(trained, monkeypatch):
    _, history = trained
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="`to_pandas` needs pandas: `pip install pandas`"):
        history.to_pandas()
    assert len(history.to_numpy()["step"]) == 4


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_a_copy_has_the_records_and_trains_by_itself(trained, clone):
    """KerasTuner copies the callbacks for each trial."""
    model, history = trained
    copied = clone(history)
    np.testing.assert_array_equal(copied["loss"], history["loss"])
    assert copied.model is None
    assert str(copied.report()) == str(history.report())
    support.fit(model, [copied])
    assert len(copied) == 8 and len(history) == 4
    model.set_weights(model.get_weights())


@pytest.mark.slow
def test_a_copy_in_the_middle_of_a_training():
    model, history, copies = support.network(), callbacks.GradientHistory(), []

    class Copier(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            copies.append(copy.deepcopy(history))

    support.fit(model, [history, Copier()])
    assert len(copies) == 4 and len(history) == 4
    # A copy has what was fetched by then, and no hand on the model.
    assert [len(c) for c in copies] == [0, 0, 0, 0]
    assert not list(runtime_of(model).recording._requests)


def test_a_later_fit_goes_on_and_another_model_begins_anew():
    model, history = support.network(), callbacks.GradientHistory()
    support.fit(model, [history], epochs=2)
    first = history["loss"].copy()
    support.fit(model, [history])
    assert history["step"].tolist() == list(range(12))
    assert history["epoch"].tolist() == [0] * 4 + [1] * 4 + [0] * 4
    np.testing.assert_array_equal(history["loss"][:8], first)
    support.fit(support.network(), [history])
    assert history["step"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(history["loss"], first[:4])


@pytest.mark.slow
def test_columns_that_came_later_are_nan_before():
    model, history = support.network(), callbacks.GradientHistory(per_variable=False)
    support.fit(model, [history])
    history.per_variable = True
    support.fit(model, [history])
    norms = history["gradient_norm/end/bias"]
    np.testing.assert_array_equal(np.isnan(norms), [True] * 4 + [False] * 4)


def test_a_training_that_broke_off_is_not_lost():
    model, history = support.network(), callbacks.GradientHistory()
    with pytest.raises(KeyboardInterrupt):
        support.fit(model, [history, Crash(2)])
    # Nothing was fetched yet; and then a training that is no business of this history.
    other = callbacks.GradientHistory(per_variable=False)
    support.fit(model, [other])
    assert runtime_of(model).recording.records is not None
    assert history["step"].tolist() == [0, 1, 2]
    assert np.isfinite(history["loss"]).all()
    assert other["step"].tolist() == [3, 4, 5, 6]
    support.fit(model, [history])
    assert history["step"].tolist() == [0, 1, 2, 7, 8, 9, 10]


def test_what_others_record_is_not_taken():
    """The buffer of the first fit is not written in the second."""
    model = support.network()
    first, second = callbacks.GradientHistory(), callbacks.GradientHistory(updates=False)
    support.fit(model, [first])
    support.fit(model, [second])
    assert first["step"].tolist() == [0, 1, 2, 3]
    assert second["step"].tolist() == [4, 5, 6, 7]


def test_a_loop_of_ones_own():
    model, history = support.network(), callbacks.GradientHistory()
    truth = support.expected(support.weights_of(model), epochs=1, max_norm=None, held_back=None)
    history.set_model(model)
    history.on_train_begin()
    for i in range(4):
        batch = slice(12 * i, 12 * i + 12)
        history.on_train_batch_begin(i)
        model.train_on_batch(support.X[batch], support.Y[batch])
        history.on_train_batch_end(i)
    assert len(history) == 4
    history.on_train_end()
    np.testing.assert_allclose(history["gradient_norm"], truth["gradient_norm"], 1e-5)
    model.train_on_batch(support.X, support.Y)
    assert len(history) == 4


def test_every_weight_has_a_column_of_its_own():
    model, history = support.network(), callbacks.GradientHistory(weights="end/*")
    support.fit(model, [history])
    kernel, bias = model.get_layer("end").get_weights()
    for i, j in np.ndindex(5, 2):
        assert history[f"weight/end/kernel[{i},{j}]"][-1] == kernel[i, j]
    assert [history[f"weight/end/bias[{i}]"][-1] for i in range(2)] == bias.tolist()


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"per_variable": 1}, TypeError, "`per_variable` must be a bool. Received: per_variable=1"),
        ({"updates": "yes"}, TypeError, "`updates` must be a bool. Received: updates='yes'"),
        ({"weights": 3}, TypeError, "target"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        callbacks.GradientHistory(**arguments)


def test_a_plain_model_is_refused():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    for callback in (callbacks.GradientHistory(), callbacks.GradientCSV("x.csv")):
        with pytest.raises(TypeError, match=r"`TapeModel`.*`TapeModel.from_model\(model\)`"):
            support.fit(model, [callback])


def test_weights_that_are_not_there_or_too_many():
    model = support.network()
    with pytest.raises(ValueError, match="'start/\\*' matches no variable"):
        support.fit(model, [callbacks.GradientHistory(weights="start/*")])
    inputs = keras.Input((40,))
    large = TapeModel(inputs, keras.layers.Dense(30, name="wide")(inputs))
    large.compile("sgd", "mse")
    with pytest.raises(ValueError, match="1000 elements in all.*weights='wide/kernel'.*has 1200"):
        large.fit(
            np.zeros((2, 40)),
            np.zeros((2, 30)),
            verbose=0,
            callbacks=[callbacks.GradientHistory(weights="wide/kernel")],
        )
