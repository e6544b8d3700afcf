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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.results import Results, percent, range_of, rows, spread
from experiments.settings import Descent
from lazyjax import plots
from lazyjax.comparison import Comparison, compare_ensemble
from lazyjax.models import from_linen, shallow_mlp
from lazyjax.training import train_ensemble

SECTIONS = "10"
QUICK = {"steps": 200, "networks": 3}


CASES = {  # their labels and colours
    "control": ("control, no bad steps", plots.COLOURS[0]),
    "before": ("anchor before the bad steps", plots.COLOURS[2]),
    "after": ("anchor after the bad steps", plots.COLOURS[1]),
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


def run(config: Config) -> Results:
    """Spoil the weights, then train the networks beside the tangent models at both anchors."""
    data_key, key = jax.random.split(jax.random.key(config.seed))
    data, grid, module = config.dataset(data_key), config.grid(), shallow_mlp(config.width)
    keys = jax.random.split(key, config.networks)
    f, initial = jax.vmap(lambda key: from_linen(module, key, data.x))(keys)
    gentle, violent = optax.sgd(config.learning_rate), optax.sgd(config.bad_learning_rate)
    spoiling = train_ensemble(f, initial, data, violent, steps=config.bad_steps)
    bad = jax.tree.map(jnp.asarray, spoiling.final)

    arrays, summary = {}, {}
    places = {"control": (initial, initial), "before": (bad, initial), "after": (bad, bad)}
    for name, (start, anchor) in places.items():
        compared = compare_ensemble(
            f, start, data, gentle, steps=config.steps, test=grid, anchor=anchor
        )
        arrays |= compared.arrays(f"{name}/")
        summary[CASES[name][0]] = spread(rows(compared))
    moved = range_of(spoiling.weight_movement[:, -1])
    summary["relative movement of the weights in the bad steps"] = moved
    return Results(config=config, arrays=arrays, summary=summary)


def _gaps(cases: dict[str, Comparison]) -> Figure:
    """Draw the functions before and after the bad steps, and the gap in every case."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    for ax, name, when in zip(axes, ("control", "after"), ("before", "after"), strict=False):
        own = cases[name]
        curves = own.models["network"].test[:, 0, :, 0].T
        plots.target(ax, own.test_x, own.test_y)
        ax.plot(own.test_x[:, 0], curves, color=plots.MODELS["network"].colour, alpha=0.5)
        plots.data(ax, own.x, own.y)
        ax.set(title=f"networks {when} the bad steps", xlabel="x", ylabel="f(w, x)")
    for name, own in cases.items():
        label, colour = CASES[name]
        lines = axes[2].plot(1 + own.steps[1:], own.gap_train[:, 1:].T, color=colour, alpha=0.6)
        lines[0].set_label(label)
    size = np.std(cases["after"].y)
    axes[2].axhline(size, color="0.3", linestyle=":", label="size of the targets")
    axes[2].set(xscale="log", yscale="log", xlabel="1 + step", ylabel="rms difference of outputs")
    axes[2].set_title("gap between network and tangent model")
    axes[2].legend()
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw the gaps of all cases together, and the comparison of each."""
    cases = {name: Comparison.of(results.arrays, f"{name}/") for name in CASES}
    return {"gaps": _gaps(cases)} | {
        f"{key}_{name}": figure
        for name, compared in cases.items()
        for key, figure in compared.plot(target=compared.test_y).items()
    }


def conclude(results: Results) -> list[str]:
    """Compare the cases by their gaps, in units of the targets."""
    config, summary = results.config, results.summary
    size = float(np.std(results.arrays["after/y"]))
    control, before, after = (summary[label] for label, _ in CASES.values())
    gap = "gap between network and tangent model, training points"
    gaps = [f"{case[gap]['median'] / size:.1e}" for case in (control, after, before)]
    kernels = [percent(case["relative kernel change"]["median"]) for case in (after, control)]
    moved = summary["relative movement of the weights in the bad steps"]["median"]
    ratio = config.learning_rate / after["critical learning rate"]["median"]
    return [
        f"The bad steps moved the weights by {percent(moved)} of their norm (median of "
        f"{config.networks} networks). At the bad weights the learning rate is {ratio:.2f} times "
        "the critical one of the tangent model there.",
        "The gap between network and tangent model, in units of the targets' size, ends at "
        f"{gaps[0]} without the bad steps; after them at {gaps[1]} with the anchor at the bad "
        f"weights and {gaps[2]} with the anchor before them.",
        f"While the network trains, the kernel moves by {kernels[0]} from the bad weights, and by "
        f"{kernels[1]} without the bad steps (medians).",
    ]
