"""Measures what the library costs and saves, and writes the page about it.

python -m tests.benchmarks.run                      # a short run, printed
python -m tests.benchmarks.run --full --write docs/performance.md
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit import TapeModel, hooks
from tests.benchmarks import timing, workloads

Row = tuple[str, str, str, timing.Ratio]


def three_hooks() -> list[Any]:
    return [hooks.SkipNonFinite(), hooks.GradientMonitor(), hooks.GlobalNormClipping(1.0)]


def one_hook() -> list[Any]:
    return [hooks.GlobalNormClipping(1.0)]


def stock_clipping() -> Any:
    return keras.optimizers.Adam(global_clipnorm=1.0)


def compiled(workload: Any, cls: Any, optimizer: Any, **arguments: Any) -> Any:
    model = workload.build(cls)
    arguments.setdefault("jit_compile", False)
    model.compile(optimizer, workloads.loss(), **arguments)
    return model


def first_steps(full: bool, rounds: int) -> Iterator[Row]:
    """Trace and first execution of a train function, new models each time."""
    subjects = [workloads.dense_stack(100)] + ([workloads.resnet()] if full else [])
    for workload in subjects:
        for name in ("Adam", "AdamW") if full else ("AdamW",):
            make = getattr(keras.optimizers, name)
            times: dict[str, list[Any]] = {"stock": [], "no hooks": [], "three hooks": []}
            for _ in range(rounds):
                for side, measured in times.items():
                    keras.utils.clear_session()
                    cls = keras.Model if side == "stock" else TapeModel
                    given = {"gradient_hooks": three_hooks()} if side == "three hooks" else {}
                    model = compiled(workload, cls, make(), **given)
                    run = timing.steps_of(model, workload.x, workload.y, 1)
                    measured.append(timing.stopwatch(run))
            for side, goal in (("no hooks", "0.33"), ("three hooks", "0.40")):
                yield (
                    f"{workload.name}, {name}",
                    side,
                    goal,
                    timing.ratio(times[side], times["stock"]),
                )


def steps(full: bool, rounds: int) -> Iterator[Row]:
    """Steps of a model that is warm, in turns in one process."""
    subjects = [workloads.small_mlp(), workloads.conv_classifier()]
    if full:
        subjects += [workloads.transformer(), workloads.lstm(), workloads.dense_stack(100)]
        subjects += [workloads.resnet()]
    for workload in subjects:
        number = 200 if workload.name == "small MLP" else 5
        models = {
            "stock": compiled(workload, keras.Model, stock_clipping()),
            "no hooks": compiled(workload, TapeModel, stock_clipping()),
            "clip hook": compiled(workload, TapeModel, "adam", gradient_hooks=one_hook()),
            "three hooks": compiled(workload, TapeModel, "adam", gradient_hooks=three_hooks()),
            'clip hook, jit_compile="update"': compiled(
                workload, TapeModel, "adam", gradient_hooks=one_hook(), jit_compile="update"
            ),
        }
        runs = {
            side: timing.steps_of(model, workload.x, workload.y, number)
            for side, model in models.items()
        }
        heavy = workload.name in ("conv classifier", "Transformer")
        goals = ["", "1.00", "1.00", "1.03", "0.70" if heavy else "1.05"]
        results = timing.in_turns(runs, rounds, number)
        for (side, measured), goal in list(zip(results.items(), goals, strict=True))[1:]:
            yield workload.name, side, goal, measured


def import_times(rounds: int) -> tuple[float, float]:
    """Returns the CPU milliseconds of `import keras`, and what ours adds to it."""
    code = (
        "import time; a = time.process_time(); import keras; b = time.process_time(); "
        "import keras_tapefit; print(b - a, time.process_time() - b)"
    )
    measured = [
        [float(word) for word in subprocess.check_output([sys.executable, "-c", code]).split()]
        for _ in range(rounds)
    ]
    stock, ours = 1e3 * np.median(np.array(measured), axis=0)
    return stock, ours


def table(title: str, rows: list[Row]) -> str:
    lines = [f"## {title}", "", "| workload | with | CPU | wall | goal | CPU ms | stock |"]
    lines.append("|---|---|---|---|---|---|---|")
    for workload, side, goal, r in rows:
        lines.append(
            f"| {workload} | {side} | {r.cpu:.2f} | {r.wall:.2f} | {goal} "
            f"| {r.milliseconds:.2f} | {r.base_milliseconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def page(full: bool, rounds: int, first_rounds: int) -> str:
    gpus = tf.config.list_physical_devices("GPU")
    where = f"{len(gpus)} GPU" if gpus else "CPU only"
    stock_import, our_import = import_times(3)
    notes = Path(__file__).with_name("notes.md").read_text(encoding="utf-8")
    return "\n".join(
        [
            "# Performance",
            "",
            "Made by `python -m tests.benchmarks.run --write docs/performance.md`"
            f"{' with `--full`' if full else ''}, {datetime.date.today()}: {where}, "
            f"{platform.processor() or platform.machine()}, "
            f"Python {platform.python_version()}, TensorFlow {tf.__version__}, "
            f"Keras {keras.__version__}. Ratios to `keras.Model`, measured in turns in one "
            f"process, medians of {rounds} ({first_rounds} for the first step); "
            "below 1 is faster. Stock clips with "
            "`global_clipnorm`.",
            "",
            table("Time to the first step", list(first_steps(full, first_rounds))),
            table("A step", list(steps(full, rounds))),
            "## Import",
            "",
            f"`import keras` takes {stock_import:.0f} ms of CPU; `import keras_tapefit` "
            f"adds {our_import:.0f} ms (goal: at most 50).",
            "",
            notes,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every workload")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of timings a figure")
    parser.add_argument("--first-rounds", type=int, default=5, help="new models a figure")
    parser.add_argument("--write", type=Path, help="the file that the page is written to")
    arguments = parser.parse_args()
    text = page(arguments.full, arguments.rounds, arguments.first_rounds)
    print(text)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
