"""`MultiWorkerMirroredStrategy`: two processes on loopback equal one device."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

WORKER = pathlib.Path(__file__).with_name("worker.py")
SECONDS = 240


@dataclass
class Outcome:
    weights: list[np.ndarray]
    predicted: np.ndarray
    history: dict[str, list[float]]
    iterations: int
    evaluate: dict[str, float]
    scale: float | None = None


def _ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _environment(cluster, index):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    root = str(WORKER.parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    if cluster is not None:
        task = {"type": "worker", "index": index}
        environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": cluster}, "task": task})
    return environment


def _start(task, num_workers):
    cluster = [f"127.0.0.1:{port}" for port in _ports(num_workers)] if num_workers > 1 else None
    folder = pathlib.Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for index in range(num_workers):
        with open(folder / f"output_{index}.txt", "w") as output:
            process = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(task)],
                env=_environment(cluster, index),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    return processes


def _end(processes):
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _read(folder, index):
    place = folder / f"worker_{index}"
    with np.load(place / "weights.npz") as weights:
        arrays = [weights[f"w{i}"] for i in range(len(weights.files))]
    outcome = json.loads((place / "outcome.json").read_text())
    return Outcome(arrays, np.load(place / "predicted.npy"), **outcome)


def _run(folder: pathlib.Path, num_workers: int = 2, **task: Any) -> list[Outcome]:
    """Runs workers to their end; each must get there in time."""
    processes = _start({"folder": str(folder), **task}, num_workers)
    end = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(max(1.0, end - time.monotonic()))
    finally:
        _end(processes)
    for index, process in enumerate(processes):
        output = (folder / f"output_{index}.txt").read_text()
        assert process.returncode == 0, output[-4000:]
    return [_read(folder, index) for index in range(num_workers)]


def _assert_same_bits(found, expected):
    for a, b in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.iterations == expected.iterations


def _difference(found, expected):
    a, b = (np.concatenate([w.ravel() for w in o.weights]) for o in (found, expected))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


CASES = {
    "plain": {},
    "loss_scale": {"loss_scale": True},
    "micro_batches": {"compile": {"micro_batches": 3}},
    "several_steps": {"compile": {"steps_per_execution": 3}},
    "eager": {"compile": {"run_eagerly": True}},
    # Four steps an epoch: a window, and one that is left over.
    "accumulation": {"accumulation": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_equal_one_device(tmp_path, case):
    """Training, validation, evaluation, prediction, and callbacks with a path each."""
    task = {"callbacks": True, "epochs": 2, **CASES[case]}
    (one,) = _run(tmp_path / "one", 1, **task)
    first, second = _run(tmp_path / "two", **task)
    _assert_same_bits(first, second)
    assert _difference(first, one) < 1e-6
    assert one.iterations == first.iterations == (4 if "accumulation" in task else 8)
    assert one.history.keys() == first.history.keys() >= {"gradient_norm", "val_loss", "mae"}
    for name, values in one.history.items():
        np.testing.assert_allclose(first.history[name], values, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(second.history[name], values, rtol=1e-4, err_msg=name)
    for name, value in one.evaluate.items():
        np.testing.assert_allclose(first.evaluate[name], value, rtol=1e-5, err_msg=name)
    # Each worker gets the predictions of the whole batch.
    np.testing.assert_allclose(first.predicted, one.predicted, rtol=1e-4, atol=1e-6)
    for index in range(2):
        assert (tmp_path / "two" / f"worker_{index}" / "best.weights.h5").exists()
        assert (tmp_path / "two" / f"worker_{index}" / "log.csv").exists()


def test_a_nan_on_one_worker_is_seen_by_both(tmp_path):
    """Keras hangs here: one worker waits for the sum, the other skips it."""
    task = {"loss_scale": True, "bad": True}
    (one,) = _run(tmp_path / "one", 1, **task)
    first, second = _run(tmp_path / "two", **task)
    _assert_same_bits(first, second)
    assert _difference(first, one) < 1e-6
    assert first.iterations == second.iterations == 3
    assert first.scale == second.scale == 512.0
    assert first.history["skipped_steps"] == [1.0]


def test_a_killed_worker_resumes(tmp_path):
    """Both start again from their backups, and end where they would have."""
    task = {"backup": True, "epochs": 3, "adam": True}
    through, _ = _run(tmp_path / "through", **task)
    folder = tmp_path / "killed"
    # In the second of the four steps of the second epoch.
    processes = _start({"folder": str(folder), **task, "die_at": 5, "who": 1}, 2)
    try:
        assert processes[1].wait(SECONDS) == 9, (folder / "output_1.txt").read_text()[-4000:]
        # The other one waits for it; whoever watches over a cluster ends it.
        time.sleep(2)
    finally:
        _end(processes)
    assert not (folder / "worker_1" / "outcome.json").exists()
    first, second = _run(folder, **task)
    _assert_same_bits(first, second)
    _assert_same_bits(first, through)
    assert len(first.history["loss"]) == 2
