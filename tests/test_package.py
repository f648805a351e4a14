"""The public face of the package: names, docstrings and their examples, what an import costs."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf

import keras_tapefit
from keras_tapefit import TapeModel, TapeSequential, backward, callbacks, hooks, plots, tuning
from keras_tapefit import __main__ as self_check

ROOT = Path(__file__).parent.parent
NAMES = {
    hooks: (
        "GradientHook LambdaHook GlobalNormClipping NormClipping ValueClipping BlockRMSClipping "
        "AdaptiveClipping PercentileClipping ZScoreClipping SkipNonFinite ZeroNonFinite "
        "SkipSpikes GradientNoise Centralization GradientScaling LearningRateMultiplier "
        "Freezing GradualUnfreezing GradientMonitor UpdateMonitor NoiseScale During "
        "OutputGradient OutputMonitor"
    ),
    backward: "Backpropagation SharpnessAware ProjectedConflicts PerExampleClipping",
    callbacks: "GradientHistory GradientTensorBoard GradientCSV",
    plots: "gradient_flow norms trajectory",
    tuning: "TapeHyperModel gradient_hooks GradientHealth",
    keras_tapefit: "TapeModel TapeSequential Gradients",
}
PUBLIC = {
    f"{module.__name__}.{name}": thing
    for module in NAMES
    for name, thing in vars(module).items()
    if not name.startswith("_")
    and (inspect.isclass(thing) or inspect.isfunction(thing))
    and thing.__module__.startswith("keras_tapefit.")
}


@pytest.mark.parametrize("module", NAMES, ids=lambda m: m.__name__)
def test_public_names_are_there(module):
    for name in NAMES[module].split():
        assert callable(getattr(module, name))


def examples_of(thing) -> list[str]:
    """Returns the examples in a docstring and in those of the methods."""
    found = [inspect.getdoc(thing) or ""]
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            if not name.startswith("_") and inspect.isfunction(member):
                found.append(inspect.getdoc(member) or "")
    return [code for text in found for code in re.findall(r"```python\n(.*?)```", text, re.S)]


def test_docstrings_have_an_example():
    for module, names in NAMES.items():
        for name in names.split():
            assert "```python" in (getattr(module, name).__doc__ or ""), name


def test_every_hook_is_exported_and_explained():
    """What a new hook needs, but for the tests of its own; CONTRIBUTING.md lists it."""
    kinds, found = [hooks.GradientHook], []
    while kinds:
        kind = kinds.pop()
        ours = [k for k in kind.__subclasses__() if k.__module__.startswith("keras_tapefit.")]
        kinds += ours
        # Of a base class its subclasses count.
        found += [] if ours else [kind]
    assert len(found) >= 15
    for hook in found:
        assert getattr(hooks, hook.__name__, None) is hook, f"{hook} is not exported"
        for part in ("Args:\n", "Example:\n", "```python"):
            assert part in (hook.__doc__ or ""), f"{hook.__name__}: no {part.strip()}"
        registered = keras.saving.get_registered_name(hook)
        assert registered == f"keras_tapefit>{hook.__name__}"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The names that the examples of docstrings stand on."""
    keras.utils.clear_session()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    keras.utils.set_random_seed(0)
    names = ("stem", "block_1", "block_2", "encoder", "backbone", "log_variance")
    parts = {name: keras.layers.Dense(4, name=name) for name in names}
    outputs = inputs = keras.Input((8,))
    for layer in parts.values():
        outputs = layer(outputs)
    model = TapeModel(inputs, keras.layers.Dense(1, name="head")(outputs))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    y = x[:, :1]
    history = callbacks.GradientHistory(weights="head/*")
    model.fit(x, y, verbose=0, callbacks=[history])

    def build(hp):
        model = TapeSequential([keras.Input((8,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 0.01, 0.1)), "mse")
        return model

    tuner = keras_tuner.RandomSearch(build, "val_loss", max_trials=1, directory=tmp_path)
    monkeypatch.setattr(tuner, "search", functools.partial(tuner.search, validation_split=0.5))
    return {
        **{name: getattr(keras_tapefit, name) for name in NAMES[keras_tapefit].split()},
        **{module.__name__.split(".")[-1]: module for module in NAMES},
        **{"keras": keras, "keras_tuner": keras_tuner, "tf": tf, "np": np},
        **{"model": model, "backbone": parts["backbone"], "x": x, "y": y},
        **{"history": history, "build": build, "tuner": tuner},
        "gradients": model.compute_gradients(x, y),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLIC if examples_of(PUBLIC[name])])
