"""Trainings, and other work, killed at random moments; see `report.py`."""

from __future__ import annotations

import csv
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability import job
from tests.reliability.job import EPOCHS, NUM_BATCHES, SCENARIOS

ROOT = Path(__file__).parent.parent.parent
SECONDS = 400
NUM_STEPS = EPOCHS * NUM_BATCHES
# Whether a training is a fork of this process: much faster, where no TensorFlow runs in it.
forks = False


@dataclass(frozen=True)
class Work:
    """What is killed, and can be started again.

    Args:
        function: takes the folder that it writes to, and arguments. It writes `begun` there,
            and at its end a result. Its module can be run with the same, as text.
        arguments: besides the folder.
        progress: the file to which it adds lines.
    """

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    progress: str


def training(scenario: str, save_freq: Any) -> Work:
    """A training of `job.SCENARIOS`, with backups."""
    return Work(job.train, (scenario, save_freq), "steps.csv")


class Forked:
    """A child of this process, which has imported everything and run nothing yet."""

    def __init__(self, function: Callable[..., None], arguments: Sequence[Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=function, args=tuple(arguments))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("train", seconds or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


def start(work: Work, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    if forks:
        return Forked(work.function, (folder, *work.arguments))
    module = work.function.__module__
    command = [sys.executable, "-m", module, str(folder), *map(str, work.arguments)]
    output = open(folder / "output.txt", "a", encoding="utf-8")
    with output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def whole(work: Work, folder: Path) -> None:
    """Has the work done without a kill."""
    process = start(work, folder)
    assert process.wait(SECONDS) == 0, _output(folder)


def killed(work: Work, folder: Path, moments: list[tuple[int, float]]) -> int:
    """Kills the work at moments, then lets it end.

    Args:
        work: what is done.
        folder: where it writes.
        moments: of each kill, the number of lines of progress, and seconds after that.

    Returns:
        The number of kills that met it alive.
    """
    kills = 0
    for lines, seconds in sorted(moments):
        process = start(work, folder)
        _wait_for(process, work, folder, lines)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0, _output(folder)
            return kills
    process = start(work, folder)
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


def _wait_for(process: Any, work: Work, folder: Path, lines: int) -> None:
    """Waits until this process works, and as many lines are written."""
    end, path = time.monotonic() + SECONDS, folder / work.progress
    while process.poll() is None:
        assert time.monotonic() < end, _output(folder)
        begun = (folder / "begun").exists() and path.exists()
        if begun and len(path.read_bytes().splitlines()) > lines:
            return
        time.sleep(0.01)
    assert process.returncode == 0, _output(folder)


def _output(folder: Path) -> str:
    path = folder / "output.txt"
    return path.read_text(encoding="utf-8")[-3000:] if path.exists() else "see above"


def run(num_kills: int = 24) -> list[dict]:
    """Kills trainings of all scenarios, and returns one row a scenario and kind of backup."""
    found = []
    draw = random.Random(0)
    tasks = [(s, [5, "epoch"][i % 3 == 1]) for i, s in enumerate(SCENARIOS)]
    global forks
    forks = True
    each = -(-num_kills // len(tasks))
    for scenario, save_freq in tasks:
        with tempfile.TemporaryDirectory() as folder:
            a, b = Path(folder) / "whole", Path(folder) / "killed"
            work = training(scenario, save_freq)
            whole(work, a)
            moments = [(draw.randrange(NUM_STEPS), draw.uniform(0, 0.1)) for _ in range(each)]
            kills = killed(work, b, moments)
            row = {"training": scenario, "`save_freq`": save_freq, "kills": kills}
            row["what differs"] = differences(a, b)
        print(row, flush=True)
        found.append(row)
    return found
