"""Collections of garbage that pass over what was there before a search.

KerasTuner collects garbage twice before each trial. A collection looks at every object of
the process, with TensorFlow loaded at half a million of them, and takes longer than much
of a small trial. What was there before the search is therefore set aside with `gc.freeze`
while the search runs. It is put back by the first full collection after it, which then
looks at everything. Memory without reference cycles is freed as always.

`sys._current_frames` tells whether a search runs, in any thread.
"""

from __future__ import annotations

import gc
import sys
import types

import keras_tuner

_SEARCH = keras_tuner.Tuner.search.__code__
_is_set_aside = False


def set_aside() -> None:
    """Makes collections skip all objects that exist now, until no search runs.

    Does nothing outside a search, or where somebody else has set things aside.
    """
    global _is_set_aside
    if _is_set_aside or not _a_search_runs() or gc.get_freeze_count() > len(gc.get_objects()):
        return
    if _put_back not in gc.callbacks:
        gc.callbacks.append(_put_back)
    _is_set_aside = True
    gc.freeze()


def _put_back(phase: str, info: dict[str, int]) -> None:
    """Called by every collection before it begins and when it is done; see `gc.callbacks`."""
    global _is_set_aside
    if phase == "start" and info["generation"] == 2 and _is_set_aside and not _a_search_runs():
        _is_set_aside = False
        gc.unfreeze()


def _a_search_runs() -> bool:
    return any(_is_in_search(frame) for frame in sys._current_frames().values())


def _is_in_search(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is _SEARCH:
            return True
        frame = frame.f_back
    return False
