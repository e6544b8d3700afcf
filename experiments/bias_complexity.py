"""Where does the risk of a linear model peak, and why does it fall again?

Linear models of more and more sinusoidal features, on 50 noisy points. Look at the training loss,
which falls with the dimension, and at the risk. Gradient descent for a fixed time, as in the
practical, sees only the foot of the peak: it has fitted only the large eigenvalues by then, and the
sweep ends before the rank is full. The minimum-norm solution shows it. Its risk rises by orders of
magnitude about where the numerical rank of the features reaches the number of points, and falls
again beyond: the second descent.

The features are so nearly dependent that the place of the peak depends on the cut-off of the
pseudo-inverse, so it is stated (1e-6 of the largest singular value), and on the data. That the peak
lies between the first dimension of rank n - 2 and the first of rank n is common, not a law: it
holds for 49 of the 60 data sets that NumPy draws from the seeds 0 to 59, and for 43 of 60 of
`make_dataset` with those keys. The five data sets shown are NumPy's seeds 0 to 4, and it holds for
all five; for the keys 0 to 4 of `make_dataset` it does not for one (key 1). Where it fails, the
peak comes before the rank is near n (all eleven failures among the first 24 of each). That the risk
at dimension 1 000 is more than 1e3 times below the peak held for all 120. `--data-seeds 24` counts
more of NumPy's.

The features are sin(r k x) and cos(r k x), k = 0, 1, .., with a bias, as the practical has them:
the first sine is 0, and the first cosine equals the bias. The norm is the plain Euclidean one of
all weights, the bias among them, so the minimum norm shares a constant equally between the two.
The learning rate 0.1 of the sweep was below the critical one of the last dimension for all of those
120 data sets (the smallest was 0.147); members that diverge are counted all the same. Beside it is
the closed form at a fraction of each dimension's critical rate.

Source: practical, sections 23-27 (dimension 30, 2 000 steps at 0.01; dimensions 2 to 198, ten
initialisations each, 1 000 steps at 0.1), carried on to dimension 1 000.
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from experiments.results import Results
from experiments.settings import Descent, require_even
from lazyjax import plots
from lazyjax.comparison import Comparison, compare
from lazyjax.data import TARGETS, excess_risk
from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk
from lazyjax.models import Sinusoidal, from_linen, sinusoidal_features
from lazyjax.regression import tangent_parameters
from lazyjax.spectrum import critical_learning_rate
from lazyjax.training import train_ensemble
from lazyjax.types import Dataset, Params

SECTIONS = "23-27"
QUICK = {"steps": 200, "inits": 2, "sweep_top": 40, "sweep_steps": 100, "data_seeds": 2}


@dataclass(frozen=True, kw_only=True)
class Config(Descent):
    """The practical's own setting, and the second descent."""

    n: int = 50
    """Training points."""
    noise: float = 0.05
    """Standard deviation of the noise of the targets."""
    frequency: float = 0.2 * math.pi
    """Of the features; 2 pi / frequency is their common period."""
    dimension: int = 30
    """Features of the first model."""
    learning_rate: float = 0.01
    """Step size for the first model, on the mean squared error."""
    steps: int = 2000
    """Steps for the first model."""
    sweep_top: int = 198
    """The last dimension of the practical's sweep; it takes 2, 4, .."""
    inits: int = 10
    """Initialisations for each dimension of the sweep."""
    sweep_rate: float = 0.1
    """Step size of the sweep."""
    sweep_steps: int = 1000
    """Steps of the sweep."""
    fraction: float = 0.5
    """Of the critical learning rate, for the closed form beside the sweep."""
    top: int = 1000
    """The last dimension of the minimum-norm solution."""
    cutoff: float = 1e-6
    """Singular values below that, relative to the largest, count as 0."""
    data_seeds: int = 5
    """Data sets for the minimum-norm solution, drawn by NumPy from `seed`, `seed` + 1, .."""

    def __post_init__(self) -> None:
        for name in ("dimension", "sweep_top", "top"):
            require_even(name, getattr(self, name))
        super().__post_init__()


# --- models of many dimensions in one ensemble, compiled once: features are those of the largest
# dimension, and each member has a mask of its own


def _linear(frequency: float, mask: jax.Array, params: Params, x: jax.Array) -> jax.Array:
    features = sinusoidal_features(x, dimension=len(mask), frequency=frequency)
    return features @ (mask[:, None] * params["kernel"]) + params["bias"][None]


