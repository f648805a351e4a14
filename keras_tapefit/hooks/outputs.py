"""Hooks on the outputs of layers: the gradients that flow back through them."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.layers import NamedLayer
from keras_tapefit.gradients.norms import joint_norm
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.step import Outputs


class OutputHook(GradientHook):
    """Base class of hooks on the outputs of layers.

    Args:
        layers: a layer, a glob on its path, such as `"encoder/*"`, or a list of these.
            The path is made of names from the outside in. `None`: all layers that are no
            model themselves.
        name: the hook's name.
    """

    def __init__(self, layers: Any = None, name: str | None = None) -> None:
        super().__init__(name=name)
        for layer in _as_list(layers):
            if not isinstance(layer, str | keras.layers.Layer):
                raise TypeError(
                    "`layers` must be a layer, a glob on its path, or a list of these. "
                    f"Received: {layer!r} (of type {type(layer).__name__})."
                )
        self.layers = layers
        self._paths: dict[int, str] = {}

    def apply(self, gradients: Gradients) -> Gradients:
        return gradients

    @property
    def _watches_outputs(self) -> bool:
        return True

    @property
    def _names_layers(self) -> bool:
        return self.layers is not None

    def _chosen_layers(self, layers: Sequence[NamedLayer]) -> list[NamedLayer]:
        if self.layers is None:
            return [(path, layer) for path, layer in layers if _is_plain_layer(layer)]
        chosen: dict[int, NamedLayer] = {}
        for wanted in _as_list(self.layers):
            found = [(p, layer) for p, layer in layers if _is_meant(wanted, p, layer)]
            if not found:
                listed = "\n  ".join(path for path, _ in layers) or "(none)"
                shown = repr(wanted) if isinstance(wanted, str) else f"layer {wanted.name!r}"
                raise ValueError(
                    f"The hook {self.name!r} looks at {shown}, which is no layer of the "
                    f"model. Pass a layer, or a glob on one of the paths there are:\n  {listed}"
                )
            chosen.update((id(layer), (path, layer)) for path, layer in found)
        self._paths.update((key, path) for key, (path, _) in chosen.items())
        return [(path, layer) for path, layer in layers if id(layer) in chosen]

    def get_config(self) -> dict[str, Any]:
        given = self.layers
        if given is None:
            return super().get_config()
        names = [
            layer if isinstance(layer, str) else self._paths.get(id(layer), layer.name)
            for layer in _as_list(given)
        ]
        # A layer is saved by its path.
        self.__dict__["layers"] = names if isinstance(given, list | tuple) else names[0]
        try:
            return super().get_config()
        finally:
            self.__dict__["layers"] = given


def _as_list(layers: Any) -> list[Any]:
    if layers is None:
        return []
    return list(layers) if isinstance(layers, list | tuple) else [layers]


def _is_plain_layer(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.Model)


def _is_meant(wanted: Any, path: str, layer: Any) -> bool:
    if isinstance(wanted, str):
        return fnmatch.fnmatchcase(path, wanted)
    return layer is wanted


@keras.saving.register_keras_serializable("keras_tapefit")
class OutputGradient(OutputHook):
    """Calls a function with the gradient that flows back through a layer's output.

    What it returns is passed on to the layers before. For clipping in the middle of a
    network, gradient reversal, stopping a branch, or looking at saliency.

    It acts in every backward pass of the training: in the built-in step, in
    `compute_gradients`, and in a custom step that uses `gradient_tape`. A layer that is
    called several times has a gradient for each call, and one that returns several tensors
    for each of them. Of micro-batches, accumulated steps and replicas each has its own
    examples, and the loss is that of a micro-batch or step; `ProjectedConflicts` has a
    backward pass for each task. Layers inside a recurrent layer's loop or a `RematScope`
    cannot be named, and `PerExampleClipping` is refused.

    Formula: with `g = ∂L/∂h` of a layer's output `h`: `g ← fn(g, layer)`.

    Reference: Ganin and Lempitsky, 2015, "Unsupervised domain adaptation by
    backpropagation", arXiv:1409.7495, for `fn(g, layer) = −λg`.

    Args:
        fn: takes `(gradient, layer)`, the gradient of the output's shape `[batch, ...]`,
            without loss scale and in float32 at least, and returns a tensor of that shape,
            or `None` to leave the gradient as it is. To be saved with a model it must be
            registered with `keras.saving.register_keras_serializable`.
        layers: a layer, a glob on its path, such as `"encoder/*"`, or a list of these. The
            path is made of names from the outside in. `None`: all layers that are no model
            themselves.
        name: the hook's name.

    Raises:
        TypeError: when `fn` cannot be called with two arguments, or returns no tensor.
        ValueError: while training, when `layers` matches nothing, or `fn` returns another
            shape.

    Example:

    ```python
    model.register_gradient_hook(hooks.OutputGradient(lambda g, layer: -0.1 * g, "encoder"))
    ```
    """

    def __init__(
        self, fn: Callable[[tf.Tensor, Any], Any], layers: Any = None, name: str | None = None
    ) -> None:
        if not callable(fn):
            raise TypeError(f"`fn` must be a function of `(gradient, layer)`. Received: fn={fn!r}.")
        _check_takes_two(fn)
        super().__init__(layers=layers, name=name)
        self.fn = fn

    @property
    def _replaces_outputs(self) -> bool:
        return True

    def _replaced(self, gradient: tf.Tensor, path: str, layer: Any) -> Any:
        result = self.fn(gradient, layer)
        if self._gate is None or not tf.is_tensor(result):
            return result
        return tf.where(self._gate.is_active(), tf.cast(result, gradient.dtype), gradient)


def _check_takes_two(fn: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(fn)
    except ValueError:  # of some functions that are not written in Python
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(
            "`fn` is called with two arguments, `(gradient, layer)`. "
            f"Received: {fn!r}, which takes {signature}."
        ) from None


@keras.saving.register_keras_serializable("keras_tapefit")
class OutputMonitor(OutputHook):
    """Logs the gradients at layer outputs, and the share of dead units, layer by layer.

    The gradient of a weight is that of the output times the input; where a network
    vanishes or explodes shows at the outputs more plainly. A unit whose output is 0 for
    the whole batch passes nothing back, and learns nothing from it.

    The epoch means are log entries; a callback such as `GradientHistory` has them of every
    step under the same names, `GradientTensorBoard` as tags, and
    `plots.gradient_flow(history, of="outputs")` draws them. It looks once a step, before
    other hooks run, and sees the gradients as the hooks on outputs before it in the list
    left them. A unit is one place on the last axis, or on that of the channels.

    Formula: `‖∂L/∂h‖` over all calls and tensors of the layer and all examples; and the
    share of places on the axis of units at which `h` is 0 everywhere.

    Reference: Glorot and Bengio, 2010, "Understanding the difficulty of training deep
    feedforward neural networks", PMLR 9; Lu et al., 2019, "Dying ReLU and initialization",
    arXiv:1903.06733.

    Args:
        layers: a layer, a glob on its path, such as `"encoder/*"`, or a list of these. The
            path is made of names from the outside in. `None`: all layers that are no model
            themselves.
        name: the hook's name. The log entries are `output_gradient_norm/<path>` and
            `output_dead_units/<path>`, or `<name>_gradient_norm/<path>` and
            `<name>_dead_units/<path>` when a name is given.

    Raises:
        TypeError: when `layers` is of the wrong type.
        ValueError: while training, when `layers` matches nothing.

    Example:

    ```python
    model.compile("adam", "mse", gradient_hooks=[hooks.OutputMonitor()])
    ```
    """

    @property
    def _entry(self) -> str:
        return "output" if self._name is None else self._name

    def _recorded_entries(self, layers: Sequence[NamedLayer]) -> list[str]:
        chosen = self._chosen_layers(layers)
        kinds = (f"{self._entry}_gradient_norm", f"{self._entry}_dead_units")
        return [f"{kind}/{path}" for kind in kinds for path, _ in chosen]

    def _see_outputs(self, outputs: Outputs) -> None:
        squares: dict[str, list[tf.Tensor]] = {}
        alive: dict[str, list[tf.Tensor]] = {}
        for tap, taps in outputs.of(self):
            if not tap.value.dtype.is_floating:
                continue
            gradient = tap.gradient(self)
            square = tf.zeros((), tf.float64)
            if gradient is not None:
                square = tf.square(tf.cast(joint_norm([gradient]), tf.float64))
                if taps.share is not None:
                    square *= tf.square(tf.cast(taps.share, tf.float64))
            squares.setdefault(tap.path, []).append(square)
            axis = _axis_of_units(tap)
            if axis is not None:
                others = [i for i in range(tap.value.shape.rank) if i != axis]
                alive.setdefault(tap.path, []).append(tf.reduce_any(tap.value != 0, others))
        if not squares:
            return
        total = outputs.sum_over(tf.stack([tf.add_n(found) for found in squares.values()]))
        for path, norm in zip(squares, tf.unstack(tf.sqrt(total)), strict=True):
            self._report_of(path, "gradient_norm", norm)
        for path, share in self._dead(alive, outputs).items():
            self._report_of(path, "dead_units", share)

    def _report_of(self, path: str, kind: str, value: tf.Tensor) -> None:
        name = f"{self._entry}_{kind}/{path}"
        self.report(name, value)

    def _dead(self, alive: dict[str, list[tf.Tensor]], outputs: Outputs) -> dict[str, tf.Tensor]:
        """Returns by layer the share of units that were 0 in all calls, on all replicas."""
        flags: dict[tuple[str, int], tf.Tensor] = {}
        for path, found in alive.items():
            for flag in found:
                # Tensors of one size are calls, or parts of the batch; others are outputs.
                key = path, int(flag.shape[0])
                flags[key] = flags[key] | flag if key in flags else flag
        if not flags:
            return {}
        counts = outputs.sum_over(tf.cast(tf.concat(list(flags.values()), 0), tf.float32))
        parts = tf.split(counts, [size for _, size in flags])
        dead: dict[str, list[tf.Tensor]] = {}
        for (path, _), part in zip(flags, parts, strict=True):
            dead.setdefault(path, []).append(part == 0)
        return {
            path: tf.reduce_mean(tf.cast(tf.concat(found, 0), tf.float32))
            for path, found in dead.items()
        }


def _axis_of_units(tap: Any) -> int | None:
    shape = tap.value.shape
    if shape.rank is None or shape.rank < 2:
        return None
    first = getattr(tap.layer, "data_format", None) == "channels_first"
    axis = 1 if first else shape.rank - 1
    return axis if shape[axis] is not None else None
