"""Every hook goes into a config and comes back, and its state into a file.

A new hook is one more line in `HOOKS`; `test_registry.py` asks for it.
"""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, hooks
from keras_tapefit.hooks.function import LambdaHook

RNG = np.random.default_rng(41)
X, Y = RNG.normal(size=(24, 4)), RNG.normal(size=(24, 2))


@keras.saving.register_keras_serializable("tests")
def halve(gradient, variable):
    return gradient * 0.5


# Every argument has another value than its default.
HOOKS = {
    "GlobalNormClipping": lambda: hooks.GlobalNormClipping(
        0.5, targets="a/*", name="x", log_clipped=True
    ),
    "NormClipping": lambda: hooks.NormClipping(
        0.5, per_layer=True, targets="a/*", name="x", log_clipped=True
    ),
    "ValueClipping": lambda: hooks.ValueClipping(0.5, targets="a/*", name="x", log_clipped=True),
    "BlockRMSClipping": lambda: hooks.BlockRMSClipping(
        0.5, targets="a/*", name="x", log_clipped=True
    ),
    "AdaptiveClipping": lambda: hooks.AdaptiveClipping(
        0.5, targets="a/*", name="x", log_clipped=True
    ),
    "PercentileClipping": lambda: hooks.PercentileClipping(
        50, 4, targets="a/*", name="x", log_clipped=True
    ),
    "ZScoreClipping": lambda: hooks.ZScoreClipping(
        1.5, 0.5, 2, targets="a/*", name="x", log_clipped=True
    ),
    "SkipNonFinite": lambda: hooks.SkipNonFinite(3, "a/*", "x", locate=True),
    "SkipSpikes": lambda: hooks.SkipSpikes(3, "loss", 0.5, 2, 1, targets="a/*", name="x"),
    "ZeroNonFinite": lambda: hooks.ZeroNonFinite(targets="a/*", name="x"),
    "GradientScaling": lambda: hooks.GradientScaling(0.5, targets="a/*", name="x"),
    "GradientNoise": lambda: hooks.GradientNoise(0.5, 0.1, 7, targets="a/*", name="x"),
    "Centralization": lambda: hooks.Centralization(targets="a/*", name="x"),
    "LearningRateMultiplier": lambda: hooks.LearningRateMultiplier(0.5, targets="a/*", name="x"),
    "Freezing": lambda: hooks.Freezing("a/*", epochs=(1, 3), name="x"),
    "GradualUnfreezing": lambda: hooks.GradualUnfreezing(["b/*", ["a/*"]], 2, "*", name="x"),
    "GradientMonitor": lambda: hooks.GradientMonitor(True, True, "a/*", "x", per_layer=True),
    "UpdateMonitor": lambda: hooks.UpdateMonitor(True, targets="a/*", name="x"),
    "NoiseScale": lambda: hooks.NoiseScale(0.5, name="x"),
    "During": lambda: hooks.During(hooks.GradientScaling(0.5), (0, 9), (1, 99), 2, name="x"),
    "OutputGradient": lambda: hooks.OutputGradient(halve, "a", name="x"),
    "OutputMonitor": lambda: hooks.OutputMonitor(["a", "b"], name="x"),
    "LambdaHook": lambda: LambdaHook(halve, targets="a/*", name="x"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_config_round_trip(name):
    hook = HOOKS[name]()
    config = hook.get_config()
    arguments = list(inspect.signature(type(hook).__init__).parameters)[1:]
    if arguments == ["args", "kwargs"]:
        arguments = ["targets", "name"]
    assert list(config) == arguments
    defaults = inspect.signature(type(hook).__init__).parameters
    for argument, value in config.items():
        default = getattr(defaults.get(argument), "default", None)
        if (name, argument) != ("Freezing", "steps"):  # one of epochs and steps
            assert value != default, f"`{argument}` has its default value in this test"
    json.dumps(config)
    restored = type(hook).from_config(config)
    assert restored.get_config() == config
    for argument in arguments:
        values = [getattr(each, argument) for each in (restored, hook)]
        if isinstance(values[0], hooks.GradientHook):
            values = [value.get_config() for value in values]
        assert values[0] == values[1]


@pytest.mark.parametrize("name", HOOKS)
def test_keras_serializes_it(name):
    hook = HOOKS[name]()
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(hook)))
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is type(hook)
    assert json.loads(json.dumps(restored.get_config())) == json.loads(
        json.dumps(hook.get_config())
    )


