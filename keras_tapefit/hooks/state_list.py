"""State that a hook keeps in a list, one variable for each variable of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from keras_tapefit.hooks.step import current_step


class StateList(list):
    """A list of state, as long as the list of variables that `build` was given.

    Once something is frozen, the gradients of a step are fewer. Walking through both side
    by side would give a gradient the state of another variable, so that is an error.
    """

    def __iter__(self) -> Iterator[Any]:
        step = current_step()
        if step is not None and step.num_given is not None and step.num_given < len(self):
            raise ValueError(
                f"{step.hook.name!r} keeps a list of {len(self)} variables of state, and "
                f"{step.num_given} of its variables are being trained now. Make the state "
                "with `self.add_variables(variables)`, which gives `states[variable]` and "
                "works in `gradients.map(fn, states)`; or index the list by "
                "`self.place(variable)`."
            )
        return super().__iter__()


def guard(hook: Any, num_variables: int) -> None:
    """Makes `StateList`s of the lists of state that a hook made in `build`."""
    state = {id(variable) for variable in hook.variables}
    for name, value in list(vars(hook).items()):
        is_ours = name in ("_variables", "_lasting")
        if is_ours or type(value) is not list or not len(value) == num_variables > 1:
            continue
        if all(isinstance(v, keras.Variable) and id(v) in state for v in value):
            object.__setattr__(hook, name, StateList(value))
