"""The tape of a custom training step."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.base import Computed, Quotient
from keras_tapefit.backward.taps import Taps
from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.targets import is_variable
from keras_tapefit.training import losses
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.step import CustomStep, open_step
from keras_tapefit.update import loaded_optimizers, optimizers, replicas


class StepTape(tf.GradientTape):
    """A `tf.GradientTape` that knows its model's hooks and optimizer.

    Made by `model.gradient_tape()`.

    Args:
        runtime: the private side of the model.
        persistent: whether gradients may be taken several times.
    """

    def __init__(self, runtime: Runtime, persistent: bool = False) -> None:
        super().__init__(persistent=persistent)
        self._runtime = runtime
        self._undivided = losses.undivided()
        self._step: CustomStep | None = None
        self._is_own = False
        self._noticing: Any = None
        self._taps: Taps | None = None
        self._tapping: Any = None

    def __enter__(self) -> StepTape:
        # In a loop of the user's own no step is open: it begins here.
        self._step = open_step(self._runtime)
        self._is_own = self._step is None
        if self._step is None:
            if self._runtime.model.built:
                self._runtime.prepare()
            self._step = CustomStep(self._runtime)
        self._step.used_tape = True
        self._noticing = self._step.noticing_new() if self._is_own else contextlib.nullcontext()
        self._noticing.__enter__()
        self._undivided.__enter__()
        self._taps = taps = self._runtime.taps()
        shared = None if taps is None else taps.open_alike()
        if taps is None or shared is not None:
            self._taps, self._tapping = shared, contextlib.nullcontext()
        else:
            self._tapping = taps.tapping()
        super().__enter__()
        # Within the tape, whose recording they look for.
        self._tapping.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tapping.__exit__(*exception)
        super().__exit__(*exception)
        self._undivided.__exit__(*exception)
        self._noticing.__exit__(*exception)

    # As Keras does with its own step: what runs in it is no code for AutoGraph.
    @tf.autograph.experimental.do_not_convert
    def minimize(
        self,
        loss: Any,
        variables: Sequence[Any] | None = None,
        optimizer: Any = None,
        weight: Any = None,
    ) -> None:
        """Makes one update: scale, backward pass, replicas, hooks, gate, optimizer.

        To be called after the `with` block.

        Args:
            loss: the loss, a scalar tensor computed inside the `with` block, not
                multiplied by a loss scale. On several replicas that of this replica's
                part of the batch, not divided by their number.
            variables: the variables to update; by default the model's trainable ones.
            optimizer: a Keras optimizer; by default the one the model is compiled with.
            weight: what the loss was divided by, a number or a scalar tensor, such as
                the number of tokens in the batch; `"sum"` where it was divided by
                nothing. By default the number of examples: replicas and accumulated
                steps then count by it.

        Raises:
            ValueError: when the optimizer or the variables are missing.
        """
        model, step = self._runtime.model, self._step
        optimizer = self._runtime.optimizer if optimizer is None else optimizer
        if optimizer is None:
            raise ValueError(
                "`minimize` needs an optimizer. Compile the model with one, or pass `optimizer=`."
            )
        if step is None:
            raise ValueError(
                "`minimize` needs a loss that was computed inside "
                "`with model.gradient_tape() as tape:`."
            )
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(f"`optimizer` must be a Keras optimizer. Received: {optimizer!r}.")
        if loss is None or isinstance(loss, str):
            raise TypeError(
                "`loss` must be a scalar tensor, computed inside the `with` block. "
                f"Received: loss={loss!r}."
            )
        if variables is None:
            variables = model.trainable_variables
        elif not isinstance(variables, Iterable) or not all(map(is_variable, variables)):
            raise TypeError(f"`variables` must be a list of variables. Received: {variables!r}.")
        else:
            variables = [v for v in variables if getattr(v, "trainable", True)]
        if not variables:
            raise ValueError("`minimize` got no variables to update.")
        loss = tf.convert_to_tensor(loss)
        if loss.shape.rank != 0:
            loss = tf.reduce_sum(loss)
        prepare_optimizer(self._runtime, optimizer, variables)
        divisor = _divisor(step.examples if weight is None else weight)
        share, total = _share(divisor)
        taps = [] if self._taps is None else [self._taps]
        for each in taps:
            # What the same tape gave before is another update's.
            each.forget()
            each.scale, each.loss = optimizers.loss_scale(optimizer), loss
            each.inputs = step.data
        seed = optimizer.scale_loss(tf.ones_like(loss) * tf.cast(share, loss.dtype))
        found = self.gradient(loss, variables, output_gradients=seed)
        gradients = Gradients(zip(found, variables, strict=True))
        if step.may_be_empty:
            gradients = gradients.where(step.examples > 0)
        share_of_loss = tf.math.multiply_no_nan(loss, tf.cast(share, loss.dtype))
        examples = step.examples
        all_examples = replicas.sum_over(examples)
        quotient = Quotient(share_of_loss, total, gradients=gradients)
        step.loss = loss
        step.update(Computed([quotient], None, examples, all_examples, taps=taps), optimizer)
        if self._is_own:
            step.close(None)


def _divisor(weight: Any) -> tf.Tensor | None:
    if isinstance(weight, str):
        if weight != "sum":
            raise ValueError(f"`weight` must be a number or 'sum'. Received: weight={weight!r}.")
        return None
    if isinstance(weight, numbers.Real) and not float(weight) >= 0:
        raise ValueError(f"`weight` must be zero or a positive number. Received: weight={weight}.")
    weight = tf.cast(tf.convert_to_tensor(weight), tf.float32)
    if weight.shape.rank != 0:
        raise ValueError(
            "`weight` must be one number, what the loss was divided by. "
            f"Received: weight of shape {tuple(weight.shape)}."
        )
    return weight


def _share(divisor: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Returns what this replica's loss counts for, and the divisor of all replicas."""
    if divisor is None or replicas.count() == 1:
        return tf.constant(1.0), divisor
    total = replicas.sum_over(divisor)
    return tf.math.divide_no_nan(divisor, total), total


def prepare_optimizer(runtime: Runtime, optimizer: Any, variables: Sequence[Any]) -> None:
    """Builds an optimizer: the model's own for all it may ever update."""
    if optimizer is runtime.optimizer:
        candidates = runtime.candidates()
        known = {id(v) for v in candidates}
        variables = candidates + [v for v in variables if id(v) not in known]
    if not optimizer.built:
        optimizers.build(optimizer, variables)
        loaded_optimizers.restore(optimizer)
    runtime.prepare()
