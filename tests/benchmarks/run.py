"""Measures what the library costs and saves, and writes the page about it.

python -m tests.benchmarks.run                     # all parts, printed
python -m tests.benchmarks.run steps --write       # one part, into docs/performance.md

Ratios are to stock `keras.Model`, measured in turns in one process. The page keeps the
parts that are not measured anew.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import platform
import re
from pathlib import Path

import keras
import tensorflow as tf

from tests.benchmarks import measures

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def section(name: str, rounds: int) -> str:
    """Measures a part, and returns its section of the page."""
    title, measure = measures.PARTS[name]
    rows = []
    for row in measure(rounds):
        print(" | ".join(row), flush=True)
        rows.append("| " + " | ".join(row) + " |")
    rows.insert(1, "|---" * (rows[0].count("|") - 1) + "|")
    told = " ".join((inspect.getdoc(measure) or "").split())
    gpus = tf.config.list_physical_devices("GPU")
    where = (
        f"{f'{len(gpus)} GPU' if gpus else 'CPU only'}, {platform.machine()}, Python "
        f"{platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}"
    )
    when = f"{datetime.date.today()}, medians of {rounds}; {where}."
    return "\n".join([f"## {title}", "", told, "", *rows, "", when])


def write(name: str, text: str) -> None:
    """Puts a section between its marks in the page."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if not re.search(pattern, page, re.S):
        raise SystemExit(f"{PAGE} has no place for {name!r}.")
    page = re.sub(pattern, lambda _: f"{begin}{text}\n{end}", page, flags=re.S)
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(measures.PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="pairs of timings a figure")
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(measures.PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}")
    for name in arguments.parts or measures.PARTS:
        text = section(name, arguments.rounds)
        if arguments.write:
            write(name, text)


if __name__ == "__main__":
    main()
