"""What layers did with their weights in a forward pass: inputs, and outputs before activation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.taps import Opened
from keras_tapefit.backward.weight_gradients import NotUnderstood, is_understood
from keras_tapefit.gradients import variable_path
from keras_tapefit.gradients.layers import own_weights


class WeightCalls(Opened):
    """Watches the calls of some layers, and what weights are read outside of them.

    Args:
        layers: those whose calls are understood. No other place may read their weights.

    Attributes:
        layers: as given.
        calls: by the `id` of a layer, for each of its calls the input and the output,
            before the activation.
        reason: why the calls do not tell all; `None`: they do.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = list(layers)
        self._known = {id(layer) for layer in layers}
        self.calls: dict[int, list[tuple[tf.Tensor, tf.Tensor]]] = {}
        self.reason: str | None = None
        # Of the outputs. What no output leads to is not recorded.
        self.tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        self._reads = tf.GradientTape(persistent=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches a forward pass in this context."""
        with self._reads, self.opened(self.layers):
            yield

    def first_axes(self) -> set[int | None]:
        """Returns the sizes of the first axes of inputs and outputs, `None` where unknown."""
        return {v.shape[0] for found in self.calls.values() for pair in found for v in pair}

    def gradients(self, loss: tf.Tensor) -> dict[int, list[tuple[tf.Tensor, tf.Tensor]]]:
        """Returns for each layer the input of its calls and the gradient at the output.

        Calls on which the loss does not depend are left out.
        """
        keys = [key for key, found in self.calls.items() for _ in found]
        pairs = [pair for found in self.calls.values() for pair in found]
        gradients = self.tape.gradient(loss, [output for _, output in pairs])
        result: dict[int, list[tuple[tf.Tensor, tf.Tensor]]] = {}
        for key, (inputs, _), gradient in zip(keys, pairs, gradients, strict=True):
            if gradient is not None:
                result.setdefault(key, []).append((inputs, tf.convert_to_tensor(gradient)))
        return result

    def read_elsewhere(self) -> list[Any]:
        """Returns the TensorFlow variables that were read outside of these calls."""
        return list(self._reads.watched_variables())

    def run(self, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if id(layer) not in self._known:
            return call(*args, **kwargs)
        why_not = self.why_not()
        inputs = args[0] if args else None
        if why_not is not None or not isinstance(inputs, tf.Tensor):
            what = why_not or "a call without a tensor as its first argument"
            self.reason = f"the layer {layer.name!r} runs inside {what}"
            return call(*args, **kwargs)
        activation = getattr(layer, "activation", None)
        found: list[tf.Tensor] = []

        def before_activation(value: tf.Tensor) -> tf.Tensor:
            # Not the tensor itself, which may be the output of another layer too.
            value = tf.identity(value)
            self.tape.watch(value)
            found.append(value)
            return value

        with self._reads.stop_recording(), _without_activation(layer):
            outputs = before_activation(call(*args, **kwargs))
        if activation is not None:
            outputs = activation(outputs)
        self.calls.setdefault(id(layer), []).append((inputs, found[0]))
        return outputs


class Flat(Opened):
    """Has dense layers multiply matrices, whatever the rank of their input.

    Vectorised over batches of one, a product of rank three by two becomes one of rank four
    by two, which ends the process in oneDNN (TensorFlow 2.21).

    Args:
        layers: the dense layers.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self._layers = list(layers)
        self._known = {id(layer) for layer in layers}

    @contextlib.contextmanager
    def flattening(self) -> Iterator[None]:
        """Does so in this context."""
        with self.opened(self._layers):
            yield

    def run(self, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs = args[0] if args else None
        if id(layer) not in self._known or not isinstance(inputs, tf.Tensor):
            return call(*args, **kwargs)
        if inputs.shape.rank is None or inputs.shape.rank < 3:
            return call(*args, **kwargs)
        activation = layer.activation
        with _without_activation(layer):
            rows = call(tf.reshape(inputs, [-1, inputs.shape[-1]]), *args[1:], **kwargs)
        shape = tf.concat([tf.shape(inputs)[:-1], [rows.shape[-1]]], axis=0)
        outputs = tf.ensure_shape(tf.reshape(rows, shape), [*inputs.shape[:-1], rows.shape[-1]])
        return outputs if activation is None else activation(outputs)


@contextlib.contextmanager
def _without_activation(layer: Any) -> Iterator[None]:
    before = layer.__dict__.get("activation")
    if before is None:
        yield
        return
    # Past Keras's attribute tracking.
    layer.__dict__["activation"] = None
    try:
        yield
    finally:
        layer.__dict__["activation"] = before


def check_calls(calls: WeightCalls, layers: Sequence[Any], variables: Sequence[Any]) -> None:
    """Raises `NotUnderstood` where calls of layers do not tell all that is done with weights.

    Args:
        calls: of the forward pass.
        layers: the model and all layers in it.
        variables: the weights.
    """
    if calls.reason is not None:
        raise NotUnderstood(calls.reason)
    owners: dict[int, list[Any]] = {}
    for layer in layers:
        for key in {id(v) for v in own_weights(layer)}:
            owners.setdefault(key, []).append(layer)
    elsewhere = {id(v) for v in calls.read_elsewhere()}
    for variable in variables:
        native = variable.value if isinstance(variable, keras.Variable) else variable
        copies = {id(native), *(id(copy) for copy in getattr(native, "values", ()))}
        held = owners.get(id(variable), [])
        if len(held) != 1 or not is_understood(held[0]) or copies & elsewhere:
            by = f", of {type(held[0]).__name__}" if len(held) == 1 else ""
            raise NotUnderstood(
                f"it is not known what is done with the weight {variable_path(variable)!r}{by}"
            )
