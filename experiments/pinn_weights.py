"""Do weights from the kernel make a physics-informed network train?

A network u(x) with one hidden layer solves u'' = g on [0, 1], where the solution is sin(a pi x): it
is to be 0 at both ends (loss L_b) and to have the right second derivative inside (L_r). Those are
two models of the same parameters, f_u(params, x) = u and f_r(params, x) = u'', with kernels K_uu of
the first at the ends, K_rr of the second inside, and K_ur of both. Look at the spectra first: K_rr
is a hundred times larger than K_uu, so that the residual is learned long before the boundary.
Algorithm 1 of the paper weighs the losses by lambda_b = tr(K) / tr(K_uu) and
lambda_r = tr(K) / tr(K_rr). Then look at the training: with these weights gradient descent ends 30
to 130 times nearer to the solution (seeds 0 to 5; the paper has 2.40e-1 and 1.63e-3). Adam ends as
near without them; they only bring it there sooner.

Three things are otherwise than the paper tells them. What makes K_rr large is the unit of x: the
published program, not the text, divides x by its standard deviation, which multiplies u'' by 12,
and without that the weights are hardly any. The kernel of initial weights does not depend on a at
all, so that spectra for several a, as in figure 1, differ by the draw alone. And for a = 4, where
the weights are used, the kernel does not keep still: it grows several times over, and only wide
networks with a = 1 are lazy.

Source: an experiment of ours that repeats Wang, Yu, Perdikaris 2022, "When and why PINNs fail to
train: a neural tangent kernel perspective" (Algorithm 1, sections 5, 7.1 and 7.2, figures 1, 2 and
4), with the settings of their program. Not in the practical.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from experiments.results import Results, percent
from experiments.settings import Settings
from lazyjax import checks, plots
from lazyjax.kernels import ntk
from lazyjax.metrics import relative_kernel_change, relative_weight_movement
from lazyjax.spectrum import eigenvalues
from lazyjax.types import ModelFunction, Params

SECTIONS = ""
QUICK = {"points": 40, "steps": 3000, "widths": (10, 100), "width_steps": 500}

WEIGHTINGS = ("weights 1", "weights of the kernel")
NEAR = 0.01  # a relative error of u that counts as near
PARAMETRIZATIONS = ("standard", "ntk")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Those of the published program."""

    seed: int = 0
    """Seed of the initial weights."""
    frequency: float = 4.0
    """a of the solution sin(a pi x)."""
    width: int = 100
    """Hidden units."""
    parametrization: str = "standard"
    """How weights begin: standard, N(0, 1/fan_in), as in the program, or ntk, N(0, 1) with a factor
    1/sqrt(fan_in) in the network, as in the text. Biases begin as N(0, 1) in both."""
    points: int = 100
    """Points inside, equally spaced, and as many at the boundary, half of them at each end."""
    learning_rate: float = 2e-5
    """Of gradient descent, on halves of mean squares: the published 1e-5 is on mean squares."""
    adam_rate: float = 1e-3
    """Learning rate of Adam."""
    steps: int = 40_000
    """Steps of gradient descent, and of Adam."""
    every: int = 100
    """Steps from one update of the weights to the next, and from one record to the next."""
    frequencies: tuple[float, ...] = (1.0, 4.0)
    """Values of a for which the width is varied."""
    widths: tuple[int, ...] = (10, 100, 500)
    """Hidden units of the networks whose movement is measured."""
    width_steps: int = 10_000
    """Steps of gradient descent for these, with weights 1."""

    def __post_init__(self) -> None:
        for name in ("width", "steps", "every", "width_steps"):
            checks.whole(name, getattr(self, name), least=1)
        for name in ("frequency", "learning_rate", "adam_rate"):
            checks.positive(name, getattr(self, name))
        for name in ("frequencies", "widths"):
            checks.whole(f"number of `{name}`", len(getattr(self, name)), least=1)
        for width in self.widths:
            checks.whole("widths", width, least=1)
        for frequency in self.frequencies:
            checks.positive("frequencies", frequency)
        checks.one_of("parametrization", self.parametrization, PARAMETRIZATIONS)
        checks.whole("points", self.points, least=2)
        if self.points % 2:
            raise ValueError(
                f"`points` must be even, half of those at the boundary at each end, got "
                f"{self.points}. Use {self.points + 1}."
            )
        if self.steps % self.every:
            raise ValueError(
                f"`steps` must be a multiple of `every`, {self.every}, got {self.steps}. "
                f"Use {self.steps - self.steps % self.every + self.every}."
            )


