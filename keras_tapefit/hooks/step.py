"""One update as its hooks see it, kept per thread: each replica has a thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf


@dataclass
class LogEntry:
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


class Parts(NamedTuple):
    """How large the true gradients of the parts of the global batch are, and the whole.

    The mean of the gradients of `n` examples has `1/n` of the variance of one. For parts
    of unequal size `inverse` is the mean of their `1/n`, by what each part counts for.

    Attributes:
        square_norm: mean over the parts.
        inverse: `1/n` of a part.
        whole_square_norm: of the whole.
        whole_inverse: `1/n` of the whole.
    """

    square_norm: tf.Tensor
    inverse: tf.Tensor
    whole_square_norm: tf.Tensor
    whole_inverse: tf.Tensor


@dataclass
class Outputs:
    """The outputs of layers in a step, and the gradients that came back there.

    Attributes:
        passes: the `backward.taps.Taps` of each forward pass: one for each part of the
            batch.
        sum_over: sums a tensor over replicas.
        num_replicas: their number.
        replica: the number of this one, a scalar.
    """

    passes: list[Any]
    sum_over: Callable[[Any], Any]
    num_replicas: int = 1
    replica: Any = 0

    def of(self, hook: Any) -> Iterator[tuple[Any, Any]]:
        """Yields each `Tap` that a hook looks at, with its `Taps`."""
        for taps in self.passes:
            for tap in taps.taps:
                if any(watcher is hook for watcher in tap.watchers):
                    yield tap, taps


@dataclass
class Step:
    """The record of one update that its hooks read and write.

    Attributes:
        index: scalar int64, the number of updates the optimizer has made.
        loss: scalar float32, the loss of the global batch, where a hook asks for it.
        parts: how large the gradients of the parts of the global batch are; where a
            hook asks for it and there are any.
        entries: the scalars reported, in order.
        rejections: scalar bools; any that is true skips the update.
        hook: the hook that is being applied.
        num_given: the number of variables whose gradients or values it was given.
    """

    index: tf.Tensor
    loss: tf.Tensor | None = None
    parts: Parts | None = None
    entries: list[LogEntry] = field(default_factory=list)
    rejections: list[tf.Tensor] = field(default_factory=list)
    hook: Any = None
    num_given: int | None = None


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
