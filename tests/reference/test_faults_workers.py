"""Processes that train together, and what they once got wrong; tests are named by faults."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 240


def _ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _start(folder, num_workers, **task):
    """Starts workers; none is a process without a cluster."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = [f"127.0.0.1:{port}" for port in _ports(num_workers)]
    told = {"folder": str(folder), **task}
    processes = []
    for index in range(max(1, num_workers)):
        environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        if cluster:
            here = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": cluster}, "task": here})
        with open(folder / f"output_{index}.txt", "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.reference.worker", json.dumps(told)],
                env=environment,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    return processes


def _wait(processes):
    """Waits for all; those that do not end in time are ended, and have no code."""
    end = time.monotonic() + SECONDS
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(1.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    return codes


def _output(folder, index=0):
    return (folder / f"output_{index}.txt").read_text()[-3000:]


def _weights(folder, index=0):
    with np.load(folder / f"worker_{index}" / "weights.npz") as file:
        return np.concatenate([file[f"w{i}"].ravel() for i in range(len(file.files))])


@pytest.mark.parametrize(
    "task",
    [{"gate": True}, {"accumulation": 3}],
    ids=["gate", "accumulated"],
)
def test_R1_one_worker(tmp_path, task):
    one, alone = tmp_path / "one", tmp_path / "alone"
    assert _wait(_start(one, 1, **task)) == [0], _output(one)
    assert _wait(_start(alone, 0, **task)) == [0], _output(alone)
    np.testing.assert_allclose(_weights(one), _weights(alone), rtol=1e-5, atol=1e-6)


def test_R7_backups_of_unequal_epochs(tmp_path):
    """All resume where all can, or all say what is wrong."""
    through, killed = tmp_path / "through", tmp_path / "killed"
    assert _wait(_start(through, 2, backup=True)) == [0, 0], _output(through)
    processes = _start(killed, 2, backup=True, dies=1)
    end = time.monotonic() + SECONDS
    saved = killed / "worker_0" / "saved_1"
    while not saved.exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert processes[1].wait(SECONDS) == 9, _output(killed, 1)
    processes[0].kill()
    processes[0].wait()
    assert saved.exists() and not (killed / "worker_1" / "saved_1").exists()
    codes = _wait(_start(killed, 2, backup=True))
    if codes == [0, 0]:
        for index in range(2):
            np.testing.assert_array_equal(_weights(killed, index), _weights(through, index))
        return
    # Not a hang, and not one that goes on alone.
    assert None not in codes and 0 not in codes, (codes, _output(killed), _output(killed, 1))
    assert "epoch" in _output(killed) and "epoch" in _output(killed, 1)
