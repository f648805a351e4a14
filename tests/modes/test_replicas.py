"""`MirroredStrategy`: N replicas equal one device on the global batch."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday

from keras_tapefit import hooks

from . import support
from .support import OPTIMIZERS, assert_replicas_agree, difference, trained

OTHERS = [n for n in OPTIMIZERS if n != "sgd"]
SIZES = everyday([2], of=[2, 3, 4])


def _hooks():
    return [support.sensitive, hooks.GlobalNormClipping(0.8), hooks.GradientNoise(0.05, seed=3)]


@functools.cache
def _alone(model, optimizer, epochs=1):
    """On one device."""
    return trained(model, OPTIMIZERS[optimizer], epochs=epochs, gradient_hooks=_hooks())


def _check(model, optimizer, num_replicas, epochs=1, **options):
    found = trained(
        model,
        OPTIMIZERS[optimizer],
        num_replicas,
        epochs=epochs,
        gradient_hooks=_hooks(),
        **options,
    )
    expected = _alone(model, optimizer, epochs)
    assert difference(found, expected) < 1e-6
    np.testing.assert_allclose(found.log["loss"], expected.log["loss"], rtol=1e-5)
    assert int(found.optimizer.iterations.numpy()) == 4 * epochs
    assert_replicas_agree(found)


@pytest.mark.parametrize("model", ["dense", "embedding"])
@pytest.mark.parametrize("num_replicas", SIZES)
def test_equal_one_device(model, num_replicas):
    _check(model, "sgd", num_replicas, epochs=2)


@pytest.mark.parametrize("optimizer", everyday(["adamw_ema", "loss_scale_multi"], of=OTHERS))
def test_equal_one_device_with_other_optimizers(optimizer):
    _check("embedding", optimizer, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "num_replicas"), [("embedding", 3), ("dense", 4)])
@pytest.mark.parametrize("optimizer", OTHERS)
def test_equal_one_device_with_all(model, optimizer, num_replicas):
    _check(model, optimizer, num_replicas)


@pytest.mark.parametrize("optimizer", everyday(["adamw_ema", "loss_scale"], of=OPTIMIZERS))
def test_without_hooks_bits_are_those_of_keras(optimizer):
    """Loss scale as well, where no replica overflows."""
    runs = [
        trained("dense", OPTIMIZERS[optimizer], 2, model_class=kind)
        for kind in (keras.Model, support.TapeModel)
    ]
    support.assert_same_bits(runs[1], runs[0])
    assert runs[1].log == runs[0].log


CLIPS = {"global_clipnorm": 0.3, "clipnorm": 0.1, "clipvalue": 0.02}


@pytest.mark.parametrize(
    ("name", "with_hook"),
    [
        ("global_clipnorm", False),
        ("clipvalue", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("global_clipnorm", True),
                ("clipvalue", False),
                ("clipnorm", False),
                ("clipnorm", True),
            ]
        ),
    ],
)
def test_clipping_of_the_optimizer_is_of_the_sum(name, with_hook):
    """Keras clips on each replica before the sum: up to n times the norm."""
    clip = {name: CLIPS[name]}
    chosen = [support.sensitive] if with_hook else []

    def optimizer():
        return keras.optimizers.SGD(0.5, **clip)

    one, two = (trained("dense", optimizer, n, gradient_hooks=chosen) for n in (1, 2))
    assert difference(two, one) < 1e-6
    if not with_hook:
        stock = trained("dense", optimizer, 2, model_class=keras.Model)
        assert difference(stock, one) > 1e-3


@pytest.mark.parametrize(
    "optimizer", everyday(["sgd", "loss_scale"], of=["sgd", "loss_scale", "loss_scale_multi"])
)
def test_a_nan_on_one_replica_is_seen_by_all(optimizer):
    y = support.Y.copy()
    y[9] = np.nan  # of the first batch, on the second replica

    def gate():
        return hooks.SkipNonFinite() if optimizer == "sgd" else support.sensitive

    one, two = (
        trained("dense", OPTIMIZERS[optimizer], n, y=y, gradient_hooks=[gate()]) for n in (1, 2)
    )
    assert difference(two, one) < 1e-6
    assert two.log["skipped_steps"] == [1.0]
    assert_replicas_agree(two)
    assert int(two.optimizer.iterations.numpy()) == 3
    if optimizer != "sgd":
        assert float(two.optimizer.dynamic_scale.numpy()) == 2.0**11


def test_a_loss_scale_without_hooks_is_lowered_by_all():
    """Keras looks at the first replica only: all its weights would be NaN."""
    y = support.Y.copy()
    y[9] = np.nan
    model = trained("dense", OPTIMIZERS["loss_scale"], 2, y=y)
    assert np.isfinite(support.vector(model.get_weights())).all()
    assert int(model.optimizer.iterations.numpy()) == 3
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**11


@pytest.mark.parametrize("num_replicas", SIZES)
def test_state_of_hooks_counts_steps(num_replicas):
    class Counting(hooks.GradientHook):
        def build(self, variables):
            self.count = self.add_variable(dtype="int64", name="count")

        def apply(self, gradients):
            self.count.assign(self.count.value + 1)
            return gradients

    counting = Counting()
    model = trained("dense", OPTIMIZERS["adam"], num_replicas, gradient_hooks=[counting])
    assert int(counting.count.numpy()) == 4
    assert int(model.optimizer.iterations.numpy()) == 4
    assert_replicas_agree(model)


def test_batch_normalization_trains():
    """Each replica normalizes its own examples, as in Keras; weights stay in step."""
    model = trained("normalized", OPTIMIZERS["sgd"], 2, gradient_hooks=[support.sensitive])
    assert_replicas_agree(model)
    stock, ours = (
        trained("normalized", OPTIMIZERS["sgd"], 2, model_class=kind)
        for kind in (keras.Model, support.TapeModel)
    )
    support.assert_same_bits(ours, stock)


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("batch_size", everyday([7], of=[7, 15]))
def test_uneven_batches(batch_size, options):
    """Keras averages replicas alike, however few examples one has, and may have none."""
    arguments = {"batch_size": batch_size, "gradient_hooks": [support.sensitive], **options}
    one = trained("dense", OPTIMIZERS["sgd"], **arguments)
    other = trained("dense", OPTIMIZERS["sgd"], 2, **arguments)
    assert difference(other, one) < 1e-6
    np.testing.assert_allclose(other.log["loss"], one.log["loss"], rtol=1e-5)
    assert_replicas_agree(other)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mirrored_spe", "mirrored_eager"])
@pytest.mark.parametrize("optimizer", ["sgd", "loss_scale"])
def test_other_modes_on_replicas(mode, optimizer):
    """Four steps in executions of three: the last one has a step of its own."""
    options, num_replicas = support.MODES[mode]
    _check("embedding", optimizer, num_replicas, **options)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [2, 5])
def test_micro_batches_on_replicas(micro_batches):
    _check("embedding", "sgd", 2, micro_batches=micro_batches)


COUNTS = {
    "none": (lambda: [], None, (1, 1)),
    "hooks": (
        lambda: [hooks.SkipNonFinite(), hooks.GradientMonitor(), hooks.GlobalNormClipping(1.0)],
        None,
        (1, 1),
    ),
    "spikes": (lambda: [hooks.SkipSpikes()], None, (1, 1)),
    "noise scale": (lambda: [hooks.NoiseScale()], None, (1, 2)),
    "accumulated": (lambda: [hooks.GradientMonitor()], 2, (1, 1)),
    "accumulated with a gate": (lambda: [hooks.SkipNonFinite()], 2, (1, 2)),
}


@pytest.mark.parametrize("case", COUNTS)
def test_what_replicas_sum(case, monkeypatch):
    """As docs/performance.md says; the gradients of a window are summed where it is full."""
    make, steps, expected = COUNTS[case]
    sums = {"gradients": 0, "numbers": 0}
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def counted(self, op, value, options=None):
        sums["gradients" if isinstance(value, list) else "numbers"] += 1
        return all_reduce(self, op, value, options)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", counted)
    optimizer = functools.partial(keras.optimizers.SGD, 0.1, gradient_accumulation_steps=steps)
    trained("dense", optimizer, 2, gradient_hooks=make())
    # Each replica asks for each sum.
    assert (sums["gradients"] / 2, sums["numbers"] / 2) == expected
