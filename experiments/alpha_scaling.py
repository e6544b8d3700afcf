"""Does multiplying the output by alpha make a network lazy?

The centred network alpha (f(w, x) - f(w0, x)) is trained with the loss divided by alpha^2, so that
all alphas have one learning rate. Look at the gap to the tangent model and at the kernel: both come
to rest as alpha grows. The practical's network (deep, width 8) is almost constant in x, so that its
lazy limit learns little more than the mean; look at the wide one beside it for a lazy limit that
learns. There the kernel moves in jumps, one for each neuron that crosses its kink at a training
point: a ReLU network of many kinks needs a larger alpha, and ends as a staircase, as its tangent
model is. The last figure holds a sweep of alpha against Theorem 2.2 of Chizat et al., in double and
in single precision: past some alpha float32 measures its own rounding, in the distance to the
tangent weights (alpha^-2) first.

Source: practical, sections 11-14 (alphas 1, 100, 1000; learning rate 0.01 / alpha^2 on the loss
there is 0.01 on the loss / alpha^2 here), 16 (parameters), 17-18 (successive steps), 19 (save and
load); Chizat, Oyallon, Bach 2019, "On lazy training in differentiable programming", Theorem 2.2.
"""

import re
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from experiments.results import Results, percent
from experiments.settings import Descent
from lazyjax import checks, plots
from lazyjax.checkpoints import load_tree, save_tree
from lazyjax.comparison import Comparison, compare
from lazyjax.kernels import ntk
from lazyjax.metrics import relative_kernel_change, tangent_gap
from lazyjax.models import ACTIVATIONS, deep_mlp, from_linen
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import center, linearize, scale
from lazyjax.training import scale_loss, train_ensemble
from lazyjax.types import Dataset, Params, leaf_names

SECTIONS = "11-14, 16-19"
QUICK = {
    "steps": 300,
    "wide": 16,
    "wide_steps": 300,
    "sweep_steps": 200,
    "sweep_alphas": (1.0, 1e2, 1e3, 1e4, 1e5),
}

FROM = 300.0  # the slopes are fitted from this alpha on

SLOPES = {  # of the bounds of Theorem 2.2, in log alpha
    "movement": (r"$\|w - w_0\|$", -1),
    "distance": (r"$\|w - w_{\rm tangent}\|$", -2),
    "gap": ("rms gap of the outputs", -1),
    "kernel": ("relative kernel change", -1),
}


@dataclass(frozen=True, kw_only=True)
class Config(Descent):
    """The practical's own setting, a wide network beside it, and a sweep of alpha."""

    float64: bool = True
    """Whether to compute in double precision: the sweep of alpha needs it."""
    n: int = 10
    """Training points."""
    width: int = 8
    """Units of each of the five hidden layers."""
    alphas: tuple[float, ...] = (1.0, 100.0, 1000.0)
    """Output scales."""
    learning_rate: float = 0.01
    """Step size of gradient descent on the mean squared error / alpha^2."""
    wide: int = 64
    """Units of each hidden layer of the wide network beside it."""
    wide_steps: int = 4000
    """Steps of the wide network."""
    wide_alphas: tuple[float, ...] = (1.0, 100.0, 1000.0, 1e5)
    """Output scales of the wide network."""
    wide_fraction: float = 0.5
    """Learning rate of the wide network, as a fraction of its critical one."""
    activation: str = "tanh"
    """Activation of the network of the sweep, such as relu or tanh; the theorem's is smooth."""
    sweep_alphas: tuple[float, ...] = tuple(float(a) for a in 10 ** np.arange(0, 5.25, 0.5))
    """Output scales of the sweep, two of them at least 300."""
    sweep_rate: float = 0.05
    """Learning rate of the sweep."""
    sweep_steps: int = 2000
    """Steps of the sweep: all alphas have one flow time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("n", self.n, least=2)
        checks.one_of("activation", self.activation, ACTIVATIONS)
        large = len({a for a in self.sweep_alphas if a >= FROM})
        checks.whole(
            f"number of `sweep_alphas` from {FROM:g} on",
            large,
            least=2,
            cure="Add larger ones: the slope is fitted there.",
        )

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those of the sweep, the best one first."""
        return ("float64", "float32") if self.float64 else ("float32",)


