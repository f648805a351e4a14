"""One update as its hooks see it, kept per thread: each replica has a thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf


@dataclass
class Report:
    """A scalar on its way to the logs.

    Attributes:
        hook: what reports it; `None` for what is no hook's and counts in skipped steps.
        name: of the log entry.
        value: a scalar, this step's value.
        reduction: `"mean"` or `"sum"`.
        weight: what the value counts for in the epoch's mean.
    """

    hook: Any
    name: str
    value: tf.Tensor
    reduction: str
    weight: Any = 1.0


@dataclass
class Step:
    """What the hooks of one update read and leave behind.

    Attributes:
        index: scalar int64, the number of updates the optimizer has made.
        loss: scalar float32, the loss of the global batch, where a hook asks for it.
        parts: the mean square norm of the gradients of the parts of the global batch,
            scalar float32, and how many parts there are; where a hook asks for it.
        reports: the scalars reported, in order.
        rejections: scalar bools; any that is true skips the update.
        hook: the hook that is being applied.
    """

    index: tf.Tensor
    loss: tf.Tensor | None = None
    parts: tuple[tf.Tensor, int] | None = None
    reports: list[Report] = field(default_factory=list)
    rejections: list[tf.Tensor] = field(default_factory=list)
    hook: Any = None


class _Current(threading.local):
    step: Step | None = None


_current = _Current()


def current_step() -> Step | None:
    """Returns the step whose hooks run in this thread, if any do."""
    return _current.step


@contextlib.contextmanager
def running(step: Step) -> Iterator[Step]:
    """Makes `step` the current one of this thread."""
    outer, _current.step = _current.step, step
    try:
        yield step
    finally:
        _current.step = outer
