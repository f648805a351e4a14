"""Searches of KerasTuner that are killed and started again; `search.py` does it more often."""

import pytest

from . import kills, search

MOMENTS = [(3, 0.1), (8, 0.05)]


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["RandomSearch", "Hyperband"])
def test_killed_for_real(tmp_path, tuner):
    """Each trial is there with its score, if it is for a plain model."""
    differ = {}
    for kind in ("plain", "tape", "reuse"):
        work = search.searching(kind, tuner)
        whole, killed = tmp_path / kind / "whole", tmp_path / kind / "killed"
        whole.parent.mkdir()
        kills.whole(work, whole)
        assert kills.killed(work, killed, MOMENTS) == 2
        differ[kind] = search.differences(search.result(whole), search.result(killed))
        trials = search.trials(search.result(killed))
        assert {trial["status"] for trial in trials} == {"COMPLETED"}, trials
        assert len(trials) == len(search.trials(search.result(whole)))
    assert set(differ["tape"]) <= set(differ["plain"])
    assert set(differ["reuse"]) <= set(differ["plain"])
