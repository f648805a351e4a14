"""Keras's own tests, run with our classes in the place of Keras's."""

import pytest

from .left_out import LEFT_OUT
from .run import compare, run


@pytest.mark.slow
def test_what_passes_with_keras_passes_with_ours():
    stock, swapped = run("tapefit", "", fresh=False)
    failures, mistakes = compare(stock, swapped, LEFT_OUT)
    # Keras has tests that wait for threads and clocks: what fails has a second chance.
    for name in list(failures):
        again, _ = compare(*run("tapefit", name, fresh=True), LEFT_OUT)
        if name not in again:
            del failures[name]
    assert not failures, "\n".join(f"{name}: {reason}" for name, reason in failures.items())
    assert not mistakes, "\n".join(f"{name}: {reason}" for name, reason in mistakes.items())
    passed = sum(result["outcome"] == "passed" for result in stock.values())
    assert passed > 1000, f"Only {passed} of Keras's tests passed with Keras's own classes."


def test_the_comparison_can_fail():
    good, bad = {"outcome": "passed", "reason": ""}, {"outcome": "failed", "reason": "why"}
    failures, mistakes = compare({"a": good, "b": good}, {"a": bad}, {})
    assert failures == {"a": "why", "b": "did not run"} and not mistakes
    failures, mistakes = compare({"a": good, "b": bad}, {"a": good, "b": bad}, {"a": "", "c": ""})
    assert not failures and list(mistakes) == ["a", "c"]
