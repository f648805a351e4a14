"""Traced functions that are kept for the case that what they are for comes back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

# Going back to one that was there before costs nothing, and a model that gets a new hook for
# each `fit` does not keep them all.
_MAX_TRACES = 16


class Traces(OrderedDict[Any, Callable[..., Any]]):
    """The functions that were used last, by what each is for."""

    def get_or_make(self, key: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """Returns the function for `key`, made where there is none."""
        if key not in self:
            self[key] = make()
            if len(self) > _MAX_TRACES:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]