def test_examples_of_docstrings_run(name, room, tmp_path):
    for number, code in enumerate(examples_of(PUBLIC[name])):
        # A file, so that AutoGraph finds the source.
        path = tmp_path / f"example_{number}.py"
        path.write_text(code, encoding="utf-8")
        exec(compile(code, str(path), "exec"), dict(room))


@pytest.mark.slow
def test_self_check():
    command = [sys.executable, "-m", "keras_tapefit"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["tensorflow"] == tf.__version__ and lines["keras"] == keras.__version__
    assert lines["backend"].startswith("tensorflow") and str(ROOT) in lines["keras-tapefit"]
    checks = [line for line in done.stdout.splitlines() if line.startswith("check ")]
    assert len(checks) == 4 and all(line.endswith(": ok") for line in checks)


def test_self_check_notices_a_fault(monkeypatch, capsys):
    """Checks that cannot fail would show nothing."""
    monkeypatch.setattr(hooks, "GlobalNormClipping", lambda norm: hooks.ValueClipping(norm))
    monkeypatch.setattr(hooks, "SkipNonFinite", hooks.ZeroNonFinite)
    assert self_check.main() == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 3
    assert re.search(r"clipped to: FAILED, its length is \S+, not 0.5$", failed[0])
    assert failed[1].endswith("leaves no trace: FAILED, weights or optimizer changed")
    assert failed[2].endswith("FAILED, its hooks are ['value_clipping']")


@pytest.mark.slow
def test_two_builds_are_the_same_and_work_elsewhere(tmp_path):
    """The wheel and the sdist, byte for byte; the wheel without this folder in sight."""
    folders = [tmp_path / "once", tmp_path / "again"]
    for folder in folders:
        # A copy, so that the folder and the times of files are others.
        source = tmp_path / f"source_{folder.name}"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "_build", "build", "dist")
        shutil.copytree(ROOT, source, ignore=ignored, copy_function=shutil.copyfile)
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=source)
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in folders[0].iterdir())
    assert [Path(name).suffix for name in files] == [".whl", ".gz"]
    for name in files:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    with tarfile.open(folders[0] / files[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CONTRIBUTING.md", "tests/conftest.py", "docs/conf.py"} <= names
    assert {"examples/tour.ipynb", "keras_tapefit/py.typed", "pyproject.toml"} <= names

    target = tmp_path / "installed"
    with zipfile.ZipFile(folders[0] / files[0]) as wheel:
        wheel.extractall(target)
        metadata = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        described = wheel.read(metadata).decode()
    top = {path.name for path in target.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"keras_tapefit"}
    assert "Provides-Extra: tuning" in described and "\nAuthor" in described
    done = subprocess.run(
        [sys.executable, "-m", "keras_tapefit"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{target}/keras_tapefit" in done.stdout


@pytest.mark.slow
def test_an_import_brings_nothing_that_is_not_used():
    """And finds no other package missing: none of the extras is imported."""
    heavy = ["keras_tuner", "matplotlib", "tensorboard", "pandas", "keras_tapefit.tuning"]
    code = (
        "import sys, keras; before = set(sys.modules); import keras_tapefit; "
        f"print([m for m in {heavy!r} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.slow
def test_another_backend_is_refused():
    # Said, not set: Keras needs packages that are not here to run on another one.
    code = "import keras; keras.backend.backend = lambda: 'numpy'; import keras_tapefit"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "backend='numpy'" in done.stderr and "KERAS_BACKEND=tensorflow" in done.stderr


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == keras_tapefit.__version__


def test_sequential_is_public():
    assert issubclass(TapeSequential, keras.Sequential)
