"""One worker of `test_workers.py`: trains as told, and writes down what came out.

python worker.py '<json>'
"""

import json
import os
import pathlib
import sys
import warnings

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

TASK = json.loads(sys.argv[1])
INDEX = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if "TF_CONFIG" in os.environ else 0
FOLDER = pathlib.Path(TASK["folder"]) / f"worker_{INDEX}"
FOLDER.mkdir(parents=True, exist_ok=True)
RNG = np.random.default_rng(17)
X = RNG.normal(size=(48, 4)).astype("float32")
Y = RNG.normal(size=(48, 2)).astype("float32")


def strategy():
    if "TF_CONFIG" not in os.environ:
        return tf.distribute.get_strategy()
    return tf.distribute.MultiWorkerMirroredStrategy()


class DieAt(keras.callbacks.Callback):
    """Ends this worker as a power cut would, in the middle of an epoch."""

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations.numpy()) == TASK["die_at"]:
            os._exit(9)


def optimizer():
    options = {"gradient_accumulation_steps": TASK.get("accumulation")}
    made = (
        keras.optimizers.Adam(0.02, **options)
        if TASK.get("adam")
        else keras.optimizers.SGD(0.1, 0.9, **options)
    )
    if TASK.get("loss_scale"):
        made = keras.optimizers.LossScaleOptimizer(made, initial_scale=1024.0)
    return made


def model():
    inputs = keras.Input((4,))
    hidden = layers.Dense(6, activation="tanh")(inputs)
    made = TapeModel(inputs, layers.Dense(2)(hidden))
    made.compile(
        optimizer(),
        "mse",
        metrics=["mae"],
        gradient_hooks=[
            lambda g, v: g * (1.0 + 0.3 * tf.norm(g)),
            hooks.GradientMonitor(),
            hooks.GradientNoise(0.01, seed=1),
        ],
        **TASK.get("compile", {}),
    )
    return made


def main():
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", module="keras|tensorflow")
    keras.utils.set_random_seed(4)
    y = Y.copy()
    if TASK.get("bad"):
        y[9] = np.nan  # of the first batch, in the second half
    with strategy().scope():
        trained = model()
    callbacks = []
    if TASK.get("callbacks"):
        callbacks = [
            keras.callbacks.ModelCheckpoint(FOLDER / "best.weights.h5", save_weights_only=True),
            keras.callbacks.CSVLogger(FOLDER / "log.csv"),
            keras.callbacks.EarlyStopping("val_loss", patience=5),
        ]
    if TASK.get("backup"):
        callbacks = [keras.callbacks.BackupAndRestore(FOLDER / "backup")]
    if TASK.get("die_at") is not None and TASK.get("who") == INDEX:
        callbacks.append(DieAt())
    options = {"validation_data": (X[:24], Y[:24])} if TASK.get("callbacks") else {}
    history = trained.fit(
        X,
        y,
        batch_size=12,
        epochs=TASK.get("epochs", 1),
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **options,
    ).history
    outcome = {
        "history": history,
        "iterations": int(trained.optimizer.iterations.numpy()),
        "evaluate": trained.evaluate(X[:24], Y[:24], batch_size=12, verbose=0, return_dict=True),
    }
    if TASK.get("loss_scale"):
        outcome["scale"] = float(trained.optimizer.dynamic_scale.numpy())
    predicted = trained.predict(X[:24], batch_size=12, verbose=0)
    arrays = {f"w{i}": w for i, w in enumerate(trained.get_weights())}
    np.savez(FOLDER / "weights.npz", **arrays)
    np.save(FOLDER / "predicted.npy", predicted)
    (FOLDER / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
