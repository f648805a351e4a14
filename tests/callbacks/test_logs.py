"""What `GradientMonitor` puts into the logs, as the callbacks of Keras and others see it.

MLflow's and wandb's callbacks take every scalar of the logs; so does `LambdaCallback`.
"""

import csv

import keras
import numpy as np
import pytest

from keras_tapefit import callbacks, hooks

from . import support

# The log entries, and the columns of the records that they are means of.
COLUMNS = {"gradient_norm": "gradient_norm", "clipped_norm": "gradient_norm_after"}


class Logs(keras.callbacks.Callback):
    """Keeps what an experiment tracker gets."""

    def __init__(self):
        super().__init__()
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(dict(logs))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(dict(logs))


@pytest.fixture(scope="module")
def model():
    return support.network(
        optimizer=keras.optimizers.SGD(0.1),
        gradient_hooks=[
            hooks.GradientMonitor(),
            hooks.GlobalNormClipping(support.MAX_NORM),
            hooks.GradientMonitor(name="clipped"),
        ],
    )


def test_epoch_means_are_in_all_logs(model, tmp_path):
    history, logs = callbacks.GradientHistory(), Logs()
    file = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    log = support.fit(model, [history, logs, file], epochs=2).history
    for name, column in COLUMNS.items():
        means = history[column].reshape(2, 4).mean(axis=1)
        np.testing.assert_allclose(log[name], means, 1e-6)
        np.testing.assert_allclose([epoch[name] for epoch in logs.epochs], means, 1e-6)
        # Of the epoch so far, as all of Keras's entries are.
        np.testing.assert_allclose(logs.batches[0][name], history[column][0], 1e-6)
        with open(tmp_path / "log.csv", newline="") as rows:
            written = [float(row[name]) for row in csv.DictReader(rows)]
        np.testing.assert_allclose(written, means, 1e-6)
    for epoch in logs.epochs:
        assert all(isinstance(float(value), float) for value in epoch.values())


def test_the_progress_bar_shows_it(model, capsys):
    support.fit(model, [], verbose=2)
    assert "gradient_norm: " in capsys.readouterr().out


def test_early_stopping_and_plateaus(model):
    # Keras knows of no entry but `loss` that less is better.
    stop = keras.callbacks.EarlyStopping(
        monitor="gradient_norm", mode="min", min_delta=1e9, patience=2
    )
    log = support.fit(model, [stop], epochs=10).history
    assert len(log["gradient_norm"]) == 3 and stop.stopped_epoch == 2

    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="gradient_norm", mode="min", min_delta=1e9, patience=1, factor=0.5
    )
    history = callbacks.GradientHistory()
    support.fit(model, [plateau, history], epochs=3)
    np.testing.assert_allclose(history["learning_rate"][::4], [0.1, 0.1, 0.05], 1e-6)
