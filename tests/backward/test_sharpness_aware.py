"""SAM and ASAM against worked numbers, optax, and loops that write the weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import BATCH, NUM_STEPS, assert_same_weights, by_hand, trained

from keras_tapefit import TapeModel, TapeSequential, backward, hooks

RNG = np.random.default_rng(5)
X = RNG.normal(size=(BATCH * NUM_STEPS, 3)).astype("float32")
Y = RNG.normal(size=(BATCH * NUM_STEPS, 2)).astype("float32")


class Quadratic(TapeModel):
    """`L = wᵀ diag(1, 10) w / 2`, whatever the input; `kernel` says what w is."""

    def __init__(self, kernel: bool = True) -> None:
        super().__init__()
        self.dense = layers.Dense(1, use_bias=not kernel)
        self.kernel = kernel

    def build(self, shape):
        self.dense = layers.Dense(1, use_bias=False) if self.kernel else layers.Dense(2)
        self.dense.build((None, 2))
        for variable in self.dense.trainable_variables:
            variable.assign(tf.ones(variable.shape))

    def call(self, x):
        return x

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        w = self.dense.kernel[:, 0] if self.kernel else self.dense.bias
        return 0.5 * tf.reduce_sum(tf.constant([1.0, 10.0]) * tf.square(w))


@pytest.mark.parametrize(
    "kwargs, kernel, expected",
    [
        ({}, True, [1.00497519, 10.4975186]),
        ({"adaptive": True}, True, [1.00502494, 10.50249378]),
        # T is 1 for a bias: the same as without.
        ({"adaptive": True}, False, [1.00497519, 10.4975186]),
        ({"rho": 0.0}, True, [1.0, 10.0]),
    ],
)
def test_worked_numbers(kwargs, kernel, expected):
    model = Quadratic(kernel)
    model.build((None, 2))
    model.compile("sgd", "mse", backward=backward.SharpnessAware(**kwargs))
    before = [v.numpy() for v in model.weights]
    gradients = model.compute_gradients(np.zeros((1, 2), "float32"))
    (values,) = [g for g in gradients.values() if g is not None]
    np.testing.assert_allclose(np.ravel(values), expected, rtol=3e-7)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.oracle
def test_optax_agrees():
    optax = pytest.importorskip("optax")
    jnp = pytest.importorskip("jax.numpy")
    import jax
    from optax import contrib

    scales = jnp.asarray([1.0, 10.0])
    loss = lambda w: 0.5 * jnp.sum(scales * w**2)  # noqa: E731
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
    rule = contrib.sam(optax.sgd(0.01), adversary, sync_period=2, opaque_mode=True)
    w = jnp.ones(2)
    state = rule.init(w)
    for _ in range(3):
        updates, state = rule.update(
            jax.grad(loss)(w), state, w, grad_fn=lambda p, _: jax.grad(loss)(p)
        )
        w = optax.apply_updates(w, updates)

    model = Quadratic()
    model.build((None, 2))
    model.compile(keras.optimizers.SGD(0.01), backward=backward.SharpnessAware(0.05))
    model.fit(np.zeros((3, 2), "float32"), batch_size=1, verbose=0)
    np.testing.assert_allclose(model.dense.kernel.numpy().ravel(), w, rtol=1e-6)


def make(dropout=0.4, batch_norm=True):
    return TapeSequential(
        [
            keras.Input((3,)),
            layers.Dense(6, activation="tanh", kernel_regularizer="l2"),
            *([layers.BatchNormalization()] if batch_norm else []),
            *([layers.Dropout(dropout, seed=3)] if dropout else []),
            layers.Dense(2),
        ]
    )


def plain():
    return make(dropout=0, batch_norm=False)


def sam_by_assigning(rho, adaptive=False, every=1, num_replicas=1, synchronize=False):
    """SAM as the paper's code does it: weights moved, and moved back."""

    def slopes(model, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(y - model(x, training=True))) + sum(model.losses)
        return tape.gradient(loss, model.trainable_variables)

    def again(model, x, y, clean, start):
        variables = model.trainable_variables
        copies = [tf.identity(v.value) for v in variables]
        sizes = [
            tf.abs(v.value) + 0.01 if adaptive and "kernel" in v.path else tf.ones_like(v.value)
            for v in variables
        ]
        norm = np.sqrt(
            sum(np.sum((np.float64(g) * s.numpy()) ** 2) for g, s in zip(clean, sizes, strict=True))
        )
        for v, g, s in zip(variables, clean, sizes, strict=True):
            v.assign_add(rho * s * s * g / norm)
        after = [tf.identity(v.value) for v in model.non_trainable_variables]
        for v, value in zip(model.non_trainable_variables, start, strict=True):
            v.assign(value)
        result = slopes(model, x, y)
        for v, value in zip(model.non_trainable_variables, after, strict=True):
            v.assign(value)
        for v, value in zip(variables, copies, strict=True):
            v.assign(value)
        return result

    def gradients(model, x, y, step):
        start = [tf.identity(v.value) for v in model.non_trainable_variables]
        parts = list(zip(tf.split(x, num_replicas), tf.split(y, num_replicas), strict=True))
        clean = [slopes(model, *part) for part in parts]
        if step % every:
            found = clean
        elif synchronize:
            mean = [sum(gs) / num_replicas for gs in zip(*clean, strict=True)]
            found = [again(model, *part, mean, start) for part in parts]
        else:
            found = [again(model, *p, g, start) for p, g in zip(parts, clean, strict=True)]
        return [sum(gs) / num_replicas for gs in zip(*found, strict=True)]

    return gradients


