"""No shape ends the process; `crashes.py` makes the steps in processes of their own."""

import pytest

from . import crashes

EVERYDAY = [
    # What oneDNN dies of: a product with one matrix for a batch of one.
    "large | examples in chunks",
    "no example | micro-batches",
    "embedding, no example | taps",
    "conv, dilation | examples",
    "rank 0 and 1 | conflicts",
    "einsum | sharpness",
]
# What is neither made nor refused by name, but an error of TensorFlow's: there is nothing to
# vectorize over, and no grouped convolution of float16 on a CPU.
RAW = {
    ("no times", "InvalidArgumentError"),
    ("conv, groups", "InvalidArgumentError"),
    ("embedding, no times", "InvalidArgumentError"),
    ("embedding, no example", "InvalidArgumentError"),
}


def check(found):
    for case, outcome in found.items():
        model, _, method = case.partition(" | ")
        if found[f"{model} | plain"] != "trained":
            # TensorFlow has no such layer: an error, and no more.
            assert outcome == "trained" or "Error" in outcome, (case, outcome)
        elif outcome != "trained":
            kind = outcome.partition(":")[0]
            assert kind == "ValueError" or (model, kind) in RAW, (case, outcome)


@pytest.mark.slow
def test_some_shapes():
    found = crashes.outcomes(EVERYDAY)
    assert found == dict.fromkeys(EVERYDAY, "trained")


@pytest.mark.slow
@pytest.mark.long
def test_all_shapes():
    found = crashes.outcomes(crashes.cases())
    assert len(found) == len(crashes.cases())
    check(found)
