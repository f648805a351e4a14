"""Trials that fail early, and hooks as hyperparameters."""

from __future__ import annotations

import copy

import keras
import keras_tuner
import numpy as np
import pytest

from keras_tapefit import TapeSequential, backward, hooks, tuning


def line(learning_rate, gradient_hooks=()):
    model = TapeSequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(learning_rate), "mse", gradient_hooks=list(gradient_hooks))
    return model


def test_a_trial_that_went_nan_is_failed(search, data):
    x, y = data
    bad = np.where(np.arange(48)[:, None] == 20, np.nan, x)
    tuner = search(lambda hp: line(hp.Choice("rate", [0.1, 0.2])))
    tuner.search(
        bad,
        y,
        epochs=1,
        batch_size=8,
        validation_data=(x, y),
        shuffle=False,
        verbose=0,
        callbacks=[tuning.GradientHealth(1)],
    )
    statuses = [trial.status for trial in tuner.oracle.trials.values()]
    assert statuses == ["FAILED", "FAILED"]
    messages = [trial.message for trial in tuner.oracle.trials.values()]
    assert all("more than max_bad_steps=1" in message for message in messages)


def test_skipped_steps_count_over_epochs(data):
    x, y = data
    bad = np.where(np.arange(48)[:, None] % 24 == 0, np.inf, x)
    model = line(0.1, [hooks.SkipNonFinite()])
    health = tuning.GradientHealth(4)
    model.fit(bad, y, epochs=2, batch_size=8, shuffle=False, verbose=0, callbacks=[health])
    assert health.num_bad_steps == 4
    with pytest.raises(keras_tuner.errors.FailedTrialError, match="4 steps were skipped"):
        model.fit(
            bad,
            y,
            epochs=2,
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=[tuning.GradientHealth(3)],
        )


def test_a_loss_that_ends_nan_fails(data):
    x, y = data
    with pytest.raises(keras_tuner.errors.FailedTrialError, match="ended with val_loss = nan"):
        line(0.1).fit(
            x,
            y,
            epochs=1,
            verbose=0,
            validation_data=(x * np.nan, y),
            callbacks=[tuning.GradientHealth(3)],
        )


def test_health_survives_a_deep_copy_and_checks_arguments():
    copied = copy.deepcopy(tuning.GradientHealth(7, losses=("loss",)))
    assert (copied.max_bad_steps, copied.losses) == (7, ("loss",))
    with pytest.raises(TypeError, match="`max_bad_steps` must be an integer"):
        tuning.GradientHealth(1.5)
    with pytest.raises(ValueError, match="`max_bad_steps` must be zero or a positive number"):
        tuning.GradientHealth(-1)


def test_a_gate_that_stops_fails_the_trial(search, data):
    x, y = data
    gate = hooks.SkipNonFinite
    hypermodel = tuning.TapeHyperModel(lambda hp: line(0.1, [gate(max_consecutive=2)]))
    tuner = search(hypermodel, max_trials=1)
    tuner.search(x * np.nan, y, epochs=1, batch_size=8, validation_data=(x, y), verbose=0)
    (trial,) = tuner.oracle.trials.values()
    assert trial.status == "FAILED" and "FailedTrialError" in trial.message


@pytest.mark.parametrize("kind", tuning.search_space.CLIPPING)
def test_every_kind_of_clipping(kind):
    hp = keras_tuner.HyperParameters()
    hp.Fixed("gradient_hooks/clipping", kind)
    made = tuning.gradient_hooks(hp, parts=("clipping",))
    assert [type(hook).__name__ for hook in made] == {
        "none": [],
        "global_norm": ["GlobalNormClipping"],
        "norm": ["NormClipping"],
        "value": ["ValueClipping"],
        "block_rms": ["BlockRMSClipping"],
        "adaptive": ["AdaptiveClipping"],
        "percentile": ["PercentileClipping"],
        "zscore": ["ZScoreClipping"],
    }[kind]


def test_parts_are_switched_and_conditional():
    model = TapeSequential([keras.Input((4,)), *(keras.layers.Dense(2) for _ in range(3))])
    hp = keras_tuner.HyperParameters()
    assert tuning.gradient_hooks(hp, parts=()) == [] and not hp.values

    hp = keras_tuner.HyperParameters()
    for name, value in {
        "gate": "spikes",
        "clipping": "global_norm",
        "noise": True,
        "num_frozen_layers": 2,
    }.items():
        hp.Fixed(f"gradient_hooks/{name}", value)
    made = tuning.gradient_hooks(hp, model, tuning.search_space.PARTS)
    names = [type(hook).__name__ for hook in made]
    assert names == [
        "SkipSpikes",
        "GlobalNormClipping",
        "GradientNoise",
        "Freezing",
        "LearningRateMultiplier",
        "LearningRateMultiplier",
    ]
    assert made[3].targets == model.layers[:2]
    model.compile("sgd", "mse", gradient_hooks=made)
    model.fit(np.zeros((8, 4)), np.zeros((8, 2)), verbose=0)

    with pytest.raises(ValueError, match="needs to know the layers"):
        tuning.gradient_hooks(hp, parts=("freezing",))
    with pytest.raises(ValueError, match="`parts` must be some of"):
        tuning.gradient_hooks(hp, parts=("gates",))


