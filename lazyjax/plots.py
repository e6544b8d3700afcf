"""The figures that experiments share: a network, its tangent model and the closed form together.

The line tells the model (network solid, tangent model dashed, closed form dotted) and the colour
tells the member (a width, an alpha). Where the members are seeds, nobody asks which: then the
colour tells the model too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lazyjax.comparison import Comparison


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


def _colour(labels: Sequence[str] | None, index: int, model: str) -> str:
    return MODELS[model].colour if labels is None else COLOURS[index % len(COLOURS)]


def _alpha(labels: Sequence[str] | None, members: int) -> float:
    return 1.0 if labels is not None or members == 1 else 0.45


def _legend(ax: Axes, labels: Sequence[str] | None, models: Sequence[str]) -> None:
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
        Line2D([], [], color=_colour(labels, i, "network"), linewidth=3, label=label)
        for i, label in enumerate(labels or ())
    ]
    ax.legend(handles=handles)


def data(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Draw the training points as crosses."""
    ax.plot(x[:, 0], y[:, 0], "x", color="black", markersize=6, label="data", zorder=5)


def target(ax: Axes, grid_x: np.ndarray, values: np.ndarray) -> None:
    """Draw the target function, dashed and grey."""
    ax.plot(grid_x[:, 0], values.reshape(-1), "--", color="0.6", linewidth=1.2, label="target")


def _shared_range(
    axes: Sequence[Axes], curves: Sequence[np.ndarray], whole: Sequence[np.ndarray]
) -> None:
    """Set one vertical range: all of `whole`, and of `curves` all but the rare extremes."""
    finite = np.concatenate([v[np.isfinite(v)] for v in curves])
    ends = [
        *np.percentile(finite, [0.5, 99.5]),
        *(end for v in whole for end in (v.min(), v.max())),
    ]
    low, high = min(ends), max(ends)
    margin = 0.12 * (high - low) or 0.1
    for ax in axes:
        ax.set_ylim(low - margin, high + margin)


def functions(
    compared: Comparison,
    labels: Sequence[str] | None = None,
    *,
    target_values: np.ndarray | None = None,
) -> Figure:
    """Draw the functions at the start, and the networks and the tangent models after training.

    Parameters
    ----------
    compared : Comparison
    labels : sequence of str, optional
        One a member; none where the members are seeds.
    target_values : (M,) or (M, 1), optional
        The target on the grid.

    Returns
    -------
    Figure
        Three panels: before training, networks after it, tangent models and closed form after it.
    """
    start, end = (np.nanmax(np.abs(compared.network.grid[:, when])) for when in (0, -1))
    apart = bool(start > 5 * end)  # a wild start would make lines of what was learned
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), sharey=not apart)
    grid = compared.grid_x[:, 0]
    panels = (
        ("before training", (("network", 0),)),
        ("networks after training", (("network", -1),)),
        ("tangent models after training", (("tangent", -1), ("closed", -1))),
    )
    drawn: list[list[np.ndarray]] = [[], [], []]
    for ax, values_of, (title, curves) in zip(axes, drawn, panels, strict=True):
        if target_values is not None:
            target(ax, compared.grid_x, np.asarray(target_values))
        for model, when in curves:
            for i in range(compared.members if model in compared.models else 0):
                values = compared.models[model].grid[i, when, :, 0]
                values_of.append(values)
                ax.plot(
                    grid,
                    values,
                    MODELS[model].line,
                    color="black" if model == "closed" else _colour(labels, i, model),
                    alpha=_alpha(labels, compared.members),
                    zorder=4 if model == "closed" else 3,
                )
        data(ax, compared.x, compared.y)
        ax.set(title=title, xlabel="x")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    whole = [compared.y] + ([] if target_values is None else [np.asarray(target_values)])
    for i in (slice(1), slice(1, 2), slice(2, 3)) if apart else (slice(3),):
        _shared_range(axes[i], [v for values in drawn[i] for v in values], whole)
    axes[0].set_ylabel("f(w, x)")
    handles = [
        Line2D([], [], marker="x", linestyle="", color="black", label="data"),
        Line2D([], [], linestyle="--", color="0.6", label="target"),
    ]
    if labels is not None:
        handles += [
            Line2D([], [], color=_colour(labels, i, "network"), label=label)
            for i, label in enumerate(labels)
        ]
    axes[0].legend(handles=handles)
    if labels is None:
        _legend(axes[1], None, ["network"])
    _legend(axes[2], None if labels is None else [], list(compared.models)[1:])
    return figure


