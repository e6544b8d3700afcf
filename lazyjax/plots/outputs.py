"""What was learned: functions of one number, and outputs of network and tangent model together."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lazyjax.comparison import THRESHOLDS, Comparison
from lazyjax.plots.looks import MODELS, colour_of, data, legend, shade_of, target

_SHOWN = 2000  # points of a scatter, beyond which it is a blot


def is_a_function(compared: Comparison) -> bool:
    """Tell whether the models are functions of one number with one output, on test points."""
    test, x = compared.network.test, compared.test_x
    if test is None or getattr(x, "ndim", 0) != 2 or x.shape[1] != 1 or x.shape[0] < 2:
        return False
    y = getattr(compared.y, "shape", ())
    return test.shape[3:] == (1,) and y[1:] == (1,)


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
        The target on the test points.

    Returns
    -------
    Figure
        Three panels: before training, networks after it, tangent models and closed form after it.
    """
    assert compared.network.test is not None  # of `is_a_function`
    tests = compared.network.test[compared.stable]
    start, end = (np.nanmax(np.abs(tests[:, when])) for when in (0, -1))
    apart = bool(start > 5 * end)  # a wild start would make lines of what was learned
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), sharey=not apart)
    order = np.argsort(compared.test_x[:, 0])
    grid = compared.test_x[order, 0]
    panels = (
        ("before training", (("network", 0),)),
        ("networks after training", (("network", -1),)),
        ("tangent models after training", (("tangent", -1), ("closed", -1))),
    )
    drawn: list[list[np.ndarray]] = [[], [], []]
    for ax, values_of, (title, curves) in zip(axes, drawn, panels, strict=True):
        if target_values is not None:
            target(ax, compared.test_x[order], np.asarray(target_values)[order])
        for model, when in curves:
            for i in np.flatnonzero(compared.stable).tolist() if model in compared.models else ():
                values = compared.models[model].test[i, when, order, 0]
                values_of.append(values)
                ax.plot(
                    grid,
                    values,
                    MODELS[model].line,
                    color="black" if model == "closed" else colour_of(labels, i, model),
                    alpha=shade_of(labels, compared.members),
                    zorder=4 if model == "closed" else 3,
                )
        data(ax, compared.x, compared.y)
        ax.set(title=title, xlabel="x")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    whole = [compared.y] + ([] if target_values is None else [np.asarray(target_values)])
    for i in (slice(1), slice(1, 2), slice(2, 3)) if apart else (slice(3),):
        _shared_range(axes[i], [v for values in drawn[i] for v in values], whole)
    axes[0].set_ylabel("f(w, x)")
    handles = [Line2D([], [], marker="x", linestyle="", color="black", label="data")]
    if target_values is not None:
        handles.append(Line2D([], [], linestyle="--", color="0.6", label="target"))
    if labels is not None:
        handles += [
            Line2D([], [], color=colour_of(labels, i, "network"), label=label)
            for i, label in enumerate(labels)
        ]
    axes[0].legend(handles=handles)
    if labels is None:
        legend(axes[1], None, ["network"])
    legend(axes[2], None if labels is None else [], list(compared.models)[1:])
    return figure


