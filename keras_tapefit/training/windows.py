"""The windows of a model: one for each optimizer that accumulates gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import tensorflow as tf

from keras_tapefit.update.window import Window, change_steps, window_steps


class Windows:
    """Holds the windows of a model's optimizers, each under a name that stays.

    Args:
        optimizers: returns the optimizers of the model with the names of their attributes.
        pending_of: returns what is loaded, and not given yet, for a name.
        scope: returns the scope in which variables are made.
    """

    def __init__(
        self,
        optimizers: Callable[[], list[tuple[str, Any]]],
        pending_of: Callable[[str], list[str]],
        scope: Callable[[], Any],
    ) -> None:
        self._optimizers = optimizers
        self._pending_of = pending_of
        self._scope = scope
        self._windows: dict[int, tuple[Any, Window]] = {}
        self._steps: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        # The optimizers that the model had as attributes when it was last looked at.
        self._held: list[Any] = []

    def prepare(self) -> None:
        """Makes the windows that are missing, of optimizers that are built."""
        self.forget()
        for optimizer in self._held:
            if optimizer.built:
                self._prepare(optimizer)

    def forget(self) -> None:
        """Lets go of the windows of optimizers that are no attributes of the model any more.

        What they have accumulated belongs to no update.
        """
        before, self._held = self._held, [optimizer for _, optimizer in self._optimizers()]
        for key in {id(o) for o in before} - {id(o) for o in self._held}:
            self._windows.pop(key, None)

    def _prepare(self, optimizer: Any) -> None:
        steps = window_steps(optimizer)
        known = self._windows.get(id(optimizer), (None, None))[1]
        before = self._steps.setdefault(optimizer, steps)
        if before != steps:
            if known is not None and known.leftover_steps():
                # It takes effect with the next window.
                return
            change_steps(optimizer, before, steps)
            self._steps[optimizer] = steps
            known = None
        if steps == 1:
            self._windows.pop(id(optimizer), None)
        elif known is None:
            window = Window(optimizer, steps)
            self._windows[id(optimizer)] = (optimizer, window)
            window.make_room(self._pending_of(self._name(optimizer)))

    def _name(self, optimizer: Any) -> str:
        names = {id(value): name for name, value in self._optimizers()}
        return f"window.{names.get(id(optimizer), optimizer.name)}"

    def of(self, optimizer: Any) -> Window | None:
        """Returns the window in which an optimizer's gradients accumulate, if any."""
        if id(optimizer) not in self._windows and window_steps(optimizer) > 1:
            with tf.init_scope(), self._scope():
                self._prepare(optimizer)
        return self._windows.get(id(optimizer), (None, None))[1]

    def named(self) -> Iterator[tuple[str, Window]]:
        """Yields each window with its name."""
        for optimizer, window in self._windows.values():
            yield self._name(optimizer), window

    def __contains__(self, optimizer: Any) -> bool:
        return id(optimizer) in self._windows

    def open(self) -> list[tuple[Any, Window]]:
        """Returns optimizers and windows with steps left over; waits for the device."""
        return [pair for pair in self._windows.values() if pair[1].leftover_steps()]

    def structure(self) -> tuple[Any, ...]:
        """Returns what decides the traced graph."""
        return tuple(window.structure() for _, window in self._windows.values())

    def loaded(self) -> None:
        """Makes room for what is being loaded."""
        for name, window in self.named():
            window.make_room(self._pending_of(name))
            window.loaded()
