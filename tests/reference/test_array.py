"""Every pair of features, against the reference."""

import itertools
import re

import numpy as np
import pytest

from . import array, features
from .table import compare

ROWS = array.pairs()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=array.identity)
def test_a_row(row, tmp_path):
    """Weights, logs, records and the number of updates are right, or the row is refused."""
    try:
        distances = compare(row, tmp_path)
    except ValueError as error:
        reasons = array.refused(row)
        if not any(re.search(match, str(error)) for match in reasons):
            raise
        return
    assert max(distances.values()) < 1.0, distances


def test_all_pairs_are_there():
    there = {c for row in ROWS for c in itertools.combinations(row.items(), 2)}
    assert [c for c in array.combinations(2) if c not in there] == []
    assert [row for row in ROWS if array.left_out(row)] == []


def test_the_reference_sees_what_is_left_out():
    """Each feature changes what is right: else a row that ignores it would pass."""
    plain = dict(array.pairs()[0])
    plain.update(
        dict.fromkeys(["weights", "hook", "freezing", "break"], "none"),
        model="functional",
        loss="mean",
        data="even",
        optimizer="SGD",
        mode="graph",
        parts="whole",
        dtype="float32",
    )
    given = features.start(plain)
    before = features.expected(plain, given)
    changes = {
        "weights": ["sample", "class"],
        "parts": ["accumulated", "leftovers"],
        "hook": [
            "function",
            "global norm",
            "norm",
            "percentile",
            "centralization",
            "gate",
            "learning rate",
            "sharpness",
        ],
        "freezing": ["layer", "variable", "alternating", "scheduled"],
        "loss": ["sum", "masked", "add_loss", "regularizer"],
        "data": ["uneven", "one left over"],
        "optimizer": ["Adam", "AdamW EMA", "RMSprop", "Muon", "MultiOptimizer", "schedule"],
    }
    for name, values in changes.items():
        for value in values:
            after = features.expected({**plain, name: value}, given)
            far = max(np.abs(after.weights[k] - before.weights[k]).max() for k in given)
            assert far > 1e-3, (name, value, far)
