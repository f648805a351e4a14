"""Saved and loaded: what goes on is what would have gone on, hooks included."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, backward, hooks

from . import support
from .support import OURS, STOCK, X


@keras.saving.register_keras_serializable("models_tests")
class Net(TapeModel):
    """A custom model with a config of its own."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = layers.Dense(units, activation="relu")
        self.dropout = layers.Dropout(0.3, seed=1)
        self.last = layers.Dense(1)

    def call(self, x, training=False):
        return self.last(self.dropout(self.hidden(x), training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("models_tests")
class Graph(TapeModel):
    """A registered subclass that is used functionally."""


@keras.saving.register_keras_serializable("models_tests")
def halve(gradient, variable):
    return 0.5 * gradient


def _graph():
    inputs = keras.Input((6,))
    hidden = layers.Dropout(0.3)(layers.Dense(4, name="first")(inputs))
    return inputs, layers.Dense(1)(layers.BatchNormalization()(hidden))


MAKERS = {
    "functional": lambda: TapeModel(*_graph()),
    "registered functional": lambda: Graph(*_graph()),
    "registered subclass": lambda: Net(4),
    "sequential": lambda: TapeSequential([layers.Dense(4), layers.Dropout(0.2), layers.Dense(1)]),
}


def _compiled(model):
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 50)),
        "mse",
        metrics=["mae"],
        gradient_hooks=[
            hooks.SkipNonFinite(),
            hooks.PercentileClipping(30, history=6),
            hooks.GlobalNormClipping(keras.optimizers.schedules.ExponentialDecay(1.0, 5, 0.5)),
            halve,
            hooks.GradientNoise(0.01, seed=3),
            hooks.GradientMonitor(name="end"),
        ],
    )
    return model


def _fit(model, epochs, begin=0):
    return support.fit(model, epochs=epochs, initial_epoch=begin, shuffle=False)


def _state(model):
    of_hooks = [support.values(hook.variables) for hook in model.gradient_hooks]
    return support.state_of(model) | {"hooks": of_hooks}


@pytest.mark.parametrize("name", MAKERS)
def test_a_loaded_model_goes_on_to_the_bit(name, tmp_path):
    support.begin()
    model = _compiled(MAKERS[name]())
    _fit(model, 2)
    model.save(tmp_path / "model.keras")
    expected = _fit(model, 4, 2)

    keras.utils.clear_session()
    keras.utils.set_random_seed(99)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded).__mro__ == type(model).__mro__
    assert [h.name for h in loaded.gradient_hooks] == [h.name for h in model.gradient_hooks]
    assert _fit(loaded, 4, 2) == expected
    support.assert_same(_state(loaded), _state(model))
    assert any(value.any() for value in _state(model)["hooks"][1])


def test_arguments_of_compile_come_back(tmp_path):
    support.begin()
    model = support.functional()
    model.compile(
        "adam",
        "mse",
        backward=backward.SharpnessAware(rho=0.2),
        micro_batches=2,
        gradient_hooks=[hooks.ValueClipping(1.0, targets=model.get_layer("second"), name="v")],
    )
    support.fit(model)
    model.gradient_hooks["v"].max_value = 0.25
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    config = loaded.get_compile_config()
    assert config["micro_batches"] == 2
    assert config["backward"]["config"]["rho"] == 0.2
    assert loaded.gradient_hooks["v"].max_value == 0.25
    support.fit(loaded)
    paths = [v.path for v in loaded.get_layer("second").variables]
    assert config == model.get_compile_config()
    assert config["gradient_hooks"][0]["hook"]["config"]["targets"]["paths"] == paths
    assert not keras.models.load_model(tmp_path / "model.keras", compile=False).compiled


def test_a_model_without_hooks_is_saved_as_keras_saves_it(tmp_path):
    """A plain Keras reads it, as it has nothing of ours but class names."""
    configs = []
    for kit in (STOCK, OURS):
        support.begin()
        model = support.functional(kit)
        model.compile("adam", "mse")
        configs.append(model.get_compile_config())
    assert configs[0] == configs[1]


def _nested(kit):
    inner = kit.Sequential([keras.Input((6,)), layers.Dense(4), layers.BatchNormalization()])
    inputs = keras.Input((6,))
    branch = kit.Model(inputs, layers.Dense(3)(inner(inputs)))
    inputs = keras.Input((6,))
    hidden = layers.Concatenate()([branch(inputs), layers.Dense(2)(inputs)])
    return kit.Model(inputs, kit.Sequential([layers.Dense(1)])(hidden))


