"""In linear regression, which coordinates of the weights move?

Gradient descent on half the sum of squares, with p weights and n points. The weights move in the
image of X alone, which is seen in the eigenbasis of X X^T. Look at the two heat maps: with fewer
weights than points, as in the practical, X X^T has full rank and every coordinate moves; with more
weights than points exactly n of the p coordinates move, and all others stay where they began. The
spectrum of X X^T follows the law of Marchenko and Pastur, its largest eigenvalue that of Tracy and
Widom.

The law of the largest eigenvalue is that of large p and n. At p = 100, n = 5 000 the mean of 600
draws lies 0.0019 +- 0.0004 below it, which is 1.3 standard errors of a mean of 40: three standard
errors are met by most seeds, not by all.

The model is linear in its weights, so the closed form of the tangent model is its training.

Source: practical, sections 20-22 (p = 100, n = 5 000, 1 000 steps, learning rate 0.001), and
p = 1 000, n = 100 beside it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments.results import Results
from experiments.settings import Settings
from lazyjax import checks, plots
from lazyjax.dynamics import gradient_descent
from lazyjax.spectrum import wishart_edge
from lazyjax.training import train
from lazyjax.types import Dataset

SECTIONS = "20-22"
QUICK = {"n": 500, "wide_p": 200, "wide_n": 50, "steps": 200, "spectra": 10}
MOVES = 1e-10  # a coordinate moves if it does by more than this


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The practical's own setting, and more weights than points beside it."""

    p: int = 100
    """Weights."""
    n: int = 5000
    """Points."""
    wide_p: int = 1000
    """Weights of the problem with more weights than points."""
    wide_n: int = 100
    """Points of that problem."""
    learning_rate: float = 0.001
    """Step size on half the sum of squares."""
    steps: int = 1000
    """Steps of gradient descent."""
    spectra: int = 40
    """Draws of X for the mean of the largest eigenvalue."""

    def __post_init__(self) -> None:
        for name in ("p", "n", "wide_p", "wide_n", "steps"):
            checks.whole(name, getattr(self, name), least=1)
        checks.whole("spectra", self.spectra, least=2)
        checks.positive("learning_rate", self.learning_rate)


