"""`report()`: each finding from records that call for it, none from healthy ones."""

import numpy as np
import pytest

from keras_tapefit import callbacks, hooks
from keras_tapefit.callbacks import diagnosis
from keras_tapefit.callbacks.diagnosis import diagnose

from . import support

NUM_STEPS = 100
SHAPES = {"first/kernel": (8, 8), "first/bias": (8,), "last/kernel": (8, 8), "last/bias": (8,)}


def healthy(**changes):
    """Returns records of which nothing is to be said, but for the columns given."""
    rng = np.random.default_rng(0)
    norm = rng.uniform(0.5, 1.5, NUM_STEPS)
    records = {
        "step": np.arange(NUM_STEPS),
        "epoch": np.zeros(NUM_STEPS, int),
        "loss": np.ones(NUM_STEPS),
        "learning_rate": np.full(NUM_STEPS, 0.1),
        "gradient_norm": norm,
        "gradient_norm_after": norm.copy(),
        "skipped": np.zeros(NUM_STEPS, bool),
        "update_ratio": np.full(NUM_STEPS, 1e-3),
    }
    for path in SHAPES:
        records[f"gradient_norm/{path}"] = norm / 2
        records[f"gradient_norm_after/{path}"] = norm / 2
        records[f"update_ratio/{path}"] = np.full(NUM_STEPS, 1e-3)
    records.update((name.replace("__", "/"), value) for name, value in changes.items())
    return records


def with_values(name, steps, value, records=None):
    records = healthy() if records is None else records
    records[name] = records[name].copy()
    records[name][steps] = value
    return records


def test_healthy_records():
    report = diagnose(healthy(), SHAPES)
    assert report.kinds == ()
    assert str(report) == (
        f"100 steps, median norm {np.median(healthy()['gradient_norm']):.3g}.\n"
        "Nothing is out of the ordinary."
    )


def test_no_records():
    assert str(callbacks.GradientHistory().report()).startswith("No step was recorded.")
    assert diagnose({**healthy(), "step": np.zeros(0)}, SHAPES).findings == ()


@pytest.mark.parametrize("share, found", [(0.85, False), (0.95, True)])
def test_dead(share, found):
    records = with_values("gradient_norm/first/kernel", slice(0, round(100 * share)), 0.0)
    report = diagnose(records, SHAPES)
    if not found:
        assert "dead" not in report.kinds
        return
    (finding,) = report.findings
    assert finding.kind == "dead" and finding.paths == ("first/kernel",)
    assert "1 variable of 4" in finding.text and "first/kernel" in finding.text
    assert "leaky_relu" in finding.remedy


def test_zeros_behind_nan_are_not_dead():
    """`relu` of NaN is off."""
    records = with_values("gradient_norm", slice(5, None), np.nan)
    records = with_values("gradient_norm/first/kernel", slice(5, None), 0.0, records)
    assert diagnose(records, SHAPES).kinds == ("not finite",)


def test_frozen_is_not_dead():
    records = healthy()
    for kind in ("gradient_norm", "gradient_norm_after", "update_ratio"):
        records[f"{kind}/first/kernel"] = np.full(NUM_STEPS, np.nan)
    assert diagnose(records, SHAPES).kinds == ()


@pytest.mark.parametrize("factor, kinds", [(1e-4, ("vanishing",)), (3e-3, ())])
def test_vanishing(factor, kinds):
    records = healthy()
    records["gradient_norm/first/kernel"] = factor * records["gradient_norm/last/kernel"]
    report = diagnose(records, SHAPES)
    assert report.kinds == kinds
    for finding in report.findings:
        assert finding.paths == ("first/kernel",)
        assert "those of last/kernel" in finding.text and "0.0001 at the least" in finding.text
        assert "BlockRMSClipping" in finding.remedy


@pytest.mark.parametrize("factor, kinds", [(3e3, ("exploding",)), (300.0, ())])
def test_exploding(factor, kinds):
    records = healthy()
    records["gradient_norm/first/kernel"] = factor * records["gradient_norm/last/kernel"]
    report = diagnose(records, SHAPES)
    assert report.kinds == kinds
    for finding in report.findings:
        assert finding.paths == ("first/kernel",) and "3e+03 times" in finding.text
        assert "GlobalNormClipping" in finding.remedy


def test_size_is_per_weight():
    """A kernel with a million times the weights has a larger norm for that alone."""
    shapes = {**SHAPES, "first/kernel": (8000, 8000)}
    records = healthy()
    records["gradient_norm/first/kernel"] = 1e3 * records["gradient_norm/last/kernel"]
    assert diagnose(records, shapes).kinds == ()
    records["gradient_norm/first/kernel"] *= 1.1
    assert diagnose(records, SHAPES).kinds == ("exploding",)


def test_spikes():
    records = with_values("gradient_norm", [10, 20], 500.0)
    records = with_values("gradient_norm_after", [10, 20], 500.0, records)
    (finding,) = diagnose(records, SHAPES).findings
    assert finding.kind == "spikes"
    assert "2 of 100 (2.0%) steps" in finding.text
    middle = np.median(records["gradient_norm"])
    assert f"the largest {500 / middle:.0f} times" in finding.text
    assert f"GlobalNormClipping({2 * middle:.2g})" in finding.remedy


