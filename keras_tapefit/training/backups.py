"""The backups of `BackupAndRestore`, checked when `fit` begins.

Private names used here: `BackupAndRestore._weights_path`, `_training_metadata_path`,
`_prev_weights_path` and `_prev_training_metadata_path`. Checked with Keras 3.15.1;
`tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from typing import Any

import keras

from keras_tapefit.training import files


def check(callbacks: Any) -> bool:
    """Looks at the backups that callbacks will restore from.

    Where the newest is broken, as by a process that was killed while it wrote, the one
    before takes its place, with a warning.

    Args:
        callbacks: of `fit`.

    Returns:
        Whether there is a `BackupAndRestore` among them.

    Raises:
        ValueError: when a backup is broken and there is none before it.
    """
    listed = getattr(callbacks, "callbacks", callbacks)
    found = [c for c in listed if isinstance(c, keras.callbacks.BackupAndRestore)]
    for callback in found:
        _check(callback)
    return bool(found)


def _check(callback: Any) -> None:
    newest = str(callback._weights_path), str(callback._training_metadata_path)
    before = str(callback._prev_weights_path), str(callback._prev_training_metadata_path)
    problem = _problem(*newest)
    if problem is None:
        _complete(*newest)
        return
    if os.path.exists(before[0]) and _problem(*before) is None:
        warnings.warn(
            f"The backup in {callback.backup_dir!r} is broken: {problem}. Training continues "
            "from the one before.",
            stacklevel=5,
        )
        for source, target in zip(before, newest, strict=True):
            if os.path.exists(source):
                shutil.copy(source, target)
            elif os.path.exists(target):
                os.remove(target)
        return
    raise ValueError(
        f"The backup in {callback.backup_dir!r} is broken: {problem}. There is none before it. "
        "Delete the folder to begin from the start, or load another file and pass "
        "`initial_epoch`. `BackupAndRestore(..., double_checkpoint=True)` keeps one more."
    )


def _problem(weights: str, metadata: str) -> str | None:
    """Returns what is wrong with a backup; `None`: nothing, or there is none."""
    if "://" in weights:
        return None
    if not os.path.exists(weights):
        return f"{metadata} is there and {weights} is not" if os.path.exists(metadata) else None
    try:
        progress = files.check_file(weights)
    except Exception as error:  # what h5py raises depends on where the file ends
        return f"{weights} cannot be read ({error})"
    return None if progress is not None else _problem_of_metadata(metadata)


def _complete(weights: str, metadata: str) -> None:
    """Writes the metadata again that a killed process had no time for."""
    if "://" in weights or not os.path.exists(weights) or _problem_of_metadata(metadata) is None:
        return
    progress = files.check_file(weights)
    if progress is not None:
        with open(metadata, "w", encoding="utf-8") as file:
            json.dump({"epoch": progress[0], "batch": progress[1]}, file)


def _problem_of_metadata(metadata: str) -> str | None:
    try:
        with open(metadata, encoding="utf-8") as file:
            int(json.load(file)["epoch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{metadata} cannot be read ({error})"
    return None
