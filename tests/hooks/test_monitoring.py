"""Log entries: epoch means of what was measured."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeSequential, hooks

RNG = np.random.default_rng(23)
X, Y = RNG.normal(size=(20, 4)), RNG.normal(size=(20, 2))


class Collect(keras.callbacks.Callback):
    """The model's weights at the start of each step."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_begin(self, batch, logs=None):
        self.weights.append(self.model.get_weights())


@pytest.fixture
def fitted(two_layers):
    def fit(*gradient_hooks, batch_size=8, epochs=2, **options):
        collect = Collect()
        two_layers.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            "mse",
            gradient_hooks=[*gradient_hooks],
            **options,
        )
        history = two_layers.fit(
            X,
            Y,
            batch_size=batch_size,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[collect],
        )
        return history.history, [*collect.weights, two_layers.get_weights()]

    return fit


def _gradients(two_layers, weights):
    """Gradients of each of the three batches, at the weights of that step."""
    norms = []
    kept = two_layers.get_weights()
    for i, start in enumerate((0, 8, 16)):
        two_layers.set_weights(weights[i])
        stop = start + 8
        norms.append(two_layers.compute_gradients(X[start:stop], Y[start:stop]))
    two_layers.set_weights(kept)
    return norms


def test_epoch_means_of_the_norm(two_layers, fitted):
    history, weights = fitted(hooks.GradientMonitor(per_variable=True))
    for epoch in range(2):
        gradients = _gradients(two_layers, weights[3 * epoch :])
        expected = np.mean([float(g.global_norm()) for g in gradients])
        assert history["gradient_norm"][epoch] == pytest.approx(expected, rel=1e-5)
        for variable in two_layers.variables:
            expected = np.mean([float(g.norms()[variable.path]) for g in gradients])
            entry = history[f"gradient_norm/{variable.path}"][epoch]
            assert entry == pytest.approx(expected, rel=1e-5)


def test_monitors_before_and_after_clipping(fitted):
    history, _ = fitted(
        hooks.GradientMonitor(),
        hooks.GlobalNormClipping(1e-3),
        hooks.GradientMonitor(name="clipped"),
        hooks.GradientMonitor(targets="first/*", name="first"),
    )
    assert history["clipped_norm"] == pytest.approx([1e-3, 1e-3], rel=1e-5)
    assert history["first_norm"][0] < 1e-3 < history["gradient_norm"][0]


@pytest.mark.parametrize("options", [{"steps_per_execution": 2}, {"run_eagerly": True}])
def test_means_do_not_depend_on_the_mode(two_layers, fitted, options):
    weights = two_layers.get_weights()
    reference, _ = fitted(hooks.GradientMonitor(), hooks.UpdateMonitor())
    two_layers.set_weights(weights)
    history, _ = fitted(hooks.GradientMonitor(), hooks.UpdateMonitor(), **options)
    for name in ("gradient_norm", "update_ratio", "loss"):
        assert history[name] == pytest.approx(reference[name], rel=1e-5)


def _ratio(new, old):
    flat = [np.concatenate([w.ravel().astype("float64") for w in ws]) for ws in (new, old)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


def test_update_ratio(two_layers, fitted):
    history, weights = fitted(
        hooks.UpdateMonitor(per_variable=True), hooks.UpdateMonitor(targets="second/*", name="end")
    )
    for epoch in range(2):
        steps = [(weights[3 * epoch + i + 1], weights[3 * epoch + i]) for i in range(3)]
        expected = np.mean([_ratio(new, old) for new, old in steps])
        assert history["update_ratio"][epoch] == pytest.approx(expected, rel=1e-4)
        expected = np.mean([_ratio(new[2:], old[2:]) for new, old in steps])
        assert history["end_ratio"][epoch] == pytest.approx(expected, rel=1e-4)
        kernel = np.mean([_ratio(new[:1], old[:1]) for new, old in steps])
        entry = history["update_ratio/first/kernel"][epoch]
        assert entry == pytest.approx(kernel, rel=1e-4)


def test_update_ratio_counts_weight_decay_and_not_skipped_steps(line):
    line.compile(
        keras.optimizers.SGD(0.1, weight_decay=0.5),
        "mse",
        gradient_hooks=[hooks.SkipNonFinite(), hooks.UpdateMonitor()],
    )
    x, y = np.zeros((2, 2)), np.array([[0.0], [np.nan]])
    history = line.fit(x, y, batch_size=1, shuffle=False, verbose=0).history
    assert history["update_ratio"] == pytest.approx([0.05], rel=1e-5)
    assert history["skipped_steps"] == [1.0]


def test_update_ratio_of_zero_weights_is_zero(line):
    line.set_weights([np.zeros((2, 1))])
    line.gradient_hooks.set([hooks.UpdateMonitor()])
    history = line.fit(np.ones((1, 2)), np.ones((1, 1)), verbose=0).history
    assert history["update_ratio"] == [0.0]


def test_update_ratio_sees_what_later_hooks_leave(line):
    x, y = np.array([[3.0, 4.0]]), np.array([[0.0]])
    line.gradient_hooks.set([hooks.LearningRateMultiplier(0.5), hooks.UpdateMonitor()])
    history = line.fit(x, y, verbose=0).history
    assert history["update_ratio"] == pytest.approx([35 / np.sqrt(2)], rel=1e-5)


def test_log_entries_are_there_for_callbacks(two_layers):
    two_layers.compile("sgd", "mse", gradient_hooks=[hooks.GradientMonitor()])
    stop = keras.callbacks.EarlyStopping(monitor="gradient_norm", patience=0, mode="max")
    history = two_layers.fit(X, Y, epochs=50, verbose=0, callbacks=[stop])
    assert len(history.epoch) < 50
    assert "val_gradient_norm" not in history.history


def _mirrored():
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


_MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "steps per execution": {"steps_per_execution": 3},
    "replicas": {"strategy": _mirrored},
    "replicas, steps per execution": {"strategy": _mirrored, "steps_per_execution": 2},
    "loss scale": {"optimizer": keras.optimizers.LossScaleOptimizer},
}


