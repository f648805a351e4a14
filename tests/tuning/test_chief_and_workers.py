"""KerasTuner's own chief and workers, in processes of their own on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

PROGRAM = """
import json, os, sys, time
import keras, keras_tuner, numpy as np
from keras_tapefit import TapeSequential, hooks, tuning

def build(hp):
    keras.utils.set_random_seed(0)
    model = TapeSequential([keras.Input((4,)), keras.layers.Dense(1)])
    rate = keras.optimizers.SGD(hp.Float("learning_rate", 0.001, 0.1))
    norm = hp.Float("max_norm", 0.1, 1.0)
    model.compile(rate, "mse", gradient_hooks=[hooks.GlobalNormClipping(norm)])
    return model

class Tuner(keras_tuner.RandomSearch):
    def on_epoch_begin(self, trial, model, epoch, logs=None):
        open(os.path.join(sys.argv[1], f"began-{self.tuner_id}-{trial.trial_id}"), "w").close()
        time.sleep(float(os.environ.get("PAUSE", 0)))

hypermodel = tuning.TapeHyperModel(build, reuse=True)
tuner = Tuner(hypermodel, objective="val_loss", max_trials=6, seed=1, directory=sys.argv[1])
x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
tuner.search(x, x[:, :1], validation_data=(x, x[:, :1]), epochs=2, verbose=0)
if os.environ["KERASTUNER_TUNER_ID"] == "chief":
    trials = tuner.oracle.trials.values()
    print(json.dumps([[t.trial_id, t.status, t.score] for t in trials]))
else:
    print(json.dumps(hypermodel.history))
"""


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_no_trial(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(name, **more):
        environment = {
            **os.environ,
            "KERASTUNER_TUNER_ID": name,
            "KERASTUNER_ORACLE_IP": "127.0.0.1",
            "KERASTUNER_ORACLE_PORT": str(port),
            **more,
        }
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(pattern):
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(pattern)):
            assert time.monotonic() < deadline, f"no {pattern}"
            time.sleep(0.2)

    processes = [start("chief")]
    try:
        processes.append(victim := start("tuner0", PAUSE="600"))
        wait_for("began-tuner0-*")
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        processes.append(start("tuner1"))
        wait_for("began-tuner1-*")
        processes.append(start("tuner0"))
        outputs = [p.communicate(timeout=240) for p in processes if p is not victim]
    finally:
        for process in processes:
            process.kill()
    assert all(p.returncode == 0 for p in processes if p is not victim), outputs
    chief, *workers = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert len(chief) == 6
    assert all(status == "COMPLETED" and score is not None for _, status, score in chief)
    assert all(entry in ("traced", "reused") for history in workers for entry in history)
    assert sum(map(len, workers)) == 6
