"""Which combinations are tried: every pair of features, and by a command every triple.

python -m tests.reference.array     # writes pairs.json; needs allpairspy
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator

from .features import DIMENSIONS, Row

FILE = pathlib.Path(__file__).with_name("pairs.json")

OWN_STEPS = {"custom step", "two updates"}
HEADS = {"two heads", "unlike heads"}
LABELS = {"ignore_class", "unlike heads"}
PARTS = {"micro-batches", "accumulated", "leftovers", "micro-batches, accumulated"}
REPLICAS = {"1 replica", "2 replicas", "3 replicas"}


def _set(*names: str) -> set[str]:
    return set(names)


# Pairs that mean nothing, or that Keras itself does not have: two dimensions, the values of
# each, and the reason.
LEFT_OUT: list[tuple[str, set[str], str, set[str], str]] = [
    ("model", _set("sequential", "sequential, unbuilt"), "loss", HEADS, "has one output"),
    (
        "model",
        _set("bare variables"),
        "loss",
        _set("masked"),
        "a product of the model's own loses the mask, in Keras",
    ),
    ("loss", HEADS, "weights", _set("class"), "Keras has class weights for one output only"),
    (
        "loss",
        _set("ignore_class", "masked"),
        "weights",
        _set("class"),
        "Keras has class weights for one label an example only",
    ),
    (
        "model",
        _set("dict outputs"),
        "weights",
        _set("class"),
        "Keras has class weights for one output only",
    ),
    (
        "hook",
        _set("sharpness"),
        "parts",
        PARTS,
        "each part has a point uphill of its own",
    ),
    (
        "break",
        _set("mid-epoch"),
        "data",
        _set("unknown length", "generator"),
        "`train_on_batch` takes arrays",
    ),
    (
        "break",
        _set("mid-epoch"),
        "freezing",
        _set("alternating", "scheduled"),
        "`train_on_batch` has no epochs",
    ),
    (
        "break",
        _set("mid-epoch"),
        "mode",
        REPLICAS,
        "Keras gives each replica all of the batch of `train_on_batch`",
    ),
    (
        "model",
        _set("sequential, unbuilt", "subclass, unbuilt", "bare variables"),
        "break",
        _set("resumed"),
        "Keras's `BackupAndRestore` takes built models only",
    ),
    ("optimizer", _set("Muon"), "dtype", _set("float64"), "Keras's Muon fails in float64"),
    (
        "optimizer",
        _set("AdamW EMA"),
        "freezing",
        _set("alternating", "scheduled"),
        "the averages of Keras begin at the first update, and are 0 for what is frozen then",
    ),
    (
        "optimizer",
        _set("AdamW EMA"),
        "loss",
        _set("two updates"),
        "each of the two updates moves all averages, in Keras",
    ),
    (
        "optimizer",
        _set("MultiOptimizer"),
        "loss",
        _set("two updates"),
        "the optimizer of Keras takes all of its variables at once",
    ),
]

# Pairs that the library refuses: features that the message must name, what it must match,
# and the reason. To add one takes a reason that would convince a user.
REFUSED: list[tuple[str, set[str], str, set[str], str, str]] = [
    (
        "loss",
        OWN_STEPS,
        "parts",
        _set("micro-batches", "micro-batches, accumulated"),
        r"(?s)train_step.*micro_batches|micro_batches.*train_step",
        "the forward pass is the step's own, and cannot be cut into parts",
    ),
    (
        "loss",
        OWN_STEPS,
        "hook",
        _set("sharpness"),
        r"(?s)train_step.*(backward|SharpnessAware)|(backward|SharpnessAware).*train_step",
        "the forward pass is the step's own, and cannot be made again",
    ),
]


def left_out(row: Row) -> str | None:
    """Returns why a row, or a part of one, is not tried."""
    for a, of_a, b, of_b, reason in LEFT_OUT:
        if row.get(a) in of_a and row.get(b) in of_b:
            return reason
    return None


def refused(row: Row) -> list[str]:
    """Returns what the error may match, where a row may be refused."""
    return [match for a, of_a, b, of_b, match, _ in REFUSED if row[a] in of_a and row[b] in of_b]


def identity(row: Row) -> str:
    """Returns a row in words, without what is plain in it."""
    plain = {"none", "whole", "float32", "graph", "even", "functional"}
    return " + ".join(value for value in row.values() if value not in plain) or "plain"


def combinations(strength: int) -> Iterator[tuple[tuple[str, str], ...]]:
    """Yields all sets of that many features which some training can have together."""
    for names in itertools.combinations(DIMENSIONS, strength):
        for values in itertools.product(*(DIMENSIONS[name] for name in names)):
            chosen = tuple(zip(names, values, strict=True))
            if left_out(dict(chosen)) is None:
                yield chosen


def cover(strength: int) -> list[Row]:
    """Makes rows that have each combination of that many features at least once."""
    from allpairspy import AllPairs

    names = list(DIMENSIONS)

    def may_be(values: list[str]) -> bool:
        return left_out(dict(zip(names, values, strict=False))) is None

    made = AllPairs(list(DIMENSIONS.values()), filter_func=may_be, n=strength)
    return [dict(zip(names, values, strict=True)) for values in made]


def pairs() -> list[Row]:
    """Returns the rows that are kept."""
    names = list(DIMENSIONS)
    return [dict(zip(names, values, strict=True)) for values in json.loads(FILE.read_text())]


def write() -> None:
    """Writes the rows down, after a look whether they have all pairs."""
    rows = cover(2)
    there = {c for row in rows for c in itertools.combinations(row.items(), 2)}
    missing = [dict(c) for c in combinations(2) if c not in there]
    print(f"{len(rows)} rows, and {len(missing)} pairs that are in none of them")
    while missing:
        # As many of them at once as can be.
        row: Row = {}
        for pair in missing:
            agrees = all(row.get(name, value) == value for name, value in pair.items())
            if agrees and left_out({**row, **pair}) is None:
                row.update(pair)
        rows.append(_completed(row))
        missing = [pair for pair in missing if not pair.items() <= row.items()]
    lines = [json.dumps(list(row.values())) for row in rows]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{len(rows)} rows")


def _completed(row: Row) -> Row:
    """Returns a row that has some features, and plain ones else."""
    for name, values in DIMENSIONS.items():
        if name not in row:
            row[name] = next(v for v in values if left_out({**row, name: v}) is None)
    return {name: row[name] for name in DIMENSIONS}


if __name__ == "__main__":
    write()
