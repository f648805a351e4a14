"""What the wrong calls of `test_bad_calls.py` are made of."""

from __future__ import annotations

import copy
import os
from typing import Any

import keras
import keras_tuner
import numpy as np
import tensorflow as tf

from keras_tapefit import (
    Gradients,
    TapeModel,
    TapeSequential,
    backward,
    callbacks,
    hooks,
    plots,
    tuning,
)

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(8, 4)).astype("float32")
Y = _RNG.normal(size=(8, 2)).astype("float32")
HEADER = "step,epoch,loss,learning_rate,gradient_norm,gradient_norm_after,skipped"


class Lost(hooks.GradientHook):
    """Takes an argument and does not keep it."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()

    def apply(self, gradients: Any) -> Any:
        return gradients


def namespace(folder: Any) -> dict[str, Any]:
    """Returns the names that wrong calls use; the model is `M`.

    Args:
        folder: for files.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, name="first")(inputs)
    model = TapeModel(inputs, keras.layers.Dense(2, name="second")(hidden))
    model.compile("sgd", "mse")
    history = callbacks.GradientHistory()
    model.fit(X, Y, verbose=0, callbacks=[history])

    def step(hook: Any, **options: Any) -> None:
        with model.register_gradient_hook(hook, **options):
            model.train_on_batch(X, Y)

    def hook(apply: Any, **methods: Any) -> hooks.GradientHook:
        """A hook with this `apply`, of the gradients or of the hook and the gradients."""
        if apply.__code__.co_argcount == 1:
            methods["apply"] = lambda self, gradients: apply(gradients)
        else:
            methods["apply"] = lambda self, gradients: (apply(self, gradients), gradients)[1]
        return type("Bad", (hooks.GradientHook,), methods)()

    def fit_with_csv(row: str = "", header: str = HEADER) -> None:
        path = os.path.join(folder, "steps.csv")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{header}\n{row}\n0,0,1,1,1,1,0\n")
        model.fit(X, Y, verbose=0, callbacks=[callbacks.GradientCSV(path)])

    def keras_model() -> keras.Model:
        plain = keras.Sequential([keras.layers.Dense(2)])
        plain.compile("sgd", "mse")
        return plain

    def minimize(loss: Any, **options: Any) -> None:
        with model.gradient_tape() as tape:
            made = tf.reduce_mean(model(X)) * loss if tf.is_tensor(loss) else loss
        tape.minimize(made, **options)

    return {
        "X": X,
        "Y": Y,
        "M": model,
        "i": inputs,
        "T": f"{folder}/",
        "HIST": history,
        "G": lambda: model.compute_gradients(X, Y),
        "HP": keras_tuner.HyperParameters,
        "TAPE": minimize,
        "step": step,
        "hook": hook,
        "lost": Lost,
        "fit_with_csv": fit_with_csv,
        "keras_model": keras_model,
        "nan": float("nan"),
        "inf": float("inf"),
        "copy": copy,
        "keras": keras,
        "np": np,
        "tf": tf,
        "Gradients": Gradients,
        "TapeModel": TapeModel,
        "TapeSequential": TapeSequential,
        "hooks": hooks,
        "backward": backward,
        "callbacks": callbacks,
        "plots": plots,
        "tuning": tuning,
    }