@pytest.mark.parametrize(
    "number",
    [keras.optimizers.schedules.ExponentialDecay(1.0, 5, 0.5), 3, np.float32(0.5)],
    ids=["schedule", "int", "float32"],
)
def test_numbers_in_configs(number):
    config = json.loads(json.dumps(hooks.GlobalNormClipping(number).get_config()))
    restored = hooks.GlobalNormClipping.from_config(config).max_norm
    if isinstance(number, keras.optimizers.schedules.LearningRateSchedule):
        assert restored.get_config() == number.get_config()
    else:
        assert restored == number


def test_a_live_number_is_saved_as_it_is_now():
    hook = hooks.GlobalNormClipping(1.0)
    hook.max_norm = 0.25
    assert hook.get_config()["max_norm"] == 0.25


def test_a_hook_that_keeps_no_attribute_says_so():
    class Careless(hooks.GradientHook):
        def __init__(self, size, targets=None, name=None):
            super().__init__(targets=targets, name=name)

    with pytest.raises(AttributeError, match=r"Careless.__init__ takes `size` but keeps no attri"):
        Careless(3).get_config()


def _model(*gradient_hooks):
    keras.utils.set_random_seed(8)
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, activation="tanh", name="a")(inputs)
    model = TapeModel(inputs, layers.Dense(2, name="b")(hidden))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    # `NoiseScale` compares the parts of a batch.
    num_parts = 2 if any(isinstance(h, hooks.NoiseScale) for h in gradient_hooks) else 1
    model.compile(optimizer, "mse", gradient_hooks=gradient_hooks, micro_batches=num_parts)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", HOOKS)
def test_saved_in_the_middle_of_training(tmp_path, name):
    """Saved, loaded and trained on, against trained on: bit for bit, logs included."""
    model = _model(HOOKS[name]())
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(X, Y, **options)
    model.save(tmp_path / "model.keras")
    expected = model.fit(X, Y, initial_epoch=1, epochs=3, **options).history
    loaded = keras.models.load_model(tmp_path / "model.keras")
    (hook,) = loaded.gradient_hooks
    # Through JSON, a tuple is a list.
    config = json.loads(json.dumps(model.gradient_hooks[0].get_config()))
    assert json.loads(json.dumps(hook.get_config())) == config and hook.name == "x"
    history = loaded.fit(X, Y, initial_epoch=1, epochs=3, **options).history
    assert history == expected
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    pairs = zip(hook.variables, model.gradient_hooks[0].variables, strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_layers_and_variables_as_targets_are_saved(tmp_path):
    model = _model()
    layer = model.get_layer("a")
    model.gradient_hooks.set(
        [
            hooks.GradientScaling(0.5, targets=layer),
            hooks.ValueClipping(0.1, targets=[layer.bias, "b/*"]),
            hooks.GradualUnfreezing([model.get_layer("b"), [layer.kernel, layer.bias]]),
        ]
    )
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for m in (model, loaded):
        m.fit(X, Y, verbose=0, shuffle=False, epochs=3, initial_epoch=1)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_stays_out_of_the_weights(tmp_path):
    model = _model(hooks.PercentileClipping(), hooks.GradientNoise(0.1))
    plain = _model()
    model.fit(X, Y, verbose=0)
    assert len(model.weights) == len(plain.weights) == 4
    model.save_weights(tmp_path / "ours.weights.h5")
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, activation="tanh")(inputs)
    stock = keras.Model(inputs, layers.Dense(2)(hidden))
    stock.load_weights(tmp_path / "ours.weights.h5")
    for a, b in zip(stock.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    stock.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    stock.fit(X, Y, verbose=0)
    stock.save_weights(tmp_path / "stock.weights.h5")
    with pytest.warns(UserWarning, match="no state of the hooks percentile_clipping, gradient_no"):
        model.load_weights(tmp_path / "stock.weights.h5")
    for a, b in zip(stock.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_of_another_shape_is_refused(tmp_path):
    model = _model(hooks.PercentileClipping(history=4))
    model.fit(X, Y, verbose=0)
    model.save_weights(tmp_path / "four.weights.h5")
    other = _model(hooks.PercentileClipping(history=5))
    other.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="saved state of 'percentile_clipping.* has shape"):
        other.load_weights(tmp_path / "four.weights.h5")


def test_config_of_a_plain_function_needs_registration(tmp_path):
    model = _model(halve)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.gradient_hooks[0].fn is halve
