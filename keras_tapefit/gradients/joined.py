"""Many small tensors as one vector, for what is done to all their elements alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_tapefit.gradients.xla import is_in_xla

# Of the elements of a tensor, beyond which the copy costs more than an operation does.
_SMALL = 2**12


class Joined(NamedTuple):
    """Gradients, the small ones of a type joined into one vector.

    Attributes:
        pieces: the vectors, and the gradients that are not small, or sparse.
        members: of each piece, the positions of the gradients that it consists of.
        shapes: of all gradients; `None` for a sparse one.
    """

    pieces: list[Any]
    members: list[list[int]]
    shapes: list[Any]

    @classmethod
    def of(cls, gradients: Sequence[Any]) -> Joined:
        """Joins gradients, of any types and shapes; none is `None`."""
        members: dict[Any, list[int]] = {}
        shapes = [None if isinstance(g, tf.IndexedSlices) else g.shape for g in gradients]
        for position, (gradient, shape) in enumerate(zip(gradients, shapes, strict=True)):
            # Not the type itself, which is equal to a number.
            kind = gradient.dtype.name if shape is not None and _is_small(shape) else position
            members.setdefault(kind, []).append(position)
        pieces = [
            gradients[places[0]] if len(places) == 1 else _vector([gradients[p] for p in places])
            for places in members.values()
        ]
        return cls(pieces, list(members.values()), shapes)

    def with_pieces(self, pieces: Sequence[Any]) -> Joined:
        """Returns the same with other pieces of the same shapes."""
        return self._replace(pieces=list(pieces))

    def divided(self) -> list[Any]:
        """Returns the gradients, in order."""
        found: list[Any] = [None] * len(self.shapes)
        for piece, places in zip(self.pieces, self.members, strict=True):
            shapes = [self.shapes[place] for place in places]
            parts = [piece]
            if len(places) > 1:
                flat = tf.split(piece, [shape.num_elements() for shape in shapes])
                parts = [_shaped(part, shape) for part, shape in zip(flat, shapes, strict=True)]
            for part, place in zip(parts, places, strict=True):
                found[place] = part
        return found


def _is_small(shape: tf.TensorShape) -> bool:
    """Whether tensors of this shape are worth joining."""
    size = shape.num_elements()
    # XLA makes one program of all of them anyway.
    return size is not None and size <= _SMALL and not is_in_xla()


def _vector(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat([_shaped(gradient, [-1]) for gradient in gradients], 0)


def _shaped(tensor: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    return tensor if len(tensor.shape) == len(shape) == 1 else tf.reshape(tensor, shape)
