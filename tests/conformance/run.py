"""Runs the tests in Keras's wheel with the classes swapped, and compares with stock.

    python -m tests.conformance.run [--swap tapefit|naive|stock] [--select TEXT]
        [--report FILE.json] [--fresh]

What passes with `keras.Model` and `keras.Sequential` has to pass with ours. Both runs
are processes of their own, side by side. What stock Keras does is kept in the user's
cache folder, for as long as the installed packages stay the same.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import selection, swaps
from .left_out import LEFT_OUT

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# A test that hangs ends the run, instead of holding it up for ever.
PYTEST_INI = """
[pytest]
faulthandler_timeout = 600
faulthandler_exit_on_timeout = true
"""

Results = dict[str, dict[str, Any]]


class Run:
    """A process of pytest with one swap.

    Args:
        swap: one of `swaps.NAMES`.
        select: a part of the ids of the tests to run.
        folder: an empty folder; it is the process's working directory too.
    """

    def __init__(self, swap: str, select: str, folder: Path) -> None:
        self.swap = swap
        self.results_file = folder / "results.jsonl"
        self.log_file = folder / "log.txt"
        (folder / "pytest.ini").write_text(PYTEST_INI)
        (folder / "work").mkdir()
        # A whole path in `select` spares collecting the rest.
        path = select.split("::")[0]
        files = selection.test_files()
        files = [file for file in files if path in file.as_posix()] or files
        command = [sys.executable, "-m", "pytest", "-p", "tests.conformance.plugin"]
        command += ["-p", "no:cacheprovider", "-c", str(folder / "pytest.ini")]
        command += ["--rootdir", str(selection.site_packages()), "--tb=short", "-q"]
        command += ["--continue-on-collection-errors", "--swap", swap, "--select", select]
        command += ["--results", str(self.results_file), *map(str, files)]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder / "work",
                env=_environment(folder),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def results(self) -> Results:
        """Waits for the end, and returns the outcome of each test."""
        status = self.process.wait()
        if status not in (0, 1):
            tail = self.log_file.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"pytest with --swap {self.swap} ended with {status}:\n{tail}")
        lines = self.results_file.read_text().splitlines()
        return {result["id"]: result for result in map(json.loads, lines)}


def _environment(folder: Path) -> dict[str, str]:
    # Settings of a developer's own shell must not reach the run.
    foreign = ("PYTEST", "TF_", "KERAS_", "AUTOGRAPH_", "PYTHONWARNINGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "KERAS_BACKEND": "tensorflow",
        "KERAS_HOME": str(folder),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Two processes would fight for the memory of one GPU.
        "CUDA_VISIBLE_DEVICES": "",
    }


def _cache_file() -> Path:
    packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    sources = [(HERE / f"{name}.py").read_text() for name in ("plugin", "run", "selection")]
    key = hashlib.sha256("\n".join([sys.version, *packages, *sources]).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "keras-tapefit" / "conformance" / f"stock-{key[:16]}.json"


def run(swap: str, select: str, fresh: bool) -> tuple[Results, Results]:
    """Returns what the tests do with stock Keras, and with the classes swapped."""
    cache = _cache_file()
    cached = cache.exists() and not fresh
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name in dict.fromkeys(["stock", swap]):
            if name != "stock" or not cached:
                (Path(folder) / name).mkdir()
                runs[name] = Run(name, select, Path(folder) / name)
        try:
            results = {name: one.results() for name, one in runs.items()}
        finally:
            for one in runs.values():
                one.process.kill()
                one.process.wait()
    if cached:
        stock = json.loads(cache.read_text())
        results["stock"] = {i: result for i, result in stock.items() if select in i}
    elif not select:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(results["stock"]))
    return results["stock"], results[swap]


def compare(
    stock: Results, swapped: Results, left_out: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns what fails though stock passes, and what is wrong with the list left out.

    Args:
        stock: what the tests do with Keras's own classes.
        swapped: what they do with ours.
        left_out: the tests that are expected to fail, with reasons.

    Returns:
        Two dicts of ids and reasons.
    """
    failures, mistakes = {}, {}
    for i in _passed(stock):
        result = swapped.get(i, {"outcome": "missing", "reason": "did not run"})
        if result["outcome"] != "passed" and i not in left_out:
            failures[i] = result["reason"] or result["outcome"]
    for i in left_out:
        if i not in stock:
            mistakes[i] = "is left out, and no test has this id"
        elif stock[i]["outcome"] != "passed":
            mistakes[i] = f"is left out, and with stock Keras it {stock[i]['outcome']}"
        elif i in swapped and swapped[i]["outcome"] == "passed":
            mistakes[i] = "is left out, and passes"
    return failures, mistakes


def _passed(results: Results) -> list[str]:
    return [i for i, result in results.items() if result["outcome"] == "passed"]


def table(swap: str, stock: Results, swapped: Results, left_out: Any, failures: Any) -> str:
    """Returns how many tests pass and fail, for each folder of Keras."""
    columns = {
        "passed on stock": _passed(stock),
        f"passed on {swap}": [i for i in _passed(stock) if i in set(_passed(swapped))],
        "left out": left_out,
        "failed": failures,
    }
    counts = {title: Counter(map(_folder, ids)) for title, ids in columns.items()}
    rows = [["", *columns]]
    for folder in sorted(set().union(*counts.values())):
        rows.append([folder, *(str(count[folder]) for count in counts.values())])
    rows.append(["all", *(str(count.total()) for count in counts.values())])
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        row[0].ljust(width)
        + "".join(
            "  " + cell.rjust(len(title)) for cell, title in zip(row[1:], columns, strict=True)
        )
        for row in rows
    )


def _folder(test: str) -> str:
    file = Path(test.split("::")[0])
    return "/".join(file.parts[2:4]) if len(file.parts) > 4 else file.parts[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swap", choices=swaps.NAMES, default="tapefit")
    parser.add_argument("--select", default="", metavar="TEXT", help="a part of a test's id")
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    parser.add_argument("--fresh", action="store_true", help="run stock Keras again")
    arguments = parser.parse_args()

    start = time.monotonic()
    stock, swapped = run(arguments.swap, arguments.select, arguments.fresh)
    left_out = LEFT_OUT if arguments.swap == "tapefit" else {}
    left_out = {i: reason for i, reason in left_out.items() if arguments.select in i}
    failures, mistakes = compare(stock, swapped, left_out)

    for i, reason in [*failures.items(), *mistakes.items()]:
        print(f"{i}\n    {' '.join(reason.split())[:300]}")
    print(table(arguments.swap, stock, swapped, left_out, failures))
    print(f"{len(failures)} failed, {len(mistakes)} mistakes in left_out.py, ", end="")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    if arguments.report:
        report = {
            "swap": arguments.swap,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
            "left_out": left_out,
            "mistakes": mistakes,
            "failures": {i: swapped.get(i, {}).get("text") or failures[i] for i in failures},
            "stock": {i: result["outcome"] for i, result in stock.items()},
            "swapped": {i: result["outcome"] for i, result in swapped.items()},
            "seconds": {i: result["seconds"] for i, result in swapped.items()},
        }
        arguments.report.write_text(json.dumps(report, indent=1))
    if not _passed(stock):
        print("No test passed on stock Keras: is there one that matches --select?")
        return 1
    return 1 if failures or mistakes else 0


_VERSIONS = ("tensorflow", "keras", "numpy", "pytest")

if __name__ == "__main__":
    sys.exit(main())
