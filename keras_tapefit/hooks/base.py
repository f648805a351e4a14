"""`GradientHook`: what is done to gradients between backward pass and update."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import keras
import tensorflow as tf

from keras_tapefit.gradients import (
    ByVariable,
    Gradients,
    Targets,
    deserialize_targets,
    serialize_targets,
    variable_path,
)
from keras_tapefit.gradients.layers import NamedLayer
from keras_tapefit.gradients.targets import check_targets, matching
from keras_tapefit.hooks.arguments import (
    arguments_of,
    deserialized,
    init_arguments,
    numbers,
    plain_arguments,
    serialized,
    shown,
)
from keras_tapefit.hooks.number import Number, deserialize_number, serialize_number
from keras_tapefit.hooks.state_list import guard
from keras_tapefit.hooks.step import LogEntry, Outputs, current_step

Hook = TypeVar("Hook", bound="GradientHook")


class GradientHook:
    """Base class of gradient hooks.

    A hook gets the true gradients of a step, summed over replicas and without loss
    scale, and returns what the next hook or the optimizer receives. It runs once a
    step, in every mode that `fit` has, so `apply` must be made of TensorFlow or
    `keras.ops` operations.

    Subclasses implement `apply`, and `build` where they keep state; `after_update` and
    `on_validation` are called where a subclass implements them. A subclass whose `apply`
    calls `skip_step` sets `may_skip_steps = True`, and one that reads `loss` sets
    `uses_loss = True`.

    An argument may be assigned later, as an attribute: it is checked as in `__init__` and
    acts from the next step on. A hook in use then starts over with new state, except
    for numbers (see `Number`) and for arguments that its class names in `keeps_state`.

    `copy.copy` gives a hook with the same arguments that belongs to no model and has no
    state yet.

    Args:
        targets: the variables the hook is for: a layer, a variable, a predicate on a
            variable, a glob on `variable.path`, or a list of these. `None`: all.
        name: the hook's name in `model.gradient_hooks`; by default the class name in
            snake case.

    Raises:
        TypeError: when `targets` or `name` is of the wrong type.

    Example:

    ```python
    class SignGradient(hooks.GradientHook):
        def apply(self, gradients):
            return gradients.map(tf.sign)

    model.register_gradient_hook(SignGradient(targets="encoder/*"))
    ```
    """

    may_skip_steps: ClassVar[bool] = False
    uses_loss: bool = False
    uses_parts: ClassVar[bool] = False
    uses_step_count: bool = False
    _gate: Any = None
    keeps_state: ClassVar[tuple[str, ...]] = ()
    _target_arguments: ClassVar[tuple[str, ...]] = ("targets",)

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
    targets: Targets = None
    _name: str | None
    _registered_name: str | None
    _saved_name: str | None
    _left: list[Any] | None
    _is_building: bool = False
    _is_checked: bool

    def __new__(cls: type[Hook], *args: Any, **kwargs: Any) -> Hook:
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
        self._name = None
        self._registered_name = None
        self._saved_name = None
        self._left = None
        self._is_checked = True
        return self

    def __init__(self, targets: Targets = None, name: str | None = None) -> None:
        check_targets(targets)
        if name is not None and (not isinstance(name, str) or not name):
            raise TypeError(f"`name` must be a string. Received: name={name!r}.")
        self.targets = targets
        self._name = name

    def __setattr__(self, name: str, value: Any) -> None:
        is_new = name not in self.__dict__ or name not in plain_arguments(type(self))
        # What a hook assigns to itself while it is built or applied is its own affair.
        if is_new or self._is_building or current_step() is not None:
            object.__setattr__(self, name, value)
        elif self._registered_name is None and self._built_for is None:
            # `__init__` may not be over yet: checked when the hook is added to a list.
            object.__setattr__(self, name, value)
            self._is_checked = False
        else:
            self._assign(name, value)

    def _assign(self, name: str, value: Any) -> None:
        """Gives an argument of a hook in use another value, as if it were made with it."""
        try:
            arguments = arguments_of(self)
        except AttributeError:  # one is not kept, so no copy can be made
            object.__setattr__(self, name, value)
            self._begin_anew()
            return
        made = type(self)(**{**arguments, name: value})
        known = self._known_variables()
        if name == "targets" and known is not None:
            matching(value, known)
        kept = {number.name for number in numbers(type(self))}
        own = vars(made).keys() - _BOOKKEEPING - kept
        self.__dict__.update({key: vars(made)[key] for key in own})
        if name in self.keeps_state:
            self._structure += 1
        else:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._structure += 1
        self._built_for = None
        self._variables, self._lasting = [], []

    def _check_arguments(self) -> None:
        """Raises as `__init__` does where an argument was assigned what it refuses."""
        if not self._is_checked:
            type(self)(**arguments_of(self))
            self._is_checked = True

    def __copy__(self: Hook) -> Hook:
        arguments: dict[str, Any] = arguments_of(self)
        for argument, value in arguments.items():
            arguments[argument] = list(value) if isinstance(value, list) else value
        return type(self)(**arguments)

    def __deepcopy__(self: Hook, memo: Any) -> Hook:
        return self.__copy__()

    def __repr__(self) -> str:
        parts: list[str] = []
        seen: list[str] = []
        for argument in init_arguments(type(self)):
            value = self._name if argument == "name" else self.__dict__.get(argument)
            # Options after the name are shown where they are on.
            is_off = value is None or (value is False and "name" in seen)
            seen.append(argument)
            if not is_off:
                parts.append(f"{argument}={shown(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def name(self) -> str:
        """The hook's name: as given, or from its class, unique in its list."""
        return self._registered_name or self._name or self._default_name()

    @name.setter
    def name(self, value: Any) -> None:
        raise AttributeError(
            "The name of a hook cannot be assigned, for its state is saved under it. Pass "
            "`name` to `super().__init__`, or to `register_gradient_hook`. "
            f"Received: name={value!r}."
        )

    @classmethod
    def _default_name(cls) -> str:
        words = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", cls.__name__.lstrip("_"))
        return re.sub("([a-z])([A-Z])", r"\1_\2", words).lower()

    @property
    def watches_update(self) -> bool:
        """Whether `after_update` must be called: the class implements it."""
        return type(self).after_update is not GradientHook.after_update

    @property
    def watches_validation(self) -> bool:
        """Whether `on_validation` must be called: the class implements it."""
        return type(self).on_validation is not GradientHook.on_validation

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

    def apply(self, gradients: Gradients) -> Gradients:
        """Returns what the gradients become.

        Args:
            gradients: those of the variables being trained that `targets` selects.

        Returns:
            `Gradients` of the same variables, in the same order and shapes.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `apply(self, gradients)`.")

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

    @property
    def step(self) -> tf.Tensor:
        """Scalar int64, inside `apply`: the updates the optimizer has made so far."""
        return self._step("step").index

    @property
    def loss(self) -> tf.Tensor:
        """Scalar float32, inside `apply`: the loss of the global batch.

        For hooks with `uses_loss = True`.
        """
        loss = self._step("loss").loss
        if loss is None:
            raise RuntimeError(
                f"{self.name!r} looks at the loss, and this step has none: its class must "
                "say `uses_loss = True`, and the step must compute a loss itself instead "
                "of passing gradients to `apply_gradients`."
            )
        return loss

    def report(self, name: str, value: Any, reduction: str = "mean") -> None:
        """Adds a scalar to the logs; to be called in `apply`.

        Args:
            name: of the log entry.
            value: a scalar, this step's value. Those of skipped steps do not count.
            reduction: `"mean"` logs the mean over the epoch's steps, `"sum"` their sum.

        Raises:
            TypeError: when `name` is no string.
            ValueError: when `reduction` is neither, `value` no scalar, or the model has a
                log entry of that name already.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"`name` of a log entry must be a string. Received: name={name!r}.")
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"`reduction` must be 'mean' or 'sum'. Received: reduction={reduction!r}."
            )
        value = tf.convert_to_tensor(value)
        if value.dtype == tf.string:
            raise TypeError(f"The log entry {name!r} must be a number. Received: {value!r}.")
        value = tf.cast(value, tf.float32)
        if value.shape.rank not in (0, None):
            raise ValueError(
                f"The log entry {name!r} of hook {self.name!r} must be a scalar. "
                f"Received: a tensor of shape {tuple(value.shape)}."
            )
        self._step("report").entries.append(LogEntry(self, name, value, reduction))

    def skip_step(self, when: Any) -> None:
        """Skips the whole step, leaving no trace, where `when` is true.

        Args:
            when: a scalar bool.

        Raises:
            RuntimeError: when the class does not say `may_skip_steps = True`.
        """
        if not self.may_skip_steps:
            raise RuntimeError(
                f"{type(self).__name__} calls `skip_step`, so its class must say "
                "`may_skip_steps = True`: what a skipped step changes is put aside "
                "before the forward pass."
            )
        when = tf.reduce_any(tf.cast(tf.convert_to_tensor(when), tf.bool))
        self._step("skip_step").rejections.append(when)

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

    def after_update(self, before: Sequence[tf.Tensor], variables: Sequence[Any]) -> None:
        """Looks at, or changes, what the optimizer made of the weights.

        Runs after the update, skipped or not; `report` may be used.

        Args:
            before: the values of the hook's variables before the update.
            variables: those variables, the ones being trained, in the same order.
        """

    def on_validation(self, gradients: Gradients) -> None:
        """Looks at the gradients of a batch of `evaluate`; `report` may be used.

        A class that implements it has each of these batches go through a backward pass.

        Args:
            gradients: of the hook's variables that are being trained.
        """

    @property
    def _trace_key(self) -> Any:
        """What of the hook decides a trace."""
        return self._structure

    @property
    def _kept_when_skipped(self) -> list[keras.Variable]:
        """The state that a skipped step keeps."""
        return self._lasting

    @property
    def _watcher(self) -> Any:
        """Who looks at the outputs of layers: the hook itself."""
        return self

    @property
    def _watches_outputs(self) -> bool:
        """Whether it looks at what layers return."""
        return False

    def _chosen_layers(self, layers: Sequence[NamedLayer]) -> list[NamedLayer]:
        """Returns the layers of the model whose outputs the hook looks at."""
        return list(layers)

    @property
    def _names_layers(self) -> bool:
        """Whether the user named these layers."""
        return False

    @property
    def _replaces_outputs(self) -> bool:
        """Whether it may replace gradients at layer outputs."""
        return False

    def _replaced(self, gradient: tf.Tensor, path: str, layer: Any) -> Any:
        """Returns what the gradient at the output of a layer becomes; `None`: what it is."""

    def _see_outputs(self, outputs: Outputs) -> None:
        """Looks at what layers returned and at the gradients there; `report` may be used.

        Called once a step, before `apply`, where `_watches_outputs` is true.
        """

    def _recorded_entries(self, layers: Sequence[NamedLayer]) -> list[str]:
        """Returns the log entries that a record of the step holds too."""
        return []

    def frozen_positions(self, epoch: int, step: int) -> list[int]:
        """Positions in the model's trainable variables to be frozen now.

        Asked before each call of the train function; hooks that freeze answer.

        Args:
            epoch: of `fit`, from 0.
            step: the number of steps made so far, in all calls of `fit`. Where the
                hook says `uses_step_count = True` it is the optimizer's own count,
                without the steps that were skipped.
        """
        return []

    def held_positions(self) -> list[int]:
        """Positions that this hook has frozen, as its state says, before a first step.

        What was frozen when a model was saved is let go of in a run that begins later.
        """
        return []

    def check_state(self) -> None:
        """Looks at the state after the steps; a hook that stops `fit` raises here."""

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of `__init__`, from the attributes of the same names.

        Raises:
            AttributeError: when an argument was not kept as an attribute.
        """
        config = {}
        for argument, value in arguments_of(self).items():
            if argument in self._target_arguments:
                config[argument] = serialize_targets(value, self._known_variables())
            elif isinstance(getattr(type(self), argument, None), Number):
                config[argument] = serialize_number(value)
            else:
                config[argument] = serialized(value)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GradientHook:
        """Returns the hook that a config describes."""
        arguments = {}
        for key, value in config.items():
            if key in cls._target_arguments:
                arguments[key] = deserialize_targets(value)
            elif isinstance(getattr(cls, key, None), Number):
                arguments[key] = deserialize_number(value)
            else:
                arguments[key] = deserialized(value)
        return cls(**arguments)

    def _step(self, what: str) -> Any:
        step = current_step()
        if step is None or step.hook is not self:
            raise RuntimeError(
                f"`{what}` can be used only inside `apply` and `after_update` of {self.name!r}."
            )
        return step

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


# What every hook has, whatever its arguments.
_BOOKKEEPING = frozenset(vars(GradientHook.__new__(GradientHook)))
