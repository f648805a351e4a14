"""`NoiseScale` against numbers worked in float64, whatever the parts are."""

import contextlib

import keras
import numpy as np
import pytest
from everyday import everyday
from keras import layers

from keras_tapefit import TapeModel, hooks

from . import support

RNG = np.random.default_rng(3)
X = RNG.normal(size=(24, 3)).astype("float32")
Y = RNG.normal(size=(24, 1)).astype("float32")
MOMENTUM = 0.7
SLOW = pytest.mark.slow


def _model(num_replicas=1, optimizer=None, **options):
    keras.utils.clear_session(free_memory=False)
    scope = support.mirrored(num_replicas).scope() if num_replicas > 1 else contextlib.nullcontext()
    with scope:
        inputs = keras.Input((3,))
        model = TapeModel(inputs, layers.Dense(1, use_bias=False, name="line")(inputs))
        optimizer = (optimizer or (lambda: keras.optimizers.SGD(0.05)))()
        options = {"gradient_hooks": [hooks.NoiseScale(MOMENTUM)], **options}
        model.compile(optimizer, "mse", **options)
    model.set_weights([np.ones((3, 1))])
    return model


def _gradient(x, y, w):
    return 2 * x.T @ (x @ w - y) / len(x)


def _expected(batches, split):
    """The log of one epoch in float64; `split` gives the parts of a batch."""
    w = np.ones((3, 1))
    noise_average = signal_average = 0.0
    scales = []
    for step, (x, y) in enumerate(batches):
        size = len(x)
        whole = np.sum(_gradient(x, y, w) ** 2)
        parts = split(size)
        # Each part counts by its size; of parts alike this is the plain mean.
        small = sum(
            len(part) / size * np.sum(_gradient(x[part], y[part], w) ** 2) for part in parts
        )
        b = size / len(parts)
        signal = (size * whole - b * small) / (size - b)
        noise = (small - whole) / (1 / b - 1 / size)
        noise_average = MOMENTUM * noise_average + (1 - MOMENTUM) * noise
        signal_average = MOMENTUM * signal_average + (1 - MOMENTUM) * signal
        correction = 1 - MOMENTUM ** (step + 1)
        if signal_average > 0:
            scales.append((noise_average / correction) / (signal_average / correction))
        w = w - 0.05 * _gradient(x, y, w)
    return np.mean(scales), noise_average / correction, signal_average / correction


def _batches(size):
    x, y = X.astype("float64"), Y.astype("float64")
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def _parts_of(count):
    return lambda size: np.array_split(np.arange(size), count)


CASES = {
    "micro_batches": (1, {"micro_batches": 4}),
    "replicas": (2, {}),
    "replicas_and_micro_batches": (2, {"micro_batches": 2}),
    "eager": (1, {"micro_batches": 4, "run_eagerly": True}),
    "xla": (1, {"micro_batches": 4, "jit_compile": True}),
    "loss_scale": (1, {"micro_batches": 4, "optimizer": "loss_scale"}),
    "loss_scale_on_replicas": (2, {"micro_batches": 2, "optimizer": "loss_scale"}),
    "after_clipping": (1, {"micro_batches": 4, "clip": True}),
}


@pytest.mark.parametrize(
    "case",
    everyday(["micro_batches", "replicas_and_micro_batches"], of=CASES),
)
def test_float64(case):
    num_replicas, options = CASES[case]
    options = dict(options)
    if options.pop("optimizer", None):
        options["optimizer"] = lambda: support.scaled(keras.optimizers.SGD(0.05))
    if options.pop("clip", False):
        # It looks at what came before all hooks, wherever it stands.
        options["gradient_hooks"] = [lambda g, v: 1.0 * g, hooks.NoiseScale(MOMENTUM)]
    model = _model(num_replicas, **options)
    log = model.fit(X, Y, batch_size=8, shuffle=False, verbose=0).history
    count = 2 if case == "replicas" else 4
    scale, noise, signal = _expected(_batches(8), _parts_of(count))
    np.testing.assert_allclose(log["noise_scale"], [scale], rtol=2e-5)
    hook = model.gradient_hooks["noise_scale"]
    if num_replicas == 1:
        np.testing.assert_allclose([hook.noise, hook.signal], [noise, signal], rtol=2e-5)


