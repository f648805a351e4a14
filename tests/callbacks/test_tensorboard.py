"""`GradientTensorBoard`, with the real TensorBoard: its reader, its server, its page."""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import keras
import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from keras_tapefit import callbacks, hooks

from . import support
from .support import PATHS

pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
KINDS = ("gradient_norm", "gradient_norm_after", "update_ratio")
SCALARS = {*KINDS, "loss", "learning_rate", "skipped"}
SCALARS |= {f"{kind}/{path}" for kind in KINDS for path in PATHS}
HISTOGRAMS = {f"gradient/{path}" for path in PATHS}
WRITE_EVERY, HISTOGRAMS_EVERY = 2, 4
SECONDS = 60


def events(folder):
    """Reads a run with TensorBoard's own reader: its scalars and its histograms."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    keep_all = {event_accumulator.TENSORS: 0}
    reader = event_accumulator.EventAccumulator(str(folder), size_guidance=keep_all)
    reader.Reload()
    found = {}
    for tag in reader.Tags()["tensors"]:
        plugin = reader.SummaryMetadata(tag).plugin_data.plugin_name
        found.setdefault(plugin, {})[tag] = {
            e.step: tensor_util.make_ndarray(e.tensor_proto) for e in reader.Tensors(tag)
        }
    return found


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def history(log_dir):
    """Trains two epochs of four steps beside Keras's callback."""
    model = support.network(gradient_hooks=[hooks.GlobalNormClipping(0.5)])
    history = callbacks.GradientHistory()
    given = [
        keras.callbacks.TensorBoard(str(log_dir), update_freq=1),
        callbacks.GradientTensorBoard(str(log_dir), WRITE_EVERY, HISTOGRAMS_EVERY),
        history,
    ]
    support.fit(model, given, epochs=2, validation_data=(support.X, support.Y))
    return history


def test_scalars_are_the_records(log_dir, history):
    scalars = events(log_dir / "gradients")["scalars"]
    assert set(scalars) == SCALARS
    for tag, values in scalars.items():
        assert list(values) == [2, 4, 6, 8], tag
        np.testing.assert_array_equal(list(values.values()), history[tag][1::2].astype("f"), tag)


def test_steps_are_those_of_the_callback_of_keras(log_dir, history):
    of_keras = events(log_dir / "train")["scalars"]["batch_loss"]
    assert list(of_keras) == [1, 2, 3, 4, 5, 6, 7, 8]
    losses = events(log_dir / "gradients")["scalars"]["loss"]
    # Keras logs the mean over the epoch so far.
    np.testing.assert_allclose(of_keras[1], history["loss"][0], 1e-6)
    np.testing.assert_allclose(of_keras[6], history["loss"][4:6].mean(), 1e-6)
    np.testing.assert_allclose(losses[6], history["loss"][5], 1e-6)


def test_histograms_are_of_the_true_gradients(log_dir, history):
    histograms = events(log_dir / "gradients")["histograms"]
    assert set(histograms) == HISTOGRAMS
    for path in PATHS:
        tables = histograms[f"gradient/{path}"]
        assert list(tables) == [4, 8]
        for step, table in tables.items():
            size = np.prod(support.SHAPES[path])
            low, high, counts = table.T
            assert table.shape == (30, 3) and counts.sum() == size
            np.testing.assert_array_equal(low[1:], high[:-1])
            # The norm lies between what the bins allow.
            nearest = np.where(low * high <= 0, 0, np.minimum(abs(low), abs(high)))
            farthest = np.maximum(abs(low), abs(high))
            least, most = (np.sqrt(np.sum(counts * v**2)) for v in (nearest, farthest))
            assert least <= history[f"gradient_norm/{path}"][step - 1] <= most + 1e-6


def test_a_second_fit_counts_from_one_as_keras_does(tmp_path):
    model = support.network()
    support.fit(model, [])
    given = [
        keras.callbacks.TensorBoard(str(tmp_path), update_freq=1),
        callbacks.GradientTensorBoard(str(tmp_path), 1, per_variable=False, updates=False),
    ]
    support.fit(model, given)
    found = events(tmp_path / "gradients")
    assert set(found) == {"scalars"}
    assert set(found["scalars"]) == SCALARS - {t for t in SCALARS if "ratio" in t or "/" in t}
    of_keras = events(tmp_path / "train")["scalars"]["batch_loss"]
    assert list(found["scalars"]["gradient_norm"]) == list(of_keras) == [1, 2, 3, 4]


def test_executions_of_several_steps(tmp_path):
    model = support.network(steps_per_execution=3, gradient_hooks=support.hook_list())
    callback = callbacks.GradientTensorBoard(tmp_path, 1, 2)
    support.fit(model, [callback], support.BAD_Y, epochs=2)
    found = events(tmp_path / "gradients")
    assert list(found["scalars"]["loss"]) == list(range(1, 9))
    # A frozen variable has no histogram, and one of NaN neither: steps 2 and 6.
    assert list(found["histograms"]["gradient/end/bias"]) == [8]
    assert list(found["histograms"]["gradient/end/kernel"]) == [4, 8]


def test_each_has_the_histograms_that_it_asked_for(tmp_path):
    given = [
        callbacks.GradientTensorBoard(tmp_path / str(every), 1, every, False, False)
        for every in (4, 6)
    ]
    support.fit(support.network(), given, epochs=3)
    for every, steps in ((4, [4, 8, 12]), (6, [6, 12])):
        found = events(tmp_path / str(every) / "gradients")["histograms"]
        assert list(found["gradient/hidden/kernel"]) == steps


