"""Measures what records cost: one step with them against one without, in one process.

python -m tests.benchmarks.records
python -m tests.benchmarks.records --write docs/see_the_gradients.md
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit import TapeModel, hooks
from keras_tapefit.callbacks.reader import RecordReader
from keras_tapefit.update.watch import RecordRequest
from tests.benchmarks import timing, workloads

# What is asked for; `None`: nothing. The monitor is a hook, the others are records.
SIDES: dict[str, RecordRequest | None] = {
    "off": None,
    "`GradientMonitor`": None,
    "records: global norms": RecordRequest(),
    "records: norms of each variable": RecordRequest(per_variable=True),
    "records: norms and updates of each variable": RecordRequest(per_variable=True, updates=True),
    "records: histograms every 100 steps": RecordRequest(histograms_every=100),
}


class Reader(RecordReader):
    """Fetches records, and drops them."""

    def __init__(self, request: RecordRequest) -> None:
        super().__init__()
        self._request = request

    def request(self) -> RecordRequest:
        return self._request

    def take(self, steps: Any, rows: Any) -> None:
        if self._records is not None and self._request.histograms_every:
            self._records.read_histograms(int(steps[0]))


def steps_of(workload: Any, side: str, number: int) -> Callable[[], None]:
    """Returns what makes some steps of a model, the way `fit` makes them."""
    request = SIDES[side]
    model = workload.build(TapeModel)
    given = [hooks.GradientMonitor()] if side == "`GradientMonitor`" else []
    model.compile("adam", workloads.loss(), jit_compile=False, gradient_hooks=given)
    callbacks = keras.callbacks.CallbackList(
        [] if request is None else [Reader(request)], model=model
    )
    batches = tf.data.Dataset.from_tensors((tf.constant(workload.x), tf.constant(workload.y)))
    iterator = iter(batches.cache().repeat())
    model.make_train_function()
    callbacks.on_train_begin()

    def run() -> None:
        logs: dict[str, Any] = {}
        for step in range(number):
            callbacks.on_train_batch_begin(step)
            logs = model.train_function(iterator)
            callbacks.on_train_batch_end(step)
        for value in logs.values():
            float(value)

    return run


def rows(rounds: int) -> list[str]:
    """Returns the rows of the table."""
    made = ["| workload | with | CPU | wall | CPU ms | off |", "|---|---|---|---|---|---|"]
    subjects = [workloads.small_mlp(), workloads.dense_stack(16), workloads.conv_classifier()]
    for workload in subjects:
        # Histograms are due once in a hundred steps: all of it is in each figure.
        number = 100
        runs = {side: steps_of(workload, side, number) for side in SIDES}
        results = timing.in_turns(runs, rounds, number)
        for side, r in list(results.items())[1:]:
            made.append(
                f"| {workload.name} | {side} | {r.cpu:.2f} | {r.wall:.2f} "
                f"| {r.milliseconds:.2f} | {r.base_milliseconds:.2f} |"
            )
            print(made[-1], flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of timings a figure")
    parser.add_argument("--write", type=Path, help="the page that the table is put into")
    arguments = parser.parse_args()
    where = f"{len(tf.config.list_physical_devices('GPU'))} GPU, " if _has_gpu() else "CPU only, "
    about = (
        f"{datetime.date.today()}: {where}{platform.machine()}, "
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}. Ratios to the same model "
        f"with nothing recorded, 100 steps at a time in turns in one process, medians of "
        f"{arguments.rounds}; the machine is shared, so CPU time is the figure to look at."
    )
    text = "\n".join([about, "", *rows(arguments.rounds)])
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        block = f"<!-- figures -->\n{text}\n<!-- end of figures -->"
        page = re.sub(
            r"<!-- figures -->.*<!-- end of figures -->", lambda _: block, page, flags=re.S
        )
        arguments.write.write_text(page, encoding="utf-8")


def _has_gpu() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


if __name__ == "__main__":
    main()
