"""Does the metric of the wave function find a ground state that its gradient alone does not?

The transverse-field Ising chain of 16 spins at its critical point, periodic,
H = -sum_i Z_i Z_(i+1) - h sum_i X_i. An RBM and a small network are log psi, with real parameters,
as the ground state is positive. Each is trained by variational Monte Carlo three times: by
stochastic reconfiguration in the small system of the samples (minSR), by the same with the momentum
of SPRING, and by plain gradient descent. Look at where the curves cross the dotted line, a relative
error of the energy of 1e-4: both natural gradients get there, SPRING first, and plain gradient
descent, which may begin as fast, is left with what the large eigenvalues of the kernel do not see.
Momentum fills in what a batch of samples misses, and carries the noise of earlier ones: with 0.8 in
the place of 0.6 the FFN may end above 1e-4.

Samples are drawn from |psi|^2 itself, independent: the 65 536 configurations can be enumerated. A
larger chain needs a Markov chain in the place of `sample`. The energy in the figure is the exact
expectation value, without the noise of samples, and the exact ground energy that of free fermions.

Source: an experiment of ours, after Carleo and Troyer 2017, "Solving the quantum many-body problem
with artificial neural networks"; Chen and Heyl 2024 (minSR); Goldshlager, Abrahamsen and Lin 2024
(SPRING); Pfeuty 1970, "The one-dimensional Ising model with a transverse field". Not in the
practical.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.results import Results
from experiments.settings import Settings
from lazyjax import checks, plots
from lazyjax.natural import natural_gradient
from lazyjax.types import Params

SECTIONS = ""
QUICK = {"sites": 8, "hidden": 16, "widths": (8, 8), "samples": 128, "steps": 80}

METHODS = ("minSR", "SPRING", "gradient descent")
GOAL = 1e-4  # relative error of the energy
LAST = 20  # steps that the final error is the median of


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Sizes for two cores and a minute."""

    seed: int = 0
    """Seed of the initial weights and of the samples."""
    sites: int = 16
    """Spins of the chain, an even number: all 2^sites configurations are enumerated."""
    field: float = 1.0
    """The transverse field h, in units of the coupling; the chain is critical at 1."""
    networks: tuple[str, ...] = ("RBM", "FFN")
    """Which wave functions."""
    hidden: int = 32
    """Hidden units of the RBM."""
    widths: tuple[int, int] = (16, 16)
    """Hidden units of the FFN's two layers."""
    samples: int = 512
    """Configurations that are drawn at each step."""
    steps: int = 180
    """Steps of each training."""
    learning_rate: float = 0.05
    """Of the natural gradients: a step of imaginary time."""
    damping: float = 1e-3
    """Added to the kernel of the samples, whose means are taken away."""
    momentum: float = 0.6
    """Of SPRING."""
    descent_rate: float = 0.1
    """Of plain gradient descent on half of the energy."""

    def __post_init__(self) -> None:
        checks.whole("sites", self.sites, least=4)
        if self.sites % 2 or self.sites > 20:
            raise ValueError(
                f"`sites` must be even and at most 20, got {self.sites}. Use 16: all 2^sites "
                "configurations are enumerated."
            )
        for name in ("hidden", "steps"):
            checks.whole(name, getattr(self, name), least=1)
        checks.whole("samples", self.samples, least=2)
        checks.whole("number of `networks`", len(self.networks), least=1)
        for name in self.networks:
            checks.one_of("networks", name, NETWORKS)
        if len(self.widths) != 2:
            raise ValueError(f"`widths` must be of 2 layers, got {len(self.widths)}. Use (16, 16).")
        for width in self.widths:
            checks.whole("widths", width, least=1)
        for name in ("field", "learning_rate", "damping", "momentum", "descent_rate"):
            checks.positive(name, getattr(self, name))


# --- the chain ------------------------------------------------------------------------------------


def configurations(sites: int) -> np.ndarray:
    """Give all spins, +1 and -1 (2^sites, sites): spin i is bit i of the row's number."""
    return 1.0 - 2.0 * (np.arange(2**sites)[:, None] >> np.arange(sites) & 1)


def ground_energy(sites: int, field: float) -> float:
    """Give the exact ground energy of an even chain, by free fermions (Pfeuty 1970).

    E = - sum_k sqrt(1 + h^2 - 2 h cos k),  k = (2 m + 1) pi / sites
    """
    k = np.pi * (2 * np.arange(sites) + 1) / sites
    return -float(np.sum(np.sqrt(1 + field**2 - 2 * field * np.cos(k))))


def local_energies(log_psi: jax.Array, x: jax.Array, field: float) -> jax.Array:
    """Give (H psi)(s) / psi(s) at all configurations.

    Parameters
    ----------
    log_psi : (2^sites,)
        Real, in the order of `configurations`.
    x : (2^sites, sites)
    field : float

    Returns
    -------
    array (2^sites,)
    """
    psi = jnp.exp(log_psi - log_psi.max())
    flipped = jnp.zeros_like(psi)
    for i in range(x.shape[1]):  # another bit i in the row's number
        flipped += jnp.flip(psi.reshape(-1, 2, 2**i), 1).reshape(-1)
    return -jnp.sum(x * jnp.roll(x, 1, axis=1), axis=1) - field * flipped / psi


# --- wave functions -------------------------------------------------------------------------------


def _log_cosh(z: jax.Array) -> jax.Array:
    size = jnp.abs(z)
    return size + jnp.log1p(jnp.exp(-2 * size)) - math.log(2)


def _dense(w: Params, x: jax.Array) -> jax.Array:
    return x @ w["kernel"] + w["bias"][None]


def _layer(key: jax.Array, d_in: int, d_out: int, deviation: float) -> Params:
    return {"kernel": deviation * jax.random.normal(key, (d_in, d_out)), "bias": jnp.zeros(d_out)}


