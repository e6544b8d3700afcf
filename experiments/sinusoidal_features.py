"""Does a model that is linear in its parameters ever leave its tangent model?

Sines and cosines of k x, then a linear layer: the tangent model is the model itself, the kernel
never moves, and the closed form knows the training before it begins. Look at the gap to the tangent
model: it is rounding, at every step, while the weights move as far as they like. So lazy is not the
same as still. With 8 features of frequency 2 pi the loss stops early: 15 points are too many
for them (and they are seven with the bias, as k = 0 gives a dead sine and a second bias). With more
features than points it goes on falling, and the weights move less. The kernel of many features is
nearly diagonal: what is learned at one point is no news to the others.

Two traps of the practical are shown beside it. The weight movement that it plots is that of the
output bias, one scalar divided by its own starting value: over ten seeds it spreads far wider than
the movement of all parameters. And features of frequency 2 pi have period 1 on an interval of
length 2. The middle target has middle(x) + middle(x + 1) = 0.2 there, so that the best of all such
models is the constant 0.1, of risk 1/12: more features fit the data, never the target. Frequency
0.2 pi, that of section 24, has no such floor.

Source: practical, sections 4-7 (dimensions 8, 200 and ten times 100; learning rate 0.01).
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from experiments.results import Results, rows, spread
from experiments.settings import Descent, require_even
from experiments.target_functions import best_periodic, risk_floor
from lazyjax import checks, plots
from lazyjax.comparison import Comparison, compare_ensemble
from lazyjax.data import TARGETS, excess_risk
from lazyjax.models import Sinusoidal, from_linen, sinusoidal_features
from lazyjax.types import Dataset, Params

SECTIONS = "4-7"
QUICK = {"steps": 300, "networks": 3}

GRID = 1001  # ten points a wave of the fastest feature
BIAS = "output/bias"


@dataclass(frozen=True, kw_only=True)
class Config(Descent):
    """The practical's own setting, at its frequency and at that of its section 24."""

    frequencies: tuple[float, ...] = (2 * math.pi, 0.2 * math.pi)
    """The features are sin(frequency k x) and cos(frequency k x)."""
    first_k: int = 0
    """First k: 0 as in the practical (a dead sine, a cosine that equals the bias), or 1."""
    dimension: int = 8
    """Features of the small model."""
    wide_dimension: int = 200
    """Features of the large model."""
    ensemble_dimension: int = 100
    """Features of the models from many initialisations."""
    networks: int = 10
    """How many initialisations."""
    steps: int = 10_000
    """Steps of the small model and of the ensemble."""
    wide_steps: int = 100
    """Steps of the large model."""

    def __post_init__(self) -> None:
        for name in ("dimension", "wide_dimension", "ensemble_dimension"):
            require_even(name, getattr(self, name))
        super().__post_init__()
        checks.whole("n", self.n, least=2)


class Case(NamedTuple):
    """One of the practical's three models, trained at every frequency from the same weights."""

    name: str  # the prefix of its arrays
    label: str
    colour: str
    dimension: int
    steps: int
    members: int = 1


def cases(config: Config) -> tuple[Case, Case, Case]:
    """List the three models."""
    small, wide, many = config.dimension, config.wide_dimension, config.ensemble_dimension
    steps, fewer = config.steps, config.wide_steps
    blue, orange, green = plots.COLOURS[:3]
    return (
        Case("small", f"dimension {small}, {steps} steps", blue, small, steps),
        Case("wide", f"dimension {wide}, {fewer} steps", orange, wide, fewer),
        Case("many", f"dimension {many}, seeds", green, many, steps, config.networks),
    )


def select(results: Results, case: Case, at: int) -> tuple[Comparison, np.ndarray]:
    """Give the members of a case at frequency number `at`, and their excess risk (E, G)."""
    own = slice(at * case.members, (at + 1) * case.members)
    compared = Comparison.of(results.arrays, f"{case.name}/").of_members(own)
    return compared, results.arrays[f"{case.name}/risk"][own]


def frequency_label(frequency: float) -> str:
    """Name a frequency in units of pi."""
    return f"frequency {frequency / math.pi:g} π"


def model(first_k: int, frequency: jax.Array, params: Params, x: jax.Array) -> jax.Array:
    """Evaluate `models.Sinusoidal`; the frequency is an array, of which an ensemble has several."""
    kernel, bias = params["output"]["kernel"], params["output"]["bias"]
    features: Any = partial(sinusoidal_features, dimension=len(kernel), first_k=first_k)
    return features(x, frequency=frequency) @ kernel + bias[None]


