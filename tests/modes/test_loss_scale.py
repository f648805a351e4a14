"""float16 and loss scales: hooks see true gradients, and overflow costs one step."""

import contextlib
import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeModel, hooks

from . import support
from .support import OPTIMIZERS, X, Y, difference, trained


def _sgd(**options):
    return keras.optimizers.SGD(0.05, momentum=0.9, **options)


def _monitored(policy, num_replicas=1, **options):
    chosen = [hooks.GradientMonitor(), hooks.GlobalNormClipping(0.3)]
    return trained("embedding", _sgd, num_replicas, policy=policy, gradient_hooks=chosen, **options)


@functools.cache
def _in_float32():
    return _monitored("float32")


@pytest.mark.parametrize("mode", support.modes("graph", "mirrored"))
def test_hooks_see_the_norms_of_float32(mode):
    options, num_replicas = support.MODES[mode]
    plain, half = _in_float32(), _monitored("mixed_float16", num_replicas, **options)
    assert isinstance(half.optimizer, keras.optimizers.LossScaleOptimizer)
    assert half.layers[-1].compute_dtype == "float16"
    np.testing.assert_allclose(half.log["gradient_norm"], plain.log["gradient_norm"], rtol=5e-3)
    # Not the same to the bit: the policy did something.
    assert 1e-7 < difference(half, plain) < 5e-3
    assert half.log["skipped_steps"] == [0.0]


