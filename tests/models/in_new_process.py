"""Classes and hooks of a user's own, in a module of theirs; run, it loads what was saved.

It imports nothing of Keras by itself but what a user's module would.
"""

import json
import pickle
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

X = np.linspace(-1, 1, 24, dtype="float32").reshape(4, 6)


@keras.saving.register_keras_serializable("theirs")
class SignGradient(hooks.GradientHook):
    """A hook with an argument."""

    def __init__(self, factor, targets=None, name=None):
        super().__init__(targets, name)
        self.factor = factor

    def apply(self, gradients):
        return gradients.map(lambda g: self.factor * tf.sign(g))


@keras.saving.register_keras_serializable("theirs")
class Net(TapeModel):
    """A subclass whose config Keras finds out by itself."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(units)
        self.last = layers.Dense(1)

    def call(self, x):
        return self.last(self.hidden(x))


@keras.saving.register_keras_serializable("theirs")
class Graph(TapeModel):
    """A subclass used functionally."""


@keras.saving.register_keras_serializable("theirs")
class Theirs(keras.Model):
    """A plain Keras model with a loss of its own."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(units)
        self.last = layers.Dense(1)

    def call(self, x):
        return self.last(self.hidden(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 7.0 + keras.ops.mean(keras.ops.square(y - y_pred))


def load(path):
    text = path.suffix
    if text == ".pickle":
        return pickle.loads(path.read_bytes())
    if text == ".json":
        return keras.models.model_from_json(path.read_text())
    return keras.models.load_model(path)


def told(model):
    """What a model is, of what a file can hold."""
    return {
        "ours": isinstance(model, TapeModel),
        "class": [cls.__name__ for cls in type(model).__mro__[:3]],
        "outputs": np.asarray(model(X)).tolist() if model.built else None,
        "hooks": [type(hook).__name__ for hook in model.gradient_hooks],
        "factor": [hook.factor for hook in model.gradient_hooks if hasattr(hook, "factor")],
        "loss": float(model.evaluate(X, X[:, :1], verbose=0)) if model.compiled else None,
    }


if __name__ == "__main__":
    paths = sorted(Path(sys.argv[1]).iterdir())
    answers = {}
    for path in paths:
        try:
            answers[path.name] = told(load(path))
        except Exception as error:
            answers[path.name] = f"{type(error).__name__}: {error}"
    print("ANSWERS", json.dumps(answers))
