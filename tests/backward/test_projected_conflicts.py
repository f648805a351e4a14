"""PCGrad against the worked number and float64 NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import BATCH, NUM_STEPS, assert_same_weights, by_hand, trained

from keras_tapefit import TapeModel, TapeSequential, backward
from keras_tapefit.gradients import draws

RNG = np.random.default_rng(8)
X = RNG.normal(size=(BATCH * NUM_STEPS, 3)).astype("float32")
Y = {
    "a": RNG.normal(size=(BATCH * NUM_STEPS, 1)).astype("float32"),
    "b": RNG.normal(size=(BATCH * NUM_STEPS, 1)).astype("float32"),
    "c": RNG.normal(size=(BATCH * NUM_STEPS, 1)).astype("float32"),
}
LOSSES = {"a": "mse", "b": "mae", "c": "mse"}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


class Pair(TapeModel):
    """Its one weight vector is its output."""

    def build(self, shape):
        self.w = self.add_weight(shape=(2,), initializer="zeros", name="w")

    def call(self, x):
        return tf.ones_like(x) * self.w


def two(directions, **kwargs):
    """Gradients of losses that are linear in `Pair`'s weights."""

    def tasks(y_true, y_pred):
        return [tf.reduce_mean(tf.linalg.matvec(y_pred, tf.constant(d))) for d in directions]

    model = Pair()
    model.compile("sgd", backward=backward.ProjectedConflicts(tasks, **kwargs))
    (gradient,) = model.compute_gradients(
        np.ones((4, 2), "float32"), np.ones((4, 2), "float32")
    ).values()
    return gradient.numpy()


@pytest.mark.parametrize(
    "directions, expected",
    [
        ([[1.0, 0.0], [-1.0, 1.0]], [0.5, 1.5]),
        # No conflict, a zero task, and two that are opposite.
        ([[1.0, 0.0], [1.0, 1.0]], [2.0, 1.0]),
        ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0]),
        ([[1.0, 2.0], [-1.0, -2.0]], [0.0, 0.0]),
        ([[1e19, 0.0], [-1e19, 1e19]], [0.5e19, 1.5e19]),
        ([[1e-19, 0.0], [-1e-19, 1e-19]], [0.5e-19, 1.5e-19]),
    ],
)
def test_worked_numbers(directions, expected):
    scale = np.abs(directions).max()
    np.testing.assert_allclose(two(directions) / scale, np.array(expected) / scale, atol=3e-7)


def pcgrad(gradients, orders):
    """The rule of the paper in float64, one vector a task."""
    total = np.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        g = gradients[i].copy()
        for j in order:
            square = gradients[j] @ gradients[j]
            if j != i and square > 0 and g @ gradients[j] < 0:
                g -= (g @ gradients[j]) / square * gradients[j]
        total += g
    return total


def orders_of(seed, step, num_tasks):
    return np.argsort(draws.uniform((num_tasks, num_tasks), (seed, step)).numpy(), axis=1)


def test_random_order_against_float64():
    directions = RNG.normal(size=(5, 2)).astype("float32")
    results = {}
    for seed in range(4):
        results[seed] = two(directions.tolist(), seed=seed)
        truth = pcgrad(directions.astype("float64"), orders_of(seed, 0, 5))
        np.testing.assert_allclose(results[seed], truth, atol=1e-5)
    assert len({tuple(np.round(r, 4)) for r in results.values()}) > 1


def make():
    inputs = keras.Input((3,))
    hidden = layers.Dense(5, activation="tanh", kernel_regularizer="l2")(inputs)
    hidden = layers.ActivityRegularization(l2=0.01)(hidden)
    outputs = {name: layers.Dense(1, name=name)(hidden) for name in LOSSES}
    return TapeModel(inputs, outputs)


def _task_losses(y, y_pred):
    return [
        tf.reduce_mean(tf.square(y["a"] - y_pred["a"])),
        2.0 * tf.reduce_mean(tf.abs(y["b"] - y_pred["b"])),
        0.5 * tf.reduce_mean(tf.square(y["c"] - y_pred["c"])),
    ]


