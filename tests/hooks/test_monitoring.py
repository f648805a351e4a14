"""Log entries: epoch means of what was measured."""

import keras
import numpy as np
import pytest
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
