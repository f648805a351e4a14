"""The state that a hook keeps for the variables of a model, and how it is built."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras

from keras_tapefit.gradients import ByVariable, Targets, variable_path
from keras_tapefit.gradients.targets import matching
from keras_tapefit.hooks.arguments import numbers
from keras_tapefit.hooks.state_list import guard

State = TypeVar("State", bound="HookState")


class HookState:
    """The part of a `GradientHook` that knows its model and keeps state."""

    targets: Targets = None
    name: Any
    _number_variables: dict[str, keras.Variable]
    _variables: list[keras.Variable]
    _lasting: list[keras.Variable]
    _structure: int
    _built_for: list[int] | None
    _model_variables: list[Any] | None
    _positions: list[int]
    _places: dict[int, int]
    _units: Callable[[Any], Any] | None
    _owners: Callable[[Any], Any] | None
    _registered_name: str | None
    _left: list[Any] | None
    _is_building: bool = False

    def __new__(cls: type[State], *args: Any, **kwargs: Any) -> State:
        self = super().__new__(cls)
        # Made here, so that a subclass may assign numbers before `super().__init__`.
        self._number_variables = {}
        self._variables = []
        self._lasting = []
        self._structure = 0
        self._built_for = None
        self._model_variables = None
        self._positions = []
        self._places = {}
        self._units = None
        self._owners = None
        self._registered_name = None
        self._left = None
        return self

    @property
    def variables(self) -> list[keras.Variable]:
        """The hook's state, in the order in which it was added."""
        return list(self._variables)

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the hook's state; called once, before the first step.

        Args:
            variables: the model's trainable variables that `targets` selects, frozen
                ones included.
        """

    def add_variable(
        self,
        shape: Sequence[int] = (),
        initializer: Any = "zeros",
        dtype: str = "float32",
        name: str | None = None,
        *,
        kept_when_skipped: bool = False,
    ) -> keras.Variable:
        """Adds a variable of state; to be called in `build`.

        State is saved with the model, and put back when a step is skipped.

        Args:
            shape: of the variable.
            initializer: a Keras initializer, its name, or an array of `shape`.
            dtype: of the variable.
            name: of the variable.
            kept_when_skipped: whether what a skipped step wrote stays, as a count of
                skipped steps must.

        Returns:
            A variable that is not trainable and has one copy per replica, all equal.

        Raises:
            RuntimeError: when it is called elsewhere than in `build`.
        """
        if not self._is_building:
            raise RuntimeError(
                f"`add_variable` can be called only in `build`: state is made once, before "
                f"the first step. Move the call from where it is into "
                f"`build(self, variables)` of {type(self).__name__}, which the model calls."
            )
        variable = keras.Variable(
            initializer,
            shape=None if hasattr(initializer, "shape") else tuple(shape),
            dtype=dtype,
            trainable=False,
            autocast=False,
            aggregation="none",
            name=name or f"variable_{len(self._variables)}",
        )
        self._variables.append(variable)
        if kept_when_skipped:
            self._lasting.append(variable)
        return variable

    def add_variables(
        self,
        variables: Sequence[Any],
        initializer: Any = "zeros",
        dtype: str = "float32",
        name: str = "variable",
    ) -> ByVariable:
        """Adds a variable of state for each variable of the model; to be called in `build`.

        `build` gets all variables that the hook is for, `apply` the gradients of those
        being trained now: with this, the two cannot be mixed up.

        Args:
            variables: those that `build` was given.
            initializer: a Keras initializer or its name.
            dtype: of the state.
            name: of the state, with a number for each variable.

        Returns:
            The state of each variable, of its shape: `states[variable]`. As it is, it may
            be passed to `gradients.map(fn, states)`.

        Example:

        ```python
        class Smoothing(hooks.GradientHook):
            def build(self, variables):
                self.averages = self.add_variables(variables, name="average")

            def apply(self, gradients):
                def smooth(gradient, average):
                    average.assign(0.9 * average + 0.1 * gradient)
                    return average.value

                return gradients.map(smooth, self.averages)
        ```
        """
        if variables and [self.place(v) for v in variables] != list(range(len(self._places))):
            raise ValueError(
                "`add_variables` makes state for all variables that `build` was given, in "
                f"their order. Received: {len(variables)} of {len(self._places)} variables."
            )
        states = [
            self.add_variable(tuple(v.shape), initializer, dtype, f"{name}_{i}")
            for i, v in enumerate(variables)
        ]
        return ByVariable(states, self.place)

    def unit(self, variable: Any) -> Any:
        """Returns the `gradients.units.Unit` of a variable of this hook's model."""
        if self._units is None:
            raise RuntimeError(f"`unit` can be used once {self.name!r} is being built.")
        return self._units(variable)

    def layer(self, variable: Any) -> Any:
        """Returns what distinguishes the layers that hold the model's variables.

        Two variables with equal answers are held by one layer: the innermost one, so
        the cell of a recurrent layer, or the projections of an attention layer. A bare
        variable is alone.
        """
        if self._owners is None:
            raise RuntimeError(f"`layer` can be used once {self.name!r} is being built.")
        return self._owners(variable)

    def place(self, variable: Any) -> int:
        """Returns the place of a variable among those that `build` was given.

        Raises:
            ValueError: when it is none of them.
        """
        place = self._places.get(id(variable))
        if place is None:
            raise ValueError(
                f"{self.name!r} keeps something for each trainable variable of the model, "
                f"and {variable_path(variable)!r} is not one of them. Make it an attribute "
                "of the model, or give the hook `targets`, such as '*', that leave it out."
            )
        return place

    @property
    def _kept_when_skipped(self) -> list[keras.Variable]:
        """The state that a skipped step keeps."""
        return self._lasting

    def _begin_anew(self) -> None:
        self._structure += 1
        self._built_for = None
        self._variables, self._lasting = [], []

    def _leave(self) -> None:
        """Lets go of the model, whose list the hook is taken out of; its state stays."""
        self._registered_name = self._units = self._owners = None
        if self._model_variables is not None:
            self._left = [weakref.ref(variable) for variable in self._model_variables]
            self._model_variables = None

    def _is_back(self, variables: Sequence[Any]) -> bool:
        """Whether these are the variables that the hook was built for, and no others."""
        if self._left is not None:
            if any(ref() is not v for ref, v in zip(self._left, variables, strict=True)):
                return False
            self._model_variables, self._left = list(variables), None
        return True

    def _known_variables(self) -> list[Any] | None:
        if self._left is None:
            return self._model_variables
        known = [ref() for ref in self._left]
        return None if any(variable is None for variable in known) else known

    def _prepare(
        self,
        variables: Sequence[Any],
        units: Callable[[Any], Any],
        owners: Callable[[Any], Any],
    ) -> None:
        """Builds the hook for a model's trainable variables, once."""
        identity = [id(v) for v in variables]
        if self._built_for == identity and self._is_back(variables):
            self._units, self._owners = units, owners
            for number in numbers(type(self)):
                number.make_variable(self)
            return
        before = dict(vars(self))
        try:
            self._is_building = True
            self._positions = matching(self.targets, variables)
            self._places = {identity[p]: place for place, p in enumerate(self._positions)}
            self._built_for = identity
            self._model_variables, self._left = list(variables), None
            self._units = units
            self._owners = owners
            self._variables, self._lasting = [], []
            for number in numbers(type(self)):
                number.make_variable(self)
            with keras.name_scope(self.name):
                self.build([variables[i] for i in self._positions])
            guard(self, len(self._positions))
        except BaseException:
            # Undone as a whole: the cause may be fixed before the next step.
            vars(self).clear()
            vars(self).update(before)
            raise
        self._is_building = False
