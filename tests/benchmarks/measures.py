"""What is measured, part by part; each part returns the lines of a table."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit import TapeModel, backward, callbacks, hooks
from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.units import Unit
from keras_tapefit.hooks.step import Step
from tests.benchmarks import timing, workloads

Lines = Iterator[tuple[str, ...]]


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


def runs_of(workload: Any, models: dict[str, Any], number: int) -> dict[str, Callable[[], None]]:
    return {
        side: timing.steps_of(model, workload.x, workload.y, number)
        for side, model in models.items()
    }


def line(workload: str, side: str, goal: str, r: timing.Ratio) -> tuple[str, ...]:
    times = f"{r.milliseconds:.2f}", f"{r.base_milliseconds:.2f}"
    low, high = r.spread
    return workload, side, f"{r.cpu:.2f} ({low:.2f}–{high:.2f})", f"{r.wall:.2f}", goal, *times


def first_steps(rounds: int) -> Lines:
    """Trace and first execution of a train function, new models each time."""
    yield "workload", "with", "CPU", "wall", "goal", "CPU ms", "stock"
    of_stack = {"Adam": ("0.25", "0.30"), "AdamW": ("0.25", "0.30")}
    of_resnet = {"Adam": ("0.40", "0.40"), "AdamW": ("0.45", "0.45")}
    for workload, by_name in (
        (workloads.dense_stack(100), of_stack),
        (workloads.resnet(), of_resnet),
    ):
        for name, goals in by_name.items():
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
            for side, goal in zip(("no hooks", "three hooks"), goals, strict=True):
                found = timing.ratio(times[side], times["stock"])
                yield line(f"{workload.name}, {name}", side, goal, found)


def steps(rounds: int) -> Lines:
    """Steps of a model that is warm. Stock clips with `global_clipnorm`, and so does the
    side without hooks; the loop is a `@tf.function` written by hand, with the same."""
    yield "workload", "with", "CPU", "wall", "goal", "CPU ms", "stock"
    subjects = [workloads.small_mlp(), workloads.conv_classifier(), workloads.transformer()]
    subjects += [workloads.lstm(), workloads.dense_stack(100), workloads.resnet()]
    for workload in subjects:
        number = {"small MLP": 200, "202 variables": 50}.get(workload.name, 5)
        update: dict[str, Any] = {"gradient_hooks": one_hook(), "jit_compile": "update"}
        models = {
            "stock": compiled(workload, keras.Model, stock_clipping()),
            "no hooks": compiled(workload, TapeModel, stock_clipping()),
            "clip hook": compiled(workload, TapeModel, "adam", gradient_hooks=one_hook()),
            "three hooks": compiled(workload, TapeModel, "adam", gradient_hooks=three_hooks()),
            'clip hook, `jit_compile="update"`': compiled(workload, TapeModel, "adam", **update),
        }
        runs = runs_of(workload, models, number)
        runs["a loop by hand"] = by_hand(workload, number)
        hooked = {"small MLP": "1.10", "202 variables": "0.75"}.get(workload.name, "1.00")
        updated = "0.70" if workload.name in ("conv classifier", "Transformer") else ""
        goals = ["", "1.00", "1.00", hooked, updated, ""]
        found = timing.in_turns(runs, rounds, number)
        for (side, measured), goal in list(zip(found.items(), goals, strict=True))[1:]:
            yield line(workload.name, side, goal, measured)


def by_hand(workload: Any, number: int, update: bool = True) -> Callable[[], None]:
    """Returns the loop of TensorFlow's guides, of the same model."""
    model, optimizer, loss = workload.build(keras.Model), stock_clipping(), workloads.loss()
    optimizer.build(model.trainable_variables)
    mean = keras.metrics.Mean()
    x, y = tf.constant(workload.x), tf.constant(workload.y)

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        if update:
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        mean.update_state(value)
        # What nobody asks for TensorFlow would not compute.
        found = tf.nest.flatten([] if update else gradients, expand_composites=True)
        return mean.result(), [tf.reshape(tensor, [-1])[0] for tensor in found]

    def run() -> None:
        for _ in range(number):
            value, _ = step(x, y)
        float(value)

    return run


