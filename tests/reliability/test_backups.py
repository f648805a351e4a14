"""`BackupAndRestore`: in the middle of an epoch, broken, and killed between two files."""

import json
import shutil
import warnings

import h5py
import keras
import numpy as np
import pytest
from everyday import everyday

from keras_tapefit import callbacks

from . import job, kills


class Stop(keras.callbacks.Callback):
    """Ends a training like a kill would: after a number of batches, callbacks not told."""

    def __init__(self, num_batches):
        super().__init__()
        self.left = num_batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def run(scenario, folder, save_freq, stop=None, **options):
    """Trains with a backup in `folder`; returns the state and the logs at the end, or `None`."""
    keras.utils.set_random_seed(7)
    model = job.SCENARIOS[scenario]()
    backup = keras.callbacks.BackupAndRestore(
        folder / "backup", save_freq, delete_checkpoint=False, **options
    )
    csv = callbacks.GradientCSV(folder / "steps.csv")
    told = [backup, csv] if stop is None else [backup, csv, Stop(stop)]
    fit = {"batch_size": job.BATCH_SIZE, "epochs": job.EPOCHS, "shuffle": False, "verbose": 0}
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            model.fit(job.X, job.Y, callbacks=told, **fit)
        return None
    logs = model.fit(job.X, job.Y, callbacks=told, **fit).history
    return job.state_of(model), logs


def same(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not np.array_equal(a[k], b[k], equal_nan=True)]
    assert not different


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """The scenario `accumulated` without an interruption, by the frequency of its backups."""
    folder = tmp_path_factory.mktemp("through")
    state, logs = run("accumulated", folder, "epoch")
    return state, logs, kills.rows(folder / "steps.csv")


@pytest.mark.parametrize(
    "stops",
    everyday([[26, 3, 9]], of=[[14], [10, 20], [26, 3, 9]]),
    ids=str,
)
def test_in_the_middle_of_an_epoch(through, tmp_path, stops):
    """A window of 4 steps, 10 batches an epoch, a backup every 3: resumed where it was."""
    for stop in stops:
        run("accumulated", tmp_path, 3, stop)
    state, logs = run("accumulated", tmp_path, 3)
    same(state, through[0])
    assert kills.rows(tmp_path / "steps.csv") == through[2]
    for name, values in logs.items():
        # Of the epoch that was begun before the restart, all batches.
        np.testing.assert_array_equal(values, through[1][name][-len(values) :], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["executions", "frozen", "averages", "custom"])
def test_other_trainings_in_the_middle_of_an_epoch(tmp_path, scenario):
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    for folder in (through, stopped):
        folder.mkdir()
    expected, expected_logs = run(scenario, through, "epoch")
    run(scenario, stopped, 5, 5 if scenario == "executions" else 27)
    state, logs = run(scenario, stopped, 5)
    same(state, expected)
    assert {k: v[-1] for k, v in logs.items()} == {k: v[-1] for k, v in expected_logs.items()}


def test_executions_of_another_length(tmp_path, through, monkeypatch):
    run("accumulated", tmp_path, 3, 14)
    made = job.SCENARIOS["accumulated"]

    def other():
        model = made()
        model.steps_per_execution = 5
        return model

    monkeypatch.setitem(job.SCENARIOS, "accumulated", other)
    with pytest.raises(ValueError, match="after 2 batches of an epoch.*steps_per_execution=5"):
        run("accumulated", tmp_path, 3)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def change(path):
    with h5py.File(path, "r+") as file:
        file["layers/dense/vars/0"][0, 0] += 1


BROKEN = {"cut": cut, "empty": empty, "changed": change}


@pytest.mark.parametrize("how", everyday(["cut"], of=BROKEN))
def test_a_broken_backup_is_told(tmp_path, through, how):
    run("accumulated", tmp_path, "epoch", 25)
    BROKEN[how](tmp_path / "backup" / "latest.weights.h5")
    with pytest.raises(ValueError, match="is broken.*none before it. Delete the folder to begin"):
        run("accumulated", tmp_path, "epoch")
    shutil.rmtree(tmp_path / "backup")
    same(run("accumulated", tmp_path, "epoch")[0], through[0])


def test_a_broken_backup_with_one_before(tmp_path, through):
    run("accumulated", tmp_path, "epoch", 25, double_checkpoint=True)
    empty(tmp_path / "backup" / "latest.weights.h5")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state, _ = run("accumulated", tmp_path, "epoch", double_checkpoint=True)
    assert any("is broken" in str(w.message) for w in told)
    same(state, through[0])


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["", '{"epoch": 1, "batch": 0}', None, "[]"])
def test_killed_between_the_two_files_of_a_backup(tmp_path, through, metadata):
    """What the second file does not say, or says too late, the first one knows."""
    run("accumulated", tmp_path, "epoch", 25)
    path = tmp_path / "backup" / "training_metadata.json"
    assert json.loads(path.read_text())["epoch"] == 2
    path.unlink()
    if metadata is not None:
        path.write_text(metadata)
    same(run("accumulated", tmp_path, "epoch")[0], through[0])


@pytest.mark.slow
def test_weights_that_are_lost(tmp_path):
    run("accumulated", tmp_path, "epoch", 25)
    (tmp_path / "backup" / "latest.weights.h5").unlink()
    with pytest.raises(ValueError, match=r"training_metadata.json is there and .* is not"):
        run("accumulated", tmp_path, "epoch")


def test_files_from_keras_itself(tmp_path):
    """A backup that `keras.Model` made has no checksums, and two files to go by."""

    def train(kind, stop=None):
        keras.utils.set_random_seed(7)
        model = kind([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mae")
        backup = keras.callbacks.BackupAndRestore(tmp_path / "plain", delete_checkpoint=False)
        told = [backup] if stop is None else [backup, Stop(stop)]
        fit = {"batch_size": 4, "epochs": 3, "shuffle": False, "verbose": 0, "callbacks": told}
        model.fit(job.X, job.X[:, :1], **fit)
        return model.get_weights()

    from keras_tapefit import TapeSequential

    with pytest.raises(KeyboardInterrupt):
        train(keras.Sequential, 25)
    resumed = train(TapeSequential)
    shutil.rmtree(tmp_path / "plain")
    for a, b in zip(resumed, train(keras.Sequential), strict=True):
        np.testing.assert_array_equal(a, b)
    metadata = tmp_path / "plain" / "training_metadata.json"
    metadata.write_text("")
    with pytest.raises(ValueError, match="training_metadata.json cannot be read"):
        train(TapeSequential)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["noisy", "sharp"])
def test_killed_for_real(tmp_path, scenario):
    """A slice of `kills.py`."""
    work = kills.training(scenario, 4)
    kills.whole(work, tmp_path / "whole")
    assert kills.killed(work, tmp_path / "killed", [(9, 0.03), (23, 0.07)]) == 2
    assert kills.differences(tmp_path / "whole", tmp_path / "killed") == []
