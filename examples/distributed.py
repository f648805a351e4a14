"""Train on several workers at once, with the same gradients as on one machine.

Each worker gets its part of every batch. The gradients are summed over the workers first
and go through the hooks afterwards, so a norm is that of the whole batch, gradients are
clipped exactly as on one machine, and all workers keep the same weights.

    python examples/distributed.py --workers 2

trains in one process, then with two workers on this machine, and compares the numbers.
On several machines, run the program on each with `TF_CONFIG` set;
docs/several_machines.md says how.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument("--workers", type=int, default=1, help="to be started on this machine")
PARSER.add_argument("--epochs", type=int, default=8, help="epochs of each training")
PARSER.add_argument("--batch-size", type=int, default=64, help="images in a step of all workers")
PARSER.add_argument(
    "--backup-dir", type=Path, help="where an interrupted run continues from; None: nowhere"
)
# What rounding may change: sums over workers are made in another order.
TOLERANCE = 2e-4

if __name__ == "__main__" and "TF_CONFIG" not in os.environ:
    # Before the imports, which take seconds.
    PARSER.parse_args()
    print("Trains a network; the first numbers take some ten seconds.", flush=True)

import keras
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_tapefit import TapeModel, hooks


def make_model() -> TapeModel:
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(64, activation="relu")(inputs)
    model = TapeModel(inputs, keras.layers.Dense(10, activation="softmax")(hidden))
    model.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        gradient_hooks=[
            hooks.SkipNonFinite(),
            hooks.GradientMonitor(),
            hooks.GlobalNormClipping(1.0),
        ],
    )
    return model


class PrintEpochs(keras.callbacks.Callback):
    """Prints a line an epoch."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        print(
            f"epoch {epoch + 1}  loss {logs['loss']:.4f}  accuracy {logs['accuracy']:.4f}  "
            f"gradient norm {logs['gradient_norm']:.4f}",
            flush=True,
        )


def train(args: argparse.Namespace) -> None:
    """Trains in this process: one of the workers of TF_CONFIG, or alone without it."""
    config = json.loads(os.environ.get("TF_CONFIG", "{}"))
    index = config.get("task", {}).get("index", 0)
    # It waits until all workers are there, so it comes first.
    strategy = (
        tf.distribute.MultiWorkerMirroredStrategy() if config else tf.distribute.get_strategy()
    )
    # Every worker starts with the same weights and shuffles alike.
    keras.utils.set_random_seed(0)
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        (digits.data / 16.0).astype("float32"), digits.target, test_size=0.2, random_state=0
    )
    with strategy.scope():
        model = make_model()

    callbacks: list[keras.callbacks.Callback] = []
    workers = strategy.num_replicas_in_sync
    if index == 0:
        callbacks.append(PrintEpochs())
        print(f"workers: {workers}, images a step: {args.batch_size}", flush=True)
    if args.backup_dir is not None:
        # What writes files needs a path for each worker.
        folder = args.backup_dir / f"worker_{index}_of_{workers}"
        callbacks.append(keras.callbacks.BackupAndRestore(folder))
    # `batch_size` is that of all workers together; all of them make every call.
    model.fit(
        x_train,
        y_train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        callbacks=callbacks,
        verbose=0,
    )
    results = model.evaluate(
        x_test, y_test, batch_size=args.batch_size, verbose=0, return_dict=True
    )
    if index == 0:
        print(f"test accuracy: {results['accuracy']:.4f}", flush=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def start_worker(
    cluster: list[str], index: int, output: Path, argv: Sequence[str]
) -> subprocess.Popen:
    """Starts this program again, as one worker of a cluster, or alone without one."""
    config = {"cluster": {"worker": cluster}, "task": {"type": "worker", "index": index}}
    environment = {
        **os.environ,
        # All that a worker has to know. An empty one: no worker.
        "TF_CONFIG": json.dumps(config if cluster else {}),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with output.open("w") as stdout, output.with_suffix(".errors").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, __file__, *argv], env=environment, stdout=stdout, stderr=stderr
        )


def run_workers(num_workers: int, argv: Sequence[str]) -> list[str] | None:
    """Runs workers to their end, and prints what the first one prints.

    Returns:
        The lines; `None` when a worker failed.
    """
    cluster = [f"127.0.0.1:{port}" for port in free_ports(num_workers)] if num_workers > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"worker_{index}" for index in range(num_workers)]
        workers = [
            start_worker(cluster, index, output, argv) for index, output in enumerate(outputs)
        ]
        try:
            with outputs[0].open() as printed:
                while True:
                    codes = [worker.poll() for worker in workers]
                    print(printed.read(), end="", flush=True)
                    failed = [index for index, code in enumerate(codes) if code]
                    if failed:
                        # The others would wait for it forever.
                        errors = outputs[failed[0]].with_suffix(".errors").read_text()
                        print(f"worker {failed[0]} failed:\n{errors[-2000:]}", file=sys.stderr)
                        return None
                    if all(code == 0 for code in codes):
                        return outputs[0].read_text().splitlines()
                    time.sleep(0.1)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def compare(alone: list[str], together: list[str]) -> int:
    """Says whether two trainings printed the same numbers; returns the exit status."""
    # Not the first lines: they say how many workers there are.
    pairs = zip(numbers_in(alone[1:]), numbers_in(together[1:]), strict=True)
    largest = max(abs(one - other) for one, other in pairs)
    if largest > TOLERANCE:
        print(f"the numbers differ by up to {largest:.1g}")
        return 1
    print(f"both runs gave the same numbers: the largest difference is {largest:.1g}")
    return 0


def numbers_in(lines: list[str]) -> list[float]:
    return [float(number) for line in lines for number in re.findall(r"\d+\.\d+", line)]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = PARSER.parse_args(argv)
    if args.workers == 1 or "TF_CONFIG" in os.environ:
        train(args)
        return 0
    alone = run_workers(1, argv)
    together = alone and run_workers(args.workers, argv)
    return compare(alone, together) if together else 1


if __name__ == "__main__":
    sys.exit(main())
