"""How wide is infinitely wide?

The practical's two networks, shallow and deep, on points of the unit circle. The kernel of initial
weights is random; in the limit of infinite width it is one function of the angle between two
points, which `infinite` computes. Look at the distance between the two, relative to the limit. With
weights N(0, 1) and factors 1/sqrt(fan_in) in the network (`ntk`) it falls as n^(-1/2) in the width
n: that is the chance of one initialisation, which the circle shows. What training changes of the
kernel falls faster, so that a wide network after training is as near to the limit as before.

The practical's own weights (`pytorch`) tell another story, twice. They are uniform, and the limit
is that of Gaussian weights of the same variances. Where a layer sums over many units that is the
same; the first one sums over two inputs, and the shallow network comes to rest beside the limit:
the mean kernel of the widest is 4 % from it, far more than chance leaves. The deep one comes nearer
and nearer before training, with a kernel that hardly knows the angle; but in learning that kernel
changes by half of itself and more at every width here. In this parametrisation kernels grow with
the width; the limit that they are held against is the leading order at their own width.

Source: an experiment of ours, after Jacot, Gabriel, Hongler 2018, "Neural tangent kernel:
convergence and generalization in neural networks" (figure 1: the kernel on the circle, before and
after training); Dyer and Gur-Ari 2020, "Asymptotics of wide networks from Feynman diagrams" (its
change). Not in the practical, whose networks these are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.results import Results, percent
from experiments.settings import Fit
from lazyjax import checks, plots
from lazyjax.data import TARGETS
from lazyjax.kernels import ntk
from lazyjax.limits import infinite
from lazyjax.models import MLP, deep_mlp, shallow_mlp
from lazyjax.spectrum import critical_learning_rate
from lazyjax.types import Dataset, Params

SECTIONS = ""
QUICK = {
    "parametrizations": ("ntk",),
    "shallow_widths": (16, 1024),
    "deep_widths": (16, 64),
    "seeds": 4,
    "steps": 30,
}

NETWORKS: dict[str, Callable[..., MLP]] = {"shallow": shallow_mlp, "deep": deep_mlp}


class Variances(NamedTuple):
    """Those of the initial weights and biases by fan_in; None where they are 0, not random."""

    kernel: Callable[[int], float | None]
    bias: Callable[[int], float | None]
    draw: Callable[..., jax.Array]  # `(key, shape)`, of variance 1


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5)


VARIANCES = {  # of the rows of lazyjax.models.PARAMETRIZATIONS
    "ntk": Variances(lambda fan_in: 1.0, lambda fan_in: 1.0, jax.random.normal),
    "lecun": Variances(lambda fan_in: 1 / fan_in, lambda fan_in: None, jax.random.normal),
    "pytorch": Variances(
        lambda fan_in: 1 / (3 * fan_in), lambda fan_in: 1 / (3 * fan_in), _uniform
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(Fit):
    """Widths and seeds for two cores and less than three minutes."""

    seed: int = 0
    """Seed of the initial weights."""
    n: int = 32
    """Points on the circle, at equal angles."""
    target: str = "middle"
    """Target function of the angle: simple, middle (continuous on the circle) or complex."""
    parametrizations: tuple[str, ...] = ("ntk", "pytorch")
    """How weights begin: ntk, lecun or pytorch, which is the practical's."""
    shallow_widths: tuple[int, ...] = (16, 256, 4096, 65_536)
    """Hidden units of the shallow networks."""
    deep_widths: tuple[int, ...] = (8, 32, 128, 512)
    """Units of each of the five hidden layers of the deep networks."""
    seeds: int = 8
    """Initialisations of each width."""
    fraction: float = 0.5
    """Learning rate, as a fraction of the critical one of each network."""
    steps: int = 50
    """Steps of full-batch gradient descent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.parametrizations:
            checks.one_of("parametrizations", name, VARIANCES)
        checks.whole("seeds", self.seeds, least=2, cure="A spread needs two seeds or more.")
        for network in NETWORKS:
            name, cure = f"{network}_widths", "A slope needs two widths that differ."
            count = len(set(self.widths(network)))
            checks.whole(f"number of different `{name}`", count, least=2, cure=cure)
        if self.fraction >= 1:
            raise ValueError(
                f"`fraction` must be below 1, got {self.fraction}. Use 0.5: gradient descent on "
                "the tangent model diverges from 2, and the network may from 1 on."
            )

    def widths(self, network: str) -> tuple[int, ...]:
        """Give the widths of a network."""
        return self.shallow_widths if network == "shallow" else self.deep_widths


def circle(config: Config) -> Dataset:
    """Give x = (cos t, sin t) (n, 2) at equal angles t from 0, and the target of t / pi - 1."""
    t = 2 * np.pi * np.arange(config.n) / config.n
    x = jnp.asarray(np.stack([np.cos(t), np.sin(t)], axis=1))
    return Dataset(x, TARGETS[config.target](jnp.asarray(t / np.pi - 1)[:, None]))


def variance(module: MLP, d: int, path: str, shape: Any = None) -> float | None:
    """Give the variance of the entries of a leaf at the start, of a network with d inputs."""
    layer, kind = path.split("/")
    fan_in = d if layer == "hidden_0" else module.widths[-1]
    return getattr(VARIANCES[module.parametrization], kind)(fan_in)


def _apply(module: MLP, w: Params, x: jax.Array) -> Any:
    return module.apply({"params": w}, x)


def _shapes(module: MLP, x: jax.Array) -> Params:
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


def initial_weights(key: jax.Array, module: MLP, x: jax.Array, *, seeds: int) -> Params:
    """Draw as the module does, seeds on axis 0 of every leaf.

    In one draw: the initialisation of the module, a draw a leaf, takes longest of all to compile.
    """
    leaves = jax.tree_util.tree_leaves_with_path(_shapes(module, x))
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    law = VARIANCES[module.parametrization]
    drawn = np.asarray(law.draw(key, (seeds, int(ends[-1]))))
    parts = np.split(drawn, ends[:-1], axis=1)
    weights = []
    for (path, leaf), part in zip(leaves, parts, strict=True):
        own = variance(module, x.shape[1], jax.tree_util.keystr(path, simple=True, separator="/"))
        scaled = part * np.sqrt(own or 0.0).astype(part.dtype)
        weights.append(jnp.asarray(scaled.reshape(seeds, *leaf.shape)))
    return jax.tree.unflatten(jax.tree.structure(_shapes(module, x)), weights)


def limit(module: MLP, x: jax.Array) -> np.ndarray:
    """Compute the infinite-width NTK (N, N) of Gaussian weights of the module's variances.

    In standard parametrisation it is the leading order at the width of the module.
    """
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _shapes(module, x))
    own = partial(variance, module, x.shape[1])
    return np.asarray(infinite(partial(_apply, module), params, x, variance=own).ntk)


@partial(jax.jit, static_argnames="module")
def kernels(params: Params, x: jax.Array, *, module: MLP) -> jax.Array:
    """Compute the kernels (S, N, N) of networks, on axis 0 of every leaf."""
    return jax.lax.map(lambda w: ntk(partial(_apply, module), w, x, reduce="trace"), params)


@partial(jax.jit, static_argnames="module")
def descend(
    params: Params, data: Dataset, rates: jax.Array, steps: int, *, module: MLP
) -> tuple[Params, jax.Array]:
    """Train each network at a rate of its own; give parameters, and losses (S, 2) at both ends."""

    def loss(w: Params) -> jax.Array:
        return jnp.mean(jnp.square(_apply(module, w, data.x) - data.y))

    def member(given: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        w0, rate = given

        def step(_: Any, w: Params) -> Params:
            return optax.tree.add_scale(w, -rate, jax.grad(loss)(w))

        w = jax.lax.fori_loop(0, steps, step, w0)
        return w, jnp.stack([loss(w0), loss(w)])

    return jax.lax.map(member, (params, rates))


def _distances(kernels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute norm(K - L)_F / norm(L)_F of each K (..., N, N)."""
    size = partial(np.linalg.norm, axis=(-2, -1))
    return size(kernels - others) / size(others)


