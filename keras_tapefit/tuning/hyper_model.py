"""Existing build functions with hooks to tune, and with traces that are reused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import keras_tuner

from keras_tapefit.models import TapeModel
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.tuning import garbage
from keras_tapefit.tuning.search_space import PARTS, gradient_hooks, gradient_method
from keras_tapefit.tuning.traces import TracePool


class TapeHyperModel(keras_tuner.HyperModel):
    """A build function, with gradient hooks to tune and with traces that are reused.

    For every tuner of KerasTuner. By default it changes neither trials nor search space.
    Tracing a new model for each trial takes most of the time of a search over small
    models. With `reuse` you say that trials differ only in numbers that live in
    variables: initial weights and seeds, the learning rate, numbers of hooks. A trial
    whose model is like an earlier one then runs what was traced for that one, with its
    own variables. Its first step is computed twice, by the trace and afresh; where they
    differ beyond rounding it is traced again, with a warning. What has no effect in the
    first step, and is no attribute, closure or global of the model either, is not seen.

    Args:
        build: takes `hp` and returns a compiled model; or a `keras_tuner.HyperModel`. A
            plain `keras.Model` is converted, as by `TapeModel.from_model`.
        reuse: whether traces are reused; an integer: of how many kinds of models they
            are kept, 32 when `True`. Models themselves are not kept. While a search
            runs, collections of garbage pass over what was there before, as `gc.freeze`
            has it.
        parts: what to add to the search space of a model that has no hooks of its own;
            see `gradient_hooks`, and `"sharpness"` for `gradient_method`. `()`: nothing.

    Attributes:
        history: for each time that a model began to be trained `"reused"`, or
            `"traced"` with the reason.

    Raises:
        TypeError: when `build` can not be called.
        ValueError: when `reuse` is negative, or a part is unknown.

    Example:

    ```python
    hypermodel = tuning.TapeHyperModel(build, reuse=True)
    tuner = keras_tuner.RandomSearch(hypermodel, objective="val_loss", max_trials=4)
    tuner.search(x, y, validation_split=0.2, epochs=1)
    print(hypermodel.history)
    ```
    """

    def __init__(
        self,
        build: Callable[[Any], Any] | keras_tuner.HyperModel,
        reuse: bool | int = False,
        parts: Sequence[str] = (),
    ) -> None:
        if not callable(build) and not isinstance(build, keras_tuner.HyperModel):
            raise TypeError(
                "`build` must be a function of `hp` or a `keras_tuner.HyperModel`. "
                f"Received: build={build!r}."
            )
        if not isinstance(reuse, int):
            raise TypeError(f"`reuse` must be a bool or an integer. Received: reuse={reuse!r}.")
        if reuse < 0:
            raise ValueError(f"`reuse` must not be negative. Received: reuse={reuse}.")
        if isinstance(parts, str) or not isinstance(parts, Iterable):
            raise TypeError(f"`parts` must be a list of names. Received: parts={parts!r}.")
        unknown = [part for part in parts if part not in (*PARTS, "sharpness")]
        if unknown:
            raise ValueError(
                f"`parts` must be some of {(*PARTS, 'sharpness')}. Received: parts={parts!r}."
            )
        super().__init__()
        self.inner = build if isinstance(build, keras_tuner.HyperModel) else None
        self._function = build if self.inner is None else self.inner.build
        self.reuse = reuse
        self.parts = tuple(parts)
        self._pool = TracePool(32 if reuse is True else int(reuse)) if reuse else None

    @property
    def history(self) -> list[str]:
        """The outcome for each model that began to train: traced, reused, or why not."""
        return [] if self._pool is None else list(self._pool.history)

    def build(self, hp: Any) -> Any:
        """Builds a model for a trial."""
        if self._pool is not None:
            garbage.set_aside()
        model = self._function(hp)
        if not isinstance(model, keras.Model):
            return model
        if not isinstance(model, TapeModel):
            model = _converted(model)
        if self.parts and not model.gradient_hooks:
            self._add_hooks(hp, model)
        if self._pool is not None:
            runtime_of(model).trace_source = self._pool
        return model

    def declare_hyperparameters(self, hp: Any) -> None:
        if self.inner is not None:
            self.inner.declare_hyperparameters(hp)

    def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Trains a model; a hook that stops the training fails the trial."""
        fit = super().fit if self.inner is None else self.inner.fit
        try:
            return fit(hp, model, *args, **kwargs)
        except FloatingPointError as error:
            raise keras_tuner.errors.FailedTrialError(str(error)) from error

    def release(self) -> None:
        """Lets go of the kept traces."""
        if self._pool is not None:
            self._pool.clear()

    def _add_hooks(self, hp: Any, model: Any) -> None:
        parts = [part for part in self.parts if part != "sharpness"]
        model.gradient_hooks.set(gradient_hooks(hp, model, parts))
        if "sharpness" in self.parts:
            runtime_of(model).backward = gradient_method(hp)


def _converted(model: keras.Model) -> Any:
    """Returns a `TapeModel` with the layers, weights and arguments of `compile`."""
    tape_model = TapeModel.from_model(model)
    if model.compiled:
        tape_model.compile_from_config(model.get_compile_config())
    return tape_model