@pytest.mark.parametrize("options", _MODES.values(), ids=_MODES.keys())
def test_gradients_of_validation_batches(options):
    """Against float64 NumPy: the gradient of `mean((x @ w - y)²)` is `2/n · xᵀ(x @ w - y)`.

    Of the last batches replicas have unequal parts. Dropout is off in an evaluation.
    """
    options = dict(options)
    with options.pop("strategy", tf.distribute.get_strategy)().scope():
        model = TapeSequential(
            [keras.Input((4,)), layers.Dense(1, use_bias=False), layers.Dropout(0.0)]
        )
        optimizer = options.pop("optimizer", lambda inner: inner)(keras.optimizers.SGD(0.1))
        monitor = hooks.GradientMonitor(validation=True)
        model.compile(optimizer, "mse", gradient_hooks=[monitor], **options)
    w = np.ones((4, 1))
    model.set_weights([w])
    y = Y[:, :1]

    def gradient(x, y):
        return 2 / len(x) * x.T @ (x @ w - y)

    mean = np.zeros((4, 1))
    for start in (0, 8, 16):
        g = gradient(X[start : start + 8], y[start : start + 8])
        mean = 0.9 * mean + 0.1 * g
        w = w - 0.1 * g
    held_out = [gradient(X[i : i + 8], y[i : i + 8]) for i in (0, 8)]
    held_out.append(gradient(X[16:19], y[16:19]))
    norms = [np.linalg.norm(g) for g in held_out]
    cosines = [
        (g * mean).sum() / norm / np.linalg.norm(mean)
        for g, norm in zip(held_out, norms, strict=True)
    ]
    history = model.fit(
        X,
        y,
        batch_size=8,
        shuffle=False,
        verbose=0,
        validation_data=(X[:19], y[:19]),
        validation_batch_size=8,
    ).history
    assert history["val_gradient_norm"] == pytest.approx([np.mean(norms)], rel=1e-5)
    assert history["val_gradient_cosine"] == pytest.approx([np.mean(cosines)], rel=1e-5)
    np.testing.assert_allclose(model.get_weights()[0], w, rtol=1e-5)
    logs = model.evaluate(X[:19], y[:19], batch_size=8, verbose=0, return_dict=True)
    assert logs["gradient_norm"] == pytest.approx(np.mean(norms), rel=1e-5)


def test_an_evaluation_changes_nothing_and_follows_the_list_of_hooks(two_layers):
    two_layers.gradient_hooks.set([hooks.GradientMonitor(name="all", validation=True)])
    assert "val_all_cosine" in two_layers.fit(X, Y, validation_split=0.5, verbose=0).history
    two_layers.freeze("first/*")
    before = [v.numpy() for v in [*two_layers.variables, *two_layers.optimizer.variables]]
    logs = two_layers.evaluate(X, Y, verbose=0, return_dict=True)
    g = two_layers.compute_gradients(X, Y)
    assert logs["all_norm"] == pytest.approx(float(g.global_norm()), rel=1e-5)
    after = [v.numpy() for v in [*two_layers.variables, *two_layers.optimizer.variables]]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    two_layers.gradient_hooks.set([hooks.GradientMonitor()])
    assert set(two_layers.evaluate(X, Y, verbose=0, return_dict=True)) == {"loss"}


def test_two_hooks_may_not_report_the_same_name(two_layers):
    two_layers.gradient_hooks.set([hooks.GradientMonitor(), hooks.GradientMonitor()])
    with pytest.raises(ValueError, match="Two hooks report 'gradient_norm'. Give one of them a `n"):
        two_layers.train_on_batch(X, Y)


def test_what_a_hook_of_ones_own_reports():
    class Counts(hooks.GradientHook):
        def apply(self, gradients):
            self.report("one", 1.0, reduction="sum")
            self.report("index", self.step)
            return gradients

    model = TapeSequential([keras.Input((4,)), layers.Dense(2)])
    model.compile("sgd", "mse", gradient_hooks=[Counts()])
    history = model.fit(X, Y, batch_size=5, epochs=2, verbose=0).history
    assert history["one"] == [4.0, 4.0]
    assert history["index"] == [1.5, 5.5]
    assert [m.name for m in model.metrics] == ["loss"]


def test_wrong_arguments():
    for make in (hooks.GradientMonitor, hooks.UpdateMonitor):
        with pytest.raises(
            TypeError, match="`per_variable` must be a bool. Received: per_variable=1"
        ):
            make(per_variable=1)
    with pytest.raises(TypeError, match="`validation` must be a bool. Received: validation='yes'"):
        hooks.GradientMonitor(validation="yes")
    hook = hooks.GradientMonitor()
    with pytest.raises(
        ValueError, match="`reduction` must be 'mean' or 'sum'. Received: reduction="
    ):
        hook.report("x", 1.0, reduction="max")
    for use in (lambda: hook.report("x", 1.0), lambda: hook.step, lambda: hook.loss):
        with pytest.raises(
            RuntimeError, match="only inside `apply` and `after_update` of 'gradien"
        ):
            use()
    with pytest.raises(RuntimeError, match="`unit` can be used once 'gradient_monitor' is being b"):
        hook.unit(None)
    with pytest.raises(RuntimeError, match="`layer` can be used once 'gradient_monitor' is being"):
        hook.layer(None)
