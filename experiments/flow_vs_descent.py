"""Does gradient descent follow the gradient flow, and which starts does a large step throw off it?

Gradient descent with learning rate eta is Euler's method for the flow dw/dt = -grad f(w), step eta.
A hundred points descend a hilly surface of two variables with a small and a large learning rate.
For the same number of steps the large rate has had twenty times the flow time, so look at the
comparison at equal flow time. There the two stay together where the curvature is below 2 / eta, and
part where it is above: the step overshoots the valley, and the point jumps from wall to wall or
leaves for a flatter valley, so that more flow time does not mean a lower end. Euler's error falls
as eta, with slope 1.

Source: practical, sections 28-29 (100 starts, learning rates 1e-4 and 2e-3, 10 000 steps).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from experiments.results import Results
from experiments.settings import Settings
from experiments.surface import curvature, descend, integrate, steepness, values
from lazyjax import checks, plots
from lazyjax.training import log_grid

SECTIONS = "28-29"
QUICK = {"starts": 20, "steps": 2000, "halvings": 4}

WINDOW = 3.0  # of the drawn map, as in the practical
TOGETHER = 0.01  # nearer than this, two descents count as together
JUMPING = 1e-3  # a longer step at the end counts as jumping


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The practical's own setting."""

    seed: int = 0
    """Seed of the starts."""
    starts: int = 100
    """Points that descend."""
    reach: float = 1.5
    """The starts are uniform on [-reach, reach]^2."""
    small_rate: float = 1e-4
    """The small learning rate."""
    large_rate: float = 2e-3
    """The large learning rate, a whole multiple of the small one."""
    steps: int = 10_000
    """Steps of either; at least large_rate / small_rate."""
    halvings: int = 6
    """How often the large rate is halved to see Euler's method meet the flow."""

    def __post_init__(self) -> None:
        checks.whole("starts", self.starts, least=1)
        checks.positive("reach", self.reach)
        checks.positive("small_rate", self.small_rate)
        checks.positive("large_rate", self.large_rate)
        checks.whole("halvings", self.halvings, least=2)
        ratio = self.large_rate / self.small_rate
        if round(ratio) < 2 or abs(ratio - round(ratio)) > 1e-6 * ratio:
            raise ValueError(
                "`large_rate` must be a whole multiple of `small_rate`, twice or more, got "
                f"{self.large_rate} and {self.small_rate}. Use {self.small_rate * 20:g}."
            )
        checks.whole(
            "steps",
            self.steps,
            least=round(ratio),
            cure="Use more: the comparison at equal flow time needs a step of the large rate.",
        )

    @property
    def ratio(self) -> int:
        """Steps of the small rate in the flow time of one of the large."""
        return round(self.large_rate / self.small_rate)

    @property
    def equal_steps(self) -> int:
        """Steps of the large rate in the flow time of all steps of the small."""
        return self.steps // self.ratio