@pytest.mark.parametrize("num_replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bfloat16(num_replicas):
    """Eight bits less of precision; no loss scale is needed."""
    plain, half = _in_float32(), _monitored("mixed_bfloat16", num_replicas)
    assert not isinstance(half.optimizer, keras.optimizers.LossScaleOptimizer)
    assert half.layers[-1].compute_dtype == "bfloat16"
    np.testing.assert_allclose(half.log["gradient_norm"], plain.log["gradient_norm"], rtol=3e-2)
    assert 1e-7 < difference(half, plain) < 3e-2


SCALED = ["loss_scale", "loss_scale_multi", "loss_scale_factor"]
EVERYDAY = [
    ("graph", "loss_scale_multi"),
    ("eager", "loss_scale_factor"),
    ("mirrored", "loss_scale"),
]


def _sensitive():
    return [support.sensitive, hooks.ValueClipping(0.05)]


@functools.cache
def _unscaled(optimizer):
    return trained("embedding", OPTIMIZERS[optimizer], gradient_hooks=_sensitive())


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    support.cells(SCALED, EVERYDAY, "loss_scale", ["graph", "eager", "xla", "mirrored"]),
)
def test_a_loss_scale_changes_nothing(mode, optimizer):
    options, num_replicas = support.MODES[mode]
    expected = _unscaled("multi" if optimizer.endswith("multi") else "sgd")
    found = trained(
        "embedding", OPTIMIZERS[optimizer], num_replicas, gradient_hooks=_sensitive(), **options
    )
    assert difference(found, expected) < 1e-6
    np.testing.assert_allclose(found.log["loss"], expected.log["loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_factor_that_is_no_power_of_two():
    plain = trained("embedding", _sgd, gradient_hooks=[support.sensitive])
    for make in (
        lambda: _sgd(loss_scale_factor=1000.0),
        lambda: support.scaled(_sgd(), 1000.0),
    ):
        found = trained("embedding", make, gradient_hooks=[support.sensitive])
        assert difference(found, plain) < 1e-6


@pytest.mark.slow
def test_a_factor_on_a_multi_optimizer():
    def with_factor():
        return support.multi_optimizer(loss_scale_factor=128.0)

    plain, found = (
        trained("embedding", make, gradient_hooks=[support.sensitive])
        for make in (support.multi_optimizer, with_factor)
    )
    assert difference(found, plain) < 1e-6


@pytest.mark.parametrize(
    ("mode", "name"),
    support.cells(
        ["loss_scale", "loss_scale_multi"],
        [("graph", "loss_scale_multi"), ("mirrored", "loss_scale")],
        "loss_scale",
        ["graph", "eager", "xla", "mirrored", "mirrored_spe"],
    ),
)
def test_overflow_costs_one_step(name, mode):
    """The scale halves; weights, statistics, hooks and metrics know nothing of it."""
    options, num_replicas = support.MODES[mode]
    y = Y.copy()
    y[21] = np.inf  # of the second batch of four, in its second half
    keep = np.r_[0:12, 24:48]
    with support.no_rewriting() if mode == "mirrored_spe" else contextlib.nullcontext():
        model, good = (
            trained(
                "normalized",
                OPTIMIZERS[name],
                num_replicas,
                gradient_hooks=[support.sensitive, hooks.PercentileClipping(50, history=3)],
                fit=fed,
                **options,
            )
            for fed in ({"x": X, "y": y}, {"x": X[keep], "y": Y[keep]})
        )
    assert model.log["skipped_steps"] == [1.0]
    assert int(model.optimizer.iterations.numpy()) == 3
    scales = [float(m.optimizer.dynamic_scale.numpy()) for m in (model, good)]
    assert scales == [2.0**11, 2.0**12]
    # A scale that is a power of two changes no bit.
    pairs = zip(
        [*model.variables, *support.hook_variables(model)],
        [*good.variables, *support.hook_variables(good)],
        strict=True,
    )
    for a, b in pairs:
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    assert model.log["loss"] == good.log["loss"]
    assert np.isfinite(model.log["loss"]).all()


def test_a_hook_that_mends_gradients_does_not_hide_an_overflow():
    """Otherwise the scale would never fall."""
    y = Y.copy()
    y[3] = np.inf
    chosen = [hooks.ZeroNonFinite(), hooks.ValueClipping(1.0)]
    model = trained("dense", OPTIMIZERS["loss_scale"], y=y, gradient_hooks=chosen)
    assert int(model.optimizer.iterations.numpy()) == 3
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**11


def test_without_hooks_bits_are_those_of_keras():
    stock, ours = (
        trained("normalized", _sgd, model_class=kind, policy="mixed_float16")
        for kind in (keras.Model, TapeModel)
    )
    support.assert_same_bits(ours, stock)
    assert ours.log == stock.log


class Forgetful(TapeModel):
    """A step of one's own, as it was before losses were scaled."""

    scales = False

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            if self.scales:
                loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class Careful(Forgetful):
    scales = True


class WithOurTape(TapeModel):
    def train_step(self, data):
        x, y = data
        with self.gradient_tape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        tape.minimize(loss)
        return {"loss": loss}


class WithApplyGradients(TapeModel):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


SLOW_PAIR = [1, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("num_replicas", SLOW_PAIR)
@pytest.mark.parametrize("name", ["loss_scale", "loss_scale_factor"])
def test_a_step_that_never_scales_is_told_so(name, num_replicas):
    with pytest.warns(UserWarning, match="`train_step` of Forgetful never scales the loss"):
        trained("dense", OPTIMIZERS[name], num_replicas, model_class=Forgetful)


@functools.cache
def _without_hooks():
    return trained("dense", OPTIMIZERS["sgd"])


@pytest.mark.parametrize("kind", [Careful, WithOurTape, WithApplyGradients])
@pytest.mark.parametrize(
    "name", ["loss_scale", pytest.param("loss_scale_factor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("num_replicas", SLOW_PAIR)
def test_a_step_that_scales_is_not(kind, name, num_replicas):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained("dense", OPTIMIZERS[name], num_replicas, model_class=kind)
    expected = _without_hooks()
    assert difference(found, expected) < 1e-6
    assert "scale_loss" not in found.optimizer.__dict__
    assert "apply" not in found.optimizer.__dict__


def test_no_loss_scale_no_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("dense", OPTIMIZERS["sgd"], model_class=Forgetful)
