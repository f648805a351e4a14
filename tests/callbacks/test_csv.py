"""`GradientCSV`: the same records in a file, through crashes and resumes."""

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_tapefit import callbacks, hooks

from . import support

ROOT = Path(__file__).parents[2]
SCALARS = ["loss", "learning_rate", "gradient_norm", "gradient_norm_after", "skipped"]


def read(path):
    """Returns the columns of a file."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert {len(row) for row in rows} <= {len(header)}
    return dict(zip(header, np.array(rows, "float64").T, strict=True)) if rows else header


def network():
    """With a hook that has random numbers: what is resumed must have their state too."""
    return support.network(gradient_hooks=[hooks.GradientNoise(0.01, seed=3)])


class Crash(keras.callbacks.Callback):
    """Ends the training with an error after so many batches."""

    def __init__(self, num_batches):
        super().__init__()
        self.left = num_batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("crash")


@pytest.mark.parametrize("per_variable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_are_the_records(tmp_path, per_variable):
    model = support.network(gradient_hooks=support.hook_list())
    given = {"per_variable": per_variable, "updates": per_variable}
    history = callbacks.GradientHistory(**given)
    path = tmp_path / "gradients.csv"
    callback = callbacks.GradientCSV(path, **given)
    support.fit(model, [history, callback], support.BAD_Y, epochs=2)
    columns = read(path)
    assert list(columns) == list(history)
    for name, values in history.items():
        # As float32 to the bit, NaN included.
        np.testing.assert_array_equal(columns[name].astype(values.dtype), values, name)
    assert len(columns["step"]) == 8


def test_by_default_there_are_scalars_only(tmp_path):
    path = str(tmp_path / "gradients.csv")
    support.fit(support.network(), [callbacks.GradientCSV(path)])
    assert list(read(path)) == ["step", "epoch", *SCALARS]


@pytest.mark.slow
def test_a_frame_of_the_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "gradients.csv"
    history = callbacks.GradientHistory(updates=False)
    support.fit(support.network(), [history, callbacks.GradientCSV(path, per_variable=True)])
    frame = pandas.read_csv(path, index_col="step")
    pandas.testing.assert_frame_equal(frame, history.to_pandas(), check_dtype=False)


def test_rows_are_there_before_the_training_ends(tmp_path):
    path, seen = tmp_path / "gradients.csv", []

    class Reader(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(read(path)["step"].tolist())

    support.fit(support.network(), [callbacks.GradientCSV(path), Reader()])
    assert seen == [list(range(i + 1)) for i in range(4)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "gradients.csv"
    support.fit(network(), [callbacks.GradientCSV(path)], epochs=3)
    return path.read_text()


def train(folder, *more, reverse=False):
    """Trains to the end or to a crash, from the last backup on."""
    backup = keras.callbacks.BackupAndRestore(str(folder / "backup"))
    given = [backup, callbacks.GradientCSV(folder / "gradients.csv")]
    support.fit(network(), [*(given[::-1] if reverse else given), *more], epochs=3)


# Within the second epoch; in the first one, of which there is no backup; at an end.
@pytest.mark.parametrize(
    "num_batches", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))]
)
def test_crash_and_resume(tmp_path, uninterrupted, num_batches):
    """Against an uninterrupted training, to the byte."""
    path = tmp_path / "gradients.csv"
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, Crash(num_batches))
    assert read(path)["step"].tolist() == list(range(num_batches))
    # The row of step 10 was being written.
    path.write_text(path.read_text() + "1")
    train(tmp_path)
    assert path.read_text() == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("crashed", [False, True])
def test_the_order_of_backup_and_file_does_not_matter(tmp_path, uninterrupted, crashed):
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, Crash(6), reverse=crashed)
    train(tmp_path, reverse=not crashed)
    assert (tmp_path / "gradients.csv").read_text() == uninterrupted


def test_a_new_training_begins_the_file_anew(tmp_path):
    path = tmp_path / "gradients.csv"
    path.write_text("something else\n1,2,3\n")
    support.fit(support.network(), [callbacks.GradientCSV(path)])
    first = path.read_text()
    support.fit(support.network(), [callbacks.GradientCSV(path)])
    assert path.read_text() == first and len(first.splitlines()) == 5


def test_a_second_fit_appends_what_has_the_same_columns(tmp_path):
    path = tmp_path / "gradients.csv"
    model = support.network()
    callback = callbacks.GradientCSV(path)
    support.fit(model, [callback])
    support.fit(model, [callback])
    support.fit(model, [callbacks.GradientCSV(path)])
    assert read(path)["step"].tolist() == list(range(12))
    before = path.read_text()
    with pytest.raises(ValueError, match=r"continues at step 12, and the file '.*' has other col"):
        support.fit(model, [callbacks.GradientCSV(path, per_variable=True)])
    assert path.read_text() == before


@pytest.mark.slow
def test_a_copy_writes_by_itself(tmp_path):
    path = tmp_path / "gradients.csv"
    callback = callbacks.GradientCSV(path)
    support.fit(support.network(), [copy.deepcopy(callback)])
    assert len(read(path)["step"]) == 4


def test_bad_arguments():
    with pytest.raises(TypeError, match="`path` must be a path. Received: path=3"):
        callbacks.GradientCSV(3)
    with pytest.raises(TypeError, match="`per_variable` must be a bool"):
        callbacks.GradientCSV("x.csv", per_variable=None)
    with pytest.raises(TypeError, match="`updates` must be a bool"):
        callbacks.GradientCSV("x.csv", updates=0)


KILLED = """
import os, sys, keras
from keras_tapefit import callbacks
from tests.callbacks import support, test_csv

class Kill(keras.callbacks.Callback):
    seen = 0
    def on_train_batch_end(self, batch, logs=None):
        Kill.seen += 1
        if Kill.seen == int(sys.argv[2]):
            os._exit(9)

folder = sys.argv[1]
backup = keras.callbacks.BackupAndRestore(folder + "/backup")
file = callbacks.GradientCSV(folder + "/gradients.csv")
support.fit(test_csv.network(), [backup, file, Kill()], epochs=3)
"""


@pytest.mark.slow
def test_killed_twice_and_resumed(tmp_path, uninterrupted):
    """Real processes, ended without a word."""
    for num_batches, status in ((6, 9), (3, 9), (100, 0)):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), str(num_batches)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stderr[-4000:]
    assert (tmp_path / "gradients.csv").read_text() == uninterrupted
