"""Ratios of times, measured in turns, so that what else runs hits both sides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Ratio:
    """How long something takes compared with something else: medians of pairs.

    Attributes:
        cpu: of the CPU time of the process.
        wall: of the time on the clock.
        milliseconds: CPU time of one call.
        base_milliseconds: CPU time of one call of what it is compared with.
    """

    cpu: float
    wall: float
    milliseconds: float
    base_milliseconds: float


def stopwatch(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns CPU and wall time of a call, in seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def ratio(times: list[tuple[float, float]], base: list[tuple[float, float]]) -> Ratio:
    """Returns the medians of the ratios of two lists of times, pair by pair."""
    here, there = np.array(times), np.array(base)
    cpu, wall = np.median(here / there, axis=0)
    return Ratio(cpu, wall, 1e3 * np.median(here[:, 0]), 1e3 * np.median(there[:, 0]))


def steps_of(model: Any, x: Any, y: Any, number: int) -> Callable[[], None]:
    """Returns what makes some steps of a model, the way `fit` makes them."""
    batches = tf.data.Dataset.from_tensors((tf.constant(x), tf.constant(y))).cache().repeat()
    iterator = iter(batches)
    model.make_train_function()

    def run() -> None:
        logs = None
        for _ in range(number):
            logs = model.train_function(iterator)
        for value in logs.values():
            float(value)

    return run


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Ratio]:
    """Times calls in turns and compares each with the first."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(stopwatch(run))
    base = times[next(iter(times))]
    return {name: ratio(measured, base) for name, measured in times.items()}
