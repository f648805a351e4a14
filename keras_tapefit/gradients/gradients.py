"""`Gradients`: the only place that knows `None` and `tf.IndexedSlices`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_tapefit.gradients import norms as _norms
from keras_tapefit.gradients import sparse as _sparse
from keras_tapefit.gradients import targets as _targets
from keras_tapefit.gradients.joined import Joined as _Joined


class VariablePath(str):
    """A variable's path that knows its variable."""

    variable: Any

    def __new__(cls, variable: Any) -> VariablePath:
        self = super().__new__(cls, _targets.variable_path(variable))
        self.variable = variable
        return self

    @property
    def path(self) -> str:
        return str(self)


class ByVariable:
    """A value for each of some variables, which no place in a list can mix up.

    Args:
        values: one for each variable.
        place: returns the place of a variable among `values`, or raises `ValueError`.

    Example:

    ```python
    states[variable]                     # of one variable
    gradients.map(fn, states)            # of each, whichever are being trained now
    ```
    """

    # By place is what this class is not: those of `build` are not those of `apply`.
    __iter__ = None

    def __init__(self, values: Sequence[Any], place: Callable[[Any], int]) -> None:
        self._values = list(values)
        self._place = place

    def __getitem__(self, variable: Any) -> Any:
        """Returns the value of a variable.

        Raises:
            TypeError: when it is no variable.
            ValueError: when there is none.
        """
        if not _targets.is_variable(variable):
            raise TypeError(
                "These are values by variable, not by place. Pass one of the variables that "
                f"`build` was given. Received: {variable!r}."
            )
        return self._values[self._place(variable)]

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> list[Any]:
        """All values, in the order in which they were given."""
        return list(self._values)


