"""Gates: a step that is skipped is as if it had not been."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeSequential, hooks
from keras_tapefit.training.runtime import runtime_of

RNG = np.random.default_rng(17)
X = RNG.normal(size=(24, 4)).astype("float32")
Y = RNG.normal(size=(24, 1)).astype("float32")
GOOD_1, GOOD_2 = (X[:8], Y[:8]), (X[8:16], Y[8:16])
BAD_INPUT = (np.full((8, 4), np.nan, "float32"), Y[16:])
BAD_TARGET = (X[16:], np.full((8, 1), np.inf, "float32"))


def _model(**options):
    """With everything that a step changes beside the weights."""
    keras.utils.set_random_seed(1)
    model = TapeSequential(
        [
            keras.Input((4,)),
            layers.Dense(6),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=3),
            layers.Dense(1),
        ]
    )
    model.compile(
        keras.optimizers.AdamW(0.01, use_ema=True, weight_decay=0.1),
        "mse",
        metrics=["mae", keras.metrics.RootMeanSquaredError()],
        gradient_hooks=[
            hooks.SkipNonFinite(),
            hooks.GradientMonitor(),
            hooks.PercentileClipping(50, history=4),
            hooks.GradientNoise(0.1, seed=5),
        ],
        **options,
    )
    return model


def _train(batches, **options):
    model = _model(**options)
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    history = model.fit(x, y, batch_size=8, shuffle=False, epochs=2, verbose=0)
    return model, history.history


def _everything(model):
    """All that the training leaves, but for the gate's own counts."""
    state = [v.numpy() for v in model.variables]
    state += [v.numpy() for v in model.optimizer.variables]
    for hook in model.gradient_hooks[1:]:
        state += [v.numpy() for v in hook.variables]
    return state


@pytest.fixture(scope="module")
def clean():
    return _train([GOOD_1, GOOD_2])


def _assert_bitwise_but_for_skips(trained, expected):
    (model, history), (expected_model, expected_history) = trained, expected
    assert history["skipped_steps"] == [1.0, 1.0]
    assert expected_history["skipped_steps"] == [0.0, 0.0]
    assert history.keys() == expected_history.keys()
    for name in history.keys() - {"skipped_steps"}:
        assert history[name] == expected_history[name], name
    for a, b in zip(_everything(model), _everything(expected_model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.optimizer.iterations.numpy() == 4


@pytest.mark.parametrize("bad", [BAD_INPUT, BAD_TARGET], ids=["NaN input", "infinite target"])
def test_good_bad_good_is_good_good_bit_for_bit(clean, bad):
    _assert_bitwise_but_for_skips(_train([GOOD_1, bad, GOOD_2]), clean)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"jit_compile": True}, {"run_eagerly": True}], ids=["XLA", "eager"]
)
def test_good_bad_good_in_other_modes(options):
    expected = _train([GOOD_1, GOOD_2], **options)
    _assert_bitwise_but_for_skips(_train([GOOD_1, BAD_INPUT, GOOD_2], **options), expected)