def without_update(rounds: int) -> Lines:
    """Forward and backward pass by hand, against steps of stock: what is left of a step,
    and of the time to the first one, where an update costs nothing at all."""
    yield "workload", "of", "CPU", "wall", "CPU ms", "stock"
    for workload in (workloads.conv_classifier(), workloads.transformer()):
        stock = compiled(workload, keras.Model, stock_clipping())
        runs = runs_of(workload, {"stock": stock}, 5)
        runs["ours"] = by_hand(workload, 5, update=False)
        found = timing.in_turns(runs, rounds, 5)["ours"]
        row = line(workload.name, "a step", "", found)
        yield *row[:4], *row[5:]
    workload = workloads.resnet()
    times: dict[str, list[Any]] = {"stock": [], "ours": []}
    for _ in range(rounds):
        for side, measured in times.items():
            keras.utils.clear_session()
            run = by_hand(workload, 1, update=False)
            if side == "stock":
                stock = compiled(workload, keras.Model, keras.optimizers.Adam())
                run = timing.steps_of(stock, workload.x, workload.y, 1)
            measured.append(timing.stopwatch(run))
    row = line(
        workload.name, "the first step, Adam", "", timing.ratio(times["ours"], times["stock"])
    )
    yield *row[:4], *row[5:]


def freezing(rounds: int) -> Lines:
    """The first 90 of 100 layers frozen: steps, and what freezing and unfreezing cost."""
    yield "202 variables, Adam", "CPU", "wall", "goal", "CPU ms", "stock"
    workload = workloads.dense_stack(100)
    stock, ours = workload.build(keras.Model), workload.build(TapeModel)
    for layer in stock.layers[:91]:
        layer.trainable = False
    models = {"stock": stock, "ours": ours}
    for model in models.values():
        model.compile("adam", workloads.loss(), jit_compile=False)
    run = timing.steps_of(ours, workload.x, workload.y, 1)
    run()
    ours.freeze(ours.layers[1:91])
    first = timing.stopwatch(run)
    found = timing.in_turns(runs_of(workload, models, 20), rounds, 20)["ours"]
    yield (
        line("a step, against `trainable = False` before `compile`", "", "1.02", found)[:1]
        + (line("", "", "1.02", found)[2:])
    )
    again = []
    for _ in range(rounds):
        ours.unfreeze(ours.layers[1:91])
        run()
        ours.freeze(ours.layers[1:91])
        again.append(timing.stopwatch(run)[0])
    yield "the first step after `freeze`, which traces", "", "", "", f"{1e3 * first[0]:.0f}", ""
    later = f"{1e3 * float(np.median(again)):.1f}"
    yield "the first step after a later `freeze`", "", "", "", later, ""


def overhead(rounds: int) -> Lines:
    """`fit` on the small MLP: 2,000 steps, from the call to the return, against stock in
    the same setting."""
    yield "small MLP, `fit`", "CPU", "wall", "goal", "CPU ms a step", "stock"
    workload, number = workloads.small_mlp(), 2000
    batches = tf.data.Dataset.from_tensors((workload.x, workload.y)).cache().repeat(number)
    for size in (1, 50):
        runs = {}
        for side in ("stock", "ours", "ours, `GradientHistory`"):
            cls = keras.Model if side == "stock" else TapeModel
            model = compiled(workload, cls, "adam", steps_per_execution=size)
            watching = [callbacks.GradientHistory()] if "History" in side else []
            fit = functools.partial(model.fit, batches, verbose=0)
            runs[side] = lambda fit=fit, watching=watching: fit(callbacks=watching)
        found = timing.in_turns(runs, rounds, number)
        for side in list(found)[1:]:
            name = f"{side}, `steps_per_execution={size}`"
            yield line(name, "", "", found[side])[:1] + line("", "", "", found[side])[2:]
    model = compiled(workload, TapeModel, "adam")
    inside = timing.in_turns(runs_of(workload, {"ours": model}, 200), rounds, 200)["ours"]
    milliseconds = f"{inside.milliseconds:.2f}"
    yield "of that in the train function, one step an execution", "", "", "", milliseconds, ""