class Gradients:
    """The gradients of a model's variables: ordered, immutable, by variable or path.

    A gradient is a `tf.Tensor` of its variable's shape, a `tf.IndexedSlices` (the
    gradient of an embedding lookup), or `None` where the loss does not depend on the
    variable. The methods take care of the last two, so a hook reads like its formula.

    Args:
        gradients_and_variables: pairs `(gradient, variable)`, as an optimizer takes
            them. Sparse gradients may repeat a row; its slices add up.

    Raises:
        TypeError: when a pair does not hold a gradient and a variable.
        ValueError: when a gradient's shape is not its variable's.

    Example:

    ```python
    w = keras.Variable([[3.0], [4.0]], name="w")
    gradients = Gradients([(tf.constant([[3.0], [4.0]]), w)])
    gradients["w"]                       # the tensor; gradients[w] is the same
    float(gradients.global_norm())       # 5.0
    clipped = gradients.scale(1 / 5)     # norm 1
    ```
    """

    def __init__(
        self,
        gradients_and_variables: Iterable[tuple[Any, Any]],
        *,
        unique_rows: bool = False,
    ) -> None:
        if not isinstance(gradients_and_variables, Iterable):
            raise TypeError(
                "Gradients are made of pairs `(gradient, variable)`, in a list. Received: "
                f"{gradients_and_variables!r} (of type {type(gradients_and_variables).__name__})."
            )
        pairs = [_checked(pair) for pair in gradients_and_variables]
        self._values = [gradient for gradient, _ in pairs]
        self._variables = [variable for _, variable in pairs]
        self._unique_rows = unique_rows or not any(
            isinstance(g, tf.IndexedSlices) for g in self._values
        )
        # By name; each with the graph that it is in.
        self._cache: dict[str, tuple[Any, Any]] = {}

    @property
    def variables(self) -> list[Any]:
        """The variables, in order."""
        return list(self._variables)

    def values(self) -> list[Any]:
        """The gradients, in the order of `variables`."""
        return list(self._values)

    def keys(self) -> list[VariablePath]:
        """The variables' paths, in order; each is a `str` with a `.variable`."""
        return [VariablePath(variable) for variable in self._variables]

    def items(self) -> list[tuple[VariablePath, Any]]:
        """Pairs of a variable's path and its gradient, in order."""
        return list(zip(self.keys(), self._values, strict=True))

    def pairs(self) -> list[tuple[Any, Any]]:
        """Pairs `(gradient, variable)`, as an optimizer takes them."""
        return list(zip(self._values, self._variables, strict=True))

    def __len__(self) -> int:
        return len(self._variables)

    def __iter__(self) -> Iterator[VariablePath]:
        return iter(self.keys())

    def __contains__(self, key: Any) -> bool:
        return self._position(key) is not None

    def __getitem__(self, key: Any) -> Any:
        """Returns the gradient of a variable.

        Args:
            key: the variable, its path, or the end of its path from a `/` on where
                only one variable's path ends so.

        Raises:
            KeyError: when the variable is not among them.
        """
        position = self._position(key)
        if position is None:
            name = _targets.variable_path(key) if _targets.is_variable(key) else key
            raise KeyError(
                f"No gradient for {name!r}. The variables are: "
                f"{', '.join(map(repr, self.keys())) or '(none)'}."
            )
        return self._values[position]

    def _position(self, key: Any) -> int | None:
        if not isinstance(key, str):
            found = [i for i, v in enumerate(self._variables) if _targets.same_variable(v, key)]
            return found[0] if found else None
        paths = self.keys()
        if key in paths:
            return paths.index(key)  # type: ignore[arg-type]
        ends = [i for i, path in enumerate(paths) if path.endswith("/" + key)]
        return ends[0] if len(ends) == 1 else None

    def __repr__(self) -> str:
        lines = (f"  {path}: {_describe_gradient(gradient)}" for path, gradient in self.items())
        return "Gradients(\n" + "\n".join(lines) + "\n)"

    def map(
        self,
        fn: Callable[..., Any],
        *rest: Sequence[Any],
        keeps_zero: bool | Sequence[bool] = False,
    ) -> Gradients:
        """Applies a function to each gradient; `None` stays `None`.

        Args:
            fn: takes a gradient, and one element of each of `rest`, and returns a
                tensor of the same shape.
            rest: sequences in the order of `variables` (`gradients.variables` itself,
                say), other `Gradients` of the same variables, or values `ByVariable`.
            keeps_zero: whether `fn` works on each row separately and maps zero to zero;
                one bool, or one a variable. A sparse gradient then stays sparse: `fn`
                sees its rows, duplicates summed, and the same rows of variables in
                `rest`. Otherwise it is made dense first.

        Returns:
            New `Gradients` of the same variables.

        Raises:
            ValueError: when one of `rest` has more or fewer elements than there are
                variables.

        Example:

        ```python
        signs = gradients.map(tf.sign, keeps_zero=True)
        decayed = gradients.map(lambda g, v: g + 1e-4 * v, gradients.variables)
        ```
        """
        flags = [keeps_zero] * len(self) if isinstance(keeps_zero, bool) else keeps_zero
        source = self.with_unique_rows() if any(flags) else self
        columns = [self._column(r) for r in rest]

        def mapped(gradient: Any, by_row: bool, *others: Any) -> Any:
            if gradient is None:
                return None
            if not (by_row and isinstance(gradient, tf.IndexedSlices)):
                return fn(_sparse.to_dense(gradient), *others)
            rows = [
                tf.gather(other, gradient.indices) if _targets.is_variable(other) else other
                for other in others
            ]
            return _sparse.with_values(gradient, fn(gradient.values, *rows))

        rows = zip(source._values, flags, *columns, strict=True)
        return source._with([mapped(*row) for row in rows])

    def _column(self, values: Any) -> list[Any]:
        if isinstance(values, ByVariable):
            return [values[variable] for variable in self._variables]
        column = values.values() if isinstance(values, Gradients) else list(values)
        if len(column) != len(self):
            raise ValueError(
                f"`map` needs one element for each of the {len(self)} variables of these "
                f"gradients, which are those being trained now. Received: {len(column)}. For "
                "state of all variables, use `add_variables` in `build`, and pass what it "
                "returns."
            )
        return column

    def scale(self, factor: Any) -> Gradients:
        """Multiplies every gradient by a scalar; sparse gradients stay sparse."""
        if factor is None or isinstance(factor, str | bytes):
            raise TypeError(f"`factor` must be a number or a scalar. Received: factor={factor!r}.")

        def scaled(gradient: Any) -> Any:
            if gradient is None:
                return None
            values = _sparse.values_of(gradient)
            # In float32 for half precision: a factor such as 1e-5 is 0 in float16.
            product = _norms.wide(values) * tf.cast(factor, _norms.wide(values).dtype)
            return _sparse.with_values(gradient, tf.cast(product, values.dtype))

        return self._with([scaled(g) for g in self._values])

    def present(self) -> list[Any]:
        """The gradients that are not `None`, in order."""
        return [gradient for gradient in self._values if gradient is not None]

    def with_present(self, values: Iterable[Any]) -> Gradients:
        """Returns these gradients with other values for those that are not `None`.

        Args:
            values: one gradient for each of `present()`, in its order.

        Returns:
            New `Gradients` of the same variables; `None` stays `None`.

        Raises:
            ValueError: when there are more or fewer of them.

        Example:

        ```python
        halves = gradients.with_present([g * 0.5 for g in gradients.present()])
        ```
        """
        given = list(values)
        present = [i for i, gradient in enumerate(self._values) if gradient is not None]
        if len(given) != len(present):
            raise ValueError(
                f"`values` must hold {len(present)} gradients, one for each that is not None. "
                f"Received: {len(given)}."
            )
        merged = [None] * len(self)
        for position, value in zip(present, given, strict=True):
            merged[position] = value
        return self._with(merged, unique_rows=False)

    def where(self, condition: tf.Tensor) -> Gradients:
        """Returns these gradients where a scalar bool is true, else zeros: not 0 · NaN."""
        return self._with_numbers([tf.where(condition, n, 0) for n in self._numbers()])

    def plus(self, other: Gradients) -> Gradients:
        """Adds the gradients of `other`, of the same variables in the same order."""
        sums = [_sparse.add(a, b) for a, b in zip(self._values, other._values, strict=True)]
        return self._with(sums, unique_rows=False)

    def select(self, targets: _targets.Targets) -> Gradients:
        """Returns the gradients of the variables that `targets` selects.

        Args:
            targets: a layer, a variable, a predicate on a variable, a glob on
                `variable.path`, or a list of these.

        Raises:
            ValueError: when a target matches nothing.
        """
        return self._subset(_targets.matching(targets, self._variables))

    def updated(self, other: Gradients) -> Gradients:
        """Returns these gradients with those of `other` in their place."""
        replacement = {id(v): g for g, v in other.pairs()}
        merged = [replacement.get(id(v), g) for g, v in self.pairs()]
        return self._with(merged, unique_rows=self._unique_rows and other._unique_rows)

    def with_unique_rows(self) -> Gradients:
        """Sums duplicate rows of sparse gradients, so that values can be looked at."""
        if self._unique_rows:
            return self
        summed = [
            _sparse.sum_duplicates(g, v.shape[0]) if isinstance(g, tf.IndexedSlices) else g
            for g, v in self.pairs()
        ]
        return self._with(summed, unique_rows=True)

    def global_norm(self) -> tf.Tensor:
        """Returns `sqrt(Σ g²)` over all gradients: a scalar, float32 or wider.

        `None` counts as zero, duplicate rows are summed first, and neither huge nor
        tiny finite gradients overflow or underflow. It is computed once, however
        often it is asked for.
        """
        return self._length_and_finite()[0].norm

    def _length_and_finite(self) -> tuple[_norms.Length, tf.Tensor]:
        """Returns the global norm, and whether all is finite, from one look at the values."""
        return self._once("length", lambda: _norms.joint_length(self.with_unique_rows()._numbers()))

    def norms(self) -> dict[str, tf.Tensor]:
        """Returns each gradient's norm by the variable's path; `None` is left out."""
        unique = self.with_unique_rows()
        return {
            path: _norms.joint_norm([_sparse.values_of(g)])
            for path, g in unique.items()
            if g is not None
        }

    def all_finite(self) -> tf.Tensor:
        """Returns a scalar bool: no gradient holds NaN or an infinity."""
        checks = [tf.reduce_all(tf.math.is_finite(n)) for n in self._numbers()]
        return tf.reduce_all(tf.stack(checks)) if checks else tf.constant(True)

    def _numbers(self) -> list[tf.Tensor]:
        """Returns the numbers that are stored, those of small gradients joined.

        For what is done to all of them alike, or together: it takes far fewer operations.
        """
        return [_sparse.values_of(piece) for piece in self._joined().pieces]

    def _with_numbers(self, numbers: Sequence[tf.Tensor]) -> Gradients:
        """Returns these gradients with other numbers, in the shapes of `_numbers`."""
        pieces = self._joined().pieces
        stored = [_sparse.with_values(*pair) for pair in zip(pieces, numbers, strict=True)]
        joined = self._joined().with_pieces(stored)
        changed = self.with_present(joined.divided())
        changed._unique_rows = self._unique_rows
        changed._once("joined", lambda: joined)
        return changed

    def _joined(self) -> _Joined:
        return self._once("joined", lambda: _Joined.of(self.present()))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns what was made under a name in this graph; makes it the first time."""
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if name not in self._cache or self._cache[name][0] is not graph:
            self._cache[name] = (graph, make())
        return self._cache[name][1]

    def _subset(self, positions: Sequence[int]) -> Gradients:
        return Gradients(
            [(self._values[i], self._variables[i]) for i in positions],
            unique_rows=self._unique_rows,
        )

    def _with(self, values: Sequence[Any], unique_rows: bool | None = None) -> Gradients:
        kept = self._unique_rows if unique_rows is None else unique_rows
        return Gradients(zip(values, self._variables, strict=True), unique_rows=kept)


def _checked(pair: Any) -> tuple[Any, Any]:
    try:
        gradient, variable = pair
    except (TypeError, ValueError):
        gradient = variable = None
    if not _targets.is_variable(variable):
        raise TypeError(
            "Gradients are made of pairs `(gradient, variable)`. "
            f"Received: {pair!r} (of type {type(pair).__name__})."
        )
    if gradient is None or isinstance(gradient, tf.IndexedSlices):
        return gradient, variable
    if not tf.is_tensor(gradient):
        gradient = tf.convert_to_tensor(gradient)
    if not gradient.shape.is_compatible_with(variable.shape):
        raise ValueError(
            f"The gradient of {_targets.variable_path(variable)!r} must have the "
            f"variable's shape {tuple(variable.shape)}. "
            f"Received: a gradient of shape {tuple(gradient.shape)}."
        )
    return gradient, variable


def _describe_gradient(gradient: Any) -> str:
    if gradient is None:
        return "None"
    kind = "sparse, " if isinstance(gradient, tf.IndexedSlices) else ""
    values = _sparse.values_of(gradient)
    return f"{kind}shape={tuple(gradient.shape)}, dtype={values.dtype.name}"