def test_a_bad_first_step_is_skipped_too(clean):
    model, _ = _train([BAD_INPUT, GOOD_1, GOOD_2])
    for a, b in zip(_everything(model), _everything(clean[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_max_consecutive_stops_and_names_variable_and_step():
    model = _model()
    model.gradient_hooks[0].max_consecutive = None
    model.gradient_hooks.replace("skip_non_finite", hooks.SkipNonFinite(max_consecutive=2))
    model.train_on_batch(*GOOD_1)
    model.train_on_batch(*BAD_TARGET)
    model.train_on_batch(*GOOD_1)  # the run of bad steps begins anew
    weights = model.get_weights()
    model.train_on_batch(*BAD_TARGET)
    text = r"gradients of 2 steps in a row were not finite, beginning with '.*' at step 3 "
    with pytest.raises(FloatingPointError, match=text):
        model.train_on_batch(*BAD_TARGET)
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_the_first_bad_variable_is_named(two_layers, steps_per_execution):
    two_layers.compile(
        "sgd",
        "mse",
        gradient_hooks=[
            lambda g, v: g / 0.0 if v.path == "second/kernel" else None,
            hooks.SkipNonFinite(max_consecutive=3),
        ],
        steps_per_execution=steps_per_execution,
    )
    x, y = RNG.normal(size=(24, 4)), RNG.normal(size=(24, 2))
    with pytest.raises(FloatingPointError, match="beginning with 'second/kernel' at step 0"):
        two_layers.fit(x, y, batch_size=4, verbose=0)


def test_a_run_of_bad_steps_inside_one_execution_stops_it_too(two_layers):
    two_layers.compile(
        "sgd", "mse", gradient_hooks=[hooks.SkipNonFinite(max_consecutive=2)], steps_per_execution=4
    )
    x, y = RNG.normal(size=(16, 4)), RNG.normal(size=(16, 2))
    y[4:12] = np.nan
    with pytest.raises(FloatingPointError, match="of 2 steps in a row .* at step 1 "):
        two_layers.fit(x, y, batch_size=4, shuffle=False, verbose=0)


def test_max_consecutive_can_be_set_between_steps():
    model = _model()
    model.train_on_batch(*GOOD_1)
    with pytest.raises(ValueError, match="`max_consecutive` must be at least 1"):
        model.gradient_hooks[0].max_consecutive = 0
    model.gradient_hooks[0].max_consecutive = 1
    model.train_on_batch(*GOOD_2)
    with pytest.raises(FloatingPointError, match="gradients of 1 steps .* at step 2 "):
        model.train_on_batch(*BAD_TARGET)
    model.gradient_hooks[0].max_consecutive = None
    model.train_on_batch(*BAD_TARGET)


@pytest.mark.parametrize("value", [3.4e38, 1e-38, 0.0])
def test_finite_gradients_of_any_size_are_no_reason_to_skip(bench, value):
    run = bench(hooks.SkipNonFinite(), [(3,), (2,)])
    run(np.full(3, value, "float32"), np.full(2, -value, "float32"))
    assert not run.rejected


def test_skip_non_finite_looks_at_its_targets_only(bench):
    run = bench(hooks.SkipNonFinite(targets="v0"), [(1,), (1,)])
    run([1.0], [np.nan])
    assert not run.rejected
    run([np.inf], [1.0])
    assert run.rejected
    run(None, [np.nan])
    assert not run.rejected


def _spiky(values, monitor="gradient_norm", **options):
    """Which of the steps are skipped, state put back as an update would."""

    def steps(bench):
        run = bench(hooks.SkipSpikes(monitor=monitor, **options), [(1,)])
        skipped = []
        for value in values:
            volatile = [v for v in run.hook.variables if v not in run.hook._lasting]
            before = [v.numpy() for v in volatile]
            gradient = [1.0] if monitor == "loss" else [float(value)]
            run(gradient, loss=tf.constant(float(value)) if monitor == "loss" else None)
            if run.rejected:
                for variable, old in zip(volatile, before, strict=True):
                    variable.assign(old)
            skipped.append(run.rejected)
        return skipped, run

    return steps


@pytest.mark.parametrize("monitor", ["gradient_norm", "loss"])
def test_spikes_are_skipped_after_the_warmup(bench, monitor):
    values = [1, 50, 1, 1.1, 0.9] + [1, 1.2, 100, 0.9, np.nan, 1.1, np.inf]
    options = {"num_warmup_steps": 3, "max_zscore": 3.0}
    skipped, run = _spiky(values[2:], monitor, **options)(bench)
    assert skipped == [False] * 5 + [True, False, True, False, True]
    assert run.hook.uses_loss == (monitor == "loss")


def test_spike_statistics_are_those_of_the_accepted_steps(bench):
    norms = list(RNG.uniform(1, 2, size=20))
    options = {"num_warmup_steps": 5, "momentum": 0.9}
    _, clean = _spiky(norms, **options)(bench)
    skipped, spiked = _spiky([*norms[:10], 1e4, 1e30, np.nan, *norms[10:]], **options)(bench)
    assert sum(skipped) == 3
    for a, b in zip(clean.hook.variables, spiked.hook.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    mean, variance = np.mean(norms[:5]), np.var(norms[:5])
    for norm in norms[5:]:
        mean = 0.9 * mean + 0.1 * norm
        variance = 0.9 * variance + 0.1 * (norm - mean) ** 2
    assert clean.hook.variables[1].numpy() == pytest.approx(mean, rel=1e-5)
    assert clean.hook.variables[2].numpy() == pytest.approx(variance, rel=1e-4)


def test_a_new_level_is_taken_after_patience(bench):
    values = [1, 1.1, 0.9, 1, 1.05] + [100] * 8
    skipped, _ = _spiky(values, num_warmup_steps=5, patience=3)(bench)
    assert skipped == [False] * 5 + [True] * 3 + [False] * 5


@pytest.mark.parametrize("monitor", ["gradient_norm", "loss"])
def test_spikes_in_fit(monitor):
    x, y = RNG.normal(size=(80, 4)), np.zeros((80, 2))
    y[64:72] = 1e4
    keras.utils.set_random_seed(0)
    model = TapeSequential([keras.Input((4,)), layers.Dense(2)])
    gate = hooks.SkipSpikes(num_warmup_steps=6, monitor=monitor)
    model.compile(keras.optimizers.SGD(1e-4), "mse", gradient_hooks=[gate])
    history = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
    assert history["skipped_steps"] == [1.0]
    assert history["loss"][0] < 1000
    assert model.optimizer.iterations.numpy() == 9


def test_loss_is_asked_for_only_where_a_hook_uses_it(bench):
    run = bench(hooks.SkipSpikes(monitor="loss"), [(1,)])
    with pytest.raises(RuntimeError, match="'skip_spikes' looks at the loss, and this step has n"):
        run([1.0])


def test_zero_non_finite(bench):
    table = keras.Variable(np.zeros((3, 2)), name="table")
    dense = keras.Variable(np.zeros(4), name="dense")
    values = tf.constant([[1.0, np.nan], [2.0, 3.0], [np.inf, -1.0]])
    slices = tf.IndexedSlices(values, tf.constant([0, 2, 0]), tf.constant([3, 2]))
    run = bench(hooks.ZeroNonFinite(), [table, dense])
    first, second = run(slices, [1.0, -np.inf, np.nan, 1e38])
    np.testing.assert_array_equal(first, [[0, 0], [0, 0], [2, 3]])
    np.testing.assert_array_equal(second, np.array([1, 0, 0, 1e38], "float32"))
    assert run.reports == {"zeroed_elements": 4.0}
    assert bench(hooks.ZeroNonFinite(name="x"), [(1,)])(None) == [None]


def test_zeroed_elements_are_summed_over_the_epoch(line):
    line.gradient_hooks.set([lambda g, v: g / [[1.0], [0.0]], hooks.ZeroNonFinite(name="odd")])
    x, y = np.array([[3.0, 4.0]] * 3), np.zeros((3, 1))
    history = line.fit(x, y, batch_size=1, verbose=0).history
    assert history["odd_zeroed_elements"] == [3.0]
    assert np.isfinite(line.get_weights()[0]).all()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: hooks.SkipNonFinite(0), ValueError, "`max_consecutive` must be at least 1"),
        (lambda: hooks.SkipNonFinite(1.0), TypeError, "`max_consecutive` must be an integer"),
        (lambda: hooks.SkipNonFinite(True), TypeError, "Received: max_consecutive=True"),
        (lambda: hooks.SkipSpikes(monitor="norm"), ValueError, "`monitor` must be 'gradient_norm"),
        (lambda: hooks.SkipSpikes(-1), ValueError, "`max_zscore` must be a positive number"),
        (lambda: hooks.SkipSpikes(patience=0), ValueError, "`patience` must be at least 1"),
        (lambda: hooks.SkipSpikes(patience=None), TypeError, "`patience` must be an integer"),
        (lambda: hooks.SkipSpikes(num_warmup_steps=0), ValueError, "`num_warmup_steps` must be at"),
        (lambda: hooks.SkipSpikes(momentum=2), ValueError, "`momentum` must be at most 1"),
    ],
)
def test_wrong_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_hook_that_skips_must_say_so(line):
    class Undeclared(hooks.GradientHook):
        def apply(self, gradients):
            self.skip_step(True)
            return gradients

    line.gradient_hooks.set([Undeclared()])
    with pytest.raises(RuntimeError, match="Undeclared calls `skip_step`, so its class must say"):
        line.train_on_batch(np.ones((1, 2)), np.ones((1, 1)))
    assert runtime_of(line).hooks[0].name == "undeclared"
