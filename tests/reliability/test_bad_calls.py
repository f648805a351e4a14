"""Wrong calls, each with its error; afterwards the model is what it was, and trains.

`bad_calls.txt` has one a line: the call, the type of the error, how its message begins.
"""

import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

from . import calls

ROWS = (Path(__file__).parent / "bad_calls.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    # Messages have names that Keras numbers.
    keras.utils.clear_session()
    return calls.namespace(tmp_path_factory.mktemp("calls"))


def state_of(model):
    return [
        np.array(v) for v in [*model.get_weights(), *(o.numpy() for o in model.optimizer.variables)]
    ]


def check(names, row):
    """Makes a wrong call and returns what is not as it should be; `None`: nothing."""
    call, _, expected = row.rpartition(" -> ")
    model = names["M"]
    before, optimizer, loss = state_of(model), model.optimizer, model.loss
    try:
        with warnings.catch_warnings():
            # Of frames and files that the error leaves; what is said here is the error.
            warnings.simplefilter("ignore")
            eval(call, names)
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        found = "no error"
    if not found.startswith(expected):
        return f"{call}\n  expected: {expected}\n  found: {found}"
    if len(model.gradient_hooks) or not all(v.trainable for v in model.weights):
        return f"{call}: hooks or flags are left"
    if model.optimizer is not optimizer or model.loss != loss:
        return f"{call}: compiled otherwise"
    if not all(np.array_equal(a, b) for a, b in zip(before, state_of(model), strict=True)):
        return f"{call}: other weights"
    return None


def test_each_call_has_its_error(names):
    assert len(ROWS) >= 150
    faults = [fault for row in ROWS if (fault := check(names, row))]
    assert not faults, "\n".join(faults)
    # As a model does that nothing was done to.
    model, twin = names["M"], calls.namespace(names["T"])["M"]
    twin.set_weights(model.get_weights())
    for each in (model, twin):
        each.fit(calls.X, calls.Y, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Wrong calls after which eager code has run already.
LATE = [
    "step(hook(lambda s, g: s.report('loss', 1.0)))",
    "step(hook(lambda g: g, after_update=lambda s, b, v: 1 / 0))",
    "step(hook(lambda g: 1 / 0))",
]


@pytest.mark.parametrize("call", LATE)
def test_without_a_graph_too(tmp_path, call):
    names = calls.namespace(tmp_path)
    model = names["M"]
    model.compile("adam", "mse", run_eagerly=True)
    model.train_on_batch(calls.X, calls.Y)
    before = state_of(model)
    with pytest.raises((ValueError, ZeroDivisionError)):
        eval(call, names)
    assert all(np.array_equal(a, b) for a, b in zip(before, state_of(model), strict=True))


def test_a_blank_line_is_named(names):
    with pytest.raises(ValueError, match=r"line 2 of the file .*steps.csv' is no record of a step"):
        names["fit_with_csv"]("")