def rbm(w: Params, x: jax.Array) -> jax.Array:
    """Give sum_j log cosh (x W + b)_j (N,), the hidden units summed over."""
    return jnp.sum(_log_cosh(_dense(w, x)), axis=1)


def ffn(w: Params, x: jax.Array) -> jax.Array:
    """Give log psi (N,) of two hidden layers; without biases that of -x is the same."""
    z = jnp.tanh(_dense(w["1"], _log_cosh(_dense(w["0"], x))))
    return z @ w["2"]


def _rbm(key: jax.Array, config: Config) -> Params:
    return _layer(key, config.sites, config.hidden, 0.1)


def _ffn(key: jax.Array, config: Config) -> Params:
    first, second, last = jax.random.split(key, 3)
    a, b = config.widths
    return {
        "0": _layer(first, config.sites, a, config.sites**-0.5),
        "1": _layer(second, a, b, a**-0.5),
        "2": jax.random.normal(last, (b,)) * b**-0.5,
    }


NETWORKS: dict[str, tuple[Callable[..., jax.Array], Callable[..., Params]]] = {
    "RBM": (rbm, _rbm),
    "FFN": (ffn, _ffn),
}

# --- training -------------------------------------------------------------------------------------


def sample(key: jax.Array, probabilities: jax.Array, n: int) -> jax.Array:
    """Draw n configurations by their numbers, independent."""
    return jax.random.choice(key, len(probabilities), (n,), p=probabilities)


def train(f: Any, params0: Params, keys: jax.Array, method: str, config: Config) -> jax.Array:
    """Give the energy before each step, a key a step.

    Parameters
    ----------
    f : ModelFunction
        log psi (N,).
    params0 : pytree
    keys : (steps,)
    method : str
        A row of `METHODS`.
    config : Config

    Returns
    -------
    array (steps,)
    """
    x = jnp.asarray(configurations(config.sites))
    rate = config.descent_rate if method == "gradient descent" else config.learning_rate

    def update(params: Params, previous: Params, drawn: jax.Array, residual: jax.Array) -> Params:
        if method == "gradient descent":
            (gradient,) = jax.vjp(lambda w: f(w, drawn), params)[1](residual / len(residual))
            return gradient
        spring: dict[str, Any] = {}
        if method == "SPRING":
            spring = {"momentum": config.momentum, "previous": previous}
        return natural_gradient(
            f, params, drawn, residual, damping=config.damping, center=True, **spring
        )

    def step(state: tuple[Params, Params], key: jax.Array) -> tuple[Any, jax.Array]:
        params, previous = state
        log_psi = f(params, x)
        energies = local_energies(log_psi, x, config.field)
        probabilities = jax.nn.softmax(2 * log_psi)
        drawn = sample(key, probabilities, config.samples)
        residual = energies[drawn] - jnp.mean(energies[drawn])
        delta = update(params, previous, x[drawn], residual)
        params = optax.tree.add_scale(params, -rate, delta)
        return (params, delta), jnp.vdot(probabilities, energies)

    @jax.jit
    def whole(params: Params, keys: jax.Array) -> jax.Array:
        return jax.lax.scan(step, (params, optax.tree.zeros_like(params)), keys)[1]

    return whole(params0, keys)


def run(config: Config) -> Results:
    """Train each wave function by each method, from the same weights."""
    exact = ground_energy(config.sites, config.field)
    arrays: dict[str, Any] = {}
    summary: dict[str, Any] = {"exact energy": exact}
    for network, key in zip(
        config.networks,
        jax.random.split(jax.random.key(config.seed), len(config.networks)),
        strict=True,
    ):
        f, draw = NETWORKS[network]
        initial_key, *keys = jax.random.split(key, 1 + len(METHODS))
        params0 = draw(initial_key, config)
        summary[network] = {}
        for method, method_key in zip(METHODS, keys, strict=True):
            steps = jax.random.split(method_key, config.steps)
            energies = np.asarray(train(f, params0, steps, method, config))
            errors = 1 - energies / exact  # both are negative
            arrays[f"{network}, {method}"] = errors
            below = np.flatnonzero(errors < GOAL)
            summary[network][method] = {
                "final relative error of the energy": float(np.median(errors[-LAST:])),
                "steps to 1e-4": float(below[0]) if len(below) else math.inf,
            }
    return Results(config=config, arrays=arrays, summary=summary)


def plot(results: Results) -> dict[str, Figure]:
    """Draw the relative error of the energy at each step."""
    networks = results.config.networks
    figure, axes = plt.subplots(
        1, len(networks), figsize=(5 * len(networks), 4), sharey=True, squeeze=False
    )
    for ax, network in zip(axes[0], networks, strict=True):
        for method, colour in zip(METHODS, plots.COLOURS, strict=False):
            ax.plot(results.arrays[f"{network}, {method}"], color=colour, label=method)
        ax.axhline(GOAL, linestyle=":", color="0.3")
        ax.set(yscale="log", xlabel="step", title=network)
    axes[0, 0].set_ylabel("relative error of the energy")
    axes[0, 0].legend()
    return {"energies": figure}


def conclude(results: Results) -> list[str]:
    """Say how many steps each method takes to 1e-4, and where it ends."""
    sentences = []
    for network in results.config.networks:
        told = []
        for method, facts in results.summary[network].items():
            steps, final = facts["steps to 1e-4"], facts["final relative error of the energy"]
            reached = "is never below 1e-4" if math.isinf(steps) else f"takes {steps:.0f} steps"
            told.append(f"{method} {reached} and ends at {final:.1e}")
        sentences.append(
            f"{network}, to a relative error of the energy of 1e-4: {'; '.join(told)}."
        )
    return sentences
