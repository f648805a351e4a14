"""Traces that a model shares with others like it, as its train function sees them."""

from __future__ import annotations

from typing import Any, Protocol


class SharedTraces(Protocol):
    """What `Runtime.shared` may hold; `keras_tapefit.tuning` has one."""

    def settle(self, model: Any) -> None:
        """Looks for traces of a model whose state is made, before its first step."""

    def place(self, model: Any, kind: str, flags: Any, structure: Any, iterator: Any) -> Any:
        """Returns where a trace is or is to be: a dictionary and a key.

        `None`: the model keeps it to itself.

        Args:
            model: the model.
            kind: `"train"` or `"test"`.
            flags: what is trained.
            structure: of the model's hooks.
            iterator: that the traced function is called with.
        """

    def is_user(self, model: Any) -> bool:
        """Whether it is this model's values that the shared variables hold."""


class TracedFunction:
    """Base class of what calls the right one of several traces."""

    def forget(self) -> None:
        """Lets go of all traces of the model's own."""
        raise NotImplementedError


class StaleTrace(RuntimeError):
    """A shared trace is to be made again, for a model that does not use it any more."""


def place(
    shared: SharedTraces | None, model: Any, kind: str, key: Any, iterator: Any, own: Any
) -> tuple[dict[Any, Any], Any]:
    """Returns where a trace is kept: with others' or, as `own[key]`, with the model's."""
    flags, structure = key
    found = None if shared is None else shared.place(model, kind, flags, structure, iterator)
    return (own, key) if found is None else found


def check_user(shared: SharedTraces | None, model: Any, is_shared: bool) -> None:
    """Raises `StaleTrace` inside a trace of a model whose place another one took."""
    if is_shared and shared is not None and not shared.is_user(model):
        raise StaleTrace