def by_rule(model, x, y, step):
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        losses = _task_losses(y, model(x, training=True))
        rest = sum(model.losses)
    zeros = tf.UnconnectedGradients.ZERO
    rows = [tape.gradient(loss, variables, unconnected_gradients=zeros) for loss in losses]
    flat = [np.concatenate([np.float64(g).ravel() for g in row]) for row in rows]
    total = pcgrad(flat, orders_of(4, step, 3))
    sizes = np.cumsum([int(np.prod(v.shape)) for v in variables])[:-1]
    parts = [np.reshape(p, v.shape) for p, v in zip(np.split(total, sizes), variables, strict=True)]
    extra = tape.gradient(rest, variables, unconnected_gradients=zeros)
    return [tf.constant(p, tf.float32) + e for p, e in zip(parts, extra, strict=True)]


@pytest.mark.parametrize("losses", ["compiled", "function"])
def test_equals_the_rule_in_every_mode(mode, losses):
    """On replicas too the gradients are those of the whole batch."""
    if losses == "compiled":
        kwargs = {"loss": LOSSES, "loss_weights": WEIGHTS}
        method = backward.ProjectedConflicts(seed=4)
    else:
        kwargs = {"loss": None}
        method = backward.ProjectedConflicts(_task_losses, seed=4)
    model = trained(mode, make, X, Y, backward=method, **kwargs)
    assert_same_weights(model, by_hand(make, by_rule, X, Y))
    plain = trained(mode, make, X, Y, loss=LOSSES, loss_weights=WEIGHTS)
    moved = [
        np.abs(a - b).max() for a, b in zip(model.get_weights(), plain.get_weights(), strict=True)
    ]
    assert max(moved) > 1e-3


def test_logs_are_those_of_the_model(mode):
    """A task that no other meets is projected by nothing: the plain model's logs."""

    def disjoint():
        inputs = keras.Input((3,))
        outputs = {
            name: layers.Dense(1, name=name, kernel_regularizer="l2")(inputs) for name in LOSSES
        }
        return TapeModel(inputs, outputs)

    kwargs = {"loss": LOSSES, "loss_weights": WEIGHTS, "metrics": {"a": ["mae"]}}
    model = trained(mode, disjoint, X, Y, backward=backward.ProjectedConflicts(), **kwargs)
    plain = trained(mode, disjoint, X, Y, **kwargs)
    assert_same_weights(model, plain)
    assert list(model.history_of_fit) == list(plain.history_of_fit)
    for name, values in plain.history_of_fit.items():
        np.testing.assert_allclose(model.history_of_fit[name], values, rtol=1e-5)


def test_a_compute_loss_of_the_models_own_is_kept():
    class Mine(TapeModel):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + 3.0 * tf.reduce_sum(self.layers[1].bias)

    def own():
        inputs = keras.Input((3,))
        hidden = layers.Dense(4, name="hidden")(inputs)
        return Mine(inputs, {name: layers.Dense(1, name=name)(hidden) for name in LOSSES})

    kwargs = {"loss": LOSSES, "backward": backward.ProjectedConflicts()}
    keras.utils.set_random_seed(0)
    model = own()
    model.compile("sgd", **kwargs)
    keras.utils.set_random_seed(0)
    inputs_of = own()
    plain = TapeModel(inputs_of.inputs, inputs_of.output)
    plain.compile("sgd", **kwargs)
    given = model.compute_gradients(X, Y)["hidden/bias"]
    base = plain.compute_gradients(X, Y)["hidden/bias"]
    np.testing.assert_allclose(given, base + 3.0, rtol=1e-5)


