"""What three searches take: stock, without traces that are kept, and with.

    python -m tests.benchmarks.tuning                   # all, printed
    python -m tests.benchmarks.tuning --only cnn        # one of them
    python -m tests.benchmarks.tuning --write docs/tune.md

Stock is `keras.Model` with `global_clipnorm` in KerasTuner as it is. The searches run in
turns, each in a process of its own: what stock models leave behind makes every later
collection of garbage slower. Medians count. With and without kept traces the trials must
have the same scores. One model is the same search where every trial goes on with one stock
model, built and traced before, and collections have next to nothing to look at: what no
reuse can save.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner
import numpy as np
from sklearn.datasets import load_digits

from keras_tapefit import TapeModel, hooks, tuning

DIGITS = load_digits()
FIT: dict[str, Any] = {
    "x": DIGITS.data.astype("float32") / 16,
    "y": DIGITS.target,
    "validation_split": 0.2,
    "batch_size": 64,
    "verbose": 0,
}
SIDES = ("stock", "no reuse", "reuse", "one model")


def dense(inputs: Any) -> Any:
    h = keras.layers.Dense(64, activation="relu")(inputs)
    return keras.layers.Dense(32, activation="relu")(h)


def convolutional(inputs: Any) -> Any:
    h = keras.layers.Reshape((8, 8, 1))(inputs)
    for filters in (8, 16):
        h = keras.layers.Conv2D(filters, 3, activation="relu", padding="same")(h)
        h = keras.layers.BatchNormalization()(h)
        h = keras.layers.MaxPooling2D()(h)
    return keras.layers.Flatten()(h)


def build_function(body: Callable[[Any], Any], stock: bool) -> Callable[[Any], Any]:
    """Returns a build function: the learning rate and the threshold are searched."""

    def build(hp: Any) -> keras.Model:
        keras.utils.set_random_seed(0)
        rate = hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
        max_norm = hp.Float("max_norm", 0.1, 10.0, sampling="log")
        inputs = keras.Input((64,))
        outputs = keras.layers.Dense(10, activation="softmax")(body(inputs))
        arguments: dict[str, Any] = {
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
        }
        if stock:
            model = keras.Model(inputs, outputs)
            model.compile(keras.optimizers.Adam(rate, global_clipnorm=max_norm), **arguments)
        else:
            model = TapeModel(inputs, outputs)
            clipping = [hooks.SkipNonFinite(), hooks.GlobalNormClipping(max_norm)]
            model.compile(keras.optimizers.Adam(rate), gradient_hooks=clipping, **arguments)
        return model

    return build


@dataclass(frozen=True)
class Search:
    """A search to be timed.

    Attributes:
        title: in the table.
        body: the layers between inputs and outputs.
        tuner: the class of the tuner.
        options: its arguments.
        fit: further arguments of `search`.
    """

    title: str
    body: Callable[[Any], Any]
    tuner: Any
    options: dict[str, Any]
    fit: dict[str, Any] = field(default_factory=dict)


SEARCHES = {
    "dense": Search(
        "12 trials of 3 epochs, dense",
        dense,
        keras_tuner.RandomSearch,
        {"max_trials": 12},
        {"epochs": 3},
    ),
    "cnn": Search(
        "30 trials of 1 epoch, CNN",
        convolutional,
        keras_tuner.RandomSearch,
        {"max_trials": 30},
        {"epochs": 1},
    ),
    "hyperband": Search(
        "Hyperband to 6 epochs, dense",
        dense,
        keras_tuner.Hyperband,
        {"max_epochs": 6, "factor": 3},
    ),
}


@dataclass(frozen=True)
class Found:
    """What a search took, and what it found.

    Attributes:
        wall: time on the clock, in seconds.
        cpu: time of the processor.
        scores: the trials with their scores, the best first.
    """

    wall: float
    cpu: float
    scores: list[tuple[str, float]]


def run(search: Search, side: str) -> Found:
    """Makes a search."""
    build: Any = build_function(search.body, stock=side in ("stock", "one model"))
    keras.utils.clear_session()
    gc.collect()
    if side == "one model":
        build = always(build(keras_tuner.HyperParameters()))
        gc.freeze()
    with tempfile.TemporaryDirectory() as directory:
        begin = time.perf_counter(), time.process_time()
        if side == "reuse":
            build = tuning.TapeHyperModel(build, reuse=True)
        tuner = search.tuner(
            build,
            objective=keras_tuner.Objective("val_accuracy", "max"),
            seed=1,
            directory=directory,
            **search.options,
        )
        tuner.search(**FIT, **search.fit)
        wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
        trials = tuner.oracle.get_best_trials(len(tuner.oracle.trials))
    gc.unfreeze()
    return Found(wall, cpu, [(trial.trial_id, float(trial.score)) for trial in trials])


def always(model: keras.Model) -> Callable[[Any], Any]:
    """Returns what builds the same model, traced already, for every trial."""
    model.fit(**FIT)

    def build(hp: Any) -> keras.Model:
        hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
        return model

    return build


def run_apart(name: str, side: str) -> Found:
    """Makes a search in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.tuning", "--run", name, side]
    return Found(**json.loads(subprocess.check_output(command).splitlines()[-1]))


def row(name: str, rounds: int) -> str:
    """Times all sides of a search in turns and returns a row of the table."""
    runs: dict[str, list[Found]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            runs[side].append(run_apart(name, side))
    times = [[(found.wall, found.cpu) for found in done] for done in runs.values()]
    wall, cpu = np.moveaxis(times, -1, 0)
    stock, without, reuse, _ = (done[0].scores for done in runs.values())
    cells = [SEARCHES[name].title, len(reuse)]
    cells += [f"{w:.1f} s ({c:.1f})" for w, c in zip(*np.median([wall, cpu], axis=2), strict=True)]
    cells.append(f"{np.median(wall[0] / wall[2]):.1f}")
    cells.append("yes" if stock[0][0] == reuse[0][0] else "no")
    cells.append("yes" if without == reuse else "no")
    return f"| {' | '.join(map(str, cells))} |"


HEAD = [
    "| search | trials | stock | no reuse | reuse | one model | times faster than stock "
    "| best trial as stock | scores as without reuse |",
    "|---|---|---|---|---|---|---|---|---|",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SEARCHES, action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        name, side = args.run
        # What a process pays once is no part of a search.
        run(replace(SEARCHES["dense"], options={"max_trials": 1}), side)
        print(json.dumps(asdict(run(SEARCHES[name], side))))
        return
    rows = list(HEAD)
    for name in args.only or SEARCHES:
        rows.append(row(name, args.rounds))
        print(rows[-1], flush=True)
    if args.write:
        page = args.write.read_text(encoding="utf-8")
        block = "<!-- figures -->\n" + "\n".join(rows) + "\n<!-- end of figures -->"
        pattern = r"<!-- figures -->.*<!-- end of figures -->"
        page = re.sub(pattern, lambda _: block, page, flags=re.S)
        args.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
