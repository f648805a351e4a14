"""The figures: what is drawn is what was recorded, named and legible."""

import gc
import io
import pickle
import sys
import types
import weakref

import numpy as np
import pytest

from keras_tapefit import callbacks, plots

from . import support

image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
LogNorm = pytest.importorskip("matplotlib.colors").LogNorm

DRAWN = [plots.gradient_flow, plots.norms, plots.trajectory, plots.heat_map]
NUM_STEPS = 60
LAYERS = ("first", "second", "dead", "last")


@pytest.fixture(scope="module")
def records():
    """With a dead layer, one that is frozen at first, clipped and skipped steps."""
    rng = np.random.default_rng(0)
    norm = rng.lognormal(0.0, 0.5, NUM_STEPS)
    made = {
        "step": np.arange(100, 100 + NUM_STEPS),
        "epoch": np.arange(NUM_STEPS) // 20,
        "loss": np.ones(NUM_STEPS),
        "gradient_norm": norm,
        "gradient_norm_after": np.minimum(norm, 1.0),
        "skipped": np.zeros(NUM_STEPS, bool),
    }
    made["gradient_norm"][30] = np.nan
    made["gradient_norm_after"][30] = np.nan
    made["skipped"][30] = True
    for i, layer in enumerate(LAYERS):
        for part, factor in (("kernel", 0.8), ("bias", 0.6)):
            made[f"gradient_norm/{layer}/{part}"] = 10.0 ** (i - 3) * factor * norm
    made["gradient_norm/dead/kernel"] = made["gradient_norm/dead/bias"] = np.zeros(NUM_STEPS)
    made["gradient_norm/second/kernel"][:20] = np.nan
    made["gradient_norm/second/bias"][:20] = np.nan
    for i in range(3):
        made[f"weight/last/bias[{i}]"] = np.cumsum(rng.normal(size=NUM_STEPS))
    return made


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return image.imread(io.BytesIO(file.getvalue()))


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_every_picture(draw, records):
    figure = draw(records)
    picture = pixels(figure)
    assert picture.shape[1] == 600
    axes = figure.axes[0]
    assert axes.get_xlabel() and axes.get_ylabel()
    measured = {
        plots.gradient_flow: axes.get_xlabel,
        plots.norms: axes.get_ylabel,
        plots.heat_map: figure.axes[-1].get_ylabel,
    }
    if draw in measured:
        assert "gradient norm" in measured[draw]()
    assert axes.get_title(loc="left") == ""
    # No text is cut off: the edge is white.
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge[..., :3] == 1).all()


def test_pictures_in_grey_differ_by_brightness(records):
    """What is told apart by colour is told apart by lightness, line style or mark too."""
    axes = plots.norms(records).axes[0]
    before, after, skipped = axes.lines
    assert len({str(line.get_color()) for line in (before, after)}) == 2
    assert before.get_linewidth() > after.get_linewidth()
    assert skipped.get_marker() == "x"
    for bar in plots.gradient_flow(records).axes[0].patches:
        red, green, blue, _ = bar.get_facecolor()
        assert red == green == blue
    lines = plots.trajectory(records).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)
    colours = plots.heat_map(records).axes[0].images[0].get_cmap()(np.linspace(0, 1, 20))
    lightness = colours[:, :3] @ [0.2126, 0.7152, 0.0722]
    # Dark is small, and the label says so.
    assert (np.diff(lightness) > 0).all()
    assert plots.heat_map(records).axes[-1].get_ylabel() == "gradient norm (dark is small)"


