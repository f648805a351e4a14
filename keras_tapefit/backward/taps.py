"""Taps: what layers return in a forward pass, and the gradients that come back there.

While taps are open, in this thread, the `call` of a layer hands on an identity of what it
returns, whose gradient passes by here. Nothing is changed otherwise: `call` is wrapped on
the layers of one model only, and only as long as some thread has taps open for them.

Private names used here: `Operation._remat_mode`, which only layers have before Keras 3.15,
of `tensorflow.python.eager.record` `could_possibly_record`, `stop_recording` and
`record_operation`, of `tensorflow.python.ops.while_loop` the function, which
`tensorflow.python.util.tf_decorator` unwraps, and of
`keras.src.backend.common` `symbolic_scope.in_symbolic_scope`, `masking.get_keras_mask` and
`masking.set_keras_mask`. Checked with Keras 3.15.1 and TensorFlow 2.21;
`tests/backward/test_taps.py` fails when they change.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from tensorflow.python.eager import record
from tensorflow.python.ops import while_loop
from tensorflow.python.util import tf_decorator

from keras_tapefit.gradients.layers import NamedLayer


class Watcher(Protocol):
    """An object that looks at the gradients of taps, as hooks do."""

    @property
    def name(self) -> str: ...

    def _chosen_layers(self, layers: Sequence[NamedLayer]) -> list[NamedLayer]:
        """Returns the layers whose outputs are looked at."""

    @property
    def _names_layers(self) -> bool:
        """Whether these layers were asked for by name."""

    def _replaced(self, gradient: tf.Tensor, path: str, layer: Any) -> Any:
        """Returns what the gradient becomes; `None`: what it is."""


@dataclass(eq=False)
class Tap:
    """One tensor that a call of a layer returned.

    Attributes:
        path: of the layer.
        layer: the layer.
        call: the number of the call of this layer, from 0.
        value: the tensor, as the layer returned it.
        inputs: the tensors that the call was given.
        watchers: those who look at its gradient.
        passed_on: what the model computes with.
        gradients: by the `id` of a watcher, what came back to it, one tensor for each
            backward pass, without loss scale.
    """

    path: str
    layer: Any
    call: int
    value: tf.Tensor
    inputs: list[tf.Tensor]
    watchers: list[Any]
    passed_on: Any = None
    gradients: dict[int, list[tf.Tensor]] = field(default_factory=dict)

    def gradient(self, watcher: Any) -> tf.Tensor | None:
        """Returns the gradient as a watcher saw it; `None`: none came back."""
        found = self.gradients.get(id(watcher), [])
        return tf.add_n(found) if found else None


class Opened:
    """Base class of what looks at the calls of layers, in one thread, while it is open."""

    def __init__(self) -> None:
        self._place: Any = None
        self._recording = False

    @contextlib.contextmanager
    def opened(self, layers: Sequence[Any]) -> Iterator[None]:
        """Has calls of these layers, in this context and thread, go through `run`."""
        self._place, self._recording = _place(), record.could_possibly_record()
        before, _open.taps = _open.taps, [*_open.taps, self]
        try:
            with _wrapped(layers):
                yield
        finally:
            _open.taps = before

    def run(self, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a call of a layer and returns what it hands on."""
        raise NotImplementedError

    def why_not(self) -> str | None:
        """Returns what a layer runs inside of now, so that it cannot be looked at."""
        if _place() != self._place:
            return "a loop, a branch or a function of its own"
        if _remat.depth:
            return "`RematScope`, which computes it twice"
        if self._recording and not record.could_possibly_record():
            return "a function with a gradient of its own, such as `keras.remat`"
        return None


