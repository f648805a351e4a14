"""A diagnosis of the records of a training, in words.

Each threshold is defined here once, with its source; `docs/see_the_gradients.md` has the
same table. If the source names the problem but no number, the number is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Lu et al., 2019, Dying ReLU and Initialization, https://arxiv.org/abs/1903.06733: a dead
# unit has a gradient of exactly 0. Ours: in how many of the last steps.
DEAD_SHARE = 0.9
# Glorot and Bengio, 2010, Understanding the difficulty of training deep feedforward
# neural networks, PMLR 9: with a good initialization the gradients of all layers are of
# one size. Ours: how far from the kernel nearest to the loss is too far, in root mean
# squares of gradients, median over the steps.
VANISHING_SHARE = 1e-3
EXPLODING_FACTOR = 1e3
# Pascanu, Mikolov and Bengio, 2013, On the difficulty of training recurrent neural
# networks, https://arxiv.org/abs/1211.5063, section 3.2: thresholds for clipping from
# half to ten times the average norm work. So a norm beyond ten times the median is a
# spike.
SPIKE_FACTOR = 10.0
# Karpathy, CS231n, https://cs231n.github.io/neural-networks-3/#ratio: the ratio of
# updates to weights "should be somewhere around 1e-3". Ours: a factor of 30 each way.
LEAST_RATIO, LARGEST_RATIO = 3e-5, 3e-2
# Ours: if nearly all steps are clipped, only the direction of a gradient is left, as in
# normalized gradient descent.
CLIPPED_SHARE = 0.95
# Micikevicius et al., 2018, Mixed Precision Training, https://arxiv.org/abs/1710.03740:
# skipped steps are rare once the loss scale has settled. Ours: how rare.
SKIPPED_SHARE = 0.02
# A step counts as clipped from here on; float32 rounding is far below.
_CLIPPED = 1.0 - 1e-4
# The last steps, which show the present state.
_RECENT = 200


@dataclass(frozen=True)
class Finding:
    """One problem, or one fact, that the records show.

    Args:
        kind: `"dead"`, `"vanishing"`, `"exploding"`, `"not finite"`, `"spikes"`,
            `"clipped"`, `"skipped"`, `"large updates"` or `"small updates"`.
        text: what was found, with its figures.
        remedy: what would help; empty if nothing needs to be done.
        paths: the variables concerned.
    """

    kind: str
    text: str
    remedy: str = ""
    paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.text}"]
        return "\n".join(lines + [f"  try: {self.remedy}"] * bool(self.remedy))


@dataclass(frozen=True)
class Report:
    """A diagnosis: findings, the most serious first, readable with `print`.

    Args:
        summary: one line on the training as a whole.
        findings: what the records show; empty if all is healthy.
    """

    summary: str
    findings: tuple[Finding, ...] = field(default=())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the findings."""
        return tuple(finding.kind for finding in self.findings)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        return "\n".join([self.summary, *(lines or ["Nothing is out of the ordinary."])])

    # What a notebook shows of it.
    __repr__ = __str__


def summary_of(records: Mapping[str, np.ndarray]) -> str:
    """Returns one line on the records of a training."""
    if not records or not len(records["step"]):
        return "No step was recorded."
    norms = records["gradient_norm"].astype("float64")
    finite = norms[np.isfinite(norms)]
    middle = f"median norm {np.median(finite):.3g}" if len(finite) else "no finite norm"
    return f"{_count(len(norms), 'step')}, {middle}."


def diagnose(
    records: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    located: str | None = None,
) -> Report:
    """Returns the diagnosis of the records of a training.

    Args:
        records: as `GradientHistory.to_numpy()` returns them.
        shapes: of the variables, by path.
        located: where the first value was that was not finite, if somebody looked.
    """
    summary = summary_of(records)
    if not records or not len(records["step"]):
        return Report(summary)
    norms = records["gradient_norm"].astype("float64")
    kernels = _root_mean_squares(records, shapes)
    dead = _dead(records, shapes)
    findings = [
        *_not_finite(norms, records["skipped"], located),
        *_dead_found(dead, shapes),
        *_uneven(kernels),
        *_spikes(norms, records),
        *_skipped(records["skipped"]),
        *_clipped(norms, records),
        *_updates(records, {path: shapes[path] for path in shapes if path not in dead}),
    ]
    return Report(summary, tuple(findings))