@pytest.mark.parametrize("kwargs", [{}, {"adaptive": True, "every": 2}], ids=str)
def test_equals_assigning_in_every_mode(mode, kwargs):
    # XLA draws a dropout of its own, and so does each replica.
    build = {"xla": lambda: make(dropout=0), "replicas": plain}.get(mode, make)
    method = backward.SharpnessAware(0.2, **kwargs)
    model = trained(mode, build, X, Y, backward=method)
    rule = sam_by_assigning(0.2, num_replicas=2 if mode == "replicas" else 1, **kwargs)
    assert_same_weights(model, by_hand(build, rule, X, Y))


def test_synchronized_replicas_equal_one_device():
    method = backward.SharpnessAware(0.2, synchronize=True)
    model = trained("replicas", plain, X, Y, backward=method)
    alone = by_hand(plain, sam_by_assigning(0.2), X, Y)
    assert_same_weights(model, alone)
    apart = by_hand(plain, sam_by_assigning(0.2, num_replicas=2), X, Y)
    assert (
        max(
            np.abs(a - b).max()
            for a, b in zip(apart.get_weights(), alone.get_weights(), strict=True)
        )
        > 1e-4
    )


def test_batch_normalization_on_replicas_with_every():
    """A pass in a branch must not synchronise replicas."""
    method = backward.SharpnessAware(0.2, every=2)
    model = trained("replicas", make, X, Y, backward=method)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_statistics_seeds_and_metrics_advance_once(mode):
    stock = trained(mode, make, X, Y, metrics=["mae"])
    # With ρ = 0 the second pass is the first one again: any trace of it would show.
    method = backward.SharpnessAware(0.0)
    model = trained(mode, make, X, Y, metrics=["mae"], backward=method)
    assert_same_weights(model, stock, atol=1e-6)
    seeds = [v for v in model.non_trainable_variables if "seed" in v.path]
    assert len(seeds) == 1 and int(seeds[0].numpy()[1]) == NUM_STEPS
    for name, values in stock.history_of_fit.items():
        np.testing.assert_allclose(model.history_of_fit[name], values, rtol=1e-6)