@jax.jit
def _successive(
    f: Partial, w0: Params, recorded: Params, alphas: jax.Array, data: Dataset, rate: float
) -> jax.Array:
    """Compute norm(w[t + 1] - w[t]) / norm(w[t + 1]) at the recorded w[t] (E, G, ...)."""

    def loss(w: Params, alpha: jax.Array) -> jax.Array:  # of alpha (f - f(w0)), over alpha^2
        return jnp.mean(jnp.square(f(w, data.x) - f(w0, data.x) - data.y / alpha))

    def size(w: Params, alpha: jax.Array) -> jax.Array:
        step = optax.tree.scale(rate, jax.grad(loss)(w, alpha))
        return optax.tree.norm(step) / optax.tree.norm(optax.tree.sub(w, step))

    return jax.vmap(jax.vmap(size, (0, None)))(recorded, alphas)


def _save_and_load(f: Partial, trained: Params, x: jax.Array) -> dict[str, float]:
    """Save a trained network, load it, and compare the outputs bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.npz"
        save_tree(path, trained)
        size, loaded = path.stat().st_size, load_tree(path, trained)
    before, after = (np.asarray(f(w, x)).view("u1") for w in (trained, loaded))
    return {
        "size of the file in bytes": float(size),
        "outputs that differ in any bit": float(np.sum(before != after)),
    }


def _parameters(w0: Params, trained: Params, alphas: tuple[float, ...]) -> dict:
    """Tabulate name, shape and norm of each leaf, at w0 and after training (E, ...)."""
    columns = ["norm at the start", *(f"norm after training, {a}" for a in _labels(alphas))]
    leaves = zip(leaf_names(w0), jax.tree.leaves(w0), jax.tree.leaves(trained), strict=True)
    table = {}
    for name, start, ends in leaves:
        norms = [float(np.linalg.norm(w)) for w in (start, *ends)]
        table[f"{name} {start.shape}"] = dict(zip(columns, norms, strict=True))
    return table


# --- the sweep


@jax.jit
def _distances(
    f: Partial, w0: Params, alphas: jax.Array, network: Params, tangent: Params, x: jax.Array
) -> dict[str, jax.Array]:
    """Compute, for each alpha, the sup over time of what Theorem 2.2 bounds.

    `network` and `tangent` are the recorded weights (A, G, ...).
    """
    kernel0 = ntk(f, w0, x)

    def at(alpha: jax.Array, w: Params, w_tangent: Params) -> dict[str, jax.Array]:
        model = scale(center(f, w0), alpha)
        return {
            "movement": optax.tree.norm(optax.tree.sub(w, w0)),
            "distance": optax.tree.norm(optax.tree.sub(w, w_tangent)),
            "gap": tangent_gap(model(w, x), linearize(model, w0)(w_tangent, x)),
            "kernel": relative_kernel_change(ntk(f, w, x), kernel0),
        }

    over_time = jax.vmap(jax.vmap(at, (None, 0, 0)))(alphas, network, tangent)
    return jax.tree.map(lambda values: jnp.max(values, axis=1), over_time)


def _trained(
    config: Config, f: Partial, w0: Params, data: Dataset, alphas: jax.Array, tangent: bool = False
) -> tuple[Params, list[float]]:
    """Train at every alpha; give the recorded weights, and where it warns of rounding."""
    models = jax.vmap(lambda alpha: scale(center(f, w0), alpha))(alphas)
    start = jax.tree.map(lambda w: jnp.stack([w] * len(alphas)), w0)
    if tangent:
        models = jax.vmap(linearize)(models, start)
    loss, optimizer = scale_loss(optax.losses.squared_error, alphas), optax.sgd(config.sweep_rate)
    steps, label = config.sweep_steps, f"the sweep in {alphas.dtype}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = train_ensemble(
            models, start, data, optimizer, steps=steps, loss=loss, record=40, label=label
        )
    texts = [str(warning.message) for warning in caught]
    for text in texts:
        if "rounding" not in text:
            warnings.warn(text, UserWarning, stacklevel=2)
    found = re.findall(r"reaches at alpha = ([0-9.e+-]+[0-9])", " ".join(texts))
    return history.params, [float(alpha) for alpha in found]


def _sweep(config: Config, f: Partial, w0: Params, data: Dataset) -> tuple[dict, dict]:
    """Train a network at every alpha of the sweep, and measure its distances to the tangent model.

    In each precision; both start at the same weights (those of single precision), and both are
    measured against the tangent model of the best.

    Returns the distances (A,), and by precision the alpha where the training warns of rounding.
    """
    w0, data = jax.tree.map(lambda a: np.asarray(a, np.float32), (w0, data))
    given = (w0, data, np.asarray(config.sweep_alphas))

    def cast(tree: Any, precision: str) -> Any:
        return jax.tree.map(partial(jnp.asarray, dtype=precision), tree)

    trained = {p: _trained(config, f, *cast(given, p)) for p in config.precisions}
    best = config.precisions[0]
    w0, data, alphas = cast(given, best)
    tangent, _ = _trained(config, f, w0, data, alphas, tangent=True)
    distances = {}
    for precision, (weights, _) in trained.items():
        found = _distances(f, w0, alphas, cast(weights, best), tangent, data.x)
        distances |= {f"{precision}/{name}": np.asarray(values) for name, values in found.items()}
    return distances, {p: alpha for p, (_, told) in trained.items() for alpha in told}


def _slopes(config: Config, distances: dict[str, np.ndarray]) -> dict[str, float]:
    """Fit the slopes in log alpha, by precision and name of the distance."""
    alphas = np.array(config.sweep_alphas)
    large = alphas >= FROM
    return {
        name: float(np.polyfit(np.log(alphas[large]), np.log(values[large]), 1)[0])
        for name, values in distances.items()
        if np.all(values[large] > 0)  # rounding may have stopped the weights
    }


def _networks(config: Config) -> dict[str, tuple[int, tuple[float, ...], int]]:
    """Give widths, alphas and steps of the two networks by name."""
    return {
        "practical": (config.width, config.alphas, config.steps),
        "wide": (config.wide, config.wide_alphas, config.wide_steps),
    }


def _labels(alphas: tuple[float, ...]) -> list[str]:
    return [f"alpha = {alpha:g}" for alpha in alphas]


def run(config: Config) -> Results:
    """Train both networks at every alpha beside their tangent models, and sweep alpha."""
    data_key, *keys, sweep_key = jax.random.split(jax.random.key(config.seed), 4)
    data, grid = config.dataset(data_key), config.grid()
    arrays, summary = {}, {}
    for (name, (width, alphas, steps)), key in zip(_networks(config).items(), keys, strict=True):
        f, w0 = from_linen(deep_mlp(width), key, data.x)
        rate = config.learning_rate
        if name == "wide":
            rate = config.wide_fraction * float(critical_learning_rate(ntk(f, w0, data.x)))
        compared = compare(f, w0, data, optax.sgd(rate), steps=steps, test=grid, alpha=alphas)
        history = compared.histories["network"]
        for i, label in enumerate(_labels(alphas)):
            numbers = compared.numbers(i)
            for model in ("network", "tangent model"):
                left = numbers[f"final loss of the {model}"] / np.var(data.y)
                numbers[f"share of the variance left, {model}"] = float(left)
            summary[f"width {width} ({name}), {label}"] = numbers
        if name == "practical":
            summary["parameters"] = _parameters(w0, history.final, alphas)
            trained = history.member(0).final
            summary["save and load"] = _save_and_load(f, trained, grid.x)
        arrays |= compared.arrays(f"{name}/")
        arrays[f"{name}/successive_steps"] = np.asarray(
            _successive(f, w0, history.params, jnp.asarray(alphas), data, rate)
        )

    f, w0 = from_linen(deep_mlp(config.width, activation=config.activation), sweep_key, data.x)
    distances, points = _sweep(config, f, w0, data)
    arrays |= {f"sweep/{name}": value for name, value in distances.items()}
    summary["slopes from alpha = 300 on"] = _slopes(config, distances)
    summary["alpha where rounding takes over"] = points
    return Results(config=config, arrays=arrays, summary=summary)


def _steps(results: Results) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    networks = _networks(results.config)
    for ax, (name, (width, alphas, _)) in zip(axes, networks.items(), strict=True):
        at, steps = results.arrays[f"{name}/steps"], results.arrays[f"{name}/successive_steps"]
        ax.set_prop_cycle(color=plots.COLOURS)
        ax.plot(1 + at, steps.T, label=_labels(alphas))
        ax.set(xscale="log", yscale="log", xlabel="1 + step", title=f"{name}: width {width}")
        ax.legend()
    axes[0].set_ylabel(r"$\|w_{t+1} - w_t\| \,/\, \|w_{t+1}\|$")
    return figure


def _norms(results: Results) -> Figure:
    table = results.summary["parameters"]
    labels = ["at the start", *(f"after, {label}" for label in _labels(results.config.alphas))]
    figure, ax = plt.subplots(figsize=(8, 0.5 * len(table) + 1.6))
    columns = zip(*(row.values() for row in table.values()), strict=True)
    for i, (norms, label) in enumerate(zip(columns, labels, strict=True)):
        ax.plot(norms, list(table), "sD^v<>"[i % 6], fillstyle="none", markersize=9, label=label)
    ax.invert_yaxis()
    ax.set(xlabel="norm", title=f"the parameters of the network of width {results.config.width}")
    ax.legend()
    return figure


def _theorem(results: Results) -> Figure:
    config, arrays = results.config, results.arrays
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.4), sharex=True)
    alphas = np.array(config.sweep_alphas)
    middle = int(np.argmin(np.abs(np.log(alphas / FROM))))
    look = {"float64": ("o-", plots.COLOURS[0]), "float32": ("s--", plots.COLOURS[1])}
    points, best = results.summary["alpha where rounding takes over"], config.precisions[0]
    for ax, (key, (label, slope)) in zip(axes.flat, SLOPES.items(), strict=True):
        for precision in config.precisions:
            line, colour = look[precision]
            values = arrays[f"sweep/{precision}/{key}"]
            shown = np.where(values > 0, values, np.nan)
            ax.plot(alphas, shown, line, color=colour, markersize=4, label=precision)
        law = arrays[f"sweep/{best}/{key}"][middle] * (alphas / alphas[middle]) ** slope
        ax.plot(alphas, law, ":", color="black", label=f"slope {slope}")
        for precision, point in points.items():
            told = f"{precision}: rounding warning"
            ax.axvline(point, color=look[precision][1], linewidth=1, label=told)
        ax.set(xscale="log", yscale="log", title=label)
        ax.legend(loc="lower left")
    figure.supxlabel("alpha")
    figure.supylabel("largest over time")
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw each network by alpha, its successive steps and its norms, and the sweep."""
    figures = {}
    for name, (_, alphas, _) in _networks(results.config).items():
        compared = Comparison.of(results.arrays, f"{name}/")
        drawn = compared.plot(_labels(alphas), target=compared.test_y)
        for ax in (drawn["training"].axes[1], drawn["layers"].axes[0]):
            # movements fall as 1 / alpha: make room for the smallest
            ax.set_ylim(bottom=ax.get_ylim()[0] * min(alphas) / max(alphas))
        figures |= {f"{name}_{key}": figure for key, figure in drawn.items()}
    return figures | {
        "successive_steps": _steps(results),
        "parameters": _norms(results),
        "theorem": _theorem(results),
    }


