"""Hook orders that make no sense, each with an explanation and a way out."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import Any

from keras_tapefit.backward import PerExampleClipping
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.clipping import (
    AdaptiveClipping,
    BlockRMSClipping,
    GlobalNormClipping,
    NormClipping,
    ValueClipping,
)
from keras_tapefit.hooks.gating import SkipNonFinite, SkipSpikes, ZeroNonFinite
from keras_tapefit.hooks.learning_rates import LearningRateMultiplier
from keras_tapefit.hooks.monitoring import UpdateMonitor
from keras_tapefit.hooks.shaping import GradientNoise, GradientScaling
from keras_tapefit.hooks.statistics_clipping import PercentileClipping, ZScoreClipping

_JOINT = (GlobalNormClipping, PercentileClipping, ZScoreClipping)
_STATISTICAL = (PercentileClipping, ZScoreClipping)
_CLIPPING = (*_JOINT, NormClipping, ValueClipping, BlockRMSClipping, AdaptiveClipping)
_OPTIMIZER_CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")


def order_findings(
    hooks: Sequence[GradientHook], optimizers: Sequence[Any], backward: Any
) -> list[str]:
    """Returns what is wrong with the order of hooks, one text for each finding.

    Args:
        hooks: in the order in which they are applied.
        optimizers: the Keras optimizers that update weights, wrappers opened.
        backward: how gradients are computed.

    Returns:
        Texts that say what happens and how to fix it; none for an order that makes sense.
    """
    hooks = list(hooks)
    found: list[str] = []
    for position, hook in enumerate(hooks):
        earlier = [h for h in hooks[:position] if _overlap(h, hook)]
        found.extend(_before_gate(hook, earlier))
        found.extend(_before_clipping(hook, earlier))
        found.extend(_before_observer(hook, earlier, hooks[position + 1 :]))
        found.extend(_no_freeze(hook, hooks))
    found.extend(_private_noise(hooks, backward))
    found.extend(_doubled_clip(hooks, optimizers))
    return found


def _before_gate(hook: GradientHook, earlier: Sequence[GradientHook]) -> Iterator[str]:
    if isinstance(hook, SkipNonFinite):
        for other in earlier:
            if isinstance(other, ZeroNonFinite):
                yield (
                    f"{_name(other)} comes before {_name(hook)}: it replaces what the gate "
                    "looks for, so no step is ever skipped. Keep one of the two."
                )
            elif isinstance(other, _CLIPPING):
                yield (
                    f"{_name(other)} comes before {_name(hook)}: an infinite gradient may "
                    "be clipped to a finite one that the gate lets pass, or spoil the "
                    "gradients of all variables, so that the wrong one is named. Put "
                    f"{_name(hook)} first."
                )
    if isinstance(hook, SkipSpikes) and hook.monitor == "gradient_norm":
        for other in earlier:
            if isinstance(other, _CLIPPING):
                yield (
                    f"{_name(other)} comes before {_name(hook)}: the gate sees norms that "
                    "are clipped already, in which no spike shows. Put "
                    f"{_name(hook)} first."
                )


def _before_clipping(hook: GradientHook, earlier: Sequence[GradientHook]) -> Iterator[str]:
    if not isinstance(hook, _CLIPPING):
        return
    for other in earlier:
        if isinstance(other, GradientNoise):
            yield (
                f"{_name(other)} comes before {_name(hook)}: the noise is clipped together "
                "with the gradient, so it neither has the standard deviation that was "
                f"asked for nor a mean of zero. Put {_name(other)} after {_name(hook)}."
            )
        if isinstance(other, _CLIPPING) and isinstance(hook, _STATISTICAL):
            yield (
                f"{_name(other)} comes before {_name(hook)}, which then learns its bound "
                "from norms that are clipped already and say little about the gradients. "
                f"Use one of the two, or put {_name(hook)} first."
            )
        if type(other) is type(hook) and _bounds_more(other, hook):
            yield (
                f"{_name(hook)} does nothing: {_name(other)} before it clips the same "
                "gradients to a smaller bound. Remove one of the two."
            )


def _before_observer(
    hook: GradientHook, earlier: Sequence[GradientHook], later: Sequence[GradientHook]
) -> Iterator[str]:
    if isinstance(hook, UpdateMonitor):
        for other in later:
            if isinstance(other, LearningRateMultiplier) and _overlap(hook, other):
                yield (
                    f"{_name(hook)} comes before {_name(other)}: it measures the update "
                    f"that {_name(other)} changes afterwards. Put {_name(hook)} last."
                )


def _no_freeze(hook: GradientHook, hooks: Sequence[GradientHook]) -> Iterator[str]:
    zeroing = isinstance(hook, GradientScaling | LearningRateMultiplier)
    factor = getattr(hook, "factor", None)
    if not zeroing or not isinstance(factor, numbers.Real) or factor != 0:
        return
    counting = [
        h
        for i, h in enumerate(hooks)
        if isinstance(h, _JOINT)
        and _overlap(h, hook)
        and (isinstance(hook, LearningRateMultiplier) or i < hooks.index(hook))
    ]
    what = "weight decay and momentum still move the weights"
    if isinstance(hook, LearningRateMultiplier):
        what = "the optimizer's state still changes, and gradients are computed"
    if counting:
        what += f", and {_name(counting[0])} counts their gradients in its norm"
    yield (
        f"{_name(hook)} with a factor of 0 is no freezing: {what}. Use "
        "`hooks.Freezing(targets)` or `model.freeze(targets)`: frozen variables have no "
        "gradient and no share in any norm."
    )


def _private_noise(hooks: Sequence[GradientHook], backward: Any) -> Iterator[str]:
    if not isinstance(backward, PerExampleClipping):
        return
    for hook in hooks:
        if isinstance(hook, _CLIPPING):
            yield (
                f"{_name(hook)} comes after the noise of PerExampleClipping: it shrinks "
                "signal and noise together, by an amount that the noise decides. The "
                "gradients of the examples are clipped already; remove it, or lower "
                "`max_norm` of PerExampleClipping."
            )
        elif isinstance(hook, GradientNoise):
            yield (
                f"{_name(hook)} adds noise to that of PerExampleClipping, which no "
                "accountant counts. Raise `noise_multiplier` instead."
            )


def _doubled_clip(hooks: Sequence[GradientHook], optimizers: Sequence[Any]) -> Iterator[str]:
    for optimizer in optimizers:
        own = [n for n in _OPTIMIZER_CLIPS if getattr(optimizer, n, None) is not None]
        for hook in hooks if own else ():
            setting = f"`{own[0]}={getattr(optimizer, own[0])}`"
            if isinstance(hook, _CLIPPING):
                yield (
                    f"The optimizer {optimizer.name!r} has {setting} and clips what "
                    f"{_name(hook)} has clipped already, unseen by any hook or log. Remove "
                    "it from the optimizer: the hook is right on several devices and for "
                    "embeddings too."
                )
            elif isinstance(hook, GradientNoise):
                yield (
                    f"The optimizer {optimizer.name!r} has {setting} and clips the noise of "
                    f"{_name(hook)} together with the gradient. Remove it from the "
                    "optimizer, and put a clipping hook before the noise."
                )


def _overlap(a: GradientHook, b: GradientHook) -> bool:
    """Whether two hooks share a variable, as far as can be known."""
    if a._built_for is None or b._built_for is None:
        return a.targets is None or b.targets is None
    return bool(set(a._positions) & set(b._positions))


def _bounds_more(first: Any, second: Any) -> bool:
    """Whether the bound of a clipping hook leaves nothing for the same hook after it."""
    same = (
        first._positions == second._positions
        if first._built_for
        else (first.targets is None and second.targets is None)
    )
    first_config, second_config = vars(first), vars(second)
    for argument in ("max_norm", "max_value", "max_rms", "max_ratio"):
        bounds = [c[argument] for c in (first_config, second_config) if argument in c]
        if len(bounds) == 2 and all(isinstance(b, numbers.Real) for b in bounds):
            per_layer = first_config.get("per_layer") == second_config.get("per_layer")
            return same and per_layer and bounds[0] <= bounds[1]
    return False


def _name(hook: GradientHook) -> str:
    return f"{type(hook).__name__} ({hook.name!r})"
