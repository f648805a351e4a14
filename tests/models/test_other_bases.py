"""`TapeModel` before, after and between the classes of others, as `keras.Model` would be."""

import abc
import copy
import pickle

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, hooks

from . import support
from .support import X

BASES = TapeModel.__bases__


@pytest.fixture(autouse=True)
def bases_stay():
    support.begin()
    yield
    assert TapeModel.__bases__ == BASES


def _graph():
    inputs = keras.Input((6,))
    hidden = layers.Dropout(0.3, seed=1)(layers.Dense(4, activation="relu")(inputs))
    return inputs, layers.Dense(1)(hidden)


def _pipeline():
    """Classes in the form of KerasHub's: they build themselves from parts, functionally."""

    class Pipeline(keras.Model):
        def __init__(self, *args, **kwargs):
            # KerasHub takes back what Keras did to the class for the last model.
            Pipeline.__bases__ = (keras.Model,)
            super().__init__(*args, **kwargs)

        def preprocess(self, x):
            return x

        def fit(self, x=None, y=None, batch_size=None, extra=0, **kwargs):
            return super().fit(x=self.preprocess(x), y=y, batch_size=batch_size, **kwargs)

    class Task(Pipeline):
        def __init__(self, backbone, preprocessor=None, compile=True, **kwargs):
            hidden = backbone.output
            super().__init__(
                inputs=backbone.input, outputs=layers.Dense(1, name="head")(hidden), **kwargs
            )
            self.backbone = backbone
            self.preprocessor = preprocessor
            if compile:
                self.compile()

        def preprocess(self, x):
            return x if self.preprocessor is None else self.preprocessor(x)

        def compile(self, optimizer="auto", loss="auto", *, metrics="auto", **kwargs):
            super().compile(
                optimizer="adam" if optimizer == "auto" else optimizer,
                loss="mse" if loss == "auto" else loss,
                metrics=["mae"] if metrics == "auto" else metrics,
                **kwargs,
            )

        def get_config(self):
            return {"backbone": keras.saving.serialize_keras_object(self.backbone)}

        @classmethod
        def from_config(cls, config):
            return cls(keras.saving.deserialize_keras_object(config["backbone"]))

    return Task


def _task(base, order):
    task = _pipeline()
    bases = {"keras": (task,), "before": (base, task), "after": (task, base)}[order]
    return type("Mine", bases, {}), lambda cls: cls(keras.Model(*_graph()), preprocessor=None)


def _by_name(base, order):
    class Named(base):
        def __init__(self, units):
            inputs, outputs = _graph()
            keras.Model.__init__(self, inputs=inputs, outputs=outputs)
            self.units = units

    return Named, lambda cls: cls(3)


def _by_name_positional(base, order):
    class Named(base):
        def __init__(self):
            keras.Model.__init__(self, *_graph(), name="mine")

    return Named, lambda cls: cls()


def _mixins(base, order):
    class WithOptions:
        def __init__(self, *args, option=1, **kwargs):
            super().__init__(*args, **kwargs)
            self.option = option

    class WithNew:
        def __new__(cls, *args, **kwargs):
            made = super().__new__(cls, *args, **kwargs)
            made.__dict__["was_new"] = (len(args), sorted(kwargs))
            return made

    bases = (WithNew, base, WithOptions)
    if order == "after":
        bases = (WithOptions, WithNew, base)

    class Mine(*bases):
        def __init__(self, **kwargs):
            inputs, outputs = _graph()
            super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def make(cls):
        model = cls(name="mixed", option=2) if order == "after" else cls(name="mixed")
        assert model.was_new[0] == 0
        return model

    return Mine, make


def _levels(base, order):
    class Root(base):
        """Used lazily, and as the root of a functional class."""

        registered = []

        def __init_subclass__(cls, key=None, **kwargs):
            super().__init_subclass__(**kwargs)
            Root.registered.append(cls.__name__)

    class Middle(Root, key=1):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Leaf(Middle, key=2):
        def __init__(self, width=4):
            super().__init__(*_graph())
            self.width = width

    def make(cls):
        model = cls()
        assert Root.registered == ["Middle", "Leaf"]
        return model

    return Leaf, make


