"""`python -m keras_tapefit`: versions, devices and a short self-check, for bug reports.

It exits with status 1 when a check fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit import hooks
from keras_tapefit.models import TapeModel

_PACKAGES = ("tensorflow", "keras", "keras-tuner", "numpy", "tensorboard", "matplotlib", "pandas")
_VARIABLES = ("KERAS_BACKEND", "TF_USE_LEGACY_KERAS", "TF_CONFIG", "XLA_FLAGS", "TF_XLA_FLAGS")


def main() -> int:
    """Prints the description, then one line for each check; returns the exit status."""
    for name, value in _description():
        print(f"{name:14s} {value}")
    failed = 0
    for check in (_same_as_keras, _clips, _skips, _saves):
        try:
            fault = check()
        # Whatever a broken installation raises is part of the report.
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        failed += fault is not None
        words = check.__doc__ or ""
        print(f"{'check':14s} {words.rstrip('.')}: {'ok' if fault is None else f'FAILED, {fault}'}")
    return int(failed > 0)


def _description() -> list[tuple[str, str]]:
    lines = [
        ("keras-tapefit", f"{_version('keras-tapefit')}, {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        *((package, _version(package)) for package in _PACKAGES),
        ("backend", f"{keras.backend.backend()}, {keras.config.dtype_policy().name}"),
    ]
    for kind in ("CPU", "GPU", "TPU"):
        count = len(tf.config.list_physical_devices(kind))
        if count:
            lines.append((f"{kind} devices", str(count)))
    return lines + [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _data() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    return x, 10.0 + x.sum(axis=1, keepdims=True)


def _model(kind: Callable[..., Any], optimizer: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    model = kind(inputs, keras.layers.Dense(1)(hidden))
    model.compile(optimizer, "mse", **options)
    return model


def _same_as_keras() -> str | None:
    """Without hooks, the weights are those of keras.Model."""
    x, y = _data()
    models = [_model(kind, "adam") for kind in (keras.Model, TapeModel)]
    for model in models:
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    pairs = zip(*(model.get_weights() for model in models), strict=True)
    largest = max(float(np.abs(a - b).max()) for a, b in pairs)
    return None if largest == 0 else f"they differ by up to {largest:.3g}"


def _clips() -> str | None:
    """A clipped step has the length it was clipped to."""
    x, y = _data()
    clip = hooks.GlobalNormClipping(0.5)
    model = _model(TapeModel, keras.optimizers.SGD(1.0), gradient_hooks=[clip])
    before = model.get_weights()
    model.train_on_batch(x, y)
    changes = [a - b for a, b in zip(model.get_weights(), before, strict=True)]
    length = float(np.sqrt(sum(np.square(c.astype("float64")).sum() for c in changes)))
    return None if abs(length - 0.5) < 1e-5 else f"its length is {length:.6g}, not 0.5"


def _skips() -> str | None:
    """A step with NaN is skipped and leaves no trace."""
    x, y = _data()
    model = _model(TapeModel, "adam", gradient_hooks=[hooks.SkipNonFinite()])
    model.train_on_batch(x, y)
    before = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    model.train_on_batch(np.full_like(x, np.nan), y)
    after = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    return None if same else "weights or optimizer changed"


def _saves() -> str | None:
    """A saved model is loaded with its hooks."""
    x, y = _data()
    model = _model(TapeModel, "adam", gradient_hooks=[hooks.GlobalNormClipping(0.5)])
    model.train_on_batch(x, y)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
    if not np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0)):
        return "its predictions differ"
    names = [hook.name for hook in loaded.gradient_hooks]
    return None if names == ["global_norm_clipping"] else f"its hooks are {names}"


if __name__ == "__main__":
    sys.exit(main())