def test_gradient_flow(records):
    axes = plots.gradient_flow(records).axes[0]
    assert labels(axes) == list(LAYERS)
    largest, medians = axes.containers
    assert axes.get_xscale() == "log" and axes.yaxis_inverted()
    norm = records["gradient_norm"]
    for i, layer in enumerate(LAYERS):
        values = 10.0 ** (i - 3) * norm[20 if layer == "second" else 0 :]
        values = 0 * values if layer == "dead" else values[np.isfinite(values)]
        for bars, truth in ((largest, values.max()), (medians, np.median(values))):
            end = bars[i].get_x() + bars[i].get_width()
            if layer == "dead":
                assert bars[i].get_width() == 0
            else:
                np.testing.assert_allclose(end, truth, 1e-6)
    assert [text.get_text() for text in axes.texts] == ["0 in every step"]
    nested = {name.replace("norm/", "norm/net/"): values for name, values in records.items()}
    assert labels(plots.gradient_flow(nested).axes[0]) == list(LAYERS)
    frozen = {name: np.full(NUM_STEPS, np.nan) for name in records if "norm/dead" in name}
    axes = plots.gradient_flow({**records, **frozen}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["frozen or not finite"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["largest over steps", "median over steps"]
    # A layer that died after the first steps, with gradients far below those of others.
    died = {name: np.where(np.arange(NUM_STEPS) < 5, 1e-9, 0.0) for name in frozen}
    axes = plots.gradient_flow({**records, **died}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0 in most steps"]


def test_norms(records):
    axes = plots.norms(records).axes[0]
    before, after, skipped = axes.lines
    for line, name in ((before, "gradient_norm"), (after, "gradient_norm_after")):
        x, y = line.get_data()
        known = np.isfinite(y)
        np.testing.assert_array_equal(x[known], np.delete(records["step"], 30))
        np.testing.assert_array_equal(y[known], np.delete(records[name], 30))
    assert skipped.get_xdata().tolist() == [130]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["before hooks", "after hooks", "skipped step"]
    assert axes.get_xlabel() == "step" and axes.get_yscale() == "log"
    assert after.get_marker() == "."
    unseen = plots.norms({**records, "skipped": np.zeros(NUM_STEPS, bool)}).axes[0]
    assert unseen.lines[2].get_label() == "NaN or infinite" and unseen.lines[2].get_marker() == "|"
    assert unseen.lines[2].get_xdata().tolist() == [130]
    for shown in (axes, unseen):
        assert shown.get_xlim()[0] < 100 and shown.get_xlim()[1] > 159
    many = {name: np.tile(values, 2) for name, values in records.items()}
    assert not plots.norms(many).axes[0].lines[1].get_marker().strip()
    healthy = {name: values[:30] for name, values in records.items()}
    assert len(plots.norms(healthy).axes[0].lines) == 2


def test_trajectory(records):
    axes = plots.trajectory(records).axes[0]
    for i, line in enumerate(axes.lines):
        assert line.get_label() == f"last/bias[{i}]"
        np.testing.assert_array_equal(line.get_ydata(), records[f"weight/last/bias[{i}]"])
        np.testing.assert_array_equal(line.get_xdata(), records["step"])
    many = {**records, **{f"weight/w[{i}]": np.zeros(NUM_STEPS) for i in range(100)}}
    assert len(plots.trajectory(many).axes[0].lines) == 12
    assert len(plots.trajectory(many, max_lines=4).axes[0].lines) == 4
    none = {name: values for name, values in records.items() if not name.startswith("weight")}
    with pytest.raises(ValueError, match="hold no weights. Ask for some: `GradientHistory"):
        plots.trajectory(none)


def test_heat_map(records):
    axes = plots.heat_map(records).axes[0]
    assert labels(axes) == list(LAYERS)
    table = axes.images[0].get_array()
    assert table.shape == (4, NUM_STEPS)
    np.testing.assert_allclose(table[3][:30], records["gradient_norm"][:30], 1e-6)
    assert isinstance(axes.images[0].norm, LogNorm)
    # What is exactly 0 is not drawn, on black.
    assert table.mask[2].all() and axes.get_facecolor()[:3] == (0, 0, 0)
    assert axes.images[0].get_extent() == [99.5, 159.5, 3.5, -0.5]
    assert [text.get_text() for text in axes.texts] == ["0 in every step"]
    # Crossed out: the one skipped step of all but the dead one, and what was frozen.
    crossed = [c for c in axes.collections if c.get_hatch()]
    spans = [
        [(p.vertices[:, 0].min(), p.vertices[:, 0].max()) for p in c.get_paths()] for c in crossed
    ]
    assert spans == [[(129.5, 130.5)], [(99.5, 119.5), (129.5, 130.5)], [(129.5, 130.5)]]


@pytest.mark.parametrize("draw", [plots.gradient_flow, plots.heat_map], ids=lambda f: f.__name__)
def test_records_without_norms_of_variables(draw, records):
    with pytest.raises(ValueError, match=r"`GradientHistory\(per_variable=True\)`"):
        draw({name: values for name, values in records.items() if "/" not in name})


@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_records_without_steps(draw):
    with pytest.raises(ValueError, match="The records hold no steps. Train with the callback"):
        draw(callbacks.GradientHistory())


def test_kinds_of_records(records, tmp_path):
    """A history, a frame of it, and a frame of a file give the same picture."""
    pandas = pytest.importorskip("pandas")
    model = support.network(gradient_hooks=support.hook_list())
    history = callbacks.GradientHistory(weights="end/bias")
    path = tmp_path / "gradients.csv"
    file = callbacks.GradientCSV(path, per_variable=True, updates=True)
    support.fit(model, [history, file], support.BAD_Y, epochs=2)
    of_file = pandas.read_csv(path)
    for draw in (plots.norms, plots.trajectory, plots.heat_map):
        truth = pixels(draw(history.to_numpy()))
        kinds = [history, history.to_pandas()]
        if draw is not plots.trajectory:
            kinds += [of_file, of_file.set_index("step")]
        for kind in kinds:
            np.testing.assert_array_equal(pixels(draw(kind)), truth, draw.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_strange_records(draw, records):
    """A single step; nothing but zeros; nothing finite; many layers."""
    one = {name: values[:1] for name, values in records.items()}
    zeros = {n: v if n == "step" else 0 * np.nan_to_num(v) for n, v in records.items()}
    zeros["skipped"] = np.zeros(NUM_STEPS, bool)
    nothing = {n: np.full(NUM_STEPS, np.nan) for n in records}
    nothing |= {n: records[n] for n in ("step", "skipped")}
    many = {**records}
    for i in range(60):
        many[f"gradient_norm/a_layer_with_a_rather_long_name_{i}/kernel"] = records["loss"] * i
    for strange in (one, zeros, nothing, many):
        picture = pixels(draw(strange))
        assert picture.shape[1] == 600 and picture.shape[0] < 3000
        assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 3


@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_pyplot_is_left_alone(draw, records):
    """Nothing is shown, kept alive, or changed behind the caller's back."""
    from matplotlib import pyplot

    own = pyplot.figure()
    settings = dict(pyplot.rcParams)
    figure = draw(records)
    assert pyplot.get_fignums() == [own.number] and pyplot.gcf() is own
    assert dict(pyplot.rcParams) == settings
    pyplot.close(own)
    alive = weakref.ref(figure)
    del figure
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_title_and_axes_of_the_caller(draw, records):
    from matplotlib.figure import Figure

    plain, titled = draw(records), draw(records, title="A training")
    assert titled.axes[0].get_title(loc="left") == "A training"
    picture = pixels(titled)
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge[..., :3] == 1).all()
    # The legend does not lie on the title.
    titled.canvas.draw()
    title = titled.axes[0]._left_title.get_window_extent()
    if titled.axes[0].get_legend() is not None:
        assert not title.overlaps(titled.axes[0].get_legend().get_window_extent())

    own = Figure(figsize=(12, 4), layout="constrained")
    left, right = own.subplots(1, 2)
    assert draw(records, ax=right, title="right") is own
    assert not left.has_data() and left.get_title(loc="left") == ""
    assert right.get_title(loc="left") == "right"
    assert right.get_xlabel() == plain.axes[0].get_xlabel()
    assert right.get_ylabel() == plain.axes[0].get_ylabel()
    with pytest.raises(TypeError, match="`ax` must be one .* Received: ax of type ndarray"):
        draw(records, ax=np.array([left, right]))


def test_tick_labels_are_plain(records):
    """No powers of ten in small raised type, and more than one label in a small range."""
    for axis in (
        plots.gradient_flow(records).axes[0].xaxis,
        plots.norms(records).axes[0].yaxis,
        plots.heat_map(records).axes[-1].yaxis,
    ):
        axis.axes.figure.canvas.draw()
        ticks = axis.get_majorticklabels() + axis.get_minorticklabels()
        shown = [tick.get_text() for tick in ticks if tick.get_text()]
        assert len(shown) >= 2 and not any("$" in text for text in shown)
        for text in shown:
            assert float(text) > 0
    assert plots._plain(1e-6, 0) == "1e-6" and plots._plain(0.01, 0) == "0.01"


@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_figures_in_notebooks(draw, records, monkeypatch):
    """A notebook shows an object by its `_repr_png_`."""
    figure = draw(records)
    np.testing.assert_array_equal(
        image.imread(io.BytesIO(figure._repr_png_())), pixels(draw(records))
    )
    # A copy shows itself too, and not what it is a copy of.
    copy = pickle.loads(pickle.dumps(figure))
    copy.axes[0].set_title("another")
    assert copy._repr_png_() != figure._repr_png_()

    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(RuntimeError, match=r"`figure.show\(\)` works in notebooks. Save the fig"):
        figure.show()
    shown = []
    package = types.ModuleType("IPython")
    package.display = types.ModuleType("IPython.display")
    package.display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", package.display)
    package.get_ipython = lambda: None
    with pytest.raises(RuntimeError, match="works in notebooks"):
        figure.show()
    package.get_ipython = object
    figure.show()
    assert shown == [figure]


def test_matplotlib_is_an_extra(records, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="`plots` needs matplotlib: `pip install matplotlib`"):
        plots.norms(records)