def methods(rounds: int) -> Lines:
    """Ways to get gradients, conv classifier, against a plain step of `TapeModel`."""
    yield "conv classifier", "CPU", "wall", "goal", "CPU ms", "plain"
    workload = workloads.conv_classifier()
    given: dict[str, dict[str, Any]] = {
        "plain": {},
        "`SharpnessAware()`": {"backward": backward.SharpnessAware()},
        "`micro_batches=4`": {"micro_batches": 4},
        "`PerExampleClipping(1.0)`": {"backward": backward.PerExampleClipping(1.0)},
    }
    models = {k: compiled(workload, TapeModel, "adam", **v) for k, v in given.items()}
    runs = {
        **runs_of(workload, models, 3),
        "four parts by hand": in_parts(workload, 4, 3),
        "a loop over examples": one_by_one(workload, 3),
    }
    found = timing.in_turns(runs, rounds, 3)
    for side, goal in zip(list(found)[1:], ("2.05", "1.15", "", "", ""), strict=True):
        yield line(side, "", goal, found[side])[:1] + line("", "", goal, found[side])[2:]
    slow, fast = found["a loop over examples"], found["`PerExampleClipping(1.0)`"]
    times = f"{slow.cpu / fast.cpu:.1f} times", f"{slow.wall / fast.wall:.1f} times"
    yield "the loop against `PerExampleClipping`", *times, "5 times", "", ""


def by_example(rounds: int) -> Lines:
    """Steps with `PerExampleClipping` and with hooks that look at every layer's output,
    against a plain step of `TapeModel`, all with Adam."""
    yield "workload", "with", "CPU", "wall", "goal", "CPU ms", "plain"
    cases = (
        (workloads.conv_classifier(), ("1.25", "2.00", "", ""), 3),
        (workloads.transformer(), ("1.15", "1.70", "", ""), 3),
        (workloads.mlp(), ("1.15", "2.20", "", ""), 20),
    )
    for workload, goals, number in cases:
        given: dict[str, dict[str, Any]] = {
            "plain": {},
            "`PerExampleClipping(1.0)`": {"backward": backward.PerExampleClipping(1.0)},
            "`PerExampleClipping(1.0, 1.0)`": {"backward": backward.PerExampleClipping(1.0, 1.0)},
            "`OutputMonitor()`": {"gradient_hooks": [hooks.OutputMonitor()]},
            "`SkipNonFinite(locate=True)`": {"gradient_hooks": [hooks.SkipNonFinite(locate=True)]},
        }
        models = {k: compiled(workload, TapeModel, "adam", **v) for k, v in given.items()}
        found = timing.in_turns(runs_of(workload, models, number), rounds, number)
        for side, goal in zip(list(found)[1:], goals, strict=True):
            yield line(workload.name, side, goal, found[side])


def without_rule(rounds: int) -> Lines:
    """Steps with `PerExampleClipping` where some layers have no rule, against a plain step of
    `TapeModel`: with these layers alone run again on each example, and with the whole model,
    which a `chunk_size` as large as the batch asks for."""
    yield "workload", "run again", "CPU", "wall", "goal", "CPU ms", "plain"
    for workload, number in ((workloads.slopes(), 10), (workloads.recurrent(), 3)):
        given: dict[str, dict[str, Any]] = {
            "plain": {},
            "layers": {"backward": backward.PerExampleClipping(1.0)},
            "whole model": {
                "backward": backward.PerExampleClipping(1.0, chunk_size=len(workload.x))
            },
        }
        models = {k: compiled(workload, TapeModel, "adam", **v) for k, v in given.items()}
        found = timing.in_turns(runs_of(workload, models, number), rounds, number)
        for side in list(found)[1:]:
            assert f"the {side}" in str(given[side]["backward"].fell_back)
            yield line(workload.name, side, "", found[side])


def _with_adam(workload: Any) -> tuple[Any, ...]:
    """Returns what a loop by hand needs: model, optimizer, variables, loss and a batch."""
    model, optimizer, loss = workload.build(keras.Model), keras.optimizers.Adam(), workloads.loss()
    optimizer.build(model.trainable_variables)
    variables = [v.value for v in model.trainable_variables]
    x, y = tf.constant(workload.x), tf.constant(workload.y)
    return model, optimizer, variables, loss, x, y


