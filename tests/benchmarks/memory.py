"""Measures how the peak memory of training falls with the number of micro-batches.

python -m tests.benchmarks.memory                     # prints a Markdown table

Each number of parts is trained in a process of its own, because a process never gives
back what it once had; what it had before the first step is taken off.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE_SIZE = resource.getpagesize()


class Peak(threading.Thread):
    """Watches how much memory the process has; kept pages of the start do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.002):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


def measure(parts: int, batch_size: int, steps: int) -> tuple[float, float]:
    """Trains in this process; returns MiB above the start, and seconds a step."""
    import keras
    import numpy as np
    import tensorflow as tf
    from keras import layers

    from keras_tapefit import TapeModel, hooks

    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32, 32, 3))
    h = inputs
    for filters in (32, 32, 64, 64):
        h = layers.Conv2D(filters, 3, padding="same", activation="relu")(h)
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(h))
    model = TapeModel(inputs, outputs)
    model.compile(
        keras.optimizers.SGD(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        gradient_hooks=[hooks.GlobalNormClipping(1.0)],
        micro_batches=parts,
        jit_compile=False,
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch_size, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, size=batch_size)
    data = tf.data.Dataset.from_tensors((x, y)).cache()
    # A small batch first: what the program itself takes is there before.
    model.train_on_batch(x[: 2 * parts], y[: 2 * parts])
    before = resident()
    peak = Peak()
    peak.start()
    began = time.monotonic()
    model.fit(data.repeat(steps), epochs=1, verbose=0)
    seconds = (time.monotonic() - began) / steps
    peak.stopped.set()
    peak.join()
    return (peak.bytes - before) / 2**20, seconds


def measured_apart(parts: int, batch_size: int, steps: int) -> tuple[float, float]:
    """Calls `measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--only", str(parts)]
    command += ["--batch-size", str(batch_size), "--steps", str(steps)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    mebibytes, seconds = done.stdout.split()[-2:]
    return float(mebibytes), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--only", type=int, help="measures one in this process")
    args = parser.parse_args()
    if args.only is not None:
        print(*measure(args.only, args.batch_size, args.steps))
        return
    print("| `micro_batches` | peak MiB | of one | s a step |")
    print("|---|---|---|---|")
    first = None
    for parts in args.parts:
        mebibytes, seconds = measured_apart(parts, args.batch_size, args.steps)
        first = first or mebibytes
        print(
            f"| {parts} | {mebibytes:.0f} | {mebibytes / first:.2f} | {seconds:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