def test_lists_of_outputs_and_of_losses():
    inputs = keras.Input((3,))
    hidden = layers.Dense(4)(inputs)
    outputs = [layers.Dense(1)(hidden), layers.Dense(1)(hidden)]
    model = TapeModel(inputs, outputs)
    method = backward.ProjectedConflicts()
    model.compile("sgd", ["mse", "mae"], loss_weights=[1.0, 0.5], backward=method)
    history = model.fit(X, [Y["a"], Y["b"]], verbose=0).history
    assert np.isfinite(history["loss"]).all()
    before = model.loss
    assert before == ["mse", "mae"]


def test_embeddings_that_one_task_only_uses():
    inputs = keras.Input((), dtype="int32")
    shared = layers.Embedding(6, 3)(inputs)
    other = layers.Embedding(6, 3)(inputs)
    joined = layers.Add()([shared, other])
    model = TapeModel(
        inputs, {"a": layers.Dense(1, name="a")(shared), "b": layers.Dense(1, name="b")(joined)}
    )
    model.compile("sgd", {"a": "mse", "b": "mse"}, backward=backward.ProjectedConflicts())
    ids = RNG.integers(0, 6, size=8)
    targets = {name: Y[name][:8] for name in "ab"}
    gradients = model.compute_gradients(ids, targets)
    with tf.GradientTape(persistent=True) as tape:
        y_pred = model(ids)
        losses = [tf.reduce_mean(tf.square(targets[n] - y_pred[n])) for n in "ab"]
    variables = [v.value for v in model.trainable_variables]
    zeros = tf.UnconnectedGradients.ZERO
    rows = [tape.gradient(loss, variables, unconnected_gradients=zeros) for loss in losses]
    flat = [np.concatenate([np.ravel(tf.convert_to_tensor(g)) for g in row]) for row in rows]
    truth = pcgrad([f.astype("float64") for f in flat], [[1], [0]])
    found = np.concatenate([np.ravel(g) for g in gradients.values()])
    np.testing.assert_allclose(found, truth, atol=1e-6)


def test_frozen_variables_have_no_share():
    def frozen():
        model = make()
        model.layers[1].trainable = False
        return model

    method = backward.ProjectedConflicts(seed=4)
    model = trained("graph", frozen, X, Y, LOSSES, loss_weights=WEIGHTS, backward=method)
    assert_same_weights(model, by_hand(frozen, by_rule, X, Y))


@keras.saving.register_keras_serializable("test_projected_conflicts")
def registered_tasks(y_true, y_pred):
    return [tf.reduce_mean(y_pred), -tf.reduce_mean(y_true - y_pred)]


@pytest.mark.parametrize(
    "arguments", [{"tasks": None, "seed": 3}, {"tasks": registered_tasks, "seed": 0}]
)
def test_config(arguments):
    method = backward.ProjectedConflicts(**arguments)
    assert set(method.get_config()) == set(arguments)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(method))
    assert type(restored) is backward.ProjectedConflicts
    assert (restored.tasks, restored.seed) == (method.tasks, method.seed)


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        ({"tasks": 3}, TypeError, "`tasks` must be a function"),
        ({"seed": 0.5}, TypeError, "`seed` must be an integer. Received: seed=0.5"),
    ],
)
def test_errors(kwargs, error, text):
    with pytest.raises(error, match=text):
        backward.ProjectedConflicts(**kwargs)


@pytest.mark.parametrize(
    "tasks, text",
    [
        (None, "needs at least two losses: .* Received: 1"),
        (lambda t, p: [tf.reduce_mean(p)], "needs at least two losses: .* Received: 1"),
        (lambda t, p: [tf.reduce_mean(p), p[0]], "must be a scalar, .* Received: a loss of shape"),
    ],
)
def test_tasks_that_are_none(tasks, text):
    model = TapeSequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse", backward=backward.ProjectedConflicts(tasks))
    with pytest.raises(ValueError, match=text):
        model.compute_gradients(X, X[:, :2])


def test_no_loss_at_all():
    model = TapeSequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", backward=backward.ProjectedConflicts())
    with pytest.raises(ValueError, match="There are no losses to tell apart"):
        model.compute_gradients(X, X[:, :2])
