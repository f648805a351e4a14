"""Which weights make up one unit, by the class of their layer: never by rank alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
from keras import layers

from keras_tapefit.gradients.layers import layers_of


class Unit(NamedTuple):
    """How a variable divides into units.

    Args:
        axes: the axes to reduce over to get one number per unit, ascending. All of
            them where the whole tensor is one unit.
        is_kernel: whether `axes` are the fan-in of weights that multiply an input.
            False for biases, normalization weights and embeddings.
    """

    axes: tuple[int, ...]
    is_kernel: bool = False


Axes = tuple[int, ...]
UnitAxesFunction = Callable[[Any], Mapping[str, Axes | Unit]]

# By class and attribute, the axes that tell units apart; the others are reduced over.
# What is not named here is one unit. An embedding's unit is a token, by convention.
# The cells of ConvLSTM have no public class: the fallback is right for their kernels.
_KEPT_AXES: dict[Any, dict[str, Axes]] = {
    layers.Dense: {"kernel": (-1,)},
    layers.Conv1D: {"kernel": (-1,)},
    layers.Conv2D: {"kernel": (-1,)},
    layers.Conv3D: {"kernel": (-1,)},
    layers.Conv1DTranspose: {"kernel": (-2,)},
    layers.Conv2DTranspose: {"kernel": (-2,)},
    layers.Conv3DTranspose: {"kernel": (-2,)},
    layers.DepthwiseConv1D: {"kernel": (-2, -1)},
    layers.DepthwiseConv2D: {"kernel": (-2, -1)},
    layers.SeparableConv1D: {"depthwise_kernel": (-2, -1), "pointwise_kernel": (-1,)},
    layers.SeparableConv2D: {"depthwise_kernel": (-2, -1), "pointwise_kernel": (-1,)},
    layers.SimpleRNNCell: {"kernel": (-1,), "recurrent_kernel": (-1,)},
    layers.LSTMCell: {"kernel": (-1,), "recurrent_kernel": (-1,)},
    layers.GRUCell: {"kernel": (-1,), "recurrent_kernel": (-1,)},
    layers.Embedding: {"embeddings": (0,), "reverse_embeddings": (-1,)},
}


def _einsum_axes(layer: Any) -> dict[str, Axes]:
    operands, outputs = layer.equation.split("->")
    labels = operands.split(",")[1]
    return {"kernel": tuple(i for i, x in enumerate(labels) if x not in outputs)}


# What has no fixed layout: `EinsumDense`, which attention is made of, and the classes
# that users register.
_FUNCTIONS: dict[Any, UnitAxesFunction] = {layers.EinsumDense: _einsum_axes}


def register_unit_axes(layer_class: type, fn: UnitAxesFunction) -> None:
    """Declares which axes make up a unit in a custom layer class.

    For layers whose kernels are laid out in another way than the fallback of
    `unit_axes` takes for granted. It holds for subclasses too, goes before what is
    known of the class otherwise, and replaces an earlier registration.

    Args:
        layer_class: a subclass of `keras.layers.Layer`.
        fn: takes a layer, and returns the axes to reduce over, by the name of the
            attribute that holds the variable: `{"kernel": (0,)}`. Attributes left out
            follow the fallback. A variable is a kernel where its attribute's name ends
            in `kernel`; return a `Unit` instead of the axes to say otherwise.

    Raises:
        TypeError: when `layer_class` is not a layer class or `fn` not callable.

    Example:

    ```python
    import keras
    from keras_tapefit.gradients import units

    class Transposed(keras.layers.Layer):
        def build(self, input_shape):
            self.kernel = self.add_weight(shape=(8, input_shape[-1]))

        def call(self, inputs):
            return inputs @ keras.ops.transpose(self.kernel)

    units.register_unit_axes(Transposed, lambda layer: {"kernel": (1,)})
    ```
    """
    is_layer_class = isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)
    if not is_layer_class or not callable(fn):
        raise TypeError(
            "Pass a subclass of `keras.layers.Layer`, and a function from a layer to a "
            "dict of axes by attribute name. "
            f"Received: layer_class={layer_class!r}, fn={fn!r}."
        )
    _FUNCTIONS[layer_class] = fn


def unit_axes(layer: keras.layers.Layer) -> dict[int, Unit]:
    """Returns how each variable of a layer or model divides into units.

    A unit is the weights of one weighted sum: a column of a dense kernel, a filter of
    a convolution. Biases, whatever their rank, and the weights of normalization
    layers are one unit each. In a layer of unknown class a float variable of rank 2 or
    more is taken for a kernel with its outputs last where its attribute's name ends in
    `kernel`; any other variable is one unit. `register_unit_axes` teaches more.

    A variable that several layers hold follows the first whose class is known.

    Args:
        layer: a layer or model. What is not built yet has no variables.

    Returns:
        A `Unit` by the `id` of each Keras variable in `layer.variables`. It holds as
        long as the variables live.

    Raises:
        TypeError: when `layer` is not a layer.
        ValueError: when a registered function names an attribute or an axis that the
            layer does not have.

    Example:

    ```python
    import keras
    from keras_tapefit.gradients import units

    layer = keras.layers.Conv2D(8, 3)
    layer.build((None, 32, 32, 3))
    found = units.unit_axes(layer)
    found[id(layer.kernel)]              # Unit(axes=(0, 1, 2), is_kernel=True)
    found[id(layer.bias)]                # Unit(axes=(0,), is_kernel=False)
    ```

    Reference:
        Brock et al., 2021, High-Performance Large-Scale Image Recognition Without
        Normalization, https://arxiv.org/abs/2102.06171 (its unit-wise norms)
    """
    if not isinstance(layer, keras.layers.Layer):
        raise TypeError(
            "`layer` must be a Keras layer or model. "
            f"Received: layer={layer!r} (of type {type(layer).__name__})."
        )
    known: dict[int, Unit] = {}
    guessed: dict[int, Unit] = {}
    for sublayer in layers_of(layer):
        own = _own_variables(sublayer)
        rule = _known_units(sublayer, own)
        for name, variable in own.items():
            if name in rule:
                known.setdefault(id(variable), rule[name])
            elif name.endswith("kernel") and len(variable.shape) >= 2:
                guessed.setdefault(id(variable), _unit(name, variable, kept=(-1,)))
    whole = {id(v): Unit(tuple(range(len(v.shape)))) for v in layer.variables}
    return {**whole, **guessed, **known}


def _own_variables(layer: Any) -> dict[str, Any]:
    # Not `layer.kernel`: with LoRA or int4 that is a computed tensor, the variable is
    # `_kernel`. Integers are left out, for they are packed and never have a gradient.
    return {
        name.lstrip("_"): value
        for name, value in vars(layer).items()
        if isinstance(value, keras.Variable) and keras.backend.is_float_dtype(value.dtype)
    }


def _known_units(layer: Any, own: Mapping[str, Any]) -> dict[str, Unit]:
    for cls in type(layer).__mro__:
        if cls in _FUNCTIONS:
            return _checked(layer, _FUNCTIONS[cls](layer), own) if own else {}
        if cls in _KEPT_AXES:
            kept = _KEPT_AXES[cls]
            return {n: _unit(n, own[n], kept[n]) for n in kept if n in own}
    return {}


def _unit(name: str, variable: Any, kept: Axes) -> Unit:
    rank = len(variable.shape)
    axes = tuple(i for i in range(rank) if i not in kept and i - rank not in kept)
    return Unit(axes, name.endswith("kernel"))


def _checked(
    layer: Any, found: Mapping[str, Axes | Unit], own: Mapping[str, Any]
) -> dict[str, Unit]:
    units = {}
    for name, value in found.items():
        is_kernel = name.endswith("kernel")
        unit = value if isinstance(value, Unit) else Unit(value, is_kernel)
        rank = len(own[name].shape) if name in own else 0
        if name in own and _are_axes(unit.axes, rank):
            axes = sorted({axis % rank for axis in unit.axes})
            units[name] = unit._replace(axes=tuple(axes))
        # Set but no float variable is fine: `bias=None`, or a quantized kernel.
        elif name in own or (layer.built and not hasattr(layer, name)):
            has = ", ".join(f"{n!r} of rank {len(v.shape)}" for n, v in own.items())
            raise ValueError(
                f"The unit axes registered for {type(layer).__name__} must be a tuple "
                "of axes by the name of a variable's attribute. "
                f"Received: {name!r}: {value!r}, where layer {layer.name!r} has {has}. "
                "Mend the function passed to `register_unit_axes`."
            )
    return units


def _are_axes(value: Any, rank: int) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(axis, int) and -rank <= axis < rank for axis in value
    )