def _train(config: Config, case: Case, data: Dataset, key: jax.Array) -> dict[str, np.ndarray]:
    """Train a model at every frequency beside its tangent model; give all that is kept of it."""
    module, times = Sinusoidal(case.dimension, first_k=config.first_k), len(config.frequencies)
    keys = jax.random.split(key, case.members)
    _, params = jax.vmap(lambda key: from_linen(module, key, data.x))(keys)
    start = jax.tree.map(lambda w: jnp.concatenate([w] * times), params)
    frequencies = jnp.repeat(jnp.asarray(config.frequencies), case.members)
    f, grid = Partial(partial(model, config.first_k), frequencies), config.grid(GRID)
    optimizer = optax.sgd(config.learning_rate)
    compared = compare_ensemble(f, start, data, optimizer, steps=case.steps, test=grid)

    risk = partial(excess_risk, target=config.target)
    risks = jax.jit(jax.vmap(lambda f, recorded: jax.vmap(partial(risk, f))(recorded)))
    # functions before and after training: those of every step would be many
    ends = {name: replace(m, test=m.test[:, [0, -1]]) for name, m in compared.models.items()}
    arrays = replace(compared, **ends).arrays(f"{case.name}/")
    found = risks(f, compared.histories["network"].params)
    return arrays | {f"{case.name}/risk": np.asarray(found)}


def spectrum(compared: Comparison) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give eigenvalues (E, N) and rank (E,) of the kernels, and the least loss that they allow."""
    kernels = compared.kernels[:, 0]
    values, vectors = np.linalg.eigh(kernels)
    n = len(compared.y)
    kept = values > n * np.finfo(kernels.dtype).eps * values[:, -1:]
    y = (vectors.swapaxes(1, 2) @ compared.y[None])[..., 0]  # in the eigenbasis
    return values, kept.sum(axis=1), np.where(kept, 0.0, y**2).sum(axis=1) / n


def _numbers(compared: Comparison, risk: np.ndarray) -> dict[str, Any]:
    """Give the numbers of a case: plain for one member, median and range for more."""
    rate = compared.learning_rate
    _, rank, least_loss = spectrum(compared)
    named = {
        "excess risk": risk[:, -1],
        "relative movement of the output bias": compared.network.layer[BIAS][:, -1],
        "least training loss of these features": least_loss,
        "rank of the kernel": rank,
        "learning rate over the critical one": rate / compared.critical_learning_rate,
        "largest gap between network and tangent model": compared.gap_train.max(axis=1),
    }
    members = [
        numbers | {name: float(values[i]) for name, values in named.items()}
        for i, numbers in enumerate(rows(compared))
    ]
    return members[0] if len(members) == 1 else spread(members)


def run(config: Config) -> Results:
    """Train the three models at every frequency, with tangent models and closed forms."""
    data_key, *keys = jax.random.split(jax.random.key(config.seed), 4)
    data, grid = config.dataset(data_key), config.grid(GRID)
    periods = [2 * math.pi / frequency for frequency in config.frequencies]
    periodic = [best_periodic(TARGETS[config.target], period, grid.x) for period in periods]
    floors = [risk_floor(config.target, period) for period in periods]
    arrays = {"periodic": np.stack(periodic), "floors": np.asarray(floors)}
    for case, key in zip(cases(config), keys, strict=True):
        arrays |= _train(config, case, data, key)

    results = Results(config=config, arrays=arrays, summary={})
    for at, (frequency, floor) in enumerate(zip(config.frequencies, floors, strict=True)):
        results.summary[frequency_label(frequency)] = {
            "risk floor of all features of this frequency": floor
        } | {case.label: _numbers(*select(results, case, at)) for case in cases(config)}
    return results


def _kernels(results: Results) -> Figure:
    """Draw the kernels, which stay as they are, and their eigenvalues up to the rank."""
    config = results.config
    lines, widths = len(config.frequencies), {"width_ratios": (1, 1, 1, 1.4)}
    size = (14, 3.3 * lines + 0.3)
    figure, axes = plt.subplots(lines, 4, figsize=size, squeeze=False, gridspec_kw=widths)
    for at, (frequency, row) in enumerate(zip(config.frequencies, axes, strict=True)):
        for ax, case in zip(row, cases(config), strict=False):
            compared, _ = select(results, case, at)
            values, rank, _ = spectrum(compared)
            figure.colorbar(ax.imshow(compared.kernels[0, 0]), ax=ax, shrink=0.85)
            ax.grid(visible=False)
            label = f"dimension {case.dimension}"
            ax.set(title=label, xticks=[], yticks=[], xlabel="training points, by x")
            index, largest = 1 + np.arange(rank[0]), values[0, ::-1][: rank[0]]
            row[3].plot(index, largest, "o-", color=case.colour, markersize=4, label=label)
        row[0].set_ylabel(frequency_label(frequency))
        row[3].set(yscale="log", xlabel="index", title="eigenvalues of the kernel, up to its rank")
        row[3].legend()
    return figure


def _risk(results: Results) -> Figure:
    """Draw why a short period has a floor, and the excess risk at every frequency."""
    config, arrays = results.config, results.arrays
    panels = 1 + len(config.frequencies)
    figure, (why, *others) = plt.subplots(1, panels, figsize=(4.6 * panels, 4.0))
    grid, target = arrays["small/test_x"][:, 0], arrays["small/test_y"][:, 0]
    period = 2 * math.pi / config.frequencies[0]
    why.plot(grid, target, "--", color="0.6", label="target(x)")
    joined = grid <= 1 - period
    if np.any(joined):
        shifted = np.interp(grid[joined] + period, grid, target)
        label = f"target(x + {period:g})"
        why.plot(grid[joined], shifted, "--", color=plots.COLOURS[5], label=label)
    best = arrays["periodic"][0][:, 0]
    why.plot(grid, best, "-.", color=plots.COLOURS[3], label="mean of the two")
    why.set(title=f"the best function of period {period:g}", xlabel="x")
    why.legend()
    for at, (ax, frequency) in enumerate(zip(others, config.frequencies, strict=True)):
        if at:
            ax.sharey(others[0])
        for case in cases(config):
            compared, risk = select(results, case, at)
            shade = 1.0 if case.members == 1 else 0.45
            lines = ax.plot(1 + compared.steps, risk.T, color=case.colour, alpha=shade)
            lines[0].set_label(case.label)
        floor = float(arrays["floors"][at])
        if floor > 1e-12:
            ax.axhline(floor, linestyle="-.", color=plots.COLOURS[3], label=f"floor {floor:.3g}")
        ax.set(xscale="log", yscale="log", xlabel="1 + step", ylabel="excess risk")
        ax.set_title(frequency_label(frequency))
        ax.legend()
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw every model by frequency (seeds at the first one), the risk and the kernels."""
    figures = {"risk": _risk(results), "kernels": _kernels(results)}
    for case in cases(results.config):
        compared = Comparison.of(results.arrays, f"{case.name}/")
        labels = [frequency_label(frequency) for frequency in results.config.frequencies]
        if case.members > 1:
            compared, labels = select(results, case, 0)[0], None
        target = compared.test_y
        figures[f"{case.name}_functions"] = plots.functions(compared, labels, target_values=target)
        figures[f"{case.name}_training"] = plots.training(compared, labels)
        figures[f"{case.name}_layers"] = plots.layers(compared, labels)
    return figures


