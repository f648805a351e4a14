"""Files of weights: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import h5py
import numpy as np
import tensorflow as tf

# What is in a file besides the state of a model. The seal is an attribute: all values are
# those that Keras would write.
SEAL, PROGRESS = "tapefit_checksums", "progress"


def seal(store: Any) -> None:
    """Adds the checksums of all that a file holds so far; Keras may add more to it later.

    HDF5 has none: a flipped bit would be a weight like any other. A file in several pieces
    has no seal, nor has one with more arrays than an attribute has room for.

    Args:
        store: what Keras gives `save_own_variables`.
    """
    if _is_one_file(store):
        checksums = _checksums(store.h5_file)
        if 0 < len(checksums) <= 15_000:
            store.h5_file.attrs[SEAL] = checksums


def check_seal(store: Any) -> None:
    """Compares a file with its checksums, if it has any.

    Raises:
        ValueError: when something in it is not what was written.
    """
    if _is_one_file(store):
        _check_seal(store.h5_file)


def check_file(path: str) -> tuple[int, ...] | None:
    """Compares a file of weights with its checksums, if it has any.

    Returns:
        The progress of the training that wrote it; see `Clock.progress`. `None` where it
        does not say.

    Raises:
        OSError, ValueError, RuntimeError: when it cannot be read, or is damaged.
    """
    with h5py.File(path) as file:
        _check_seal(file)
        state = file.get("_tapefit_state/vars", {})
        place = f"{PROGRESS}.place"
        return tuple(int(n) for n in state[place]) if place in state else None


def _check_seal(file: Any) -> None:
    expected = file.attrs.get(SEAL)
    if expected is not None and not np.isin(expected, _checksums(file)).all():
        raise ValueError(
            "The file is damaged: its values are not those that were saved. Load another copy "
            f"of it. Received: {file.filename}, with other checksums."
        )


def _is_one_file(store: Any) -> bool:
    return type(store).__name__ == "H5IOStore"


def _checksums(file: Any) -> np.ndarray:
    """Returns a number for each array of a file: of its name, its shape and its values."""
    found: list[int] = []

    def visit(name: str, item: Any) -> None:
        if hasattr(item, "dtype"):
            head = zlib.crc32(f"{name} {item.shape} {item.dtype}".encode())
            found.append(zlib.crc32(np.ascontiguousarray(item[()]).tobytes(), head))

    file.visititems(visit)
    return np.array(found, "uint32")


@contextlib.contextmanager
def written_whole(path: Any, overwrite: bool) -> Iterator[Any]:
    """Yields where to write a file, which takes the place of the old one at the end.

    A process that is killed in between leaves the old one as it was.

    Args:
        path: of the file.
        overwrite: whether an old one may be replaced without a question.
    """
    target = os.path.realpath(path) if isinstance(path, str | os.PathLike) else ""
    folder, name = os.path.split(target)
    local = str(path).endswith((".keras", ".h5")) and os.path.isdir(folder)
    if not local or os.path.isdir(target) or (os.path.exists(target) and not overwrite):
        yield path
        return
    unfinished = os.path.join(folder, f".unfinished-{name}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)


@contextlib.contextmanager
def unchanged_on_error(runtime: Any) -> Iterator[None]:
    """Puts back all that a model holds where what is done here raises an error.

    Args:
        runtime: the private side of the model.
    """
    state = runtime.state
    kept = {id(copy): (copy, tf.identity(copy)) for copy in _held(runtime)}
    pending, awaited = dict(state.pending), set(state.awaited)
    loaded = [(o, o.__dict__.get("_tapefit_loaded")) for o in runtime.optimizers()]
    try:
        yield
    except BaseException:
        for copy, before in kept.values():
            copy.assign(before)
        for copy in _copies(v for _, w in runtime.windows.named() for v in w.variables.values()):
            if id(copy) not in kept:
                # Room that was made for what is not there.
                copy.assign(tf.zeros_like(copy))
        state.pending, state.awaited = pending, awaited
        for optimizer, before in loaded:
            optimizer.__dict__.pop("_tapefit_loaded", None)
            if before is not None:
                optimizer.__dict__["_tapefit_loaded"] = before
        raise


def _held(runtime: Any) -> list[Any]:
    """Returns the variables of a model, each replica's copy separately."""
    model = runtime.model
    found = [*model.variables, *model.metrics_variables, *runtime.state.variables().values()]
    for optimizer in runtime.optimizers():
        found += optimizer.variables
    return _copies(found)


def _copies(variables: Iterable[Any]) -> list[Any]:
    values = (v if isinstance(v, tf.Variable) else v.value for v in variables)
    copies = [copy for value in values for copy in getattr(value, "values", [value])]
    return list({id(copy): copy for copy in copies}.values())