def run(config: Config) -> Results:
    """Descend at both rates, for equal steps and equal flow time, beside the flow itself."""
    box = config.reach
    starts = jax.random.uniform(
        jax.random.key(config.seed), (config.starts, 2), minval=-box, maxval=box
    )
    rates = np.array([config.small_rate, config.large_rate])
    grid = log_grid(config.steps)
    equal = np.union1d(log_grid(config.equal_steps), [config.equal_steps])
    grid = np.union1d(grid, equal)  # equal steps of the large rate are on the grid
    history = descend(starts, jnp.asarray(rates), config.steps, grid)
    small, large = np.swapaxes(history.params.reshape(2, config.starts, -1, 2), 1, 2)

    # the small rate carried on to the flow time of the large: its points at the large one's steps
    interval = jnp.asarray(config.large_rate, starts.dtype)
    follow = partial(integrate, interval=interval)
    carried_on = np.asarray(
        follow("euler", starts, substeps=jnp.asarray(config.ratio), intervals=config.steps)
    )[grid]

    # Euler against the flow, in the flow time that the small rate has in the practical
    counts = 2 ** np.arange(config.halvings + 1)
    span = config.equal_steps
    finest = jnp.asarray(counts[-1])
    flow = np.asarray(follow("runge_kutta", starts, substeps=finest, intervals=span))
    errors = []
    for count in counts:
        path = follow("euler", starts, substeps=jnp.asarray(count), intervals=span)
        errors.append(np.max(np.linalg.norm(np.asarray(path) - flow, axis=-1), axis=0))

    arrays = {
        "starts": np.asarray(starts),
        "learning_rates": rates,
        "steps": grid,
        "small": small,
        "large": large,
        "small_carried_on": carried_on,
        "flow": flow[np.unique(equal)],
        "flow_steps": np.unique(equal),
        "curvature_at_start": np.asarray(curvature(starts)),
        "curvature_along_flow": np.maximum(
            np.asarray(curvature(jnp.asarray(flow))).max(axis=0),
            np.asarray(curvature(jnp.asarray(carried_on))).max(axis=0),
        ),
        "curvature_at_end_of_large": np.asarray(curvature(jnp.asarray(large[-1]))),
        "last_step_of_large": config.large_rate * np.asarray(steepness(jnp.asarray(large[-1]))),
        "euler_rates": config.large_rate / counts,
        "euler_errors": np.stack(errors),
    }
    at = int(np.searchsorted(grid, config.equal_steps))
    for name, points in (
        ("small_same_steps", small[-1]),
        ("large_same_steps", large[-1]),
        ("large_same_flow_time", large[at]),
        ("small_carried_on", carried_on[-1]),
    ):
        arrays[f"final_values/{name}"] = np.asarray(values(jnp.asarray(points)))
    arrays["distance_at_equal_time"] = np.linalg.norm(large - carried_on, axis=-1)
    return Results(config=config, arrays=arrays, summary=_summary(config, arrays, at))


def _summary(config: Config, arrays: dict[str, np.ndarray], at: int) -> dict[str, dict[str, float]]:
    limit = 2 / config.large_rate
    above = arrays["curvature_along_flow"] > limit
    together = arrays["distance_at_equal_time"][at] < TOGETHER
    outside = np.any(np.abs(arrays["large"][-1]) > WINDOW, axis=-1)
    errors = np.median(arrays["euler_errors"], axis=1)
    slope = np.diff(np.log(errors)) / np.diff(np.log(arrays["euler_rates"]))

    def final(name: str) -> dict[str, float]:
        ends = arrays[f"final_values/{name}"]
        return {
            "mean final value": float(np.mean(ends)),
            "median final value": float(np.median(ends)),
            "lowest final value": float(np.min(ends)),
        }

    def share(which: np.ndarray) -> float:
        return float(np.mean(which)) if which.size else float("nan")

    horizon, short = config.steps * config.large_rate, config.steps * config.small_rate
    return {
        "small rate": {"steps": float(config.steps), "flow time": short}
        | final("small_same_steps"),
        "large rate": {"steps": float(config.steps), "flow time": horizon}
        | final("large_same_steps"),
        "large rate, stopped at the flow time of the small": {
            "steps": float(config.equal_steps),
            "flow time": config.equal_steps * config.large_rate,
        }
        | final("large_same_flow_time"),
        "small rate, carried on to the flow time of the large": {
            "steps": float(config.steps * config.ratio),
            "flow time": horizon,
        }
        | final("small_carried_on"),
        "curvature": {
            "2 / large rate": limit,
            "2 / small rate": 2 / config.small_rate,
            "starts above 2 / large rate": float(np.sum(arrays["curvature_at_start"] > limit)),
            "starts above it somewhere along the flow": float(np.sum(above)),
            "starts above 2 / small rate along the flow": float(
                np.sum(arrays["curvature_along_flow"] > 2 / config.small_rate)
            ),
            "largest along the flow": float(arrays["curvature_along_flow"].max()),
            "ends of the large rate above 2 / large rate": float(
                np.sum(arrays["curvature_at_end_of_large"] > limit)
            ),
        },
        "equal flow time": {
            "share together, curvature below 2 / large rate": share(together[~above]),
            "share together, curvature above": share(together[above]),
            "share of the large rate that still jumps at its end": share(
                arrays["last_step_of_large"] > JUMPING
            ),
            "share of the large rate that ends outside of the map": share(outside),
        },
        "Euler and the flow": {
            "median error at the large rate": float(errors[0]),
            "median error at the smallest": float(errors[-1]),
            "slope of the median at the smallest": float(slope[-1]),
        },
    }


