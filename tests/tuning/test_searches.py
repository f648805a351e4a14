"""TapeModels in the tuners of KerasTuner."""

from __future__ import annotations

import gc
import weakref

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday

from keras_tapefit import TapeModel, TapeSequential, callbacks, hooks, tuning

# KerasTuner loads weights into models whose optimizer has no state yet.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Skipping variable loading for optimizer:UserWarning"
)


def fit_arguments(data, **kwargs):
    x, y = data
    return dict(x=x, y=y, validation_data=data, batch_size=16, verbose=0, epochs=1) | kwargs


def assert_best_model_scores(tuner, data):
    (model,) = tuner.get_best_models()
    (best,) = tuner.oracle.get_best_trials()
    found = model.evaluate(*data, batch_size=16, verbose=0, return_dict=True)
    assert found["loss"] == best.score
    return model


TUNERS = {
    "RandomSearch": dict(max_trials=2, executions_per_trial=2),
    "GridSearch": dict(max_trials=2),
    "BayesianOptimization": dict(max_trials=2, num_initial_points=1),
    "Hyperband": dict(max_epochs=2, factor=2),
}


@pytest.mark.parametrize(
    "tuner",
    everyday(["RandomSearch"], of=TUNERS),
)
def test_tuners_find_the_same_with_and_without_reuse(tuner, search, light, data, all_scores):
    arguments = fit_arguments(data)
    if tuner == "Hyperband":
        del arguments["epochs"]
    found = []
    for reuse in (False, True):
        keras.utils.set_random_seed(0)
        hypermodel = tuning.TapeHyperModel(light, reuse=reuse)
        made = search(
            hypermodel, getattr(keras_tuner, tuner), project_name=f"{reuse}", **TUNERS[tuner]
        )
        made.search(**arguments)
        found.append(all_scores(made))
    assert found[0] == found[1]
    assert len(found[0]) > 1
    assert all({"val_loss", "gradient_norm"} <= set(m) for m in found[0].values())
    assert hypermodel.history[0] == "traced" and set(hypermodel.history[1:]) == {"reused"}
    if "executions_per_trial" in TUNERS[tuner]:
        assert len(hypermodel.history) == 2 * len(found[0])
    else:
        # Of several executions the oracle keeps the mean, and the weights of the best.
        assert_best_model_scores(made, data)


def test_a_search_is_resumed(search, light, data, all_scores):
    hypermodel = tuning.TapeHyperModel(light, reuse=True)
    tuner = search(hypermodel, max_trials=1)
    tuner.search(**fit_arguments(data))
    resumed = search(hypermodel, max_trials=3)
    resumed.search(**fit_arguments(data))
    before, after = all_scores(tuner), all_scores(resumed)
    assert (len(before), len(after)) == (1, 3)
    assert before.items() <= after.items()
    assert hypermodel.history == ["traced"] + ["reused"] * 2


def test_arguments_of_the_tuner_keep_the_hooks(search, light, data):
    seen = []

    class Tuner(keras_tuner.RandomSearch):
        def on_epoch_end(self, trial, model, epoch, logs=None):
            seen.append((type(model.optimizer).__name__, len(model.gradient_hooks), sorted(logs)))

    def gated(hp):
        model = light(hp)
        model.gradient_hooks.add(hooks.SkipNonFinite(), index=0)
        return model

    tuner = search(
        tuning.TapeHyperModel(gated, reuse=True),
        Tuner,
        optimizer=keras.optimizers.Adam(0.01),
        loss="mae",
        metrics=["mse"],
        objective=keras_tuner.Objective("gradient_norm", "min"),
    )
    tuner.search(**fit_arguments(data))
    assert len(seen) == 2
    optimizer, num_hooks, logs = seen[-1]
    assert (optimizer, num_hooks) == ("Adam", 3)
    assert {"gradient_norm", "skipped_steps", "mse"} <= set(logs)
    assert tuner.oracle.get_best_trials()[0].score > 0


def test_a_run_trial_of_ones_own(search, light, data):
    class Tuner(keras_tuner.RandomSearch):
        def run_trial(self, trial, x, y):
            keras.utils.clear_session()
            model = self.hypermodel.build(trial.hyperparameters)
            model.fit(x, y, verbose=0)
            return {"val_loss": model.evaluate(x, y, verbose=0, return_dict=True)["loss"]}

    hypermodel = tuning.TapeHyperModel(light, reuse=True)
    tuner = search(hypermodel, Tuner)
    tuner.search(*data)
    assert all(t.status == "COMPLETED" for t in tuner.oracle.trials.values())
    assert hypermodel.history == ["traced", "reused"]


def test_callbacks_of_ours_are_copied_for_each_trial(search, light, data, tmp_path, all_scores):
    found = []
    for given in (
        [],
        [
            tuning.GradientHealth(1),
            callbacks.GradientHistory(),
            callbacks.GradientCSV(tmp_path / "gradients.csv"),
            callbacks.GradientTensorBoard(tmp_path / "events"),
        ],
    ):
        keras.utils.set_random_seed(0)
        hypermodel = tuning.TapeHyperModel(light, reuse=True)
        tuner = search(hypermodel, project_name=f"{len(given)}")
        tuner.search(**fit_arguments(data), callbacks=given)
        found.append(all_scores(tuner))
    assert found[0] == found[1]
    assert len(given[1]) == 0 and given[0].num_bad_steps == 0
    assert len((tmp_path / "gradients.csv").read_text().splitlines()) == 1 + 3
    assert hypermodel.history == ["traced", "reused"]


