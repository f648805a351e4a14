"""`trainable` made live: frozen and unfrozen in the middle of one `fit`, to the bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, hooks

RNG = np.random.default_rng(41)
X = RNG.normal(size=(8, 4)).astype("float32")
Y = RNG.normal(size=(8, 1)).astype("float32")
ROWS = [slice(0, 4), slice(4, 8)]


def _multi():
    module = pytest.importorskip("keras.src.optimizers.multi_optimizer")
    by_pattern = module.OptimizerMap(keras.optimizers.SGD(0.1, momentum=0.9))
    by_pattern["(a|b)/.*"] = keras.optimizers.Adam(0.01)
    return module.MultiOptimizer(by_pattern)


o = keras.optimizers
OPTIMIZERS = {
    "SGD": lambda: o.SGD(0.1, momentum=0.9, nesterov=True),
    "Adam": lambda: o.Adam(0.01),
    "AdamW": lambda: o.AdamW(0.01, weight_decay=0.1),
    "RMSprop": lambda: o.RMSprop(0.01, momentum=0.9),
    "EMA": lambda: o.Adam(0.01, use_ema=True, ema_momentum=0.5),
    "MultiOptimizer": _multi,
}


def _model(cls=TapeModel, optimizer="sgd", **options):
    keras.utils.clear_session()
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, activation="tanh", name="a")(inputs)
    hidden = layers.BatchNormalization(name="norm")(hidden)
    hidden = layers.Dense(3, name="b")(hidden)
    model = cls(inputs, layers.Dense(1, name="c")(hidden))
    model.compile(optimizer, "mse", **options)
    return model


class Plan(keras.callbacks.Callback):
    """Freezes, before each epoch, the layers of its letters, and unfreezes the others."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan
        self.states = []

    def on_epoch_begin(self, epoch, logs=None):
        for name in ("a", "b", "norm", "c"):
            frozen = name in self.plan[epoch].split()
            (self.model.freeze if frozen else self.model.unfreeze)(f"{name}/*")

    def on_epoch_end(self, epoch, logs=None):
        self.states.append({v.path: v.numpy() for v in _state(self.model)})


def _state(model):
    """Weights and slots, all of them with the names of the weights in their paths."""
    slots = [v for v in model.optimizer.variables if len(v.shape) or "multi" in v.path]
    return [*model.variables, *slots]


def _fit(model, epochs, *callbacks, **options):
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options).history


PLAN = ["", "a norm", "a b norm", "", "c", ""]


@pytest.mark.parametrize(
    "optimizer",
    everyday(["SGD", "AdamW"], of=OPTIMIZERS),
)
def test_frozen_values_and_slots_stay_and_come_back(optimizer):
    """Each epoch against the same updates by hand, the optimizer applied to some only."""
    model = _model(optimizer=OPTIMIZERS[optimizer]())
    plan = Plan(PLAN)
    epochs = len(PLAN) - 1 if optimizer == "EMA" else len(PLAN)
    _fit(model, epochs, plan)

    for epoch in range(1, epochs):
        before, after = plan.states[epoch - 1], plan.states[epoch]
        frozen = PLAN[epoch].split()
        for path, value in after.items():
            is_frozen = any(f"{name}_" in path or f"{name}/" in path for name in frozen)
            same = np.array_equal(value, before[path])
            assert same == (is_frozen or not value.any()), (epoch, path)

    expected = _by_hand(optimizer, PLAN[:epochs])
    for variable in model.variables:
        truth = expected[variable.path]
        np.testing.assert_allclose(variable.numpy(), truth, 1e-5, 1e-6, err_msg=variable.path)


