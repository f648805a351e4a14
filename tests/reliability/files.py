"""How many damaged files gave which outcome, for `report.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.reliability import damage
from tests.reliability import test_files as tests


def run() -> list[dict[str, Any]]:
    """Loads three hundred files and returns one row a kind of damage."""
    model, other = tests.make(1), tests.make(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save(folder / "good.keras")
        model.save_weights(folder / "good.weights.h5")
        saved = folder, model, tests.state_of(model), other, tests.state_of(other)
        counts: dict[str, dict[str, int]] = {kind: {} for kind in damage.KINDS}
        for ending, number in tests.NUM_SEEDS.items():
            seeds = range(10, 10 + number)
            found = tests.try_all(saved, ending, tests.load_weights, damage.KINDS, seeds)
            for kind, outcomes in found.items():
                for outcome, count in outcomes.items():
                    counts[kind][outcome] = counts[kind].get(outcome, 0) + count
    names = {"error": "an error", "right": "the right load", "told": "loaded but for what is told"}
    return [
        {"damage": kind.replace("_", " "), **{names[o]: outcomes.get(o, 0) for o in names}}
        for kind, outcomes in counts.items()
    ]
