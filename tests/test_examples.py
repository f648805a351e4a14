"""Runs the main program of every example and looks at what it printed.

They run in this process, because importing TensorFlow takes seconds.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"(-?\d+\.\d+)"


@pytest.fixture
def run(capsys, monkeypatch):
    """Returns a function that runs an example and returns its status and its lines."""
    # The examples choose no backend for plots by themselves; a test has no display.
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(name: str, *arguments: str) -> tuple[int, list[str]]:
        keras.utils.clear_session()
        spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        capsys.readouterr()
        status = module.main(list(arguments))
        return status or 0, capsys.readouterr().out.splitlines()

    yield run
    keras.utils.clear_session()


def matches(pattern: str, lines: list[str]) -> list[re.Match]:
    return [match for line in lines if (match := re.search(pattern, line))]


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.stem}"' in source, f"{path.name} has no test here"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_help_does_not_wait_for_tensorflow(name):
    """And gives each option a text and its default, with one name for where files go."""
    code = f"""if True:
        import runpy, sys
        for heavy in ("tensorflow", "keras", "keras_tuner", "keras_tapefit", "numpy", "sklearn"):
            sys.modules[heavy] = None  # importing it fails
        sys.argv = ["{name}", "--help"]
        runpy.run_path({str(EXAMPLES / f"{name}.py")!r}, run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = re.split(r"\n  --", done.stdout.partition("--help")[2])[1:]
    assert options
    for option in options:
        words = " ".join(option.split())
        assert re.search(r" [a-zA-Z0-9].* \(default: .+\)$", words), words
        assert not words.startswith("output ")


def test_quickstart(run):
    _, lines = run("quickstart")

    (accuracy,) = matches(f"test accuracy: {NUMBER}", lines)
    assert float(accuracy[1]) > 0.95
    epochs = matches(rf"^ *\d+ +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}$", lines)
    assert len(epochs) >= 4
    assert float(epochs[-1][1]) < float(epochs[0][1])
    for epoch in epochs:
        before, after = float(epoch[3]), float(epoch[4])
        # Of each step's norm the smaller of itself and 1.0 is left.
        assert 0 < after <= min(before, 1.0) + 1e-4


def test_explicit_loop(run):
    status, lines = run("explicit_loop")

    assert status == 0
    assert lines[-1] == "weights: all 6 variables are equal, bit for bit"
    by_hand = [line.removeprefix("loop") for line in lines if line.startswith("loop ")]
    by_fit = [line.removeprefix("fit ") for line in lines if line.startswith("fit ")]
    assert len(by_hand) == len(by_fit) == 5
    assert by_hand == by_fit
    assert float(matches(f"test accuracy {NUMBER}", lines)[-1][1]) > 0.9


@pytest.mark.slow
def test_explicit_loop_notices_a_difference(run, monkeypatch):
    """A comparison that cannot fail would show nothing."""
    fit = keras.Model.fit

    def fit_and_shift(model, *args, **kwargs):
        history = fit(model, *args, **kwargs)
        bias = model.weights[-1]
        bias.assign(np.nextafter(bias.numpy(), np.float32(1)))
        return history

    monkeypatch.setattr(keras.Model, "fit", fit_and_shift)
    status, lines = run("explicit_loop", "--epochs", "1")

    assert status == 1
    assert lines[-1] == "weights: 1 of 6 variables differ"


def test_inspect_gradients(run):
    _, lines = run("inspect_gradients")

    header = next(line for line in lines if line.startswith("example"))
    columns = header.split()[2:]
    layers, kinds = ("conv", "hidden", "scores"), ("kernel", "bias")
    paths = [f"{layer}/{kind}" for layer in layers for kind in kinds]
    assert columns == [*paths, "all"]
    rows = [line.split() for line in lines if re.match(r" *\d+ +\d ", line)]
    assert [row[0] for row in rows] == [str(i) for i in range(10)]
    for row in rows:
        *norms, total = map(float, row[2:])
        assert np.linalg.norm(norms) == pytest.approx(total, abs=1e-3)
        assert total > 0
    together = {match[1]: float(match[2]) for match in matches(rf"^  (\S+/\S+): {NUMBER}", lines)}
    assert set(together) == set(paths)

    (plain,) = matches(rf"without a hook: {NUMBER}", lines)
    (hooked,) = matches(rf"with the hook .*: {NUMBER}", lines)
    (removed,) = matches(rf"after handle.remove\(\): {NUMBER}", lines)
    assert float(hooked[1]) == pytest.approx(float(plain[1]) / 2, abs=2e-6)
    assert float(removed[1]) == float(plain[1]) > 0


@pytest.mark.slow
def test_fine_tune_resnet50(run):
    _, lines = run("fine_tune_resnet50")

    epochs = matches(rf"loss {NUMBER}  learning rate (\S+)  variables in training (\d+)", lines)
    frozen = [epoch for epoch in epochs if float(epoch[2]) == pytest.approx(1e-4)]
    unfrozen = [epoch for epoch in epochs if float(epoch[2]) == pytest.approx(1e-5)]
    assert len(frozen) + len(unfrozen) == len(epochs)
    # The head has two dense layers, and ResNet50 has 53 convolutions with a bias each.
    assert {epoch[3] for epoch in frozen} == {"4"}
    assert {epoch[3] for epoch in unfrozen} == {str(2 * 2 + 2 * 53)}
    pattern = rf"predicted ([a-z 0-9]+) \({NUMBER}\), truth (\w+)$"
    for kind, least in (("trained on", 5), ("not seen  ", 3)):
        predictions = matches(f"^{kind}: {pattern}", lines)
        truth = [match[3] for match in predictions]
        assert truth == ["temple", "lake", "trees", "flower", "leaves"]
        assert sum(match[1] == match[3] for match in predictions) >= least
    assert lines[-1].startswith("The base had random weights.")


def test_linear_regression(run, tmp_path):
    from matplotlib.image import imread

    status, lines = run("linear_regression", "--output-dir", str(tmp_path))

    assert status == 0
    assert lines[-1] == "the two paths are equal, bit for bit, over 20 epochs"
    rows = [list(map(float, line.split())) for line in lines if re.match(r" +\d+ ", line)]
    assert [row[0] for row in rows] == list(range(21))
    assert rows[0][1:] == [5.0, 5.0, 0.0, 0.0]
    for row in rows:
        assert row[1] == row[2] and row[3] == row[4]
    # Gradient descent ends near the least squares line, which is near the true one.
    assert rows[-1][1] == pytest.approx(3.0, abs=0.2)
    assert rows[-1][3] == pytest.approx(2.0, abs=0.2)
    (restored,) = matches(f"read back: w = {NUMBER}, b = {NUMBER}", lines)
    assert [float(restored[1]), float(restored[2])] == [rows[-1][1], rows[-1][3]]
    image = imread(tmp_path / "linear_regression.png")
    assert image.shape[0] >= 300 and image.shape[1] >= 600
    # Points, lines and text: neither blank nor of one colour.
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50


@pytest.mark.slow
def test_watch_gradients(run, tmp_path):
    from matplotlib.image import imread

    _, lines = run("watch_gradients", "--output-dir", str(tmp_path))

    heads = [i for i, line in enumerate(lines) if line.startswith("== ")]
    told = ["\n".join(lines[a:b]) for a, b in zip(heads, [*heads[1:], None], strict=True)]
    # Each report names the hook of the next training.
    for text, kind, hook in (
        (told[0], "not finite", "hooks.SkipNonFinite()"),
        (told[1], "vanishing", "hooks.AdaptiveClipping()"),
    ):
        assert re.search(rf"^{kind}: .*\n  try: {re.escape(hook)}", text, re.M)
    assert "All of these steps were skipped" in told[1]
    assert not re.search("^(vanishing|exploding|dead|spikes|large|small)", told[2], re.M)
    accuracies = [float(match[1]) for match in matches(f"^accuracy: {NUMBER}$", lines)]
    assert max(accuracies[:2]) < 0.2 and accuracies[2] > 0.8
    saved = sorted(tmp_path.iterdir())
    kinds = ("gradient_flow", "heat_map", "norms", "trajectory")
    stages = ("one_hook", "two_hooks")
    assert [path.name for path in saved] == [f"{s}_{kind}.png" for s in stages for kind in kinds]
    for path in saved:
        image = imread(path)
        assert image.shape[1] == 600 and image.shape[0] > 200
        assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50
        assert path.stat().st_size < 100_000


@pytest.mark.slow
def test_gan(run, tmp_path):
    from matplotlib.image import imread

    _, lines = run("gan", "--epochs", "30", "--output-dir", str(tmp_path))

    epochs = matches(rf"^epoch +\d+  critic_loss +{NUMBER}  .*generator_loss +{NUMBER}", lines)
    assert len(epochs) >= 10
    assert all(np.isfinite(float(epoch[i])) for epoch in epochs for i in (1, 2))
    assert (tmp_path / "gan.keras").exists()
    # The generated images have their ink where the digits have it.
    digits, generated = (
        np.array([float(n) for n in line.split(": ")[1].split()])
        for line in lines
        if "mean ink" in line
    )
    assert np.abs(digits - generated).max() < 0.15
    image = imread(tmp_path / "gan.png")
    assert image.shape[0] >= 300 and image.shape[1] >= 600
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50


@pytest.mark.slow
def test_distributed(run):
    status, lines = run("distributed", "--workers", "2", "--epochs", "4")

    assert status == 0
    starts = [lines.index(f"workers: {count}, images a step: 64") for count in (1, 2)]
    for printed in (lines[starts[0] : starts[1]], lines[starts[1] : -1]):
        epochs = matches(rf"^epoch (\d+)  loss {NUMBER}  accuracy {NUMBER}  gradient", printed)
        # Once, not once a worker.
        assert [epoch[1] for epoch in epochs] == ["1", "2", "3", "4"]
        assert float(epochs[-1][2]) < float(epochs[0][2]) / 4
        (accuracy,) = matches(f"^test accuracy: {NUMBER}$", printed)
        assert float(accuracy[1]) > 0.9
    said = r"^both runs gave the same numbers: the largest difference is (\S+)$"
    (match,) = matches(said, lines[-1:])
    assert float(match[1]) <= 2e-4


def test_distributed_notices_a_difference(run, capsys):
    """A comparison that cannot fail would show nothing."""
    _, lines = run("distributed", "--epochs", "1")
    other = [re.sub(r"(accuracy: )0\.", r"\g<1>1.", line) for line in lines]
    spec = importlib.util.spec_from_file_location("examples_other", EXAMPLES / "distributed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    assert module.compare(lines, lines) == 0
    assert module.compare(lines, other) == 1
    assert "the numbers differ by up to 1" in capsys.readouterr().out


def test_distributed_says_why_a_worker_failed(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "no such thing")
    status, lines = run("distributed", "--workers", "2")

    assert status == 1
    assert lines == []


# KerasTuner loads weights into a model whose optimizer has no state yet.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
def test_tune(run, tmp_path):
    options = ("--max-trials", "4", "--epochs", "2", "--output-dir", str(tmp_path))
    _, lines = run("tune", *options)

    trials = matches(rf"^ *(\d) +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}$", lines)
    assert {trial[1] for trial in trials} == set("0123")
    scores = [float(trial[5]) for trial in trials]
    assert scores == sorted(scores, reverse=True)
    ended = matches(rf"^trial (\d): COMPLETED, val accuracy {NUMBER}$", lines)
    assert {trial[1]: trial[2] for trial in ended} == {trial[1]: trial[5] for trial in trials}
    assert "traced: 1 of 4 trials" in lines
    (accuracy,) = matches(f"best model, saved and loaded: {NUMBER}", lines)
    assert float(accuracy[1]) > 0.5
    assert (tmp_path / "best.keras").exists()


def test_find_nan(run):
    _, lines = run("find_nan")

    assert [line for line in lines if line.startswith("skipped steps")] == [
        "skipped steps: 2",
        "skipped steps: 0",
    ]
    where = "the gradient that layer 'with_length' passes back to the output of layer 'features'"
    located = matches(
        rf"^The first value .* was {where} \(backward\), at step (\d+), (.*)\.$", lines
    )
    # The blank image is the 150th, in the fifth batch of 16, of the second epoch too.
    assert [(m[1], m[2]) for m in located] == [("20", "example 22 of the batch")]
    assert matches(rf"not finite: .*{where}", lines)
    assert matches(r"^with_length +finite", lines) and matches(r"^features +finite .* NOT ", lines)
    assert lines[lines.index("With a floor inside the root:") + 2] == "All values are finite."
