"""How far each row of the array is from the reference, and the table that says so.

python -m tests.reference.table                 # every pair, into docs/equivalence.md
python -m tests.reference.table --strength 3    # every triple, printed; needs allpairspy
"""

from __future__ import annotations

import argparse
import gc
import itertools
import pathlib
import re
import tempfile
import warnings
from typing import Any

import numpy as np

from . import array, features
from .features import Row

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "equivalence.md"
BEGIN, END = "<!-- pairs: begin -->", "<!-- pairs: end -->"


def tolerance(row: Row) -> float:
    """Returns how far weights may be off, relative to their length."""
    if row["dtype"] == "mixed_float16":
        return 3e-3
    # Newton-Schulz iterations make more of a rounding error.
    return 1e-5 if row["optimizer"] == "Muon" else 1e-6


def compare(row: Row, folder: pathlib.Path) -> dict[str, float]:
    """Trains a row and its reference.

    Returns:
        How far they are apart, of what is compared, in tolerances.

    Raises:
        ValueError: when the library refuses the row.
    """
    given = features.start(row)
    right = features.expected(row, given)
    found = features.found(row, folder, given)
    allowed = tolerance(row)
    names = sorted(right.weights)
    assert sorted(found.weights) == names
    distances = {
        "weights": _distance([found.weights[n] for n in names], [right.weights[n] for n in names])
        / allowed,
        "updates": 0.0 if found.updates == max(right.updates) else np.inf,
    }
    # Of float32 sums, as logs and records are.
    allowed *= 10
    if found.logs:
        wrong = {"loss"} - found.logs.keys() | found.logs.keys() - right.logs.keys()
        if row["optimizer"] == "loss scale" or row["dtype"] == "mixed_float16":
            wrong -= {"skipped_steps"}
        if wrong:
            raise AssertionError(f"Log entries that one has and the other has not: {wrong}")
        for name, values in found.logs.items():
            distances[f"log {name}"] = _distance([values], [right.logs[name]]) / allowed
            if name.endswith("_loss"):
                other = _distance([values], [right.by_updates[name]]) / allowed
                distances[f"log {name}"] = min(distances[f"log {name}"], other)
    if found.records:
        distances.update(_records(found.records, right.records, allowed))
    return distances


def _records(found: dict[str, np.ndarray], right: list[dict[str, float]], allowed: float) -> Any:
    if len(found["loss"]) != len(right):
        return {"records": np.inf}
    taken = np.array([not r["skipped"] for r in right])
    distances = {
        "record skipped": 0.0 if (found["skipped"] == ~taken).all() else np.inf,
    }
    for name in ("loss", "gradient_norm"):
        values = np.array([r[name] for r in right])
        distances[f"record {name}"] = _distance([found[name][taken]], [values[taken]]) / allowed
    after = np.array([r["after"] for r in right])
    both = np.isfinite(after) & np.isfinite(found["gradient_norm_after"]) & taken
    distances["record gradient_norm_after"] = (
        _distance([found["gradient_norm_after"][both]], [after[both]]) / allowed
    )
    return distances


def _distance(found: Any, right: Any) -> float:
    ours, theirs = (
        np.concatenate([np.ravel(np.asarray(v, "float64")) for v in values])
        for values in (found, right)
    )
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return np.inf
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))


def measure(rows: list[Row]) -> list[tuple[Row, str | dict[str, float]]]:
    """Returns each row with its distances, or with the words in which it is refused.

    A row that fails is infinitely far off, and is printed with its error.
    """
    results: list[tuple[Row, str | dict[str, float]]] = []
    for number, row in enumerate(rows):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcome: str | dict[str, float] = compare(row, pathlib.Path(folder))
            except Exception as error:
                is_refusal = isinstance(error, ValueError) and any(
                    re.search(match, str(error)) for match in array.refused(row)
                )
                outcome = str(error) if is_refusal else {"weights": np.inf}
                if not is_refusal:
                    print(f"{type(error).__name__}: {str(error)[:2000]}", flush=True)
        if isinstance(outcome, dict) and max(outcome.values()) >= 1.0:
            print({name: float(v) for name, v in outcome.items() if not v < 1.0}, flush=True)
        worst = "refused" if isinstance(outcome, str) else f"{max(outcome.values()):.2f}"
        print(f"{number + 1}/{len(rows)} {array.identity(row)}: {worst}", flush=True)
        results.append((row, outcome))
    return results


