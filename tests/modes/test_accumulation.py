"""`gradient_accumulation_steps`, taken over from the optimizer: a window is one big batch."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeModel, hooks
from keras_tapefit.training.objective import ModelObjective

from . import support
from .support import TOKENS, X, Y, assert_replicas_agree, difference, trained

SMALL = 4


def _scheduled(**options):
    rate = keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.5, staircase=True)
    return keras.optimizers.AdamW(
        rate, weight_decay=0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3, **options
    )


def _sgd(**options):
    return keras.optimizers.SGD(0.05, momentum=0.9, **options)


# Each takes `gradient_accumulation_steps`, or leaves it.
OPTIMIZERS = {
    "sgd": _sgd,
    "adam": functools.partial(keras.optimizers.Adam, 0.01),
    "adamw_ema_schedule": _scheduled,
    "multi": support.multi_optimizer,
    "loss_scale": lambda **options: support.scaled(_sgd(**options)),
    "loss_scale_factor": functools.partial(_sgd, loss_scale_factor=128.0),
}


@functools.cache
def _big(optimizer, model="embedding", batch_size=3 * SMALL, num_examples=48):
    return trained(
        model,
        OPTIMIZERS[optimizer],
        batch_size=batch_size,
        epochs=2,
        num_examples=num_examples,
        gradient_hooks=support.sensitive_hooks(),
    )


def _accumulated(optimizer, num_steps=3, num_replicas=1, model="embedding", **options):
    return trained(
        model,
        lambda: OPTIMIZERS[optimizer](gradient_accumulation_steps=num_steps),
        num_replicas,
        batch_size=SMALL,
        epochs=2,
        **{"gradient_hooks": support.sensitive_hooks(), **options},
    )


def _assert_equal(found, expected):
    assert difference(found, expected) < 1e-6
    assert int(found.optimizer.iterations.numpy()) == int(expected.optimizer.iterations.numpy())
    ours, theirs = (
        support.vector(
            [
                v.numpy()
                for v in m.optimizer.variables
                if v.dtype == "float32" and "gradient_accumulator" not in v.path
            ]
        )
        for m in (found, expected)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    # Of each epoch: the mean loss of its examples, the mean norm of its updates.
    for name, values in expected.log.items():
        np.testing.assert_allclose(found.log[name], values, rtol=1e-5, err_msg=name)


EVERYDAY = [
    ("graph", "sgd"),
    ("graph", "adamw_ema_schedule"),
]


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    support.cells(OPTIMIZERS, EVERYDAY, "sgd", ["graph", "mirrored"]),
)
def test_a_window_is_one_big_batch(mode, optimizer):
    """Weights, slots, averages, `iterations`, logs: all go by updates."""
    options, num_replicas = support.MODES[mode]
    found = _accumulated(optimizer, num_replicas=num_replicas, **options)
    _assert_equal(found, _big(optimizer))
    if num_replicas > 1:
        assert_replicas_agree(found)


@pytest.mark.parametrize("mode", support.modes("mirrored"))
def test_unequal_steps_and_leftovers(mode):
    """46 examples by 4 and 5 steps a window: 20, 20, and 4 + 2 at the end of the epoch."""
    options, num_replicas = support.MODES[mode]
    found = _accumulated("sgd", 5, num_replicas, num_examples=46, **options)
    expected = _big("sgd", batch_size=20, num_examples=46)
    assert int(expected.optimizer.iterations.numpy()) == 6
    _assert_equal(found, expected)


@pytest.mark.slow
def test_keras_own_is_no_such_thing():
    """What this is here for: leftovers are carried on, and the small batch counts fully."""
    stock = trained(
        "embedding",
        lambda: _sgd(gradient_accumulation_steps=5),
        batch_size=SMALL,
        epochs=2,
        num_examples=46,
        model_class=keras.Model,
    )
    ours = _accumulated("sgd", 5, num_examples=46, gradient_hooks=[])
    big = trained(
        "embedding", _sgd, batch_size=20, epochs=2, num_examples=46, model_class=keras.Model
    )
    assert difference(ours, big) < 1e-6 < 1e-3 < difference(stock, big)


@pytest.mark.slow
def test_the_last_step_of_one_example_on_two_replicas():
    """One of the replicas has nothing, and so no say in the window."""
    two = _accumulated("sgd", 5, 2, num_examples=45)
    assert_replicas_agree(two)
    assert np.isfinite(support.vector(two.get_weights())).all()
    assert int(two.optimizer.iterations.numpy()) == 6


def _linear(x, y, w):
    return 2 * x.T @ (x @ w - y) / y.size


def test_clipping_is_of_the_mean_of_the_window():
    """In float64. Clipping each part would end elsewhere."""
    inputs = keras.Input((6,))
    model = TapeModel(inputs, keras.layers.Dense(2, use_bias=False)(inputs))
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=3)
    model.compile(optimizer, "mse", gradient_hooks=[hooks.GlobalNormClipping(0.2)])
    start = np.random.default_rng(1).normal(size=(6, 2))
    model.set_weights([start])
    model.fit(X[:24], Y[:24], batch_size=4, shuffle=False, verbose=0)

    def clip(gradient):
        return gradient * 0.2 / max(np.linalg.norm(gradient), 0.2)

    x, y = X[:24].astype("float64"), Y[:24].astype("float64")
    of_mean = of_parts = start
    for i in (0, 12):
        steps = [slice(j, j + 4) for j in range(i, i + 12, 4)]
        of_mean = of_mean - 0.5 * clip(np.mean([_linear(x[s], y[s], of_mean) for s in steps], 0))
        parts = [clip(_linear(x[s], y[s], of_parts)) for s in steps]
        of_parts = of_parts - 0.5 * np.mean(parts, 0)
    np.testing.assert_allclose(model.get_weights()[0], of_mean, rtol=1e-5, atol=1e-6)
    assert np.abs(of_parts - of_mean).max() > 1e-2


def _fit_batches(model, x, y, batches):
    """Trains a model on batches of any size, one after the other."""
    losses = [
        model.fit(x[b], y[b], batch_size=len(b), shuffle=False, verbose=0).history["loss"][0]
        for b in batches
    ]
    return np.average(losses, weights=[len(b) for b in batches])


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    support.cells(
        ["sgd", "loss_scale"], [("graph", "sgd"), ("mirrored", "loss_scale")], "sgd", support.MODES
    ),
)
def test_a_bad_step_costs_itself_and_not_the_window(mode, optimizer):
    """A rejected step never happened: it is not one of the steps of a window either."""
    options, num_replicas = support.MODES[mode]
    y = Y.copy()
    # Of eleven steps of four examples seven are left: two windows and one step.
    for bad in (14, 17, 26, 43):
        y[bad] = np.nan
    gate = [hooks.SkipNonFinite()] if optimizer == "sgd" else []
    found = trained(
        "embedding",
        lambda: OPTIMIZERS[optimizer](gradient_accumulation_steps=3),
        num_replicas,
        y=y,
        batch_size=SMALL,
        num_examples=44,
        gradient_hooks=[*gate, support.sensitive],
        **options,
    )
    expected = trained("embedding", _sgd, num_examples=12, gradient_hooks=[support.sensitive])
    rest = [np.r_[20:24, 28:36], np.arange(36, 40)]
    rest_loss = _fit_batches(expected, TOKENS, Y, rest)
    loss = (12 * expected.log["loss"][0] + 16 * rest_loss) / 28
    assert difference(found, expected) < 1e-6
    assert int(found.optimizer.iterations.numpy()) == 3
    np.testing.assert_allclose(found.log["loss"], [loss], rtol=1e-5)
    assert found.log["skipped_steps"] == [4.0]
    if optimizer == "loss_scale":
        assert float(found.optimizer.dynamic_scale.numpy()) == 2.0**12 / 2**4
    if num_replicas > 1:
        assert_replicas_agree(found)


class Seen(hooks.GradientHook):
    """Keeps the loss that hooks are told."""

    uses_loss = True

    def build(self, variables):
        self.count = self.add_variable(dtype="int32")
        self.losses = self.add_variable((8,))

    def apply(self, gradients):
        here = np.arange(8) == self.count.value
        self.losses.assign(keras.ops.where(here, self.loss, self.losses.value))
        self.count.assign(self.count.value + 1)
        return gradients


@pytest.mark.parametrize("mode", support.modes("graph"))
def test_hooks_see_the_loss_of_the_window(mode):
    options, num_replicas = support.MODES[mode]
    seen, expected = Seen(), Seen()
    found = _accumulated("sgd", 5, num_replicas, num_examples=46, gradient_hooks=[seen], **options)
    big = trained(
        "embedding", _sgd, batch_size=20, epochs=2, num_examples=46, gradient_hooks=[expected]
    )
    assert difference(found, big) < 1e-6
    assert int(seen.count.numpy()) == 6
    np.testing.assert_allclose(seen.losses.numpy(), expected.losses.numpy(), rtol=1e-5)
    assert seen.losses.numpy()[:6].min() > 0.1


def test_a_spike_of_the_loss_is_skipped_by_window():
    y = Y.copy()
    y[25] = 300.0
    found = trained(
        "embedding",
        lambda: _sgd(gradient_accumulation_steps=3),
        y=y,
        batch_size=SMALL,
        gradient_hooks=[hooks.SkipSpikes(40.0, monitor="loss", num_warmup_steps=2)],
    )
    keep = np.r_[0:24, 36:48]
    expected = trained("embedding", _sgd, fit={"x": TOKENS[keep], "y": Y[keep]})
    assert difference(found, expected) < 1e-6
    assert found.log["skipped_steps"] == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_inside_a_window(micro_batches):
    found = _accumulated("sgd", micro_batches=micro_batches)
    _assert_equal(found, _big("sgd"))


def test_a_saved_model_goes_on_by_windows(tmp_path):
    """The number is the optimizer's again in a file, and plain Keras reads it there."""
    chosen = [hooks.GlobalNormClipping(0.8)]
    model = _accumulated("adam", gradient_hooks=chosen)
    assert model.optimizer.gradient_accumulation_steps == 3
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(TOKENS, Y, batch_size=SMALL, shuffle=False, verbose=0)
    support.assert_same_bits(loaded, model)
    assert int(loaded.optimizer.iterations.numpy()) == 12
    config = model.get_compile_config()["optimizer"]["config"]
    assert config["gradient_accumulation_steps"] == 3