class Problem(NamedTuple):
    """Two models of the same parameters, and where they are to be what."""

    f_u: ModelFunction  # (N, 1) to u (N, 1)
    f_r: ModelFunction  # (N, 1) to u'' (N, 1)
    boundary: jax.Array  # (points, 1), half of them 0 and half 1; u is to be 0 there
    inside: jax.Array  # (points, 1)
    target: jax.Array  # (points, 1), u'' inside
    grid: jax.Array  # (M, 1), where u is compared with the solution
    solution: jax.Array  # (M, 1)


def network(factor: Any, middle: Any, unit: Any, params: Params, x: jax.Array) -> jax.Array:
    """Compute u = factor W1 tanh(W0 z + b0) + b1 of z = (x - middle) / unit, (N, 1) to (N, 1)."""
    hidden = jnp.tanh((x - middle) / unit @ params["W0"] + params["b0"])
    return factor * (hidden @ params["W1"]) + params["b1"]


def second_derivative(f: ModelFunction, params: Params, x: jax.Array) -> jax.Array:
    """Compute d^2 f / dx^2 (N, 1) of a model of one number x (N, 1) that keeps examples apart."""

    def slope(function: Any, x: jax.Array) -> jax.Array:
        return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    return slope(partial(slope, partial(f, params)), x)


def initial_weights(key: jax.Array, config: Config, width: int) -> Params:
    """Draw W0 and b0 (1, width), W1 (width, 1) and b1 (1, 1)."""
    drawn = np.asarray(jax.random.normal(key, (3 * width + 1,)))  # one draw, which compiles sooner
    W0, b0, W1, b1 = np.split(drawn, [width, 2 * width, 3 * width])
    scale = width**-0.5 if config.parametrization == "standard" else 1.0
    params = {"W0": W0[None], "b0": b0[None], "W1": scale * W1[:, None], "b1": b1[None]}
    return jax.tree.map(jnp.asarray, params)


