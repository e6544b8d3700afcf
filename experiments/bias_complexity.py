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

from experiments.comparison import compare, member_summary
from experiments.results import Results
from experiments.settings import Descent, require_even
from lazyjax import checks, plots
from lazyjax.comparison import Comparison
from lazyjax.data import TARGETS, excess_risk, make_dataset
from lazyjax.dynamics import gradient_descent
from lazyjax.models import Sinusoidal, from_linen, sinusoidal_features
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
        super().__post_init__()
        for name in ("inits", "sweep_steps", "data_seeds"):
            checks.whole(name, getattr(self, name), least=1)
        for name in ("dimension", "sweep_top", "top"):
            require_even(name, getattr(self, name))
        for name in ("frequency", "sweep_rate", "fraction", "cutoff"):
            checks.positive(name, getattr(self, name))
        checks.not_negative("noise", self.noise)


# --- sections 23-25: one model


def _one_model(
    config: Config, data: Dataset, key: jax.Array
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    f, params = from_linen(Sinusoidal(config.dimension, frequency=config.frequency), key, data.x)
    start = jax.tree.map(lambda w: w[None], params)
    grid_x = jnp.linspace(-1.0, 1.0, 201)[:, None]
    compared, history = compare(
        f,
        start,
        data,
        learning_rate=config.learning_rate,
        steps=config.steps,
        grid_x=grid_x,
    )
    of_target = partial(excess_risk, f, target=config.target)
    on_grid = jax.tree.map(lambda w: w[0], history.params)
    risk = np.asarray(jax.jit(lambda w: jax.lax.map(of_target, w))(on_grid))
    target = np.asarray(TARGETS[config.target](grid_x))
    numbers = member_summary(compared, 0)
    numbers["excess risk"] = float(risk[-1])
    numbers["test error"] = numbers["excess risk"] + config.noise**2
    return compared.arrays() | {"risk": risk[None], "target": target}, numbers


# --- sections 26-27: the sweep. Features are padded to the largest dimension, and each member has a
# mask of those that it has: one ensemble, compiled once.


def _masked(mask: jax.Array, params: Params, features: jax.Array) -> jax.Array:
    y = features @ (mask[:, None] * params["kernel"])
    return y + jnp.broadcast_to(params["bias"], y.shape)


def _members(config: Config, key: jax.Array) -> tuple[np.ndarray, Params]:
    """Give masks and initial weights of all dimensions and initialisations, one after the other."""
    dimensions = np.repeat(np.arange(2, config.sweep_top + 1, 2), config.inits)
    k = np.tile(np.arange(config.sweep_top // 2), 2)  # of the sines, then of the cosines
    masks = (k[None] < dimensions[:, None] // 2).astype(float)
    size = (len(dimensions), config.sweep_top + 1, 1)
    weights = np.asarray(jax.random.uniform(key, size, minval=-1.0, maxval=1.0))
    weights = weights / np.sqrt(dimensions)[:, None, None]  # PyTorch's start
    kernel = masks[:, :, None] * weights[:, 1:]
    return masks, {"kernel": kernel, "bias": weights[:, 0]}


@partial(jax.jit, static_argnames=("target", "dimension", "frequency"))
def _risks(
    masks: jax.Array, params: Params, target: str, dimension: int, frequency: float
) -> jax.Array:
    def risk(mask: jax.Array, params: Params) -> jax.Array:
        def f(params: Params, x: jax.Array) -> jax.Array:
            features = sinusoidal_features(x, dimension=dimension, frequency=frequency)
            return _masked(mask, params, features)

        return excess_risk(f, params, target=target)

    return jax.vmap(risk)(masks, params)


@partial(jax.jit, static_argnames=("steps",))
def _closed_forms(
    masks: jax.Array, params: Params, data: Dataset, fraction: float, steps: int
) -> tuple[jax.Array, Params, jax.Array]:
    """Predict every member at a fraction of its critical learning rate."""

    def member(mask: jax.Array, params: Params) -> tuple[jax.Array, Params, jax.Array]:
        features = data.x * mask[None]
        kernel = features @ features.T + 1  # and the bias
        critical = critical_learning_rate(kernel, outputs=1)
        closed = gradient_descent(
            kernel, data.y, _masked(mask, params, data.x), learning_rate=fraction * critical
        )
        a = closed.coefficients(jnp.asarray(steps))
        moved = {
            "kernel": params["kernel"] + features.T @ a,
            "bias": params["bias"] + jnp.sum(a, axis=0),
        }
        return jnp.mean(jnp.square(closed.train(jnp.asarray(steps)) - data.y)), moved, critical

    return jax.vmap(member)(masks, params)


def _least(values: np.ndarray) -> float:
    """Give the least of the finite values, infinity where there is none."""
    return float(np.min(values, where=np.isfinite(values), initial=np.inf))


def _sweep(config: Config, data: Dataset, key: jax.Array) -> tuple[dict, dict]:
    features = {"dimension": config.sweep_top, "frequency": config.frequency}
    padded = Dataset(sinusoidal_features(data.x, **features), data.y)
    masks, params = _members(config, key)
    with warnings.catch_warnings():  # members may diverge: the figure counts them
        warnings.filterwarnings("ignore", message=".*diverged", category=UserWarning)
        history = train_ensemble(
            Partial(_masked, masks),
            params,
            padded,
            optax.sgd(config.sweep_rate),
            steps=config.sweep_steps,
            record=2,
            label="sweep over dimensions",
        )
    closed_loss, closed, critical = _closed_forms(
        masks, params, padded, config.fraction, config.sweep_steps
    )
    by_dimension = (-1, config.inits)
    arrays = {
        "sweep_dimensions": np.arange(2, config.sweep_top + 1, 2),
        "sweep_loss": history.loss[:, -1],
        "sweep_risk": _risks(masks, history.final, target=config.target, **features),
        "closed_sweep_loss": closed_loss,
        "closed_sweep_risk": _risks(masks, closed, target=config.target, **features),
        "sweep_critical": critical,
    }
    arrays = {
        name: np.asarray(a) if name == "sweep_dimensions" else np.asarray(a).reshape(by_dimension)
        for name, a in arrays.items()
    }
    marks = history.diverged_at if isinstance(history.diverged_at, tuple) else ()
    diverged = np.array([t is not None for t in marks]).reshape(by_dimension)
    arrays["sweep_risk"] = np.where(diverged, np.nan, arrays["sweep_risk"])
    arrays["sweep_diverged"] = diverged
    numbers = {
        "members that diverged": int(diverged.sum()),
        "members": int(diverged.size),
        "smallest critical learning rate": float(arrays["sweep_critical"].min()),
        "mean loss at the last dimension": float(np.mean(arrays["sweep_loss"][-1])),
        "mean risk at the last dimension": float(np.mean(arrays["sweep_risk"][-1])),
        "smallest mean risk": _least(np.mean(arrays["sweep_risk"], axis=1)),
    }
    return arrays, numbers


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
    """Solve by the pseudo-inverse in every dimension: loss, risk and numerical rank."""
    x, y = np.asarray(data.x), np.asarray(data.y)
    dimensions = _dimensions(config.top)
    design = _design(x, config.top, config.frequency)
    k = np.tile(np.arange(config.top // 2), 2)  # of the sines, then of the cosines
    masks = k[None] < dimensions[:, None] // 2
    weights = np.zeros((len(dimensions), config.top + 1, 1))  # 0 beyond a model's own features
    losses, ranks = [], []
    for mask, w in zip(masks, weights, strict=True):
        own = np.append(mask, True)  # and the bias
        u, s, vt = np.linalg.svd(design[:, own], full_matrices=False)
        kept = s > config.cutoff * s[0]
        w[own] = vt[kept].T @ ((u[:, kept].T @ y) / s[kept, None])
        losses.append(np.mean((design @ w - y) ** 2))
        ranks.append(np.sum(kept))
    params = {"kernel": weights[:, :-1], "bias": weights[:, -1]}
    risks = _risks(
        masks.astype(float),
        params,
        target=config.target,
        dimension=config.top,
        frequency=config.frequency,
    )
    return {
        "norm_loss": np.array(losses),
        "norm_risk": np.asarray(risks),
        "norm_rank": np.array(ranks),
    }


def _peak(dimensions: np.ndarray, found: dict[str, np.ndarray], n: int) -> dict[str, float]:
    """Say where the risk peaks, and where the rank comes near n and reaches it."""
    risk, rank = found["norm_risk"], found["norm_rank"]
    near, full = rank >= n - 2, rank >= n
    first_near = int(dimensions[np.argmax(near)]) if near.any() else -1
    first_full = int(dimensions[np.argmax(full)]) if full.any() else -1
    peak = int(dimensions[np.argmax(risk)])
    return {
        "dimension of the peak": peak,
        "first dimension with rank n - 2 or more": first_near,
        "first dimension with rank n": first_full,
        "the peak lies between": float(first_near <= peak <= first_full),
        "risk at the peak": float(risk.max()),
        "risk at the last dimension": float(risk[-1]),
        "peak over last": float(risk.max() / risk[-1]),
    }


def run(config: Config) -> Results:
    """Train one model, sweep the dimensions, and solve for the minimum norm."""
    data_key, model_key, sweep_key = jax.random.split(jax.random.key(config.seed), 3)
    data = make_dataset(data_key, n=config.n, noise=config.noise, target=config.target)
    arrays, numbers = _one_model(config, data, model_key)
    swept, sweep_numbers = _sweep(config, data, sweep_key)
    summary = {f"dimension {config.dimension}": numbers, "sweep": sweep_numbers}

    dimensions = _dimensions(config.top)
    seeds = range(config.seed, config.seed + config.data_seeds)
    solved = [_minimum_norm(config, _data_set(config, seed)) for seed in seeds]
    for seed, found in zip(seeds, solved, strict=True):
        summary[f"minimum norm, data seed {seed}"] = _peak(dimensions, found, config.n)
    arrays |= swept | {"norm_dimensions": dimensions}
    arrays |= {name: np.stack([found[name] for found in solved]) for name in solved[0]}
    return Results(config=config, arrays=arrays, summary=summary)


# --- figures


def _fit(results: Results) -> Figure:
    arrays, config = results.arrays, results.config
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    compared = Comparison.of(arrays)
    grid = compared.grid_x
    plots.target(axes[0], grid, arrays["target"])
    for model, own in compared.models.items():
        label, line, colour = plots.MODELS[model]
        label = "linear model" if model == "network" else label
        axes[0].plot(grid[:, 0], own.grid[0, -1, :, 0], line, color=colour, label=label)
    plots.data(axes[0], compared.x, compared.y)
    axes[0].set(title=f"dimension {config.dimension}, after training", xlabel="x", ylabel="f(w, x)")
    axes[0].legend()
    at, loss = 1 + compared.curve_steps, compared.network.loss[0]
    axes[1].plot(at, loss, color=plots.COLOURS[0], label="training loss")
    risk = arrays["risk"][0]
    axes[1].plot(1 + compared.steps, risk, color=plots.COLOURS[2], label="excess risk")
    error = risk[-1] + config.noise**2
    axes[1].axhline(
        error, linestyle="--", color=plots.COLOURS[3], label="final test error (risk + noise$^2$)"
    )
    axes[1].axhline(config.noise**2, linestyle=":", color="0.4", label="noise$^2$")
    axes[1].set(
        xscale="log", yscale="log", xlabel="1 + step", ylabel="mean squared error",
        title="loss and risk",
    )  # fmt: skip # to be read as a table
    axes[1].legend()
    return figure


def _draw_band(ax, x: np.ndarray, values: np.ndarray, colour: str, label: str, line: str) -> None:
    """Draw the mean over axis 1 and the range, where every member is finite."""
    ax.plot(x, values.mean(axis=1), line, color=colour, label=label)
    ax.fill_between(x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2, linewidth=0)


def _sweep_figure(results: Results) -> Figure:
    arrays, config = results.arrays, results.config
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    x = arrays["sweep_dimensions"]
    titles = (
        f"{config.sweep_steps} steps at learning rate {config.sweep_rate:g}",
        f"closed form, {config.fraction:g} of the critical rate",
    )
    for ax, prefix, title in zip(axes, ("sweep", "closed_sweep"), titles, strict=True):
        _draw_band(ax, x, arrays[f"{prefix}_loss"], plots.COLOURS[0], "training loss", "-")
        _draw_band(ax, x, arrays[f"{prefix}_risk"], plots.COLOURS[2], "excess risk", "--")
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
    x = arrays["norm_dimensions"]
    for i, (risk, loss) in enumerate(zip(arrays["norm_risk"], arrays["norm_loss"], strict=True)):
        first = i == 0
        axes[0].plot(x, risk, color=plots.COLOURS[2], alpha=1 if first else 0.35,
                     label="excess risk" if first else None)  # fmt: skip # to be read as a table
        axes[0].plot(x, np.maximum(loss, 1e-12), color=plots.COLOURS[0], alpha=1 if first else 0.35,
                     label="training loss" if first else None)  # fmt: skip # to be read as a table
    sweep_end = arrays["sweep_dimensions"][-1]
    axes[0].axvline(sweep_end, linestyle=":", color="0.3", label="end of the practical's sweep")
    axes[0].set(xscale="log", yscale="log", ylabel="mean squared error", ylim=(1e-9, None))
    axes[0].set_title(
        f"minimum norm, {len(arrays['norm_risk'])} data sets (the first one bold), "
        f"cut-off {config.cutoff:g}"
    )
    axes[0].legend(loc="upper left")
    for i, rank in enumerate(arrays["norm_rank"]):
        axes[1].plot(x, rank, color=plots.COLOURS[1], alpha=1 if i == 0 else 0.35)
    axes[1].axhline(config.n, linestyle=":", color="0.3")
    axes[1].axvline(sweep_end, linestyle=":", color="0.3")
    axes[1].set(xlabel="dimension", ylabel="numerical rank")
    axes[1].text(x[0], config.n, " points", va="bottom")
    axes[1].set_ylim(0, 1.25 * config.n)
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw one model, the sweep of the practical, and the second descent."""
    return {
        "one_model": _fit(results),
        "sweep": _sweep_figure(results),
        "second_descent": _second_descent(results),
    }


def conclude(results: Results) -> list[str]:
    """Say what the risk is, and where it peaks."""
    one = results.summary[f"dimension {results.config.dimension}"]
    sweep = results.summary["sweep"]
    peaks = [v for k, v in results.summary.items() if k.startswith("minimum norm")]
    inside = sum(int(peak["the peak lies between"]) for peak in peaks)
    places = [f"{peak['dimension of the peak']:.0f}" for peak in peaks]
    fall = min(peak["peak over last"] for peak in peaks)
    return [
        f"Dimension {results.config.dimension}: training loss "
        f"{one['final loss of the network']:.2e}, excess risk {one['excess risk']:.2e}, test error "
        f"{one['test error']:.2e}. The model is linear: the gap to its tangent model is "
        f"{one['gap between network and tangent model, grid']:.0e}.",
        f"In the sweep {sweep['members that diverged']} of {sweep['members']} members diverged at "
        f"learning rate {results.config.sweep_rate:g}; the smallest critical rate is "
        f"{sweep['smallest critical learning rate']:.3f}.",
        f"The minimum-norm risk peaks at dimension {', '.join(places)} for the "
        f"{len(peaks)} data sets, {inside} of them between the first dimension of numerical rank "
        f"{results.config.n - 2} and the first of rank {results.config.n}; at dimension "
        f"{results.config.top} it is at least {fall:.1e} times smaller.",
    ]
