"""Tune a network for handwritten digits with KerasTuner, hooks included.

`tuning.TapeHyperModel` wraps an ordinary build function. The trials differ in numbers only,
the learning rate and the threshold of the clipping, so `reuse=True` lets them train with
what was traced for the first. Trials that go wrong are failed by `tuning.GradientHealth`.

Needs scikit-learn and TensorBoard, which KerasTuner imports: the extra `examples`.

    python examples/tune.py
    python examples/tune.py --max-trials 30 --output digits.keras
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import keras_tuner
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_tapefit import TapeModel, hooks, tuning


def build(hp: keras_tuner.HyperParameters) -> TapeModel:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    x = keras.layers.Dense(64, activation="relu")(inputs)
    x = keras.layers.Dropout(0.2)(x)
    model = TapeModel(inputs, keras.layers.Dense(10, activation="softmax")(x))
    model.compile(
        keras.optimizers.Adam(hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        gradient_hooks=[
            hooks.SkipNonFinite(),
            hooks.GradientMonitor(),
            hooks.GlobalNormClipping(hp.Float("max_norm", 0.1, 10.0, sampling="log")),
        ],
    )
    return model


class Search(keras_tuner.RandomSearch):
    """A random search that prints each trial when it ends."""

    def on_trial_end(self, trial: keras_tuner.engine.trial.Trial) -> None:
        super().on_trial_end(trial)
        ended = self.oracle.get_trial(trial.trial_id)
        score = "" if ended.score is None else f", val accuracy {ended.score:.4f}"
        print(f"trial {ended.trial_id}: {ended.status}{score}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where the best model is saved, *.keras")
    args = parser.parse_args(argv)

    digits = load_digits()
    x, x_test, y, y_test = train_test_split(
        digits.data.astype("float32") / 16, digits.target, test_size=0.2, random_state=0
    )
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.2, random_state=0)

    with tempfile.TemporaryDirectory() as directory:
        hypermodel = tuning.TapeHyperModel(build, reuse=True)
        tuner = Search(
            hypermodel,
            objective=keras_tuner.Objective("val_accuracy", "max"),
            max_trials=args.max_trials,
            seed=1,
            directory=directory,
        )
        tuner.search(
            x,
            y,
            epochs=args.epochs,
            validation_data=(x_valid, y_valid),
            callbacks=[tuning.GradientHealth(max_bad_steps=5)],
            verbose=0,
        )
        print("trial  learning rate  max norm  gradient norm  val accuracy")
        for trial in tuner.oracle.get_best_trials(args.max_trials):
            values = trial.hyperparameters.values
            norm = trial.metrics.get_best_value("gradient_norm")
            print(
                f"{trial.trial_id:>5}  {values['learning_rate']:13.5f}  "
                f"{values['max_norm']:8.3f}  {norm:13.4f}  {trial.score:12.4f}"
            )
        print(f"traced: {hypermodel.history.count('traced')} of {args.max_trials} trials")

        (model,) = tuner.get_best_models()
        output = args.output or Path(directory, "best.keras")
        model.save(output)
        loaded = keras.saving.load_model(output)
        results = loaded.evaluate(x_test, y_test, verbose=0, return_dict=True)
        print(f"test accuracy of the best model, saved and loaded: {results['accuracy']:.4f}")


if __name__ == "__main__":
    main()
