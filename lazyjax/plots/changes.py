"""How the kernel changed: before and after, and what else is measured along the way."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lazyjax.comparison import Comparison
from lazyjax.plots.looks import colour_of, log_where_positive, shade_of


def _order(compared: Comparison) -> tuple[np.ndarray, str]:
    """Give the order in which the kernel's examples are drawn, and how it is called."""
    few, x, y = compared.kernel_examples, compared.x, compared.y
    if getattr(x, "ndim", 0) == 2 and x.shape[1] == 1:
        return np.argsort(x[few, 0], kind="stable"), ", by x"
    if compared.disagreement_train is not None:
        y = y if y.ndim == 1 else y.argmax(-1) if y.shape[-1] > 1 else y[:, 0]
        if y.ndim == 1:
            return np.argsort(y[few], kind="stable"), ", by class"
    return np.arange(len(few)), ""


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
    order, by = _order(compared)
    few = len(compared.kernel_examples)
    sampled = "" if few == compared.examples_in_all else f", {few} of {compared.examples_in_all:,}"
    figure = plt.figure(figsize=(13, 2.9 * shown + 0.4))
    grid = figure.add_gridspec(shown, 4, width_ratios=(1, 1, 1, 1.5))
    for i in range(shown):
        before, after = (compared.kernels[i, when][np.ix_(order, order)] for when in (0, -1))
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
                ax.set_xlabel(f"training points{sampled}{by}")
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
            color=colour_of(labels, i, "network"),
            alpha=shade_of(labels, compared.members),
            label=None if labels is None else labels[i],
        )
    ax.set(
        xscale="log",
        xlabel="1 + step",
        ylabel=r"$\|\Theta - \Theta_0\|_F \,/\, \|\Theta_0\|_F$",
        title="how far the kernel moved",
    )
    log_where_positive(ax)
    if labels is not None:
        ax.legend()
    return figure


def measures(compared: Comparison, labels: Sequence[str] | None = None) -> Figure:
    """Draw sharpness, alignments, velocity of the kernel and changed ReLU units against the step.

    Parameters
    ----------
    compared : Comparison
    labels : sequence of str, optional
        One a member; none where the members are seeds.

    Returns
    -------
    Figure
        Panels for what was measured: sharpness (dotted: 2 (1 + momentum) / learning rate, above
        which steps are unstable), alignment with the targets, velocity of the kernel, share of ReLU
        units that changed sides.
    """
    at = compared.kernel_steps
    with np.errstate(all="ignore"):
        edge = 2 * (1 + compared.momentum) / compared.learning_rate
    panels: list[tuple[str, str, np.ndarray, np.ndarray, str]] = [
        (
            "velocity of the kernel",
            "relative change a step",
            at[1:],
            compared.kernel_velocity,
            "log",
        )
    ]
    if not np.all(np.isnan(compared.target_alignment)):
        panels.append(
            ("alignment with the targets", "cosine", at, compared.target_alignment, "linear")
        )
    if not np.all(np.isnan(compared.sharpness)):
        name = r"$\lambda_{\max}$ of the Hessian of the loss"
        panels.append(("sharpness", name, at, compared.sharpness, "linear"))
    if compared.pattern_change is not None:
        name = "share of all units, all examples"
        panels.append(
            ("ReLU units that changed sides", name, at, compared.pattern_change, "linear")
        )
    figure, axes = plt.subplots(1, len(panels), figsize=(3.9 * len(panels), 3.6), squeeze=False)
    shade = shade_of(labels, compared.members)
    for ax, (title, label, where, values, yscale) in zip(axes[0], panels, strict=True):
        for i in range(compared.members):
            there = np.isfinite(values[i])
            colour = colour_of(labels, i, "network")
            look: dict[str, Any] = {"color": colour, "alpha": shade, "markersize": 3}
            name = None if labels is None else labels[i]
            ax.plot(1 + where[there], values[i][there], "o-", label=name, **look)
        ax.set(xscale="log", xlabel="1 + step", title=title, ylabel=label)
        if yscale == "log":
            log_where_positive(ax)
        else:
            limits = values[compared.stable][np.isfinite(values[compared.stable])]
            low, high = limits.min(initial=0.0), limits.max(initial=0.0)
            ax.set_ylim(low, high + 0.08 * (high - low) or 1.0)
            if title == "sharpness":
                _edges(ax, edge, high, labels)
    if labels is not None:
        axes[0, 0].legend(fontsize=8)
    return figure


def _edges(ax: Any, edge: np.ndarray, largest: float, labels: Sequence[str] | None) -> None:
    """Draw where steps become unstable, as far as sharpness comes near."""
    seen = {}
    for i, value in enumerate(edge):
        if np.isfinite(value) and value < 4 * largest and value not in seen:
            seen[value] = colour_of(labels, i, "network") if len(set(edge)) > 1 else "black"
    for value, colour in seen.items():
        ax.axhline(value, linestyle=":", color=colour)
    if seen:
        ax.set_ylim(top=max(ax.get_ylim()[1], 1.08 * max(seen)))
        line = Line2D([], [], linestyle=":", color="black", label="stable below")
        ax.legend(handles=[line], fontsize=8)
