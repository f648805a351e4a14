"""Numbers: floats, schedules and functions of the step, assigned without a retrace."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import hooks

X, Y = np.array([[3.0, 4.0]]), np.array([[0.0]])


class Counting(hooks.GradientHook):
    """Scales, and counts how often it is traced."""

    factor = hooks.Number()
    other = hooks.Number(optional=True)

    def __init__(self, factor, other=None, targets=None, name=None):
        super().__init__(targets=targets, name=name)
        self.factor = factor
        self.other = other
        self.traces = 0

    def apply(self, gradients):
        self.traces += 1
        if self.other is None:
            return gradients.scale(self.factor)
        return gradients.scale(self.factor * self.other)


@pytest.fixture
def seen(line):
    """The factor that the optimizer saw, and how often the step was traced."""
    hook = line.gradient_hooks.add(Counting(1.0))

    def step(reset=True):
        if reset:
            line.set_weights([np.ones((2, 1))])
            line.optimizer.iterations.assign(0)
        for _ in range(1):
            before = line.get_weights()[0]
            line.train_on_batch(X, Y)
        return float((before - line.get_weights()[0])[0, 0]) / 42

    return hook, step


def test_floats_are_assigned_without_a_retrace(seen):
    hook, step = seen
    for value in (1.0, 0.5, 2, np.float32(0.25), -1.0):
        hook.factor = value
        assert step() == pytest.approx(float(value), rel=1e-6)
        assert hook.factor is value
    assert hook.traces == 1


def test_another_kind_is_traced_once(seen):
    hook, step = seen
    step()
    hook.factor = lambda index: tf.cast(index, tf.float32) + 3.0
    assert step() == pytest.approx(3.0) and step() == pytest.approx(3.0)
    assert hook.traces == 2
    hook.factor = 0.5
    assert step() == pytest.approx(0.5)
    hook.factor = 0.25
    assert step() == pytest.approx(0.25)
    assert hook.traces == 3


def test_optional_numbers(seen):
    hook, step = seen
    assert step() == pytest.approx(1.0)
    hook.other = 4.0
    assert step() == pytest.approx(4.0)
    hook.other = 8.0
    assert step() == pytest.approx(8.0) and hook.traces == 2
    hook.other = None
    assert step() == pytest.approx(1.0)


def test_schedules_follow_the_updates(line):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [1.0, 0.5, 0.25])
    line.gradient_hooks.add(hooks.GradientScaling(schedule))
    line.gradient_hooks.insert(0, hooks.SkipNonFinite())
    found = []
    for target in (0.0, np.nan, 0.0, 0.0):
        line.set_weights([np.ones((2, 1))])
        line.train_on_batch(X, np.array([[target]]))
        found.append(float((1 - line.get_weights()[0])[0, 0]) / 42)
    # The skipped step is no step of the schedule.
    assert found == pytest.approx([1.0, 0.0, 0.5, 0.25])


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}])
def test_numbers_are_live_in_every_mode(line, options):
    line.compile(
        keras.optimizers.SGD(1.0), "mse", gradient_hooks=[hooks.GradientScaling(1.0)], **options
    )
    for value in (1.0, 0.5):
        line.gradient_hooks[0].factor = value
        line.set_weights([np.ones((2, 1))])
        line.train_on_batch(X, Y)
        np.testing.assert_allclose(1 - line.get_weights()[0].ravel(), [42 * value, 56 * value])


def test_a_callback_may_assign_in_the_middle_of_fit(line):
    hook = line.gradient_hooks.add(Counting(0.0))
    values = []

    class Assign(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            hook.factor = float(batch)
            self.before = self.model.get_weights()[0]

        def on_train_batch_end(self, batch, logs=None):
            values.append(float(np.abs(self.before - self.model.get_weights()[0]).max()))

    line.fit(np.repeat(X, 3, 0), np.repeat(Y, 3, 0), batch_size=1, verbose=0, callbacks=[Assign()])
    assert values[0] == 0 and values[1] == pytest.approx(56) and values[2] > 56
    assert hook.traces == 1


def test_outside_a_step_a_number_is_what_was_given():
    hook = hooks.GlobalNormClipping(3)
    assert hook.max_norm == 3 and isinstance(hook.max_norm, int)
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.5)
    hook.max_norm = schedule
    assert hook.max_norm is schedule
    assert isinstance(hooks.GlobalNormClipping.max_norm, hooks.Number)


@pytest.mark.parametrize(
    ("options", "value", "text"),
    [
        ({"above": 0}, 0, "`n` must be a positive number. Received: n=0"),
        ({"above": 1}, 1.0, "`n` must be above 1. Received: n=1.0"),
        ({"minimum": 0}, -0.5, "`n` must be zero or a positive number. Received: n=-0.5"),
        ({"minimum": 1}, 0.5, "`n` must be at least 1. Received: n=0.5"),
        ({"maximum": 1}, 2, "`n` must be at most 1. Received: n=2"),
        ({}, float("nan"), "`n` must not be NaN. Received: n=nan"),
    ],
)
def test_bounds_hold_whenever_a_number_is_assigned(options, value, text):
    cls = type("Bounded", (hooks.GradientHook,), {"n": hooks.Number(**options)})
    hook = cls()
    with pytest.raises(ValueError, match=text):
        hook.n = value
    with pytest.raises(AttributeError, match="'Bounded' has not been given its `n`"):
        hook.n  # noqa: B018
    for wrong in ("1", None, True, [1.0], tf.constant(1.0)):
        with pytest.raises(TypeError, match="`n` must be a number, a `keras.optimizers.schedules`"):
            hook.n = wrong


def test_a_refused_number_leaves_the_old_one(line):
    hook = line.gradient_hooks.add(hooks.GlobalNormClipping(5.0))
    line.train_on_batch(X, Y)
    with pytest.raises(ValueError, match="`max_norm` must be a positive number"):
        hook.max_norm = -1
    line.set_weights([np.ones((2, 1))])
    line.train_on_batch(X, Y)
    np.testing.assert_allclose(1 - line.get_weights()[0].ravel(), [3, 4], rtol=1e-6)