def test_rho_is_live_without_a_retrace():
    keras.utils.set_random_seed(0)
    model = plain()
    model.compile("sgd", "mse", backward=backward.SharpnessAware(0.0), jit_compile=False)
    start = model.get_weights()

    def after(rho):
        model.set_weights(start)
        model.optimizer.iterations.assign(0)
        runtime_method.rho = rho
        model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0)
        return model.get_weights()

    runtime_method = model._tapefit_runtime.backward
    still = after(0.0)
    function = model.train_function
    moved = after(0.5)
    assert model.train_function is function and len(function._traces) == 1
    assert max(np.abs(a - b).max() for a, b in zip(still, moved, strict=True)) > 1e-4
    again = after(0.0)
    for a, b in zip(still, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_return_bitwise_and_a_zero_gradient_stays_zero():
    model = plain()
    model.compile("sgd", "mse", backward=backward.SharpnessAware(1e3))
    before = model.get_weights()
    model.compute_gradients(X, Y)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    flat = TapeSequential([keras.Input((3,)), layers.Dense(2)])
    flat.compile("sgd", "mse", backward=backward.SharpnessAware(0.1))
    x = np.zeros((4, 3), "float32")
    for gradient in flat.compute_gradients(x, flat(x).numpy()).values():
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("size", [1e18, 1e-18])
def test_norms_neither_overflow_nor_underflow(size):
    def gradients(scale):
        model = TapeSequential([keras.Input((3,)), layers.Dense(2, kernel_initializer="ones")])
        model.compile(
            "sgd",
            lambda y_true, y_pred: scale * tf.reduce_mean(tf.square(y_true - y_pred), -1),
            backward=backward.SharpnessAware(0.1),
        )
        return model.compute_gradients(X, Y).values()

    for one, other in zip(gradients(1.0), gradients(size), strict=True):
        np.testing.assert_allclose(np.array(other) / size, one, rtol=1e-4)


class Bare(TapeModel):
    """Weights that Keras does not read: `self.w` is a `tf.Variable`."""

    def __init__(self):
        super().__init__()
        self.w = tf.Variable(tf.ones((3, 2)))

    def call(self, x):
        return tf.matmul(x, self.w)


def test_bare_variables(mode):
    method = backward.SharpnessAware(0.3)
    bare = trained(mode, Bare, X, Y, backward=method)

    def dense():
        return TapeSequential(
            [keras.Input((3,)), layers.Dense(2, use_bias=False, kernel_initializer="ones")]
        )

    other = trained(mode, dense, X, Y, backward=backward.SharpnessAware(0.3))
    np.testing.assert_allclose(bare.w.numpy(), other.layers[0].kernel.numpy(), atol=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_embeddings(mode, every):
    ids = RNG.integers(0, 5, size=(BATCH * NUM_STEPS, 4))

    def model(first):
        return TapeSequential(
            [keras.Input((4,), dtype="int32"), *first, layers.Flatten(), layers.Dense(2)]
        )

    table = keras.initializers.RandomNormal(seed=1)
    sparse = lambda: model([layers.Embedding(5, 3, embeddings_initializer=table)])  # noqa: E731
    dense = lambda: model(  # noqa: E731
        [
            layers.Lambda(lambda i: tf.one_hot(i, 5), output_shape=(4, 5)),
            layers.Dense(3, use_bias=False, kernel_initializer=table),
        ]
    )
    a = trained(mode, sparse, ids, Y, backward=backward.SharpnessAware(0.3, every=every))
    b = trained(mode, dense, ids, Y, backward=backward.SharpnessAware(0.3, every=every))
    for one, other in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_frozen_layers_do_not_move():
    def frozen():
        model = make()
        model.layers[0].trainable = False
        return model

    model = trained("graph", frozen, X, Y, backward=backward.SharpnessAware(0.2))
    keras.utils.set_random_seed(11)
    for a, b in zip(model.layers[0].get_weights(), make().layers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gate_sees_what_is_not_finite():
    x = X.copy()
    x[BATCH] = np.nan
    gates = {"gradient_hooks": [hooks.SkipNonFinite()]}
    model = trained("graph", make, x, Y, backward=backward.SharpnessAware(0.2), **gates)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert model.history_of_fit["skipped_steps"] == [1.0]


def test_stateful_recurrence_begins_where_the_first_pass_did():
    def recurrent():
        return TapeSequential(
            [keras.Input(batch_shape=(BATCH, 3, 1)), layers.GRU(2, stateful=True)]
        )

    x = X[..., None]
    a = trained("graph", recurrent, x, Y, backward=backward.SharpnessAware(0.0))
    b = trained("graph", recurrent, x, Y)
    for one, other in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_with_micro_batches():
    method = backward.SharpnessAware(0.2)
    model = trained("graph", plain, X, Y, backward=method, micro_batches=2)
    rule = sam_by_assigning(0.2, num_replicas=2)
    assert_same_weights(model, by_hand(plain, rule, X, Y))


def test_config():
    arguments = {"rho": 0.3, "adaptive": True, "every": 3, "synchronize": True}
    method = backward.SharpnessAware(**arguments)
    assert method.get_config() == arguments
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(method))
    assert type(restored) is backward.SharpnessAware and restored.get_config() == arguments


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        ({"rho": -1}, ValueError, "`rho` must be zero or a positive number. Received: rho=-1"),
        ({"rho": "a"}, TypeError, "`rho` must be a number. Received: rho='a'"),
        ({"rho": np.inf}, ValueError, "`rho` must be finite. Received: rho=inf"),
        ({"every": 0}, ValueError, "`every` must be at least 1. Received: every=0"),
        ({"every": 1.5}, TypeError, "`every` must be an integer. Received: every=1.5"),
        ({"adaptive": 1}, TypeError, "`adaptive` must be a bool. Received: adaptive=1"),
        ({"synchronize": 0}, TypeError, "`synchronize` must be a bool. Received: synchronize=0"),
    ],
)
def test_errors(kwargs, error, text):
    with pytest.raises(error, match=text):
        backward.SharpnessAware(**kwargs)
