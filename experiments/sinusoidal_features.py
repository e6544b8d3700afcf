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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from matplotlib.figure import Figure

from experiments.comparison import compare, ensemble, member_summary, range_of, spread
from experiments.results import Results
from experiments.settings import Descent, require_even
from experiments.sinusoidal_figures import (
    BIAS,
    Trained,
    cases,
    draw_functions,
    draw_kernels,
    draw_risk,
    draw_training,
    frequency_label,
    select,
)
from experiments.target_functions import best_periodic, risk_floor
from lazyjax import checks
from lazyjax.comparison import Comparison
from lazyjax.data import TARGETS, excess_risk, make_dataset
from lazyjax.models import Sinusoidal, sinusoidal_features
from lazyjax.types import Params

SECTIONS = "4-7"
QUICK = {"steps": 300, "networks": 3}

GRID = 1001  # ten points a wave of the fastest feature


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
        super().__post_init__()
        checks.whole("n", self.n, least=2)
        checks.whole("number of `frequencies`", len(self.frequencies), least=1)
        checks.positive("frequencies", np.asarray(self.frequencies, np.float64))
        checks.whole("first_k", self.first_k, least=0)
        for name in ("dimension", "wide_dimension", "ensemble_dimension"):
            require_even(name, getattr(self, name))
        checks.whole("networks", self.networks, least=1)
        checks.whole("wide_steps", self.wide_steps, least=1)


@cache  # one object a first k: what was compiled is found again
def padded_model(first_k: int) -> Callable[..., jax.Array]:
    """Make the linear model whose frequency and dimension are arguments.

    Parameters
    ----------
    first_k : int

    Returns
    -------
    callable
        (frequency, used, params, x) -> (N, 1): `models.Sinusoidal` of the dimension 2 used, its
        weights padded with zeros. The features of the padding are 0, so its weights have no
        gradient and stay 0, and neither norms nor kernels see them. One compilation then does for
        every frequency and dimension.
    """

    def f(frequency: jax.Array, used: jax.Array, params: Params, x: jax.Array) -> jax.Array:
        layer = params["output"]
        half = layer["kernel"].shape[0] // 2
        features = sinusoidal_features(
            x, dimension=2 * half, frequency=cast(Any, frequency), first_k=first_k
        )
        inside = jnp.tile(jnp.arange(half) < used, 2)[None]  # the sines, then the cosines
        return jnp.where(inside, features, 0.0) @ layer["kernel"] + layer["bias"][None]

    return f


