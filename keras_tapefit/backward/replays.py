"""Layers of which nothing else is known, run again on each example.

Private names used here: `Layer._get_call_context`, and of `keras.src.backend.common.masking`
`get_keras_mask` and `set_keras_mask`. Checked with Keras 3.15.1 and TensorFlow 2.21;
`tests/backward/test_replays.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

from keras_tapefit.backward.weight_gradients import WeightGradient, Whole
from keras_tapefit.gradients.norms import wide


class Replay:
    """A call of a layer that can be run again with other values.

    Args:
        layer: the layer, whose `call` is running.
        args: what it was given.
        kwargs: likewise.

    Attributes:
        layer: as given.
        tensors: that it was given, and their masks; the first axis is the batch.
    """

    def __init__(self, layer: Any, args: Any, kwargs: Any) -> None:
        self.layer = layer
        # Sublayers see it, whether or not this layer takes it itself.
        training = layer._get_call_context().get_value("training")
        self._arguments = (args, {**kwargs, "training": training})
        self.tensors: list[Any] = []
        for value in keras.tree.flatten(self._arguments):
            if _has_rows(value):
                mask = get_keras_mask(value)
                self.tensors += [value] if mask is None else [value, mask]

    def run(self, values: Sequence[tf.Tensor]) -> list[Any]:
        """Runs the call with these values of `tensors`, and returns the tensors it returns."""
        left = iter(values)

        def other(value: Any) -> Any:
            if not _has_rows(value):
                return value
            result = next(left)
            if get_keras_mask(value) is not None:
                set_keras_mask(result, next(left))
            return result

        args, kwargs = keras.tree.map_structure(other, self._arguments)
        return list(filter(is_floating, keras.tree.flatten(self.layer(*args, **kwargs))))

    def why_not(self) -> str | None:
        """Returns what of this call depends on more than its tensors and the weights.

        It is tried on one example, in a graph that is never run.
        """
        variables = self.layer.variables
        changed: list[bool] = []

        def run(values: list[tf.Tensor], weights: list[tf.Tensor]) -> Any:
            with keras.StatelessScope(list(zip(variables, weights, strict=True))) as scope:
                before = [scope.get_current_value(v) for v in variables]
                outputs = self.run(values)
                after = [scope.get_current_value(v) for v in variables]
            changed[:] = [a is not b for a, b in zip(before, after, strict=True)]
            return outputs

        values = [tf.TensorSpec([1, *v.shape[1:]], v.dtype) for v in self.tensors]
        weights = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
        try:
            traced = tf.function(run, autograph=False).get_concrete_function(values, weights)
        except Exception as error:
            return f"cannot be run on one example: {error}"
        if any(changed):
            return "changes variables or draws random numbers"
        # A constant of its own is none of these.
        captured = any(map(tf.is_symbolic_tensor, traced.captured_inputs))
        if captured or any(o.op_def.is_stateful for o in traced.graph.get_operations()):
            return "depends on more than what it is given and its weights"
        if any(v.shape.rank is None or v.shape[:1] != [1] for v in traced.outputs):
            return "returns something else than a row for each example"
        return None


def is_floating(value: Any) -> bool:
    """Whether a value is a tensor that gradients come back to."""
    return isinstance(value, tf.Tensor) and value.dtype.is_floating


def _has_rows(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and value.shape.rank != 0


def of_replays(
    layer: Any, calls: Sequence[tuple[Replay, Sequence[tf.Tensor | None]]]
) -> Iterator[tuple[Any, WeightGradient]]:
    """Yields each weight of a layer, those of layers in it too, with its gradients.

    Args:
        layer: the layer.
        calls: its calls, and the gradient at each of their outputs.
    """
    variables = layer.trainable_variables
    known: list[bool] = []

    def one(parts: Any) -> list[tf.Tensor]:
        sources = [tf.identity(v.value) for v in variables]
        outputs: list[tf.Tensor] = []
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            with keras.StatelessScope(list(zip(variables, sources, strict=True))):
                for (replay, gradients), (values, _) in zip(calls, parts, strict=True):
                    found = replay.run([value[None] for value in values])
                    outputs += _there(found, gradients)
        given = [gradient[None] for _, found in parts for gradient in found]
        result = tape.gradient(outputs, sources, given)
        known[:] = [g is not None for g in result]
        return [tf.convert_to_tensor(g) for g in result if g is not None]

    elements = [(replay.tensors, _there(found, found)) for replay, found in calls]
    rows = iter(for_each(one, elements))
    for variable, there in zip(variables, known, strict=True):
        if there:
            yield variable, Whole([wide(next(rows))], [int(n) for n in variable.shape])


def _there(values: Sequence[Any], gradients: Sequence[Any]) -> list[Any]:
    """Returns those of some values to which a gradient came back."""
    return [v for v, g in zip(values, gradients, strict=True) if g is not None]


class _NotVectorised(Exception):
    pass


def for_each(function: Callable[[Any], Any], elements: Any) -> Any:
    """Returns what a function returns for each example, stacked.

    Vectorised; where TensorFlow 2.21 fails at that, one after the other.

    Args:
        function: of one example.
        elements: a structure of tensors, whose first axis is the batch.
    """
    signature: list[Any] = []

    def checked(element: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        result = function(element)
        signature[:] = [tf.nest.map_structure(tf.type_spec_from_value, result)]
        if _fails_vectorised(graph.get_operations()[before:], tf.nest.flatten(element)):
            raise _NotVectorised
        return result

    try:
        return tf.vectorized_map(checked, elements, warn=False)
    except _NotVectorised:
        return tf.map_fn(function, elements, fn_output_signature=signature[0])


def _fails_vectorised(operations: list[Any], element: list[Any]) -> bool:
    """Whether TensorFlow may fail to vectorise some operations.

    A product of what varies and what does not, of rank three, becomes one of rank four, which
    ends the process in oneDNN; a convolution with groups and a loop raise errors, the latter
    in XLA only, or where a gradient is 0. Functions, as loops have them, are not looked into.
    """
    varying = {value.name for value in element}
    for operation in operations:
        varies = [value.name in varying for value in operation.inputs]
        if any(varies):
            varying.update(value.name for value in operation.outputs)
        if operation.type.startswith("BatchMatMul") and any(varies) and not all(varies):
            return True
        if operation.type == "Conv2DBackpropFilter":
            axis = 1 if operation.get_attr("data_format") == b"NCHW" else -1
            if operation.inputs[0].shape[axis] != operation.outputs[0].shape[2]:
                return True
        if any(a.HasField("func") or a.list.func for a in operation.node_def.attr.values()):
            return True
    return False
