"""What a process holds after many of the same thing; see `report.py`.

    python -m tests.reliability.leaks SCENARIO KIND FILE     one scenario, in this process

Each scenario runs in a process of its own, the library's and plain Keras's. Memory is that of
the process, after a collection of garbage and with what the allocator has free given back.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner
import numpy as np
import tensorflow as tf

from keras_tapefit import TapeModel, callbacks, hooks, tuning

ROOT = Path(__file__).parent.parent.parent
NUM_POINTS = 11
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(12, 4)).astype("float32")
Y = _RNG.normal(size=(12, 1)).astype("float32")
BATCH = X[:4], Y[:4]


def network(kind: str, accumulate: int | None = None, **options: Any) -> Any:
    cls = TapeModel if kind == "tape" else keras.Model
    inputs = keras.Input((4,))
    model = cls(inputs, keras.layers.Dense(1)(keras.layers.Dense(8, activation="tanh")(inputs)))
    compile_again(model, accumulate, **options)
    return model


def compile_again(model: Any, accumulate: int | None = None, **options: Any) -> None:
    model.compile(
        keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulate), "mse", **options
    )


# --- What is done over and over: generators that do it once each time they are asked


def plain_again() -> Iterator[None]:
    """Keras's own way to another step: to compile again."""
    model = network("keras")
    while True:
        compile_again(model)
        model.train_on_batch(*BATCH)
        yield


def handles(kind: str) -> Iterator[None]:
    """A new hook, which has a name and logs, and is removed after a step."""
    if kind == "keras":
        yield from plain_again()
    model, number = network(kind), 0
    while True:
        hook = hooks.GradientMonitor(per_variable=True, name=f"monitor_{(number := number + 1)}")
        with model.register_gradient_hook(hook):
            model.train_on_batch(*BATCH)
        yield


def handles_in_windows(kind: str) -> Iterator[None]:
    """The same in a `fit` of three steps with windows of two, and a history of it."""
    model, number = network(kind, 2), 0
    while True:
        watchers: list[Any] = []
        if kind == "keras":
            compile_again(model, 2)
        else:
            hook = hooks.OutputMonitor(name=f"outputs_{(number := number + 1)}")
            handle = model.register_gradient_hook(hook)
            watchers = [callbacks.GradientHistory()]
        model.fit(X, Y, batch_size=4, verbose=0, shuffle=False, callbacks=watchers)
        if kind == "tape":
            handle.remove()
        yield


def recompiles(kind: str) -> Iterator[None]:
    """`compile` with a new optimizer and new hooks, and a step."""
    if kind == "keras":
        yield from plain_again()
    model = network(kind)
    while True:
        made = [hooks.SkipNonFinite(), hooks.PercentileClipping(30), hooks.GradientMonitor()]
        compile_again(model, gradient_hooks=made)
        model.train_on_batch(*BATCH)
        yield


def recompiles_in_windows(kind: str) -> Iterator[None]:
    """The same with a new window, whose last steps are left over."""
    model = network(kind, 2)
    while True:
        compile_again(
            model, 2, **({"gradient_hooks": [hooks.SkipNonFinite()]} if kind == "tape" else {})
        )
        model.fit(X, Y, batch_size=4, verbose=0, shuffle=False)
        yield


def models(kind: str) -> Iterator[None]:
    """A new model is trained, and is let go."""
    while True:
        options = {"gradient_hooks": [hooks.SkipNonFinite(), hooks.GradientMonitor()]}
        model = network(kind, **(options if kind == "tape" else {}))
        model.fit(X, Y, batch_size=4, verbose=0)
        del model
        keras.utils.clear_session()
        yield


def _steps(kind: str, watchers: Callable[[Path], list[Any]]) -> Iterator[None]:
    model = network(kind)
    data = tf.data.Dataset.from_tensors(BATCH).repeat()
    with tempfile.TemporaryDirectory() as folder:
        given = watchers(Path(folder))
        while True:
            model.fit(data, steps_per_epoch=STEPS_AT_ONCE, verbose=0, callbacks=given)
            yield


def history(kind: str) -> Iterator[None]:
    """Steps recorded by `GradientHistory`, which keeps them."""
    return _steps(kind, lambda folder: [] if kind == "keras" else [callbacks.GradientHistory()])


def csv(kind: str) -> Iterator[None]:
    """Steps recorded by `GradientCSV`; in Keras epochs by `CSVLogger`."""
    if kind == "keras":
        return _steps(kind, lambda f: [keras.callbacks.CSVLogger(f / "a.csv", append=True)])
    return _steps(kind, lambda f: [callbacks.GradientCSV(f / "a.csv", per_variable=True)])


def build(kind: str) -> Callable[[Any], Any]:
    def made(hp: Any) -> Any:
        rate = hp.Float("rate", 1e-3, 1e-1, sampling="log")
        model = network(kind)
        options = {}
        if kind != "keras":
            bound = hp.Float("max_norm", 0.1, 10.0)
            options = {"gradient_hooks": [hooks.GlobalNormClipping(bound), hooks.SkipNonFinite()]}
        model.compile(keras.optimizers.Adam(rate), "mse", **options)
        return model

    return made