def pad(params: Params, dimension: int) -> Params:
    """Pad the weights of an ensemble to more features, zeros after the sines and the cosines.

    Parameters
    ----------
    params : pytree
        Of `models.Sinusoidal`, members on axis 0: kernel (E, d, 1), bias (E, 1).
    dimension : int
        d or more.

    Returns
    -------
    pytree
        kernel (E, dimension, 1), bias (E, 1).
    """
    kernel = np.asarray(params["output"]["kernel"])
    members, d = kernel.shape[:2]
    padding = ((0, 0), (0, 0), (0, (dimension - d) // 2), (0, 0))
    padded = np.pad(kernel.reshape(members, 2, d // 2, 1), padding)
    bias = np.asarray(params["output"]["bias"])
    return {"output": {"kernel": padded.reshape(members, dimension, 1), "bias": bias}}


@jax.jit
@jax.vmap
def _weights_to_risks(f: Partial, on_grid: Params, target: Partial) -> jax.Array:
    """Compute the excess risk of each member at each of its recorded parameters."""
    return jax.vmap(lambda w: excess_risk(f, w, target=target))(on_grid)


def _train(
    config: Config, data: Any, dimensions: list[tuple[int, jax.Array, int]], steps: int
) -> Trained:
    """Train models of some (dimension, key, members) at every frequency, as one ensemble."""
    largest = max(dimension for dimension, _, _ in dimensions)
    starts, used = [], []
    for dimension, key, members in dimensions:
        module = Sinusoidal(dimension, first_k=config.first_k)
        starts.append(pad(ensemble(module, key, data.x, members)[1], largest))
        used += [dimension // 2] * members
    times = len(config.frequencies)  # the same initial weights at every frequency
    start = jax.tree.map(lambda *w: np.concatenate(w * times), *starts)
    frequency = np.repeat(np.asarray(config.frequencies, data.x.dtype), len(used))
    f = Partial(padded_model(config.first_k), jnp.asarray(frequency), jnp.asarray(used * times))
    grid_x = jnp.linspace(-1.0, 1.0, GRID, dtype=data.x.dtype)[:, None]
    compared, history = compare(
        f, start, data, learning_rate=config.learning_rate, steps=steps, grid_x=grid_x
    )
    kernels = compared.kernels[:, 0]
    eigenvalues, vectors = np.linalg.eigh(kernels)
    kept = eigenvalues > config.n * np.finfo(kernels.dtype).eps * eigenvalues[:, -1:]
    y = (vectors.swapaxes(1, 2) @ compared.y[None])[..., 0]  # in the eigenbasis
    target = Partial(TARGETS[config.target])

    def drawn(course: Any) -> Any:
        return replace(course, grid=course.grid[:, [0, -1]])  # before and after

    return Trained(
        compared=replace(
            compared,
            network=drawn(compared.network),
            tangent=drawn(compared.tangent),
            closed=drawn(compared.closed),
            kernels=kernels[:, None],  # it stays the same: one is enough
        ),
        risk=np.asarray(_weights_to_risks(f, history.params, target)),
        eigenvalues=eigenvalues,
        rank=np.sum(kept, axis=1),
        least_loss=np.sum(np.where(kept, 0.0, np.square(y)), axis=1) / config.n,
    )


def run(config: Config) -> Results:
    """Train the three models at every frequency, with tangent models and closed forms."""
    data_key, small, wide, many = jax.random.split(jax.random.key(config.seed), 4)
    data = make_dataset(data_key, n=config.n, target=config.target)
    longer = [(config.dimension, small, 1), (config.ensemble_dimension, many, config.networks)]
    groups = {
        "long": _train(config, data, longer, config.steps),
        "short": _train(config, data, [(config.wide_dimension, wide, 1)], config.wide_steps),
    }
    arrays = {}
    for group, trained in groups.items():
        arrays |= trained.arrays(f"{group}/")
    grid_x = jnp.asarray(groups["long"].compared.grid_x)
    arrays["target"] = np.asarray(jax.jit(TARGETS[config.target])(grid_x))
    target, periods = TARGETS[config.target], [2 * math.pi / w for w in config.frequencies]
    arrays["periodic"] = np.stack([best_periodic(target, period, grid_x) for period in periods])
    arrays["floors"] = np.asarray([risk_floor(config.target, period) for period in periods])

    results = Results(config=config, arrays=arrays, summary={})
    for at, frequency in enumerate(config.frequencies):
        rows: dict[str, Any] = {
            "risk floor of all features of this frequency": float(arrays["floors"][at])
        }
        for case in cases(config):
            rows[case.label] = _numbers(select(results, case, at), config)
        results.summary[frequency_label(frequency)] = rows
    return results


def _numbers(trained: Trained, config: Config) -> dict[str, Any]:
    """Give the numbers of a case: plain for one member, median and range for more."""
    compared = trained.compared
    named = {
        "excess risk": trained.risk[:, -1],
        "relative movement of the output bias": compared.network.layer[BIAS][:, -1],
        "least training loss of these features": trained.least_loss,
        "rank of the kernel": trained.rank,
        "learning rate over the critical one": config.learning_rate
        / compared.critical_learning_rate,
        "largest gap between network and tangent model": compared.gap_train.max(axis=1),
    }
    if compared.members == 1:
        return member_summary(compared, 0) | {name: float(v[0]) for name, v in named.items()}
    return spread(compared) | {name: range_of(values) for name, values in named.items()}


def plot(results: Results) -> dict[str, Figure]:
    """Draw functions, training, risk and kernels."""
    return {
        "functions": draw_functions(results),
        "training": draw_training(results),
        "risk": draw_risk(results),
        "kernels": draw_kernels(results),
    }


def conclude(results: Results) -> list[str]:
    """Say how large the gap was, how the movements spread, and what the frequency costs."""
    config = results.config
    small, _, many = cases(config)
    long, short = (Comparison.of(results.arrays, f"{group}/") for group in ("long", "short"))
    gaps = [compared.gap_train.max() for compared in (long, short)]
    closed = [compared.closed_form.gap.max() for compared in (long, short)]
    moved = [compared.kernel_change.max() for compared in (long, short)]
    network = select(results, many, 0).compared.network
    weights, bias = network.movement[:, -1], network.layer[BIAS][:, -1]
    sentences = [
        f"Over all models and recorded steps the gap between network and tangent model is at most "
        f"{max(gaps):.1e}, that between tangent model and closed form {max(closed):.1e}, and the "
        f"kernel moved by {max(moved):.0e}; the weights meanwhile moved by up to "
        f"{long.network.movement.max():.2f} of their norm.",
        f"Over {config.networks} seeds ({frequency_label(config.frequencies[0])}) the relative "
        f"movement of all weights ends between {weights.min():.2f} and {weights.max():.2f}, that "
        f"of the output bias between {bias.min():.2f} and {bias.max():.2f}.",
    ]
    for at, frequency in enumerate(config.frequencies):
        rows = results.summary[frequency_label(frequency)]
        risk = rows[many.label]["excess risk"]
        risk = risk if isinstance(risk, float) else risk["median"]
        least = float(select(results, small, at).least_loss[0])
        loss = rows[small.label]["final loss of the network"]
        floor = rows["risk floor of all features of this frequency"]
        sentences.append(
            f"{frequency_label(frequency)}: the floor under the risk of all such features is "
            f"{floor:.4f}; dimension {config.ensemble_dimension} ends at {risk:.4f} (median). "
            f"Dimension {config.dimension} ends at a training loss of {loss:.1e}, and its features "
            f"allow {least:.1e}."
        )
    return sentences
