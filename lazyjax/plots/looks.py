"""How everything is drawn: the style, what tells a model, a member or a point from another."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D


class Look(NamedTuple):
    """How a model is drawn."""

    label: str
    line: Any  # a line style of Matplotlib
    colour: str  # where the members are seeds


MODELS = {
    "network": Look("network", "-", "#0072B2"),
    "tangent": Look("tangent model", "--", "#D55E00"),
    "closed": Look("closed form", ":", "black"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black", "#8C564B")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the style of lazyjax inside the `with` block."""
    with plt.style.context(str(Path(__file__).parent / "lazyjax.mplstyle")):
        yield


def colour_of(labels: Sequence[str] | None, index: int, model: str) -> str:
    """Give the colour of a model, or of a member where these have labels."""
    if labels is None:
        return MODELS[model].colour
    if len(labels) <= len(COLOURS):
        return COLOURS[index]
    return to_hex(plt.get_cmap("viridis")(0.92 * index / (len(labels) - 1)))  # in their order


def shade_of(labels: Sequence[str] | None, members: int) -> float:
    """Give the opacity of a curve: many members without labels lie over each other."""
    return 1.0 if labels is not None or members == 1 else 0.45


def legend(ax: Axes, labels: Sequence[str] | None, models: Sequence[str]) -> None:
    """Explain lines by model and colours by member, each once."""
    handles = [
        Line2D(
            [],
            [],
            linestyle=MODELS[m].line,
            color=MODELS[m].colour if labels is None else "0.3",
            label=MODELS[m].label,
        )
        for m in models
    ]
    handles += [
        Line2D([], [], color=colour_of(labels, i, "network"), linewidth=3, label=label)
        for i, label in enumerate(labels or ())
    ]
    ax.legend(handles=handles)


def log_where_positive(*axes: Axes) -> None:
    """Set a logarithmic vertical axis where a line has something above 0 to be drawn on it."""
    for ax in axes:
        values = [np.asarray(line.get_ydata(), float) for line in ax.get_lines()]
        if any(np.any(np.isfinite(v) & (v > 0)) for v in values):
            ax.set_yscale("log")


def data(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Draw the training points as crosses."""
    ax.plot(x[:, 0], y[:, 0], "x", color="black", markersize=6, label="data", zorder=5)


def target(ax: Axes, grid_x: np.ndarray, values: np.ndarray) -> None:
    """Draw the target function, dashed and grey."""
    ax.plot(grid_x[:, 0], values.reshape(-1), "--", color="0.6", linewidth=1.2, label="target")
