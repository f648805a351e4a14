"""The training step written out, and what `compile`, `fit` and `evaluate` need for it.

Private names used here: `Model._maybe_symbolic_build` and `_get_metrics_result_or_logs`,
which it overrides. Checked with Keras 3.15.1; `tests/models/test_private_names.py` fails
when they change.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_tapefit.backward.base import check_backward
from keras_tapefit.hooks import GradientHook, HookList
from keras_tapefit.hooks.checks import check_callbacks
from keras_tapefit.training import (
    backups,
    building,
    compile_arguments,
    keras_trainer,
    losses,
    strategies,
    validation,
)
from keras_tapefit.training.by_hand import GradientsByHand
from keras_tapefit.training.clock import Clock
from keras_tapefit.training.objective import ModelObjective
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.training.step import Step, close_windows, open_step
from keras_tapefit.training.train_function import TestFunction, TrainFunction


class TapeTrainer(GradientsByHand):
    """The steps of `TapeModel`. A mixin without `__init__`, in front of `keras.Model`."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Makes one step of training on a batch.

        Args:
            data: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The logs: a dictionary of metric names and their values so far.
        """
        batch = x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        runtime = runtime_of(self)
        step = open_step(runtime) or Step(runtime)
        # A `tf.GradientTape` around forward pass and loss, the backward pass over the
        # variables being trained now; `backward` and `micro_batches` say how.
        objective = ModelObjective(runtime, apart=runtime.divides_in_parts)
        with step.noticing_new():
            computed = runtime.gradient_method().compute(objective, batch)
        keras_trainer.track_loss(self, computed.loss, computed.examples, computed.all_examples)
        losses.track_terms(self, computed.terms, computed.outputs, objective.num_replicas())
        # Replicas summed, loss scale removed; hooks; gate; optimizer; record.
        if self.trainable_variables:
            step.update(computed, self.optimizer)
        else:
            _warn_of_nothing_to_train(self)
        logs = self.compute_metrics(x, y, computed.outputs, sample_weight=sample_weight)
        # A rejected step is undone; log entries are added.
        return step.close_built_in(logs)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates the model on a batch.

        Args:
            data: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The logs: a dictionary of metric names and their values so far.
        """
        batch = x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        runtime = runtime_of(self)
        objective = ModelObjective(runtime, training=False)
        forward = objective.forward(batch)
        keras_trainer.track_loss(self, forward.loss, forward.examples, forward.all_examples)
        losses.track_terms(
            self, forward.quotients[0].terms, forward.outputs, objective.num_replicas()
        )
        logs = self.compute_metrics(x, y, forward.outputs, sample_weight=sample_weight)
        return {**logs, **validation.watch(runtime, objective, batch, forward)}

    @compile_arguments.passed_on
    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: Any = "auto",
        auto_scale_loss: bool = True,
        gradient_hooks: Any = None,
        backward: Any = None,
        micro_batches: int = 1,
    ) -> None:
        """Configures the model for training.

        Takes every argument of `keras.Model.compile`, and:

        Args:
            jit_compile: also `"update"`: XLA for hooks and optimizer only, one program.
            gradient_hooks: a list of `GradientHook`s or functions of
                `(gradient, variable)`. `None` keeps the hooks there are, `[]` removes
                them.
            backward: how gradients are computed, one of `keras_tapefit.backward`;
                `None` keeps what is set, at first `Backpropagation()`.
            micro_batches: the number of parts a batch is split into for the backward
                pass; one update is made of them all.

        Raises:
            TypeError: when an argument is of the wrong type.
            ValueError: when the model's strategy cannot train it.

        Example:

        ```python
        model.compile("adam", "mse", gradient_hooks=[hooks.GlobalNormClipping(1.0)])
        ```
        """
        arguments = {
            "optimizer": optimizer,
            "loss": loss,
            "loss_weights": loss_weights,
            "metrics": metrics,
            "weighted_metrics": weighted_metrics,
            "run_eagerly": run_eagerly,
            "steps_per_execution": steps_per_execution,
            "jit_compile": jit_compile,
            "auto_scale_loss": auto_scale_loss,
        }
        self._compile((), arguments, gradient_hooks, backward, micro_batches)

    def _compile(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gradient_hooks: Any,
        backward: Any,
        micro_batches: int,
    ) -> None:
        checked = runtime_of(self).hooks.check
        new_hooks = None if gradient_hooks is None else checked(gradient_hooks)
        new_backward = None if backward is None else check_backward(backward)
        jit_compile = kwargs.get("jit_compile", "auto")
        compile_arguments.check(self, jit_compile, micro_batches)
        if jit_compile == "update":
            eager = kwargs.get("run_eagerly", False)
            kwargs["jit_compile"] = compile_arguments.keras_jit_compile(self, jit_compile, eager)
        # An optimizer given by name is made here, and belongs to the strategy.
        with self.distribute_strategy.scope():
            self._next_compile()(*args, **kwargs)
        strategies.check_scope(self, with_model=False)
        runtime = runtime_of(self)
        runtime.forget_optimizers()
        runtime.micro_batches = micro_batches
        runtime.jit_compile = jit_compile
        if new_hooks is not None:
            runtime.hooks.set(new_hooks)
        if new_backward is not None:
            runtime.backward = new_backward
        if building.is_assembly(self):
            # Keras saves and loads nothing that is not built.
            self.built = True
            runtime.prepare()

    def _next_compile(self) -> Any:
        """Returns the `compile` of the next class in line, which need not be Keras's own."""
        return super().compile

    def get_compile_config(self) -> dict[str, Any]:
        """Returns what `compile` was called with, the hooks as they are now."""
        config = super().get_compile_config()
        if not config:
            return config
        return {**config, **compile_arguments.serialize(runtime_of(self))}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model as `get_compile_config` describes."""
        has_own = type(self).compile is not TapeTrainer.compile
        if has_own or not compile_arguments.is_of_keras(self._next_compile()):
            # Keras's own rule, and its own warning. Hooks stay, whoever compiles.
            super().compile_from_config(config)
            kept = config.get("gradient_hooks", [])
            hooks = runtime_of(self).hooks
            hooks.set(hooks.check(keras.saving.deserialize_keras_object(kept)))
            runtime_of(self).frozen_when_built = config.get("frozen", [])
            runtime_of(self).running_when_built = config.get("running", [])
            return
        config = dict(config)
        frozen, running = config.pop("frozen", []), config.pop("running", [])
        self.compile(**keras.saving.deserialize_keras_object(config))
        runtime = runtime_of(self)
        runtime.frozen_when_built, runtime.running_when_built = frozen, running
        if self.optimizer is not None and (self.built or building.parts_are_built(self)):
            runtime.prepare()

    def make_train_function(self, force: bool = False) -> Callable[[Any], Any] | None:
        """Makes the function that `fit` calls; see `keras.Model.make_train_function`."""
        runtime = runtime_of(self)
        if self.train_function is None or force:
            clock = runtime.clock = Clock(runtime)
            self.train_function = TrainFunction(self, runtime, clock, _has_custom_step(self))
        if isinstance(self.train_function, TrainFunction):
            self.train_function.refresh()
            self.train_function.may_run_out = runtime.may_run_out
            if not _has_custom_step(self):
                self.train_function.say(building.inner_hooks_finding(self))
        if self.built:
            runtime.prepare()
        keeps_state = bool(runtime.hooks) or runtime.has_window or runtime.recording.is_asked
        strategies.check_storage(self, keeps_state)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[[Any], Any] | None:
        """Makes the function that `evaluate` calls; as `keras.Model` does."""
        if force or not isinstance(self.test_function, TestFunction):
            self.test_function: Any = TestFunction(self, runtime_of(self))
        self.test_function.refresh()
        return self.test_function

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        runtime, was_built = runtime_of(self), self.built
        if iterator is not None and not runtime.evaluating:
            runtime.may_run_out = keras_trainer.may_run_out(iterator)
        if iterator is None or not strategies.needs_own_build(self):
            # Losses and metrics must not be made by a trace that is kept, and those of an
            # epoch that is continued have values before the first step.
            early = runtime.trace_source is not None or runtime.clock_restores()
            is_built = keras_trainer.is_built(self)
            if is_built and _is_plain(self):
                # Else the first step makes them, and is traced twice for it.
                keras_trainer.build_losses(self, iterator, data_batch)
            elif early or not is_built:
                keras_trainer.build_from_spec(self, iterator, data_batch)
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
        else:
            keras_trainer.symbolic_build(self, strategies.local_batch(iterator, self))
        if self.built:
            building.complete(self)
            if not was_built:
                runtime.prepare()

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        runtime = runtime_of(self)
        strategies.check_scope(self)
        runtime.recording.end()
        self.make_train_function()
        # The next class in line, which need not be Keras's own, may take other arguments.
        fit = super().fit
        bound = inspect.signature(fit).bind_partial(*args, **kwargs)
        rest = bound.arguments
        parameters = bound.signature.parameters
        others = [name for name, each in parameters.items() if each.kind is each.VAR_KEYWORD]
        if "callbacks" not in parameters:
            if not others:
                _check_needs_no_epochs(fit, runtime.hooks)
                return fit(*args, **kwargs)
            rest = bound.arguments.setdefault(others[0], {})
        rest["callbacks"] = _with_ours(rest.get("callbacks"), self, runtime.clock)
        runtime.clock.begin(backups.check(rest["callbacks"]))
        return fit(*bound.args, **bound.kwargs)

    def reset_metrics(self) -> None:
        """Resets the state of all metrics, and of what hooks report."""
        clock = runtime_of(self).clock
        if clock is not None and clock.resumes_epoch():
            # They are those of the batches before the restart.
            return
        super().reset_metrics()
        runtime_of(self).logs.reset()

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with runtime_of(self).paused():
            return super().evaluate(*args, **kwargs)

    def _get_metrics_result_or_logs(self, logs: Any) -> Any:
        # Called at the end of an epoch's steps, before validation and callbacks.
        runtime = runtime_of(self)
        if not runtime.evaluating:
            close_windows(runtime)
            if runtime.clock is not None:
                runtime.clock.end_epoch()
        # Keras reads the epoch's metrics where the step's logs have their names only.
        names = runtime.logs.names(validation=runtime.evaluating)
        if not isinstance(logs, dict) or not names:
            return super()._get_metrics_result_or_logs(logs)
        own = {name: value for name, value in logs.items() if name not in names}
        results = super()._get_metrics_result_or_logs(own)
        if runtime.evaluating:
            return {**results, **runtime.logs.entries.results(names)}
        return {**runtime.logs.of_counted_steps(results), **runtime.logs.results()}


def _has_custom_step(model: Any) -> bool:
    return keras_trainer.function_of(model.train_step) is not TapeTrainer.train_step


def _is_plain(model: Any) -> bool:
    """Whether a model's steps show its outputs to its losses and metrics, and only those."""
    is_own = keras_trainer.function_of(model.test_step) is TapeTrainer.test_step
    return is_own and not _has_custom_step(model) and keras_trainer.shows_outputs(model)


def _warn_of_nothing_to_train(model: Any) -> None:
    if runtime_of(model).candidates():
        text = "All of the model's weights are frozen, so nothing is trained."
    else:
        text = "The model does not have any trainable weights."
    warnings.warn(text, stacklevel=3)


def _check_needs_no_epochs(fit: Any, hooks: HookList) -> None:
    for hook in hooks:
        if type(hook).frozen_positions is not GradientHook.frozen_positions:
            raise TypeError(
                f"The hook {hook.name!r} learns the epoch from a callback, and "
                f"`{fit.__qualname__}` takes no `callbacks`. Have it take `**kwargs` and pass "
                "them on, or name its class before `TapeModel` among the bases."
            )


def _with_ours(callbacks: Any, model: Any, clock: Clock) -> Any:
    check_callbacks(callbacks)
    # Last: a callback that resumes a training does so when the training begins.
    last = [strategies.SameBeginning()] if strategies.has_workers(model) else []
    if isinstance(callbacks, keras.callbacks.CallbackList):
        for callback in [clock, *last]:
            callbacks.append(callback)
        return callbacks
    given = keras.tree.flatten(callbacks) if callbacks else []
    return [*given, clock, *last]
