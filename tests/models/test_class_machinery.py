"""Functional, subclassed, or both, in any order: no class is ever changed."""

import contextlib
import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras.src.models.functional import Functional as KerasFunctional

from keras_tapefit import TapeModel, TapeSequential, hooks

from . import support
from .support import OURS, STOCK, X

BASES = TapeModel.__bases__


@pytest.fixture(autouse=True)
def bases_stay():
    support.begin()
    yield
    assert TapeModel.__bases__ is BASES or TapeModel.__bases__ == BASES


def _graph():
    inputs = keras.Input((6,))
    return inputs, layers.Dense(1)(inputs)


class Base(TapeModel):
    """A user's class, used functionally and as a base class below."""

    def greet(self):
        return f"I am {self.name}"


class LazyChild(Base):
    def __init__(self, units=1, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units)

    def call(self, x):
        return self.dense(x)


class GraphChild(Base):
    def __init__(self, units=1, **kwargs):
        inputs = keras.Input((6,))
        super().__init__(inputs=inputs, outputs=layers.Dense(units)(inputs), **kwargs)
        self.units = units


class TwoArguments(TapeModel):
    """Two positional arguments that are not inputs and outputs."""

    def __init__(self, first, second):
        super().__init__(name="two")
        self.first, self.second = first, second

    def call(self, x):
        return self.second(self.first(x))


class NamedLikeKeras(TapeModel):
    """`inputs` and `outputs` passed on, with an argument of its own."""

    def __init__(self, inputs, outputs, factor=2.0, **kwargs):
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.factor = factor

    def call(self, inputs, training=None, mask=None):
        return self.factor * super().call(inputs, training=training, mask=mask)


MAKERS = {
    "functional": lambda: TapeModel(*_graph()),
    "functional of a subclass": lambda: Base(*_graph()),
    "by keywords": lambda: Base(inputs=(g := _graph())[0], outputs=g[1]),
    "lazy": LazyChild,
    "graph in __init__": GraphChild,
    "two arguments": lambda: TwoArguments(layers.Dense(2), layers.Dense(1)),
    "own arguments": lambda: NamedLikeKeras(*_graph(), factor=3.0),
    "sequential": lambda: TapeSequential([layers.Dense(1)]),
}


@pytest.mark.parametrize("order", [list(MAKERS), list(MAKERS)[::-1]], ids=["forth", "back"])
def test_in_any_order_twice(order):
    """On `keras.Model` the second lazy model fails: keras#17270."""
    classes = [Base, LazyChild, GraphChild, TwoArguments, NamedLikeKeras]
    before = [cls.__bases__ for cls in classes]
    for name in order * 2:
        model = MAKERS[name]()
        assert model(X).shape == (10, 1)
        assert isinstance(model, TapeModel) and isinstance(model, keras.Model)
    assert [cls.__bases__ for cls in classes] == before


def test_what_each_is():
    for name, maker in MAKERS.items():
        model = maker()
        is_functional = name not in ("lazy", "two arguments", "sequential")
        assert isinstance(model, KerasFunctional) == is_functional, name
        assert isinstance(model, keras.Sequential) == (name == "sequential")
    assert issubclass(TapeSequential, TapeModel)
    assert isinstance(GraphChild(), GraphChild) and isinstance(Base(*_graph()), Base)
    assert type(Base(*_graph())).__name__ == "Base" and Base(*_graph()).greet()
    assert type(Base(*_graph())) is type(Base(*_graph()))
    assert not isinstance(keras.Model(*_graph()), TapeModel)


def test_a_models_own_call_and_arguments():
    inputs, outputs = _graph()
    model = NamedLikeKeras(inputs, outputs, factor=3.0)
    inner = keras.Model(inputs, outputs)
    np.testing.assert_array_equal(model(X), 3.0 * inner(X).numpy())


def test_automatic_names():
    for kit in (STOCK, OURS):
        support.begin()
        names = [
            kit.Model(*_graph()).name,
            kit.Model(*_graph()).name,
            kit.Sequential([]).name,
            type("Net", (kit.Model,), {})().name,
            type("Net", (kit.Model,), {})(*_graph()).name,
            type("Stack", (kit.Sequential,), {})().name,
        ]
        if kit is STOCK:
            expected = names
    assert (
        names == expected == ["functional", "functional_1", "sequential", "net", "net_1", "stack"]
    )


def test_summary_is_keras_own():
    texts = []
    for kit in (STOCK, OURS):
        support.begin()
        lines = []
        model = support.functional(kit)
        model.compile("adam", "mse")
        support.fit(model)
        model.summary(print_fn=lines.append)
        texts.append("\n".join(map(str, lines)))
    assert texts[0] == texts[1] and "second" in texts[0]


NAMES = {
    "hooks": [1],
    "optimizers": {"a": 1},
    "_loss": "mine",
    "callbacks": [],
    "step": 3,
    "tape": "mine",
    "freeze": False,
    "unfreeze": True,
    "runtime": "mine",
    "gradients": None,
    "backward": "mine",
    "micro_batches": 7,
    "window": 1,
    "epoch": 2,
    "state": (),
    "from_model": "mine",
    "gradient_tape": "mine",
    "compute_gradients": "mine",
    "register_gradient_hook": "mine",
}