def _rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(values**2, axis=-1))


def slope(widths: tuple[int, ...], values: np.ndarray) -> float:
    """Fit the slope of log rms over the seeds in log width, values (widths, seeds)."""
    return float(np.polyfit(np.log(widths), np.log(_rms(values)), 1)[0])


MEASURES = {  # array, and what is said of it
    "before": "distance from the limit before training",
    "after": "distance from the limit after training",
    "change": "relative kernel change",
}


def _cases(config: Config) -> dict[str, tuple[str, str]]:
    """Give network and parametrization by the name of both."""
    return {f"{net}, {p}": (net, p) for net in NETWORKS for p in config.parametrizations}


def _compare(
    key: jax.Array, config: Config, data: Dataset, module: MLP, theta: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Compare networks of one width with the limit theta; give values a seed, and numbers."""
    params0 = initial_weights(key, module, data.x, seeds=config.seeds)
    before = kernels(params0, data.x, module=module)
    critical = jax.vmap(partial(critical_learning_rate, outputs=1))(before)
    rates = config.fraction * critical
    params, losses = descend(params0, data, rates, config.steps, module=module)
    after = kernels(params, data.x, module=module)
    before, after, losses = map(np.asarray, (before, after, losses))
    mean = before.mean(axis=0)
    scatter = np.linalg.norm(before - mean, axis=(1, 2)) / np.linalg.norm(theta)
    values = {
        "before": _distances(before, theta),
        "after": _distances(after, theta),
        "change": _distances(after, before),
        "rows": before[:, 0] / theta[0, 0],
        "limit": theta[0] / theta[0, 0],
    }
    numbers = {label: float(_rms(values[name])) for name, label in MEASURES.items()}
    numbers |= {
        "distance of the mean kernel": float(_distances(mean, theta)),
        "distance that chance leaves the mean": float(_rms(scatter) / (config.seeds - 1) ** 0.5),
        "median loss before training": float(np.median(losses[:, 0])),
        "median loss after training": float(np.median(losses[:, 1])),
    }
    return values, numbers


def run(config: Config) -> Results:
    """Compare the kernels of every width with their limit, before and after training."""
    data, key = circle(config), jax.random.key(config.seed)
    arrays: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for i, (case, (network, parametrization)) in enumerate(_cases(config).items()):
        widths = config.widths(network)
        modules = [NETWORKS[network](n, parametrization=parametrization) for n in widths]
        keys = jax.random.split(jax.random.fold_in(key, i), len(widths))
        theta, found = limit(modules[0], data.x), []
        for module, own in zip(modules, keys, strict=True):
            if found and parametrization != "ntk":  # which has one limit at all widths
                theta = limit(module, data.x)
            found.append(_compare(own, config, data, module, theta))
        for name in found[0][0]:
            arrays[f"{case}/{name}"] = np.stack([values[name] for values, _ in found])
        slopes = {
            label: slope(widths, arrays[f"{case}/{name}"]) for name, label in MEASURES.items()
        }
        told = zip(widths, found, strict=True)
        summary[case] = {"slopes": slopes, **{f"width {n}": own for n, (_, own) in told}}
    return Results(config=config, arrays=arrays, summary=summary)


def _colours(config: Config) -> dict[str, str]:
    return dict(zip(config.parametrizations, plots.COLOURS[:3], strict=False))


def _law(ax: Axes, widths: np.ndarray, start: float, power: float, line: str, label: str) -> None:
    ax.plot(widths, start * (widths / widths[0]) ** power, line, color="0.4", label=label)


def _errors(results: Results) -> Figure:
    config, arrays, summary = results.config, results.arrays, results.summary
    figure, axes = plt.subplots(2, len(NETWORKS), figsize=(11, 8.4), sharex="col", sharey="row")
    looks = {"before": ("o-", axes[0]), "after": ("s--", axes[0]), "change": ("D-", axes[1])}
    for case, (network, parametrization) in _cases(config).items():
        column, widths = list(NETWORKS).index(network), np.array(config.widths(network))
        for name, (line, row) in looks.items():
            fitted = summary[case]["slopes"][MEASURES[name]]
            when = "" if name == "change" else f", {name} training"
            row[column].plot(
                widths,
                _rms(arrays[f"{case}/{name}"]),
                line,
                color=_colours(config)[parametrization],
                markersize=9 if name == "after" else 5,  # where one lies over the other
                fillstyle="none" if name == "after" else "full",
                label=f"{parametrization}{when}: slope {fitted:.2f}",
            )
    for i, network in enumerate(NETWORKS):
        case, widths = f"{network}, {config.parametrizations[0]}", np.array(config.widths(network))
        starts = [_rms(arrays[f"{case}/{name}"])[0] for name in ("before", "change")]
        _law(axes[0, i], widths, starts[0], -0.5, ":", "slope $-1/2$")
        _law(axes[1, i], widths, starts[1], -0.5, ":", "slope $-1/2$")
        _law(axes[1, i], widths, starts[1], -1.0, "-.", "slope $-1$")
        axes[0, i].set_title(f"{network} network")
        axes[1, i].set_xlabel("width")
    axes[0, 0].set_ylabel("relative distance from the infinite-width NTK")
    axes[1, 0].set_ylabel("relative kernel change in training")
    for ax in axes.flat:
        ax.set(xscale="log", yscale="log")
        ax.legend(loc="lower left", fontsize=8)
    return figure


def _shown(widths: tuple[int, ...]) -> list[int]:
    """Choose the first, a middle and the last width."""
    return sorted({0, len(widths) // 2, len(widths) - 1})


def _kernels(results: Results) -> Figure:
    config, arrays = results.config, results.arrays
    columns = len(config.parametrizations)
    figure, axes = plt.subplots(
        len(NETWORKS),
        columns,
        figsize=(4.2 * columns + 2.0, 7.4),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    turn = config.n // 2  # angles from -pi to pi, both included
    order = np.arange(-turn, turn + 1) % config.n
    angle = np.arange(-turn, turn + 1) * 2 * np.pi / config.n
    for ax, (case, (network, _)) in zip(axes.flat, _cases(config).items(), strict=True):
        widths = config.widths(network)
        for colour, i in zip(plots.COLOURS[3:], _shown(widths), strict=False):
            rows = arrays[f"{case}/rows"][i][:, order]
            low, high = rows.min(axis=0), rows.max(axis=0)
            look: dict[str, Any] = {"color": colour, "alpha": 0.35, "linewidth": 0}
            ax.fill_between(angle, low, high, label=f"width {widths[i]}", **look)
            ax.plot(angle, rows.mean(axis=0), color=colour, linewidth=1.2)
        ax.plot(angle, arrays[f"{case}/limit"][-1][order], "k--", label="limit")
        ax.set(title=case, xticks=np.pi * np.arange(-1, 1.5, 0.5))
        ax.set_xticklabels([r"$-\pi$", r"$-\pi/2$", "0", r"$\pi/2$", r"$\pi$"])
    for ax in axes[-1]:
        ax.set_xlabel("angle between the two points")
    for ax in axes[:, 0]:
        ax.set_ylabel("empirical NTK, limit at angle 0 is 1")
    for ax in axes[:, -1]:
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        ax.legend(title="mean and range\nover seeds", title_fontsize=9, **beside)
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw distances and changes against the width, and kernels on the circle."""
    return {"errors": _errors(results), "circle": _kernels(results)}


def conclude(results: Results) -> list[str]:
    """Say the slopes, how near the widest comes, and whether what is left is chance."""
    sentences = []
    for case, (network, _) in _cases(results.config).items():
        widths, facts = results.config.widths(network), results.summary[case]
        first, last = facts[f"width {widths[0]}"], facts[f"width {widths[-1]}"]
        before, after, change = (facts["slopes"][label] for label in MEASURES.values())
        label, moved = MEASURES["before"], MEASURES["change"]
        sentences.append(
            f"{case}: the distance from the limit is {percent(first[label])} at width {widths[0]} "
            f"and {percent(last[label])} at width {widths[-1]}, with a slope of {before:.2f} "
            f"before training and {after:.2f} after it. Training changes the kernel by "
            f"{percent(first[moved])} and {percent(last[moved])}, slope {change:.2f}. The mean "
            f"kernel of the widest is {percent(last['distance of the mean kernel'])} from the "
            f"limit, where chance leaves "
            f"{percent(last['distance that chance leaves the mean'])}."
        )
    return sentences