def test_what_is_written_can_be_watched(tmp_path):
    """While the model trains, and after a training that broke off."""
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(list(events(tmp_path / "gradients")["scalars"]["loss"]))
            if batch == 2:
                raise KeyboardInterrupt

    model = support.network()
    callback = callbacks.GradientTensorBoard(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        support.fit(model, [callback, Watch()])
    assert seen == [[1], [1, 2], [1, 2, 3]]
    copied = copy.deepcopy(callback)
    assert copied._writer is None and copied.write_every == 1


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    """Where it is missing there is an error before the first step, and only then."""
    callback = callbacks.GradientTensorBoard(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="needs TensorBoard: `pip install tensorboard`"):
        support.fit(support.network(), [callback])


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"log_dir": 3}, TypeError, "`log_dir` must be a path. Received: log_dir=3"),
        (
            {"write_every": 0},
            ValueError,
            "at least 1. Received: write_every=0",
        ),
        ({"write_every": True}, TypeError, "`write_every` must be an integer"),
        ({"histograms_every": -1}, ValueError, "`histograms_every` must be at least 0"),
        ({"histograms_every": 2.5}, TypeError, "`histograms_every` must be an integer"),
        ({"per_variable": None}, TypeError, "`per_variable` must be a bool"),
        ({"updates": 1}, TypeError, "`updates` must be a bool"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        callbacks.GradientTensorBoard(**{"log_dir": "logs", **arguments})


@contextlib.contextmanager
def serving(folder):
    """Starts TensorBoard's server on a free port; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--port", "0", "--host", "127.0.0.1", "--load_fast", "false"]
    output = folder / "server.txt"
    with open(output, "w") as file:
        # Its own imports may warn.
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + SECONDS
        while not (address := re.search(r"http://[\d.]+:\d+", output.read_text())):
            assert server.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.2)
        yield address[0]
    finally:
        server.terminate()
        server.wait(30)


def ask(address, path, **query):
    url = f"{address}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def server(log_dir, history):
    with serving(log_dir) as address:
        end = time.monotonic() + SECONDS
        # It has begun to read.
        while "gradients" not in ask(address, "histograms/tags"):
            assert time.monotonic() < end
            time.sleep(0.2)
        yield address


@pytest.mark.slow
def test_the_server_has_the_data(server, history):
    runs = ask(server, "scalars/tags")
    assert {"gradients", "train", "validation"} <= set(runs)
    assert set(runs["gradients"]) == SCALARS
    for tag in ("gradient_norm", "gradient_norm_after/hidden/kernel"):
        points = ask(server, "scalars/scalars", run="gradients", tag=tag)
        assert [step for _, step, _ in points] == [2, 4, 6, 8]
        np.testing.assert_allclose([value for _, _, value in points], history[tag][1::2], 1e-6)
    of_keras = ask(server, "scalars/scalars", run="train", tag="batch_loss")
    assert [step for _, step, _ in of_keras] == list(range(1, 9))

    assert set(ask(server, "histograms/tags")["gradients"]) == HISTOGRAMS
    tables = ask(server, "histograms/histograms", run="gradients", tag="gradient/hidden/kernel")
    assert [step for _, step, _ in tables] == [4, 8]
    for _, _, bins in tables:
        assert sum(count for _, _, count in bins) == 30


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("there is no browser: chromium and chromedriver (apt: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1200,1600"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    service = webdriver.ChromeService(programs[1])
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def wait_for(browser, css, text=""):
    """Returns the first element with a text, as soon as the page has it."""
    end = time.monotonic() + SECONDS
    while True:
        for element in browser.find_elements("css selector", css):
            with contextlib.suppress(Exception):
                # The page may draw it anew in between.
                if text in element.text and element.is_displayed():
                    return element
        assert time.monotonic() < end, f"no {css} with {text!r} in {browser.page_source[-3000:]}"
        time.sleep(0.3)


def pixels_like(colour, png):
    """Returns how many pixels of a picture have a colour, give or take."""
    image = matplotlib_image.imread(io.BytesIO(png))[..., :3] * 255
    return int((np.abs(image - colour).max(axis=-1) < 30).sum())


@pytest.mark.slow
def test_the_page_has_the_charts(server, browser):
    """A card with the name of the tag, the run with its last value, and a drawn curve."""
    browser.get(f"{server}/?tagFilter=%5Egradient_norm%24#timeseries")
    card = wait_for(browser, "scalar-card", "gradient_norm")
    row = wait_for(browser, "scalar-card tb-data-table-content-row", "gradients")
    assert row.text.split()[0] == "gradients" and "8" in row.text.split()
    circle = wait_for(browser, "scalar-card tb-data-table-content-row .row-circle span")
    colour = [int(n) for n in re.findall(r"\d+", circle.value_of_css_property("background-color"))]
    canvas = wait_for(browser, "scalar-card line-chart canvas")
    end = time.monotonic() + SECONDS
    while pixels_like(colour[:3], canvas.screenshot_as_png) < 100:
        assert time.monotonic() < end, "no curve is drawn"
        time.sleep(0.3)
    assert len(browser.find_elements("css selector", "scalar-card")) == 1, card.text

    browser.get("about:blank")
    browser.get(f"{server}/?tagFilter=%5Egradient%2F#timeseries")
    for path in PATHS:
        name = wait_for(browser, f"histogram-card [title='gradient/{path}']")
        browser.execute_script("arguments[0].scrollIntoView()", name)
        card = name.find_element("xpath", "ancestor::histogram-card")
        end = time.monotonic() + SECONDS
        # One a step.
        while len(card.find_elements("css selector", "tb-histogram g.histogram path")) != 2:
            assert time.monotonic() < end, "no histogram is drawn"
            time.sleep(0.3)
