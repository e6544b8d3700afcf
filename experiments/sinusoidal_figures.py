"""The cases of `sinusoidal_features`, where their arrays are, and the figures drawn from them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.results import Results
from lazyjax import plots
from lazyjax.comparison import Comparison

FLOOR_COLOUR = plots.COLOURS[3]


class Case(NamedTuple):
    """One of the practical's three models."""

    label: str
    group: str  # what was trained together, the prefix of its arrays
    first: int  # its members, for each frequency
    members: int
    colour: str


def cases(config: Any) -> tuple[Case, Case, Case]:
    """List the three models, and where their members are."""
    small, wide, many = config.dimension, config.wide_dimension, config.ensemble_dimension
    blue, orange, green = plots.COLOURS[:3]
    return (
        Case(f"dimension {small}, {config.steps} steps", "long", 0, 1, blue),
        Case(f"dimension {wide}, {config.wide_steps} steps", "short", 0, 1, orange),
        Case(f"dimension {many}, seeds", "long", 1, config.networks, green),
    )


def frequency_label(frequency: float) -> str:
    """Name a frequency in units of pi."""
    return f"frequency {frequency / math.pi:g} π"


class Trained(NamedTuple):
    """What models that were trained together leave, members on axis 0."""

    compared: Comparison  # functions (E, 2, M, 1), before and after; kernels (E, 1, N, N)
    risk: np.ndarray  # (E, G), excess risk
    eigenvalues: np.ndarray  # (E, N), of the kernel, rising
    rank: np.ndarray  # (E,), of the kernel
    least_loss: np.ndarray  # (E,), that the features allow

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Give all arrays by name, as they are kept."""
        compared, *others = self
        mine = zip(self._fields[1:], others, strict=True)
        return compared.arrays(prefix) | {prefix + name: array for name, array in mine}

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray], prefix: str) -> "Trained":
        """Give what was kept."""
        others = (arrays[prefix + name] for name in Trained._fields[1:])
        return Trained(Comparison.of(arrays, prefix), *others)


def select(results: Results, case: Case, at: int) -> Trained:
    """Give what one case left at frequency number `at`."""
    block = sum(c.members for c in cases(results.config) if c.group == case.group)
    rows = slice(at * block + case.first, at * block + case.first + case.members)
    compared, *others = Trained.of(results.arrays, f"{case.group}/")
    return Trained(compared.of_members(rows), *(array[rows] for array in others))


def _has_floor(results: Results, at: int) -> bool:
    return bool(results.arrays["floors"][at] > 1e-12)


def _shade(case: Case) -> float:
    return 1.0 if case.members == 1 else 0.45


def draw_functions(results: Results) -> Figure:
    """Draw the functions, a row a frequency.

    Of many seeds all networks are drawn, but tangent model and closed form of the first only.
    """
    config, arrays = results.config, results.arrays
    small, wide, many = cases(config)
    panels = ((small, -1), (wide, -1), (many, 0), (many, -1))
    rows = len(config.frequencies)
    figure, axes = plt.subplots(
        rows, 4, figsize=(14, 3.1 * rows + 0.8), sharex=True, sharey=True, squeeze=False
    )
    for at, frequency in enumerate(config.frequencies):
        for ax, (case, when) in zip(axes[at], panels, strict=True):
            of_case = select(results, case, at).compared
            grid = of_case.grid_x
            plots.target(ax, grid, arrays["target"])
            if _has_floor(results, at):
                ax.plot(grid[:, 0], arrays["periodic"][at][:, 0], "-.", color=FLOOR_COLOUR)
            for model, own in of_case.models.items():
                _, line, colour = plots.MODELS[model]
                curves = own.grid[:, when, :, 0]
                if model == "network":
                    ax.plot(grid[:, 0], curves[1:].T, line, color=colour, alpha=0.35, linewidth=0.8)
                if model == "closed":  # dots: a dotted line would hide fast waves
                    ax.plot(grid[::20, 0], curves[0, ::20], ".", color=colour, markersize=3.5)
                    continue
                ax.plot(grid[:, 0], curves[0], line, color=colour, linewidth=1.3)
            plots.data(ax, of_case.x, of_case.y)
            if at == 0:
                state = "before training" if when == 0 else "after training"
                ax.set_title(case.label if case.members == 1 else f"{case.label}, {state}")
        axes[at, 0].set_ylabel(f"{frequency_label(frequency)}\n\nf(w, x)")
    for ax in axes[-1]:
        ax.set_xlabel("x")
    axes[0, 0].set_ylim(-1.2, 1.35)
    handles = [
        Line2D([], [], linestyle=plots.MODELS[m].line, color=plots.MODELS[m].colour, label=label)
        for m, label in (("network", "network"), ("tangent", "tangent model, on it"))
    ]
    handles += [
        Line2D([], [], marker=".", linestyle="", color="black", label="closed form"),
        Line2D([], [], marker="x", linestyle="", color="black", label="data"),
        Line2D([], [], linestyle="--", color="0.6", label="target"),
    ]
    if any(_has_floor(results, at) for at in range(rows)):
        label = "best function of the features' period"
        handles.append(Line2D([], [], linestyle="-.", color=FLOOR_COLOUR, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


BIAS = "output/bias"


def _draw_curves(axes: Sequence[Axes], compared: Comparison, case: Case) -> None:
    """Draw losses, movements of all weights, and those of the output bias."""
    for model, own in compared.models.items():
        at = 1 + (compared.steps if model == "closed" else compared.curve_steps)
        colour = "black" if model == "closed" else case.colour
        line = plots.MODELS[model].line
        if model == "tangent":
            colour, line = "white", (0, (3, 3))  # it lies on the network's line
        look: dict[str, Any] = {
            "linestyle": line,
            "color": colour,
            "alpha": _shade(case),
            "linewidth": 2.6 if model == "network" else 1.2,
        }
        axes[0].plot(at, own.loss.T, **look)
        # a movement is 0 at step 0, which a log axis has not
        axes[1].plot(at[1:], own.movement[:, 1:].T, **look)
        if model != "closed":
            axes[2].plot(at[1:], own.layer[BIAS][:, 1:].T, **look)


def draw_training(results: Results) -> Figure:
    """Draw losses, movements of all weights and of the output bias, and the gaps."""
    config = results.config
    rows = len(config.frequencies)
    figure, axes = plt.subplots(
        rows, 4, figsize=(15, 3.3 * rows + 0.7), sharex=True, sharey="col", squeeze=False
    )
    for at, frequency in enumerate(config.frequencies):
        for case in cases(config):
            of_case = select(results, case, at)
            compared = of_case.compared
            _draw_curves(axes[at], compared, case)
            least = float(of_case.least_loss[0])
            if least > 1e-8:
                axes[at, 0].axhline(least, linestyle="-.", linewidth=1, color=case.colour)
            steps = 1 + compared.steps
            change = compared.network.train - compared.network.train[:, :1]
            change = np.sqrt(np.mean(np.square(change), axis=(-2, -1)))
            style = {"color": case.colour, "alpha": _shade(case)}
            axes[at, 3].plot(steps[1:], change[:, 1:].T, "-", linewidth=1.2, **style)
            axes[at, 3].plot(steps, compared.gap_train.T, ".", markersize=4, **style)
            style["color"] = "black"
            axes[at, 3].plot(steps, compared.closed_form.gap.T, ".", markersize=1.5, **style)
        axes[at, 0].set_ylabel(f"{frequency_label(frequency)}\n\nloss")
        axes[at, 1].set_ylabel(r"$\|w - w_0\| \,/\, \|w_0\|$")
        axes[at, 2].set_ylabel(r"$|b - b_0| \,/\, |b_0|$")
        axes[at, 3].set_ylabel("rms over training points")
    for ax in axes.flat:
        ax.set(xscale="log", yscale="log")
    for ax in axes[-1]:
        ax.set_xlabel("1 + step")
    axes[0, 0].set_title("training loss")
    axes[0, 1].set_title("movement of all weights")
    axes[0, 2].set_title("movement of the output bias\n(one scalar; what the practical plots)")
    axes[0, 3].set_title("change of the function,\nand gaps")
    low = min(ax.get_ylim()[0] for ax in axes[:, 1])
    axes[0, 1].set_ylim(max(low, 1e-4), None)
    axes[0, 2].set_ylim(1e-3, None)
    axes[0, 0].set_ylim(1e-8, None)
    handles = [Line2D([], [], color=c.colour, linewidth=3, label=c.label) for c in cases(config)]
    dot: dict[str, Any] = {"linestyle": "", "marker": "."}
    handles += [
        Line2D([], [], color="0.4", linewidth=2.6, label="network"),
        Line2D([], [], color="0.4", linestyle=(0, (1.2, 1.2)), label="tangent model, on it"),
        Line2D([], [], color="black", linestyle=":", label="closed form"),
        Line2D(
            [], [], color="0.4", linestyle="-.", label="least loss of the features", linewidth=1
        ),
        Line2D([], [], color="0.4", label="change since the start", linewidth=1.2),
        Line2D([], [], color="0.4", label="gap, network - tangent model", markersize=8, **dot),
        Line2D([], [], color="black", label="gap, tangent model - closed form", **dot),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def draw_risk(results: Results) -> Figure:
    """Draw why a short period has a floor, and the excess risk at every frequency."""
    config, arrays = results.config, results.arrays
    rows = len(config.frequencies)
    grid = arrays["long/grid_x"][:, 0]
    figure, axes = plt.subplots(1, rows + 1, figsize=(4.6 * (rows + 1), 4.0), squeeze=False)
    ax = axes[0, 0]
    target = arrays["target"][:, 0]
    period = 2 * math.pi / config.frequencies[0]
    ax.plot(grid, target, "--", color="0.6", label="target(x)")
    joined = (grid >= -1) & (grid <= 1 - period)
    if np.any(joined):
        shifted = np.interp(grid[joined] + period, grid, target)
        label = f"target(x + {period:g})"
        ax.plot(grid[joined], shifted, "--", color=plots.COLOURS[5], label=label)
    ax.plot(grid, arrays["periodic"][0][:, 0], "-.", color=FLOOR_COLOUR, label="mean of the two")
    ax.set(title=f"the best function of period {period:g}", xlabel="x")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.legend()
    every = [arrays["long/risk"], arrays["short/risk"]]
    low, high = min(r.min() for r in every), max(r.max() for r in every)
    for at, frequency in enumerate(config.frequencies):
        ax = axes[0, 1 + at]
        for case in cases(config):
            of_case = select(results, case, at)
            style = {"color": case.colour, "alpha": _shade(case)}
            ax.plot(1 + of_case.compared.steps, of_case.risk.T, **style)
        if _has_floor(results, at):
            floor = float(arrays["floors"][at])
            ax.axhline(floor, linestyle="-.", color=FLOOR_COLOUR)
            label = "floor 1/12" if abs(floor - 1 / 12) < 1e-9 else f"floor {floor:.3g}"
            ax.annotate(
                label, (1, floor), xytext=(0, -12), textcoords="offset points", color=FLOOR_COLOUR
            )
        ax.set(xscale="log", yscale="log", ylim=(low / 2, high * 1.5), xlabel="1 + step")
        ax.set(title=f"{frequency_label(frequency)}", ylabel="excess risk")
    handles = [Line2D([], [], color=c.colour, label=c.label) for c in cases(config)]
    axes[0, -1].legend(handles=handles)
    return figure


def draw_kernels(results: Results) -> Figure:
    """Draw the kernels and their eigenvalues."""
    config = results.config
    rows = len(config.frequencies)
    figure, axes = plt.subplots(
        rows,
        4,
        figsize=(14, 3.3 * rows + 0.3),
        squeeze=False,
        gridspec_kw={"width_ratios": (1, 1, 1, 1.4)},
    )
    for at, frequency in enumerate(config.frequencies):
        for ax, case in zip(axes[at], cases(config), strict=False):
            of_case = select(results, case, at)
            image = ax.imshow(of_case.compared.kernels[0, 0])
            figure.colorbar(image, ax=ax, shrink=0.85)
            ax.grid(visible=False)
            ax.set(xticks=[], yticks=[], xlabel="training points, by x")
            moved = of_case.compared.kernel_change.max()
            ax.set_title(f"{case.label.split(',')[0]}, moved by {moved:.0e}")
            values = of_case.eigenvalues[0, ::-1]
            index = 1 + np.arange(len(values))
            kept = index <= of_case.rank[0]
            axes[at, 3].plot(index[kept], values[kept], "o-", color=case.colour, markersize=4)
        axes[at, 0].set_ylabel(frequency_label(frequency))
        ax = axes[at, 3]
        ax.set(yscale="log", xlim=(0.5, config.n + 0.5), xlabel="index", ylabel="eigenvalue")
        ax.set_title("eigenvalues of the kernel, up to its rank")
        handles = [
            Line2D([], [], color=c.colour, marker="o", label=c.label.split(",")[0])
            for c in cases(config)
        ]
        ax.legend(handles=handles)
    return figure