class Taps(Opened):
    """The taps of one forward pass.

    Args:
        watchers: who looks at gradients, in the order in which they get them. Where a
            layer that one of them names runs where it cannot be tapped, that is an error.
        layers: those of the model.
        replaces: whether gradients are only replaced, and none is kept.

    Attributes:
        taps: in the order in which layers returned.
        returning: the taps whose gradient came back, in the order in which it did.
        scale: by what the loss is multiplied before the backward pass; `None`: nothing.
        share: what the loss of this part counts for in that of the batch; `None`: all.
        inputs: what the forward pass was given, for who wants to look at it.
        loss: the loss, likewise.
    """

    def __init__(
        self,
        watchers: Sequence[Watcher],
        layers: Sequence[NamedLayer],
        replaces: bool = False,
    ) -> None:
        super().__init__()
        self._chosen: dict[int, tuple[str, Any, list[Watcher]]] = {}
        self._named: set[int] = set()
        for watcher in watchers:
            for path, layer in watcher._chosen_layers(layers):
                self._chosen.setdefault(id(layer), (path, layer, []))[2].append(watcher)
                if watcher._names_layers:
                    self._named.add(id(layer))
        self._replaces = replaces
        self._watchers = list(watchers)
        self._calls: dict[int, int] = {}
        self._left_out: set[int] = set()
        self._refusal: str | None = None
        self._is_open = False
        self.taps: list[Tap] = []
        self.returning: list[Tap] = []
        self.scale: Any = None
        self.share: Any = None
        self.inputs: Any = None
        self.loss: Any = None

    def open_alike(self) -> Taps | None:
        """Returns taps for the same watchers that are open in this thread, if any are.

        A second tape around the same forward pass shares them: of two identities, one after
        the other, a gradient would be replaced twice.
        """
        for each in _open.taps:
            if isinstance(each, Taps) and not each._replaces and each._is_open:
                if list(map(id, each._watchers)) == list(map(id, self._watchers)):
                    return each
        return None

    @contextlib.contextmanager
    def tapping(self) -> Iterator[Taps]:
        """Taps what layers return in this context, in this thread.

        Raises:
            ValueError: at its end, when a layer that was named could not be tapped.
        """
        self._is_open = True
        try:
            with self.opened([layer for _, layer, _ in self._chosen.values()]):
                yield self
        finally:
            self._is_open = False
        if self._refusal is not None:
            raise ValueError(self._refusal)

    def run(self, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self._taken(layer, args, kwargs, call(*args, **kwargs))

    def forget(self) -> None:
        """Forgets the gradients that came back so far."""
        self.returning.clear()
        for tap in self.taps:
            tap.gradients.clear()

    def _taken(self, layer: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
        """Returns what a layer's call hands on."""
        chosen = id(layer) in self._chosen and id(layer) not in self._left_out
        if not chosen or in_symbolic_scope():
            return outputs
        path, _, watchers = self._chosen[id(layer)]
        reason = self.why_not()
        if reason is not None:
            if id(layer) in self._named:
                # Raised later: TensorFlow's loops do not clean up after an error in them.
                self._refusal = (
                    f"The output of layer {path!r} ({type(layer).__name__}) cannot be looked "
                    f"at, for it is computed inside {reason}. Name the layer around it."
                )
            # A loop over time calls its cell once outside, which counts for nothing.
            self._left_out.add(id(layer))
            self.taps = [tap for tap in self.taps if tap.layer is not layer]
            return outputs
        number = self._calls.get(id(layer), 0)
        self._calls[id(layer)] = number + 1
        given = [v for v in keras.tree.flatten((args, kwargs)) if tf.is_tensor(v)]

        def tapped(value: Any) -> Any:
            if not isinstance(value, tf.Tensor):
                return value
            tap = Tap(path, layer, number, value, given, watchers)
            tap.passed_on = value
            if value.dtype.is_floating and watchers:
                tap.passed_on = self._watched(tap, watchers)
            if not self._replaces:
                self.taps.append(tap)
            return tap.passed_on

        return keras.tree.map_structure(tapped, outputs)

    def _watched(self, tap: Tap, watchers: Sequence[Watcher]) -> tf.Tensor:
        # Not by `tf.custom_gradient`, which in a graph keeps the graph, and with it hooks and
        # model, as long as the process lives.
        with record.stop_recording():
            passed_on = tf.identity(tap.value)
        record.record_operation(
            "Tap", [passed_on], [tap.value], lambda g: [self._received(tap, watchers, g)]
        )
        mask = get_keras_mask(tap.value)
        if mask is not None:
            set_keras_mask(passed_on, mask)
        return passed_on

    def _received(self, tap: Tap, watchers: Sequence[Watcher], upstream: Any) -> tf.Tensor:
        upstream = tf.convert_to_tensor(upstream)
        if self._is_open:
            # A gradient that the model takes itself, in the middle of its forward pass.
            return upstream
        gradient = true = self._true(upstream)
        for watcher in watchers:
            if not self._replaces:
                tap.gradients.setdefault(id(watcher), []).append(gradient)
            result = watcher._replaced(gradient, tap.path, tap.layer)
            if result is not None:
                gradient = _checked(watcher, tap, gradient, result)
        if not self._replaces and tap not in self.returning:
            self.returning.append(tap)
        return upstream if gradient is true else self._scaled(gradient, upstream.dtype)

    def _true(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns a gradient without loss scale, in float32 at least."""
        gradient = tf.cast(gradient, tf.float32) if gradient.dtype.size < 4 else gradient
        return gradient if self.scale is None else gradient / tf.cast(self.scale, gradient.dtype)

    def _scaled(self, gradient: tf.Tensor, dtype: Any) -> tf.Tensor:
        if self.scale is not None:
            gradient *= tf.cast(self.scale, gradient.dtype)
        return tf.cast(gradient, dtype)


def _checked(watcher: Any, tap: Tap, gradient: tf.Tensor, result: Any) -> tf.Tensor:
    where = f"the gradient at the output of layer {tap.path!r}"
    if isinstance(result, tf.Variable | keras.Variable):
        raise TypeError(
            f"The hook {watcher.name!r} must return a tensor, or None, for {where}. Received: "
            "a variable, such as `variable.assign(...)` gives. Assign it in a separate line."
        )
    if not (tf.is_tensor(result) or isinstance(result, np.ndarray | int | float)):
        raise TypeError(
            f"The hook {watcher.name!r} must return a tensor, or None, for {where}. "
            f"Received: {result!r} (of type {type(result).__name__})."
        )
    result = tf.cast(tf.convert_to_tensor(result), gradient.dtype)
    if not result.shape.is_compatible_with(gradient.shape):
        raise ValueError(
            f"The hook {watcher.name!r} must return {where} in its shape "
            f"{tuple(gradient.shape)}. Received: shape {tuple(result.shape)}."
        )
    return tf.ensure_shape(result, gradient.shape)


def _code(function: Any) -> Any:
    return tf_decorator.unwrap(function)[1].__code__


# What traces a function in a graph of its own, and in eager mode simply calls it; and
# `vectorized_map`, which traces it for a single example.
_APART = {*map(_code, (while_loop.while_loop, tf.cond, tf.switch_case, tf.case, tf.vectorized_map))}
# `keras.ops.cond` calls this one, which makes a branch only where the condition is a tensor.
_MAY_BRANCH = _code(tf.__internal__.smart_cond.smart_cond)


class _Open(threading.local):
    taps: list[Opened] = []  # noqa: RUF012


class _Remat(threading.local):
    depth: int = 0


_open = _Open()
_remat = _Remat()
_lock = threading.Lock()
# By the `id` of a layer: how many have it wrapped, and what its own `call` was, if any.
_wrappers: dict[int, list[Any]] = {}


def _place() -> tuple[Any, int]:
    """Returns the graph that operations go into, and in how many loops and branches it is,
    which have graphs of their own but for eager mode."""
    depth = 0
    frame: Any = sys._getframe()
    while frame is not None:
        depth += frame.f_code in _APART
        depth += frame.f_code is _MAY_BRANCH and tf.is_tensor(frame.f_locals["pred"])
        frame = frame.f_back
    return tf.compat.v1.get_default_graph(), depth


@contextlib.contextmanager
def _wrapped(layers: Sequence[Any]) -> Iterator[None]:
    """Has the `call` of layers look for open taps; several threads may, for one layer."""
    done: list[Any] = []
    try:
        for layer in layers:
            _wrap(layer)
            done.append(layer)
        yield
    finally:
        for layer in done:
            _unwrap(layer)


def _wrap(layer: Any) -> None:
    with _lock:
        if id(layer) in _wrappers:
            _wrappers[id(layer)][0] += 1
            return
        # Past Keras's attribute tracking.
        _wrappers[id(layer)] = [1, layer.__dict__.get("call")]
        layer.__dict__["call"] = _looking(layer, layer.call)


def _unwrap(layer: Any) -> None:
    with _lock:
        entry = _wrappers[id(layer)]
        entry[0] -= 1
        if entry[0]:
            return
        del _wrappers[id(layer)]
        if entry[1] is None:
            layer.__dict__.pop("call", None)
        else:
            layer.__dict__["call"] = entry[1]


def _through(opened: Opened, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: opened.run(layer, call, args, kwargs)


def _looking(layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Layers inside of one that is computed again are too.
        again = getattr(layer, "_remat_mode", None) is not None
        _remat.depth += again
        run = original
        for each in _open.taps:
            run = _through(each, layer, run)
        try:
            return run(*args, **kwargs)
        finally:
            _remat.depth -= again

    return call