def training(compared: Comparison, labels: Sequence[str] | None = None) -> Figure:
    """Draw losses, weight movements and gaps of networks, tangent models and closed form.

    Parameters
    ----------
    compared : Comparison
    labels : sequence of str, optional
        One a member; none where the members are seeds.

    Returns
    -------
    Figure
        Three panels against the step: loss, relative weight movement, gap between network and
        tangent model.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="1 + step")
    shade = _alpha(labels, compared.members)
    at, grid = 1 + compared.curve_steps, 1 + compared.steps
    for i in range(compared.members):
        for name, model in compared.models.items():
            look: dict[str, Any] = {
                "linestyle": MODELS[name].line,
                "color": _colour(labels, i, name),
                "alpha": shade,
                "linewidth": 2.4 if name == "closed" else 1.6,
            }
            where = grid if name == "closed" else at
            axes[0].plot(where, model.loss[i], **look)
            axes[1].plot(where[1:], model.movement[i, 1:], **look)  # a log axis has no 0
    axes[0].set(title="training loss", ylabel="loss")
    axes[1].set(title="movement of all weights", ylabel=r"$\|w - w_0\| \,/\, \|w_0\|$")
    largest = np.nanmax(compared.network.movement)
    if np.isfinite(largest) and largest > 0:
        axes[1].set_ylim(largest * 1e-4, largest * 3)
    _legend(axes[0], labels, list(compared.models))
    gaps: dict[str, tuple[np.ndarray, Any, str]] = {
        "training points": (compared.gap_train, "-", "#0072B2"),
        "grid": (compared.gap_grid, "-.", "#009E73"),
    }
    for i in range(compared.members):
        for gap, line, own in gaps.values():
            colour = own if labels is None else _colour(labels, i, "network")
            axes[2].plot(grid[1:], gap[i, 1:], line, color=colour, alpha=shade)
    handles = [
        Line2D([], [], linestyle=line, color="0.3" if labels else own, label=label)
        for label, (_, line, own) in gaps.items()
    ]
    axes[2].legend(handles=handles)
    axes[2].set(title="gap between network and tangent model", ylabel="rms difference of outputs")
    return figure


def layers(compared: Comparison, labels: Sequence[str] | None = None) -> Figure:
    """Draw the relative movement of each leaf, network and tangent model.

    Parameters
    ----------
    compared : Comparison
    labels : sequence of str, optional
        One a member and a panel each; without them one panel with the median over the seeds and
        the range between the quartiles.

    Returns
    -------
    Figure
        Colour tells the leaf, line the model.
    """
    leaves = list(compared.network.layer)
    panels = 1 if labels is None else len(labels)
    columns = min(panels, 4)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.6 * columns + 2.6, 3.3 * rows + 0.3),
        sharey=True,
        squeeze=False,
    )
    palette = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(leaves)))
    if len(leaves) <= len(COLOURS):
        palette = list(COLOURS[: len(leaves)])
    at = 1 + compared.curve_steps
    largest = 0.0
    for panel, ax in enumerate(axes.flat):
        if panel >= panels:
            ax.set_visible(False)
            continue
        for colour, leaf in zip(palette, leaves, strict=True):
            for model in ("network", "tangent"):
                curves = compared.models[model].layer[leaf]
                curve = np.median(curves, axis=0) if labels is None else curves[panel]
                ax.plot(at[1:], curve[1:], MODELS[model].line, color=colour, linewidth=1.4)
                if labels is None and len(curves) > 1 and model == "network":
                    low, high = np.percentile(curves, [25, 75], axis=0)
                    ax.fill_between(
                        at[1:], low[1:], high[1:], color=colour, alpha=0.15, linewidth=0
                    )
                finite = curve[np.isfinite(curve)]
                largest = max(largest, float(finite.max(initial=0.0)))
        ax.set(xscale="log", yscale="log", xlabel="1 + step")
        if labels is not None:
            ax.set_title(labels[panel])
    if largest > 0:
        axes.flat[0].set_ylim(largest * 1e-5, largest * 3)
    for ax in axes[:, 0]:
        ax.set_ylabel("movement of a layer, relative")
    handles = [
        Line2D([], [], color=colour, label=leaf)
        for colour, leaf in zip(palette, leaves, strict=True)
    ]
    handles += [
        Line2D([], [], linestyle=MODELS[m].line, color="0.3", label=MODELS[m].label)
        for m in ("network", "tangent")
    ]
    figure.legend(handles=handles, loc="outside right center")
    if labels is None and compared.members > 1:
        axes[0, 0].set_title(f"median and quartiles over {compared.members} seeds")
    return figure


def kernels(compared: Comparison, labels: Sequence[str] | None = None) -> Figure:
    """Draw the empirical NTK before and after training, and how far it moved on the way.

    Parameters
    ----------
    compared : Comparison
    labels : sequence of str, optional
        One a member; without them the heat maps are those of the first seed.

    Returns
    -------
    Figure
        A row a member: before, after, difference (of one colour scale a row), and in the last panel
        the relative change of the kernel of every member against the step.
    """
    shown = 1 if labels is None else len(labels)
    figure = plt.figure(figsize=(13, 2.9 * shown + 0.4))
    grid = figure.add_gridspec(shown, 4, width_ratios=(1, 1, 1, 1.5))
    for i in range(shown):
        before, after = compared.kernels[i, 0], compared.kernels[i, -1]
        top = float(max(np.abs(before).max(), np.abs(after).max()))
        low = float(min(before.min(), after.min(), 0.0))
        row = ((before, "before"), (after, "after"), (after - before, "after less before"))
        for j, (kernel, title) in enumerate(row):
            ax = figure.add_subplot(grid[i, j])
            reach = float(np.abs(kernel).max()) or 1.0
            limits = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}
            if j < 2:
                limits = {"cmap": "viridis", "vmin": low, "vmax": top}
            image = ax.imshow(kernel, **limits)
            ax.grid(visible=False)
            ax.set_xticks([])
            ax.set_yticks([])
            if i == 0:
                ax.set_title(f"kernel {title}")
            if i == shown - 1:
                ax.set_xlabel("training points, by x")
            if j == 0 and labels is not None:
                ax.set_ylabel(labels[i], fontsize=11)
            bar = figure.colorbar(image, ax=ax, shrink=0.85)
            bar.ax.yaxis.get_offset_text().set_position((3.0, 0.0))
    ax = figure.add_subplot(grid[:, 3])
    for i in range(compared.members):
        ax.plot(
            1 + compared.kernel_steps[1:],
            compared.kernel_change[i, 1:],
            "o-",
            markersize=3,
            color=_colour(labels, i, "network"),
            alpha=_alpha(labels, compared.members),
            label=None if labels is None else labels[i],
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="1 + step",
        ylabel=r"$\|\Theta - \Theta_0\|_F \,/\, \|\Theta_0\|_F$",
        title="how far the kernel moved",
    )
    if labels is not None:
        ax.legend()
    return figure


def comparison(
    compared: Comparison,
    labels: Sequence[str] | None = None,
    *,
    target_values: np.ndarray | None = None,
) -> dict[str, Figure]:
    """Draw all figures of a comparison: functions, training, layers, kernels.

    Parameters
    ----------
    compared : Comparison
    labels : sequence of str, optional
        One a member; none where the members are seeds.
    target_values : (M,) or (M, 1), optional
        The target on the grid.

    Returns
    -------
    dict of Figure
    """
    return {
        "functions": functions(compared, labels, target_values=target_values),
        "training": training(compared, labels),
        "layers": layers(compared, labels),
        "kernels": kernels(compared, labels),
    }
