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