def _linear(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def _regress(key: jax.Array, p: int, n: int, config: Config) -> dict[str, np.ndarray]:
    """Train one problem, and predict it in closed form."""
    x_key, y_key, w_key = jax.random.split(key, 3)
    x = np.asarray(jax.random.normal(x_key, (p, n))) / np.sqrt(n)  # X, its points as columns
    y = np.asarray(jax.random.normal(y_key, (n, 1)))
    w0 = np.asarray(jax.random.normal(w_key, (p, 1))) / np.sqrt(p)
    gram = x @ x.T
    eigenvalues, basis = np.linalg.eigh(gram)

    # eta on half the sum of squares is n eta / 2 on their mean
    history = train(
        _linear,
        w0,
        Dataset(x.T, y),
        optax.sgd(config.learning_rate * n / 2),
        steps=config.steps,
        record=np.arange(config.steps + 1),
        label=f"regression, {p} weights",
    )
    # X^T = Q R: the rows of R and Q^T y have the same gradient, and are min(p, n)
    q, r = np.linalg.qr(x.T)
    closed = gradient_descent(
        r @ r.T, q.T @ y, r @ w0, learning_rate=config.learning_rate * len(r) / 2
    )
    predicted = w0 + r.T @ np.asarray(closed.coefficients(np.arange(config.steps + 1)))
    weights = history.params
    assert isinstance(weights, np.ndarray)
    moved = np.abs(basis.T @ (weights - w0))[..., 0].T  # (p, T), in the eigenbasis
    return {
        "gram": gram,
        "eigenvalues": eigenvalues,
        "diagonalised": basis.T @ gram @ basis,
        "loss": history.loss,
        "movement": history.weight_movement,
        "closed_movement": np.linalg.norm(predicted - w0, axis=(1, 2)) / np.linalg.norm(w0),
        "closed_loss": np.mean((x.T @ predicted - y) ** 2, axis=(1, 2)),
        "closed_gap": np.linalg.norm(predicted - weights, axis=(1, 2)),
        "moved": moved,
        "rank": np.linalg.matrix_rank(x),
    }


@jax.jit
def _largest_eigenvalue(x: jax.Array) -> jax.Array:
    return jnp.linalg.eigvalsh(x @ x.T)[-1]


def run(config: Config) -> Results:
    """Regress with fewer and with more weights than points, and draw many spectra."""
    key, narrow_key, wide_key = jax.random.split(jax.random.key(config.seed), 3)
    problems = {
        "narrow": (narrow_key, config.p, config.n),
        "wide": (wide_key, config.wide_p, config.wide_n),
    }
    arrays, summary = {}, {}
    for name, (problem_key, p, n) in problems.items():
        found = _regress(problem_key, p, n, config)
        arrays |= {f"{name}/{part}": array for part, array in found.items()}
        change = np.linalg.norm(found["moved"][:, -1])
        furthest = found["moved"].max(axis=1)
        summary[_title(p, n)] = {
            "rank of X": int(found["rank"]),
            "largest eigenvalue of X X^T": float(found["eigenvalues"][-1]),
            "coordinates that move": int(np.sum(furthest > MOVES)),
            "coordinates": p,
            "largest movement of the others": float(
                np.max(furthest, where=furthest <= MOVES, initial=0.0)
            ),
            "final loss": float(found["loss"][-1]),
            "relative weight movement": float(found["movement"][-1]),
            "largest gap to the closed form over the change of the weights": float(
                found["closed_gap"].max() / change
            ),
        }

    largest = np.array(
        [
            _largest_eigenvalue(jax.random.normal(k, (config.p, config.n)) / np.sqrt(config.n))
            for k in jax.random.split(key, config.spectra)
        ]
    )
    law = wishart_edge(config.p, config.n)
    error = largest.std(ddof=1) / np.sqrt(config.spectra)
    arrays["largest_eigenvalues"] = largest
    summary["largest eigenvalue over many draws"] = {
        "mean": float(largest.mean()),
        "standard error": float(error),
        "Marchenko-Pastur edge": law.edge,
        "edge less the Tracy-Widom shift": law.mean,
        "standard errors between mean and law": float((largest.mean() - law.mean) / error),
    }
    return Results(config=config, arrays=arrays, summary=summary)


def _title(p: int, n: int) -> str:
    return f"p = {p}, n = {n}"


def _problems(config: Config) -> dict[str, tuple[int, int]]:
    return {"narrow": (config.p, config.n), "wide": (config.wide_p, config.wide_n)}


def _draw_spectrum(ax: Axes, eigenvalues: np.ndarray, p: int, n: int) -> None:
    """Draw the histogram of the eigenvalues that are not 0, with the law's density."""
    ratio = p / n
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    rank = min(p, n)
    ax.hist(eigenvalues[-rank:], bins=25, density=True, color=plots.COLOURS[5], label="eigenvalues")
    grid = np.linspace(low, high, 400)[1:-1]
    density = np.sqrt((high - grid) * (grid - low)) / (2 * np.pi * ratio * grid)
    density *= max(1.0, ratio)  # of the eigenvalues that are not 0
    ax.plot(grid, density, color="black", label="Marchenko-Pastur")
    zero = f", and {p - n} zeros" if p > n else ""
    ax.set_ylim(top=1.3 * ax.get_ylim()[1])
    ax.set(title=f"{_title(p, n)}{zero}", xlabel=r"eigenvalue of $X X^\top$", ylabel="density")
    ax.legend()


def _spectrum(results: Results) -> Figure:
    config, arrays = results.config, results.arrays
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    for ax, (name, (p, n)) in zip(axes, _problems(config).items(), strict=False):
        _draw_spectrum(ax, arrays[f"{name}/eigenvalues"], p, n)
    numbers = results.summary["largest eigenvalue over many draws"]
    axes[2].hist(arrays["largest_eigenvalues"], bins=12, color=plots.COLOURS[5])
    for label, value, line, colour in (
        ("mean", numbers["mean"], "-", plots.COLOURS[0]),
        (
            "edge less the Tracy-Widom shift",
            numbers["edge less the Tracy-Widom shift"],
            "--",
            "black",
        ),
        ("Marchenko-Pastur edge", numbers["Marchenko-Pastur edge"], ":", "black"),
    ):
        axes[2].axvline(value, linestyle=line, color=colour, label=label)
    axes[2].set(
        title=f"largest eigenvalue, {config.spectra} draws, {_title(config.p, config.n)}",
        xlabel="largest eigenvalue",
        ylabel="draws",
    )
    axes[2].set_ylim(top=1.45 * axes[2].get_ylim()[1])
    axes[2].legend(loc="upper right")
    return figure


def _gram(results: Results) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    parts = {"gram": r"$X X^\top$", "diagonalised": "in its eigenbasis"}
    for ax, (part, title) in zip(axes, parts.items(), strict=True):
        values = results.arrays[f"narrow/{part}"]
        reach = float(np.abs(values).max())
        image = ax.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach)
        ax.grid(visible=False)
        ax.set(title=title, xlabel="coordinate", ylabel="coordinate")
        figure.colorbar(image, ax=ax, shrink=0.85)
    return figure