def _lazy(base, order):
    class Theirs(keras.Model):
        def __init__(self, first, second, **kwargs):
            super().__init__(**kwargs)
            self.first, self.second = first, second

        def call(self, x):
            return self.second(self.first(x))

    bases = {"keras": (Theirs,), "before": (base, Theirs), "after": (Theirs, base)}[order]
    return type("Mine", bases, {}), lambda cls: cls(layers.Dense(4), layers.Dense(1))


FORMS = {
    "task": _task,
    "by name": _by_name,
    "by name and position": _by_name_positional,
    "mixins": _mixins,
    "levels": _levels,
    "lazy": _lazy,
}


def _trained(base, form, order, **options):
    support.begin()
    cls, make = FORMS[form](base, order)
    model = make(cls)
    assert isinstance(model, cls) and cls.__name__ == type(model).__name__
    model.compile(optimizer="sgd", loss="mse", metrics=["mae"], **options)
    history = support.fit(model, epochs=2)
    return model, history, cls


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("form", FORMS)
def test_as_with_a_keras_model(form, order):
    _, expected, _ = _trained(keras.Model, form, "keras")
    model, history, cls = _trained(TapeModel, form, order)
    assert history == expected
    assert isinstance(model, TapeModel) and TapeModel not in type(cls).__mro__
    again, history, _ = _trained(TapeModel, form, order, gradient_hooks=[hooks.ValueClipping(1e-9)])
    assert history["loss"] != expected["loss"]
    assert [type(hook) for hook in again.gradient_hooks] == [hooks.ValueClipping]


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_sequential_class_of_theirs(order):
    class Stack(keras.Sequential):
        def __init__(self, width):
            super().__init__([keras.Input((6,)), layers.Dense(width), layers.Dense(1)])

    def trained(*bases):
        support.begin()
        model = type("Mine", bases, {})(3)
        model.compile("sgd", "mse")
        return support.fit(model), model.get_weights()

    bases = (TapeModel, Stack) if order == "before" else (Stack, TapeModel)
    support.assert_same(trained(*bases), trained(Stack))


def test_an_abstract_class_beside_it():
    """Keras makes an instance of each base, which here it cannot."""

    class Abstract(abc.ABC):
        @abc.abstractmethod
        def width(self): ...

    class Mine(TapeModel, Abstract):
        def width(self):
            return 4

    assert Mine(*_graph())(X).shape == (10, 1)
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (TapeModel, Abstract), {})()


@pytest.mark.parametrize("order", [list(FORMS), list(FORMS)[::-1]], ids=["forth", "back"])
def test_in_one_process(order):
    """All classes are made first, then used by turns; nobody's bases are changed by ours."""
    made = {}
    for form in order:
        for place in ("before", "after"):
            made[form, place] = FORMS[form](TapeModel, place)
    before = {key: cls.__bases__ for key, (cls, _) in made.items()}
    models = []
    for _ in range(2):
        for key in made:
            cls, make = made[key]
            models.append(make(cls))
            models.append(TapeModel(*_graph()))
            models.append(TapeSequential([layers.Dense(1)]))
    for model in models:
        assert model(X).shape == (10, 1)
    assert {key: cls.__bases__ for key, (cls, _) in made.items()} == before


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_task_of_theirs_beside_one_of_ours(order):
    """Whichever was made first: theirs stays functional, ours too."""
    task = _pipeline()
    bases = (TapeModel, task) if order == "before" else (task, TapeModel)
    mine = type("Mine", bases, {})
    first = task(keras.Model(*_graph()))
    ours = mine(keras.Model(*_graph()), compile=False)
    second = task(keras.Model(*_graph()))
    later = mine(keras.Model(*_graph()), compile=False)
    for model in (first, ours, second, later):
        assert model(X).shape == (10, 1)
        assert len(model.layers) == 5