def lines(results: list[tuple[Row, str | dict[str, float]]]) -> list[str]:
    """Returns the table: of each dimension's values, the pairs with others."""
    text = [
        "| feature | pairs tried | equal | refused | worst distance of weights |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in features.DIMENSIONS.items():
        for value in values:
            tried, equal, no, worst = set(), set(), set(), 0.0
            for row, outcome in results:
                if row[name] != value:
                    continue
                pairs = {(n, v) for n, v in row.items() if n != name}
                tried |= pairs
                if isinstance(outcome, str):
                    no |= {
                        p for p in pairs if array.refused({**_plain(), name: value, **dict([p])})
                    }
                elif max(outcome.values()) < 1.0:
                    equal |= pairs
                    if row["dtype"] != "mixed_float16":
                        worst = max(worst, outcome["weights"] * tolerance(row))
            text.append(
                f"| {name}: {value} | {len(tried)} | {len(equal)} | {len(no)} | {worst:.0e} |"
            )
    return text


def _plain() -> Row:
    return {name: values[0] for name, values in features.DIMENSIONS.items()}


def page(results: list[tuple[Row, str | dict[str, float]]]) -> str:
    """Returns the part of the page that is between the markers."""
    equal = sum(not isinstance(o, str) and max(o.values()) < 1.0 for _, o in results)
    refused = sum(isinstance(o, str) for _, o in results)
    tried = sum(1 for _ in array.combinations(2))
    return "\n".join(
        [
            BEGIN,
            "<!-- Written by `python -m tests.reference.table`. Do not edit. -->",
            "",
            f"{len(results)} trainings have all {tried} pairs of the features below: {equal} "
            f"are equal to a slow reference in float64 (`tests/reference/reference.py`), and "
            f"{refused} are refused. A distance is that of the trained weights, relative to "
            "their length; those of `mixed_float16`, up to 3e-3, are not in the table. Logs, "
            "records and the number of updates are compared too.",
            "",
            *lines(results),
            "",
            "Refused, each with an error that names both features:",
            "",
            *(
                f"- {', '.join(sorted(x))} with {', '.join(sorted(y))}: {reason}."
                for _, x, _, y, _, reason in array.REFUSED
            ),
            "",
            "Not tried, because one of the two has no meaning together with the other:",
            "",
            *(
                f"- {', '.join(sorted(x))} with {', '.join(sorted(y))}: {reason}."
                for _, x, _, y, reason in array.LEFT_OUT
            ),
            END,
        ]
    )


def main() -> None:
    """Measures, and writes the table or prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strength", type=int, default=2, help="of the array: 2 or more")
    parser.add_argument("--rows", type=int, default=None, help="no more than these many rows")
    arguments = parser.parse_args()
    rows = array.pairs() if arguments.strength == 2 else array.cover(arguments.strength)
    results = measure(list(itertools.islice(rows, arguments.rows)))
    text = page(results)
    wrong = sum(not isinstance(o, str) and not max(o.values()) < 1.0 for _, o in results)
    if wrong:
        raise SystemExit(f"{wrong} of {len(results)} trainings are not equal to the reference.")
    if arguments.strength > 2 or arguments.rows is not None:
        print(text)
        return
    old = DOCS.read_text()
    if BEGIN not in old:
        old = f"{old.rstrip()}\n\n## Every pair of features\n\n{BEGIN}\n{END}\n"
    before, rest = old.split(BEGIN)
    DOCS.write_text(before + text + rest.split(END)[1])


if __name__ == "__main__":
    # Collected at any place, an iterator over a generator that was not run to its end may
    # wait forever in TensorFlow 2.21: its destructor has the lock that its thread needs.
    gc.disable()
    # Several CPU devices, as in the tests.
    from tests import conftest  # noqa: F401

    main()
