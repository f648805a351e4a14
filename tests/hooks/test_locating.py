"""Where the first value is that is not finite: faults planted at a known place."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
from keras import layers, ops

from keras_tapefit import TapeModel, callbacks, hooks


def data():
    rng = np.random.default_rng(9)
    return rng.normal(size=(24, 4)).astype("float32"), rng.uniform(1, 2, (24, 1)).astype("float32")


@keras.saving.register_keras_serializable("tests")
class Ratio(layers.Layer):
    """Divides by the sum of its inputs."""

    def call(self, inputs):
        return inputs / ops.sum(inputs, axis=-1, keepdims=True)


@keras.saving.register_keras_serializable("tests")
class Length(layers.Layer):
    """The norm of each row, whose derivative at 0 is NaN."""

    def call(self, inputs):
        return tf.norm(inputs, axis=-1, keepdims=True)


def make(middle=None, activation="tanh", dtype=None, bias=True):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,), name="x")
    hidden = layers.Dense(5, activation, use_bias=bias, name="first", dtype=dtype)(inputs)
    hidden = hidden if middle is None else middle(hidden)
    return TapeModel(inputs, layers.Dense(1, name="head", dtype=dtype)(hidden))


def log_of_zero(y, prediction):
    # At the targets that are 0.
    return tf.reduce_mean(tf.math.log(y * tf.square(prediction)), axis=-1)


def fault(name):
    """Returns a model, its loss, data with the fault in example 13, and what is to be found."""
    x, y = data()
    if name == "loss":
        y[13] = 0.0
        return make(), log_of_zero, x, y, "the loss (forward), computed of finite outputs", ""
    if name == "division":
        x[13] = 0.0
        model = make(lambda h: Ratio(name="ratio")(h), bias=False)
        return model, "mse", x, y, "the output of layer 'ratio' (forward)", "example 5"
    if name == "explosion":
        x[13] = 1e30
        model = make(lambda h: layers.Dense(3, name="square", activation=lambda v: v * v)(h), None)
        return model, "mse", x, y, "the output of layer 'square' (forward)", "example 5"
    if name == "float16":
        x[13] = 6e4
        model = make(activation=lambda v: v * v, dtype="mixed_float16")
        return model, "mse", x, y, "the output of layer 'first' (forward)", "example 5"
    if name == "input":
        x[13, 2] = np.nan
        return make(), "mse", x, y, "in the data: `x`", "example 5"
    if name == "target":
        y[13] = np.nan
        return make(), "mse", x, y, "in the data: `y`", "example 5"
    if name == "weight":
        model = make()
        model.get_layer("head").bias.assign([np.nan])
        return model, "mse", x, y, "in the weight 'head/bias', before the step", ""
    if name == "root":
        x[13] = 0.0
        root = lambda h: ops.sqrt(layers.Activation("softplus")(h) * 0 + h * h)  # noqa: E731
        model = make(lambda h: root(h), None, bias=False)
        return model, "mse", x, y, "the gradient that layer 'sqrt", "example 5"
    if name == "norm":
        x[13] = 0.0
        model = make(lambda h: Length(name="length")(h), None, bias=False)
        found = "the gradient that layer 'length' passes back to the output of layer 'first'"
        return model, "mse", x, y, found, "example 5"
    raise KeyError(name)


FAULTS = "loss division explosion float16 input target weight root norm".split()
MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "executions": {"steps_per_execution": 2, "jit_compile": False},
    "update": {"jit_compile": "update"},
}
EVERYDAY = ("graph",)


def located(name, **options):
    model, loss, x, y, what, examples = fault(name)
    gate = hooks.SkipNonFinite(locate=True)
    optimizer = keras.optimizers.SGD(1e-3)
    if name == "float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    model.compile(optimizer, loss, gradient_hooks=[gate], **options)
    before = model.get_weights()
    logs = model.fit(x[:16], y[:16], batch_size=8, shuffle=False, verbose=0).history
    return model, gate, logs, before, what, examples


@pytest.mark.filterwarnings("ignore:.*steps of this epoch were skipped")
@pytest.mark.parametrize(
    "name",
    everyday(["division", "norm", "loss"], of=FAULTS),
)
@pytest.mark.parametrize("mode", everyday(EVERYDAY, of=MODES))
def test_faults_are_found(name, mode):
    _, gate, logs, _, what, examples = located(name, **MODES[mode])
    step = 0 if name == "weight" else 1
    assert gate.located.startswith(f"The first value that was not finite was {what}")
    tail = f", at step {step}" + (f", {examples} of the batch." if examples else ".")
    assert gate.located.endswith(tail)
    if mode != "xla":
        # XLA selects where the plain gradient multiplies 0 by an infinity.
        assert logs["skipped_steps"] == [2.0 if name == "weight" else 1.0]


@pytest.mark.parametrize("name", FAULTS)
def test_one_batch_in_hand(name):
    model, loss, x, y, what, examples = fault(name)
    model.compile("sgd", loss, metrics=["mae"])
    weights = model.get_weights()
    found = model.find_non_finite(x[8:16], y[8:16])
    assert found and found.first.startswith(what)
    assert found.first.endswith(f"{examples} of the batch" if examples else what)
    assert found.first in str(found)
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    if name != "weight":
        fine = model.find_non_finite(x[:8], y[:8])
        assert not fine and str(fine).startswith("All values are finite.")


def test_the_table_of_layers():
    model = make(activation="relu")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = data()
    found = model.find_non_finite(x, y)
    with tf.GradientTape() as tape:
        hidden = model.get_layer("first")(x)
        tape.watch(hidden)
        output = model.get_layer("head")(hidden)
        loss = tf.reduce_mean(tf.square(output - y))
    gradient = np.abs(tape.gradient(loss, hidden).numpy())
    first, head, last = found.layers
    assert [first.layer, head.layer, last.layer] == ["first", "head", "loss"]
    array = np.abs(hidden.numpy())
    assert first.output.largest == pytest.approx(array.max())
    assert first.output.smallest == pytest.approx(array[array > 0].min())
    assert first.gradient.largest == pytest.approx(gradient.max(), rel=1e-5)
    assert first.gradient.smallest == pytest.approx(gradient.min(), rel=1e-5)
    assert last.output.largest == pytest.approx(float(loss), rel=1e-6)
    assert last.gradient is None
    assert set(found.weights) == {v.path for v in model.trainable_variables}


@pytest.mark.slow
def test_find_non_finite_under_a_loss_scale_and_micro_batches():
    model, loss, x, y, what, _ = fault("norm")
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=2.0**10)
    model.compile(optimizer, loss, micro_batches=2, gradient_hooks=[hooks.OutputMonitor()])
    found = model.find_non_finite(x, y)
    assert found.first.startswith(what) and found.first.endswith("example 13 of the batch")
    plain, *_ = fault("norm")
    plain.compile("sgd", loss)
    expected = plain.find_non_finite(x, y).layers[-2].gradient.largest
    assert found.layers[-2].gradient.largest == pytest.approx(expected, rel=1e-5)


def test_find_non_finite_needs_values():
    model = make()
    with pytest.raises(ValueError, match=r"must call `compile\(\)`|`find_non_finite`"):
        model.find_non_finite(*data())
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="looks at values, which a graph has not"):
        tf.function(model.find_non_finite)(*data())


def test_the_step_leaves_nothing_behind():
    _, gate, _, _, _, _ = located("norm")
    model, loss, x, y, _, _ = fault("norm")
    model.compile(keras.optimizers.SGD(1e-3), loss, gradient_hooks=[hooks.SkipNonFinite()])
    model.fit(x[:16], y[:16], batch_size=8, shuffle=False, verbose=0)
    with_it, *_ = located("norm")
    for a, b in zip(model.get_weights(), with_it.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert gate.located is not None


def test_the_error_and_the_report_say_it():
    model, loss, x, y, what, _ = fault("division")
    x[8:] = 0.0
    history = callbacks.GradientHistory()
    gate = hooks.SkipNonFinite(max_consecutive=2, locate=True)
    model.compile("sgd", loss, gradient_hooks=[gate])
    with pytest.raises(FloatingPointError, match=r"from step 1 on.*'ratio' \(forward\), at step 1"):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[history])
    assert what in str(history.report())
    assert "examples 0, 1, 2, 3, 4, 5, 6 and 7" in gate.located


def test_without_it_the_report_says_how():
    model, loss, x, y, *_ = fault("norm")
    history = callbacks.GradientHistory()
    model.compile("sgd", loss, gradient_hooks=[hooks.SkipNonFinite()])
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[history])
    assert "SkipNonFinite(locate=True)" in str(history.report())
    assert model.gradient_hooks[0].located is None


def test_a_gradient_of_a_weight_alone():
    @tf.custom_gradient
    def scaled(value, factor):
        return value * factor, lambda g: (g * factor, tf.fill(tf.shape(factor), np.nan))

    class Broken(layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

        def call(self, inputs):
            return scaled(inputs, tf.convert_to_tensor(self.factor.value))

    model = make(lambda h: Broken(name="broken")(h))
    gate = hooks.SkipNonFinite(locate=True)
    model.compile("sgd", "mse", gradient_hooks=[gate])
    x, y = data()
    with pytest.warns(UserWarning, match="were skipped"):
        model.fit(x, y, batch_size=24, verbose=0)
    assert "the gradient of the weight 'broken/factor' (backward), at step 0." in gate.located
    assert (
        model.find_non_finite(x, y).first == "the gradient of the weight 'broken/factor' (backward)"
    )


@pytest.mark.slow
def test_micro_batches_and_replicas_number_the_examples_of_the_whole_batch():
    _, gate, *_ = located("division", micro_batches=4)
    assert gate.located.endswith("at step 1, example 5 of the batch.")
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model, loss, x, y, what, _ = fault("division")
        gate = hooks.SkipNonFinite(locate=True)
        model.compile(keras.optimizers.SGD(1e-3), loss, gradient_hooks=[gate])
    x[8] = 0.0
    model.fit(x[:16], y[:16], batch_size=8, shuffle=False, verbose=0)
    assert what in gate.located
    assert gate.located.endswith("at step 1, examples 0 and 5 of the batch.")


@pytest.mark.slow
def test_accumulated_steps_and_a_custom_step():
    model, loss, x, y, what, examples = fault("norm")
    gate = hooks.SkipNonFinite(locate=True)
    optimizer = keras.optimizers.SGD(1e-3, gradient_accumulation_steps=2)
    model.compile(optimizer, loss, gradient_hooks=[gate])
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert what in gate.located and gate.located.endswith(f"step 1, {examples} of the batch.")

    class Custom(TapeModel):
        def train_step(self, data):
            x, y = data
            with self.gradient_tape() as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            tape.minimize(loss)
            return {"loss": loss}

    plain, loss, x, y, what, examples = fault("norm")
    model = Custom(plain.inputs, plain.outputs[0])
    gate = hooks.SkipNonFinite(locate=True)
    model.compile(keras.optimizers.SGD(1e-3), loss, gradient_hooks=[gate])
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert what in gate.located and gate.located.endswith(f"step 1, {examples} of the batch.")


def test_a_call_of_a_layer_that_is_called_twice():
    class Twice(TapeModel):
        def __init__(self):
            super().__init__()
            self.grow = layers.Dense(4, kernel_initializer="ones", name="grow")

        def call(self, inputs):
            return self.grow(1e20 * self.grow(1e20 * inputs))

    model = Twice()
    model.compile("sgd", "mse", gradient_hooks=[gate := hooks.SkipNonFinite(locate=True)])
    with pytest.warns(UserWarning, match="were skipped"):
        model.fit(np.ones((4, 4)), np.ones((4, 4)), verbose=0)
    assert "the output of layer 'grow', call 1 (forward)" in gate.located


def test_saved_and_loaded(tmp_path):
    model, gate, *_ = located("norm")
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.gradient_hooks[0].locate is True
    with pytest.raises(TypeError, match="`locate` must be a bool"):
        hooks.SkipNonFinite(locate=1)
    x, y = data()
    loaded.fit(x, y, verbose=0)
    assert loaded.gradient_hooks[0].located == gate.located
