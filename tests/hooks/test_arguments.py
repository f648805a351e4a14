"""Arguments of a hook in use: checked when assigned, and acting from the next step on."""

import copy
import gc
import json
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeModel, TapeSequential, backward, hooks

RNG = np.random.default_rng(23)
X, Y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 2))


def _norm(arrays):
    return np.sqrt(sum(np.sum(np.square(np.asarray(a, "float64"))) for a in arrays))


def _moved(model):
    """The gradients that SGD with learning rate 1 saw."""
    before = model.get_weights()
    model.train_on_batch(X, Y)
    return [a - b for a, b in zip(before, model.get_weights(), strict=True)]


@pytest.fixture
def model(two_layers):
    two_layers.compile(keras.optimizers.SGD(1.0), "mse")
    return two_layers


def test_a_scope_assigned_acts_in_the_next_step(model):
    clip = model.gradient_hooks.add(hooks.NormClipping(1e-3))
    assert [_norm([g]) for g in _moved(model)] == pytest.approx([1e-3] * 4, rel=1e-4)
    clip.per_layer = True
    moved = _moved(model)
    assert [_norm(moved[:2]), _norm(moved[2:])] == pytest.approx([1e-3] * 2, rel=1e-4)
    clip.targets = "second/*"
    moved = _moved(model)
    assert _norm(moved[:2]) > 2e-3 and _norm(moved[2:]) == pytest.approx(1e-3, rel=1e-4)
    assert clip.get_config() == {
        "max_norm": 1e-3, "per_layer": True, "targets": "second/*", "name": None,
        "log_clipped": False,
    }  # fmt: skip