def test_a_hyper_model_with_a_fit_of_its_own(search, light, data):
    class Own(keras_tuner.HyperModel):
        def build(self, hp):
            return light(hp)

        def fit(self, hp, model, x, y, **kwargs):
            model.fit(x, y, batch_size=hp.Choice("batch_size", [8, 16]), **kwargs)
            return model.evaluate(x, y, verbose=0)

    hypermodel = tuning.TapeHyperModel(Own(), reuse=True)
    tuner = search(hypermodel, max_trials=3)
    tuner.search(*data, verbose=0)
    # A trace is for batches of one shape.
    assert hypermodel.history[0] == "traced" and len(hypermodel.history) == 3
    others = {"reused", "traced: the batches have other shapes"}
    assert set(hypermodel.history[1:]) <= others


def test_models_of_trials_die(search, light, data):
    references = []

    def remembered(hp):
        model = light(hp)
        references.append(weakref.ref(model))
        return model

    tuner = search(remembered)
    tuner.search(**fit_arguments(data))
    keras.utils.clear_session()
    gc.collect()
    assert len(references) >= 3
    assert [reference() for reference in references] == [None] * len(references)


class Net(TapeModel):
    def __init__(self, units=3):
        super().__init__()
        self.hidden = keras.layers.Dense(units)
        self.last = keras.layers.Dense(1)

    def call(self, x):
        return self.last(self.hidden(x))


class PlainNet(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(3)
        self.last = keras.layers.Dense(1)

    def call(self, x):
        return self.last(self.hidden(x))


KINDS = {
    "sequential": lambda: TapeSequential([keras.layers.Dense(3), keras.layers.Dense(1)]),
    "subclass": Net,
    "wrapper": lambda: TapeModel.from_model(PlainNet()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_best_models_score_as_the_oracle_says(kind, search, data):
    def build(hp):
        model = KINDS[kind]()
        model.compile(
            keras.optimizers.SGD(hp.Float("learning_rate", 0.01, 0.1)),
            "mse",
            gradient_hooks=[hooks.GlobalNormClipping(1.0)],
        )
        return model

    hypermodel = tuning.TapeHyperModel(build, reuse=True)
    tuner = search(hypermodel)
    tuner.search(**fit_arguments(data))
    assert hypermodel.history == ["traced", "reused"]
    assert_best_model_scores(tuner, data)


def test_a_strategy(search, data):
    def build(hp):
        model = Net()
        model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 0.01, 0.1)), "mse")
        return model

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    hypermodel = tuning.TapeHyperModel(build, reuse=True)
    tuner = search(hypermodel, max_trials=1, distribution_strategy=strategy)
    tuner.search(**fit_arguments(data))
    reason = "traced again: the model is trained under a `tf.distribute` strategy"
    assert hypermodel.history == [reason]
    assert_best_model_scores(tuner, data)


class Adversarial(TapeModel):
    """A GAN: a step of its own, two optimizers, and no `call`."""

    def __init__(self, lazy=False):
        super().__init__()
        first = [] if lazy else [keras.Input((2,))]
        self.generator = keras.Sequential([*first, keras.layers.Dense(4)])
        self.critic = keras.Sequential([keras.layers.Dense(1)])
        self.generator_loss = keras.metrics.Mean(name="generator_loss")

    def compile(self, learning_rate):
        super().compile()
        self.optimizers = [keras.optimizers.SGD(learning_rate) for _ in range(2)]

    @property
    def metrics(self):
        return [self.generator_loss]

    def train_step(self, data):
        noise = tf.ones((tf.shape(data)[0], 2))
        with self.gradient_tape(persistent=True) as tape:
            fake = self.generator(noise)
            bluff = tf.reduce_mean(tf.nn.softplus(-self.critic(fake)))
            doubt = tf.reduce_mean(tf.nn.softplus(self.critic(fake) - self.critic(data)))
        pairs = [(bluff, self.generator), (doubt, self.critic)]
        for (loss, part), optimizer in zip(pairs, self.optimizers, strict=True):
            tape.minimize(loss, part.trainable_variables, optimizer)
        self.generator_loss.update_state(bluff)
        return {"generator_loss": self.generator_loss.result()}


@pytest.mark.parametrize("lazy", [False, True])
def test_the_best_gan_comes_back(lazy, search, data):
    def build(hp):
        model = Adversarial(lazy)
        model.compile(hp.Float("learning_rate", 0.01, 0.1))
        return model

    hypermodel = tuning.TapeHyperModel(build, reuse=True)
    tuner = search(hypermodel, objective=keras_tuner.Objective("generator_loss", "min"))
    weights = {}
    tuner.on_epoch_end = lambda trial, model, epoch, logs=None: weights.update(
        {trial.trial_id: model.generator.get_weights()}
    )
    tuner.search(data[0], epochs=1, verbose=0)
    # The state of its optimizers is made in the first step, so nothing is known before.
    assert "reused" not in hypermodel.history
    (model,) = tuner.get_best_models()
    best = tuner.oracle.get_best_trials()[0].trial_id
    for found, kept in zip(model.generator.get_weights(), weights[best], strict=True):
        np.testing.assert_array_equal(found, kept)