def stack(num_layers):
    return TapeSequential([keras.Input((4,)), *(keras.layers.Dense(2) for _ in range(num_layers))])


def frozen(hp, num_layers):
    made = tuning.gradient_hooks(hp, stack(num_layers), ("freezing",))
    return len(made[0].targets) if made else 0


def test_one_layer_is_never_frozen():
    hp = keras_tuner.HyperParameters()
    assert frozen(hp, 1) == 0
    # And the range of later models is their own.
    assert frozen(hp, 3) == 0
    (number,) = [p for p in hp.space if p.name == "gradient_hooks/num_frozen_layers"]
    assert (number.min_value, number.max_value) == (0, 2)


def test_models_may_have_other_numbers_of_layers_than_the_first():
    hp = keras_tuner.HyperParameters()
    frozen(hp, 3)
    hp.values["gradient_hooks/num_frozen_layers"] = 2
    assert frozen(hp, 3) == frozen(hp, 4 - 1) == 2
    # Fewer: all but the last, for a number of epochs.
    assert frozen(hp, 2) == 1
    assert tuning.gradient_hooks(hp, stack(2), ("freezing",))[0].epochs == 1
    # More: all but the last can be.
    assert frozen(hp, 6) == 0
    hp.values["gradient_hooks/num_frozen_layers_of_6"] = 5
    assert frozen(hp, 6) == 5


def test_a_search_over_the_number_of_layers(search):
    seen = []

    def build(hp):
        model = stack(hp.Int("layers", 1, 5))
        model.compile("sgd", "mse")
        return model

    class Sees(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            hooks_of_model = list(self.model.gradient_hooks)
            seen.append((len(self.model.layers), sum(len(hook.targets) for hook in hooks_of_model)))

    hypermodel = tuning.TapeHyperModel(build, parts=("freezing",))
    tuner = search(hypermodel, max_trials=12)
    x = np.zeros((4, 4), "float32")
    tuner.search(
        x, x[:, :2], epochs=1, validation_data=(x, x[:, :2]), verbose=0, callbacks=[Sees()]
    )
    assert all(trial.status == "COMPLETED" for trial in tuner.oracle.trials.values())
    assert all(num_frozen < max(num_layers, 2) for num_layers, num_frozen in seen)
    assert max(num_frozen for _, num_frozen in seen) > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clipping", "globalnorm"),
        ("gate", "nonfinite"),
        ("noise", "yes"),
        ("num_frozen_layers", "two"),
        ("num_frozen_layers", -1),
    ],
)
def test_an_unknown_fixed_value_is_an_error(name, value):
    hp = keras_tuner.HyperParameters()
    hp.Fixed(f"gradient_hooks/{name}", value)
    with pytest.raises(ValueError, match=f"The hyperparameter '{name}' must be .* Received: "):
        tuning.gradient_hooks(hp, stack(3), tuning.search_space.PARTS)
    hp.Fixed("sharpness_aware", "yes")
    with pytest.raises(ValueError, match="'sharpness_aware' must be one of"):
        tuning.gradient_method(hp)


def test_nothing_is_added_that_was_not_asked_for():
    def build(hp):
        model = stack(1)
        model.compile("sgd", "mse")
        return model

    hp = keras_tuner.HyperParameters()
    assert len(tuning.TapeHyperModel(build).build(hp).gradient_hooks) == 0
    assert not hp.values


def test_sharpness_is_a_hyperparameter():
    hp = keras_tuner.HyperParameters()
    assert type(tuning.gradient_method(hp)) is backward.Backpropagation
    hp = keras_tuner.HyperParameters()
    hp.Fixed("sharpness_aware", True)
    assert tuning.gradient_method(hp).rho == 0.05


def test_a_hyper_model_adds_hooks_to_models_without():
    def build(hp):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    hp = keras_tuner.HyperParameters()
    hp.Fixed("gradient_hooks/gate", "non_finite")
    hp.Fixed("sharpness_aware", True)
    model = tuning.TapeHyperModel(build, parts=("gate", "sharpness")).build(hp)
    assert isinstance(model, TapeSequential)
    assert [hook.name for hook in model.gradient_hooks] == ["skip_non_finite"]
    assert "backward" in model.get_compile_config()
