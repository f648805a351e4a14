"""Trainings that are killed at random moments: `python -m tests.reliability.kills [KILLS]`."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.reliability.job import SCENARIOS

ROOT = Path(__file__).parent.parent.parent
SECONDS = 400


def start(scenario: str, folder: Path, save_freq: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.reliability.job", scenario, str(folder), save_freq]
    output = open(folder / "output.txt", "a", encoding="utf-8")
    with output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def whole(scenario: str, folder: Path, save_freq: str) -> float:
    """Makes a training without a kill; returns how long it trained, in seconds."""
    process = start(scenario, folder, save_freq)
    begun = _begun(process, folder)
    assert process.wait(SECONDS) == 0, _output(folder)
    return time.monotonic() - begun


def killed(scenario: str, folder: Path, save_freq: str, delays: list[float]) -> int:
    """Kills a training after each delay since it began, then lets it end.

    Returns:
        The number of kills that met it alive.
    """
    kills = 0
    for delay in delays:
        process = start(scenario, folder, save_freq)
        _begun(process, folder)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0, _output(folder)
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


def _begun(process: subprocess.Popen, folder: Path) -> float:
    end = time.monotonic() + SECONDS
    while not (folder / "begun").exists():
        assert process.poll() is None and time.monotonic() < end, _output(folder)
        time.sleep(0.02)
    return time.monotonic()


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
            seconds = whole(scenario, a, save_freq)
            delays = [draw.uniform(0.2, 0.95) * seconds for _ in range(each)]
            kills = killed(scenario, b, save_freq, delays)
            row = {"scenario": scenario, "save_freq": save_freq, "kills": kills}
            row["differences"] = differences(a, b)
        print(row, flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