def _by_hand(optimizer, plan):
    """Keras's own model and optimizer, the latter built over everything."""
    average = 0.5 if optimizer == "EMA" else 0.0
    model = _model(keras.Model, o.Adam(0.01) if average else OPTIMIZERS[optimizer]())
    averages = {}
    everything = model.trainable_variables
    model.optimizer.build(everything)
    inner = model.optimizer.optimizers if optimizer == "MultiOptimizer" else [model.optimizer]
    for epoch in plan:
        for layer in model.layers[1:]:
            layer.trainable = layer.name not in epoch.split()
        variables = model.trainable_variables

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x, y, model(x, training=True))
            gradients = tape.gradient(loss, variables)  # noqa: B023
            for part in inner:
                known = {id(v) for v in part._trainable_variables}
                own = [
                    (g, v)
                    for g, v in zip(gradients, variables, strict=True)  # noqa: B023
                    if id(v.value) in known or id(v) in known
                ]
                if own:
                    part.apply_gradients(own)

        for row in ROWS:
            step(tf.constant(X[row]), tf.constant(Y[row]))
            for v in variables:
                before = averages.get(v.path, v.numpy())
                averages[v.path] = average * before + (1 - average) * v.numpy()
    # `fit` ends with the averages in the weights that are being trained.
    trained = {v.path: averages[v.path] for v in variables}
    return {v.path: v.numpy() for v in model.variables} | trained


def test_one_trace_for_each_set():
    traces = []

    class Net(TapeModel):
        def train_step(self, data):
            traces.append(sum(v.trainable for v in self.trainable_variables))
            return super().train_step(data)

    model = _model(Net)
    _fit(model, 6, Plan(["", "a b", "", "a b", "c", ""]))
    assert len(traces) == 3
    _fit(model, 2, Plan(["c", "a b"]))
    assert len(traces) == 3
    model.unfreeze(model.get_layer("a").kernel)
    _fit(model, 1)
    assert len(traces) == 4


@pytest.mark.parametrize("base", [keras.Sequential, TapeSequential])
def test_traces_of_a_model_that_is_not_built(base):
    """Its variables are made before the first trace, which is the only one; not so in Keras."""
    traces = []

    class Net(base):
        def train_step(self, data):
            traces.append(1)
            return super().train_step(data)

    model = Net([layers.Dense(3), layers.Dense(1)])
    model.compile("adam", "mse")
    _fit(model, 2)
    _fit(model, 2)
    assert len(traces) == (1 if base is TapeSequential else 2)


def _matmuls(model):
    step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
    graph = step.get_concrete_function(tf.constant(X[:4]), tf.constant(Y[:4])).graph
    return sum(op.type == "MatMul" for op in graph.get_operations())


def test_the_backward_pass_of_a_frozen_prefix_is_not_computed():
    """Three dense layers: 3 products forward; backward 3 for kernels and 2 for inputs."""
    model = _model()
    assert _matmuls(model) == 3 + 3 + 2
    model.freeze("a/*")
    assert _matmuls(model) == 3 + 2 + 2
    model.freeze("norm/*")
    assert _matmuls(model) == 3 + 2 + 1
    model.freeze("b/*")
    assert _matmuls(model) == 3 + 1
    model.unfreeze("a/kernel")
    assert _matmuls(model) == 3 + 2 + 2


def test_batch_normalization_of_a_frozen_layer_is_in_inference_mode():
    model = _model()
    _fit(model, 1)
    model.freeze("norm/*")
    norm = model.get_layer("norm")
    moving = norm.moving_mean.numpy(), norm.moving_variance.numpy()
    with_training = model(X, training=True).numpy()
    np.testing.assert_array_equal(with_training, model(X, training=False).numpy())
    _fit(model, 2)
    np.testing.assert_array_equal(norm.moving_mean.numpy(), moving[0])
    np.testing.assert_array_equal(norm.moving_variance.numpy(), moving[1])
    model.unfreeze(norm)
    _fit(model, 1)
    assert not np.array_equal(norm.moving_mean.numpy(), moving[0])


@pytest.mark.parametrize("cls", [keras.Model, TapeModel])
def test_keras_own_flag_after_a_first_fit(cls):
    """Keras goes by its old trace; here the flag counts from the next step on."""
    model = _model(cls, "adam")
    _fit(model, 1)
    before = model.get_layer("a").kernel.numpy()
    model.get_layer("a").trainable = False
    _fit(model, 1)
    stays = np.array_equal(model.get_layer("a").kernel.numpy(), before)
    assert stays == (cls is TapeModel)


def test_keras_own_flag_before_compile_and_unfrozen_in_fit():
    """Keras raises "Unknown variable" here: its optimizer was built without the layer."""
    model = _model(optimizer="adam")
    model.get_layer("a").trainable = False
    model.compile("adam", "mse")
    before = model.get_layer("a").kernel.numpy()
    _fit(model, 1)
    np.testing.assert_array_equal(model.get_layer("a").kernel.numpy(), before)
    model.get_layer("a").trainable = True
    _fit(model, 1)
    assert not np.array_equal(model.get_layer("a").kernel.numpy(), before)