def _not_finite(norms: np.ndarray, skipped: np.ndarray, located: str | None) -> list[Finding]:
    bad = ~np.isfinite(norms)
    if not bad.any():
        return []
    text = f"the gradients of {_share(bad)} steps hold NaN or infinity"
    if located is not None:
        text = f"{text}. {located[:-1]}"
    if skipped[bad].all():
        remedy = "" if located else "hooks.SkipNonFinite(locate=True) says in which layer."
        return [Finding("not finite", f"{text}. All of these steps were skipped.", remedy)]
    remedy = "hooks.SkipNonFinite() leaves such steps out."
    return [Finding("not finite", f"{text}, from step {int(np.argmax(bad))} on.", remedy)]


def _dead(
    records: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    dead = []
    # NaN on its way back ends at units that are off: layers before them get zeros.
    finite = np.isfinite(records["gradient_norm"])
    for path in shapes:
        norms = records.get(f"gradient_norm/{path}", np.full(len(finite), np.nan))
        norms = norms[finite][-_RECENT:]
        trained = norms[~np.isnan(norms)]
        if len(trained) and np.mean(trained == 0) >= DEAD_SHARE:
            dead.append(path)
    return tuple(dead)


def _dead_found(dead: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    if not dead:
        return []
    return [
        Finding(
            "dead",
            f"{_count(len(dead), 'variable')} of {len(shapes)} had a gradient of exactly 0 in "
            f"nearly all of the last steps: {_listed(dead)}.",
            "an activation without flat parts (leaky_relu, gelu), he_normal "
            "initialization, and hooks.GlobalNormClipping(...) against the large steps that "
            "kill units. Freeze variables on which the loss does not depend.",
            dead,
        )
    ]


def _root_mean_squares(
    records: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """Returns for each kernel the median over steps of its gradient's root mean square."""
    found = {}
    for path, shape in shapes.items():
        norms = records.get(f"gradient_norm/{path}", np.zeros(0))
        norms = norms[np.isfinite(norms)]
        # Kernels only: biases and scales have other sizes.
        if len(shape) >= 2 and len(norms) and np.median(norms) > 0:
            found[path] = float(np.median(norms)) / float(np.sqrt(np.prod(shape)))
    return found


def _uneven(kernels: Mapping[str, float]) -> list[Finding]:
    if len(kernels) < 2:
        return []
    # The one nearest to the loss, where backpropagation begins.
    last = list(kernels)[-1]
    shares = {path: size / kernels[last] for path, size in kernels.items()}
    exploding = [path for path, share in shares.items() if share > EXPLODING_FACTOR]
    vanishing = [path for path, share in shares.items() if share < VANISHING_SHARE]
    findings = []
    if exploding:
        findings.append(
            Finding(
                "exploding",
                f"the gradients of {_listed(exploding)} are more than {EXPLODING_FACTOR:g} "
                f"times those of {last} (root mean squares; {max(shares.values()):.1g} times "
                "at the most).",
                "hooks.GlobalNormClipping(...) bounds them all, hooks.NormClipping(...) each "
                "separately, hooks.AdaptiveClipping() by the size of the weights. he_normal or "
                "glorot_uniform initialization removes the cause.",
                tuple(exploding),
            )
        )
    if vanishing:
        findings.append(
            Finding(
                "vanishing",
                f"the gradients of {_listed(vanishing)} are less than {VANISHING_SHARE:g} of "
                f"those of {last} (root mean squares; {min(shares.values()):.1g} at the least).",
                "hooks.AdaptiveClipping() if large first steps may have saturated the "
                "units; hooks.BlockRMSClipping(...) reduces large layers to the size of small "
                "ones; an optimizer that adapts to each weight, such as Adam. Residual "
                "connections, normalization layers and he_normal or glorot_uniform "
                "initialization remove the cause.",
                tuple(vanishing),
            )
        )
    return findings


def _spikes(norms: np.ndarray, records: Mapping[str, np.ndarray]) -> list[Finding]:
    finite = norms[np.isfinite(norms)]
    if len(finite) < 10:
        return []
    middle = float(np.median(finite))
    spikes = norms > SPIKE_FACTOR * middle
    tamed = records["skipped"] | (records["gradient_norm_after"] <= SPIKE_FACTOR * middle)
    if middle == 0 or not spikes.any() or tamed[spikes].all():
        return []
    return [
        Finding(
            "spikes",
            f"the norm of {_share(spikes)} steps is more than {SPIKE_FACTOR:g} times the "
            f"median, the largest {float(finite.max()) / middle:.0f} times.",
            f"hooks.GlobalNormClipping({_rounded(2 * middle)}), hooks.PercentileClipping() "
            "if the norm changes much over the training, or hooks.SkipSpikes() to skip "
            "such steps.",
        )
    ]


def _skipped(skipped: np.ndarray) -> list[Finding]:
    if not skipped.any():
        return []
    text = f"{_share(skipped)} steps were skipped."
    if np.mean(skipped) < SKIPPED_SHARE:
        return [Finding("skipped", text)]
    remedy = (
        "check the data of these batches, or the threshold of the gate. In float16 a "
        "loss scale that keeps falling means overflow: hooks.GlobalNormClipping(...) "
        "and a smaller learning rate."
    )
    return [Finding("skipped", text, remedy)]


def _clipped(norms: np.ndarray, records: Mapping[str, np.ndarray]) -> list[Finding]:
    after = records["gradient_norm_after"].astype("float64")
    known = np.isfinite(norms) & np.isfinite(after) & ~records["skipped"]
    clipped = after[known] < _CLIPPED * norms[known]
    if not clipped.any():
        return []
    left = float(np.median((after[known] / norms[known])[clipped]))
    text = f"hooks reduced the norm of {_share(clipped)} steps, to {left:.1%} in the median."
    if np.mean(clipped) < CLIPPED_SHARE:
        return [Finding("clipped", text)]
    remedy = (
        "if all steps are clipped, only the direction of the gradient counts, and the "
        "learning rate decides the length. If you did not want that, raise the threshold; "
        f"the median norm before hooks is {_rounded(float(np.median(norms[known])))}. "
        "hooks.PercentileClipping() follows the norm automatically."
    )
    return [Finding("clipped", text, remedy)]


def _updates(
    records: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> list[Finding]:
    ratios = {}
    made = ~records["skipped"]
    for path, shape in shapes.items():
        values = records.get(f"update_ratio/{path}", np.full(len(made), np.nan))
        values = values[made][-_RECENT:]
        values = values[np.isfinite(values)]
        if len(shape) >= 2 and len(values):
            ratios[path] = float(np.median(values))
    large = [path for path, ratio in ratios.items() if ratio > LARGEST_RATIO]
    small = [path for path, ratio in ratios.items() if ratio < LEAST_RATIO]
    findings = []
    if large:
        findings.append(
            Finding(
                "large updates",
                f"a step moves {_listed(large)} by {max(ratios.values()):.1g} of the size of "
                "the weights; 1e-3 is usual.",
                "a smaller learning rate, or hooks.LearningRateMultiplier(0.1, targets=...) "
                "for these; hooks.AdaptiveClipping() bounds the ratio itself.",
                tuple(large),
            )
        )
    if small:
        findings.append(
            Finding(
                "small updates",
                f"a step moves {_listed(small)} by {min(ratios.values()):.1g} of the size of "
                "the weights; 1e-3 is usual.",
                "a larger learning rate, or hooks.LearningRateMultiplier(10.0, targets=...) "
                "for these; hooks.Freezing(...) if they need no training.",
                tuple(small),
            )
        )
    return findings


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _share(flags: np.ndarray) -> str:
    return f"{int(flags.sum())} of {len(flags)} ({np.mean(flags):.1%})"


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:4])
    return shown if len(paths) <= 4 else f"{shown} and {len(paths) - 4} more"


def _rounded(value: float) -> str:
    return f"{value:.2g}"
