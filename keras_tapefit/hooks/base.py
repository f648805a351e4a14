"""`GradientHook`: what is done to gradients between backward pass and update."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import tensorflow as tf

from keras_tapefit.gradients import (
    Gradients,
    Targets,
    deserialize_targets,
    serialize_targets,
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
from keras_tapefit.hooks.state import HookState
from keras_tapefit.hooks.step import LogEntry, Outputs, current_step

Hook = TypeVar("Hook", bound="GradientHook")


class GradientHook(HookState):
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

    _name: str | None
    _saved_name: str | None
    _is_checked: bool

    def __new__(cls: type[Hook], *args: Any, **kwargs: Any) -> Hook:
        self = super().__new__(cls)
        self._name = None
        self._saved_name = None
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
        # What a hook assigns to itself while it is built or applied is not checked.
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

    def apply(self, gradients: Gradients) -> Gradients:
        """Returns what the gradients become.

        Args:
            gradients: those of the variables being trained that `targets` selects.

        Returns:
            `Gradients` of the same variables, in the same order and shapes.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `apply(self, gradients)`.")

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
        """The part of the hook that decides a trace."""
        return self._structure

    @property
    def _watcher(self) -> Any:
        """The object that looks at the outputs of layers: the hook itself."""
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

        A later run releases the variables that were frozen when the model was saved.
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


# What every hook has, whatever its arguments.
_BOOKKEEPING = frozenset(vars(GradientHook.__new__(GradientHook)))
