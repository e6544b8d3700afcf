"""What are the functions to learn, and what does a data set of fifteen points show of them?

Three targets on [-1, 1]: one kink, two kinks, and a fast oscillation. Look at the data: between two
neighbouring points a model is free, and the widest gap is where it can go wrong unseen. The table
of least risks is the yardstick for every later fit: what the best constant, the best straight line
and the best function of period 1 leave. For the middle target the last is 1/12, no better than the
best constant.

Source: practical, section 1 (100-point grid on [-1, 1]; n = 15, no noise, target "middle").
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.results import Results
from experiments.settings import Fit
from lazyjax import checks, plots
from lazyjax.data import TARGETS, Target, excess_risk, make_dataset

SECTIONS = "1"
QUICK: dict[str, int] = {}

PREDICTORS = ("best constant", "best straight line", "best of period 1")


@dataclass(frozen=True, kw_only=True)
class Config(Fit):
    """The practical's own setting."""

    seed: int = 0
    """Seed of the data."""
    noise: float = 0.0
    """Standard deviation of the noise of y."""
    target: str = "middle"
    """Target function of the data: simple, middle or complex."""
    grid_points: int = 100
    """Points of the grid on which the targets are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("grid_points", self.grid_points, least=2)


@partial(jax.jit, static_argnums=(0, 1))
def best_periodic(target: Target, period: float, x: jax.Array) -> jax.Array:
    """Evaluate the best predictor of a period on [-1, 1]: the mean over all points that it joins.

    g(x) = mean of target(x + j period) over the whole j with x + j period in [-1, 1]

    Parameters
    ----------
    target : callable
        A function of x.
    period : float
        Above 0; from 2 on it joins no points, and g is the target.
    x : (N, 1)
        In [-1, 1].

    Returns
    -------
    (N, 1) array

    Notes
    -----
    No function of this period has a lower mean squared distance to the target. Its own is the floor
    under the risk of every model of such functions, however large and however trained.
    """
    reach = int(np.ceil(2 / period))
    others = x + period * jnp.arange(-reach, reach + 1, dtype=x.dtype)[None]  # (N, 2 reach + 1)
    inside = jnp.abs(others) <= 1
    total = jnp.sum(jnp.where(inside, target(others), 0.0), axis=1, keepdims=True)
    return total / jnp.sum(inside, axis=1, keepdims=True)


def risk_floor(target: str, period: float) -> float:
    """Compute the least excess risk of a function of a period on [-1, 1].

    Parameters
    ----------
    target : str
        A name of `TARGETS`.
    period : float
        Above 0.

    Returns
    -------
    float
        In squared units of y.
    """

    @jax.jit
    def floor() -> jax.Array:
        return excess_risk(
            lambda _, x: best_periodic(TARGETS[target], period, x), None, target=target
        )

    return float(floor())


def run(config: Config) -> Results:
    """Evaluate the targets, draw the data, and measure what simple predictors leave."""
    data = make_dataset(
        jax.random.key(config.seed), n=config.n, noise=config.noise, target=config.target
    )
    grid = jnp.linspace(-1.0, 1.0, config.grid_points)[:, None]
    arrays = {"x": np.asarray(data.x), "y": np.asarray(data.y), "grid_x": np.asarray(grid)}
    fine = np.linspace(-1.0, 1.0, 20_001)[:-1] + 0.5e-4  # midpoints

    summary = {}
    for name, target in TARGETS.items():
        arrays[f"target/{name}"] = np.asarray(jax.jit(target)(grid))
        values = np.asarray(jax.jit(target)(jnp.asarray(fine)), np.float64)
        line = np.polyval(np.polyfit(fine, values, 1), fine)
        arrays[f"periodic/{name}"] = np.asarray(best_periodic(target, 1.0, grid))
        risks = (np.var(values), np.mean((values - line) ** 2), risk_floor(name, 1.0))
        summary[name] = {"mean": float(np.mean(values))} | {
            f"risk of the {predictor}": float(risk)
            for predictor, risk in zip(PREDICTORS, risks, strict=True)
        }
    ends = np.sort(arrays["x"][:, 0])
    gaps = np.diff(ends, prepend=-1.0, append=1.0)
    widest = int(np.argmax(gaps))
    summary["data"] = {
        "points": float(config.n),
        "leftmost": float(ends[0]),
        "rightmost": float(ends[-1]),
        "widest gap": float(gaps[widest]),
        "widest gap begins at": float(ends[widest - 1]) if widest else -1.0,
    }
    return Results(config=config, arrays=arrays, summary=summary)


def plot(results: Results) -> dict[str, Figure]:
    """Draw the targets, the data set, and what simple predictors leave."""
    arrays, config, summary = results.arrays, results.config, results.summary
    grid = arrays["grid_x"][:, 0]
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.9), gridspec_kw={"width_ratios": (1, 1, 1.45)})
    for colour, name in zip(plots.COLOURS, TARGETS, strict=False):
        axes[0].plot(grid, arrays[f"target/{name}"][:, 0], color=colour, label=name)
    axes[0].set(title="target functions", xlabel="x", ylabel="target(x)")
    axes[0].legend()

    gap = summary["data"]["widest gap begins at"], summary["data"]["widest gap"]
    axes[1].axvspan(gap[0], sum(gap), color="0.93", label=f"widest gap, {gap[1]:.2f}")
    plots.target(axes[1], arrays["grid_x"], arrays[f"target/{config.target}"])
    plots.data(axes[1], arrays["x"], arrays["y"])
    title = f"data set: n = {config.n}, noise {config.noise:g}, {config.target}"
    axes[1].set(title=title, xlabel="x", ylabel="y", xlim=(-1.08, 1.08))
    axes[1].legend()

    width = 0.28
    for i, (colour, name) in enumerate(zip(plots.COLOURS, TARGETS, strict=False)):
        risks = [summary[name][f"risk of the {predictor}"] for predictor in PREDICTORS]
        bars = axes[2].bar(np.arange(len(PREDICTORS)) + (i - 1) * width, risks, width, color=colour)
        axes[2].bar_label(bars, fmt="%.2g", fontsize=8, padding=2)
    axes[2].set(
        title="what simple predictors leave",
        ylabel="excess risk",
        yscale="log",
        xticks=np.arange(len(PREDICTORS)),
        xticklabels=[name.replace("best ", "best\n") for name in PREDICTORS],
    )
    axes[2].grid(visible=False, axis="x")
    low, high = axes[2].get_ylim()
    axes[2].set_ylim(low, high * 1.6)
    return {"targets": figure}


def conclude(results: Results) -> list[str]:
    """Say where the data leave a model free, and what the simple predictors leave."""
    numbers, data = results.summary[results.config.target], results.summary["data"]
    begin, width = data["widest gap begins at"], data["widest gap"]
    constant = numbers["risk of the best constant"]
    return [
        f"The widest gap that {results.config.n} points leave on [-1, 1] is {width:.2f} long, from "
        f"{begin:.2f} to {begin + width:.2f}: nothing that a model does there shows in its "
        "training loss.",
        f"On the {results.config.target} target the best constant has an excess risk of "
        f"{constant:.4f} and the best straight line {numbers['risk of the best straight line']:.4f}"
        f"; the best function of period 1 has {numbers['risk of the best of period 1']:.4f}, "
        f"{100 * numbers['risk of the best of period 1'] / constant:.1f} % of the constant's.",
    ]