def test_parts_of_unequal_size():
    """Ten examples in four parts are 3, 3, 2 and 2; the last batch is one of four."""
    model = _model(micro_batches=4)
    log = model.fit(X, Y, batch_size=10, shuffle=False, verbose=0).history
    expected, _, _ = _expected(_batches(10), _parts_of(4))
    np.testing.assert_allclose(log["noise_scale"], [expected], rtol=2e-5)


@pytest.mark.parametrize(
    "case", ["whole", *(pytest.param(c, marks=SLOW) for c in ("micro_batches", "window"))]
)
def test_replicas_of_unequal_size(case):
    """Nine examples are 5 and 4, of which each counts the same."""
    options = {"gradient_hooks": [hooks.NoiseScale(MOMENTUM)]}
    batch_size = 9
    if case == "micro_batches":
        options["micro_batches"] = 2
    elif case == "window":
        # Steps of five and four: 3 + 2 on one replica, 2 + 2 on the other.
        batch_size = 5
        options["optimizer"] = lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    model = _model(2, **options)
    log = model.fit(X[:9], Y[:9], batch_size=batch_size, shuffle=False, verbose=0).history
    parts = {
        "whole": [np.arange(5), np.arange(5, 9)],
        "micro_batches": np.split(np.arange(9), [3, 5, 7]),
        "window": [np.r_[0:3, 5:7], np.r_[3:5, 7:9]],
    }[case]
    expected, _, _ = _expected(
        [(X[:9].astype("float64"), Y[:9].astype("float64"))], lambda _: parts
    )
    np.testing.assert_allclose(log["noise_scale"], [expected], rtol=2e-5)


def test_the_estimate_is_without_bias():
    """Of parts of any size: known mean and variance of the gradients of examples."""
    rng = np.random.default_rng(0)
    # With w = 0 and x = 1 the gradient of an example is -2y: mean 2, variance 4.
    y = rng.normal(-1.0, 1.0, size=(4000 * 7, 1)).astype("float32")
    x = np.ones_like(y)
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((1,))
    model = TapeModel(inputs, layers.Dense(1, use_bias=False)(inputs))
    hook = hooks.NoiseScale(0.9995)
    model.compile(
        keras.optimizers.SGD(0.0),
        "mse",
        gradient_hooks=[hook],
        micro_batches=3,
        steps_per_execution=100,
        jit_compile=False,
    )
    model.set_weights([np.zeros((1, 1))])
    model.fit(x, y, batch_size=7, shuffle=False, verbose=0)
    np.testing.assert_allclose([hook.noise, hook.signal], [4.0, 4.0], rtol=0.05)


def test_nan_leaves_the_averages_alone():
    runs = []
    for bad in (False, True):
        model = _model(micro_batches=2)
        model.gradient_hooks.set([hooks.NoiseScale(MOMENTUM), hooks.SkipNonFinite()])
        x, y = (np.concatenate([v[:8], v[:8], v[8:16]]) for v in (X, Y))
        y[8] = np.nan
        keep = slice(None) if bad else np.r_[0:8, 16:24]
        model.fit(x[keep], y[keep], batch_size=8, shuffle=False, verbose=0)
        runs.append([v.numpy() for v in support.hook_variables(model)[:3]])
    np.testing.assert_array_equal(runs[0], runs[1])


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="`micro_batches=2` or more to `compile`"):
        _model().fit(X, Y, batch_size=8, verbose=0)


def test_the_name_is_in_the_log_entry():
    model = _model(micro_batches=2, gradient_hooks=[hooks.NoiseScale(name="first")])
    assert "first_noise_scale" in model.fit(X, Y, batch_size=8, verbose=0).history


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="momentum"):
        hooks.NoiseScale(momentum)