def _repeated(step: Callable[[], Any], number: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(number):
            count = step()
        int(count)

    return run


def one_by_one(workload: Any, number: int) -> Callable[[], None]:
    """Returns the plain way to clip the gradient of each example."""
    model, optimizer, variables, loss, x, y = _with_adam(workload)

    @tf.function
    def step() -> Any:
        total = [tf.zeros_like(v) for v in variables]
        for i in tf.range(len(x)):
            with tf.GradientTape() as tape:
                value = loss(y[i : i + 1], model(x[i : i + 1], training=True))
            gradients, _ = tf.clip_by_global_norm(tape.gradient(value, variables), 1.0)
            total = [a + b for a, b in zip(total, gradients, strict=True)]
        optimizer.apply([g / len(x) for g in total], model.trainable_variables)
        return optimizer.iterations + 0

    return _repeated(step, number)


def in_parts(workload: Any, number_of_parts: int, number: int) -> Callable[[], None]:
    """Returns a loop by hand that sums the gradients of equal parts of a batch."""
    model, optimizer, variables, loss, x, y = _with_adam(workload)
    size = len(workload.x) // number_of_parts

    @tf.function
    def step() -> Any:
        total: list[Any] = []
        for start in range(0, len(workload.x), size):
            # One after the other, as `micro_batches` computes them, to save memory.
            with tf.control_dependencies(total), tf.GradientTape() as tape:
                value = loss(y[start : start + size], model(x[start : start + size], training=True))
                value /= number_of_parts
            gradients = tape.gradient(value, variables)
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
        optimizer.apply(total, model.trainable_variables)
        return optimizer.iterations + 0

    return _repeated(step, number)


def parts(rounds: int) -> Lines:
    """`micro_batches=k` on the conv classifier and the Transformer: the time to the first
    step and that of a step, against one part. Parts after the first are one loop, of which
    one part is traced."""
    yield "workload", "k", "first step, CPU", "wall", "a step, CPU", "wall"
    for workload in (workloads.conv_classifier(), workloads.transformer()):
        firsts: dict[int, list[Any]] = {k: [] for k in (1, 2, 8, 32)}
        runs: dict[str, Any] = {}
        for _ in range(max(1, rounds // 2)):
            for k, measured in firsts.items():
                model = compiled(workload, TapeModel, "adam", micro_batches=k)
                run = timing.steps_of(model, workload.x, workload.y, 1)
                measured.append(timing.stopwatch(run))
                runs[str(k)] = run
        steps_found = timing.in_turns(runs, rounds)
        for k, measured in list(firsts.items())[1:]:
            first, step = timing.ratio(measured, firsts[1]), steps_found[str(k)]
            ratios = (first.cpu, first.wall, step.cpu, step.wall)
            yield workload.name, str(k), *(f"{value:.2f}" for value in ratios)


def growth(rounds: int) -> Lines:
    """Time to the first step, and of a step, with Adam, three hooks on our side; first
    steps are medians of 2. The last line is the slope between the smallest and the largest."""
    yield "variables", "first step, CPU ms", "stock", "a step, CPU ms", "stock"
    table: dict[int, list[float]] = {}
    for num_layers in (11, 49, 199):
        workload = workloads.dense_stack(num_layers)
        firsts: dict[str, list[float]] = {"ours": [], "stock": []}
        runs: dict[str, Any] = {}
        for _ in range(max(1, rounds // 2)):
            for side, measured in firsts.items():
                given = {"gradient_hooks": three_hooks()} if side == "ours" else {}
                cls = TapeModel if side == "ours" else keras.Model
                model = compiled(workload, cls, "adam", **given)
                runs[side] = timing.steps_of(model, workload.x, workload.y, 1)
                measured.append(timing.stopwatch(runs[side])[0])
        found = timing.in_turns(dict(reversed(runs.items())), rounds * 3)["ours"]
        row = [1e3 * float(np.median(firsts[side])) for side in ("ours", "stock")]
        row += [found.milliseconds, found.base_milliseconds]
        table[2 * num_layers + 2] = row
        yield str(2 * num_layers + 2), *(f"{value:.2f}" for value in row)
        keras.utils.clear_session()
    (few, low), *_, (many, high) = table.items()
    slopes = [(b - a) / (many - few) for a, b in zip(low, high, strict=True)]
    yield "each one more", *(f"{slope:.3f}" for slope in slopes)


def scale(rounds: int) -> Lines:
    """CPU time of hooks alone, on gradients in eight matrices, in units of one reading of
    them (a sum of squares). The reading itself grows with the number of parameters; a hook
    that writes costs more of it where the arrays no longer fit into the processor's caches."""
    sizes = [2**18, 2**21, 2**24]
    yield "hook", *(f"{size / 1e6:.2g} million" for size in sizes)
    subjects = {
        "`GradientMonitor()`, `SkipNonFinite()`": lambda: hooks.GradientMonitor(),
        "`GlobalNormClipping`, below its bound": lambda: hooks.GlobalNormClipping(1e9),
        "`GlobalNormClipping`, above it": lambda: hooks.GlobalNormClipping(1e-3),
        "`NormClipping`, above its bound": lambda: hooks.NormClipping(1e-3),
        "`ValueClipping`, above its bound": lambda: hooks.ValueClipping(1e-3),
        "`AdaptiveClipping`, above its bound": lambda: hooks.AdaptiveClipping(1e-6),
        "`Centralization()`": lambda: hooks.Centralization(),
        "`GradientNoise`": lambda: hooks.GradientNoise(0.1, seed=0),
    }
    table: dict[str, list[str]] = {name: [] for name in subjects}
    for size in sizes:
        rows = int((size / 8) ** 0.5)
        shape = (rows, size // 8 // rows)
        variables = [keras.Variable(np.ones(shape, "float32")) for _ in range(8)]
        values = [tf.random.normal(shape, seed=i) for i in range(8)]
        runs = {"pass": _run_of(None, variables, values)}
        runs.update((n, _run_of(make(), variables, values)) for n, make in subjects.items())
        found = timing.in_turns(runs, rounds * 3)
        for name in subjects:
            table[name].append(f"{found[name].cpu:.1f}")
    for name, cells in table.items():
        yield name, *cells


def _run_of(hook: Any, variables: list[Any], values: list[Any]) -> Callable[[], None]:
    listed = hooks.HookList([] if hook is None else [hook])
    listed.prepare(variables, lambda variable: Unit((0,), is_kernel=True))

    @tf.function(autograph=False)
    def run(values: list[Any]) -> Any:
        if hook is None:
            return tf.add_n([tf.nn.l2_loss(value) for value in values])
        step = Step(index=tf.constant(0, tf.int64))
        gradients = listed.run(Gradients(zip(values, variables, strict=True)), step)
        return gradients.values(), [entry.value for entry in step.entries]

    return lambda: run(values)


def memory(rounds: int) -> Lines:
    """Peak memory above that of the program, 512 images of 32×32, a process each."""
    command = [sys.executable, "-m", "tests.benchmarks.memory"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for row in printed.splitlines():
        if not re.match(r"\|[-|]+\|$", row):
            yield tuple(cell.strip() for cell in row.strip("|").split("|"))


def imports(rounds: int) -> Lines:
    """What `import keras_tapefit` adds to `import keras`; goal: at most 50 ms."""
    yield "import", "CPU ms", "wall ms"
    code = (
        "import time; c, w = time.process_time, time.perf_counter; a, b = c(), w(); "
        "import keras; print(c() - a, w() - b); a, b = c(), w(); "
        "import keras_tapefit; print(c() - a, w() - b)"
    )
    # As installed: compiled to bytecode by an import before.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    found = []
    for _ in range(rounds + 1):
        command = [sys.executable, "-c", code]
        words = subprocess.check_output(command, text=True, env=environment).split()
        found.append([float(word) for word in words])
        time.sleep(0.1)
    medians = 1e3 * np.median(np.array(found[1:]), axis=0)
    yield "`keras`", f"{medians[0]:.0f}", f"{medians[1]:.0f}"
    yield "`keras_tapefit` on top", f"{medians[2]:.0f}", f"{medians[3]:.0f}"


PARTS: dict[str, tuple[str, Callable[[int], Lines]]] = {
    "first-step": ("Time to the first step", first_steps),
    "steps": ("A step", steps),
    "no-update": ("What is left without an update", without_update),
    "freezing": ("Freezing", freezing),
    "overhead": ("What `fit` costs around the steps", overhead),
    "methods": ("Ways to get gradients", methods),
    "parts": ("Micro-batches", parts),
    "by-example": ("Example by example, and inside the backward pass", by_example),
    "without-rule": ("Layers without a rule, example by example", without_rule),
    "growth": ("Growth with the number of variables", growth),
    "scale": ("Growth with the number of parameters", scale),
    "memory": ("Memory of micro-batches", memory),
    "import": ("Import", imports),
}