def test_flags_of_layers():
    model = _model()
    a, b = model.get_layer("a"), model.get_layer("b")
    model.freeze(a.bias)
    assert a.trainable and [v.path for v in a.trainable_variables] == ["a/kernel"]
    model.freeze("a/kernel")
    assert not a.trainable and b.trainable and model.trainable
    model.freeze(lambda v: True)
    assert not model.trainable and model.trainable_variables == []
    model.unfreeze("b/bias")
    assert [v.path for v in model.trainable_variables] == ["b/bias"]
    assert model.trainable and b.trainable and not a.trainable
    model.unfreeze([a, b, "norm/*", "c/*"])
    assert len(model.trainable_variables) == 8


def test_a_model_inside_a_model():
    keras.utils.set_random_seed(2)
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="a"), layers.Dense(3)])
    model = TapeSequential([inner, layers.Dense(1, name="head")])
    model.compile("adam", "mse")
    model.build((None, 4))
    model.freeze(inner)
    before = inner.get_weights()
    _fit(model, 1)
    for value, truth in zip(inner.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, truth)
    model.unfreeze(inner.layers[0])
    _fit(model, 1)
    moved = [
        not np.array_equal(value, truth)
        for value, truth in zip(inner.get_weights(), before, strict=True)
    ]
    assert moved == [True, True, False, False]


def test_a_frozen_variable_has_no_share_in_a_norm():
    model = _model(gradient_hooks=[hooks.GradientMonitor()])
    model.freeze(["a/*", "b/*", "norm/*"])
    gradients = model.compute_gradients(X, Y)
    assert sorted(gradients) == ["c/bias", "c/kernel"]
    history = _fit(model, 1, batch_size=8)
    expected = np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in gradients.values()))
    np.testing.assert_allclose(history["gradient_norm"], [expected], rtol=1e-5)


@pytest.mark.parametrize("name", ["EMA"])
def test_averages_with_frozen_early_layers(name):
    """Keras zips weights and averages from the start: `b` would get the average of `a`."""
    model = _model(optimizer=OPTIMIZERS[name]())
    _fit(model, 1)
    values = {v.path: v.numpy() for v in model.variables}
    model.freeze("a/*")
    _fit(model, 1)
    np.testing.assert_array_equal(model.get_layer("a").kernel.numpy(), values["a/kernel"])
    averages = dict(
        zip(
            [v.path for v in model.optimizer._trainable_variables],
            model.optimizer._model_variables_moving_average,
            strict=True,
        )
    )
    for path in ("b/kernel", "c/kernel"):
        found = next(v for v in model.variables if v.path == path)
        np.testing.assert_array_equal(found.numpy(), averages[path].numpy())


def test_resume_while_frozen(tmp_path):
    """Saved in the frozen phase, loaded, gone on with: bit for bit the uninterrupted run."""

    def make():
        freezing = hooks.Freezing(["a/*", "norm/*"], epochs=(1, 3))
        return _model(optimizer=o.Adam(0.01), gradient_hooks=[freezing])

    whole = make()
    _fit(whole, 5)
    model = make()
    _fit(model, 2)
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    _fit(model, 5, initial_epoch=2)
    for variable, truth in zip(model.variables, whole.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), truth.numpy(), err_msg=truth.path)
    pairs = zip(model.optimizer.variables, whole.optimizer.variables, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_what_cannot_be_frozen():
    model = _model()
    with pytest.raises(ValueError, match=r"(?s)'x/\*' matches no variable.*a/kernel\n  a/bias"):
        model.freeze("x/*")
    with pytest.raises(ValueError, match="Say what to freeze or unfreeze. Received: targets=None"):
        model.unfreeze(None)
    with pytest.raises(TypeError, match="`targets` must be a layer, a variable"):
        model.freeze(3)
    with pytest.raises(ValueError, match="layer 'stranger' matches no variable"):
        model.freeze(layers.Dense(1, name="stranger"))
    with pytest.raises(ValueError, match="has no weights yet. Build it first, or call it on"):
        TapeSequential([layers.Dense(1)]).freeze("dense/*")
