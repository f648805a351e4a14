"""The first step of a model by a trace of another, compared with one made afresh."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tapefit.gradients import layers_of
from keras_tapefit.training.keras_trainer import Fetched
from keras_tapefit.tuning.fingerprint import Fingerprint

Outcome = dict[str, tuple[np.ndarray, np.ndarray]]
_lock = threading.RLock()


class Check:
    """Makes a step twice on the same batch, by a trace and eagerly.

    Everything that the model keeps in variables is put back afterwards, bit for bit.

    Args:
        model: the model.
        fingerprint: of the model, which knows its variables.
        noise: by name, how far rounding alone was seen to carry a variable or log entry,
            as a part of its change; added to.
    """

    def __init__(self, model: Any, fingerprint: Fingerprint, noise: dict[str, float]) -> None:
        self._variables = fingerprint.variables
        self._names = fingerprint.names
        self._noise = noise
        self._num_batches = model.steps_per_execution
        self._batches: list[Any] = []
        self._spec: Any = None
        self._before = [tf.identity(v) for v in self._variables]
        dtypes = [tf.as_dtype(layer.compute_dtype) for layer in layers_of(model)]
        self._epsilon = max([_epsilon(d) for d in dtypes if d.is_floating], default=1e-7)

    def take_batches(self, iterator: Any) -> None:
        """Takes the batches of the execution, once.

        Raises:
            StopIteration: when there is none.
        """
        self._spec = None if isinstance(iterator, Fetched) else iterator.element_spec
        self._batches = list(itertools.islice(iter(iterator), self._num_batches))
        if not self._batches:
            raise StopIteration

    def iterator(self) -> Any:
        """Returns a new iterator over the batches of the execution."""
        try:
            return self._over(self._batches)
        except Exception:
            # Of a kind that a dataset cannot hold; Keras takes any iterator.
            return iter(self._batches)

    def compare(self, lent: Callable[[Any], Any], afresh: Callable[[Any], Any]) -> str | None:
        """Makes the step twice; the state is afterwards what it was before.

        Args:
            lent: a function of an iterator, by a trace of another model.
            afresh: one of the model's own, which runs where functions are not traced.

        Returns:
            `None`, or the first difference.
        """
        try:
            expected = self._eager_step(afresh)
            found = self._outcome(lent(self._over(self._batches[:1])))
            if self._difference(expected, found) is None:
                return None
            self._measure_noise(expected, afresh)
            return self._difference(expected, found)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self._restore()

    def _over(self, batches: list[Any]) -> Any:
        if self._spec is None:
            return iter(batches)
        joint, *datasets = [tf.data.Dataset.from_tensors(batch) for batch in batches]
        for dataset in datasets:
            joint = joint.concatenate(dataset)
        # With the shapes that the function was traced for, as far as they were known.
        variant = tf.data.experimental.to_variant(joint)
        return iter(tf.data.experimental.from_variant(variant, self._spec))

    def _eager_step(self, afresh: Callable[[Any], Any]) -> Outcome:
        with _lock:
            tf.config.run_functions_eagerly(True)
            try:
                logs = afresh(self._batches[:1])
            finally:
                tf.config.run_functions_eagerly(False)
        outcome = self._outcome(logs)
        self._restore()
        return outcome

    def _restore(self) -> None:
        for variable, value in zip(self._variables, self._before, strict=True):
            variable.assign(value)

    def _outcome(self, logs: Any) -> Outcome:
        """Returns by name what the logs and variables are, and what they were before."""
        entries = logs if isinstance(logs, dict) else {"": logs}
        found = {
            f"the log entry {name!r}": (np.asarray(value), np.zeros((), "float32"))
            for name, value in entries.items()
        }
        for i, (variable, before) in enumerate(zip(self._variables, self._before, strict=True)):
            name = f"the variable {self._names[i]!r}"
            found[f"{name} ({i})" if name in found else name] = (variable.numpy(), before.numpy())
        return found

    def _difference(self, expected: Outcome, found: Outcome) -> str | None:
        for name in {**expected, **found}:
            if name not in expected or name not in found:
                return f"the step has {name}" if name in expected else f"it has no {name}"
            if not self._agree(name, *expected[name], found[name][0]):
                values = _short(found[name][0]), _short(expected[name][0])
                return f"after the first step {name} is {values[0]}, not {values[1]}"
        return None

    def _agree(self, name: str, value: Any, before: Any, other: Any) -> bool:
        if name.startswith("the variable 'compile_loss/"):
            # Keras weighs the loss of an output by the size of a batch where it knows it,
            # which it does not while tracing. The log entries tell.
            return True
        if value.dtype != other.dtype or value.shape != other.shape:
            return False
        if not tf.as_dtype(value.dtype).is_floating:
            return np.array_equal(value, other)
        rounding = 2 * _epsilon(value.dtype)
        value, before, other = (np.asarray(v, "float64") for v in (value, before, other))
        if not np.array_equal(np.isfinite(value), np.isfinite(other)):
            return False
        change = 100 * self._epsilon + 16 * self._noise.get(name, 0.0)
        allowed = change * _largest(value - before) + rounding * _largest(before)
        return _largest(value - other) <= allowed

    def _measure_noise(self, expected: Outcome, afresh: Callable[[Any], Any]) -> None:
        """Finds out what rounding may do: makes the step with slightly other weights."""
        self._restore()
        draws = np.random.default_rng(0)
        moved = {}
        for i, (variable, before) in enumerate(zip(self._variables, self._before, strict=True)):
            if variable.dtype.is_floating and variable.trainable:
                signs = draws.choice([-1.0, 1.0], size=tuple(variable.shape))
                factors = tf.cast(1.0 + 8 * self._epsilon * signs, before.dtype)
                moved[i] = before.numpy()
                variable.assign(before * factors)
                moved[i] = np.asarray(variable.numpy() - moved[i], "float64")
        outcome = self._eager_step(afresh)
        num_logs = len(outcome) - len(self._variables)
        for place, (name, (value, before)) in enumerate(expected.items()):
            other = outcome[name][0]
            if not tf.as_dtype(value.dtype).is_floating:
                continue
            value, before, other = (np.asarray(v, "float64") for v in (value, before, other))
            change = _largest(value - before)
            if change:
                noise = _largest(other - value - moved.get(place - num_logs, 0.0)) / change
                self._noise[name] = max(noise, self._noise.get(name, 0.0))


def _epsilon(dtype: Any) -> float:
    return float(tf.experimental.numpy.finfo(tf.as_dtype(dtype).as_numpy_dtype).eps)


def _largest(values: np.ndarray) -> float:
    return float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))


def _short(value: Any) -> str:
    return f"{value.ravel()[:3]}..." if value.size > 3 else f"{value}"
