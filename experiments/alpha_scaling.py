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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from experiments.comparison import compare, member_summary
from experiments.results import Results
from experiments.settings import Descent
from lazyjax import checks, plots
from lazyjax.checkpoints import load_tree, save_tree
from lazyjax.comparison import Comparison
from lazyjax.data import TARGETS, make_dataset
from lazyjax.kernels import ntk
from lazyjax.metrics import relative_kernel_change
from lazyjax.models import ACTIVATIONS, deep_mlp, from_linen
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import center, linearize, scale
from lazyjax.training import scale_loss, train_ensemble
from lazyjax.types import Dataset, ModelFunction, Params, leaf_names

SECTIONS = "11-14, 16-19"
QUICK = {
    "steps": 300,
    "wide": 16,
    "wide_steps": 300,
    "sweep_steps": 200,
    "sweep_alphas": (1.0, 1e2, 1e3, 1e4, 1e5),
}

FROM = 300.0  # the slopes are fitted from this alpha on


class Distance(NamedTuple):
    """What Theorem 2.2 bounds."""

    label: str
    slope: int  # of its bound, in log alpha


SLOPES = {
    "movement": Distance(r"$\|w - w_0\|$", -1),
    "distance": Distance(r"$\|w - w_{\rm tangent}\|$", -2),
    "gap": Distance("rms gap of the outputs", -1),
    "kernel": Distance("relative kernel change", -1),
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
        for name in ("width", "wide", "wide_steps", "sweep_steps"):
            checks.whole(name, getattr(self, name), least=1)
        for name in ("wide_fraction", "sweep_rate"):
            checks.positive(name, getattr(self, name))
        for name in ("alphas", "wide_alphas", "sweep_alphas"):
            checks.whole(f"number of `{name}`", len(getattr(self, name)), least=1)
            checks.positive(name, getattr(self, name))
        large = len({a for a in self.sweep_alphas if a >= FROM})
        checks.whole(
            f"number of `sweep_alphas` from {FROM:g} on",
            large,
            least=2,
            cure="Add larger ones: the slope is fitted there.",
        )


@partial(jax.jit, static_argnames=("width", "activation"))
def _network(
    key: jax.Array, width: int, x: jax.Array, activation: str = "relu"
) -> tuple[Partial, Params]:
    return from_linen(deep_mlp(width, activation=activation), key, x)


@jax.jit
def _scaled(f: Partial, params: Params, alphas: jax.Array) -> tuple[Partial, Partial, Params]:
    """Give alpha (f - f(w0)), the loss / alpha^2 and w0 for each alpha."""
    models = jax.vmap(lambda a: scale(center(f, params), a))(alphas)
    losses = jax.vmap(partial(scale_loss, optax.losses.squared_error))(alphas)
    start = jax.tree.map(lambda w: jnp.broadcast_to(w, (len(alphas), *w.shape)), params)
    # under vmap an anchor that is the same for all alphas comes out once an alpha
    return models, losses, start


@jax.jit
def _successive(
    f: Partial, loss: Partial, on_grid: Params, data: Dataset, rate: jax.Array
) -> jax.Array:
    """Compute norm(w[t + 1] - w[t]) / norm(w[t + 1]) at the recorded w[t] of one member."""

    def one(params: Params) -> jax.Array:
        gradient = jax.grad(lambda w: jnp.mean(loss(f(w, data.x), data.y)))(params)
        step = optax.tree.scale(rate, gradient)
        return optax.tree.norm(step) / optax.tree.norm(optax.tree.sub(params, step))

    return jax.lax.map(one, on_grid)


@jax.jit
def _measure(
    f: Partial, alpha: jax.Array, w0: Params, network: Params, tangent: Params, x: jax.Array
) -> dict[str, jax.Array]:
    """Compute, for one alpha, the sup over time of what Theorem 2.2 bounds.

    `network` and `tangent` are the recorded weights (G, ...).
    """
    model = scale(center(f, w0), alpha)
    f_lin = linearize(model, w0)
    kernel0 = ntk(f, w0, x)

    def at(pair: tuple[Params, Params]) -> dict[str, jax.Array]:
        w, w_tangent = pair
        return {
            "movement": optax.tree.norm(optax.tree.sub(w, w0)),
            "distance": optax.tree.norm(optax.tree.sub(w, w_tangent)),
            "gap": jnp.sqrt(jnp.mean(jnp.square(model(w, x) - f_lin(w_tangent, x)))),
            "kernel": relative_kernel_change(ntk(f, w, x), kernel0),
        }

    return jax.tree.map(jnp.max, jax.lax.map(at, (network, tangent)))


def _sweep(
    config: Config, f: Partial, params: Params, data: Dataset
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Train a network at every alpha of the sweep, and measure its distances to the tangent model.

    In each precision; both start at the same weights (those of single precision), and both are
    measured against the tangent model of the first.

    Returns the distances (A,), and by precision the alpha where the training warns of rounding.
    """
    params, data = jax.tree.map(lambda a: np.asarray(a, np.float32), (params, data))
    precisions = ("float64", "float32") if config.float64 else ("float32",)
    run: dict[str, Any] = {"steps": config.sweep_steps, "record": 40}
    optimizer = optax.sgd(config.sweep_rate)
    arrays, points, fixed = {}, {}, None
    for precision in precisions:
        cast = partial(jnp.asarray, dtype=precision)
        w0, examples = jax.tree.map(cast, (params, data))
        alphas = jnp.asarray(config.sweep_alphas, precision)
        models, losses, start = _scaled(f, w0, alphas)
        run["loss"] = losses
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            network = train_ensemble(
                models, start, examples, optimizer, label=f"sweep, {precision}", **run
            )
            if fixed is None:
                tangents = jax.vmap(linearize)(models, start)
                tangent = train_ensemble(
                    tangents, start, examples, optimizer, label="sweep, tangent", **run
                )
                fixed = (alphas, w0, tangent.params, examples.x)
        for text in (str(warning.message) for warning in caught):
            found = re.search(r"reaches at alpha = ([0-9.e+-]+[0-9])", text)
            if found is not None:
                points[precision] = float(found[1])
            elif "rounding" not in text:  # the tangent model's warning names no alpha
                warnings.warn(text, UserWarning, stacklevel=2)
        alphas, w0, tangent_params, x = fixed
        weights = jax.tree.map(lambda w, like: w.astype(like.dtype), network.params, w0)
        measured = jax.vmap(_measure, (None, 0, None, 0, 0, None))(
            f, alphas, w0, weights, tangent_params, x
        )
        arrays |= {f"{precision}/{name}": np.asarray(value) for name, value in measured.items()}
    return arrays, points


def _save_and_load(f: ModelFunction, trained: Params, x: jax.Array) -> dict[str, float]:
    """Save a trained network, load it, and compare the outputs bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.npz"
        save_tree(path, trained)
        size = path.stat().st_size
        loaded = load_tree(path, trained)
    before, after = np.asarray(f(trained, x)), np.asarray(f(loaded, x))
    return {
        "size of the file in bytes": float(size),
        "outputs that differ in any bit": float(np.sum(before.view("u1") != after.view("u1"))),
    }


def _parameters(params: Params, trained: Params, alphas: tuple[float, ...]) -> dict:
    """Tabulate name, shape and norm of each leaf, at w0 and after training (E, ...)."""
    table = {}
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True)
    for name, (w0, w) in zip(leaf_names(params), leaves, strict=True):
        row = {"norm at the start": float(np.linalg.norm(w0))}
        for alpha, one in zip(alphas, w, strict=True):
            row[f"norm after training, alpha = {alpha:g}"] = float(np.linalg.norm(one))
        table[f"{name} {tuple(w0.shape)}"] = row
    return table


def _slopes(config: Config, distances: dict[str, np.ndarray]) -> dict[str, float]:
    """Fit the slopes in log alpha, by name of the distance and precision."""
    large = np.array(config.sweep_alphas) >= FROM
    log_alpha = np.log(np.array(config.sweep_alphas)[large])
    return {
        name: float(np.polyfit(log_alpha, np.log(values[large]), 1)[0])
        for name, values in distances.items()
        if np.all(values[large] > 0)  # rounding may have stopped the weights
    }


def _networks(config: Config) -> dict[str, tuple[int, tuple[float, ...]]]:
    """Name the two networks, and give their widths and alphas."""
    return {
        "practical": (config.width, config.alphas),
        "wide": (config.wide, config.wide_alphas),
    }


def run(config: Config) -> Results:
    """Train both networks at every alpha beside their tangent models, and sweep alpha."""
    data_key, *keys, sweep_key = jax.random.split(jax.random.key(config.seed), 4)
    data = make_dataset(data_key, n=config.n, target=config.target)
    grid_x = jnp.linspace(-1.0, 1.0, 201)[:, None]
    arrays = {"target": np.asarray(TARGETS[config.target](grid_x))}
    summary = {}
    for (name, (width, alphas)), key in zip(_networks(config).items(), keys, strict=True):
        f, params = _network(key, width, data.x)
        rate, steps = config.learning_rate, config.steps
        if name == "wide":
            steps = config.wide_steps
            rate = config.wide_fraction * float(critical_learning_rate(ntk(f, params, data.x)))
        scales = jnp.asarray(alphas, data.y.dtype)
        models, losses, start = _scaled(f, params, scales)
        part, history = compare(
            models,
            start,
            data,
            learning_rate=rate,
            steps=steps,
            grid_x=grid_x,
            alphas=scales,
        )
        part = part.scaled(np.square(alphas))  # the error and the kernel of f, not with alpha
        successive = jax.vmap(_successive, (0, 0, 0, None, None))(
            models, losses, history.params, data, jnp.asarray(rate, data.y.dtype)
        )
        for i, alpha in enumerate(alphas):
            numbers = member_summary(part, i) | {"learning rate": rate}
            for model in ("network", "tangent"):
                error = np.mean(np.square(part.models[model].train[i, -1] - part.y))
                numbers[f"share of the variance left, {model}"] = float(error / np.var(part.y))
            summary[f"width {width} ({name}), alpha = {alpha:g}"] = numbers
        if name == "practical":
            summary["parameters"] = _parameters(params, history.final, config.alphas)
            trained = jax.tree.map(lambda w: w[0], history.final)
            summary["save and load"] = _save_and_load(f, trained, grid_x)
        arrays |= part.arrays(f"{name}/")
        arrays[f"{name}/successive_steps"] = np.asarray(successive)

    f, params = _network(sweep_key, config.width, data.x, config.activation)
    distances, points = _sweep(config, f, params, data)
    arrays |= {f"sweep/{name}": value for name, value in distances.items()}
    summary["slopes from alpha = 300 on"] = _slopes(config, distances)
    summary["alpha where rounding takes over"] = points
    return Results(config=config, arrays=arrays, summary=summary)


def _labels(alphas: tuple[float, ...]) -> list[str]:
    return [f"alpha = {alpha:g}" for alpha in alphas]


def _steps(results: Results) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    networks = _networks(results.config)
    for ax, (name, (width, alphas)) in zip(axes, networks.items(), strict=True):
        at = 1 + results.arrays[f"{name}/steps"]
        for i, label in enumerate(_labels(alphas)):
            steps = results.arrays[f"{name}/successive_steps"][i]
            ax.plot(at, steps, color=plots.COLOURS[i % len(plots.COLOURS)], label=label)
        ax.set(xscale="log", yscale="log", xlabel="1 + step", title=f"{name}: width {width}")
        ax.legend()
    axes[0].set_ylabel(r"$\|w_{t+1} - w_t\| \,/\, \|w_{t+1}\|$")
    return figure


def _norms(results: Results) -> Figure:
    table = results.summary["parameters"]
    labels = ["at the start", *(f"after, {label}" for label in _labels(results.config.alphas))]
    figure, ax = plt.subplots(figsize=(8, 0.5 * len(table) + 1.6))
    places = np.arange(len(table))
    colours = ("0.6", *plots.COLOURS)
    for i, label in enumerate(labels):
        values = [list(row.values())[i] for row in table.values()]
        height = 0.8 / len(labels)
        ax.barh(
            places + (i - (len(labels) - 1) / 2) * height,
            values,
            height,
            color=colours[i % len(colours)],
            label=label,
        )
    ax.set_yticks(places, list(table))
    ax.margins(y=0.01)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="norm", title=f"the parameters of the network of width {results.config.width}")
    ax.legend()
    return figure


