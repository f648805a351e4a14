"""The methods of a model for its gradients: hooks, freezing, and gradients outside `fit`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.base import Computed, Quotient
from keras_tapefit.gradients import Gradients, Targets, matching
from keras_tapefit.gradients.checks import check_bool
from keras_tapefit.gradients.layers import named_layers
from keras_tapefit.hooks import HookHandle, HookList
from keras_tapefit.training import compile_arguments, keras_trainer
from keras_tapefit.training.non_finite import NonFinite, Onlooker, found
from keras_tapefit.training.objective import ModelObjective
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.training.step import CustomStep, open_step
from keras_tapefit.training.tape import StepTape, prepare_optimizer
from keras_tapefit.update import optimizers, replicas, trainable
from keras_tapefit.update.rollback import Rollback


class GradientsByHand:
    """Methods that a user calls on a model, in a custom step or outside `fit`. A mixin."""

    optimizer: Any
    built: bool

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
