"""The training step written out, and the methods that go with it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.base import check_backward
from keras_tapefit.gradients import Gradients, Targets, matching
from keras_tapefit.hooks import HookHandle, HookList
from keras_tapefit.hooks.hook_list import check_hooks
from keras_tapefit.training import (
    building,
    compile_arguments,
    keras_trainer,
    strategies,
    validation,
)
from keras_tapefit.training.objective import ModelObjective
from keras_tapefit.training.runtime import Runtime, runtime_of
from keras_tapefit.training.scope import StepScope, open_scope
from keras_tapefit.training.tape import StepTape, prepare_optimizer
from keras_tapefit.training.train_function import TestFunction, TrainFunction
from keras_tapefit.training.window import flush_window
from keras_tapefit.update import optimizers, replicas, trainable
from keras_tapefit.update.rollback import Rollback


class TapeTrainer:
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
        # Forward pass and loss under the tape, backward pass over the variables being
        # trained now.
        objective = ModelObjective(self)
        gradients, y_pred = runtime.gradient_method().compute(objective, batch)
        keras_trainer.track_loss(self, objective.noted, x)
        weigh = functools.partial(objective.weight, batch, y_pred)
        # Replicas summed, loss scale removed; hooks; gate; optimizer.
        if len(gradients):
            _update(runtime, gradients, self.optimizer, scaled=True, weigh=weigh)
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates the model on a batch.

        Args:
            data: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The logs: a dictionary of metric names and their values so far.
        """
        batch = x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = keras_trainer.forward(self, x, training=False)
        loss = keras_trainer.compute_loss(self, batch, y_pred, training=False)
        keras_trainer.track_loss(self, loss, x)
        logs = self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return {**logs, **validation.watch(runtime_of(self), batch, y_pred)}

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
        new_hooks = None if gradient_hooks is None else check_hooks(gradient_hooks)
        new_backward = None if backward is None else check_backward(backward)
        compile_arguments.check(self, jit_compile, micro_batches)
        # An optimizer given by name is made here, and belongs to the strategy.
        with self.distribute_strategy.scope():
            super().compile(
                optimizer=optimizer,
                loss=loss,
                loss_weights=loss_weights,
                metrics=metrics,
                weighted_metrics=weighted_metrics,
                run_eagerly=run_eagerly,
                steps_per_execution=steps_per_execution,
                jit_compile=compile_arguments.keras_jit_compile(self, jit_compile, run_eagerly),
                auto_scale_loss=auto_scale_loss,
            )
        strategies.check_scope(self, with_model=False)
        runtime = runtime_of(self)
        runtime.micro_batches = micro_batches
        runtime.jit_compile = jit_compile
        if new_hooks is not None:
            runtime.hooks.set(new_hooks)
        if new_backward is not None:
            runtime.backward = new_backward
        if building.is_assembly(self):
            # Keras saves and loads nothing that is not built.
            self.built = True
            runtime.prepare(self.optimizer)

    def get_compile_config(self) -> dict[str, Any]:
        """Returns what `compile` was called with, the hooks as they are now."""
        with optimizers.accumulation_shown(getattr(self, "optimizer", None)):
            config = super().get_compile_config()
        if not config:
            return config
        return {**config, **compile_arguments.serialize(runtime_of(self))}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model as `get_compile_config` describes."""
        if type(self).compile is not TapeTrainer.compile:
            # Keras's own rule, and its own warning.
            super().compile_from_config(config)
            return
        self.compile(**keras.saving.deserialize_keras_object(config))
        ready = self.built or building.parts_are_built(self)
        if getattr(self, "optimizer", None) is not None and ready:
            runtime_of(self).prepare(self.optimizer)

    def make_train_function(self, force: bool = False) -> Callable[[Any], Any] | None:
        """Makes the function that `fit` calls; see `keras.Model.make_train_function`."""
        if self.train_function is None or force:
            self.train_function = TrainFunction(self, runtime_of(self), _has_own_step(self))
        elif isinstance(self.train_function, TrainFunction):
            self.train_function.refresh()
        if self.built:
            runtime_of(self).prepare(self.optimizer)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[[Any], Any] | None:
        """Makes the function that `evaluate` calls; as `keras.Model` does."""
        runtime = runtime_of(self)
        kept = None if force else self.test_function
        if runtime.hooks.watches_validation or runtime.trace_source is not None:
            if not isinstance(kept, TestFunction):
                self.test_function: Any = TestFunction(self, runtime)
        elif not strategies.needs_own_function(self):
            return super().make_test_function(force=force)
        elif kept is None:
            self.test_function = strategies.make_function(self, self.test_step)
        return self.test_function

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is not None and not _has_own_step(self):
            keras_trainer.build_from_spec(self, iterator)
        if iterator is None or not strategies.needs_own_build(self):
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
            return
        # Before the optimizer is built, which else makes accumulators of its own.
        optimizers.take_over_accumulation(self.optimizer)
        keras_trainer.symbolic_build(self, strategies.local_batch(iterator, self))

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        strategies.check_scope(self)
        runtime_of(self).recording.end()
        bound = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs)
        bound.arguments["callbacks"] = _with_clock(
            bound.arguments.get("callbacks"), runtime_of(self)
        )
        return super().fit(*bound.args[1:], **bound.kwargs)

    def reset_metrics(self) -> None:
        """Resets the state of all metrics, and of what hooks report."""
        super().reset_metrics()
        runtime_of(self).begin_epoch()

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with runtime_of(self).paused():
            return super().evaluate(*args, **kwargs)

    def _get_metrics_result_or_logs(self, logs: Any) -> Any:
        # Called at the end of an epoch's steps, before validation and callbacks.
        flush_window(runtime_of(self))
        # Keras reads the epoch's metrics where the step's logs have their names only.
        reported = runtime_of(self).report_results()
        if not isinstance(logs, dict) or runtime_of(self).evaluating:
            return super()._get_metrics_result_or_logs(logs)
        own = {name: value for name, value in logs.items() if name not in reported}
        results = super()._get_metrics_result_or_logs(own)
        return {**results, **reported} if reported else results

    @property
    def gradient_hooks(self) -> HookList:
        """The model's gradient hooks, in the order in which they are applied."""
        return runtime_of(self).hooks

    @gradient_hooks.setter
    def gradient_hooks(self, hooks: Any) -> None:
        runtime_of(self).hooks.set(hooks)

    def register_gradient_hook(
        self, hook: Any, targets: Targets = None, name: str | None = None
    ) -> HookHandle:
        """Adds a gradient hook at the end of the list.

        Args:
            hook: a `GradientHook`, or a function of `(gradient, variable)` that returns
                the new gradient, or `None` to leave it.
            targets: the variables the hook is for: a layer, a variable, a predicate on
                a variable, a glob on `variable.path`, or a list of these. `None`: as the
                hook says, all by default.
            name: the hook's name in `gradient_hooks`.

        Returns:
            A handle whose `remove()` takes the hook out again; also a context manager.

        Raises:
            TypeError: when `hook` or `targets` is of the wrong type.
            ValueError: when a target matches no variable of the built model, or the
                name is taken.

        Example:

        ```python
        handle = model.register_gradient_hook(lambda g, v: g * 0.1, targets="head/*")
        handle.remove()
        ```
        """
        runtime = runtime_of(self)
        return compile_arguments.register(runtime, hook, targets, name)

    def gradient_tape(self, persistent: bool = False) -> StepTape:
        """Returns a `tf.GradientTape` for a step or loop of one's own.

        Args:
            persistent: whether gradients may be taken several times.

        Returns:
            A tape whose `minimize(loss, variables=None, optimizer=None)` makes the
            update: loss scale, backward pass, replicas, hooks, gate, optimizer.

        Example:

        ```python
        def train_step(self, data):
            x, y = data
            with self.gradient_tape() as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            tape.minimize(loss)
            return {"loss": loss}
        ```
        """
        return StepTape(runtime_of(self), persistent=persistent)

    @tf.autograph.experimental.do_not_convert
    def compute_gradients(self, x: Any, y: Any = None, sample_weight: Any = None) -> Gradients:
        """Returns the gradients of the loss on a batch, as the first hook would get them.

        Nothing is updated: weights, BatchNormalization statistics, random seeds and
        metrics are afterwards what they were.

        Args:
            x: input data, with the batch as first axis.
            y: targets.
            sample_weight: weights of the examples.

        Returns:
            `Gradients` of the variables being trained.

        Raises:
            ValueError: when the model is not compiled.

        Example:

        ```python
        gradients = model.compute_gradients(x[:10], y[:10])
        for path, norm in gradients.norms().items():
            print(path, float(norm))
        ```
        """
        keras_trainer.check_compiled(self, "compute_gradients")
        runtime = runtime_of(self)
        batch = keras.tree.map_structure(
            lambda v: v if v is None else tf.convert_to_tensor(v), (x, y, sample_weight)
        )
        if not self.built:
            keras_trainer.forward(self, batch[0], training=False)
        rollback = Rollback(runtime.volatile_variables())
        gradients, _ = runtime.backward.compute(ModelObjective(self), batch)
        rollback.restore_unless(tf.constant(False))
        scale = optimizers.loss_scale(self.optimizer)
        if scale is not None:
            gradients = gradients.scale(1.0 / scale)
        return gradients.with_unique_rows()

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, gradients: Gradients | Iterable[tuple[Any, Any]]) -> None:
        """Updates the weights with gradients: hooks, gate, optimizer.

        Args:
            gradients: `Gradients`, or pairs `(gradient, variable)`; the true ones, not
                multiplied by a loss scale. On several replicas, each passes its own.

        Raises:
            ValueError: when the model has no optimizer.

        Example:

        ```python
        model.apply_gradients(model.compute_gradients(x, y).scale(0.5))
        ```
        """
        if getattr(self, "optimizer", None) is None:
            raise ValueError("`apply_gradients` needs an optimizer. Compile the model first.")
        if not isinstance(gradients, Gradients):
            gradients = Gradients(gradients)
        runtime = runtime_of(self)
        prepare_optimizer(runtime, self.optimizer, gradients.variables)
        _update(runtime, gradients, self.optimizer, scaled=False)

    def freeze(self, targets: Targets) -> None:
        """Stops training variables, from the next step on; no recompile.

        Their values and the optimizer's state for them stay as they are. A layer of
        which nothing is trained any more gets `trainable = False`, so its
        BatchNormalization runs in inference mode.

        Args:
            targets: a layer, a variable, a predicate on a variable, a glob on
                `variable.path`, or a list of these.

        Raises:
            ValueError: when a target matches nothing, or the model has no weights yet.

        Example:

        ```python
        model.freeze("backbone/*")
        ```
        """
        _set_trainable(self, targets, False)

    def unfreeze(self, targets: Targets) -> None:
        """Trains variables again, from the next step on; no recompile.

        Args:
            targets: as in `freeze`.

        Raises:
            ValueError: when a target matches nothing, or the model has no weights yet.

        Example:

        ```python
        model.unfreeze("backbone/*")
        ```
        """
        _set_trainable(self, targets, True)