def test_spikes_that_hooks_tamed_are_none():
    records = with_values("gradient_norm", [10, 20], 500.0)
    assert "spikes" not in diagnose(records, SHAPES).kinds
    records = with_values("skipped", [10, 20], True, records)
    records = with_values("gradient_norm_after", [10, 20], 500.0, records)
    assert "spikes" not in diagnose(records, SHAPES).kinds
    # A single one that got through is told.
    assert "spikes" in diagnose(with_values("skipped", [10], False, records), SHAPES).kinds


def test_not_finite():
    records = with_values("gradient_norm", [7, 8], np.nan)
    (finding,) = diagnose(records, SHAPES).findings
    assert finding.kind == "not finite" and "from step 7 on" in finding.text
    assert "SkipNonFinite" in finding.remedy
    report = diagnose(with_values("skipped", [7, 8], True, records), SHAPES)
    assert report.kinds == ("not finite", "skipped")
    assert "All of these steps were skipped" in report.findings[0].text
    assert "SkipNonFinite(locate=True)" in report.findings[0].remedy


def test_no_finite_norm_at_all():
    records = with_values("gradient_norm", slice(None), np.nan)
    assert diagnose(records, SHAPES).summary == "100 steps, no finite norm."


@pytest.mark.parametrize("number, remedy", [(1, False), (5, True)])
def test_skipped(number, remedy):
    (finding,) = diagnose(with_values("skipped", slice(0, number), True), SHAPES).findings
    assert finding.kind == "skipped" and f"{number} of 100" in finding.text
    assert bool(finding.remedy) == remedy


@pytest.mark.parametrize("number, remedy", [(0, None), (30, False), (97, True)])
def test_clipped(number, remedy):
    records = healthy()
    records["gradient_norm_after"][:number] *= 0.5
    findings = diagnose(records, SHAPES).findings
    assert [f.kind for f in findings] == ["clipped"] * (number > 0)
    for finding in findings:
        assert f"{number} of 100" in finding.text and "to 50.0% in the median" in finding.text
        assert bool(finding.remedy) == remedy


@pytest.mark.parametrize(
    "ratio, kind, remedy",
    [
        (0.1, "large updates", "smaller learning rate"),
        (1e-6, "small updates", "larger learning rate"),
        (0.02, None, None),
        (1e-4, None, None),
    ],
)
def test_updates(ratio, kind, remedy):
    records = with_values("update_ratio/last/kernel", slice(None), ratio)
    findings = diagnose(records, SHAPES).findings
    if kind is None:
        assert findings == ()
        return
    (finding,) = findings
    assert (finding.kind, finding.paths) == (kind, ("last/kernel",))
    assert f"{ratio:.1g} of the size" in finding.text and remedy in finding.remedy
    # Biases begin at zero: their ratios say nothing.
    assert diagnose(with_values("update_ratio/last/bias", slice(None), ratio), SHAPES).kinds == ()


def test_skipped_steps_do_not_count_as_small_updates():
    records = with_values("skipped", slice(0, 60), True)
    for path in SHAPES:
        records = with_values(f"update_ratio/{path}", slice(0, 60), 0.0, records)
    assert "small updates" not in diagnose(records, SHAPES).kinds


def test_accumulated_gradients_are_no_trouble():
    records = healthy()
    for name in list(records):
        if name.startswith(("gradient_norm_after", "update_ratio")):
            records[name] = np.where(np.arange(NUM_STEPS) % 4 == 3, records[name], np.nan)
    assert diagnose(records, SHAPES).kinds == ()


def test_without_norms_of_variables():
    records = {name: values for name, values in healthy().items() if "/" not in name}
    assert diagnose(records, SHAPES).kinds == ()
    records = with_values("skipped", slice(0, 5), True, records)
    assert diagnose(records, SHAPES).kinds == ("skipped",)


def test_grave_ones_come_first():
    records = with_values("gradient_norm", [7], np.nan)
    records = with_values("gradient_norm/first/kernel", slice(None), 0.0, records)
    records = with_values("skipped", [50], True, records)
    records = with_values("update_ratio/last/kernel", slice(None), 0.5, records)
    report = diagnose(records, SHAPES)
    assert report.kinds == ("not finite", "dead", "skipped", "large updates")
    lines = str(report).splitlines()
    assert lines[0] == report.summary
    assert [line.split(":")[0] for line in lines[1::2]][:2] == ["not finite", "dead"]
    assert lines[2].startswith("  try: hooks.SkipNonFinite()")


def test_hooks_that_are_named_exist():
    """A remedy that cannot be typed in is none."""
    import re

    with open(diagnosis.__file__, encoding="utf-8") as file:
        names = set(re.findall(r"hooks\.(\w+)", file.read()))
    assert len(names) > 6
    assert all(hasattr(hooks, name) for name in names)


@pytest.mark.slow
def test_a_real_training():
    model = support.network(gradient_hooks=support.hook_list())
    history = callbacks.GradientHistory()
    support.fit(model, [history], support.BAD_Y, epochs=3)
    report = history.report()
    assert report.kinds[0] == "not finite" and "skipped" in report.kinds
    assert report.summary.startswith("12 steps, median norm ")
    skipped = next(f for f in report.findings if f.kind == "skipped")
    assert "3 of 12 (25.0%)" in skipped.text