def test_state_is_made_again_where_its_shape_changes(model, tmp_path):
    hook = model.gradient_hooks.add(hooks.PercentileClipping(100, history=5))
    for _ in range(3):
        model.train_on_batch(X, Y)
    hook.history = 2
    model.save(tmp_path / "between.keras")
    model.train_on_batch(X, Y)
    norms, count = (v.numpy() for v in hook.variables)
    assert norms.shape == (2,) and count == 1 and norms[0] > 0 == norms[1]
    loaded = keras.models.load_model(tmp_path / "between.keras")
    loaded.train_on_batch(X, Y)
    for a, b in zip(loaded.gradient_hooks[0].variables, hook.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert loaded.gradient_hooks[0].history == 2


def test_state_stays_where_the_argument_is_no_part_of_it(model):
    gate = model.gradient_hooks.add(hooks.SkipSpikes(num_warmup_steps=4, patience=1))
    model.train_on_batch(X, Y)
    gate.patience = 3
    model.train_on_batch(X, Y)
    assert gate.variables[0].numpy() == 2
    gate.num_warmup_steps = 2
    model.train_on_batch(X, Y)
    assert gate.variables[0].numpy() == 1


def test_monitor_that_is_asked_later(model):
    monitor = model.gradient_hooks.add(hooks.GradientMonitor())
    logs = model.fit(X, Y, validation_data=(X, Y), verbose=0).history
    assert "val_gradient_norm" not in logs
    monitor.validation = monitor.per_variable = True
    logs = model.fit(X, Y, validation_data=(X, Y), verbose=0).history
    assert {"val_gradient_cosine", "gradient_norm/first/kernel"} <= logs.keys()


def test_freezing_follows_its_arguments(model):
    freezing = model.gradient_hooks.add(hooks.Freezing("first/*"))
    model.fit(X, Y, verbose=0)
    assert not any(v.trainable for v in model.get_layer("first").variables)
    freezing.targets = "second/*"
    before = model.get_weights()
    model.fit(X, Y, verbose=0)
    after = model.get_weights()
    assert [np.array_equal(a, b) for a, b in zip(before, after, strict=True)] == [
        False, False, True, True,
    ]  # fmt: skip
    freezing.epochs = 1
    model.fit(X, Y, verbose=0, epochs=2, initial_epoch=1)
    assert not np.array_equal(after[2], model.get_weights()[2])


class Kept(hooks.GradientHook):
    """A hook of a user's: derives from its argument where it should not."""

    def __init__(self, rate, targets=None, name=None):
        super().__init__(targets=targets, name=name)
        if not 0 <= rate <= 1:
            raise ValueError(f"`rate` must be from 0 to 1. Received: rate={rate}.")
        self.rate = rate
        self._kept = 1 - rate
        self.notes = []

    def apply(self, gradients):
        self.notes.append("traced")
        return gradients.scale(self._kept)


def test_what_is_derived_in_init_follows(line):
    x, y = np.array([[3.0, 4.0]]), np.array([[0.0]])
    hook = line.gradient_hooks.add(Kept(0.5))
    line.train_on_batch(x, y)
    np.testing.assert_allclose(1 - line.get_weights()[0].ravel(), [21, 28])
    hook.rate = 0.75
    hook.notes = ["no argument, so nothing happens"]
    line.set_weights([np.ones((2, 1))])
    line.train_on_batch(x, y)
    np.testing.assert_allclose(1 - line.get_weights()[0].ravel(), [10.5, 14])
    assert len(hook.notes) == 2


WRONG = [
    (lambda: hooks.PercentileClipping(), "history", 0, ValueError, "`history` must be at least 1"),
    (lambda: hooks.PercentileClipping(), "history", 2.5, TypeError, "`history` must be an integer"),
    (lambda: hooks.NormClipping(1.0), "per_layer", 1, TypeError, "`per_layer` must be a bool"),
    (lambda: hooks.NormClipping(1.0), "targets", 3, TypeError, "`targets` must be a layer"),
    (lambda: hooks.NormClipping(1.0), "targets", "x/*", ValueError, "'x/\\*' matches no variable"),
    (lambda: hooks.SkipSpikes(), "monitor", "lose", ValueError, "`monitor` must be 'gradient_n"),
    (lambda: hooks.SkipNonFinite(), "max_consecutive", 0, ValueError, "must be at least 1"),
    (lambda: hooks.Freezing("first/*"), "steps", -1, ValueError, "`steps` must be positive"),
    (lambda: hooks.Freezing("first/*"), "targets", None, ValueError, "`targets` must say what to"),
    (lambda: hooks.GradientNoise(0.1), "seed", 1.5, TypeError, "`seed` must be an integer"),
    (lambda: hooks.LambdaHook(lambda g, v: g), "fn", 3, TypeError, "`fn` must be a function"),
    (lambda: Kept(0.5), "rate", 3, ValueError, "`rate` must be from 0 to 1. Received: rate=3"),
    (lambda: Kept(0.5), "name", "x", AttributeError, "name of a hook cannot be assigned, for"),
]


@pytest.mark.parametrize(("make", "argument", "value", "error", "text"), WRONG)
def test_what_init_refuses_is_refused_later_too(model, make, argument, value, error, text):
    hook = model.gradient_hooks.add(make())
    model.train_on_batch(X, Y)
    before = dict(vars(hook))
    with pytest.raises(error, match=text):
        setattr(hook, argument, value)
    assert vars(hook) == before
    model.train_on_batch(X, Y)


@pytest.mark.parametrize(("make", "argument", "value", "error", "text"), WRONG)
def test_what_init_refuses_cannot_be_registered(model, make, argument, value, error, text):
    hook = make()
    if argument == "name":
        return
    setattr(hook, argument, value)
    for add in (model.gradient_hooks.add, model.register_gradient_hook):
        if value == "x/*" and add == model.gradient_hooks.add:
            continue  # found when it is built
        with pytest.raises(error, match=text):
            add(hook)
        assert len(model.gradient_hooks) == 0
    if value != "x/*":
        with pytest.raises(error, match=text):
            model.compile("adam", "mae", gradient_hooks=[hooks.ValueClipping(1.0), hook])
    assert len(model.gradient_hooks) == 0 and isinstance(model.optimizer, keras.optimizers.SGD)
    model.train_on_batch(X, Y)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_nothing(model, copied):
    stages = ["second/*", [model.get_layer("first")]]
    first = [
        hooks.PercentileClipping(10, history=4, name="p"),
        hooks.GradualUnfreezing(stages, every=3),
        Kept(0.25, targets=model.get_layer("first")),
    ]
    model.gradient_hooks.set(first)
    first[0].percentile = 60
    model.train_on_batch(X, Y)
    copies = [copied(hook) for hook in first]
    for hook, other in zip(first, copies, strict=True):
        assert other.get_config.__func__ is hook.get_config.__func__
        assert other._registered_name is None and other._built_for is None
        assert other.variables == [] and not other._number_variables
        assert other.targets is hook.targets and other.name == other._name or other.name
    assert copies[0].percentile == 60 and copies[0].name == "p"
    assert copies[1].stages == stages and copies[1].stages is not stages
    copies[0].percentile = 10
    assert first[0].percentile == 60
    model.gradient_hooks.set(copies)
    model.train_on_batch(X, Y)
    shared = {id(v) for h in first for v in h.variables} & {
        id(v) for h in copies for v in h.variables
    }
    assert not shared
    again = copied(model.gradient_hooks)
    assert [h.name for h in again] == [h.name for h in copies] and len(again) == 3
    again.clear()
    assert len(model.gradient_hooks) == 3


SHOWN = [
    (lambda: hooks.GlobalNormClipping(1.5), "GlobalNormClipping(max_norm=1.5)"),
    (lambda: hooks.GradientMonitor(), "GradientMonitor(per_variable=False, validation=False)"),
    (
        lambda: hooks.NormClipping(2, targets=["a/*", keras.layers.Dense(1, name="d")], name="n"),
        "NormClipping(max_norm=2, per_layer=False, targets=['a/*', <layer 'd'>], name='n')",
    ),
    (lambda: hooks.Freezing("a/*", epochs=(1, 3)), "Freezing(targets='a/*', epochs=[1, 3])"),
    (
        lambda: hooks.GradientScaling(keras.optimizers.schedules.CosineDecay(1.0, 5)),
        "GradientScaling(factor=<CosineDecay>)",
    ),
    (lambda: hooks.LambdaHook(_halve), "LambdaHook(fn=<function _halve>)"),
    (lambda: hooks.SkipNonFinite(3), "SkipNonFinite(max_consecutive=3)"),
    (lambda: hooks.UpdateMonitor.__new__(hooks.UpdateMonitor), "UpdateMonitor()"),
    (lambda: Kept(0.5), "Kept(rate=0.5)"),
]


def _halve(gradient, variable):
    return gradient / 2


@pytest.mark.parametrize(("make", "text"), SHOWN)
def test_shown_with_its_arguments(make, text):
    assert repr(make()) == text


def test_a_list_is_shown_with_its_hooks():
    assert repr(hooks.HookList()) == "HookList()"
    shown = repr(hooks.HookList([hooks.ValueClipping(1.0), hooks.ValueClipping(0.5)]))
    assert shown == (
        "HookList(\n  'value_clipping': ValueClipping(max_value=1.0),\n"
        "  'value_clipping_1': ValueClipping(max_value=0.5),\n)"
    )


# Names and state


def _two(model):
    """Two hooks of one kind, whose state differs, with the names that they got."""
    model.compile(
        keras.optimizers.SGD(0.1),
        "mse",
        gradient_hooks=[
            hooks.SkipSpikes(1e6, num_warmup_steps=2),
            hooks.GradientScaling(3.0),
            hooks.SkipSpikes(1e6, num_warmup_steps=2),
        ],
    )
    model.fit(X, Y, epochs=2, verbose=0)
    return model.gradient_hooks


def _state(hook_list):
    return {h.name: [v.numpy().tolist() for v in h.variables] for h in hook_list}


CHANGES = {
    "first removed": lambda hook_list: hook_list.remove("skip_spikes"),
    "reversed": lambda hook_list: hook_list.reverse(),
    "one before": lambda hook_list: hook_list.add(hooks.SkipSpikes(1e5), 0),
    "removed and put back": lambda hook_list: hook_list.append(hook_list.pop(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_follows_its_name_into_a_file_and_back(two_layers, tmp_path, change):
    hook_list = _two(two_layers)
    CHANGES[change](hook_list)
    two_layers.fit(X, Y, verbose=0)
    two_layers.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [h.name for h in loaded.gradient_hooks] == [h.name for h in hook_list]
    assert _state(loaded.gradient_hooks) == _state(hook_list)
    assert two_layers.fit(X, Y, verbose=0).history == loaded.fit(X, Y, verbose=0).history
    assert _state(loaded.gradient_hooks) == _state(hook_list)


def test_lists_go_through_plain_dictionaries(two_layers):
    hook_list = _two(two_layers)
    hook_list.remove("skip_spikes")
    configs = json.loads(json.dumps(hook_list.serialize()))
    names = ["gradient_scaling", "skip_spikes_1"]
    assert [h.name for h in hooks.HookList.deserialize(configs)] == names
    # A list that was saved before names were.
    old = [config["hook"] for config in configs]
    names[1] = "skip_spikes"
    assert [h.name for h in hooks.HookList.deserialize(old)] == names
    mixed = hooks.HookList.deserialize([old[1], {"name": "skip_spikes", "hook": old[1]}])
    assert [h.name for h in mixed] == ["skip_spikes_1", "skip_spikes"]
    two_layers.compile("sgd", "mse", gradient_hooks=old_hooks(old))
    assert [h.name for h in two_layers.gradient_hooks] == names


def old_hooks(configs):
    return [keras.saving.deserialize_keras_object(config) for config in configs]


# Nothing holds a hook that was taken out, and it holds no model.


def test_hooks_and_models_let_go_of_each_other():
    model = TapeSequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    hook = model.gradient_hooks.add(hooks.SkipNonFinite(3, targets=None))
    model.train_on_batch(X, Y)
    weights = weakref.ref(model.weights[0])
    model.gradient_hooks.remove(hook)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert weights() is None
    other = TapeSequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.compile("sgd", "mse", gradient_hooks=[hook])
    other.train_on_batch(X, Y)
    assert len(hook.variables) == 4


def test_a_hook_that_comes_back_has_its_state(model):
    hook = model.gradient_hooks.add(hooks.PercentileClipping(history=4))
    model.train_on_batch(X, Y)
    model.gradient_hooks.remove(hook)
    assert hook.get_config()["history"] == 4
    model.train_on_batch(X, Y)
    model.gradient_hooks.add(hook)
    model.train_on_batch(X, Y)
    assert hook.variables[1].numpy() == 2


# A build that fails


class Failing(hooks.GradientHook):
    fails = True

    def build(self, variables):
        self.add_variable(name="half")
        self.half = 1
        if type(self).fails:
            raise RuntimeError("no build today")

    def apply(self, gradients):
        return gradients.scale(2.0)


def test_a_build_that_raises_has_not_been(model):
    first, last = hooks.GradientNoise(0.0, seed=1), hooks.GradientMonitor()
    failing = Failing()
    before = dict(vars(failing))
    model.compile(keras.optimizers.SGD(1.0), "mse", gradient_hooks=[first, failing, last])
    weights = model.get_weights()
    with pytest.raises(RuntimeError, match="no build today"):
        model.train_on_batch(X, Y)
    assert vars(failing) == {**before, "_registered_name": "failing"}
    for a, b in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    Failing.fails = False
    try:
        model.train_on_batch(X, Y)
        assert len(failing.variables) == 1
    finally:
        Failing.fails = True
    model.gradient_hooks.remove(failing)
    model.train_on_batch(X, Y)


@pytest.mark.filterwarnings("ignore:GradientScaling .* is no freezing")
def test_register_with_a_typo_and_again_without(model):
    hook = hooks.GradientScaling(0.0)
    for wrong in ({"targets": "typo/*"}, {"targets": "first/*", "name": 3}):
        with pytest.raises((ValueError, TypeError), match="typo|`name`"):
            model.register_gradient_hook(hook, **wrong)
        assert hook.targets is None and hook.name == "gradient_scaling"
    model.gradient_hooks.add(hooks.GradientMonitor(name="taken"))
    with pytest.raises(ValueError, match="named 'taken' already"):
        model.register_gradient_hook(hook, targets="first/*", name="taken")
    assert hook.targets is None and hook._name is None
    model.register_gradient_hook(hook, targets="first/*", name="zero")
    assert [g.any() for g in _moved(model)] == [False, False, True, True]


def test_lists_that_are_refused_change_nothing(model):
    taken, free = hooks.ValueClipping(1.0), hooks.GradientScaling(2.0)
    model.gradient_hooks = [taken]
    optimizer = model.optimizer
    wrong = [
        (lambda: hooks.HookList([free, free]), ValueError, "only once"),
        (lambda: hooks.HookList([free, 3]), TypeError, "must be a `GradientHook`"),
        (lambda: model.compile("adam", "mae", gradient_hooks=[free, free]), ValueError, "once"),
        (lambda: model.compile("adam", "mae", gradient_hooks=[free, 3]), TypeError, "must be a"),
        (lambda: model.gradient_hooks.add(free, index="a"), TypeError, "integer"),
        (lambda: model.gradient_hooks.insert(1.5, free), TypeError, "integer"),
        (lambda: model.gradient_hooks.replace("x", free), KeyError, "No hook 'x'"),
        (lambda: model.gradient_hooks.replace(None, free), KeyError, "No hook None"),
        (lambda: model.gradient_hooks.__setitem__(4, free), IndexError, "range"),
        (lambda: model.gradient_hooks.__setitem__("value", free), KeyError, "No hook"),
        (lambda: model.gradient_hooks.extend([free, taken]), ValueError, "belongs to a model"),
        (lambda: model.gradient_hooks.extend([free, free]), ValueError, "only once"),
    ]
    for call, error, text in wrong:
        with pytest.raises(error, match=text):
            call()
        assert list(model.gradient_hooks) == [taken] and free._registered_name is None
        assert model.optimizer is optimizer and model.loss == "mse"
    model.gradient_hooks.add(free)
    model.train_on_batch(X, Y)


# Wrong things in the wrong place


class AddsInApply(hooks.GradientHook):
    def apply(self, gradients):
        self.add_variable(name="late")
        return gradients


MISTAKES = [
    (
        lambda m: m.fit(X, Y, callbacks=[hooks.GradientMonitor()]),
        r"GradientMonitor\(.*\) is a gradient hook and no callback. Pass it to `compile\(grad",
    ),
    (lambda m: m.fit(X, Y, callbacks=hooks.NormClipping), "gradient hook and no callback"),
    (
        lambda m: m.compile("sgd", "mse", gradient_hooks=[keras.callbacks.TerminateOnNaN()]),
        r"This is a Keras callback: pass it to `fit\(callbacks=\[...\]\)`",
    ),
    (
        lambda m: m.compile("sgd", "mse", gradient_hooks=[hooks.GradientMonitor]),
        r"Did you mean `GradientMonitor\(...\)`\?",
    ),
    (
        lambda m: m.compile("sgd", "mse", gradient_hooks=hooks.GradientMonitor()),
        r"Put it in brackets: `gradient_hooks=\[hook\]`",
    ),
    (
        lambda m: m.compile("sgd", "mse", gradient_hooks=lambda g, v: g),
        r"Put it in brackets",
    ),
    (
        lambda m: m.register_gradient_hook(lambda g: g),
        r"called with two arguments, `\(gradient, variable\)`. Received: .*takes \(g\)",
    ),
    (lambda m: m.register_gradient_hook(tf.sign), "called with two arguments"),
    (lambda m: m.register_gradient_hook(keras.ops.sign), "called with two arguments"),
    (lambda m: m.gradient_hooks.add(lambda a, b, c: a), "called with two arguments"),
    (
        lambda m: m.fit(X, Y, callbacks=[keras.callbacks.TerminateOnNaN]),
        r"must be an instance. Did you mean `TerminateOnNaN\(...\)`\?",
    ),
    (
        lambda m: m.gradient_hooks.add(backward.SharpnessAware(0.1)),
        r"gradient method: pass it to `compile\(backward=...\)`",
    ),
    (lambda m: m.compile(backward=backward.SharpnessAware), r"`backward.SharpnessAware\(...\)`"),
]


@pytest.mark.parametrize(("call", "text"), MISTAKES)
def test_a_mistake_is_named(model, call, text):
    with pytest.raises(TypeError, match=text):
        call(model)
    assert len(model.gradient_hooks) == 0
    model.train_on_batch(X, Y)


def test_functions_that_take_two_arguments(model):
    fine = [lambda g, v: g, lambda *args: args[0], lambda g, v, scale=1.0: g]
    model.gradient_hooks.extend(fine)
    model.train_on_batch(X, Y)


class VariableInApply(hooks.GradientHook):
    def apply(self, gradients):
        return gradients.scale(tf.Variable(1.0))


def test_state_is_made_in_build(model):
    handle = model.register_gradient_hook(VariableInApply())
    with pytest.raises(ValueError, match=r"makes a variable in `apply`.* of VariableInApply, by"):
        model.train_on_batch(X, Y)
    handle.remove()
    model.gradient_hooks.add(AddsInApply())
    with pytest.raises(RuntimeError, match=r"only in `build`.* into `build\(self, variables\)` of"):
        model.train_on_batch(X, Y)


# State for each variable


@keras.saving.register_keras_serializable("tests")
class Smoothing(hooks.GradientHook):
    def build(self, variables):
        self.averages = self.add_variables(variables, name="average")

    def apply(self, gradients):
        def smooth(gradient, average):
            average.assign(0.5 * average + 0.5 * gradient)
            return average.value

        return gradients.map(smooth, self.averages)


class ByPlace(Smoothing):
    def build(self, variables):
        self.averages = [self.add_variable(v.shape) for v in variables]


@pytest.mark.parametrize("frozen", ["first/kernel", "first/*", "second/bias"])
def test_state_by_variable_while_some_are_frozen(model, frozen):
    hook = model.gradient_hooks.add(Smoothing())
    model.train_on_batch(X, Y)
    before = [hook.averages[v].numpy() for v in model.trainable_variables]
    paths = [v.path for v in model.trainable_variables]
    model.freeze(frozen)
    true = {path: g.numpy() for path, g in model.compute_gradients(X, Y).items()}
    moved = dict(zip(paths, _moved(model), strict=True))
    for path, average in zip(paths, before, strict=True):
        if path in true:
            expected = 0.5 * average + 0.5 * true[path]
            np.testing.assert_allclose(moved[path], expected, rtol=1e-5, atol=1e-7)
        else:
            assert not moved[path].any()


class Zips(ByPlace):
    def apply(self, gradients):
        new = []
        for gradient, average in zip(gradients.values(), self.averages, strict=False):
            average.assign(0.5 * average + 0.5 * gradient)
            new.append(average.value)
        return gradients.with_present(new)


@keras.saving.register_keras_serializable("tests")
class Indexes(ByPlace):
    def apply(self, gradients):
        def smooth(gradient, variable):
            average = self.averages[self.place(variable)]
            average.assign(0.5 * average + 0.5 * gradient)
            return average.value

        return gradients.map(smooth, gradients.variables)


@pytest.mark.parametrize("kind", [ByPlace, Zips])
@pytest.mark.parametrize("frozen", ["first/*", "second/*"])
def test_a_list_by_place_is_refused_when_some_are_frozen(model, kind, frozen):
    """Of the last layer, too, where the gradients would only seem to fit."""
    model.gradient_hooks.add(kind())
    model.train_on_batch(X, Y)
    before = model.get_weights()
    model.freeze(frozen)
    with pytest.raises(ValueError, match="list of 4 variables of state, and 2 of .*add_variables"):
        model.train_on_batch(X, Y)
    model.unfreeze(frozen)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    model.train_on_batch(X, Y)


def test_a_list_by_place_may_be_indexed(model):
    moved = []
    for kind in (Smoothing, Indexes):
        hook = model.gradient_hooks.add(kind())
        model.train_on_batch(X, Y)
        model.freeze("first/*")
        weights = model.get_weights()
        model.train_on_batch(X, Y)
        moved.append([b - a for a, b in zip(weights, model.get_weights(), strict=True)])
        model.unfreeze("first/*")
        model.gradient_hooks.remove(hook)
    assert any(change.any() for change in moved[1])
    assert not any(change.any() for change in moved[1][:2])


def test_states_by_variable_have_no_places(model):
    hook = model.gradient_hooks.add(Smoothing())
    model.train_on_batch(X, Y)
    assert len(hook.averages) == 4 and hook.averages.values() == hook.variables
    with pytest.raises(TypeError, match="not iterable"):
        list(hook.averages)
    with pytest.raises(TypeError, match="values by variable, not by place. .*Received: 0"):
        hook.averages[0]
    with pytest.raises(ValueError, match="'elsewhere' is not one of them"):
        hook.averages[keras.Variable(0.0, name="elsewhere")]


def test_state_of_an_embedding_by_its_rows():
    inputs = keras.Input((2,), dtype="int32")
    pooled = keras.layers.Embedding(4, 2, name="table")(inputs)
    model = TapeModel(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(pooled)))
    model.compile(keras.optimizers.SGD(1.0), "mse")

    class Weighs(hooks.GradientHook):
        def build(self, variables):
            self.weights = self.add_variables(variables, "ones")

        def apply(self, gradients):
            return gradients.map(lambda g, w: g * w, self.weights, keeps_zero=True)

    x, y = np.array([[1, 1], [1, 3]]), np.ones((2, 1))
    true = model.compute_gradients(x, y)["table/embeddings"]
    assert isinstance(true, tf.IndexedSlices)
    before = model.get_weights()[0]
    model.gradient_hooks.add(Weighs())
    model.train_on_batch(x, y)
    dense = np.zeros((4, 2))
    np.add.at(dense, true.indices.numpy(), true.values.numpy())
    np.testing.assert_allclose(before - model.get_weights()[0], dense, rtol=1e-5, atol=1e-7)