_SMALL, _LARGE = plots.COLOURS[0], plots.COLOURS[1]
_JUMPS = {"linewidth": 0.3, "alpha": 0.7, "marker": ".", "markersize": 2}


def _map(ax: Axes) -> ContourSet:
    axis = np.linspace(-WINDOW, WINDOW, 400)
    x, y = np.meshgrid(axis, axis)
    height = np.asarray(values(jnp.stack([jnp.asarray(x), jnp.asarray(y)], axis=-1)))
    filled = ax.contourf(axis, axis, height, levels=30, cmap="Greys_r", vmin=-1.9, vmax=2.6)
    ax.set(xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), xlabel="x", aspect="equal")
    ax.grid(visible=False)
    return filled


def _trajectories(results: Results) -> Figure:
    arrays, config = results.arrays, results.config
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), sharey=True)
    short, horizon = config.steps * config.small_rate, config.steps * config.large_rate
    panels = (
        ("small", _SMALL, f"rate {config.small_rate:g}, flow time {short:g}"),
        ("small_carried_on", _SMALL, f"rate {config.small_rate:g}, flow time {horizon:g}"),
        ("large", _LARGE, f"rate {config.large_rate:g}, flow time {horizon:g}"),
    )
    filled = []
    for ax, (name, colour, title) in zip(axes, panels, strict=True):
        filled.append(_map(ax))
        path = arrays[name]
        line = {"linewidth": 0.9, "alpha": 0.8} if colour == _SMALL else _JUMPS
        ax.plot(path[..., 0], path[..., 1], color=colour, **line)
        ax.plot(*arrays["starts"].T, "o", color="white", markersize=3, markeredgecolor="black")
        ax.plot(*path[-1].T, "D", color=colour, markersize=4, markeredgecolor="black")
        ax.set_title(title)
    axes[0].set_ylabel("y")
    axes[0].plot([], [], "o", color="white", markeredgecolor="black", label="start")
    axes[0].plot([], [], "D", color=_SMALL, markeredgecolor="black", label="end")
    axes[0].legend(loc="lower right")
    figure.colorbar(filled[0], ax=axes, label="f(x, y)", shrink=0.85)
    return figure


def _histograms(results: Results) -> Figure:
    arrays, config = results.arrays, results.config
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.9), sharey=True, sharex=True)
    horizon = config.steps * config.large_rate
    panels = (
        ("same number of steps", "small_same_steps", f"{config.steps} steps each"),
        ("same flow time", "small_carried_on", f"flow time {horizon:g} each"),
    )
    every = np.concatenate([v for k, v in arrays.items() if k.startswith("final_values/")])
    bins = np.linspace(every.min(), every.max(), 16)
    for ax, (title, small, what) in zip(axes, panels, strict=True):
        finals = [arrays[f"final_values/{name}"] for name in (small, "large_same_steps")]
        labels = [f"rate {rate:g}" for rate in (config.small_rate, config.large_rate)]
        ax.hist(finals, bins=bins, color=[_SMALL, _LARGE], label=labels)
        for final, colour in zip(finals, (_SMALL, _LARGE), strict=True):
            ax.axvline(np.mean(final), color=colour, linestyle="--", linewidth=1.2)
        ax.set(title=f"{title} ({what})", xlabel="final value of f")
        ax.legend(title="dashed: mean")
    axes[0].set_ylabel("starts")
    return figure


