"""Figures of what `GradientHistory` recorded; they need matplotlib.

Each function takes a `GradientHistory`, the dictionary of its `to_numpy()`, or a pandas
frame of a `GradientCSV` file, and returns a `matplotlib.figure.Figure`, 600 pixels wide
and readable in grey. A notebook shows the figure that a cell ends with:

```python
figure = plots.norms(history, title="Norms")
figure.savefig("norms.png")
```

All of them take:

- `title`: a line above the figure; `None`: none.
- `ax`: matplotlib axes to draw on, of pyplot for example; `None`: those of a new figure.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["gradient_flow", "heat_map", "norms", "trajectory"]


def __dir__() -> list[str]:
    return __all__


_WIDTH, _DPI = 6.0, 100
_BEFORE, _AFTER = "0.62", "black"
_STYLES = ("-", "--", ":", "-.")
_MAX_LABELS = 40
_ZERO, _MOSTLY_ZERO = "0 in every step", "0 in most steps"
_UNKNOWN = "frozen or not finite"
_NOTE = {"va": "center", "fontsize": 8}


def gradient_flow(
    records: Any, title: str | None = None, ax: Any = None, of: str = "weights"
) -> Any:
    """Draws how large the gradients of each layer are: median and largest over the steps.

    Layers are listed from the first, at the top, to the last. Bars that shrink from one
    end to the other show vanishing or exploding gradients; a layer without a bar is dead.
    The median is not moved by a few large steps, such as the first ones.

    Args:
        records: of a training, with norms of each variable.
        title: a line above the figure.
        ax: matplotlib axes to draw on; `None`: those of a new figure.
        of: `"weights"`, or `"outputs"`: the gradients at layer outputs, of a training with
            `hooks.OutputMonitor()`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: when matplotlib is not installed.
        TypeError: when `ax` is something else than axes.
        ValueError: when the records hold no norms of these, or `of` is something else.

    Example:

    ```python
    plots.gradient_flow(history).savefig("gradient_flow.png")
    ```
    """
    if of not in ("weights", "outputs"):
        raise ValueError(f"`of` must be 'weights' or 'outputs'. Received: of={of!r}.")
    arrays = _arrays(records)
    layers = _layer_norms(arrays) if of == "weights" else _output_norms(arrays)
    names = list(layers)
    finite = [values[np.isfinite(values)] for values in layers.values()]
    medians = np.array([np.median(values) if len(values) else 0.0 for values in finite])
    largest = np.array([values.max() if len(values) else 0.0 for values in finite])
    figure, axes = _axes(ax, max(2.4, 1.2 + 0.24 * min(len(names), 100)))
    places = np.arange(len(names))
    axes.set_xscale("log")
    sizes = medians[medians > 0] if (medians > 0).any() else largest[largest > 0]
    left = 10.0 ** np.floor(np.log10(sizes.min() if len(sizes) else 1.0) - 0.5)
    for values, height, colour, label in (
        (largest, 0.8, "0.78", "largest over steps"),
        (medians, 0.4, "0.2", "median over steps"),
    ):
        axes.barh(places, np.maximum(values - left, 0), height, left, color=colour, label=label)
    for place, median in enumerate(medians):
        if median == 0:
            note = _ZERO if largest[place] == 0 else _MOSTLY_ZERO
            axes.text(left * 1.15, place, note if len(finite[place]) else _UNKNOWN, **_NOTE)
    right = largest.max() if largest.max() > 0 else 10 * left
    axes.set_xlim(left, 10.0 ** np.ceil(np.log10(right) + 0.05))
    _name_rows(axes, names)
    _plain_ticks(axes.xaxis)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("gradient norm" if of == "weights" else "gradient norm at the output")
    axes.set_ylabel("layer, first to last")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    _legend_above(axes, title)
    return figure


def norms(records: Any, title: str | None = None, ax: Any = None) -> Any:
    """Draws the global norm of each step, before and after hooks, skipped steps marked.

    Steps with NaN or infinity that were not skipped are marked too.

    Args:
        records: of a training.
        title: a line above the figure.
        ax: matplotlib axes to draw on; `None`: those of a new figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: when matplotlib is not installed.
        TypeError: when `ax` is something else than axes.

    Example:

    ```python
    plots.norms(history).savefig("norms.png")
    ```
    """
    records = _arrays(records)
    lost = [n for n in ("gradient_norm", "gradient_norm_after", "skipped") if n not in records]
    if lost:
        raise ValueError(f"The records hold no {', '.join(map(repr, lost))}: not of a callback.")
    steps = records["step"]
    before = _positive(records["gradient_norm"])
    after = _positive(records["gradient_norm_after"])
    skipped = records["skipped"] > 0
    figure, axes = _axes(ax, 3.4)
    axes.set_yscale("log")
    # A point without neighbours is no line.
    marker = "." if len(steps) < 100 else ""
    axes.plot(steps, before, marker=marker, color=_BEFORE, linewidth=2.4, label="before hooks")
    known = np.isfinite(after)
    after, at = after[known], steps[known]
    axes.plot(at, after, marker=marker, color=_AFTER, linewidth=1.0, label="after hooks")
    # At the foot of the figure, because their norms may be NaN.
    lost = ~skipped & ~np.isfinite(records["gradient_norm"])
    for flags, mark, label in ((skipped, "x", "skipped step"), (lost, "|", "NaN or infinite")):
        if flags.any():
            foot = np.full(flags.sum(), 0.035)
            options = {"color": "black", "markersize": 7, "markeredgewidth": 1.6, "label": label}
            axes.plot(steps[flags], foot, mark, transform=axes.get_xaxis_transform(), **options)
    axes.set_xlim(steps[0] - 0.02 * len(steps), steps[-1] + 0.02 * len(steps))
    _name_steps(axes)
    _plain_ticks(axes.yaxis)
    axes.set_ylabel("global gradient norm")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    _legend_above(axes, title)
    return figure


def trajectory(records: Any, max_lines: int = 12, title: str | None = None, ax: Any = None) -> Any:
    """Draws how weights move over the steps.

    Args:
        records: of a training by `GradientHistory(weights=...)`.
        max_lines: the largest number of weights that are drawn; of more, as many evenly
            spaced ones.
        title: a line above the figure.
        ax: matplotlib axes to draw on; `None`: those of a new figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: when matplotlib is not installed.
        TypeError: when `ax` is something else than axes.
        ValueError: when the records hold no weights.

    Example:

    ```python
    history = callbacks.GradientHistory(weights="*/bias")
    model.fit(x, y, verbose=0, callbacks=[history])
    plots.trajectory(history).savefig("trajectory.png")
    ```
    """
    records = _arrays(records)
    paths = _paths(records, "weight")
    if not paths:
        raise ValueError(
            'The records hold no weights. Ask for some: `GradientHistory(weights="dense/bias")`.'
        )
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(max_lines, len(paths))).astype(int))
    steps = records["step"]
    figure, axes = _axes(ax, 3.4)
    for number, index in enumerate(chosen):
        shade = 0.6 * (number // len(_STYLES)) / max(1, (len(chosen) - 1) // len(_STYLES))
        axes.plot(
            steps,
            records[f"weight/{paths[index]}"],
            color=str(shade),
            linestyle=_STYLES[number % len(_STYLES)],
            linewidth=1.5,
            label=paths[index],
        )
    _name_steps(axes)
    axes.set_ylabel("weight after the step")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    if ax is None:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    else:
        # Beside axes of the caller there may be no room.
        axes.legend(fontsize=8)
    _set_title(axes, title)
    return figure


def heat_map(records: Any, title: str | None = None, ax: Any = None) -> Any:
    """Draws the gradient norm of each layer in each step as a shade: dark is small.

    Black is a gradient of exactly 0; crossed out is a layer that was frozen, or whose
    gradient was not finite.

    Args:
        records: of a training, with norms of each variable.
        title: a line above the figure.
        ax: matplotlib axes to draw on; `None`: those of a new figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: when matplotlib is not installed.
        TypeError: when `ax` is something else than axes.
        ValueError: when the records hold no norms of variables.

    Example:

    ```python
    plots.heat_map(history).savefig("heat_map.png")
    ```
    """
    records = _arrays(records)
    layers = _layer_norms(records)
    steps = records["step"]
    table = np.stack(list(layers.values()))
    figure, axes = _axes(ax, max(2.4, 1.2 + 0.22 * min(len(layers), 100)))
    shown = np.ma.masked_where(~np.isfinite(table) | (table == 0), table)
    edges = [steps[0] - 0.5, steps[-1] + 0.5, len(layers) - 0.5, -0.5]
    axes.set_facecolor("black")
    image = axes.imshow(
        shown,
        # Zeros alone have no range.
        norm="log" if shown.count() else None,
        extent=edges,
        cmap="viridis",
        aspect="auto",
        interpolation="nearest",
    )
    for place, row in enumerate(table):
        if (row == 0).all():
            axes.text(steps[0], place, _ZERO, color="white", **_NOTE)
        runs = _runs(~np.isfinite(row), steps)
        if runs:
            axes.broken_barh(
                runs, (place - 0.5, 1), facecolor="0.93", edgecolor="0.5", hatch="xxx", linewidth=0
            )
    _name_rows(axes, list(layers))
    _name_steps(axes)
    axes.set_ylabel("layer, first to last")
    _set_title(axes, title)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("gradient norm (dark is small)", fontsize=9)
    _plain_ticks(bar.ax.yaxis)
    return figure


def _axes(ax: Any, height: float) -> tuple[Any, Any]:
    """Returns a figure and the axes in it to draw on: the caller's, or new ones."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("`plots` needs matplotlib: `pip install matplotlib`.") from error
    if isinstance(ax, Axes):
        return ax.figure, ax
    if ax is not None:
        raise TypeError(
            "`ax` must be one `matplotlib.axes.Axes`, such as one of those that "
            f"`pyplot.subplots` returns, or None. Received: ax of type {type(ax).__name__}."
        )
    # Not pyplot's: nothing is shown or kept alive behind the caller's back.
    figure: Any = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    # How a notebook shows an object. Matplotlib knows only pyplot's figures there.
    figure._repr_png_ = functools.partial(_png, figure)
    figure.show = functools.partial(_show, figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _show(figure: Any) -> None:
    """Shows a figure in a notebook; elsewhere an error names what does."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        shell = None
    else:
        shell = get_ipython()
    if shell is None:
        raise RuntimeError(
            "`figure.show()` works in notebooks. Save the figure with "
            '`figure.savefig("figure.png")`, or draw on axes of pyplot: '
            "`_, ax = pyplot.subplots()`, `plots.norms(history, ax=ax)`, `pyplot.show()`."
        )
    display(figure)


def _set_title(axes: Any, title: str | None, pad: float = 8) -> None:
    if title is not None:
        axes.set_title(title, loc="left", fontsize=11, pad=pad)


def _plain_ticks(axis: Any) -> None:
    """Writes 0.01 and 1e-6 instead of powers of ten; 2 and 5 too in less than two decades."""
    from matplotlib.ticker import LogLocator

    axis.set_major_formatter(_plain)
    least, largest = axis.get_view_interval()
    if 0 < least and largest < 100 * least:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_minor_formatter(_plain)
    else:
        axis.set_minor_formatter("")


def _plain(value: float, position: int) -> str:
    return f"{value:g}".replace("e-0", "e-")


def _legend_above(axes: Any, title: str | None) -> None:
    _set_title(axes, title, pad=27)
    axes.legend(fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)


def _name_steps(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _name_rows(axes: Any, names: list[str]) -> None:
    every = -(-len(names) // _MAX_LABELS)
    shown = [name if len(name) <= 24 else f"…{name[-23:]}" for name in names]
    axes.set_yticks(range(0, len(names), every), shown[::every], fontsize=8)


def _arrays(records: Any) -> dict[str, np.ndarray]:
    if not hasattr(records, "items"):
        raise TypeError(
            "`records` must be a `GradientHistory`, the dictionary of its `to_numpy()`, or a "
            f"pandas frame of a file. Received: {records!r} (of type {type(records).__name__})."
        )
    arrays = {str(name): np.asarray(values) for name, values in records.items()}
    if arrays and "step" not in arrays and hasattr(records, "index"):
        # A frame that has the steps as its index.
        arrays["step"] = np.asarray(records.index)
    if not len(arrays.get("step", ())):
        raise ValueError("The records hold no steps. Train with the callback first.")
    for name, values in arrays.items():
        if values.shape != arrays["step"].shape or values.dtype.kind not in "biuf":
            raise ValueError(
                f"The records must hold a number for each of the {len(arrays['step'])} steps. "
                f"Received: {name!r} of shape {values.shape}, of type {values.dtype}."
            )
    return arrays


def _paths(records: Mapping[str, np.ndarray], kind: str) -> list[str]:
    return [name.partition("/")[2] for name in records if name.startswith(f"{kind}/")]


def _runs(flags: np.ndarray, steps: np.ndarray) -> list[tuple[float, float]]:
    """Returns where runs of true flags begin, half a step before, and how long they are."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [(steps[a] - 0.5, steps[b - 1] - steps[a] + 1) for a, b in edges.reshape(-1, 2)]


def _positive(values: np.ndarray) -> np.ndarray:
    # A logarithm has no place for 0.
    return np.where(values > 0, values, np.nan)


def _output_norms(records: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Returns the norm of the gradient at each layer's output, one value a step."""
    mark = "_gradient_norm/"
    found = {
        name.partition(mark)[2]: values.astype("float64")
        for name, values in records.items()
        if mark in name.partition("/")[0] + "/"
    }
    if not found:
        raise ValueError(
            "The records hold no gradients at layer outputs. Train with `hooks.OutputMonitor()` "
            "among the model's `gradient_hooks`."
        )
    return found


def _layer_norms(records: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Returns the norm of each layer's gradient, one value a step, NaN while frozen."""
    squares: dict[str, np.ndarray] = {}
    for path in _paths(records, "gradient_norm"):
        layer = path.rpartition("/")[0] or path
        values = np.square(records[f"gradient_norm/{path}"].astype("float64"))
        if layer not in squares:
            squares[layer] = values
            continue
        # Of a layer that is frozen in part, the rest.
        both = np.isfinite(squares[layer]) & np.isfinite(values)
        known = np.where(np.isnan(squares[layer]), values, squares[layer])
        squares[layer] = np.where(both, squares[layer] + values, known)
    if not squares:
        raise ValueError(
            "The records hold no norms of variables. Ask for them: "
            "`GradientHistory(per_variable=True)`, or `per_variable=True` of the callback "
            "that wrote the file."
        )
    first = next(iter(squares)).partition("/")[0]
    # The name of a `Sequential`, which all its layers have in front.
    shared = f"{first}/" if all(layer.startswith(f"{first}/") for layer in squares) else ""
    return {layer.removeprefix(shared): np.sqrt(values) for layer, values in squares.items()}