class _Subclass:
    def __init__(self):
        super().__init__()
        self.parts = [layers.Dense(3), layers.Dense(1)]

    def call(self, x):
        return self.parts[1](self.parts[0](x))


FORMS = {
    "nested": _nested,
    "sequential": lambda kit: kit.Sequential([layers.Dense(3), layers.Dense(1)]),
    "subclass": lambda kit: type("Net", (_Subclass, kit.Model), {})(),
}


@pytest.mark.parametrize("source", ["keras", "ours"])
@pytest.mark.parametrize(
    ("form", "ending"),
    [
        ("nested", "weights.h5"),
        ("nested", "keras"),
        ("sequential", "weights.h5"),
        ("subclass", "weights.h5"),
    ],
)
def test_weight_files_of_both(form, source, ending, tmp_path):
    """In both directions, with optimizer and hook state there."""
    keras.utils.clear_session()
    kits = [STOCK, OURS] if source == "keras" else [OURS, STOCK]
    models = [FORMS[form](kit) for kit in kits]
    for model in models:
        more = (
            {"gradient_hooks": [hooks.PercentileClipping()]} if isinstance(model, TapeModel) else {}
        )
        model.compile("adam", "mse", **more)
        support.fit(model)
    path = tmp_path / f"model.{ending}"
    if ending == "keras":
        models[0].save(path)
    else:
        models[0].save_weights(path)
    assert support.differ(models[1].get_weights(), models[0].get_weights())
    # What a file of Keras's cannot have is told.
    told = pytest.warns(UserWarning, match="no state of the hooks percentile_clipping")
    with told if source == "keras" else contextlib.nullcontext():
        models[1].load_weights(path)
    support.assert_same(models[1].get_weights(), models[0].get_weights())
    np.testing.assert_array_equal(models[1].predict(X, verbose=0), models[0].predict(X, verbose=0))


def test_state_of_other_hooks_is_refused(tmp_path):
    support.begin()
    model = support.functional()
    model.compile("sgd", "mse", gradient_hooks=[hooks.PercentileClipping(history=5)])
    support.fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    model.gradient_hooks = [hooks.PercentileClipping(history=9)]
    support.fit(model)
    with pytest.raises(ValueError, match=r"state of 'percentile_clipping.*\(5,\).*same hooks"):
        model.load_weights(tmp_path / "model.weights.h5")


def test_hook_state_waits_for_a_model_without_weights(tmp_path):
    support.begin()
    model = _compiled(MAKERS["sequential"]())
    _fit(model, 1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = _compiled(MAKERS["sequential"]())
    other.build((None, 6))
    with warnings.catch_warnings():
        # Keras's own word for an optimizer that has no state yet.
        warnings.filterwarnings("ignore", message="(?s).*Skipping variable loading")
        warnings.filterwarnings("ignore", message="(?s).*could not be loaded")
        other.load_weights(tmp_path / "model.weights.h5")
    # The hooks are built with the first step, and take their state then.
    other.apply_gradients([])
    support.assert_same(_state(other)["hooks"], _state(model)["hooks"])


def test_checkpoint_of_the_best_epoch(tmp_path):
    """`ModelCheckpoint` and `BackupAndRestore`, as users have them."""
    support.begin()
    model = _compiled(MAKERS["functional"]())
    path = tmp_path / "best.keras"
    best = keras.callbacks.ModelCheckpoint(path, monitor="loss", save_best_only=True)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    losses = support.fit(model, epochs=3, callbacks=[best, backup])["loss"]
    loaded = keras.models.load_model(path)
    assert int(loaded.optimizer.iterations) == 3 * (int(np.argmin(losses)) + 1)


@pytest.mark.slow
def test_fit_that_is_killed_goes_on_to_the_bit(tmp_path):
    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(callbacks):
        support.begin()
        model = _compiled(MAKERS["functional"]())
        options = {"epochs": 4, "shuffle": False, "callbacks": callbacks}
        return model, lambda: support.fit(model, **options)

    whole, fit = run([])
    fit()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    _, fit = run([backup, Kill()])
    with pytest.raises(KeyboardInterrupt):
        fit()
    resumed, fit = run([keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    fit()
    for part in ("weights", "optimizer"):
        support.assert_same(support.state_of(resumed)[part], support.state_of(whole)[part])
    support.assert_same(_state(resumed)["hooks"], _state(whole)["hooks"])
