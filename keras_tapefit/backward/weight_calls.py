"""What layers did with their weights in a forward pass: inputs, and outputs before activation.

Private names used here: of `keras.src.backend.common.masking` `get_keras_mask` and
`set_keras_mask`. Checked with Keras 3.15.1; `tests/backward/test_replays.py` fails when they
change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

from keras_tapefit.backward.replays import Replay, is_floating
from keras_tapefit.backward.taps import Opened
from keras_tapefit.backward.weight_gradients import NotUnderstood, is_understood
from keras_tapefit.gradients import variable_path
from keras_tapefit.gradients.layers import own_weights


@dataclass
class _Call:
    """What a call of a layer was given, and its outputs, before the activation."""

    layer: Any
    given: Any
    outputs: list[tf.Tensor]


class WeightCalls(Opened):
    """Watches the calls of layers, and what weights are read outside of them.

    A layer of which nothing is known is taken as a whole, with the layers in it, as one that
    can be run again; where it cannot, the layer around it is.

    Args:
        layers: with weights that are trained.

    Attributes:
        layers: as given.
        reason: why the calls do not tell all; `None`: they do.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.reason: str | None = None
        # Of the outputs. What no output leads to is not recorded.
        self.tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        self._calls: list[_Call] = []
        self._watched = {id(layer) for layer in layers}
        self._reads = tf.GradientTape(persistent=True)
        self._is_reading = True
        self._is_inside = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches a forward pass in this context."""
        with self._reads, self.opened(self.layers):
            yield

    @property
    def replayed(self) -> list[Any]:
        """The layers that can be run again, of which nothing else is known."""
        found = {id(c.layer): c.layer for c in self._calls if isinstance(c.given, Replay)}
        return list(found.values())

    def first_axes(self) -> set[int | None]:
        """Returns the sizes of the first axes of inputs and outputs, `None` where unknown."""
        found: set[int | None] = set() if self.reason is None else {None}
        for call in self._calls:
            given = call.given.tensors if isinstance(call.given, Replay) else [call.given]
            found |= {value.shape[0] for value in [*given, *call.outputs]}
        return found

    def is_like(self, other: WeightCalls) -> bool:
        """Whether the same layers were called, in the same order.

        In eager mode a loop over examples calls its layers again and again, in a graph once.
        """
        mine, others = (
            [(id(c.layer), isinstance(c.given, Replay)) for c in v._calls] for v in (self, other)
        )
        return mine == others

    def gradients(self, loss: tf.Tensor) -> list[tuple[Any, list[tuple[Any, Any]]]]:
        """Returns each layer with what its calls were given and the gradients at the outputs.

        Calls on which the loss does not depend are left out.
        """
        outputs = [call.outputs for call in self._calls]
        result: dict[int, tuple[Any, list[tuple[Any, Any]]]] = {}
        for call, gradients in zip(self._calls, self.tape.gradient(loss, outputs), strict=True):
            gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
            if any(g is not None for g in gradients):
                rows = result.setdefault(id(call.layer), (call.layer, []))[1]
                rows.append((call.given, gradients))
        return list(result.values())

    def run(self, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if id(layer) not in self._watched or self._is_inside:
            return call(*args, **kwargs)
        reason = self.why_not()
        inside = None if reason is None else f"runs inside {reason}"
        if not is_understood(layer):
            return self._run_unknown(layer, call, args, kwargs, inside)
        inputs = args[0] if args else None
        if inside or not isinstance(inputs, tf.Tensor):
            self.reason = f"the layer {layer.name!r} {inside or 'is not called with a tensor'}"
            with self._unread(layer):
                return call(*args, **kwargs)
        activation = getattr(layer, "activation", None)
        with self._unread(layer), _without_activation(layer):
            outputs = self._taken(layer, inputs, call(*args, **kwargs))
        return outputs if activation is None else activation(outputs)

    def _run_unknown(
        self, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any, inside: str | None
    ) -> Any:
        begin = len(self._calls)
        replay = Replay(layer, args, kwargs)
        of_own = f"nothing is known of the layer {layer.name!r}" if own_weights(layer) else None
        before, self.reason = self.reason, of_own
        with self._unread(layer):
            outputs = call(*args, **kwargs)
        reason, self.reason = self.reason, before
        if reason is None:
            # The layers in it tell all.
            return outputs
        del self._calls[begin:]
        self._is_inside = True
        try:
            why_not = inside or replay.why_not()
        finally:
            self._is_inside = False
        if why_not is not None:
            self.reason = self.reason or f"the layer {layer.name!r} {why_not}"
            return outputs
        return self._taken(layer, replay, outputs)

    def _taken(self, layer: Any, given: Any, outputs: Any) -> Any:
        found: list[tf.Tensor] = []

        def taken(value: Any) -> Any:
            if not is_floating(value):
                return value
            # Not the tensor itself, which may be the output of another layer too.
            mask, value = get_keras_mask(value), tf.identity(value)
            if mask is not None:
                set_keras_mask(value, mask)
            self.tape.watch(value)
            found.append(value)
            return value

        outputs = keras.tree.map_structure(taken, outputs)
        self._calls.append(_Call(layer, given, found))
        return outputs

    @contextlib.contextmanager
    def _unread(self, layer: Any) -> Iterator[None]:
        """Does not count what a layer reads in this context, if it has weights itself."""
        if not own_weights(layer) or not self._is_reading:
            yield
            return
        self._is_reading = False
        try:
            with self._reads.stop_recording():
                yield
        finally:
            self._is_reading = True

    def check(self, variables: Sequence[Any]) -> None:
        """Raises `NotUnderstood` where the calls do not tell all that is done with weights."""
        if self.reason is not None:
            raise NotUnderstood(self.reason)
        told: dict[int, set[int]] = {}
        for call in self._calls:
            is_replay = isinstance(call.given, Replay)
            held = call.layer.trainable_variables if is_replay else own_weights(call.layer)
            for variable in held:
                told.setdefault(id(variable), set()).add(id(call.layer))
        elsewhere = {id(v) for v in self._reads.watched_variables()}
        for variable in variables:
            native = variable.value if isinstance(variable, keras.Variable) else variable
            copies = {id(native), *(id(copy) for copy in getattr(native, "values", ()))}
            if len(told.get(id(variable), ())) > 1 or copies & elsewhere:
                raise NotUnderstood(
                    f"the weight {variable_path(variable)!r} is read in several layers, or "
                    "outside of the one that holds it"
                )


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
