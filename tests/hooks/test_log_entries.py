"""Log entries: their names, and that they go with their hooks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import hooks
from keras_tapefit.hooks.log_entries import LogEntries
from keras_tapefit.hooks.step import LogEntry


class Says(hooks.GradientHook):
    def __init__(self, entry, value=1.0, targets=None, name=None):
        super().__init__(targets=targets, name=name)
        self.entry = entry
        self.value = value

    def apply(self, gradients):
        self.report(self.entry, self.value)
        return gradients


def _report(hook, entry, value, reduction="mean"):
    return LogEntry(hook, entry, tf.constant(value), reduction)


def test_the_models_own_entries_are_taken():
    reports, hook = LogEntries(4), Says("loss", name="mine")
    with pytest.raises(
        ValueError, match="hook 'mine' reports 'loss', which is a log entry of the mod"
    ):
        reports.add([_report(hook, "loss", 1.0)], None, taken={"loss", "accuracy"})
    assert reports.names([hook]) == []
    reports.add([_report(hook, "size", 1.0)], None, taken={"loss"})
    assert reports.names([hook]) == ["size"]


def test_two_hooks_do_not_share_an_entry():
    a, b = Says("x"), Says("x")
    with pytest.raises(ValueError, match="Two hooks report 'x'. Give one of them a `name`"):
        LogEntries(4).add([_report(a, "x", 1.0), _report(b, "x", 1.0)], None)


def test_entries_go_with_their_hooks():
    reports, stays = LogEntries(3), Says("stays")
    for i in range(10):
        passing = Says(f"passing_{i}")
        reports.reset()
        reports.add([_report(stays, "stays", 2.0), _report(passing, f"p{i}", float(i))], None)
        results = reports.results(reports.names([stays, passing]))
        assert float(results["stays"]) == 2.0 and float(results[f"p{i}"]) == i
        reports.keep([stays])
        assert reports.names([stays, passing]) == ["stays"]
    with pytest.raises(ValueError, match="room for 3 log entries. The entry 'c' of hook 'says'"):
        reports.add([_report(stays, name, 0.0) for name in "abcd"], None)


def test_what_is_no_hooks_stays():
    reports = LogEntries(2)
    reports.add([LogEntry(None, "skipped_steps", tf.constant(1.0), "sum")], tf.constant(False))
    reports.reset()
    reports.keep([None])
    assert reports.names([None]) == ["skipped_steps"]


@pytest.mark.parametrize(
    ("entry", "value", "error", "text"),
    [
        ("norms", [1.0, 2.0], ValueError, r"'norms' of hook 'says' must be a scalar. .*\(2,\)"),
        (3, 1.0, TypeError, "must be a string. Received: name=3"),
        ("", 1.0, TypeError, "must be a string. Received: name=''"),
    ],
)
def test_what_is_no_entry(line, entry, value, error, text):
    line.gradient_hooks = [Says(entry, value)]
    with pytest.raises(error, match=text):
        line.train_on_batch(np.ones((1, 2)), np.ones((1, 1)))


def test_one_entry_of_hooks_that_follow_each_other(line):
    x, y = np.ones((1, 2)), np.ones((1, 1))
    for value in (1.0, 2.0):
        line.gradient_hooks = [Says("size", value)]
        keras.utils.clear_session()
        assert line.fit(x, y, verbose=0).history["size"] == [value]
