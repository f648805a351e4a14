"""What one process saves, another loads that imports only `keras_tapefit`."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import pytest
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, hooks

from . import in_new_process as theirs
from . import support

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))


def _graph():
    inputs = keras.Input((6,))
    hidden = layers.BatchNormalization()(layers.Dense(3)(inputs))
    return inputs, layers.Dense(1)(hidden)


def _built(model):
    model(theirs.X)
    return model


MAKERS = {
    "functional": lambda: TapeModel(*_graph()),
    "sequential": lambda: TapeSequential([keras.Input((6,)), layers.Dense(3), layers.Dense(1)]),
    "unbuilt": lambda: _built(TapeSequential([layers.Dense(3), layers.Dense(1)])),
    "graph": lambda: theirs.Graph(*_graph()),
    "subclass": lambda: _built(theirs.Net()),
    "converted_functional": lambda: TapeModel.from_model(keras.Model(*_graph())),
    "converted_subclass": lambda: TapeModel.from_model(_built(theirs.Theirs())),
    "nested": lambda: TapeSequential([keras.Input((6,)), TapeModel(*_graph()), layers.Dense(1)]),
}


def _hooks():
    return [hooks.PercentileClipping(history=4), theirs.SignGradient(0.5), hooks.GradientMonitor()]


# Keras itself writes no subclass to `.h5`.
LEGACY = ("functional", "sequential", "unbuilt", "converted_functional", "nested")


def _save(model, folder, name):
    """Writes a model in every way there is; yields the files."""
    model.save(folder / f"{name}.keras")
    (folder / f"{name}.pickle").write_bytes(pickle.dumps(model))
    (folder / f"{name}.json").write_text(model.to_json())
    if name in LEGACY:
        with warnings.catch_warnings():
            # Keras's own word on the old format.
            warnings.simplefilter("ignore")
            model.save(folder / f"{name}.h5")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a new process says of every file, and what this one says of the model."""
    folder = tmp_path_factory.mktemp("saved")
    expected = {}
    for name, make in MAKERS.items():
        support.begin()
        model = make()
        of_hooks = [] if name == "functional" else _hooks()
        model.compile("adam", keras.losses.MeanSquaredError(), gradient_hooks=of_hooks)
        model.fit(theirs.X, theirs.X[:, :1], verbose=0)
        _save(model, folder, name)
        expected[name] = theirs.told(model)
    done = subprocess.run(
        [sys.executable, "-m", theirs.__name__, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATHS},
    )
    line = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert line, done.stdout + done.stderr
    return json.loads(line[0].removeprefix("ANSWERS")), expected


@pytest.mark.parametrize("ending", ["keras", "pickle", "json", "h5"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_same_model(name, ending, answers):
    found, expected = answers
    assert (f"{name}.{ending}" in found) == (ending != "h5" or name in LEGACY)
    if f"{name}.{ending}" not in found:
        return
    truth, answer = dict(expected[name]), found[f"{name}.{ending}"]
    if ending == "json":
        # The config alone: other weights, and what they give.
        assert isinstance(answer, dict), answer
        for key in ("outputs", "loss"):
            assert (answer.pop(key) is None) == (truth.pop(key) is None)
    assert answer == truth
    assert answer["ours"]


@pytest.mark.slow
def test_pickle_imports_the_users_module(tmp_path):
    """By reference, as pickle does with any class; nothing needs to be registered."""
    (tmp_path / "users_module.py").write_text(
        "import keras_tapefit\n"
        "class Half(keras_tapefit.hooks.GradientHook):\n"
        "    def apply(self, gradients):\n"
        "        return gradients.scale(0.5)\n"
        "class Net(keras_tapefit.TapeModel):\n"
        "    pass\n"
    )
    path = tmp_path / "model.pickle"
    write = (
        "import keras, pickle, sys, users_module\n"
        "i = keras.Input((6,))\n"
        "model = users_module.Net(i, keras.layers.Dense(1)(i))\n"
        "model.compile('sgd', 'mse', gradient_hooks=[users_module.Half()])\n"
        "open(sys.argv[1], 'wb').write(pickle.dumps(model))\n"
    )
    read = (
        "import pickle, sys, keras_tapefit\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "import users_module\n"
        "assert isinstance(model, users_module.Net)\n"
        "assert type(model.gradient_hooks[0]) is users_module.Half\n"
    )
    paths = os.pathsep.join(map(str, (ROOT, tmp_path)))
    for code in (write, read):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert done.returncode == 0, done.stderr