def make_problem(
    config: Config, *, frequency: float, width: int, normalised: bool = True
) -> Problem:
    """Make models and points for a solution sin(frequency pi x).

    Parameters
    ----------
    config : Config
    frequency, width : float, int
    normalised : bool
        Whether x enters the network less its mean and over its standard deviation.
    """
    omega = frequency * np.pi
    inside = np.linspace(0.0, 1.0, config.points)[:, None]
    grid = np.linspace(0.0, 1.0, 501)[:, None]
    middle, unit = (inside.mean(), inside.std()) if normalised else (0.0, 1.0)
    factor = 1.0 if config.parametrization == "standard" else width**-0.5
    f_u = Partial(network, *(jnp.asarray(float(c)) for c in (factor, middle, unit)))
    return Problem(
        f_u=f_u,
        f_r=Partial(second_derivative, f_u),
        boundary=jnp.asarray(np.repeat([0.0, 1.0], config.points // 2)[:, None]),
        inside=jnp.asarray(inside),
        target=jnp.asarray(-(omega**2) * np.sin(omega * inside)),
        grid=jnp.asarray(grid),
        solution=jnp.asarray(np.sin(omega * grid)),
    )


class Kernels(NamedTuple):
    """K_uu, K_ur and K_rr (points, points) each, of K = [[K_uu, K_ur], [K_ur^T, K_rr]]."""

    uu: jax.Array
    ur: jax.Array
    rr: jax.Array

    def whole(self) -> jax.Array:
        """Put them together, (2 points, 2 points)."""
        return jnp.block([[self.uu, self.ur], [self.ur.T, self.rr]])


def kernels(problem: Problem, params: Params) -> Kernels:
    """Compute the kernels of u at the boundary, of u'' inside, and of the one and the other."""
    boundary, inside = problem.boundary, problem.inside
    return Kernels(
        uu=ntk(problem.f_u, params, boundary, reduce="trace"),
        ur=ntk(problem.f_u, params, boundary, inside, g=problem.f_r, reduce="trace"),
        rr=ntk(problem.f_r, params, inside, reduce="trace"),
    )


def kernel_weights(problem: Problem, params: Params) -> jax.Array:
    """Compute lambda_b = tr(K) / tr(K_uu) and lambda_r = tr(K) / tr(K_rr) (2,): Algorithm 1 (a)."""
    uu = jnp.trace(ntk(problem.f_u, params, problem.boundary, reduce="trace"))
    rr = jnp.trace(ntk(problem.f_r, params, problem.inside, reduce="trace"))
    return (uu + rr) / jnp.stack([uu, rr])


def losses(problem: Problem, params: Params) -> jax.Array:
    """Compute L_b and L_r (2,), halves of mean squares: equation 6.2 with weights 1."""
    u = problem.f_u(params, problem.boundary[:: len(problem.boundary) // 2])  # each end once
    u_xx = problem.f_r(params, problem.inside)
    return jnp.stack([jnp.mean(u**2), jnp.mean((u_xx - problem.target) ** 2)]) / 2


def relative_error(problem: Problem, params: Params) -> jax.Array:
    """Compute norm(u - solution) / norm(solution) on the grid."""
    wrong = problem.f_u(params, problem.grid) - problem.solution
    return jnp.linalg.norm(wrong) / jnp.linalg.norm(problem.solution)


@partial(jax.jit, static_argnames="optimizer")
def descend(
    problem: Problem,
    params: Params,
    memory: Any,
    weights: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> tuple[Params, Any]:
    """Take steps on weights[0] L_b + weights[1] L_r; give parameters and the optimiser's memory."""

    def step(_: Any, state: Any) -> Any:
        params, memory = state
        gradient = jax.grad(lambda w: jnp.vdot(weights, losses(problem, w)))(params)
        update, memory = optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, update), memory

    return jax.lax.fori_loop(0, steps, step, (params, memory))


@jax.jit
def measure(problem: Problem, params: Params) -> dict[str, jax.Array]:
    """Give "lambdas" (2,) of the kernel, "losses" (2,) without weights, and the "error" of u."""
    return {
        "lambdas": kernel_weights(problem, params),
        "losses": losses(problem, params),
        "error": relative_error(problem, params),
    }


def train_network(
    problem: Problem,
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    every: int,
    weighted: bool,
) -> tuple[Params, dict[str, np.ndarray]]:
    """Minimise lambda_b L_b + lambda_r L_r over all points: Algorithm 1, or with weights 1.

    Parameters
    ----------
    problem : Problem
    params : pytree
        The initial ones.
    optimizer : optax.GradientTransformation
    steps, every : int
        What `measure` gives is taken every `every` steps, and the weights with it.
    weighted : bool
        Whether the weights are those of the kernel, or 1.

    Returns
    -------
    params : pytree
        The final ones.
    records : dict of arrays (steps / every + 1, ..)
        What `measure` gives, from the first step to the last.
    """
    memory, records = optimizer.init(params), [measure(problem, params)]
    for _ in range(steps // every):
        lambdas = records[-1]["lambdas"]
        weights = lambdas if weighted else np.ones_like(lambdas)
        params, memory = descend(problem, params, memory, weights, optimizer=optimizer, steps=every)
        records.append(measure(problem, params))
    return params, {name: np.stack([row[name] for row in records]) for name in records[0]}


_SPECTRA = {
    "initial": "initial weights",
    "unscaled": "initial weights, x not normalised",
    "final": "trained by gradient descent, weights 1",
}


def run(config: Config) -> Results:
    """Train with and without weights, by gradient descent and by Adam, and vary the width."""
    key, *keys = jax.random.split(jax.random.key(config.seed), 1 + len(config.widths))
    make = partial(make_problem, config, frequency=config.frequency, width=config.width)
    problem, unscaled = make(), make(normalised=False)
    params0 = initial_weights(key, config, config.width)
    sgd = optax.sgd(config.learning_rate)
    arrays: dict[str, Any] = {
        "steps": np.arange(0, config.steps + 1, config.every),
        "grid": problem.grid[:, 0],
        "solution": problem.solution[:, 0],
    }
    trainings: dict[str, Any] = {}
    trained: list[Params] = []
    for name, optimizer in {"gradient descent": sgd, "Adam": optax.adam(config.adam_rate)}.items():
        trainings[name] = {}
        for weighting in WEIGHTINGS:
            final, records = train_network(
                problem,
                params0,
                optimizer,
                steps=config.steps,
                every=config.every,
                weighted=weighting != WEIGHTINGS[0],
            )
            trained.append(final)
            prefix = f"{name}/{weighting}"
            arrays |= {f"{prefix}/{what}": values for what, values in records.items()}
            arrays[f"{prefix}/u"] = problem.f_u(final, problem.grid)[:, 0]
            error, lambdas = records["error"], records["lambdas"]
            near = np.flatnonzero(error < NEAR)
            trainings[name][weighting] = {
                "relative error": float(np.median(error[-(len(error) // 10 + 1) :])),
                "steps to 1 %": float(arrays["steps"][near[0]]) if len(near) else math.inf,
                "boundary loss": float(records["losses"][-1, 0]),
                "residual loss": float(records["losses"][-1, 1]),
                "lambda_b, initial": float(lambdas[0, 0]),
                "lambda_b, final": float(lambdas[-1, 0]),
            }
    shown = {
        "initial": kernels(problem, params0),
        "unscaled": kernels(unscaled, params0),
        "final": kernels(problem, trained[0]),
    }
    for stage, K in shown.items():
        arrays |= {
            f"{stage}/K": eigenvalues(K.whole())[::-1],
            f"{stage}/K_uu": eigenvalues(K.uu)[::-1],
            f"{stage}/K_rr": eigenvalues(K.rr)[::-1],
        }
    summary = {
        "trainings": trainings,
        "tr(K_rr) / tr(K_uu)": {
            stage: float(jnp.trace(K.rr) / jnp.trace(K.uu)) for stage, K in shown.items()
        },
        "kernel change of the trained network": float(
            relative_kernel_change(shown["final"].whole(), shown["initial"].whole())
        ),
        "widths": _widths(config, keys, sgd),
    }
    return Results(
        config=config,
        arrays={name: np.asarray(values) for name, values in arrays.items()},
        summary=summary,
    )


def _widths(config: Config, keys: Any, sgd: optax.GradientTransformation) -> dict[str, Any]:
    """Train networks of each width, with weights 1; give how far they and their kernels moved."""
    found: dict[str, Any] = {}
    for frequency in config.frequencies:
        rows = found[f"a = {frequency:g}"] = {}
        for key, width in zip(keys, config.widths, strict=True):
            problem = make_problem(config, frequency=frequency, width=width)
            params0 = initial_weights(jax.random.clone(key), config, width)
            final, _ = descend(
                problem,
                params0,
                sgd.init(params0),
                np.ones(2),
                optimizer=sgd,
                steps=config.width_steps,
            )
            before, after = (kernels(problem, params).whole() for params in (params0, final))
            rows[f"width {width}"] = {
                "relative weight movement": float(relative_weight_movement(final, params0)),
                "relative kernel change": float(relative_kernel_change(after, before)),
            }
    return found


_COLOURS = dict(zip(WEIGHTINGS, plots.COLOURS[:2], strict=True))


def _spectra(results: Results) -> Figure:
    figure, axes = plt.subplots(1, len(_SPECTRA), figsize=(12, 4), sharey=True)
    looks = {"K": ("-", "0.5", 4.0), "K_rr": ("-", plots.COLOURS[1], 1.6), "K_uu": ("o", "C0", 0.0)}
    for ax, (stage, title) in zip(axes, _SPECTRA.items(), strict=True):
        for name, (line, colour, width) in looks.items():
            values = results.arrays[f"{stage}/{name}"]
            values = values[values > 1e-13 * values[0]]  # the others are rounding
            label = f"$K_{{{name[2:]}}}$" if name != "K" else "$K$"
            ranks = 1 + np.arange(len(values))
            ax.plot(ranks, values, line, color=colour, linewidth=width, label=label)
        ax.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue", title=title)
    axes[0].set_ylabel("eigenvalue")
    axes[0].legend()
    return figure


def _running_median(values: np.ndarray) -> np.ndarray:
    """Give the median of 21 values around each; of fewer at the start, where values fall fast."""
    reach = np.minimum(10, np.arange(len(values)))
    return np.array([np.median(values[i - r : i + r + 1]) for i, r in enumerate(reach)])


def _training(results: Results) -> Figure:
    names, steps = list(results.summary["trainings"]), results.arrays["steps"]
    labels = ("relative error of u", "boundary loss $L_b$", "residual loss $L_r$")
    figure, axes = plt.subplots(
        len(labels), len(names), figsize=(9, 8), sharex=True, sharey="row", squeeze=False
    )
    for i, name in enumerate(names):
        for weighting in WEIGHTINGS:
            prefix, colour = f"{name}/{weighting}", _COLOURS[weighting]
            error, (L_b, L_r) = (
                results.arrays[f"{prefix}/error"],
                results.arrays[f"{prefix}/losses"].T,
            )
            for ax, values in zip(axes[:, i], (error, L_b, L_r), strict=True):
                ax.plot(steps, values, color=colour, linewidth=0.5, alpha=0.4)
                ax.plot(steps, _running_median(values), color=colour, label=weighting)
                ax.set_yscale("log")
        axes[0, i].set_title(name)
        axes[-1, i].set_xlabel("step")
        axes[-1, i].locator_params(axis="x", nbins=5)
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label)
    axes[0, 0].legend(title="bold: running median")
    return figure


def _solution(results: Results) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    grid, solution = results.arrays["grid"], results.arrays["solution"]
    left.plot(grid, solution, color="0.7", linewidth=4, label="solution")
    for weighting, line in zip(WEIGHTINGS, ("-", "--"), strict=True):
        u, colour = results.arrays[f"gradient descent/{weighting}/u"], _COLOURS[weighting]
        left.plot(grid, u, line, color=colour, label=weighting)
        right.plot(grid, np.abs(u - solution), line, color=colour)
    left.set(xlabel="x", ylabel="u", title="gradient descent")
    right.set(xlabel="x", ylabel="distance from the solution", yscale="log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _lambdas(results: Results) -> Figure:
    figure, ax = plt.subplots(figsize=(6.5, 4))
    for i, name in enumerate(results.summary["trainings"]):
        lambdas = results.arrays[f"{name}/{WEIGHTINGS[1]}/lambdas"]
        for j, (line, symbol) in enumerate((("-", r"$\lambda_b$"), ("--", r"$\lambda_r$"))):
            ax.plot(
                results.arrays["steps"],
                lambdas[:, j],
                line,
                color=plots.COLOURS[2 + i],
                linewidth=(3.5, 1.6)[i],  # both lambda_r are 1, one over the other
                label=f"{symbol}, {name}",
            )
    ax.set(yscale="log", xlabel="step", ylabel="weight of the loss")
    ax.legend(loc="center right")
    return figure


def _movement(results: Results) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    widths = results.config.widths
    for ax, what in zip(axes, ("relative weight movement", "relative kernel change"), strict=True):
        for i, (label, rows) in enumerate(results.summary["widths"].items()):
            values = [rows[f"width {width}"][what] for width in widths]
            ax.plot(widths, values, marker="os^D"[i % 4], color=f"C{i}", label=label)
        ax.set(xscale="log", yscale="log", xlabel="width", ylabel=what)
    axes[0].legend()
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw spectra, trainings, solutions, weights, and movement against the width."""
    return {
        "spectra": _spectra(results),
        "training": _training(results),
        "solution": _solution(results),
        "weights": _lambdas(results),
        "widths": _movement(results),
    }


def _when(steps: float) -> str:
    return f"after {steps:.0f} steps" if math.isfinite(steps) else "never"


def conclude(results: Results) -> list[str]:
    """Say the traces, the errors with and without weights, and how lazy the networks were."""
    ratios = results.summary["tr(K_rr) / tr(K_uu)"]
    sentences = [
        f"tr(K_rr) / tr(K_uu) is {ratios['initial']:.3g} at the initial weights, "
        f"{ratios['unscaled']:.2g} if x is not normalised, and {ratios['final']:.3g} after "
        "gradient descent with weights 1, in which the kernel changed by "
        f"{percent(results.summary['kernel change of the trained network'])}."
    ]
    for name, rows in results.summary["trainings"].items():
        plain, weighted = (rows[weighting] for weighting in WEIGHTINGS)
        sentences.append(
            f"{name}: the relative error of u ends at {plain['relative error']:.1e} with weights 1 "
            f"and at {weighted['relative error']:.1e} with those of the kernel; it came below 1 % "
            f"{_when(plain['steps to 1 %'])} and {_when(weighted['steps to 1 %'])}. "
            f"lambda_b went from {weighted['lambda_b, initial']:.0f} to "
            f"{weighted['lambda_b, final']:.0f}."
        )
    for label, rows in results.summary["widths"].items():
        changes = ", ".join(
            f"{percent(row['relative kernel change'])} at {width}" for width, row in rows.items()
        )
        sentences.append(f"{label}: the kernel changed by {changes}.")
    return sentences
