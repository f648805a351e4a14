"""Measures the table, and writes it to `docs/equivalence.md`.

    python -m tests.equivalence.table [--everyday]

With `--everyday` one optimizer and one model stand for all. It ends with an error where
a cell is beyond its tolerance.
"""

import argparse
import concurrent.futures
import multiprocessing
import pathlib

from tests import conftest as conftest  # isort: skip
import keras
import numpy as np
import tensorflow as tf

from tests.equivalence import cases

NEXT = "## Every pair of features"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "equivalence.md"

TEXT = """\
# The equivalence table

<!-- Written by `python -m tests.equivalence.table`. Do not edit. -->

Every hook runs the same small training in every mode: {num_steps} steps, {models}, and \
with {optimizers}. A cell is the distance of the trained weights from those of a \
plain graph, relative to their length; {runs}. Logs, and what hooks keep \
as state, are held to the same tolerance. What float32 resolves is 6e-8.

{table}

The modes: `run_eagerly=True`; `jit_compile=True`; `steps_per_execution=3`, which does not \
divide the number of steps; `tf.distribute.MirroredStrategy` on 2 devices, each with half \
of the batch; a dynamic `LossScaleOptimizer`; `jit_compile="update"`; a product with one-hot \
vectors instead of the embedding; `micro_batches=4`; \
`gradient_accumulation_steps` of the optimizer, on batches that are smaller in proportion. \
The trainings are such that mistakes show: embeddings with repeated tokens, gradients that \
depend on their own scale (SGD; an optimizer like Adam is blind to a wrong factor), a bad \
example that only one replica sees.

What the table leaves out, marked –:

{left_out}

Measured with Keras {keras}, TensorFlow {tf}, NumPy {np}, on CPU.
"""


Line = dict[str, float | None]
"""The largest difference of the weights, by the name of the mode."""


def measure(hook: str, combinations: list[tuple[str, str]]) -> tuple[Line, list[str]]:
    """Returns a line of the table, and what was beyond its tolerance."""
    line: Line = {}
    failed = []
    for mode in cases.MODES:
        found = [
            cases.differences(hook, mode, optimizer, model)
            for model, optimizer in combinations
            if not {hook, optimizer, model} & mode.leaves_out.keys()
        ]
        line[mode.name] = max((f["weights"] for f in found), default=None)
        if any(max(f.values()) > mode.tolerance for f in found):
            failed.append(f"{hook} / {mode.name}: {found}")
    keras.backend.clear_session()
    return line, failed


def _measure_all(combinations: list[tuple[str, str]]) -> dict[str, Line]:
    """Shares the hooks out to one process a core."""
    lines: dict[str, Line] = {}
    failed = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        jobs = {hook: pool.submit(measure, hook, combinations) for hook in cases.HOOKS}
        for hook, job in jobs.items():
            lines[hook], beyond = job.result()
            failed += beyond
            print(hook, *map(_number, lines[hook].values()), sep="\t", flush=True)
    if failed:
        raise SystemExit("\n".join([*failed, f"{len(failed)} cells are beyond their tolerance."]))
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _table(lines: dict[str, Line]) -> str:
    header = ["hook", *(mode.name for mode in cases.MODES)]
    rows = [header, ["---"] * len(header)]
    rows += [[hook, *map(_number, line.values())] for hook, line in lines.items()]
    rows.append(["tolerance", *(_number(mode.tolerance) for mode in cases.MODES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _left_out() -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for mode in cases.MODES:
        for name, reason in mode.leaves_out.items():
            reasons.setdefault((name, reason), []).append(mode.name)
    return "\n".join(
        f"- {name}, {' and '.join(modes)}: {reason}." for (name, reason), modes in reasons.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--everyday", action="store_true", help="one optimizer and model only")
    everyday = parser.parse_args().everyday
    models = list(cases.MODELS)[: 1 if everyday else None]
    optimizers = list(cases.OPTIMIZERS)[: 1 if everyday else None]
    lines = _measure_all([(model, optimizer) for model in models for optimizer in optimizers])
    runs = len(models) * len(optimizers)
    page = TEXT.format(
        num_steps=cases.NUM_EPOCHS * 48 // cases.BATCH_SIZE,
        models=" and ".join(f"the {name} model" for name in models),
        optimizers=", ".join(optimizers),
        runs="one run" if runs == 1 else f"the largest over {runs} runs",
        table=_table(lines),
        left_out=_left_out(),
        keras=keras.__version__,
        tf=tf.__version__,
        np=np.__version__,
    )
    # What comes after this table another command writes.
    rest = PAGE.read_text(encoding="utf-8").partition(NEXT)
    PAGE.write_text(page.rstrip() + "\n\n" + "".join(rest[1:]), encoding="utf-8")
    print(f"Wrote {PAGE}.")


if __name__ == "__main__":
    main()
