"""scikeras, mlflow, wandb, optuna and KerasTuner around models with hooks."""

import pickle

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, callbacks, hooks

pytestmark = [
    pytest.mark.slow,
    # Of other libraries, about each other.
    pytest.mark.filterwarnings("ignore::Warning"),
]
X = np.random.default_rng(3).normal(size=(32, 4)).astype("float32")
Y = X[:, :1]
LABELS = (X[:, 0] > 0).astype("int64")


def _model(kind=TapeModel, **options):
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    inputs = keras.Input((4,))
    model = kind(inputs, layers.Dense(1)(layers.Dense(3, activation="relu")(inputs)))
    model.compile("sgd", keras.losses.MeanSquaredError(), **options)
    return model


def _hooks():
    return [hooks.GlobalNormClipping(0.5), hooks.GradientMonitor()]


def _fit(model, *more, **options):
    options = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, callbacks=list(more), **options).history


def _sequential(max_norm, meta):
    model = TapeSequential(
        [keras.Input(meta["X_shape_"][1:]), layers.Dense(3), layers.Dense(1, "sigmoid")]
    )
    clipping = hooks.GlobalNormClipping(max_norm)
    model.compile("sgd", "binary_crossentropy", gradient_hooks=[clipping])
    return model


def test_scikeras():
    """A search of scikit-learn's copies, pickles and refits the models."""
    scikeras = pytest.importorskip("scikeras.wrappers", exc_type=ImportError)
    selection = pytest.importorskip("sklearn.model_selection", exc_type=ImportError)

    wrapped = scikeras.KerasClassifier(
        _sequential, max_norm=1.0, epochs=2, batch_size=8, verbose=0, random_state=7
    )
    search = selection.GridSearchCV(wrapped, {"max_norm": [0.1, 1.0]}, cv=2).fit(X, LABELS)
    best = search.best_estimator_
    assert isinstance(best.model_, TapeSequential)
    again = pickle.loads(pickle.dumps(best))
    assert [hook.max_norm for hook in again.model_.gradient_hooks] == [best.max_norm]
    np.testing.assert_array_equal(again.predict(X), best.predict(X))
    # scikeras has its own way to pickle every `keras.Model`; ours stays.
    model = _model(gradient_hooks=_hooks())
    assert len(pickle.loads(pickle.dumps(model)).gradient_hooks) == 2


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    model = _model(gradient_hooks=_hooks())
    with mlflow.start_run() as run:
        history = _fit(model, mlflow.keras.MlflowCallback())
        kept = mlflow.keras.log_model(model, name="model", save_exported_model=False)
    logged = mlflow.MlflowClient().get_metric_history(run.info.run_id, "gradient_norm")
    assert [metric.value for metric in logged] == pytest.approx(history["gradient_norm"])
    loaded = mlflow.keras.load_model(kept.model_uri)
    assert isinstance(loaded, TapeModel)
    assert [type(hook) for hook in loaded.gradient_hooks] == [type(h) for h in _hooks()]
    assert _fit(loaded) == _fit(model)


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", exc_type=ImportError)
    integration = pytest.importorskip("wandb.integration.keras", exc_type=ImportError)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    expected = _fit(_model(gradient_hooks=_hooks()))
    model = _model(gradient_hooks=_hooks())
    with wandb.init(mode="offline", project="test") as run:
        checkpoint = integration.WandbModelCheckpoint(
            tmp_path / "best.keras", monitor="loss", save_best_only=True
        )
        history = _fit(model, integration.WandbMetricsLogger(), checkpoint)
        assert run.summary["epoch/gradient_norm"] == pytest.approx(history["gradient_norm"][-1])
    assert history == expected
    loaded = keras.models.load_model(tmp_path / "best.keras")
    assert [type(hook) for hook in loaded.gradient_hooks] == [type(h) for h in _hooks()]


def test_optuna():
    optuna = pytest.importorskip("optuna", exc_type=ImportError)
    integration = pytest.importorskip("optuna_integration", exc_type=ImportError)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    norms = []

    def objective(trial):
        norm = trial.suggest_float("max_norm", 1e-6, 1.0, log=True)
        hook = hooks.GlobalNormClipping(norm)
        model = _model(gradient_hooks=[hook, hooks.GradientMonitor()])
        pruning = integration.KerasPruningCallback(trial, "loss")
        record = callbacks.GradientHistory()
        history = _fit(model, pruning, record)
        norms.append((norm, record["gradient_norm_after"].max()))
        return history["loss"][-1]

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial({"max_norm": 1.0})
    study.optimize(objective, n_trials=3)
    assert len(norms) == 3 and all(after <= norm * 1.0001 for norm, after in norms)
    assert study.best_params["max_norm"] == 1.0
    # A trial that is pruned ends the training, and leaves nothing behind.
    pruner = optuna.pruners.ThresholdPruner(upper=-1.0)
    study = optuna.create_study(pruner=pruner)
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED


def test_keras_tuner(tmp_path):
    keras_tuner = pytest.importorskip("keras_tuner", exc_type=ImportError)

    def build(hp):
        clipping = hooks.GlobalNormClipping(hp.Choice("max_norm", [1e-6, 1.0]))
        return _model(gradient_hooks=[clipping, hooks.GradientMonitor()])

    tuner = keras_tuner.GridSearch(build, "loss", directory=tmp_path)
    tuner.search(X, Y, epochs=2, verbose=0, callbacks=[callbacks.GradientHistory()])
    (best,) = tuner.get_best_models(1)
    assert tuner.get_best_hyperparameters()[0].get("max_norm") == 1.0
    assert isinstance(best, TapeModel) and best.gradient_hooks[0].max_norm == 1.0
