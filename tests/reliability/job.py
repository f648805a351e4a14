"""One training, to be killed: `python -m tests.reliability.job FOLDER SCENARIO SAVE_FREQ`.

What it comes to is in `FOLDER/result.npz` at its end. It may be started again after a kill.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tapefit import TapeModel, TapeSequential, backward, callbacks, hooks

EPOCHS, NUM_BATCHES, BATCH_SIZE = 4, 10, 4
_RNG = np.random.default_rng(5)
X = _RNG.normal(size=(NUM_BATCHES * BATCH_SIZE, 4)).astype("float32")
Y = _RNG.normal(size=(NUM_BATCHES * BATCH_SIZE, 1)).astype("float32")
Y[13] = np.inf  # one step an epoch is skipped


def network(**compiled: Any) -> Any:
    """A small network with dropout and BatchNormalization."""
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(6, activation="tanh", name="first")(inputs)
    hidden = keras.layers.BatchNormalization(name="norm")(hidden)
    hidden = keras.layers.Dropout(0.3)(hidden)
    model = TapeModel(inputs, keras.layers.Dense(1, name="last")(hidden))
    model.compile(**{"optimizer": keras.optimizers.Adam(0.02), "loss": "mse", **compiled})
    return model


def gates() -> list[Any]:
    return [hooks.SkipNonFinite(), hooks.PercentileClipping(40, history=5)]


class Averaged(TapeModel):
    """A custom step with two optimizers and a slow copy of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = keras.layers.Dense(3), keras.layers.Dense(1)
        self.slow = self.add_weight(shape=(3, 1), trainable=False, name="slow")
        self.other = keras.optimizers.SGD(0.01, momentum=0.9)

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.last.build((None, 3))
        self.built = True

    def call(self, x: Any) -> Any:
        return self.last(self.first(x))

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with self.gradient_tape(persistent=True) as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        tape.minimize(loss, self.first.trainable_variables)
        tape.minimize(loss, self.last.trainable_variables, self.other)
        self.slow.assign(0.9 * self.slow + 0.1 * self.last.kernel)
        return {"loss": loss}


def custom() -> Any:
    model = Averaged()
    model.build((None, 4))
    model.compile(keras.optimizers.Adam(0.02), "mse", gradient_hooks=gates())
    return model


def accumulated() -> Any:
    optimizer = keras.optimizers.Adam(0.02, gradient_accumulation_steps=4)
    return network(optimizer=optimizer, gradient_hooks=gates())


def frozen() -> Any:
    unfreezing = hooks.GradualUnfreezing(["last/*", "norm/*", "first/*"], every=1)
    return network(gradient_hooks=[hooks.SkipNonFinite(), unfreezing])


def noisy() -> Any:
    made = [hooks.SkipNonFinite(), hooks.GradientNoise(0.1, seed=3), hooks.UpdateMonitor()]
    return network(gradient_hooks=made, metrics=["mae"])


def sharp() -> Any:
    return network(backward=backward.SharpnessAware(0.05), micro_batches=2, gradient_hooks=gates())


def executions() -> Any:
    return network(steps_per_execution=5, gradient_hooks=[*gates(), hooks.GradientMonitor()])


def bare() -> Any:
    model = TapeSequential([keras.Input((4,)), keras.layers.Dense(1)])
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 30)
    model.compile(keras.optimizers.SGD(schedule, momentum=0.9), "mae", gradient_hooks=gates())
    return model


def averages() -> Any:
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_overwrite_frequency=7)
    return network(optimizer=optimizer, gradient_hooks=[hooks.ZeroNonFinite()])


SCENARIOS: dict[str, Callable[[], Any]] = {
    f.__name__: f for f in (accumulated, frozen, noisy, sharp, executions, bare, averages, custom)
}


def state_of(model: Any) -> dict[str, np.ndarray]:
    """Returns all that outlives the training, by name."""
    found = {f"weight {i}": v for i, v in enumerate(model.weights)}
    for i, optimizer in enumerate(o for o in vars(model).values() if _is_optimizer(o)):
        found.update((f"optimizer {i} {j}", v) for j, v in enumerate(optimizer.variables))
    # All but the logs and what is of this process.
    for name, variable in model._tapefit_state.variables().items():
        if name != "log_entries" and not name.startswith("records."):
            found[name] = variable
    arrays = {name: np.asarray(keras.ops.convert_to_numpy(v)) for name, v in found.items()}
    flags = [v.trainable for v in model.weights]
    return {**arrays, "trained": np.array(flags)}


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, keras.optimizers.Optimizer)


def train(folder: Path, scenario: str, save_freq: Any) -> None:
    """Makes the training, or goes on with it."""
    keras.utils.set_random_seed(7)
    model = SCENARIOS[scenario]()
    watchers = [
        # Time to be killed in.
        keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(0.05)),
        callbacks.GradientCSV(folder / "steps.csv"),
        callbacks.GradientTensorBoard(folder / "board", write_every=1, per_variable=False),
        keras.callbacks.CSVLogger(folder / "epochs.csv", append=True),
        keras.callbacks.BackupAndRestore(
            folder / "backup", save_freq, double_checkpoint=True, delete_checkpoint=False
        ),
    ]
    options = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    (folder / "begun").touch()
    model.fit(X, Y, callbacks=watchers, **options)
    unfinished = folder / ".result.npz"
    np.savez(unfinished, **state_of(model))
    os.replace(unfinished, folder / "result.npz")


if __name__ == "__main__":
    _, where, name, freq = sys.argv
    train(Path(where), name, freq if freq == "epoch" else int(freq))