def test_optimizers_that_disagree_are_refused():
    optimizer = support.optimizers_by_pattern(
        keras.optimizers.SGD(gradient_accumulation_steps=2),
        {"end.*": keras.optimizers.Adam(gradient_accumulation_steps=3)},
    )
    model = support.dense()
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match=r"must have the same `gradient_acc.*\[2, 3\]"):
        model.fit(X, Y, verbose=0)


class Direct(TapeModel):
    """A step of one's own that calls the optimizer by itself."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        self._update(loss, tape)
        return {"loss": loss}

    def _update(self, loss, tape):
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)


class Mended(Direct):
    def _update(self, loss, tape):
        gradients = tape.gradient(loss, self.trainable_variables)
        self.apply_gradients(zip(gradients, self.trainable_variables, strict=True))


def test_a_step_that_goes_past_the_window_is_keras_own():
    """Its optimizer accumulates by itself, as in Keras."""
    found = _accumulated("sgd", model_class=Direct, gradient_hooks=[])

    class Plain(keras.Model):
        train_step, _update = Direct.train_step, Direct._update

    expected = trained(
        "embedding",
        lambda: _sgd(gradient_accumulation_steps=3),
        batch_size=SMALL,
        epochs=2,
        model_class=Plain,
    )
    support.assert_same_bits(found, expected)


@pytest.mark.slow
def test_a_step_that_passes_gradients_on_is_not():
    found = _accumulated("sgd", model_class=Mended)
    assert difference(found, _big("sgd")) < 1e-6


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_step_is_traced_once(num_replicas, monkeypatch):
    """Its window is known before, or from this one trace; leftovers are no other step."""
    traced = []
    forward = ModelObjective.forward

    def counted(self, batch):
        traced.append(1)
        return forward(self, batch)

    monkeypatch.setattr(ModelObjective, "forward", counted)
    trained("dense", lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3), num_replicas)
    assert len(traced) == num_replicas
