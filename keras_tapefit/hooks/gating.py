"""Gates: steps, or elements, that are not to be applied."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets, variable_path
from keras_tapefit.gradients.checks import check_bool, check_count
from keras_tapefit.gradients.layers import NamedLayer
from keras_tapefit.gradients.sparse import values_of
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.locating import Locator
from keras_tapefit.hooks.number import Number
from keras_tapefit.hooks.statistics import Moments, finite_norm
from keras_tapefit.hooks.step import Outputs


@keras.saving.register_keras_serializable("keras_tapefit")
class SkipNonFinite(GradientHook):
    """Skips a step whose gradients hold NaN or an infinity.

    A skipped step leaves nothing behind: weights, optimizer, BatchNormalization
    statistics, random seeds, metrics and hook state are what they were. The logs get
    `skipped_steps`, the number of steps skipped in the epoch.

    Put it before hooks that look at the values of the gradients.

    With `locate=True` it also keeps where a run of skipped steps began: the first value
    that was not finite, in the order in which a step computes them: data, weights, the
    output of a layer, the loss, the gradient at the output of a layer, of a weight. The
    property `located` says it in words, the error of `max_consecutive` and
    `GradientHistory.report()` too. It takes a look at every layer's output, on the device
    and in every mode. `model.find_non_finite(x, y)` does it for one batch.

    Args:
        max_consecutive: after this many skipped steps in a row `fit` stops with a
            `FloatingPointError` that names the variable and the step where it began.
            `None`: never.
        targets: the variables to look at; `None`: all.
        name: the hook's name.
        locate: whether to keep where it began: layer, step and examples.

    Raises:
        TypeError, ValueError: when `max_consecutive` is no positive integer, or `locate` no
            bool.
        FloatingPointError: while training, see `max_consecutive`.

    Example:

    ```python
    model.register_gradient_hook(hooks.SkipNonFinite(max_consecutive=20))
    ```
    """

    may_skip_steps = True
    keeps_state = ("max_consecutive",)
    _locator: Locator | None = None

    def __init__(
        self,
        max_consecutive: int | None = None,
        targets: Targets = None,
        name: str | None = None,
        locate: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name)
        if max_consecutive is not None:
            check_count("max_consecutive", max_consecutive)
        self.max_consecutive = max_consecutive
        self.locate = check_bool("locate", locate)
        self._layers: list[NamedLayer] = []

    @property
    def _watches_outputs(self) -> bool:
        return self.locate

    def _chosen_layers(self, layers: Sequence[NamedLayer]) -> list[NamedLayer]:
        self._layers = list(layers)
        return self._layers

    def _see_outputs(self, outputs: Outputs) -> None:
        if self._locator is not None:
            self._locator.look(outputs, self._layers)

    @property
    def located(self) -> str | None:
        """The beginning of the last run of skipped steps, in words.

        `None`: nowhere yet, or it is not looked for. Waits for the device.
        """
        if self._locator is None or self._built_for is None:
            return None
        return self._locator.text(self._layers)

    def build(self, variables: Any) -> None:
        def counter(name: str) -> keras.Variable:
            return self.add_variable(dtype="int64", name=name, kept_when_skipped=True)

        self._watched = [variable_path(variable) for variable in variables]
        self._consecutive = counter("consecutive")
        self._seen = counter("steps_seen")
        # Of the step that began the present run of skipped ones:
        self._first_variable = counter("first_variable")
        self._first_step = counter("first_step")
        self._locator = Locator(self, variables) if self.locate else None

    def apply(self, gradients: Gradients) -> Gradients:
        present = [(g, v) for g, v in gradients.pairs() if g is not None]
        if not present:
            return gradients
        bad = ~gradients._length_and_finite()[1]
        if self.max_consecutive is not None or self._locator is not None:
            self._count(bad, present)
        self._seen.assign(self._seen.value + 1)
        self.skip_step(bad)
        return gradients

    def _count(self, bad: tf.Tensor, present: list[Any]) -> None:
        culprits = tf.constant([self.place(v) for _, v in present], tf.int64)
        last = culprits[-1]

        def look() -> tf.Tensor:
            finite = tf.stack([tf.reduce_all(tf.math.is_finite(values_of(g))) for g, _ in present])
            # Not `argmin`: with it in the program, XLA on CPUs has reads of weights after
            # the update give what was before it.
            return tf.reduce_min(tf.where(finite, last, culprits))

        count = tf.convert_to_tensor(self._consecutive.value)
        begins = bad & (count == 0)
        first = tf.cond(begins, look, lambda: self._first_variable.value)
        self._first_variable.assign(first)
        self._first_step.assign(tf.where(begins, self._seen.value, self._first_step.value))
        # A count that stops `fit` stays until it is looked at.
        most = self.max_consecutive
        kept = 0 if most is None else tf.where(count >= most, count, 0)
        if self._locator is not None:
            self._locator.look_at_gradients(begins, first)
        self._consecutive.assign(tf.where(bad, count + 1, kept))

    def check_state(self) -> None:
        if self.max_consecutive is None or self._built_for is None:
            return
        consecutive = int(self._consecutive.numpy())
        if consecutive < self.max_consecutive:
            return
        path = self._watched[int(self._first_variable.numpy())]
        step = int(self._first_step.numpy())
        self._consecutive.assign(0)
        where = f"beginning with {path!r} at step {step} (counted from 0)"
        hint = "`locate=True` says in which layer, and for which examples. "
        if self.located is not None:
            where, hint = f"from step {step} on (counted from 0). {self.located[:-1]}", ""
        raise FloatingPointError(
            f"The gradients of {consecutive} steps in a row were not finite, {where}. The "
            f"weights are those from before that step. {hint}Look for a too large learning "
            "rate, a logarithm or division without a floor, or bad data."
        )


@keras.saving.register_keras_serializable("keras_tapefit")
class SkipSpikes(GradientHook):
    """Skips a step whose gradient norm, or loss, lies far above what it was before.

    For long runs that a few bad batches throw off. Clipping keeps the direction
    of such a batch; a skipped step leaves nothing behind, not even in the statistics. The
    logs get `skipped_steps`, the number of steps skipped in the epoch. A value that is
    not finite is always skipped.

    Put it before hooks that change the gradients.

    Formula: skip where `(n − μ) / (σ + 1e-6) > max_zscore`, with mean `μ` and standard
    deviation `σ` of the steps before: plain over the warm-up, in which nothing is
    skipped, then as moving averages with momentum `α`: `μ ← αμ + (1 − α)n`,
    `σ² ← ασ² + (1 − α)(n − μ)²`.

    Args:
        max_zscore: the largest deviation that is no spike, in standard deviations; a
            positive number, a schedule or a callable of the step.
        monitor: what is looked at: `"gradient_norm"`, of the targets, or `"loss"`.
        momentum: `α`, from 0 to 1.
        num_warmup_steps: the number of steps that only fill the statistics.
        patience: the number of steps in a row that may be skipped. The next one is
            applied, for the level has changed then, and enters the statistics.
        targets: the variables the norm is taken over; `None`: all.
        name: the hook's name.

    Raises:
        TypeError, ValueError: when an argument is out of range.

    Example:

    ```python
    model.register_gradient_hook(hooks.SkipSpikes(max_zscore=8.0, monitor="loss"))
    ```
    """

    may_skip_steps = True
    keeps_state = ("patience",)
    max_zscore = Number(above=0, neutral=math.inf)
    momentum = Number(minimum=0, maximum=1, neutral=1)

    def __init__(
        self,
        max_zscore: Any = 6.0,
        monitor: str = "gradient_norm",
        momentum: Any = 0.97,
        num_warmup_steps: int = 25,
        patience: int = 10,
        targets: Targets = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        if monitor not in ("gradient_norm", "loss"):
            raise ValueError(
                f"`monitor` must be 'gradient_norm' or 'loss'. Received: monitor={monitor!r}."
            )
        check_count("num_warmup_steps", num_warmup_steps)
        check_count("patience", patience)
        self.max_zscore = max_zscore
        self.monitor = monitor
        self.momentum = momentum
        self.num_warmup_steps = num_warmup_steps
        self.patience = patience
        self.uses_loss = monitor == "loss"

    def build(self, variables: Any) -> None:
        self._moments = Moments(self, self.num_warmup_steps)
        self._skipped = self.add_variable(dtype="int32", name="skipped", kept_when_skipped=True)

    def apply(self, gradients: Gradients) -> Gradients:
        if self.monitor == "loss":
            value = tf.cast(self.loss, tf.float32)
            finite = tf.math.is_finite(value)
        else:
            value, finite = finite_norm(gradients)
        is_high = self._moments.ready & (self._moments.zscore(value) > self.max_zscore)
        bad = ~finite | (is_high & (self._skipped.value < self.patience))
        self._moments.add(value, self.momentum, when=finite)
        self._skipped.assign(tf.where(bad, self._skipped.value + 1, 0))
        self.skip_step(bad)
        return gradients


@keras.saving.register_keras_serializable("keras_tapefit")
class ZeroNonFinite(GradientHook):
    """Replaces NaN and infinite elements of the gradients by zero.

    Where a few elements are known to be bad and the others good. As a rule
    `SkipNonFinite` is better: what is left of a broken gradient need not point anywhere.
    The logs get `zeroed_elements`, their number per epoch; zero elements are not frozen
    ones, momentum and weight decay still move them.

    Formula: `g ← g where g is finite, else 0`.

    Args:
        targets: the variables whose gradients are repaired; `None`: all.
        name: the hook's name. The log entry is `zeroed_elements`, or
            `<name>_zeroed_elements` when a name is given.

    Example:

    ```python
    model.register_gradient_hook(hooks.ZeroNonFinite(targets="log_variance/*"))
    ```
    """

    def apply(self, gradients: Gradients) -> Gradients:
        finite = gradients.map(tf.math.is_finite, keeps_zero=True)
        counts = [
            tf.math.count_nonzero(~values_of(f), dtype=tf.float32)
            for f in finite.values()
            if f is not None
        ]
        entry = "zeroed_elements" if self._name is None else f"{self._name}_zeroed_elements"
        self.report(entry, tf.add_n(counts) if counts else 0.0, reduction="sum")
        return gradients.map(_zero_non_finite, keeps_zero=True)


def _zero_non_finite(gradient: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.math.is_finite(gradient), gradient, tf.zeros_like(gradient))
