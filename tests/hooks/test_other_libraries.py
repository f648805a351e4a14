"""Hooks against optax and torch, where these agree with Keras on what is computed."""

import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import hooks

pytestmark = pytest.mark.oracle
RNG = np.random.default_rng(43)


@pytest.fixture(scope="module")
def optax():
    return pytest.importorskip("optax", exc_type=ImportError)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", exc_type=ImportError)


def _gradients(scale):
    shapes = [(4, 3), (3,), (2, 2, 3, 5)]
    return [(scale * RNG.normal(size=s)).astype("float32") for s in shapes]


def _ours(bench, hook, gradients):
    return bench(hook, [g.shape for g in gradients])(*map(tf.constant, gradients))


def _of_optax(transformation, gradients, parameters=None):
    state = transformation.init(parameters if parameters is not None else gradients)
    return transformation.update(gradients, state, parameters)[0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (hooks.GlobalNormClipping, "clip_by_global_norm"),
        (hooks.BlockRMSClipping, "clip_by_block_rms"),
        (hooks.ValueClipping, "clip"),
    ],
)
def test_optax_clipping(bench, optax, make, name, scale):
    gradients = _gradients(scale)
    expected = _of_optax(getattr(optax, name)(0.7), gradients)
    for a, b in zip(_ours(bench, make(0.7), gradients), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)


@pytest.mark.parametrize(
    "make", [lambda: layers.Dense(6), lambda: layers.Conv2D(6, 3)], ids=["Dense", "Conv2D"]
)
def test_optax_adaptive_clipping_of_kernels(bench, optax, make):
    # Biases are left out: optax takes each element of them for a unit.
    layer = make()
    layer.build((None, 8, 8, 3) if isinstance(layer, layers.Conv2D) else (None, 5))
    parameters = [layer.kernel.numpy()]
    gradients = [(0.05 * RNG.normal(size=layer.kernel.shape)).astype("float32")]
    expected = _of_optax(optax.adaptive_grad_clip(0.05), gradients, parameters)
    run = bench(hooks.AdaptiveClipping(0.05), layer)
    result = run(tf.constant(gradients[0]), None)[0]
    assert not np.allclose(result, gradients[0])
    np.testing.assert_allclose(result, expected[0], rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_torch_clipping_by_norm(bench, torch, scale):
    gradients = _gradients(scale)
    parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_(parameters, 0.7)
    for a, parameter in zip(
        _ours(bench, hooks.GlobalNormClipping(0.7), gradients), parameters, strict=True
    ):
        # torch divides by the norm plus 1e-6.
        np.testing.assert_allclose(a, parameter.grad.numpy(), rtol=1e-5)


def test_torch_clipping_by_value(bench, torch):
    gradients = _gradients(1.0)
    parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_value_(parameters, 0.7)
    for a, parameter in zip(
        _ours(bench, hooks.ValueClipping(0.7), gradients), parameters, strict=True
    ):
        np.testing.assert_array_equal(a, parameter.grad.numpy())
