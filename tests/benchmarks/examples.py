"""Runs the examples as a user would, one after the other, and writes how long each took.

python -m tests.benchmarks.examples            # printed
python -m tests.benchmarks.examples --write    # into the table of docs/examples.md
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tensorflow as tf

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "examples.md"
ROW = re.compile(r"^(\| \[(\w+\.py)\]\(\S+\)(?: `([^`]*)`)? \|.*\|) ([^|]*) \|$", re.M)
DATE = re.compile(r"<!-- times -->\n.*?\n<!-- end of times -->", re.S)


def seconds(program: str, options: str) -> float:
    """Returns how long an example runs, in a folder of its own."""
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / program), *options.split()]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    arguments = parser.parse_args()

    def timed(row: re.Match[str]) -> str:
        taken = seconds(row[2], row[3] or "")
        print(f"{row[2]}: {taken:.1f} s", flush=True)
        return f"{row[1]} {5 * max(1, round(taken / 5))} s |"

    page = ROW.sub(timed, PAGE.read_text(encoding="utf-8"))
    when = (
        f"Times of {datetime.date.today()}, the import of TensorFlow included: "
        f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, "
        f"TensorFlow {tf.__version__}."
    )
    page = DATE.sub(f"<!-- times -->\n{when}\n<!-- end of times -->", page)
    if arguments.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
