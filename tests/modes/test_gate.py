"""A rejected step has not happened: to the bit, in every mode."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import hooks

from . import support
from .support import OPTIMIZERS, X, Y, trained

# One example of the third batch of four, in the second replica's half.
BAD_EXAMPLE = 33
KEPT = np.r_[0:24, 36:48]
# What a gate counts, and a loss scale's own book.
COUNTS = ("consecutive", "steps_seen", "first_variable", "first_step", "skipped")
SCALE = ("dynamic_scale", "step_counter")


def _hooks():
    return [
        hooks.SkipNonFinite(),
        hooks.SkipSpikes(30.0, num_warmup_steps=2),
        hooks.PercentileClipping(50, history=3),
        hooks.GradientMonitor(),
        support.sensitive,
    ]


def _run(optimizer, mode, y=None, **options):
    compiled, num_replicas = support.MODES[mode]
    given = {"x": X[KEPT], "y": Y[KEPT]} if y is None else {"x": X, "y": y}
    alone = support.no_rewriting() if mode == "mirrored_spe" else contextlib.nullcontext()
    with alone:
        return trained(
            "normalized",
            OPTIMIZERS[optimizer],
            num_replicas,
            fit=given,
            metrics=["mae"],
            **{"gradient_hooks": _hooks(), **compiled, **options},
        )


def _everything(model):
    """Weights, statistics, seeds, slots, averages, counts, metrics, hook state."""
    variables = [
        *model.variables,
        *model.optimizer.variables,
        *model.metrics_variables,
        *support.hook_variables(model),
    ]
    return {
        f"{i} {v.path}": v.numpy()
        for i, v in enumerate(variables)
        if v.name not in (*COUNTS, *SCALE)
    }


def _assert_it_has_not_been(found, clean):
    ours, theirs = _everything(found), _everything(clean)
    assert ours.keys() == theirs.keys()
    assert any("seed" in path for path in ours) and any("moving" in path for path in ours)
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
    assert found.log.pop("skipped_steps") == [1.0]
    assert clean.log.get("skipped_steps", [0.0]) == [0.0]
    assert found.log == {k: v for k, v in clean.log.items() if k != "skipped_steps"}
    assert int(found.optimizer.iterations.numpy()) == 3


def _with_bad_example(value):
    y = Y.copy()
    y[BAD_EXAMPLE] = value
    return y


EVERYDAY = [("graph", "adamw_ema"), ("mirrored", "adamw_ema")]
TESTED = ["sgd", "adamw_ema", "multi", "loss_scale", "loss_scale_multi"]


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    support.cells(TESTED, EVERYDAY, "adamw_ema", ["graph", "eager", "xla", "mirrored"]),
)
def test_a_rejected_step_has_not_been(mode, optimizer):
    found = _run(optimizer, mode, _with_bad_example(np.nan))
    _assert_it_has_not_been(found, _run(optimizer, mode))


@pytest.mark.parametrize("mode", support.modes("eager"))
def test_a_rejected_spike_has_not_been(mode):
    """It is finite: it would enter weights, statistics and metrics unseen."""
    found = _run("sgd", mode, _with_bad_example(300.0))
    _assert_it_has_not_been(found, _run("sgd", mode))


@pytest.mark.parametrize("mode", support.modes("eager"))
def test_in_float16(mode):
    """The loss scale is halved, which is a power of two and changes no bit."""
    found, clean = (
        _run("sgd", mode, y, policy="mixed_float16") for y in (_with_bad_example(np.nan), None)
    )
    assert found.layers[-1].compute_dtype == "float16"
    scales = [float(m.optimizer.dynamic_scale.numpy()) for m in (found, clean)]
    assert scales[0] == scales[1] / 2
    _assert_it_has_not_been(found, clean)


def test_without_the_gate_it_would_have():
    """Else the tests above show nothing."""
    model = _run("sgd", "eager", _with_bad_example(300.0), gradient_hooks=[])
    clean = _run("sgd", "eager", gradient_hooks=[])
    assert support.difference(model, clean) > 1e-2
    assert model.log["mae"] > clean.log["mae"]


class RejectThird(hooks.GradientHook):
    """Rejects its third update, whatever that is."""

    may_skip_steps = True

    def build(self, variables):
        self.calls = self.add_variable(dtype="int32", name="skipped", kept_when_skipped=True)

    def apply(self, gradients):
        self.calls.assign(self.calls.value + 1)
        self.skip_step(self.calls.value == 3)
        return gradients


@pytest.mark.parametrize("mode", support.modes("graph"))
def test_a_rejected_window(mode):
    """Of accumulated gradients: nothing of it is in the next one."""
    options, num_replicas = support.MODES[mode]
    runs = [
        trained(
            "dense",
            lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, gradient_accumulation_steps=2),
            num_replicas,
            batch_size=6,
            fit=given,
            gradient_hooks=[RejectThird(), hooks.PercentileClipping(50, history=3)],
            **options,
        )
        for given in ({"x": X, "y": Y}, {"x": X[:24], "y": Y[:24]})
    ]
    found, clean = runs
    # The fourth window, after the rejected one, and the same without it.
    clean.gradient_hooks.remove("reject_third")
    clean.fit(X[36:], Y[36:], batch_size=6, shuffle=False, verbose=0)
    assert found.log["skipped_steps"] == [1.0]
    assert int(found.optimizer.iterations.numpy()) == 3
    ours, theirs = (
        [*m.variables, *m.optimizer.variables, *m.gradient_hooks["percentile_clipping"].variables]
        for m in runs
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def test_carried_states_are_put_back():
    """Of a stateful recurrent layer, which Keras does not track."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 5, 3)).astype("float32"), rng.normal(size=(16, 2))
    bad = np.insert(x, 8, np.full((4, 5, 3), np.nan), axis=0)
    runs = []
    for given in ((bad, np.insert(y, 8, np.zeros((4, 2)), axis=0)), (x, y)):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((5, 3), batch_size=4)
        recurrent = keras.layers.LSTM(3, stateful=True)
        model = support.TapeModel(inputs, keras.layers.Dense(2)(recurrent(inputs)))
        model.compile("adam", "mse", gradient_hooks=[hooks.SkipNonFinite()], jit_compile=False)
        model.fit(*given, batch_size=4, shuffle=False, verbose=0)
        runs.append([*model.get_weights(), *(s.numpy() for s in recurrent.states)])
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "make", [lambda: hooks.SkipNonFinite(max_consecutive=2), lambda: hooks.GradientNoise(0.1)]
)
def test_a_variable_outside_the_model_is_named(make):
    """Hooks that keep something for each variable cannot know it."""
    model = support.dense()
    model.compile("sgd", "mse", gradient_hooks=[make()])
    outside = keras.Variable(2.0, name="temperature")

    def step(hook):
        with model.gradient_tape() as tape:
            loss = tf.reduce_mean(model(X[:4]) ** 2) * outside.value
        tape.minimize(loss, variables=[*model.trainable_variables, outside], optimizer=hook)

    with pytest.raises(ValueError, match="'temperature' is not one of them. Make it an attribute"):
        step(keras.optimizers.SGD(0.1))
    # The way out that the error names.
    hook = make()
    hook.targets = "*"
    model.gradient_hooks.set([hook])
    step(keras.optimizers.SGD(0.1))
    assert float(outside.numpy()) < 2.0
