"""Functions as hooks."""

import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_tapefit.gradients import Gradients, Targets, variable_path
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.hooks.base import GradientHook


@keras.saving.register_keras_serializable("keras_tapefit")
class LambdaHook(GradientHook):
    """Applies a function to each gradient.

    For one-liners and for looking; anything with numbers or state is better a class.

    Args:
        fn: takes `(gradient, variable)`, the gradient dense, and returns a tensor of the
            same shape, or `None` to leave the gradient as it is.
        targets: the variables the hook is for; `None`: all.
        name: the hook's name.

    Raises:
        TypeError: when `fn` cannot be called with two arguments.
        ValueError: while training, when `fn` returns another shape.

    Example:

    ```python
    handle = model.register_gradient_hook(lambda g, v: g * 0.5, targets="encoder/*")
    handle.remove()
    ```
    """

    def __init__(
        self, fn: Callable[..., Any], targets: Targets = None, name: str | None = None
    ) -> None:
        if not callable(fn):
            raise TypeError(
                f"`fn` must be a function of `(gradient, variable)`. Received: fn={fn!r}."
            )
        _check_takes_two(fn)
        super().__init__(targets=targets, name=name)
        self.fn = fn

    def apply(self, gradients: Gradients) -> Gradients:
        pairs = [(self._result(g, v), v) for g, v in gradients.pairs()]
        return Gradients(pairs, unique_rows=True)

    def _result(self, gradient: Any, variable: Any) -> Any:
        if gradient is None:
            return None
        result = self.fn(to_dense(gradient), variable)
        if result is None:
            return gradient
        result = keras.ops.convert_to_tensor(result)
        if not result.shape.is_compatible_with(variable.shape):
            raise ValueError(
                f"The hook {self.name!r} must return a gradient of "
                f"{variable_path(variable)!r} of the variable's shape "
                f"{tuple(variable.shape)}. Received: shape {tuple(result.shape)}."
            )
        return result


def _check_takes_two(fn: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(fn)
    except ValueError:  # of some functions that are not written in Python
        return
    try:
        signature.bind(None, None)
        # As `tf.sign(x, name=None)`: the name of an operation is no variable.
        takes_two = list(signature.parameters)[1:2] != ["name"]
    except TypeError:
        takes_two = False
    if not takes_two:
        raise TypeError(
            "A function as a hook is called with two arguments, `(gradient, variable)`. "
            f"Received: {fn!r}, which takes {signature}. Write "
            "`lambda gradient, variable: ...`."
        )


def as_hook(value: Any) -> GradientHook:
    """Returns a hook as it is, a function as a `LambdaHook`, a saved one with its name."""
    if isinstance(value, GradientHook):
        return value
    if isinstance(value, dict) and value.keys() == {"name", "hook"}:
        hook = as_hook(value["hook"])
        hook._saved_name = value["name"]
        return hook
    hint = ""
    if isinstance(value, keras.callbacks.Callback):
        hint = " This is a Keras callback: pass it to `fit(callbacks=[...])`."
    elif hasattr(value, "compute"):
        hint = " This is a gradient method: pass it to `compile(backward=...)`."
    elif isinstance(value, type):
        hint = f" Did you mean `{value.__name__}(...)`?"
    elif callable(value):
        return LambdaHook(value)
    raise TypeError(
        "A gradient hook must be a `GradientHook` or a function of "
        f"`(gradient, variable)`.{hint} Received: {value!r} (of type "
        f"{type(value).__name__})."
    )
