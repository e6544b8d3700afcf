"""Can a bad initialisation take a network out of the lazy regime?

Ten shallow ReLU networks of width 100 take two steps of gradient descent with learning rate 1, and
are then trained gently. The two steps throw the function far away, to where the kernel is another.
Two tangent models belong beside each network: one at the initial weights, before the two steps,
and one at the bad weights, after them; as a control, the networks are trained without bad steps.
Look at the gaps. The control is lazy: its gap is far below the size of the targets. After the bad
steps neither tangent model follows the network, whichever its anchor.

Source: practical, section 10 (two steps at 1, then 1 000 steps at 0.001).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.comparison import compare, ensemble, range_of, spread
from experiments.results import Results
from experiments.settings import Descent
from lazyjax import checks, plots
from lazyjax.comparison import Comparison
from lazyjax.data import TARGETS, make_dataset
from lazyjax.models import shallow_mlp
from lazyjax.training import train_ensemble

SECTIONS = "10"
QUICK = {"steps": 200, "networks": 3}


class Case(NamedTuple):
    """Where training starts and where the tangent model expands."""

    label: str
    colour: str


CASES = {
    "control": Case("control, no bad steps", plots.COLOURS[0]),
    "before": Case("anchor before the bad steps", plots.COLOURS[2]),
    "after": Case("anchor after the bad steps", plots.COLOURS[1]),
}


@dataclass(frozen=True, kw_only=True)
class Config(Descent):
    """The practical's own setting."""

    networks: int = 10
    """How many initialisations."""
    width: int = 100
    """Hidden units."""
    bad_learning_rate: float = 1.0
    """Step size of the steps that spoil the initialisation."""
    bad_steps: int = 2
    """How many such steps."""
    learning_rate: float = 0.001
    """Step size of gradient descent on the mean squared error."""
    steps: int = 1000
    """Steps of full-batch gradient descent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("networks", self.networks, least=1)
        checks.whole("width", self.width, least=1)
        checks.positive("bad_learning_rate", self.bad_learning_rate)
        checks.whole("bad_steps", self.bad_steps, least=1)


def run(config: Config) -> Results:
    """Spoil the weights, then train the networks beside the tangent models at both anchors."""
    data_key, key = jax.random.split(jax.random.key(config.seed))
    data = make_dataset(data_key, n=config.n, target=config.target)
    grid_x = jnp.linspace(-1.0, 1.0, 201)[:, None]
    f, initial = ensemble(shallow_mlp(config.width), key, data.x, config.networks)
    spoiling = train_ensemble(
        f, initial, data, optax.sgd(config.bad_learning_rate), steps=config.bad_steps
    )
    bad = jax.tree.map(jnp.asarray, spoiling.final)

    arrays = {"initial_grid": np.asarray(jax.jit(jax.vmap(f, (0, None)))(initial, grid_x))}
    summary = {}
    places = {"control": (initial, initial), "before": (bad, initial), "after": (bad, bad)}
    for name, (start, anchor) in places.items():
        compared, _ = compare(
            f,
            start,
            data,
            learning_rate=config.learning_rate,
            steps=config.steps,
            grid_x=grid_x,
            anchor=anchor,
        )
        arrays |= compared.arrays(f"{name}/")
        summary[CASES[name].label] = spread(compared)
    moved = spoiling.weight_movement[:, -1]
    summary["relative movement of the weights in the bad steps"] = range_of(moved)
    arrays["target"] = np.asarray(TARGETS[config.target](grid_x))
    return Results(config=config, arrays=arrays, summary=summary)


def _of(results: Results, case: str) -> Comparison:
    return Comparison.of(results.arrays, f"{case}/")


def _gaps(results: Results) -> Figure:
    """Draw the functions before and after the bad steps, and the gap in every case."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    after = _of(results, "after")
    grid = after.grid_x[:, 0]
    for ax, curves, title in (
        (axes[0], results.arrays["initial_grid"], "networks before the bad steps"),
        (axes[1], after.network.grid[:, 0], "networks after the bad steps"),
    ):
        plots.target(ax, after.grid_x, results.arrays["target"])
        ax.plot(grid, curves[..., 0].T, color=plots.MODELS["network"].colour, alpha=0.5)
        plots.data(ax, after.x, after.y)
        ax.set(title=title, xlabel="x", ylabel="f(w, x)")
    for name, (label, colour) in CASES.items():
        compared = _of(results, name)
        gaps = compared.gap_train[:, 1:].T
        lines = axes[2].plot(1 + compared.steps[1:], gaps, color=colour, alpha=0.6)
        lines[0].set_label(label)
    axes[2].axhline(np.std(after.y), color="0.3", linestyle=":", label="size of the targets")
    axes[2].set(
        xscale="log",
        yscale="log",
        xlabel="1 + step",
        ylabel="rms difference of outputs",
        title="gap between network and tangent model",
    )
    axes[2].legend()
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw the gaps of all cases together, and the comparison of each."""
    figures = {"gaps": _gaps(results)}
    for name in CASES:
        drawn = plots.comparison(_of(results, name), target_values=results.arrays["target"])
        figures |= {f"{key}_{name}": figure for key, figure in drawn.items()}
    return figures


def conclude(results: Results) -> list[str]:
    """Compare the cases by their gaps, in units of the targets."""
    size = float(np.std(_of(results, "after").y))
    gap = "gap between network and tangent model, training points"
    gaps = {
        name: results.summary[label][gap]["median"] / size for name, (label, _) in CASES.items()
    }
    moved = results.summary["relative movement of the weights in the bad steps"]["median"]
    control, after = (results.summary[CASES[name].label] for name in ("control", "after"))
    ratio = results.config.learning_rate / after["critical learning rate"]["median"]
    return [
        f"The bad steps moved the weights by {100 * moved:.0f} % of their norm (median of "
        f"{results.config.networks} networks). At the bad weights the learning rate is "
        f"{ratio:.2f} times the critical one of the tangent model there.",
        f"The gap between network and tangent model, in units of the targets' size, ends at "
        f"{gaps['control']:.1e} without the bad steps; after them at {gaps['after']:.1e} with the "
        f"anchor at the bad weights and {gaps['before']:.1e} with the anchor before them.",
        "While the network trains, the kernel moves by "
        f"{100 * after['relative kernel change']['median']:.2g} % from the bad weights, and by "
        f"{100 * control['relative kernel change']['median']:.2g} % "
        "without the bad steps (medians).",
    ]