def _training(results: Results) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    for (name, (p, n)), colour in zip(
        _problems(results.config).items(), plots.COLOURS, strict=False
    ):
        for ax, part in zip(axes, ("loss", "movement"), strict=True):
            curve, closed = (
                results.arrays[f"{name}/{part}"],
                results.arrays[f"{name}/closed_{part}"],
            )
            ax.plot(curve, color=colour, label=f"{_title(p, n)}, training")
            ax.plot(closed, ":", color="black", linewidth=2.2)
    axes[0].plot([], [], ":", color="black", label="closed form")
    axes[0].set(title="training loss", xlabel="step", ylabel="mean squared error", yscale="log")
    axes[1].set(
        title="movement of the weights", xlabel="step", ylabel=r"$\|w - w_0\| \,/\, \|w_0\|$"
    )
    axes[0].legend()
    return figure


def _coordinates(results: Results) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6))
    norm = LogNorm(1e-17, 1.0)
    image = None
    for ax, (name, (p, n)) in zip(axes, _problems(results.config).items(), strict=True):
        moved = results.arrays[f"{name}/moved"][::-1]  # the largest eigenvalue first
        image = ax.imshow(
            np.maximum(moved, 1e-17), aspect="auto", norm=norm, cmap="viridis", interpolation="none"
        )
        ax.grid(visible=False)
        count = results.summary[_title(p, n)]["coordinates that move"]
        ax.set(
            title=f"{_title(p, n)}: {count} of {p} coordinates move",
            xlabel="step",
            ylabel="coordinate, by eigenvalue (largest on top)",
        )
    assert image is not None
    figure.colorbar(image, ax=axes, label=r"$|w_{t,i} - w_{0,i}|$ in the eigenbasis of $X X^\top$")
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw spectra, the matrix and its diagonal, training, and the coordinates that move."""
    return {
        "spectrum": _spectrum(results),
        "gram": _gram(results),
        "training": _training(results),
        "coordinates": _coordinates(results),
    }


def conclude(results: Results) -> list[str]:
    """Say what the largest eigenvalue is, and how many coordinates move."""
    law = results.summary["largest eigenvalue over many draws"]
    sentences = [
        f"Over {results.config.spectra} draws the largest eigenvalue has mean {law['mean']:.4f}, "
        f"{abs(law['standard errors between mean and law']):.1f} standard errors from the "
        f"Marchenko-Pastur edge {law['Marchenko-Pastur edge']:.4f} less the Tracy-Widom shift, "
        f"{law['edge less the Tracy-Widom shift']:.4f}."
    ]
    for p, n in _problems(results.config).values():
        numbers = results.summary[_title(p, n)]
        gap = numbers["largest gap to the closed form over the change of the weights"]
        sentences.append(
            f"{_title(p, n)}: X has rank {numbers['rank of X']}, and "
            f"{numbers['coordinates that move']} of {p} coordinates move by more than {MOVES:g}. "
            f"The closed form is met to {gap:.0e} of the change."
        )
    return sentences
