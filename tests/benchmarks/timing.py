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
        spread: the middle half of the pairs, of CPU time: lower and upper quartile.
        milliseconds: CPU time of one step.
        base_milliseconds: CPU time of one step of what it is compared with.
    """

    cpu: float
    wall: float
    spread: tuple[float, float]
    milliseconds: float
    base_milliseconds: float


def stopwatch(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns CPU and wall time of a call, in seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def ratio(
    times: list[tuple[float, float]], base: list[tuple[float, float]], number: int = 1
) -> Ratio:
    """Returns the medians of the ratios of two lists of times, pair by pair.

    Args:
        times: CPU and wall time of each call.
        base: the same of what it is compared with.
        number: how many steps a call makes.
    """
    here, there = np.array(times), np.array(base)
    pairs = here / there
    cpu, wall = np.median(pairs, axis=0)
    low, high = np.quantile(pairs[:, 0], (0.25, 0.75))
    each, of_base = (1e3 / number * np.median(side[:, 0]) for side in (here, there))
    return Ratio(cpu, wall, (low, high), each, of_base)


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


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int, number: int = 1) -> dict[str, Ratio]:
    """Times calls of `number` steps in turns and compares each with the first."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(stopwatch(run))
    base = times[next(iter(times))]
    return {name: ratio(measured, base, number) for name, measured in times.items()}