def _theorem(results: Results) -> Figure:
    config, arrays = results.config, results.arrays
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.4), sharex=True)
    alphas = np.array(config.sweep_alphas)
    look = {"float64": ("o-", plots.COLOURS[0]), "float32": ("s--", plots.COLOURS[1])}
    best = "float64" if config.float64 else "float32"
    points = results.summary["alpha where rounding takes over"]
    for ax, (key, (label, slope)) in zip(axes.flat, SLOPES.items(), strict=True):
        for precision, (line, colour) in look.items():
            if f"sweep/{precision}/{key}" in arrays:
                values = arrays[f"sweep/{precision}/{key}"]
                shown = np.where(values > 0, values, np.nan)
                ax.plot(alphas, shown, line, color=colour, markersize=4, label=precision)
        reference = arrays[f"sweep/{best}/{key}"]
        middle = int(np.argmin(np.abs(np.log(alphas / FROM))))
        ax.plot(
            alphas,
            reference[middle] * (alphas / alphas[middle]) ** slope,
            ":",
            color="black",
            label=f"slope {slope}",
        )
        for precision, point in points.items():
            ax.axvline(
                point, color=look[precision][1], linewidth=1, label=f"{precision}: rounding warning"
            )
        ax.set(xscale="log", yscale="log", title=label)
        ax.legend(loc="lower left")
    for ax in axes[1]:
        ax.set_xlabel("alpha")
    for ax in axes[:, 0]:
        ax.set_ylabel("largest over time")
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw each network by alpha, its successive steps and its norms, and the sweep."""
    figures = {}
    for name, (_, alphas) in _networks(results.config).items():
        part = Comparison.of(results.arrays, f"{name}/")
        drawn = plots.comparison(part, _labels(alphas), target_values=results.arrays["target"])
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
    for name, (width, alphas) in _networks(config).items():
        rows = [summary[f"width {width} ({name}), alpha = {a:g}"] for a in alphas]
        changes = ", ".join(f"{100 * row['relative kernel change']:.2g} %" for row in rows)
        gaps = ", ".join(
            f"{100 * row['the same over the change of the network']:.2g} %" for row in rows
        )
        left = ", ".join(
            f"{100 * row['share of the variance left, network']:.2g} %" for row in rows
        )
        scales = ", ".join(f"{a:g}" for a in alphas)
        sentences.append(
            f"Width {width}, alpha = {scales}: the kernel moved by {changes}; the gap to the "
            f"tangent model is {gaps} of what the network learned; {left} of the variance of the "
            "data is left."
        )
    best = "float64" if config.float64 else "float32"
    slopes = summary["slopes from alpha = 300 on"]
    pairs = [
        f"{name} {slopes[f'{best}/{name}']:.2f} (theorem {slope})"
        for name, (_, slope) in SLOPES.items()
        if f"{best}/{name}" in slopes
    ]
    sentences.append(f"Slopes against alpha in {best}: {', '.join(pairs)}.")
    sentences += [
        f"In {precision} the training warns that rounding takes over at alpha = {point:.1e}."
        for precision, point in summary["alpha where rounding takes over"].items()
    ]
    differing = summary["save and load"]["outputs that differ in any bit"]
    sentences.append(f"Saved and loaded, the network's outputs differ in {differing:.0f} bytes.")
    return sentences