def conclude(results: Results) -> list[str]:
    """Say how large the gap was, how the movements spread, and what the frequency costs."""
    config = results.config
    small, _, many = cases(config)
    every = [Comparison.of(results.arrays, f"{case.name}/") for case in cases(config)]
    gap = max(compared.gap_train.max() for compared in every)
    closed = max(compared.closed_form.gap.max() for compared in every)
    kernel = max(compared.kernel_change.max() for compared in every)
    moved = max(compared.network.movement.max() for compared in every)
    network = select(results, many, 0)[0].network
    weights, bias = network.movement[:, -1], network.layer[BIAS][:, -1]
    sentences = [
        f"Over all models and recorded steps the gap between network and tangent model is at most "
        f"{gap:.1e}, that between tangent model and closed form {closed:.1e}, and the kernel moved "
        f"by {kernel:.0e}; the weights meanwhile moved by up to {moved:.2f} of their norm.",
        f"Over {config.networks} seeds ({frequency_label(config.frequencies[0])}) the relative "
        f"movement of all weights ends between {weights.min():.2f} and {weights.max():.2f}, that "
        f"of the output bias between {bias.min():.2f} and {bias.max():.2f}.",
    ]
    for at, (label, numbers) in enumerate(results.summary.items()):
        risk = np.median(select(results, many, at)[1][:, -1])
        own = numbers[small.label]
        sentences.append(
            f"{label}: the floor under the risk of all such features is "
            f"{numbers['risk floor of all features of this frequency']:.4f}; dimension "
            f"{many.dimension} ends at {risk:.4f} (median). Dimension {small.dimension} ends at a "
            f"training loss of {own['final loss of the network']:.1e}, and its features allow "
            f"{own['least training loss of these features']:.1e}."
        )
    return sentences
