"""The first execution of a model by a trace of another, compared with one made afresh."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.gradients import layers_of
from keras_tapefit.tuning.fingerprint import Fingerprint

_lock = threading.RLock()


class Check:
    """Makes an execution twice on the same batches, by a trace and eagerly.

    Everything that the model keeps in variables is put back in between, bit for bit.

    Args:
        model: the model.
        fingerprint: of the model, which knows its variables.
        iterator: gives the batches, which are taken from it once.
        noise: how far rounding alone was seen to carry a variable or log entry, by name;
            added to.

    Raises:
        StopIteration: when there is no batch.
    """

    def __init__(
        self, model: Any, fingerprint: Fingerprint, iterator: Any, noise: dict[str, float]
    ) -> None:
        self._variables = fingerprint.variables
        self._names = fingerprint.names
        self._noise = noise
        self._spec = iterator.element_spec
        self._batches = []
        for _ in range(model.steps_per_execution):
            try:
                self._batches.append(next(iterator))
            except StopIteration:
                break
        if not self._batches:
            raise StopIteration
        self._before = [tf.identity(v) for v in self._variables]
        dtypes = {keras.backend.standardize_dtype(v.compute_dtype) for v in layers_of(model)}
        self._epsilon = max(
            (float(tf.experimental.numpy.finfo(d).eps) for d in dtypes if "float" in d),
            default=1e-7,
        )

    def iterator(self) -> Any:
        """Returns a new iterator over the batches."""
        datasets = [tf.data.Dataset.from_tensors(batch) for batch in self._batches]
        joint = datasets[0]
        for dataset in datasets[1:]:
            joint = joint.concatenate(dataset)
        variant = tf.data.experimental.to_variant(joint)
        return iter(tf.data.experimental.from_variant(variant, self._spec))

    def compare(self, lent: Callable[[Any], Any], afresh: Callable[[Any], Any]) -> str | None:
        """Makes the execution twice; the state is afterwards what it was before.

        Args:
            lent: a function of an iterator, by a trace of another model.
            afresh: one of the model's own, which runs where functions are not traced.

        Returns:
            `None`, or the first difference.
        """
        try:
            expected = self._run(afresh, eagerly=True)
            found = self._run(lent)
            if self._difference(expected, found) is None:
                return None
            self._measure_noise(expected, afresh)
            return self._difference(expected, found)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self._restore()

    def _run(self, function: Callable[[Any], Any], eagerly: bool = False) -> Any:
        """Returns by name what logs and variables become, and what they were before."""
        self._restore()
        if not eagerly:
            return self._outcome(function(self.iterator()))
        with _eagerly():
            return self._outcome(function(self._batches))

    def _restore(self) -> None:
        for variable, value in zip(self._variables, self._before, strict=True):
            variable.assign(value)

    def _outcome(self, logs: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        flat = logs if isinstance(logs, dict) else {"": logs}
        found = {
            f"the log entry {name!r}": (np.asarray(value), np.zeros((), "float32"))
            for name, value in flat.items()
            if value is not None
        }
        for i, (variable, before) in enumerate(zip(self._variables, self._before, strict=True)):
            name = f"the variable {self._names[i]!r}"
            found[f"{name} ({i})" if name in found else name] = (variable.numpy(), before.numpy())
        return found

    def _difference(self, expected: Any, found: Any) -> str | None:
        if list(expected) != list(found):
            return f"the log entries are {list(found)[:9]}, not {list(expected)[:9]}"
        for name, (value, before) in expected.items():
            other = found[name][0]
            if value.dtype.kind not in "fV" or np.array_equal(value, other, equal_nan=True):
                if not np.array_equal(value, other):
                    if value.dtype.kind != "f":
                        return f"after the first step {name} is {_short(other)}, not {_short(value)}"
                continue
            value, before, other = (np.asarray(v, "float64") for v in (value, before, other))
            change = _largest(value - before)
            allowed = 100 * self._epsilon * change + 1e-6 * _largest(before)
            allowed += 16 * self._noise.get(name, 0.0) * change
            if not np.array_equal(np.isfinite(value), np.isfinite(other)) or (
                _largest(value - other) > allowed
            ):
                return f"after the first step {name} is {_short(other)}, not {_short(value)}"
        return None

    def _measure_noise(self, expected: Any, afresh: Callable[[Any], Any]) -> None:
        """Finds out what rounding may do: starts again with weights a little different."""
        draws = np.random.default_rng(0)
        self._restore()
        begun = {}
        for i, (variable, before) in enumerate(zip(self._variables, self._before, strict=True)):
            if variable.dtype.is_floating and variable.trainable:
                signs = draws.choice([-1.0, 1.0], size=tuple(variable.shape))
                variable.assign(before * tf.cast(1.0 + 8 * self._epsilon * signs, before.dtype))
            begun[i] = variable.numpy()
        with _eagerly():
            outcome = self._outcome(afresh(self._batches))
        num_logs = len(outcome) - len(begun)
        for place, (name, (value, before)) in enumerate(expected.items()):
            if value.dtype.kind not in "fV" or name not in outcome:
                continue
            start = begun[place - num_logs] if place >= num_logs else before
            value, before, start, other = (
                np.asarray(v, "float64") for v in (value, before, start, outcome[name][0])
            )
            change = _largest(value - before)
            if change:
                noise = _largest((value - before) - (other - start)) / change
                self._noise[name] = max(noise, self._noise.get(name, 0.0))


@contextmanager
def _eagerly() -> Iterator[None]:
    with _lock:
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(False)


def _largest(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


def _short(value: Any) -> str:
    return f"{np.asarray(value, 'float64').ravel()[:3]}" if np.size(value) > 1 else f"{value}"
