"""Clips that learn their bound, against the worked numbers and float64 NumPy."""

import numpy as np
import pytest

from keras_tapefit import hooks

RNG = np.random.default_rng(5)


def _norms(run, norms):
    """The norms after the hook, of gradients with these norms."""
    return [float(run([float(n)])[0][0]) for n in norms]


def test_percentile_worked_number(bench):
    run = bench(hooks.PercentileClipping(percentile=10, history=1000), [(1,)])
    np.testing.assert_allclose(_norms(run, [4, 1, 3, 2]), [4, 1, 1.4, 1.3], rtol=1e-6)


@pytest.mark.parametrize("percentile", [0, 10, 37.5, 100])
def test_percentile_of_a_ring_buffer(bench, percentile):
    run = bench(hooks.PercentileClipping(percentile=percentile, history=7), [(1,)])
    norms = RNG.uniform(1, 100, size=25)
    results = _norms(run, norms)
    for i, norm in enumerate(norms):
        bound = np.percentile(norms[max(0, i - 6) : i + 1].astype("float32"), percentile)
        assert results[i] == pytest.approx(min(norm, bound), rel=1e-5)


def test_percentile_may_change_between_steps(bench):
    run = bench(hooks.PercentileClipping(percentile=100), [(1,)])
    _norms(run, [4, 1])
    run.hook.percentile = 50
    assert _norms(run, [3]) == pytest.approx([3])
    run.hook.percentile = 0
    assert _norms(run, [3]) == pytest.approx([1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("make", [hooks.PercentileClipping, hooks.ZScoreClipping])
def test_norms_that_are_not_finite_change_nothing(bench, make, bad):
    run = bench(make(), [(2,)])
    run([1.0, bad])  # the very first step too
    run([3.0, 4.0])
    before = [v.numpy() for v in run.hook.variables]
    (result,) = run([1.0, bad])
    np.testing.assert_array_equal(result, np.array([1.0, bad], "float32"))
    for variable, value in zip(run.hook.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_percentile_of_huge_and_zero_gradients(bench):
    run = bench(hooks.PercentileClipping(percentile=50), [(2,)])
    np.testing.assert_allclose(run([3.0, 4.0])[0], [3.0, 4.0])
    (result,) = run([3e20, 4e20])
    np.testing.assert_allclose(result, [1.5e20, 2e20], rtol=1e-5)
    np.testing.assert_array_equal(run([0.0, 0.0])[0], [0.0, 0.0])


def test_zscore_worked_number(bench):
    run = bench(hooks.ZScoreClipping(num_warmup_steps=5), [(1,)])
    warmup = np.array([1, 1.1, 0.9, 1.05, 0.95], "float32")
    np.testing.assert_array_equal(np.float32(_norms(run, warmup)), warmup)
    assert _norms(run, [1.02]) == pytest.approx([1.02], rel=1e-7)
    _, mean, variance = (float(v.numpy()) for v in run.hook.variables)
    assert mean == pytest.approx(1.0006, rel=1e-6)
    assert variance**0.5 == pytest.approx(0.0697230, rel=1e-5)
    assert _norms(run, [5.0]) == pytest.approx([1.0081970], rel=1e-5)


def test_zscore_against_numpy(bench):
    norms = np.exp(RNG.normal(size=200))
    norms[[60, 61, 120]] *= 50
    run = bench(hooks.ZScoreClipping(), [(1,)])
    results = _norms(run, norms)
    mean, variance = np.mean(norms[:25]), np.var(norms[:25])
    np.testing.assert_array_equal(np.float32(results[:25]), np.float32(norms[:25]))
    clipped = 0
    for norm, result in zip(norms[25:], results[25:], strict=True):
        stddev = np.sqrt(variance)
        zscore = (norm - mean) / (stddev + 1e-6)
        kept = mean + 2.5**2 * stddev / zscore if zscore > 2.5 else norm
        clipped += zscore > 2.5
        assert result == pytest.approx(
            kept * (norm / (norm + 1e-6) if zscore > 2.5 else 1), rel=2e-4
        )
        mean = 0.97 * mean + 0.03 * kept
        variance = 0.97 * variance + 0.03 * (kept - mean) ** 2
    assert clipped > 5


def test_zscore_survives_a_huge_norm_in_the_warmup_and_later(bench):
    run = bench(hooks.ZScoreClipping(num_warmup_steps=3), [(1,)])
    results = _norms(run, [1, 1e30, 1, 1, 1])
    assert np.isfinite(results).all()
    assert all(np.isfinite(v.numpy()).all() for v in run.hook.variables)
    calm = bench(hooks.ZScoreClipping(num_warmup_steps=3), [(1,)])
    assert _norms(calm, [1, 2, 3, 1e30])[-1] < 10


def test_small_gradients_that_are_no_outliers_pass_untouched(bench):
    run = bench(hooks.ZScoreClipping(num_warmup_steps=2), [(1,)])
    assert _norms(run, [1e-9, 2e-9, 1e-9]) == pytest.approx([1e-9, 2e-9, 1e-9], rel=1e-6)


@pytest.mark.parametrize("make", [hooks.PercentileClipping, hooks.ZScoreClipping])
def test_a_skipped_step_leaves_no_norm_behind(line, make):
    x, y = np.array([[3.0, 4.0]]), np.array([[0.0]])
    line.gradient_hooks.set([hooks.SkipNonFinite(), make()])
    line.train_on_batch(x, y)
    before = [v.numpy() for v in line.gradient_hooks[1].variables]
    assert max(np.max(value) for value in before) == 70
    line.train_on_batch(x, np.array([[np.nan]]))
    for variable, value in zip(line.gradient_hooks[1].variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: hooks.PercentileClipping(-1), "`percentile` must be zero or a positive number"),
        (lambda: hooks.PercentileClipping(101), "`percentile` must be at most 100. Received: "),
        (lambda: hooks.PercentileClipping(10, 0), "`history` must be at least 1. Received: hist"),
        (lambda: hooks.ZScoreClipping(0), "`max_zscore` must be a positive number"),
        (lambda: hooks.ZScoreClipping(momentum=1.5), "`momentum` must be at most 1"),
        (lambda: hooks.ZScoreClipping(num_warmup_steps=0), "`num_warmup_steps` must be at least 1"),
    ],
)
def test_values_out_of_range(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: hooks.PercentileClipping("10"), "`percentile` must be a number"),
        (lambda: hooks.PercentileClipping(10, 1.5), "`history` must be an integer. Received: hist"),
        (lambda: hooks.ZScoreClipping(num_warmup_steps=True), "`num_warmup_steps` must be an int"),
    ],
)
def test_wrong_types(make, text):
    with pytest.raises(TypeError, match=text):
        make()
