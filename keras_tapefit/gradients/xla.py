"""Whether the code that runs is traced for XLA, which some of it has to know."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Mode(threading.local):
    on = False


_mode = _Mode()


@contextlib.contextmanager
def in_xla(when: bool = True) -> Iterator[None]:
    """Has code traced as suits a program that XLA compiles: few branches, none for a gate.

    In a branch, XLA on CPUs has reads after an update give what was before it (TensorFlow
    2.21, RMSprop with momentum and a hook that reads the weights).
    """
    before, _mode.on = _mode.on, when or _mode.on
    try:
        yield
    finally:
        _mode.on = before


def is_in_xla() -> bool:
    """Whether this code is inside `in_xla`."""
    return _mode.on
