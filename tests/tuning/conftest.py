"""What tests of searches share: small data, small models, quiet tuners."""

from __future__ import annotations

import gc

import keras
import keras_tuner
import numpy as np
import pytest

from keras_tapefit import TapeModel, hooks


@pytest.fixture(autouse=True, scope="module")
def fast_collections():
    """KerasTuner collects garbage twice before each trial."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session()


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(48, 4)).astype("float32")
    return x, (x[:, :1] * x[:, 1:2]).astype("float32")


@pytest.fixture
def search(tmp_path):
    """Returns a function that makes a tuner; its search is to be called."""

    def make(hypermodel, cls=keras_tuner.RandomSearch, objective=None, **kwargs):
        objective = objective or keras_tuner.Objective("val_loss", "min")
        if cls is not keras_tuner.Hyperband:
            kwargs.setdefault("max_trials", 2)
        kwargs.setdefault("project_name", "search")
        return cls(hypermodel, objective=objective, seed=1, directory=tmp_path, **kwargs)

    return make


def functional(hp, units=3):
    """A model with a seed of its own in its weights and its dropout."""
    inputs = keras.Input((4,))
    h = keras.layers.Dense(units, activation="tanh")(inputs)
    h = keras.layers.Dropout(0.2)(keras.layers.BatchNormalization()(h))
    model = TapeModel(inputs, keras.layers.Dense(1)(h))
    model.compile(
        keras.optimizers.Adam(hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")),
        "mse",
        metrics=["mae"],
        gradient_hooks=[
            hooks.SkipNonFinite(),
            hooks.GradientMonitor(),
            hooks.GlobalNormClipping(hp.Float("max_norm", 0.1, 10.0, sampling="log")),
        ],
    )
    return model


def small(hp):
    """A model that is traced in no time."""
    inputs = keras.Input((4,))
    model = TapeModel(inputs, keras.layers.Dense(1)(keras.layers.Dropout(0.2)(inputs)))
    model.compile(
        keras.optimizers.SGD(hp.Float("learning_rate", 1e-3, 1e-1, sampling="log"), momentum=0.9),
        "mse",
        gradient_hooks=[
            hooks.GradientMonitor(),
            hooks.GlobalNormClipping(hp.Float("max_norm", 0.1, 10.0)),
        ],
    )
    return model


@pytest.fixture
def build():
    return functional


@pytest.fixture
def light():
    return small


def scores(tuner):
    """Returns every metric of every trial."""
    return {
        name: {
            metric: trial.metrics.get_history(metric)[0].value for metric in trial.metrics.metrics
        }
        for name, trial in sorted(tuner.oracle.trials.items())
    }


@pytest.fixture
def all_scores():
    return scores
