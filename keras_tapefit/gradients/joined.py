"""Many small tensors as one, for what is done to all their elements alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_tapefit.gradients.xla import is_in_xla

# Of the elements of a tensor, beyond which the copy costs more than an operation does.
_SMALL = 2**12


class Joined(NamedTuple):
    """Gradients, the small ones joined along their first axis where they are alike otherwise.

    Attributes:
        pieces: the joined gradients, and those that stay alone.
        members: of each piece, the positions of the gradients that it consists of.
        sizes: of each piece, the lengths of its members' first axes.
    """

    pieces: list[Any]
    members: list[list[int]]
    sizes: list[list[int]]

    @classmethod
    def of(cls, gradients: Sequence[Any]) -> Joined:
        """Joins gradients, of any types and shapes; none is `None`."""
        members: dict[Any, list[int]] = {}
        for position, gradient in enumerate(gradients):
            kind = _kind(gradient) or position
            members.setdefault(kind, []).append(position)
        groups = [[gradients[place] for place in places] for places in members.values()]
        sizes = [[g.shape[0] for g in group] if len(group) > 1 else [] for group in groups]
        pieces = [tf.concat(group, 0) if len(group) > 1 else group[0] for group in groups]
        return cls(pieces, list(members.values()), sizes)

    def with_pieces(self, pieces: Sequence[Any]) -> Joined:
        """Returns the same with other pieces of the same shapes."""
        return self._replace(pieces=list(pieces))

    def divided(self) -> list[Any]:
        """Returns the gradients, in order."""
        found: dict[int, Any] = {}
        for piece, places, sizes in zip(self.pieces, self.members, self.sizes, strict=True):
            parts = tf.split(piece, sizes) if sizes else [piece]
            found.update(zip(places, parts, strict=True))
        return [found[place] for place in sorted(found)]


def _kind(gradient: Any) -> tuple[str, tuple[int, ...]] | None:
    """Returns what is equal for gradients that are joined; `None`: it stays alone."""
    # XLA makes one program of all of them anyway.
    if isinstance(gradient, tf.IndexedSlices) or not gradient.shape.rank or is_in_xla():
        return None
    size = gradient.shape.num_elements()
    is_small = size is not None and size <= _SMALL
    return (gradient.dtype.name, tuple(gradient.shape[1:])) if is_small else None