def _equal_time(results: Results) -> Figure:
    arrays, config = results.arrays, results.config
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2))
    limit = 2 / config.large_rate
    above = arrays["curvature_along_flow"] > limit
    time = arrays["steps"][1:] * config.large_rate
    distance = np.maximum(arrays["distance_at_equal_time"][1:], 1e-9)
    for which, colour, label in (
        (~above, plots.COLOURS[2], "curvature below 2 / rate"),
        (above, plots.COLOURS[3], "above it, somewhere on the flow"),
    ):
        axes[0].plot(time, distance[:, which], color=colour, alpha=0.4, linewidth=0.8)
        if np.any(which):
            middle = np.median(distance[:, which], axis=1)
            axes[0].plot(time, middle, color=colour, linewidth=3)
        axes[0].plot([], [], color=colour, label=f"{label} ({np.sum(which)})")
        at = int(np.searchsorted(arrays["steps"], config.equal_steps))
        axes[1].plot(
            arrays["curvature_along_flow"][which],
            np.maximum(arrays["distance_at_equal_time"][at, which], 1e-9),
            "o",
            color=colour,
            markersize=5,
            alpha=0.8,
        )
    axes[0].set(
        xscale="log",
        yscale="log",
        xlabel="flow time (rate x steps)",
        ylabel="distance between the two descents",
        title=f"rates {config.small_rate:g} and {config.large_rate:g} at equal flow time",
    )
    axes[0].legend(title="thick: median")
    axes[1].axvline(limit, color="black", linestyle="--", label=f"2 / rate = {limit:g}")
    axes[1].set(
        xscale="log",
        yscale="log",
        xlabel="largest curvature along the flow",
        ylabel="distance between the two descents",
        title=f"at flow time {config.equal_steps * config.large_rate:g}, one point a start",
    )
    axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[1].xaxis.set_minor_formatter(NullFormatter())
    axes[1].legend()
    return figure


def _convergence(results: Results) -> Figure:
    arrays = results.arrays
    figure, ax = plt.subplots(figsize=(6.2, 4.2))
    rates, errors = arrays["euler_rates"], arrays["euler_errors"]
    low, middle, high = np.percentile(errors, [25, 50, 75], axis=1)
    ax.fill_between(rates, low, high, color=_SMALL, alpha=0.2, label="quartiles over the starts")
    ax.plot(rates, middle, "o-", color=_SMALL, label="median")
    ax.plot(rates, middle[-1] * rates / rates[-1], ":", color="black", label="slope 1")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="learning rate",
        ylabel="largest distance to the flow",
        title="gradient descent meets the gradient flow",
    )
    ax.legend()
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw trajectories, final values, the comparison at equal flow time, and Euler's error."""
    return {
        "trajectories": _trajectories(results),
        "final_values": _histograms(results),
        "equal_flow_time": _equal_time(results),
        "euler_meets_the_flow": _convergence(results),
    }


def conclude(results: Results) -> list[str]:
    """Say what the step changes once the flow time is the same."""
    summary, config = results.summary, results.config
    small, large = summary["small rate"], summary["large rate"]
    carried = summary["small rate, carried on to the flow time of the large"]
    bend, equal = summary["curvature"], summary["equal flow time"]
    euler = summary["Euler and the flow"]
    return [
        f"After {config.steps} steps the mean value is {small['mean final value']:.2f} at rate "
        f"{config.small_rate:g} and {large['mean final value']:.2f} at rate {config.large_rate:g}, "
        f"but these are flow times {small['flow time']:g} and {large['flow time']:g}; carried on "
        f"to flow time {carried['flow time']:g}, the small rate has "
        f"{carried['mean final value']:.2f}.",
        f"The curvature is above 2 / {config.large_rate:g} = {bend['2 / large rate']:g} at "
        f"{bend['starts above 2 / large rate']:.0f} of {config.starts} starts, and somewhere along "
        f"the flow for {bend['starts above it somewhere along the flow']:.0f}; above 2 / "
        f"{config.small_rate:g} for {bend['starts above 2 / small rate along the flow']:.0f}.",
        "At equal flow time the two rates are together (within "
        f"{TOGETHER}) for {100 * equal['share together, curvature below 2 / large rate']:.0f} % of "
        "the starts below that curvature and for "
        f"{100 * equal['share together, curvature above']:.0f} % of those above it.",
        f"At rate {config.large_rate:g} "
        f"{100 * equal['share of the large rate that still jumps at its end']:.0f} % of the points "
        f"still take steps longer than {JUMPING} at the end of {config.steps}.",
        "Euler's largest distance to the flow falls with slope "
        f"{euler['slope of the median at the smallest']:.2f} in the learning rate, to "
        f"{euler['median error at the smallest']:.1e} (median).",
    ]
