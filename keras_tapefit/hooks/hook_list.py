"""The ordered list of a model's hooks, and the handles that take them out again."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets, matching, variable_path
from keras_tapefit.gradients.targets import check_targets
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.function import as_hook
from keras_tapefit.hooks.outputs import OutputHook
from keras_tapefit.hooks.step import Outputs, Step, current_step, running


class HookList(MutableSequence[GradientHook]):
    """The gradient hooks of a model, in the order in which they are applied.

    A mutable sequence whose elements can also be named. A hook keeps its name as long as
    it is in the list, wherever it moves to, and in what is saved. What is changed after a
    `fit`, or in the middle of one, takes effect with the next step. A change that is
    refused leaves the list and all hooks as they were.

    Example:

    ```python
    model.gradient_hooks.add(hooks.GlobalNormClipping(1.0))
    model.gradient_hooks["global_norm_clipping"].max_norm = 0.5
    model.gradient_hooks.replace("global_norm_clipping", hooks.ValueClipping(0.1))
    model.gradient_hooks.remove("value_clipping")
    ```
    """

    def __init__(self, hooks: Iterable[Any] = ()) -> None:
        self._hooks: list[GradientHook] = []
        self.extend(hooks)

    def add(self, hook: Any, index: int | None = None) -> GradientHook:
        """Adds a hook, at the end or at `index`, and returns it.

        Args:
            hook: a `GradientHook`, or a function of `(gradient, variable)`.
            index: its place in the list.

        Raises:
            TypeError: when `hook` is neither.
            ValueError: when the hook is in a list already, or its name is.
        """
        hook = as_hook(hook)
        self.insert(len(self) if index is None else index, hook)
        return hook

    def insert(self, index: int, value: Any) -> None:
        place = operator.index(index)
        hook = as_hook(value)
        _check_is_free(hook)
        hook._check_arguments()
        name = _unique_name(hook, {other.name for other in self._hooks})
        self._hooks.insert(place, hook)
        _take_in(hook, name)

    def extend(self, values: Iterable[Any]) -> None:
        if not isinstance(values, Iterable):
            raise TypeError(f"Hooks must be in a list. Received: {values!r}.")
        hooks = [as_hook(value) for value in values]
        for hook in hooks:
            _check_is_free(hook)
        self._set_all([*self._hooks, *hooks])

    def register(
        self,
        hook: Any,
        targets: Targets = None,
        name: str | None = None,
        variables: Sequence[Any] = (),
    ) -> HookHandle:
        """Adds a hook at the end, with targets and a name, and returns its handle.

        Args:
            hook: a `GradientHook`, or a function of `(gradient, variable)`.
            targets: the variables it is for; `None`: as the hook says.
            name: of the hook; `None`: as the hook says.
            variables: of the model, which the targets have to match; none where they are
                not known yet.

        Raises:
            TypeError: when an argument is of the wrong type.
            ValueError: when a target matches none of `variables`, the hook is in a list
                already, or its name is.
        """
        hook = as_hook(hook)
        check_targets(targets)
        if targets is not None and hook.targets is not None:
            raise ValueError(
                f"The hook {hook.name!r} has `targets` of its own. Pass them in one place only."
            )
        if name is not None and not (isinstance(name, str) and name):
            raise TypeError(f"`name` must be a string. Received: name={name!r}.")
        if targets is not None and isinstance(hook, OutputHook):
            raise TypeError(
                f"The hook {hook.name!r} is for layers and takes no `targets`. Pass `layers` to "
                f"{type(hook).__name__} instead. Received: targets={targets!r}."
            )
        _check_is_free(hook)
        if variables:
            matching(hook.targets if targets is None else targets, variables)
        before = dict(vars(hook))
        try:
            hook._name = name or hook._name
            if targets is not None:
                hook.targets = targets
            self.append(hook)
        except Exception:
            vars(hook).update(before)
            raise
        return HookHandle(self, hook)

    def remove(self, value: Any) -> None:
        """Removes a hook, given itself or its name.

        Raises:
            KeyError: when no hook has this name.
        """
        del self[self._position(value)]

    def replace(self, old: Any, new: Any) -> GradientHook:
        """Puts a hook instead of another, which is given itself or by its name."""
        new = as_hook(new)
        position = self._position(old)
        self[position] = new
        return new

    def __len__(self) -> int:
        return len(self._hooks)

    def __iter__(self) -> Iterator[GradientHook]:
        return iter(tuple(self._hooks))

    def __contains__(self, value: Any) -> bool:
        return any(hook is value or hook.name == value for hook in self._hooks)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            key = self._position(key)
        return self._hooks[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, slice):
            hooks = [as_hook(hook) for hook in value]
            kept = self._hooks[:]
            kept[key] = hooks
            self._set_all(kept)
            return
        position = self._position(key) if isinstance(key, str) else range(len(self))[key]
        hook = as_hook(value)
        if hook is self._hooks[position]:
            return
        _check_is_free(hook)
        self._set_all([*self._hooks[:position], hook, *self._hooks[position + 1 :]])

    def __delitem__(self, key: Any) -> None:
        if isinstance(key, str):
            key = self._position(key)
        for hook in self._hooks[key] if isinstance(key, slice) else [self._hooks[key]]:
            hook._leave()
        del self._hooks[key]

    def reverse(self) -> None:
        self._hooks.reverse()

    def __repr__(self) -> str:
        lines = (f"\n  {hook.name!r}: {hook!r}," for hook in self._hooks)
        return "HookList(" + "".join(lines) + ("\n)" if self._hooks else ")")

    def __copy__(self) -> HookList:
        copies = [hook.__copy__() for hook in self._hooks]
        for copied, hook in zip(copies, self._hooks, strict=True):
            copied._saved_name = hook.name
        return HookList(copies)

    def __deepcopy__(self, memo: Any) -> HookList:
        return self.__copy__()

    def serialize(self) -> list[dict[str, Any]]:
        """Returns each hook as a config holds it, with the name that it has here."""
        return [
            {"name": hook.name, "hook": keras.saving.serialize_keras_object(hook)}
            for hook in self._hooks
        ]

    @classmethod
    def deserialize(cls, configs: Iterable[Any]) -> HookList:
        """Returns the list that `serialize` described; hooks without a name get one."""
        return cls([keras.saving.deserialize_keras_object(config) for config in configs])

    def check(self, hooks: Any) -> list[GradientHook]:
        """Returns the hooks that `set` would set, and changes nothing.

        Raises:
            TypeError: when `hooks` is no list, or holds something else.
            ValueError: when a hook is in it twice or in another list, or a name is.
        """
        checked = check_hooks(hooks)
        self._names_of(checked)
        return checked

    def set(self, hooks: Any) -> None:
        """Replaces all hooks; hooks that stay keep their state.

        Args:
            hooks: a list or tuple of hooks and functions.

        Raises:
            TypeError, ValueError: see `check`.
        """
        self._set_all(check_hooks(hooks))

    def _set_all(self, hooks: Sequence[GradientHook]) -> None:
        names = self._names_of(hooks)
        stay = {id(hook) for hook in hooks}
        for hook in self._hooks:
            if id(hook) not in stay:
                hook._leave()
        for hook, name in zip(hooks, names, strict=True):
            _take_in(hook, name)
        self._hooks = list(hooks)

    def _names_of(self, hooks: Sequence[GradientHook]) -> list[str]:
        """Returns the names that hooks will have in the list."""
        if len({id(hook) for hook in hooks}) < len(hooks):
            raise ValueError("A hook can be in the list of hooks only once.")
        stay = {id(hook) for hook in self._hooks}
        strangers = [h for h in hooks if id(h) not in stay and h._registered_name]
        if strangers:
            raise ValueError(
                f"The hook {strangers[0].name!r} belongs to another model already. "
                "Remove it there first, or make another."
            )
        # A hook that stays keeps its name: its state is saved under it.
        names = {id(hook): hook.name for hook in hooks if id(hook) in stay}
        # So do hooks that come from a file, whatever stands before them.
        for hook in sorted(hooks, key=lambda hook: hook._saved_name is None):
            if id(hook) not in stay:
                hook._check_arguments()
                names[id(hook)] = _unique_name(hook, set(names.values()))
        return [names[id(hook)] for hook in hooks]

    def _position(self, key: Any) -> int:
        for position, hook in enumerate(self._hooks):
            if hook is key or hook.name == key:
                return position
        names = ", ".join(repr(hook.name) for hook in self._hooks) or "(none)"
        raise KeyError(f"No hook {key!r}. The hooks are: {names}.")

    @property
    def may_skip_steps(self) -> bool:
        """Whether any of the hooks is a gate."""
        return any(hook.may_skip_steps for hook in self._hooks)

    @property
    def uses_loss(self) -> bool:
        """Whether any of the hooks looks at the loss."""
        return any(hook.uses_loss for hook in self._hooks)

    @property
    def uses_parts(self) -> bool:
        """Whether any of the hooks looks at the gradients of parts of the batch."""
        return any(hook.uses_parts for hook in self._hooks)

    @property
    def watches_update(self) -> bool:
        """Whether any of the hooks looks at the update, or changes it."""
        return any(hook.watches_update for hook in self._hooks)

    @property
    def watches_validation(self) -> bool:
        """Whether any of the hooks looks at the gradients of validation batches."""
        return any(hook.watches_validation for hook in self._hooks)

    def undone_variables(self) -> list[Any]:
        """Returns the state that a rejected step must not change."""
        lasting = {id(v) for hook in self._hooks for v in hook._kept_when_skipped}
        return [v for hook in self._hooks for v in hook.variables if id(v) not in lasting]

    def structure(self) -> tuple[tuple[GradientHook, Any], ...]:
        """Returns what decides the traced graph: two equal ones share a trace."""
        return tuple((hook, hook._trace_key) for hook in self._hooks)

    def prepare(
        self,
        variables: Sequence[Any],
        units: Callable[[Any], Any],
        owners: Callable[[Any], Any] = id,
    ) -> None:
        """Builds the hooks that are not built yet for a model's trainable variables.

        Args:
            variables: those that are trained when nothing is frozen.
            units: gives the `gradients.units.Unit` of a variable.
            owners: gives the same for variables that one layer holds.
        """
        for hook in self._hooks:
            hook._prepare(variables, units, owners)

    def run(self, gradients: Gradients, step: Step) -> Gradients:
        """Applies the hooks in order.

        Args:
            gradients: true gradients, duplicate rows summed.
            step: takes up what the hooks report and reject.

        Returns:
            The gradients for the optimizer.
        """
        with running(step):
            for hook in self._hooks:
                step.hook = hook
                gradients = _apply(hook, gradients)
        return gradients

    def validate(self, gradients: Gradients, step: Step) -> None:
        """Shows the gradients of a validation batch to the hooks that look at them.

        Args:
            gradients: true gradients, duplicate rows summed.
            step: takes up what the hooks report.
        """
        with running(step):
            for hook in self._hooks:
                if hook.watches_validation:
                    step.hook = hook
                    hook.on_validation(gradients._subset(_positions(hook, gradients.variables)))

    @property
    def of_outputs(self) -> list[GradientHook]:
        """The hooks that look at what layers return."""
        return [hook for hook in self._hooks if hook._watches_outputs]

    def see_outputs(self, outputs: Outputs, step: Step) -> None:
        """Shows what layers returned to the hooks that look at it.

        Args:
            outputs: of all parts of the batch.
            step: takes up what the hooks report.
        """
        with running(step):
            for hook in self.of_outputs:
                step.hook = hook
                hook._see_outputs(outputs)

    def watch_update(self, variables: Sequence[Any], step: Step) -> Callable[[], None]:
        """Puts weights aside for the hooks that look at the update.

        Args:
            variables: those being trained.
            step: takes up what the hooks report.

        Returns:
            A function to call after the update.
        """
        watched = [
            (hook, chosen, [tf.identity(v.value) for v in chosen])
            for hook in self._hooks
            if hook.watches_update
            for chosen in [[variables[i] for i in _positions(hook, variables)]]
        ]

        def after() -> None:
            with running(step):
                for hook, chosen, before in watched:
                    step.hook, step.num_given = hook, len(chosen)
                    hook.after_update(before, chosen)

        return after


class HookHandle:
    """Takes a registered hook out again, by `remove()` or at the end of a `with`."""

    def __init__(self, hooks: HookList, hook: GradientHook) -> None:
        self._hooks = hooks
        self.hook = hook

    def remove(self) -> None:
        """Removes the hook from its model; a second call does nothing."""
        if self.hook in self._hooks:
            self._hooks.remove(self.hook)

    def __repr__(self) -> str:
        state = "" if self.hook in self._hooks else ", removed"
        return f"<HookHandle of {self.hook!r}{state}>"

    def __enter__(self) -> HookHandle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()


def check_hooks(value: Any) -> list[GradientHook]:
    """Returns a list of hooks, made of a list of hooks and functions."""
    if not isinstance(value, list | tuple | HookList):
        hint = ""
        if isinstance(value, GradientHook) or callable(value):
            hint = "Put it in brackets: `gradient_hooks=[hook]`. "
        raise TypeError(
            f"`gradient_hooks` must be a list of gradient hooks. {hint}"
            f"Received: {value!r} (of type {type(value).__name__})."
        )
    return [as_hook(hook) for hook in value]


def _check_is_free(hook: GradientHook) -> None:
    if hook._registered_name is not None:
        raise ValueError(
            f"The hook {hook.name!r} belongs to a model already. Remove it there first, or "
            "make another: `copy.copy(hook)`."
        )


def _take_in(hook: GradientHook, name: str) -> None:
    hook._registered_name, hook._saved_name = name, None


def _unique_name(hook: GradientHook, taken: set[str]) -> str:
    if hook._saved_name is not None and hook._saved_name not in taken:
        return hook._saved_name
    base = hook._name or hook._default_name()
    if base not in taken:
        return base
    if hook._name is not None:
        raise ValueError(
            f"There is a hook named {base!r} already. Give this one another `name`, "
            "or use `replace`."
        )
    number = 1
    while f"{base}_{number}" in taken:
        number += 1
    return f"{base}_{number}"


def _positions(hook: GradientHook, variables: Sequence[Any]) -> list[int]:
    """Returns which of some variables a hook is for: those of its targets, and new ones."""
    model_variables = hook._model_variables or []
    members = {id(model_variables[i]) for i in hook._positions}
    known = {id(variable) for variable in model_variables}
    return [
        i
        for i, v in enumerate(variables)
        if (id(v) in members or (hook.targets is None and id(v) not in known))
        and not _is_overwritten(v)
    ]


def _apply(hook: GradientHook, gradients: Gradients) -> Gradients:
    """Returns what gradients become by a hook, which sees those it is for."""
    chosen = _positions(hook, gradients.variables)
    if not chosen:
        return gradients
    if len(chosen) == len(gradients):
        # Not a copy: a norm that one hook asked for is there for the next.
        given = gradients.with_unique_rows()
        return _applied(hook, given)
    given = gradients._subset(chosen).with_unique_rows()
    return gradients.updated(_applied(hook, given))


def _applied(hook: GradientHook, given: Gradients) -> Gradients:
    step = current_step()
    if step is not None:
        step.num_given = len(given)
    try:
        result = hook.apply(given)
    except ValueError as error:
        if "only supports singleton tf.Variables" not in str(error):
            raise
        raise ValueError(
            f"The hook {hook.name!r} makes a variable in `apply`, which runs every step. Make "
            f"it in `build(self, variables)` of {type(hook).__name__}, by `self.add_variable(...)`."
        ) from error
    return _checked(hook, given, result)


def _is_overwritten(variable: Any) -> bool:
    # The "gradient" of a float8 scale is its next value, not a slope.
    return getattr(variable, "overwrite_with_gradient", False)


def _checked(hook: GradientHook, given: Gradients, result: Any) -> Gradients:
    who = f"The hook {hook.name!r} ({type(hook).__name__})"
    if not isinstance(result, Gradients):
        raise TypeError(
            f"{who} must return `Gradients`, such as `gradients.map(...)` gives. "
            f"Received: {reprlib.repr(result)} (of type {type(result).__name__})."
        )
    expected = [id(v) for v in given.variables]
    if [id(v) for v in result.variables] != expected:
        lost = [variable_path(v) for v in given.variables if id(v) not in map(id, result.variables)]
        raise ValueError(
            f"{who} must return the gradients of the {len(given)} variables it was "
            f"given, in their order. Received: {len(result)} gradients"
            + (f", without those of {lost}." if lost else ".")
        )
    for before, (after, variable) in zip(given.values(), result.pairs(), strict=True):
        if before is None or after is None or tf.as_dtype(after.dtype) == before.dtype:
            continue
        raise TypeError(
            f"{who} must keep the dtype of the gradient of {variable_path(variable)!r}, "
            f"{before.dtype.name}. Received: {tf.as_dtype(after.dtype).name}."
        )
    return result