def _changes(compared: Comparison, member: int, where: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Give by how much the outputs of network and tangent model changed, as two long vectors."""
    both = [getattr(compared.models[name], where) for name in ("network", "tangent")]
    if any(values is None for values in both):
        return None
    x, y = (np.ravel(values[member, -1] - values[member, 0]) for values in both)
    if len(x) > _SHOWN:
        some = np.random.default_rng(0).choice(len(x), _SHOWN, replace=False)
        x, y = x[some], y[some]
    return x, y


def predictions(compared: Comparison, labels: Sequence[str] | None = None) -> Figure:
    """Draw what network and tangent model learned against each other, and how far they came apart.

    Parameters
    ----------
    compared : Comparison
    labels : sequence of str, optional
        One a member; none where the members are seeds.

    Returns
    -------
    Figure
        The change of each output since the start, network and tangent model (at most 2000, drawn at
        random); the gap as a share of what was learned, against the step; of a classifier also
        accuracies, and the share of the examples that the two classify differently.
    """
    classifier = compared.disagreement_train is not None
    figure, axes = plt.subplots(1, 3 if classifier else 2, figsize=(13 if classifier else 9, 3.9))
    shade = shade_of(labels, compared.members)
    ends = [0.0]
    for i in np.flatnonzero(compared.stable).tolist():
        for where, marker, own in (("train", "o", "#0072B2"), ("test", "x", "#E69F00")):
            changes = _changes(compared, i, where)
            if changes is None:
                continue
            x, y = changes
            colour = own if labels is None else colour_of(labels, i, "network")
            size = 16 if len(x) < 200 else 5
            axes[0].scatter(
                x, y, size, marker=marker, color=colour, alpha=0.6 * shade, linewidths=1
            )
            ends += [*x[np.isfinite(x)], *y[np.isfinite(y)]]
    low, high = min(ends), max(ends)
    axes[0].plot([low, high], [low, high], color="0.6", linewidth=1, zorder=1)
    axes[0].set(
        title="change of each output by training",
        xlabel="network",
        ylabel="tangent model",
    )
    handles = [
        Line2D(
            [], [], marker=marker, linestyle="", color=own if labels is None else "0.3", label=name
        )
        for name, marker, own in (
            ("training points", "o", "#0072B2"),
            ("test points", "x", "#E69F00"),
        )
        if name == "training points" or compared.network.test is not None
    ]
    handles.append(Line2D([], [], color="0.6", linewidth=1, label="equal"))
    axes[0].legend(handles=handles)

    at = 1 + compared.steps
    for i in range(compared.members):
        axes[1].plot(
            at[1:],
            compared.share[i, 1:],
            color=colour_of(labels, i, "network"),
            alpha=shade,
            label=None if labels is None else labels[i],
        )
    for threshold, word in zip(THRESHOLDS, ("lazy below", "not lazy above"), strict=True):
        axes[1].axhline(threshold, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
        axes[1].annotate(
            f"{word} {threshold:g}",
            (at[1], threshold),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=8,
            color="0.3",
        )
    finite = compared.share[compared.stable, 1:]
    finite = finite[np.isfinite(finite) & (finite > 0)]
    axes[1].set(
        xscale="log",
        yscale="log" if finite.size else "linear",
        xlabel="1 + step",
        title="gap as a share of what was learned",
        ylabel="rms gap / rms change of the network",
    )
    if finite.size:
        axes[1].set_ylim(max(finite.min() / 2, finite.max() * 1e-5), max(2 * finite.max(), 0.6))
    if labels is not None:
        axes[1].legend()
    if classifier:
        _accuracies(axes[2], compared, labels)
    return figure


def _accuracies(ax: Axes, compared: Comparison, labels: Sequence[str] | None) -> None:
    """Draw accuracies of both models, and where they differ, against the step.

    Where colours tell members apart, only those on the test points, if there are such.
    """
    at, shade = 1 + compared.steps, shade_of(labels, compared.members)
    places = [("train", "training points", "#0072B2"), ("test", "test points", "#E69F00")]
    if compared.network.test_accuracy is None:
        places = places[:1]
    elif labels is not None:
        places = places[1:]
    looks: dict[str, tuple[Any, str]] = {}
    for where, name, own in places:
        for model in ("network", "tangent"):
            for i, curve in enumerate(getattr(compared.models[model], f"{where}_accuracy")):
                colour = own if labels is None else colour_of(labels, i, model)
                ax.plot(at, curve, MODELS[model].line, color=colour, alpha=shade)
            shown = own if labels is None else "0.3"
            looks[f"{MODELS[model].label}, {name}"] = (MODELS[model].line, shown)
    where, name, _ = places[0]
    for i, curve in enumerate(getattr(compared, f"disagreement_{where}")):
        colour = "black" if labels is None else colour_of(labels, i, "network")
        ax.plot(at, curve, ":", color=colour, alpha=shade)
    looks[f"classified differently, {name}"] = (":", "black" if labels is None else "0.3")
    ax.set(xscale="log", xlabel="1 + step", title="accuracy", ylabel="share of the examples")
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(
        handles=[
            Line2D([], [], linestyle=line, color=colour, label=label)
            for label, (line, colour) in looks.items()
        ],
        fontsize=8,
        loc="center right",
    )
