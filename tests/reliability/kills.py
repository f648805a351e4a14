"""Trainings that are killed at random moments; see `report.py`."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.reliability.job import EPOCHS, NUM_BATCHES, SCENARIOS

ROOT = Path(__file__).parent.parent.parent
SECONDS = 400
NUM_STEPS = EPOCHS * NUM_BATCHES


def start(scenario: str, folder: Path, save_freq: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.reliability.job", scenario, str(folder), save_freq]
    output = open(folder / "output.txt", "a", encoding="utf-8")
    with output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def whole(scenario: str, folder: Path, save_freq: str) -> None:
    """Makes a training without a kill."""
    process = start(scenario, folder, save_freq)
    assert process.wait(SECONDS) == 0, _output(folder)


def killed(scenario: str, folder: Path, save_freq: str, moments: list[tuple[int, float]]) -> int:
    """Kills a training at moments, then lets it end.

    Args:
        scenario: of `job.SCENARIOS`.
        folder: where it writes.
        save_freq: of its backups.
        moments: of each kill, the number of steps that are written, and seconds after that.

    Returns:
        The number of kills that met it alive.
    """
    kills = 0
    for steps, seconds in sorted(moments):
        process = start(scenario, folder, save_freq)
        _wait_for(process, folder, steps)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0, _output(folder)
            return kills
    process = start(scenario, folder, save_freq)
    assert process.wait(SECONDS) == 0, _output(folder)
    return kills


def differences(a: Path, b: Path) -> list[str]:
    """Returns what of two trainings is not the same to the bit."""
    with np.load(a / "result.npz") as first, np.load(b / "result.npz") as second:
        found = [f"names: {set(first.files) ^ set(second.files)}"]
        found = found if set(first.files) != set(second.files) else []
        for name in set(first.files) & set(second.files):
            if not np.array_equal(first[name], second[name], equal_nan=True):
                found.append(name)
    for name in ("steps.csv", "epochs.csv"):
        if rows(a / name) != rows(b / name):
            found.append(name)
    if board(a / "board") != board(b / "board"):
        found.append("board")
    return found


def rows(path: Path) -> dict[str, list[str]]:
    """Returns the rows of a CSV file by their first column; the last of each counts."""
    with open(path, newline="", encoding="utf-8") as file:
        return {row[0]: row for row in csv.reader(file) if row and row[0] != "epoch"}


def board(folder: Path) -> dict[tuple[str, int], float]:
    """Returns the scalars in event files; of one that was written twice, the last."""
    from tensorboard.backend.event_processing import event_file_loader

    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.rglob("events*"), key=lambda p: p.stat().st_mtime):
        for event in event_file_loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    found[value.tag, event.step] = float(value.tensor.float_val[0])
    return {k: v for k, v in found.items() if not np.isnan(v)}


def _wait_for(process: subprocess.Popen, folder: Path, steps: int) -> None:
    """Waits until this process trains, and as many steps are written."""
    end, path = time.monotonic() + SECONDS, folder / "steps.csv"
    while process.poll() is None:
        assert time.monotonic() < end, _output(folder)
        begun = (folder / "begun").exists() and path.exists()
        if begun and len(path.read_bytes().splitlines()) > steps:
            return
        time.sleep(0.01)
    assert process.returncode == 0, _output(folder)


def _output(folder: Path) -> str:
    return (folder / "output.txt").read_text(encoding="utf-8")[-3000:]


def run(num_kills: int = 24) -> list[dict]:
    """Kills trainings of all scenarios, and returns one row a scenario and kind of backup."""
    found = []
    draw = random.Random(0)
    tasks = [(s, f) for i, s in enumerate(SCENARIOS) for f in (["epoch", "5"] if i % 2 else ["5"])]
    each = -(-num_kills // len(tasks))
    for scenario, save_freq in tasks:
        with tempfile.TemporaryDirectory() as folder:
            a, b = Path(folder) / "whole", Path(folder) / "killed"
            whole(scenario, a, save_freq)
            moments = [(draw.randrange(NUM_STEPS), draw.uniform(0, 0.1)) for _ in range(each)]
            kills = killed(scenario, b, save_freq, moments)
            row = {"training": scenario, "`save_freq`": save_freq, "kills": kills}
            row["what differs"] = differences(a, b)
        print(row, flush=True)
        found.append(row)
    return found
