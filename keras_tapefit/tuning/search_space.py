"""Hooks as hyperparameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from keras_tapefit import backward, hooks

PARTS = ("clipping", "gate", "noise", "freezing", "layer_rates")
CLIPPING = ("none", "global_norm", "norm", "value", "block_rms", "adaptive", "percentile", "zscore")
GATES = ("none", "non_finite", "spikes")


def gradient_hooks(
    hp: Any, model: Any = None, parts: Sequence[str] = ("clipping", "gate", "noise")
) -> list[Any]:
    """Returns gradient hooks whose kinds and numbers are hyperparameters.

    Each part is conditional: a threshold is searched only where its kind of clipping is
    chosen. The hyperparameters are named `"gradient_hooks/clipping"` and so on. To search
    fewer kinds, fix a name first: `hp.Fixed("gradient_hooks/clipping", "global_norm")`.

    The parts, in the order of the list:

    - `"gate"`: none, `SkipNonFinite`, or `SkipSpikes` with `max_zscore` from 3 to 10.
    - `"clipping"`: none, by global norm (`max_norm` 0.05 to 20), by norm (0.01 to 5), by
      value (0.001 to 1), by block RMS (0.001 to 1), adaptive (`max_ratio` 0.002 to 0.2),
      by percentile (5 to 95) or by z-score (1.5 to 5).
    - `"noise"`: none, or `GradientNoise` with `stddev` 0.0001 to 0.1.
    - `"freezing"`: the first n layers with weights, from none to all but the last, for
      the first 1 to 4 epochs. Where a model has more layers than the first that was
      built, their number is searched again, under a name that ends in `_of_` and that many.
    - `"layer_rates"`: `learning_rates_by_depth` with a decay of 0.4 to 1.

    Thresholds that are norms are searched on a logarithmic scale.

    Args:
        hp: `keras_tuner.HyperParameters`.
        model: the model that they are for, with weights; for `"freezing"` and
            `"layer_rates"` only.
        parts: the parts to search.

    Returns:
        A list for `gradient_hooks` of `compile`.

    Raises:
        ValueError: when a part is unknown, or needs a model with weights; or when a
            hyperparameter has a value that is none of its choices.

    Example:

    ```python
    def build(hp):
        model = TapeSequential([keras.Input((64,)), keras.layers.Dense(10)])
        model.compile("adam", "mse", gradient_hooks=tuning.gradient_hooks(hp, model))
        return model
    ```
    """
    if not hasattr(hp, "name_scope"):
        raise TypeError(
            "`hp` must be the `keras_tuner.HyperParameters` that `build` gets. "
            f"Received: hp={hp!r}."
        )
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        raise TypeError(f"`parts` must be a list of names. Received: parts={parts!r}.")
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"`parts` must be some of {PARTS}. Received: parts={parts!r}.")
    made: list[Any] = []
    with hp.name_scope("gradient_hooks"):
        if "gate" in parts:
            made += _gate(hp)
        if "clipping" in parts:
            made += _clipping(hp)
        if "noise" in parts:
            made += _noise(hp)
        if "freezing" in parts:
            made += _freezing(hp, model)
        if "layer_rates" in parts:
            made += _layer_rates(hp, model)
    return made


def gradient_method(hp: Any) -> Any:
    """Returns a way to get gradients, plain or sharpness-aware, as a hyperparameter.

    Args:
        hp: `keras_tuner.HyperParameters`; `"sharpness_aware"` says whether,
            `"sharpness_aware/rho"` (0.01 to 0.5, logarithmic) how far.

    Returns:
        An argument for `backward` of `compile`.

    Example:

    ```python
    def build(hp):
        model = TapeSequential([keras.Input((64,)), keras.layers.Dense(10)])
        model.compile("adam", "mse", backward=tuning.gradient_method(hp))
        return model
    ```
    """
    if not _choice(hp, "sharpness_aware", (False, True)):
        return backward.Backpropagation()
    with hp.conditional_scope("sharpness_aware", [True]):
        rho = hp.Float("sharpness_aware/rho", 0.01, 0.5, sampling="log", default=0.05)
    return backward.SharpnessAware(rho)


def _choice(hp: Any, name: str, values: Sequence[Any]) -> Any:
    """Returns one of some values, which may be fixed.

    Raises:
        ValueError: when it is fixed to something else.
    """
    value = hp.Boolean(name) if values == (False, True) else hp.Choice(name, list(values))
    if value not in values:
        raise ValueError(
            f"The hyperparameter {name!r} must be one of {tuple(values)}. "
            f"Received: {name}={value!r}."
        )
    return value


def _number(hp: Any, kind: str, value: str, name: str, low: float, high: float, **how: Any) -> Any:
    """Returns a number that is searched where `kind` has a value."""
    with hp.conditional_scope(kind, [value]):
        return hp.Float(name, low, high, **how)


def _gate(hp: Any) -> list[Any]:
    kind = _choice(hp, "gate", GATES)
    if kind == "non_finite":
        return [hooks.SkipNonFinite()]
    if kind == "spikes":
        return [hooks.SkipSpikes(_number(hp, "gate", kind, "max_zscore", 3.0, 10.0, default=6.0))]
    return []


_CLIPPING: dict[str, tuple[Any, str, float, float, float]] = {
    "global_norm": (hooks.GlobalNormClipping, "max_norm", 0.05, 20.0, 1.0),
    "norm": (hooks.NormClipping, "max_norm_each", 0.01, 5.0, 0.5),
    "value": (hooks.ValueClipping, "max_value", 0.001, 1.0, 0.1),
    "block_rms": (hooks.BlockRMSClipping, "max_rms", 0.001, 1.0, 0.1),
    "adaptive": (hooks.AdaptiveClipping, "max_ratio", 0.002, 0.2, 0.01),
}


def _clipping(hp: Any) -> list[Any]:
    kind = _choice(hp, "clipping", CLIPPING)
    if kind in _CLIPPING:
        hook, name, low, high, default = _CLIPPING[kind]
        log = {"sampling": "log", "default": default}
        return [hook(_number(hp, "clipping", kind, name, low, high, **log))]
    if kind == "percentile":
        percentile = _number(hp, "clipping", kind, "percentile", 5.0, 95.0, default=10.0)
        return [hooks.PercentileClipping(percentile)]
    if kind == "zscore":
        return [hooks.ZScoreClipping(_number(hp, "clipping", kind, "zscore", 1.5, 5.0))]
    return []


def _noise(hp: Any) -> list[Any]:
    if not _choice(hp, "noise", (False, True)):
        return []
    log = {"sampling": "log", "default": 0.01}
    stddev = _number(hp, "noise", True, "noise_stddev", 1e-4, 0.1, **log)  # type: ignore[arg-type]
    return [hooks.GradientNoise(stddev, seed=0)]


def _layers(model: Any, part: str) -> list[Any]:
    layers = [] if model is None else [layer for layer in model.layers if layer.weights]
    if not layers:
        raise ValueError(
            f"The part {part!r} needs to know the layers: pass `model`, built, to "
            "`gradient_hooks`, or leave the part out."
        )
    return [layer for layer in layers if layer.trainable_variables]


def _freezing(hp: Any, model: Any) -> list[Any]:
    layers = _layers(model, "freezing")
    most = len(layers) - 1
    if most < 1:
        return []
    name = "num_frozen_layers"
    ranges = [getattr(p, "max_value", most) for p in hp.space if p.name.endswith(f"/{name}")]
    if ranges and ranges[0] < most:
        # KerasTuner keeps the range that a hyperparameter first had.
        name = f"{name}_of_{len(layers)}"
    num_frozen = hp.Int(name, 0, most)
    if not isinstance(num_frozen, int) or num_frozen < 0:
        raise ValueError(
            f"The hyperparameter {name!r} must be a number of layers. "
            f"Received: {name}={num_frozen!r}."
        )
    epochs = hp.Int("frozen_epochs", 1, 4)
    # A model may have fewer layers than the space asks for.
    frozen = layers[: min(num_frozen, most)]
    return [hooks.Freezing(frozen, epochs=epochs)] if frozen else []


def _layer_rates(hp: Any, model: Any) -> list[Any]:
    layers = _layers(model, "layer_rates")
    decay = hp.Float("layer_decay", 0.4, 1.0, default=1.0)
    return hooks.learning_rates_by_depth(layers, decay)