@pytest.mark.parametrize("order", ["after", "before"])
def test_what_their_compile_takes_and_leaves_out(order):
    """Defaults of their own, and arguments that Keras does not know, by place and name."""

    class Theirs(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def compile(self, first, second="adam", *, loss="mae", **options):
            self.first = first
            super().compile(optimizer=second, loss=loss, **options)

        def fit(self, raw, labels, **more):
            return super().fit(2.0 * raw, labels, **more)

    def trained(*bases, **options):
        support.begin()
        model = type("Mine", bases, {})()
        model.compile("one", metrics=["mse"], **options)
        assert (model.first, model.optimizer.name, model.loss) == ("one", "adam", "mae")
        model.compile("two", "sgd", **options)
        assert (model.first, model.optimizer.name.lower()) == ("two", "sgd")
        return model.fit(X, X[:, :1], epochs=2, verbose=0).history

    expected = trained(Theirs)
    bases = (TapeModel, Theirs) if order == "before" else (Theirs, TapeModel)
    assert trained(*bases) == expected
    held = trained(*bases, gradient_hooks=[hooks.GradientMonitor()], micro_batches=2)
    assert held["gradient_norm"][0] > 0
    task = _pipeline()
    mine = type("Mine", (TapeModel, task) if order == "before" else (task, TapeModel), {})
    assert mine(keras.Model(*_graph())).loss == "mse"


def test_a_fit_that_takes_no_callbacks():
    """The epoch is told by one: what needs it is refused, all else works."""

    class Theirs(keras.Model):
        def fit(self, x, y):
            return super().fit(x, y, epochs=2, verbose=0)

    def trained(*bases, hook=None):
        support.begin()
        model = type("Mine", bases, {})(*_graph())
        options = {} if hook is None else {"gradient_hooks": [hook]}
        model.compile("sgd", "mse", **options)
        return model.fit(X, X[:, :1]).history

    assert trained(TapeModel, Theirs) == trained(Theirs)
    monitored = trained(TapeModel, Theirs, hook=hooks.GradientMonitor())
    assert len(monitored["gradient_norm"]) == 2
    with pytest.raises(TypeError, match=r"'freezing' learns the epoch.*Theirs.fit` takes no"):
        trained(TapeModel, Theirs, hook=hooks.Freezing("*kernel", epochs=1))
    frozen = trained(Theirs, TapeModel, hook=hooks.Freezing("*kernel", epochs=1))
    assert frozen["loss"] != trained(Theirs)["loss"]


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_task_is_saved_and_loaded(order, tmp_path):
    model, _, cls = _trained(TapeModel, "task", order, gradient_hooks=[hooks.GradientMonitor()])
    with support.custom_objects(cls):
        model.save(tmp_path / "model.keras")
        # Keras calls no `compile` but its own.
        with pytest.warns(UserWarning, match="`compile\\(\\)` was not called"):
            loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, cls) and isinstance(loaded, TapeModel)
    np.testing.assert_array_equal(loaded(X), model(X))
    # The hooks are the model's, whoever compiles it.
    assert [type(hook) for hook in loaded.gradient_hooks] == [hooks.GradientMonitor]
    loaded.compile(optimizer="sgd", loss="mse")
    assert "gradient_norm" in support.fit(loaded)


def _refuse(*args):
    raise AssertionError("somebody else's reduction")


REDUCTIONS = {
    # scikeras sets the first two.
    "__reduce__": lambda self: (_refuse, (np.zeros(3),)),
    "__deepcopy__": lambda self, memo: _refuse(),
    "__reduce_ex__": lambda self, protocol: (_refuse, ()),
    "__getstate__": lambda self: _refuse(),
}


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_for_all_keras_models(name, copied, monkeypatch):
    model = support.functional()
    model.compile("sgd", "mse", gradient_hooks=[hooks.GradientMonitor()])
    support.fit(model)
    monkeypatch.setattr(keras.Model, name, REDUCTIONS[name], raising=False)
    twin = copied(model)
    assert type(twin) is type(model) and len(twin.gradient_hooks) == 1
    assert support.fit(twin)["gradient_norm"][0] > 0
    nested = TapeSequential([keras.Input((6,)), support.functional()])
    assert copied(nested)(X).shape == (10, 1)