def _trials(kind: str, hypermodel: Any) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        tuner = keras_tuner.RandomSearch(
            hypermodel, "val_loss", max_trials=1, directory=folder, seed=1
        )
        while True:
            tuner.search(X, Y, validation_data=BATCH, epochs=1, batch_size=4, verbose=0)
            yield
            # As many trials more as are searched for.
            tuner.oracle.max_trials += 1


def trials(kind: str) -> Iterator[None]:
    """Trials of a search, each traced."""
    made = build(kind)
    return _trials(kind, made if kind == "keras" else tuning.TapeHyperModel(made))


def trials_reused(kind: str) -> Iterator[None]:
    """Trials of a search with `reuse=True`."""
    made = build(kind)
    return _trials(kind, made if kind == "keras" else tuning.TapeHyperModel(made, reuse=True))


STEPS_AT_ONCE = 500
# Of each: what is counted, how many times it is done, and how many units one time is.
SCENARIOS: dict[str, tuple[Callable[[str], Iterator[None]], str, int, int]] = {
    "handles": (handles, "handle", 200, 1),
    "handles_in_windows": (handles_in_windows, "handle", 40, 1),
    "recompiles": (recompiles, "recompile", 200, 1),
    "recompiles_in_windows": (recompiles_in_windows, "recompile", 40, 1),
    "models": (models, "model", 40, 1),
    "history": (history, "step", 20, STEPS_AT_ONCE),
    "csv": (csv, "step", 20, STEPS_AT_ONCE),
    "trials": (trials, "trial", 50, 1),
    "trials_reused": (trials_reused, "trial", 50, 1),
}
# In plain Keras they are the same.
ALIKE = {"recompiles": "handles", "trials_reused": "trials"}


# --- What is measured


def held() -> dict[str, int]:
    """Returns what the process holds: KiB of memory, and numbers of things."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"KiB": pages * os.sysconf("SC_PAGE_SIZE") // 1024}
    found.update(dict.fromkeys(("models", "hooks", "variables", "graphs"), 0))
    for value in gc.get_objects():
        # Not `isinstance`, which asks proxies for a class.
        kind = type(value)
        found["models"] += issubclass(kind, keras.Model)
        found["hooks"] += issubclass(kind, hooks.GradientHook)
        found["variables"] += issubclass(kind, keras.Variable)
        found["graphs"] += issubclass(kind, tf.Graph)
    found["threads"] = threading.active_count()
    found["files"] = len(os.listdir("/proc/self/fd"))
    return found


def measure(scenario: str, kind: str, times: int | None = None) -> list[dict[str, int]]:
    """Returns what is held at points in the second half of a scenario.

    In the first traces are kept for the case that what was removed comes back.
    """
    make, _, number, units = SCENARIOS[scenario]
    number = times or number
    doing = make(kind)
    points = sorted({round(p) for p in np.linspace(number / 2, number, NUM_POINTS)})
    found = []
    for done in range(1, number + 1):
        next(doing)
        if done in points:
            found.append({"units": done * units, **held()})
    doing.close()
    return found


def slopes(points: list[dict[str, int]]) -> dict[str, float]:
    """Returns how much one unit adds to each number: KiB by least squares, counts by the ends."""
    units = [point["units"] for point in points]
    found = {"KiB": float(np.polyfit(units, [point["KiB"] for point in points], 1)[0])}
    for name in points[0].keys() - {"units", "KiB"}:
        found[name] = (points[-1][name] - points[0][name]) / (units[-1] - units[0])
    return found


def of_child(scenario: str, kind: str) -> list[dict[str, int]]:
    """Runs a scenario in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "points.json"
        command = [sys.executable, "-m", "tests.reliability.leaks", scenario, kind, str(path)]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(path.read_text())


def run() -> list[dict[str, Any]]:
    """Runs all scenarios, and returns one row each."""
    found, plain_ones = [], {}
    for scenario, (_, unit, number, units) in SCENARIOS.items():
        ours = slopes(of_child(scenario, "tape"))
        counterpart = ALIKE.get(scenario, scenario)
        if counterpart not in plain_ones:
            plain_ones[counterpart] = slopes(of_child(counterpart, "keras"))
        plain = plain_ones[counterpart]
        counts = {name: rate for name, rate in ours.items() if name != "KiB"}
        row = {
            "what": scenario.replace("_", " "),
            "how many": f"{number * units:,} {unit}s",
            "KiB each": ours["KiB"],
            "Keras": plain["KiB"],
            # A count that grew by less than one in four is no count of what was done.
            "what else grows": [name for name, rate in counts.items() if rate * units > 0.25],
            "in Keras": [n for n, rate in plain.items() if n != "KiB" and rate * units > 0.25],
        }
        print(row, flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    _, name, which, where = sys.argv
    Path(where).write_text(json.dumps(measure(name, which)))
