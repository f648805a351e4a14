"""Searches of KerasTuner that are killed at random moments; see `report.py`."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from tests.reliability import kills, search_job

NAMES = {"plain": "plain `HyperModel`", "tape": "`TapeHyperModel`", "reuse": "`reuse=True`"}


def searching(kind: str, tuner: str) -> kills.Work:
    """A search of `search_job`."""
    return kills.Work(search_job.search, (kind, tuner), "epochs.txt")


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def trials(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial for name, trial in found.items() if name != "best"]


def differences(whole: dict[str, Any], killed: dict[str, Any]) -> list[str]:
    """Returns what of two searches is not the same, scores to the bit."""
    found = [f"trial {name}: only in one" for name in sorted(whole.keys() ^ killed.keys())]
    for name in sorted(whole.keys() & killed.keys()):
        for key in whole[name]:
            if whole[name][key] != killed[name][key]:
                found.append(f"trial {name}: {key}")
    return found


def run(num_kills: int = 18) -> list[dict[str, Any]]:
    """Kills searches of all kinds, and returns one row a kind and tuner."""
    kills.forks = True
    draw = random.Random(0)
    each = -(-num_kills // (len(search_job.KINDS) * len(search_job.TUNERS)))
    found = []
    for tuner in search_job.TUNERS:
        # The same moments for all kinds.
        last = search_job.NUM_EPOCHS
        moments = [(draw.randrange(last), draw.uniform(0, 0.4)) for _ in range(each)]
        for kind in search_job.KINDS:
            with tempfile.TemporaryDirectory() as folder:
                a, b = Path(folder) / "whole", Path(folder) / "killed"
                kills.whole(searching(kind, tuner), a)
                count = kills.killed(searching(kind, tuner), b, moments)
                whole, killed = result(a), result(b)
            statuses = [trial["status"] for trial in trials(killed)]
            row = {
                "tuner": tuner,
                "model": NAMES[kind],
                "kills": count,
                "trials": len(statuses),
                "completed": statuses.count("COMPLETED"),
                "what differs": differences(whole, killed),
            }
            print(row, flush=True)
            found.append(row)
    return found