def test_names_that_users_have_on_their_models(tmp_path):
    """They may hide ours; nothing of ours is called by them from inside."""

    def trained(names):
        support.begin()
        model = support.functional()
        for name, value in names.items():
            setattr(model, name, value)
        model.compile("adam", "mse", gradient_hooks=[hooks.GlobalNormClipping(0.1)])
        history = support.fit(model, epochs=2)
        return model, history

    _, expected = trained({})
    model, history = trained(NAMES)
    assert history == expected
    assert {name: getattr(model, name) for name in NAMES} == NAMES
    model.save(tmp_path / "model.keras")
    assert len(keras.models.load_model(tmp_path / "model.keras").gradient_hooks) == 1


def test_a_users_optimizer_attribute():
    """`optimizer` is Keras's own attribute; a step that goes by another must work."""

    class Net(LazyChild):
        def train_step(self, data):
            with self.gradient_tape() as tape:
                loss = keras.ops.mean((self(data[0]) - data[1]) ** 2)
            tape.minimize(loss, optimizer=self.mine)
            return {"loss": loss}

    model = Net()
    model.mine = keras.optimizers.SGD(0.1)
    model.compile()
    before = model(X)
    assert support.fit(model)["loss"][0] > 0
    assert support.differ(model(X).numpy(), before.numpy())
    assert int(model.mine.iterations) == 3 and int(model.optimizer.iterations) == 0


HOOKS = [hooks.PercentileClipping, hooks.GradientMonitor]


def _with_state(model):
    model.compile(
        keras.optimizers.Adam(0.01),
        "mse",
        metrics=["mae"],
        gradient_hooks=[hooks.PercentileClipping(20, history=8), hooks.GradientMonitor()],
    )
    support.fit(model)
    return model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [support.functional, GraphChild, LazyChild])
def test_pickle_and_deepcopy_go_on_as_the_original(make, copied):
    with support.custom_objects(GraphChild, LazyChild):
        model = _with_state(make())
        twin = copied(model)
    assert type(twin).__name__ == type(model).__name__ and isinstance(twin, TapeModel)
    assert twin is not model and twin.gradient_hooks[0] is not model.gradient_hooks[0]
    support.assert_same(_all(twin), _all(model))
    keras.utils.set_random_seed(1)
    history = support.fit(model)
    keras.utils.set_random_seed(1)
    assert support.fit(twin) == history
    support.assert_same(_all(twin), _all(model))


def _all(model):
    of_hooks = [support.values(hook.variables) for hook in model.gradient_hooks]
    return support.values(model.variables), support.values(model.optimizer.variables), of_hooks


@pytest.mark.parametrize("name", ["functional", "sequential", "functional of a subclass"])
def test_clone_model_keeps_class_hooks_and_compile(name):
    model = _with_state(MAKERS[name]())
    with support.custom_objects(Base):
        clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    assert clone.compiled and clone.metrics_names == model.metrics_names
    assert [type(hook) for hook in clone.gradient_hooks] == HOOKS
    assert clone.gradient_hooks[0] is not model.gradient_hooks[0]
    clone.build((None, 6))
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(X), model(X))
    assert clone.layers[-1] is not model.layers[-1]
    assert "gradient_norm" in support.fit(clone)


@pytest.mark.parametrize("name", ["functional", "functional of a subclass", "sequential"])
def test_config_round_trip(name):
    model = MAKERS[name]()
    model.build((None, 6))
    again = type(model).from_config(model.get_config())
    assert type(again) is type(model) and again.name == model.name
    assert again.count_params() == model.count_params()
    assert (
        type(Base.from_config(MAKERS["functional of a subclass"]().get_config())).__mro__[1] is Base
    )
    stock = keras.Model.from_config(support.functional(STOCK).get_config())
    assert support.functional().get_config().keys() == stock.get_config().keys()


def test_export(tmp_path):
    for i, make in enumerate([support.functional, LazyChild]):
        model = _with_state(make())
        path = str(tmp_path / str(i))
        model.export(path, format="tf_saved_model", verbose=False)
        loaded = tf.saved_model.load(path)
        np.testing.assert_allclose(loaded.serve(X), model(X, training=False), rtol=1e-6, atol=1e-6)


def test_an_inner_model_of_ours_in_a_trainer():
    """A wrapper around an inner model, and a plain Keras model around one of ours."""

    class Wrapper(TapeModel):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, x, training=None):
            return self.inner(x, training=training)

    inner = support.functional()
    inner.register_gradient_hook(lambda g, v: tf.zeros_like(g))
    for outer in (Wrapper(inner), keras.Sequential([inner])):
        outer.compile("sgd", "mse")
        before = inner.get_weights()[0]
        told = pytest.warns(UserWarning, match="hooks of 'functional.*' are not applied")
        with told if isinstance(outer, TapeModel) else contextlib.nullcontext():
            support.fit(outer)
        assert support.differ(inner.get_weights()[0], before)