def _has_own_step(model: Any) -> bool:
    return getattr(model.train_step, "__func__", None) is not TapeTrainer.train_step


def _update(
    runtime: Runtime,
    gradients: Gradients,
    optimizer: Any,
    scaled: bool,
    weigh: Callable[[], Any] | None = None,
) -> None:
    opened = open_scope(runtime)
    scope = opened or StepScope(runtime)
    if weigh is not None:
        scope.weighs_replicas = _weighs_replicas(runtime)
        window = runtime.window_of(optimizer)
        if window is not None or runtime.hooks.uses_parts or scope.weighs_replicas:
            scope.weight = weigh()
    scope.update(gradients, optimizer, scaled)
    if opened is None:
        scope.finish(None)


def _weighs_replicas(runtime: Runtime) -> bool:
    """Whether replicas with unequal parts of a batch have to count by their size.

    Keras averages them alike, so that its last batch of an epoch is another one than on
    one device.
    """
    return (
        replicas.count() > 1
        and runtime.backward.takes_parts
        and keras_trainer.averages_examples(runtime.model)
    )


def _set_trainable(model: Any, targets: Targets, value: bool) -> None:
    candidates = runtime_of(model).candidates()
    if targets is None:
        raise ValueError("Say what to freeze or unfreeze. Received: targets=None.")
    if not candidates:
        raise ValueError(
            f"The model {model.name!r} has no weights yet. Build it first, or call it on a batch."
        )
    chosen = [candidates[i] for i in matching(targets, candidates)]
    trainable.set_trainable(model, chosen, value)


class _Clock(keras.callbacks.Callback):
    """Tells the hooks which epoch it is."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def on_train_begin(self, logs: Any = None) -> None:
        self._runtime.begin_training()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._runtime.begin_epoch(epoch)


def _with_clock(callbacks: Any, runtime: Runtime) -> Any:
    clock = _Clock(runtime)
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(clock)
        return callbacks
    return [clock, *keras.tree.flatten(callbacks)] if callbacks else [clock]
