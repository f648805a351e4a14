"""`compile(jit_compile="update")`: the same training, hooks and optimizer in XLA."""

import keras
import numpy as np
import pytest

from keras_tapefit import TapeModel, hooks

RNG = np.random.default_rng(0)
X = RNG.standard_normal((48, 6)).astype("float32")
Y = RNG.standard_normal((48, 1)).astype("float32")


def make(jit_compile, optimizer="adam", gradient_hooks=None, sparse=False, cls=TapeModel, **given):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    outputs = inputs
    if sparse:
        places = keras.ops.cast(keras.ops.abs(inputs) * 3, "int32")
        outputs = keras.layers.Flatten()(keras.layers.Embedding(20, 4)(places))
    outputs = keras.layers.Dense(5, "tanh")(outputs)
    outputs = keras.layers.BatchNormalization()(outputs)
    model = cls(inputs, keras.layers.Dense(1)(outputs))
    if gradient_hooks is not None:
        given["gradient_hooks"] = gradient_hooks
    model.compile(optimizer, "mse", jit_compile=jit_compile, **given)
    return model


def fit(model, x=X):
    history = model.fit(x, Y, epochs=2, batch_size=16, verbose=0, shuffle=False)
    return history.history, model.get_weights()


def assert_close(one, other, atol=1e-6):
    (left_logs, left), (right_logs, right) = one, other
    assert left_logs.keys() == right_logs.keys()
    for name in left_logs:
        np.testing.assert_allclose(left_logs[name], right_logs[name], rtol=1e-5, atol=1e-6)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol)


@pytest.mark.parametrize(
    "optimizer",
    [
        "adam",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("sgd", "adamw", "rmsprop", "nadam")),
    ],
)
def test_without_hooks_it_is_stock_keras_to_1e_6(optimizer):
    stock = fit(make("auto", optimizer, cls=keras.Model))
    assert_close(fit(make("update", optimizer)), stock)


def some_hooks():
    return [
        hooks.SkipNonFinite(),
        hooks.GradientMonitor(per_variable=True),
        hooks.GlobalNormClipping(0.5),
        hooks.UpdateMonitor(),
    ]


@pytest.mark.parametrize("sparse", [False, True])
def test_hooks_report_and_clip_as_without_it(sparse):
    plain = fit(make(False, gradient_hooks=some_hooks(), sparse=sparse))
    assert_close(fit(make("update", gradient_hooks=some_hooks(), sparse=sparse)), plain)


def test_a_rejected_step_leaves_nothing_behind():
    x = X.copy()
    x[20] = np.nan
    plain = fit(make(False, gradient_hooks=some_hooks()), x)
    compiled = fit(make("update", gradient_hooks=some_hooks()), x)
    assert compiled[0]["skipped_steps"] == [1.0, 1.0]
    assert all(np.isfinite(w).all() for w in compiled[1])
    assert_close(compiled, plain)


def test_the_state_of_hooks_is_written():
    model = make("update", gradient_hooks=[hooks.SkipNonFinite()])
    fit(model)
    names = {v.name: int(v.numpy()) for v in model.gradient_hooks[0].variables}
    assert names["steps_seen"] == 6


def test_a_number_may_be_assigned_without_a_retrace():
    model = make("update", "sgd", gradient_hooks=[hooks.GlobalNormClipping(1.0)])
    fit(model)
    model.gradient_hooks[0].max_norm = 1e-30
    before = model.get_weights()
    model.train_on_batch(X[:16], Y[:16])
    for a, b, v in zip(before, model.get_weights(), model.weights, strict=True):
        if v.trainable:
            np.testing.assert_array_equal(a, b)


def test_with_a_loss_scale():
    def scaled():
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=1024)

    plain = fit(make(False, scaled(), gradient_hooks=some_hooks()))
    assert_close(fit(make("update", scaled(), gradient_hooks=some_hooks())), plain)


def test_only_hooks_and_optimizer_are_compiled():
    model = make("update")
    assert model.jit_compile is False
    fit(model)
    assert model.get_compile_config()["jit_compile"] == "update"


def test_it_survives_saving(tmp_path):
    model = make("update", gradient_hooks=[hooks.GlobalNormClipping(0.5)])
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config()["jit_compile"] == "update"
    assert_close(fit(loaded), fit(model))


@pytest.mark.parametrize("value", ["updates", "yes", ""])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="`jit_compile` must be True, False, 'auto' or 'update'"):
        make(value)


def test_eager_mode_says_that_it_has_no_effect():
    with pytest.warns(UserWarning, match="no effect with `run_eagerly=True`"):
        model = make("update", run_eagerly=True)
    assert_close(fit(model), fit(make(False)))