def _masks(dimensions: np.ndarray, top: int) -> np.ndarray:
    k = np.tile(np.arange(top // 2), 2)  # of the sines, then of the cosines
    return (k[None] < dimensions[:, None] // 2).astype(float)


@partial(jax.jit, static_argnames="target")
def _risks(f: Partial, params: Params, target: str) -> jax.Array:
    return jax.vmap(lambda f, w: excess_risk(f, w, target=target))(f, params)


# --- sections 26-27: the sweep


def _members(config: Config, key: jax.Array) -> tuple[Partial, Params]:
    """Give all dimensions and initialisations, one after the other."""
    dimensions = np.repeat(np.arange(2, config.sweep_top + 1, 2), config.inits)
    masks = _masks(dimensions, config.sweep_top)
    size = (len(dimensions), config.sweep_top + 1, 1)
    weights = np.asarray(jax.random.uniform(key, size, minval=-1.0, maxval=1.0))
    weights = weights / np.sqrt(dimensions)[:, None, None]  # PyTorch's start
    params = {"kernel": masks[:, :, None] * weights[:, 1:], "bias": weights[:, 0]}
    return Partial(partial(_linear, config.frequency), masks), params


@partial(jax.jit, static_argnames="steps")
def _closed_forms(
    f: Partial, params: Params, data: Dataset, fraction: float, steps: int
) -> tuple[jax.Array, Params, jax.Array]:
    """Predict loss and weights of every member, at a fraction of its critical learning rate."""

    def member(f: Partial, w: Params) -> tuple[jax.Array, Params, jax.Array]:
        kernel = ntk(f, w, data.x)
        critical = critical_learning_rate(kernel)
        rate, t = fraction * critical, jnp.asarray(steps)
        closed = gradient_descent(kernel, data.y, f(w, data.x), learning_rate=rate)
        moved = tangent_parameters(f, w, data.x, closed.coefficients(t))
        return jnp.mean(jnp.square(closed.train(t) - data.y)), moved, critical

    return jax.vmap(member)(f, params)


def _sweep(config: Config, data: Dataset, key: jax.Array) -> tuple[dict, dict]:
    f, params = _members(config, key)
    with warnings.catch_warnings():  # members may diverge: the figure counts them
        warnings.filterwarnings("ignore", message=".*diverged", category=UserWarning)
        optimizer, steps = optax.sgd(config.sweep_rate), config.sweep_steps
        history = train_ensemble(
            f, params, data, optimizer, steps=steps, record=2, label="the sweep"
        )
    closed_loss, closed, critical = _closed_forms(f, params, data, config.fraction, steps)
    diverged = np.isnan(history.loss[:, -1])
    risk, closed_risk = (_risks(f, w, config.target) for w in (history.final, closed))
    found = {
        "sweep_loss": history.loss[:, -1],
        "sweep_risk": np.where(diverged, np.nan, risk),
        "sweep_diverged": diverged,
        "sweep_critical": critical,
        "closed_sweep_loss": closed_loss,
        "closed_sweep_risk": closed_risk,
    }
    arrays = {name: np.reshape(values, (-1, config.inits)) for name, values in found.items()}
    risks = np.mean(arrays["sweep_risk"], axis=1)
    numbers = {
        "members that diverged": int(diverged.sum()),
        "members": diverged.size,
        "smallest critical learning rate": float(np.min(critical)),
        "mean loss at the last dimension": float(np.mean(arrays["sweep_loss"][-1])),
        "mean risk at the last dimension": float(risks[-1]),
        "smallest mean risk": float(np.min(risks, where=np.isfinite(risks), initial=np.inf)),
    }
    return arrays | {"sweep_dimensions": np.arange(2, config.sweep_top + 1, 2)}, numbers


# --- the second descent: minimum-norm solutions


def _dimensions(top: int) -> np.ndarray:
    """Give even dimensions: all up to 400, then log-spaced."""
    dense = np.arange(2, min(top, 400) + 1, 2)
    sparse = 2 * np.rint(np.geomspace(200, max(top, 400) / 2, 25)).astype(int)
    return np.unique(np.concatenate([dense, sparse[sparse <= top], [top]]))


def _design(x: np.ndarray, dimension: int, frequency: float) -> np.ndarray:
    """Give the features and the constant 1 of the bias, (N, dimension + 1)."""
    r = frequency * np.arange(dimension // 2) * x
    return np.concatenate([np.sin(r), np.cos(r), np.ones_like(x)], axis=1)


def _data_set(config: Config, seed: int) -> Dataset:
    """Draw one of the data sets of the second descent, each from NumPy's generator of its seed."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1.0, 1.0, (config.n, 1))
    clean = np.asarray(TARGETS[config.target](jnp.asarray(x)))
    return Dataset(x, clean + config.noise * rng.normal(size=x.shape))


def _minimum_norm(config: Config, data: Dataset) -> dict[str, np.ndarray]:
    """Solve in every dimension: loss, risk and numerical rank."""
    masks = _masks(_dimensions(config.top), config.top)
    design = _design(data.x, config.top, config.frequency)
    weights = np.zeros((len(masks), config.top + 1, 1))  # 0 beyond a model's own features
    ranks = np.zeros(len(masks), int)
    for i, mask in enumerate(masks):
        own = np.append(mask > 0, True)  # and the bias
        features = design[:, own]
        weights[i, own], _, ranks[i], _ = np.linalg.lstsq(features, data.y, config.cutoff)
    f = Partial(partial(_linear, config.frequency), masks)
    params = {"kernel": weights[:, :-1], "bias": weights[:, -1]}
    return {
        "norm_loss": np.mean((design @ weights - data.y) ** 2, axis=(1, 2)),
        "norm_risk": np.asarray(_risks(f, params, config.target)),
        "norm_rank": ranks,
    }


def _peak(dimensions: np.ndarray, risk: np.ndarray, rank: np.ndarray, n: int) -> dict[str, float]:
    """Say where the risk peaks, and where the rank comes near n and reaches it."""

    def first(reached: np.ndarray) -> int:
        return int(dimensions[np.argmax(reached)]) if reached.any() else -1

    near, full, peak = first(rank >= n - 2), first(rank >= n), int(dimensions[np.argmax(risk)])
    return {
        "dimension of the peak": peak,
        "first dimension with rank n - 2 or more": near,
        "first dimension with rank n": full,
        "the peak lies between": float(near <= peak <= full),
        "risk at the peak": float(risk.max()),
        "risk at the last dimension": float(risk[-1]),
        "peak over last": float(risk.max() / risk[-1]),
    }


def run(config: Config) -> Results:
    """Train one model, sweep the dimensions, and solve for the minimum norm."""
    data_key, model_key, sweep_key = jax.random.split(jax.random.key(config.seed), 3)
    data = config.dataset(data_key, noise=config.noise)
    module = Sinusoidal(config.dimension, frequency=config.frequency)
    f, params = from_linen(module, model_key, data.x)
    optimizer = optax.sgd(config.learning_rate)
    compared = compare(f, params, data, optimizer, steps=config.steps, test=config.grid())
    recorded = compared.histories["network"].params
    risk = np.asarray(jax.jit(jax.vmap(partial(excess_risk, f, target=config.target)))(recorded))
    arrays, sweep = _sweep(config, data, sweep_key)

    dimensions = _dimensions(config.top)
    seeds = range(config.seed, config.seed + config.data_seeds)
    solved = [_minimum_norm(config, _data_set(config, seed)) for seed in seeds]
    arrays |= compared.arrays() | {"risk": risk, "norm_dimensions": dimensions}
    arrays |= {name: np.stack([found[name] for found in solved]) for name in solved[0]}
    one = {"excess risk": float(risk[-1]), "test error": float(risk[-1]) + config.noise**2}
    summary = {f"dimension {config.dimension}": compared.numbers() | one, "sweep": sweep} | {
        f"minimum norm, data seed {seed}": _peak(dimensions, risk, rank, config.n)
        for seed, risk, rank in zip(seeds, arrays["norm_risk"], arrays["norm_rank"], strict=True)
    }
    return Results(config=config, arrays=arrays, summary=summary)


# --- figures


def _risk(results: Results) -> Figure:
    compared, risk = Comparison.of(results.arrays), results.arrays["risk"]
    noise = results.config.noise
    figure, ax = plt.subplots(figsize=(6, 4))
    loss = compared.network.loss[0]
    ax.plot(1 + compared.curve_steps, loss, color=plots.COLOURS[0], label="training loss")
    ax.plot(1 + compared.steps, risk, color=plots.COLOURS[2], label="excess risk")
    told = "final test error (risk + noise$^2$)"
    ax.axhline(risk[-1] + noise**2, linestyle="--", color=plots.COLOURS[3], label=told)
    ax.axhline(noise**2, linestyle=":", color="0.4", label="noise$^2$")
    ax.set(xscale="log", yscale="log", xlabel="1 + step", ylabel="mean squared error")
    ax.set_title(f"dimension {results.config.dimension}: loss and risk")
    ax.legend()
    return figure


def _sweep_figure(results: Results) -> Figure:
    arrays, config = results.arrays, results.config
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    x = arrays["sweep_dimensions"]
    titles = {
        "sweep": f"{config.sweep_steps} steps at learning rate {config.sweep_rate:g}",
        "closed_sweep": f"closed form, {config.fraction:g} of the critical rate",
    }
    kinds = (
        ("loss", plots.COLOURS[0], "-", "training loss"),
        ("risk", plots.COLOURS[2], "--", "excess risk"),
    )
    for ax, (sweep, title) in zip(axes, titles.items(), strict=True):
        for kind, colour, line, label in kinds:
            values = arrays[f"{sweep}_{kind}"].T  # NaN where a member diverged
            ax.plot(x, values.mean(axis=0), line, color=colour, label=label)
            low, high = values.min(axis=0), values.max(axis=0)
            ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.axhline(config.noise**2, linestyle=":", color="0.4", label="noise$^2$")
        ax.set(yscale="log", xscale="log", xlabel="dimension", title=title)
    axes[0].set_ylabel("mean squared error, mean and range")
    axes[1].legend()
    gone = int(arrays["sweep_diverged"].sum())
    if gone:
        axes[0].text(0.03, 0.04, f"{gone} members diverged", transform=axes[0].transAxes)
    return figure


def _second_descent(results: Results) -> Figure:
    arrays, config = results.arrays, results.config
    figure, axes = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(2.2, 1))
    x, sets = arrays["norm_dimensions"], len(arrays["norm_risk"])
    curves = (
        (axes[0], arrays["norm_risk"], plots.COLOURS[2], "excess risk"),
        (axes[0], np.maximum(arrays["norm_loss"], 1e-12), plots.COLOURS[0], "training loss"),
        (axes[1], arrays["norm_rank"], plots.COLOURS[1], "numerical rank"),
    )
    for ax, (first, *others), colour, label in curves:
        ax.plot(x, first, color=colour, label=label)
        for values in others:
            ax.plot(x, values, color=colour, alpha=0.35)
    told, end = "end of the practical's sweep", arrays["sweep_dimensions"][-1]
    for ax in axes:
        ax.axvline(end, linestyle=":", color="0.3", label=told)
    title = f"minimum norm, {sets} data sets (the first one bold), cut-off {config.cutoff:g}"
    axes[0].set(xscale="log", yscale="log", ylabel="mean squared error", title=title)
    axes[0].set_ylim(1e-9, None)
    axes[0].legend(loc="upper left")
    axes[1].axhline(config.n, linestyle=":", color="0.3")
    axes[1].text(x[0], config.n, " points", va="bottom")
    axes[1].set(xlabel="dimension", ylabel="numerical rank", ylim=(0, 1.25 * config.n))
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw one model, the sweep of the practical, and the second descent."""
    compared = Comparison.of(results.arrays)
    return {
        "functions": plots.functions(compared, target_values=compared.test_y),
        "risk": _risk(results),
        "sweep": _sweep_figure(results),
        "second_descent": _second_descent(results),
    }


def conclude(results: Results) -> list[str]:
    """Say what the risk is, and where it peaks."""
    config, summary = results.config, results.summary
    one, sweep = summary[f"dimension {config.dimension}"], summary["sweep"]
    peaks = [v for k, v in summary.items() if k.startswith("minimum norm")]
    places = ", ".join(f"{peak['dimension of the peak']:.0f}" for peak in peaks)
    inside = sum(int(peak["the peak lies between"]) for peak in peaks)
    return [
        f"Dimension {config.dimension}: training loss {one['final loss of the network']:.2e}, "
        f"excess risk {one['excess risk']:.2e}, test error {one['test error']:.2e}. The model is "
        "linear: the gap to its tangent model is "
        f"{one['gap between network and tangent model, test points']:.0e}.",
        f"In the sweep {sweep['members that diverged']} of {sweep['members']} members diverged at "
        f"learning rate {config.sweep_rate:g}; the smallest critical rate is "
        f"{sweep['smallest critical learning rate']:.3f}.",
        f"The minimum-norm risk peaks at dimension {places} for the {len(peaks)} data sets, "
        f"{inside} of them between the first dimension of numerical rank {config.n - 2} and the "
        f"first of rank {config.n}; at dimension {config.top} it is at least "
        f"{min(peak['peak over last'] for peak in peaks):.1e} times smaller.",
    ]