def conclude(results: Results) -> list[str]:
    """Say what alpha does to gap and kernel, what the lazy limit learns, where rounding wins."""
    summary, config = results.summary, results.config
    sentences = []
    for name, (width, alphas, _) in _networks(config).items():
        rows = [summary[f"width {width} ({name}), {label}"] for label in _labels(alphas)]
        changes, gaps, left = (
            ", ".join(percent(row[number]) for row in rows)
            for number in (
                "relative kernel change",
                "gap as a share of what was learned",
                "share of the variance left, network",
            )
        )
        sentences.append(
            f"Width {width}, {', '.join(_labels(alphas))}: the kernel moved by {changes}; the gap "
            f"to the tangent model is {gaps} of what the network learned; {left} of the variance "
            "of the data is left."
        )
    slopes, best = summary["slopes from alpha = 300 on"], config.precisions[0]
    pairs = [
        f"{name} {slopes[f'{best}/{name}']:.2f} (theorem {slope})"
        for name, (_, slope) in SLOPES.items()
        if f"{best}/{name}" in slopes
    ]
    differing = summary["save and load"]["outputs that differ in any bit"]
    return [
        *sentences,
        f"Slopes against alpha in {best}: {', '.join(pairs)}.",
        *(
            f"In {precision} the training warns that rounding takes over at alpha = {point:.1e}."
            for precision, point in summary["alpha where rounding takes over"].items()
        ),
        f"Saved and loaded, the network's outputs differ in {differing:.0f} bytes.",
    ]
