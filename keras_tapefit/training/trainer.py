"""The training step written out, and the methods that go with it.

Private names used here: `Model._maybe_symbolic_build` and `_get_metrics_result_or_logs`,
which it overrides. Checked with Keras 3.15.1; `tests/models/test_private_names.py` fails
when they change.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.base import Computed, Quotient, check_backward
from keras_tapefit.gradients import Gradients, Targets, matching
from keras_tapefit.gradients.checks import check_bool
from keras_tapefit.gradients.layers import named_layers
from keras_tapefit.hooks import GradientHook, HookHandle, HookList
from keras_tapefit.hooks.hook_list import check_callbacks
from keras_tapefit.training import (
    backups,
    building,
    compile_arguments,
    keras_trainer,
    losses,
    strategies,
    validation,
)
from keras_tapefit.training.clock import Clock
from keras_tapefit.training.non_finite import NonFinite, Onlooker, found
from keras_tapefit.training.objective import ModelObjective
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.training.step import CustomStep, Step, close_windows, open_step
from keras_tapefit.training.tape import StepTape, prepare_optimizer
from keras_tapefit.training.train_function import TestFunction, TrainFunction
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
            if not keras_trainer.is_built(self):
                keras_trainer.build_from_spec(self, iterator, data_batch)
            elif runtime.trace_source is not None or runtime.clock_restores():
                # A trace that is kept must not be what makes losses and metrics, and those of
                # an epoch that is continued have values before the first step.
                keras_trainer.build_losses(self, iterator, data_batch)
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
        """Returns a `tf.GradientTape` for a custom step or a loop by hand.

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
        computed = self._computed("compute_gradients", (x, y, sample_weight))
        gradients = computed.gradients
        scale = optimizers.loss_scale(self.optimizer)
        if scale is not None:
            gradients = gradients.scale(1.0 / tf.cast(scale, tf.float32))
        return gradients.with_unique_rows()

    @tf.autograph.experimental.do_not_convert
    def find_non_finite(self, x: Any, y: Any = None, sample_weight: Any = None) -> NonFinite:
        """Looks for the first value of a step on a batch that is NaN or infinite.

        A step in training mode is made, eagerly and without an update: nothing is changed.
        The order is that of the computation: data, weights, outputs of layers, the loss,
        the gradients at outputs, those of weights.

        Args:
            x: input data, with the batch as first axis.
            y: targets.
            sample_weight: weights of the examples.

        Returns:
            A table of layers that prints as text: for the output of each, and for the
            gradient of the loss there, whether it is finite, its largest and its smallest
            nonzero absolute value. `first` says where the fault is, or is `None`.

        Raises:
            ValueError: when the model is not compiled, or in a graph.

        Example:

        ```python
        found = model.find_non_finite(x[:8], y[:8])
        print(found)
        assert found.first is None
        ```
        """
        if not tf.executing_eagerly():
            raise ValueError(
                "`find_non_finite` looks at values, which a graph has not. Call it outside "
                "of `tf.function` and of `train_step`."
            )
        runtime = runtime_of(self)
        batch = (x, y, sample_weight)
        self._prepare_for("find_non_finite", batch)
        onlooker = Onlooker(named_layers(self))
        with runtime.watched_by(onlooker):
            computed = self._computed("find_non_finite", batch)
        scale = optimizers.loss_scale(self.optimizer)
        return found(computed, onlooker, runtime.candidates(), scale)

    def _prepare_for(self, method: str, batch: Any) -> Any:
        keras_trainer.check_compiled(self, method)
        runtime = runtime_of(self)
        if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
            raise ValueError(
                f"`{method}` computes on one replica. Call it outside of "
                "`with strategy.scope():`, or inside `strategy.run`."
            )
        batch = keras.tree.map_structure(keras_trainer.as_tensor, batch)
        keras_trainer.check_batch(batch)
        if not self.built:
            keras_trainer.build(self, batch)
        runtime.prepare()
        return batch

    def _computed(self, method: str, batch: Any) -> Computed:
        """Returns what the method gives for a batch, and leaves nothing behind."""
        batch = self._prepare_for(method, batch)
        runtime = runtime_of(self)
        rollback = Rollback(runtime.state.undone_variables())
        objective = ModelObjective(runtime, apart=runtime.micro_batches > 1)
        computed = runtime.gradient_method().compute(objective, batch)
        rollback.restore_unless(tf.constant(False))
        return computed

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
        if len({id(variable) for variable in gradients.variables}) < len(gradients):
            raise ValueError("`apply_gradients` got two gradients of one variable. Add them first.")
        prepare_optimizer(runtime, self.optimizer, gradients.variables)
        opened = open_step(runtime)
        step = opened or CustomStep(runtime)
        one = tf.constant(1.0) if opened is None else opened.examples
        quotient = Quotient(None, replicas.sum_over(one), gradients=gradients)
        computed = Computed([quotient], None, one, replicas.sum_over(one))
        step.update(computed, self.optimizer, scaled=False)
        if opened is None:
            step.close(None)

    def freeze(self, targets: Targets, train_bn: bool = False) -> None:
        """Stops training variables, from the next step on; no recompile.

        Their values and the optimizer's state for them stay as they are. A layer of
        which nothing is trained now gets `trainable = False`, so its
        BatchNormalization runs in inference mode: it uses the statistics it has, and keeps
        them. That suits fine-tuning on few or small batches. With `train_bn=True` its
        weights are frozen just so, and its statistics are updated: it normalizes by the batch
        and adapts to new data.

        Args:
            targets: a layer, a variable, a predicate on a variable, a glob on
                `variable.path`, or a list of these.
            train_bn: whether the statistics of BatchNormalization are still updated in
                layers that are frozen whole, as Lightning's argument of this name has it.

        Raises:
            TypeError: when `train_bn` is no bool.
            ValueError: when a target matches nothing, or the model has no weights yet.

        Example:

        ```python
        model.freeze("backbone/*")
        ```
        """
        _set_trainable(self, targets, False, check_bool("train_bn", train_bn))

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


def _has_custom_step(model: Any) -> bool:
    return getattr(model.train_step, "__func__", None) is not TapeTrainer.train_step


def _warn_of_nothing_to_train(model: Any) -> None:
    if runtime_of(model).candidates():
        text = "All of the model's weights are frozen, so nothing is trained."
    else:
        text = "The model does not have any trainable weights."
    warnings.warn(text, stacklevel=3)


def _set_trainable(model: Any, targets: Targets, value: bool, train_bn: bool = False) -> None:
    candidates = runtime_of(model).candidates()
    if targets is None:
        raise ValueError("Say what to freeze or unfreeze. Received: targets=None.")
    if not candidates:
        raise ValueError(
            f"The model {model.name!r} has no weights yet. Build it first, or call it on a batch."
        )
    chosen = [candidates[i] for i in matching(targets, candidates)]
    trainable.set_trainable(model, chosen, value, train_bn)


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
