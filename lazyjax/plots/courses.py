"""The courses of training: losses, movements of weights and layers, gaps."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lazyjax.comparison import Comparison
from lazyjax.plots.looks import COLOURS, MODELS, colour_of, legend, log_where_positive, shade_of
from lazyjax.types import History


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
        ax.set(xscale="log", xlabel="1 + step")
    shade = shade_of(labels, compared.members)
    at, grid = 1 + compared.curve_steps, 1 + compared.steps
    for i in range(compared.members):
        for name, model in compared.models.items():
            look: dict[str, Any] = {
                "linestyle": MODELS[name].line,
                "color": colour_of(labels, i, name),
                "alpha": shade,
                "linewidth": 2.4 if name == "closed" else 1.6,
            }
            where = 1 + model.steps if name == "closed" else at
            axes[0].plot(where, model.loss[i], **look)
            axes[1].plot(where[1:], model.movement[i, 1:], **look)  # a log axis has no 0
    axes[0].set(title="training loss", ylabel="loss")
    axes[1].set(title="movement of all weights", ylabel=r"$\|w - w_0\| \,/\, \|w_0\|$")
    largest = np.nanmax(compared.network.movement[compared.stable])
    if np.isfinite(largest) and largest > 0:
        axes[1].set_ylim(largest * 1e-4, largest * 3)
    legend(axes[0], labels, list(compared.models))
    gaps: dict[str, tuple[np.ndarray, Any, str]] = {
        "training points": (compared.gap_train, "-", "#0072B2"),
    }
    if compared.gap_test is not None:
        gaps["test points"] = (compared.gap_test, "-.", "#009E73")
    for i in range(compared.members):
        for gap, line, own in gaps.values():
            colour = own if labels is None else colour_of(labels, i, "network")
            axes[2].plot(grid[1:], gap[i, 1:], line, color=colour, alpha=shade)
    handles = [
        Line2D([], [], linestyle=line, color="0.3" if labels else own, label=label)
        for label, (_, line, own) in gaps.items()
    ]
    axes[2].legend(handles=handles)
    axes[2].set(title="gap between network and tangent model", ylabel="rms difference of outputs")
    log_where_positive(*axes)
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
                if labels is None:
                    curves = curves[compared.stable]
                curve = np.median(curves, axis=0) if labels is None else curves[panel]
                ax.plot(at[1:], curve[1:], MODELS[model].line, color=colour, linewidth=1.4)
                if labels is None and len(curves) > 1 and model == "network":
                    low, high = np.percentile(curves, [25, 75], axis=0)
                    ax.fill_between(
                        at[1:], low[1:], high[1:], color=colour, alpha=0.15, linewidth=0
                    )
                finite = curve[np.isfinite(curve)]
                largest = max(largest, float(finite.max(initial=0.0)))
        ax.set(xscale="log", xlabel="1 + step")
        log_where_positive(ax)
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
        seeds = int(np.sum(compared.stable))
        axes[0, 0].set_title(f"median and quartiles over {seeds} seeds")
    return figure


def history(own: History) -> Figure:
    """Draw the loss and the movement of the weights of a training run.

    Parameters
    ----------
    own : History
        Of one run, or of an ensemble.

    Returns
    -------
    Figure
        Three panels against the step: training loss, movement of all weights, and of each leaf
        (the median over the members of an ensemble).
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    at = 1 + np.arange(own.loss.shape[-1])
    members = np.atleast_2d(own.loss).shape[0]
    look: dict[str, Any] = {"color": MODELS["network"].colour, "alpha": shade_of(None, members)}
    axes[0].plot(at, np.atleast_2d(own.loss).T, **look)
    axes[1].plot(at[1:], np.atleast_2d(own.weight_movement)[:, 1:].T, **look)
    leaves = list(own.layer_movement)
    palette = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(leaves)))
    if len(leaves) <= len(COLOURS):
        palette = list(COLOURS[: len(leaves)])
    for colour, leaf in zip(palette, leaves, strict=True):
        curve = np.median(np.atleast_2d(own.layer_movement[leaf]), axis=0)
        axes[2].plot(at[1:], curve[1:], color=colour, label=leaf)
    titles = {
        "training loss": "loss",
        "movement of all weights": r"$\|w - w_0\| \,/\, \|w_0\|$",
        "movement of each layer": "relative to its norm",
    }
    for ax, (title, label) in zip(axes, titles.items(), strict=True):
        ax.set(xscale="log", xlabel="1 + step", title=title, ylabel=label)
    log_where_positive(*axes)
    if len(leaves) <= len(COLOURS):
        axes[2].legend(fontsize=8)
    return figure
