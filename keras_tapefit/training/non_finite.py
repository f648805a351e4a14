"""A look at one batch: which layer's output, or gradient there, is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.backward.base import Computed
from keras_tapefit.gradients import variable_path
from keras_tapefit.gradients.layers import NamedLayer
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.hooks import locating


@dataclass(frozen=True)
class Values:
    """A summary of some values.

    Attributes:
        finite: whether all are.
        largest: the largest absolute value, of the finite ones.
        smallest: the smallest absolute value that is not 0; 0: there is none.
    """

    finite: bool
    largest: float
    smallest: float

    @staticmethod
    def of(tensor: Any) -> Values:
        """Looks at a tensor."""
        array = np.abs(np.asarray(tensor, "float64"))
        known = array[np.isfinite(array)]
        nonzero = known[known > 0]
        return Values(
            bool(np.isfinite(array).all()),
            float(known.max()) if known.size else 0.0,
            float(nonzero.min()) if nonzero.size else 0.0,
        )


@dataclass(frozen=True)
class LayerValues:
    """A row of the table: one tensor that a call of a layer returned.

    Attributes:
        layer: its path, or `"loss"`.
        output: of its output.
        gradient: of the gradient of the loss there; `None`: none comes back.
    """

    layer: str
    output: Values
    gradient: Values | None


@dataclass(frozen=True)
class NonFinite:
    """The result of `model.find_non_finite`; `print` shows it as a table.

    Attributes:
        first: where the first value is that is not finite, in words; `None`: all are.
        layers: in the order in which they returned, the loss last.
        weights: by path, the gradients of the weights.
    """

    first: str | None
    layers: tuple[LayerValues, ...]
    weights: dict[str, Values]

    def __bool__(self) -> bool:
        return self.first is not None

    def __str__(self) -> str:
        titles = ("layer", "output", "largest", "smallest", "gradient", "largest", "smallest")
        rows = [titles, *map(_cells, self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        head = "All values are finite."
        if self.first is not None:
            head = f"The first value that was not finite was {self.first}."
        bad = [path for path, values in self.weights.items() if not values.finite]
        foot = [f"Gradients that are not finite: {', '.join(bad)}."] if bad else []
        return "\n".join([head, *lines, *foot])


def _cells(row: LayerValues) -> tuple[str, ...]:
    return (row.layer, *_shown(row.output), *_shown(row.gradient))


def _shown(values: Values | None) -> tuple[str, str, str]:
    if values is None:
        return "-", "", ""
    return (
        "finite" if values.finite else "NOT",
        f"{values.largest:.3g}",
        f"{values.smallest:.3g}",
    )


class Onlooker:
    """Looks at every output and changes nothing.

    Args:
        layers: of the model.
    """

    name = "find_non_finite"
    _names_layers = False

    def __init__(self, layers: Sequence[NamedLayer]) -> None:
        self.layers = list(layers)

    def _chosen_layers(self, layers: Sequence[NamedLayer]) -> list[NamedLayer]:
        return self.layers

    def _replaced(self, gradient: tf.Tensor, path: str, layer: Any) -> Any:
        return None


def found(
    computed: Computed, onlooker: Onlooker, variables: Sequence[Any], scale: Any
) -> NonFinite:
    """Returns what a step on one batch shows.

    Args:
        computed: what the method gave, eagerly.
        onlooker: for whom the taps were open.
        variables: the weights.
        scale: the loss scale, or `None`.
    """
    layers = [layer for _, layer in onlooker.layers]
    paths = [path for path, _ in onlooker.layers]
    names = [variable_path(v) for v in variables]
    gradients = computed.gradients
    if scale is not None:
        gradients = gradients.scale(1.0 / tf.cast(scale, tf.float32))
    by_path = {variable_path(v): g for v, g in gradients.items() if g is not None}
    first, rows = None, []
    for taps in computed.taps:
        at = locating.places(taps, onlooker, layers, variables)
        bad = next((p for p in at if not np.isfinite(np.asarray(p.value, "float64")).all()), None)
        if first is None and bad is not None:
            first = locating.describe(bad, paths, names) + _of_examples(bad, taps)
        rows += list(_rows(taps, onlooker))
    weights = {path: Values.of(to_dense(g)) for path, g in by_path.items()}
    worst = [path for path, values in weights.items() if not values.finite]
    if first is None and worst:
        place = locating.Place(locating.GRADIENT, names.index(worst[0]))
        first = locating.describe(place, paths, names)
    return NonFinite(first, tuple(rows), weights)


def _rows(taps: Any, onlooker: Onlooker) -> Iterator[LayerValues]:
    for tap in taps.taps:
        if tap.value.dtype.is_floating:
            gradient = tap.gradient(onlooker)
            name = f"{tap.path}, call {tap.call}" if tap.call else tap.path
            back = None if gradient is None else Values.of(gradient)
            yield LayerValues(name, Values.of(tap.value), back)
    yield LayerValues("loss", Values.of(taps.loss), None)


def _of_examples(place: locating.Place, taps: Any) -> str:
    values = [v for v in keras.tree.flatten(taps.inputs) if v is not None]
    size, shape = values[0].shape[0], place.value.shape
    if not shape.rank or shape[0] != size or place.kind in (locating.WEIGHT, locating.LOSS):
        return ""
    array = np.asarray(place.value, "float64").reshape(size, -1)
    rows = np.flatnonzero(~np.isfinite(array).all(axis=1))
    return f", {locating.in_words(rows[: locating.NUM_EXAMPLES].tolist(), len(rows))} of the batch"
