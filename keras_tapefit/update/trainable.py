"""`trainable`, live: which variables are being trained now.

Private names used here: `Layer._trainable` and `Layer._trainable_variables`. Checked
with Keras 3.15.1; `tests/update/test_private_names.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import keras

from keras_tapefit.gradients import layers_of

_flag = attrgetter("trainable")


def trainable_candidates(model: Any) -> list[Any]:
    """Returns the variables that are trained when nothing is frozen, in Keras's order."""
    made_trainable = {id(v) for layer in layers_of(model) for v in layer._trainable_variables}
    return [v for v in model.variables if id(v) in made_trainable]


def owners(model: Any) -> dict[int, int]:
    """Returns, by the `id` of a variable, the `id` of the layer that holds it."""
    found: dict[int, int] = {}
    for layer in layers_of(model):
        for variable in layer._trainable_variables:
            found.setdefault(id(variable), id(layer))
    return found


def is_seed(variable: Any) -> bool:
    """Whether a variable is the state of a `keras.random.SeedGenerator`."""
    return variable.name == "seed_generator_state"


def seeds(model: Any) -> list[Any]:
    """Returns the state of the random numbers that a model's layers draw."""
    return [v for v in model.variables if is_seed(v)]


def recurrent_states(model: Any) -> list[Any]:
    """Returns what stateful recurrent layers carry on, which Keras does not track."""
    carrying = [v for v in layers_of(model) if isinstance(v, keras.layers.RNN) and v.stateful]
    return [state for layer in carrying for state in keras.tree.flatten(layer.states)]


class Flags:
    """The `trainable` flags of a model, read quickly.

    Args:
        model: whose layers and variables are looked up once, here.
    """

    def __init__(self, model: Any) -> None:
        self.layers = layers_of(model)
        self.candidates = trainable_candidates(model)

    def read(self) -> tuple[bool, ...]:
        """Returns all flags: two equal answers mean the same variables are trained."""
        return (*map(_flag, self.layers), *map(_flag, self.candidates))


def running_statistics(model: Any) -> list[int]:
    """Returns the places of frozen weights whose BatchNormalization keeps its statistics
    running, among `trainable_candidates(model)`."""
    running = {
        id(v)
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer._trainable
        for v in layer._trainable_variables
    }
    candidates = trainable_candidates(model)
    return [i for i, v in enumerate(candidates) if id(v) in running and not v.trainable]


def set_trainable(
    model: Any, variables: Sequence[Any], value: bool, train_bn: bool = False
) -> None:
    """Freezes or unfreezes variables, and the layers that are thereby wholly so.

    A layer of which no variable is trained now gets `trainable = False`, which is
    what puts BatchNormalization into inference mode; one of which some variable is
    trained again gets it back, and so do the layers around it.

    Args:
        model: whose variables they are.
        variables: some of `trainable_candidates(model)`.
        value: whether they are trained.
        train_bn: whether BatchNormalization stays in training mode.
    """
    chosen = {id(v) for v in variables}
    trained = {id(v) for v in model.trainable_variables}
    wanted = {
        id(v): value if id(v) in chosen else id(v) in trained for v in trainable_candidates(model)
    }
    for layer in layers_of(model):
        inside = [id(v) for v in layer.variables if id(v) in wanted]
        if chosen.intersection(inside):
            # Not through the setter, which would pass the flag on to all below.
            runs = train_bn and isinstance(layer, keras.layers.BatchNormalization)
            layer._trainable = runs or any(wanted[key] for key in inside)
    for variable in trainable_candidates(model):
        variable.trainable = wanted[id(variable)]
