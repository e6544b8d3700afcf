"""What does training do to the kernel of a network that reads digits?

A CNN and an MLP learn the 1 797 handwritten digits that come with scikit-learn, each beside its
tangent model, trained alike. The kernel of all ten outputs is taken at the initial and at the
trained weights, 17 970 x 17 970 and never formed: its 200 largest eigenvalues and its spectral
density by Lanczos' method (lines, and dots at the nodes of a quadrature), and kernel regression
with it by conjugate gradients. Look at the pictures of the kernel first: training has drawn the ten
classes into it, and its alignment with the labels has grown several times over. Then at the
accuracies: on images as easy as these the tangent model and kernel regression need none of that to
read about as well as the network.

Source: an experiment of ours on public data (E. Alpaydin and C. Kaynak 1998, "Optical recognition
of handwritten digits"), after Fort et al. 2020, "Deep learning versus kernel learning", and Long
2021, "Properties of the after kernel". Not in the practical.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.results import Missing, Results
from experiments.settings import Settings
from lazyjax import checks, plots
from lazyjax.kernels import ntk
from lazyjax.metrics import relative_kernel_change, relative_weight_movement, target_alignment
from lazyjax.models import MLP, from_linen
from lazyjax.operators import (
    KernelOperator,
    ntk_operator,
    nystrom,
    spectral_density,
    top_eigenpairs,
)
from lazyjax.regression import kernel_regression, tangent_parameters
from lazyjax.tangent import linearize
from lazyjax.training import train
from lazyjax.types import Dataset, ModelFunction, Params

SECTIONS = ""
QUICK = {
    "examples": 200,
    "channels": (4, 8),
    "widths": (32,),
    "steps": 200,
    "eigenvalues": 20,
    "probes": 2,
    "rank": 200,
    "pictured": 5,
}

STAGES = ("initial", "final")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Sizes for two cores and five minutes."""

    seed: int = 0
    """Seed of the split, the weights, the mini-batches and the probes."""
    float64: bool = True
    """Whether kernel regression is in double precision; training and spectra are in single."""
    data: str | None = None
    """An npz file with images x (N, height, width) or (N, height, width, channels) and labels y
    (N,), whole numbers from 0, instead of the digits."""
    examples: int | None = None
    """How many images to take, at random; all of them if None."""
    test: float = 0.2
    """Share of the images that is kept for testing."""
    networks: tuple[str, ...] = ("CNN", "MLP")
    """Which networks."""
    channels: tuple[int, ...] = (16, 32)
    """Channels of the CNN's convolutions, 3 x 3; the second and later ones have stride 2."""
    widths: tuple[int, ...] = (256, 256)
    """Hidden units of the MLP's layers."""
    learning_rate: float = 0.1
    """Of stochastic gradient descent with momentum 0.9 on the mean squared error, as a share of the
    critical learning rate of the tangent model."""
    batch_size: int = 64
    """Images in a mini-batch."""
    steps: int = 3000
    """Steps of the network and of the tangent model."""
    ridge: float = 1e-6
    """Of kernel regression, as a share of the largest eigenvalue."""
    rank: int = 1200
    """Rows of the preconditioner of kernel regression."""
    eigenvalues: int = 200
    """The largest ones, that are computed one by one."""
    probes: int = 4
    """Random vectors for the spectral density."""
    pictured: int = 20
    """Images of each class in the pictures of the kernel."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "rank", "eigenvalues", "pictured"):
            checks.whole(name, getattr(self, name), least=1)
        if self.examples is not None:
            checks.whole("examples", self.examples, least=20)
        for name in self.networks:
            checks.one_of("networks", name, ("CNN", "MLP"))
        for name in ("networks", "channels", "widths"):
            checks.whole(f"number of `{name}`", len(getattr(self, name)), least=1)
        for name in ("channels", "widths"):
            for size in getattr(self, name):
                checks.whole(name, size, least=1)
        checks.whole("probes", self.probes, least=2)
        checks.positive("learning_rate", self.learning_rate)
        checks.positive("ridge", self.ridge)
        if not 0 < self.test < 1:
            raise ValueError(f"`test` must be between 0 and 1, got {self.test}. Use 0.2.")


class CNN(nn.Module):
    """Convolutions, 3 x 3, then a linear layer on all that is left."""

    channels: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the outputs (N, outputs) of images."""
        for i, channels in enumerate(self.channels):
            strides = (1, 1) if i == 0 else (2, 2)
            x = nn.relu(nn.Conv(channels, (3, 3), strides=strides, param_dtype=x.dtype)(x))
        return nn.Dense(self.outputs, param_dtype=x.dtype)(x.reshape(len(x), -1))


class Flat(nn.Module):
    """An MLP of images."""

    network: MLP

    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the outputs (N, outputs) of images."""
        return self.network(x.reshape(len(x), -1))


def images_of(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Give images (N, height, width, channels) and labels (N,)."""
    if config.data is None:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise Missing(
                'the digits come with scikit-learn. Run python -m pip install -e ".[data]", or '
                "give images of your own with --data FILE.npz."
            ) from error
        digits: Any = load_digits()
        return digits.images[..., None] / 16, digits.target
    with np.load(config.data, allow_pickle=False) as file:
        if not {"x", "y"} <= set(file.files):
            raise ValueError(
                f"`data` must hold the arrays x and y, got {sorted(file.files)} in {config.data}. "
                "Use numpy.savez(FILE, x=images, y=labels)."
            )
        x, y = file["x"], file["y"]
    if x.ndim not in (3, 4) or y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            "`data` must hold images x (N, height, width) or (N, height, width, channels) and "
            f"whole labels y (N,), got {x.shape} and {y.dtype} {y.shape}. Use numpy.savez(FILE, "
            "x=images, y=labels)."
        )
    return (x if x.ndim == 4 else x[..., None]).astype(float), y


def _accuracy(outputs: jax.Array, labels: jax.Array) -> float:
    return float(jnp.mean(jnp.argmax(outputs, 1) == labels))


def _single(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def _double(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(float), tree)


def _largest(key: jax.Array, A: KernelOperator) -> float:
    return float(top_eigenpairs(key, A, 1, tolerance=1e-3).values[0])


def _regression(
    key: jax.Array, f: ModelFunction, params: Params, data: Dataset, x: jax.Array, config: Config
) -> tuple[jax.Array, int]:
    """Fit the targets by the kernel at `params`; give the predictions at x, and the iterations."""
    top_key, row_key = jax.random.split(key)
    K = ntk_operator(f, params, data.x)
    A = K + config.ridge * _largest(top_key, K)
    found = kernel_regression(
        A,
        data.y,
        jnp.zeros_like(data.y),
        tolerance=1e-4,
        preconditioner=nystrom(row_key, A, rank=min(config.rank, A.shape[0] // 6)),
    )
    moved = tangent_parameters(f, params, data.x, found.coefficients)
    return linearize(f, params)(moved, x) - f(params, x), found.products


def run(config: Config) -> Results:
    """Train both networks and their tangent models, and look at the kernels before and after."""
    split_key, *keys = jax.random.split(jax.random.key(config.seed), 1 + len(config.networks))
    x, labels = images_of(config)
    order = np.asarray(jax.random.permutation(split_key, len(x)))[: config.examples]
    x, labels = jnp.asarray(x[order]), jnp.asarray(labels[order])
    classes = int(labels.max()) + 1
    y = jax.nn.one_hot(labels, classes, dtype=x.dtype) - 1 / classes
    n = round((1 - config.test) * len(x))
    data, (x_single, y_single) = Dataset(x[:n], y[:n]), _single((x, y))
    data_single = Dataset(x_single[:n], y_single[:n])
    shown = np.concatenate([np.flatnonzero(labels == c)[: config.pictured] for c in range(classes)])

    networks = {
        "CNN": CNN(config.channels, classes),
        "MLP": Flat(MLP(config.widths, classes, parametrization="lecun")),
    }
    arrays: dict[str, Any] = {"labels": np.asarray(labels[shown])}
    summary: dict[str, Any] = {}
    for key, name in zip(keys, config.networks, strict=True):
        module = networks[name]
        initial_key, top_key, batch_key, *stage_keys = jax.random.split(key, 5)
        f, params0 = from_linen(module, initial_key, x_single[:1])
        K = ntk_operator(f, params0, data_single.x)
        critical = 2 * data.y.size / _largest(top_key, K)
        optimizer = optax.sgd(config.learning_rate * critical, momentum=0.9)
        f_lin = linearize(f, params0)
        histories = {
            model: train(
                function,
                params0,
                data_single,
                optimizer,
                steps=config.steps,
                key=jax.random.clone(batch_key),
                batch_size=config.batch_size,
                label=f"{name}, {model}",
            )
            for model, function in (("network", f), ("tangent model", f_lin))
        }
        final = histories["network"].final
        test_x, test_labels = x_single[n:], labels[n:]
        rows = {
            "network": _accuracy(f(final, test_x), test_labels),
            "tangent model": _accuracy(
                f_lin(histories["tangent model"].final, test_x), test_labels
            ),
        }
        facts: dict[str, Any] = {
            "order of the kernel": y.size,
            "relative weight movement": float(relative_weight_movement(final, params0)),
        }
        kernels = []
        for stage, stage_key, params in zip(STAGES, stage_keys, (params0, final), strict=True):
            top_key, density_key, row_key = jax.random.split(stage_key, 3)
            A = ntk_operator(f, params, x_single)
            values = np.asarray(
                top_eigenpairs(top_key, A, config.eigenvalues, tolerance=1e-5).values
            )
            depth = min(64, A.shape[0])
            density = spectral_density(density_key, A, probes=config.probes, depth=depth)
            predicted, iterations = _regression(row_key, f, _double(params), data, x[n:], config)
            kernels.append(ntk(f, params, x_single, reduce="trace"))
            rows[f"regression, {stage} kernel"] = _accuracy(predicted, test_labels)
            facts |= {
                f"alignment with the labels, {stage}": float(
                    target_alignment(kernels[-1], y_single)
                ),
                f"share of the trace in ten eigenvalues, {stage}": float(
                    np.sum(values[:10]) / (classes * jnp.trace(kernels[-1]))
                ),
                f"iterations of conjugate gradients, {stage}": iterations,
            }
            arrays |= {
                f"{name}_{stage}_eigenvalues": values,
                f"{name}_{stage}_nodes": np.asarray(density.nodes),
                f"{name}_{stage}_weights": np.asarray(density.weights),
                f"{name}_{stage}_kernel": np.asarray(kernels[-1], np.float32)[shown][:, shown],
            }
        for model, history in histories.items():
            arrays[f"{name}_{model}_steps"] = history.steps
            arrays[f"{name}_{model}_loss"] = history.data_loss
        facts["relative kernel change"] = float(relative_kernel_change(kernels[1], kernels[0]))
        summary[name] = {"test accuracy": rows, **facts}
    return Results(config=config, arrays=arrays, summary=summary)


_STAGE_COLOURS = dict(zip(STAGES, plots.COLOURS[:2], strict=True))


def _panels(results: Results, draw: Callable[[Any, str], None], **settings: Any) -> Figure:
    """Draw one panel a network."""
    figure, axes = plt.subplots(1, len(results.summary), figsize=(10, 4), squeeze=False, **settings)
    for i, name in enumerate(results.summary):
        draw(axes[0, i], name)
        axes[0, i].set_title(name)
    return figure


def _accuracies(results: Results) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 3.8))
    for i, name in enumerate(results.summary):
        rows = results.summary[name]["test accuracy"]
        at = np.arange(len(rows)) + 0.36 * (i - 0.5)
        wrong = [100 * (1 - accuracy) for accuracy in rows.values()]
        bars = ax.barh(at, wrong, 0.34, label=name, color=plots.COLOURS[2 + i])
        ax.bar_label(bars, [f"{value:.1f} %" for value in wrong], padding=3, fontsize=9)
        ax.set_yticks(np.arange(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.15)
    ax.set(xlabel="test images read wrongly, %", title="four ways to read the same images")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _ranks(nodes: np.ndarray, weights: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Give the rank of each node of a quadrature: the eigenvalues above it, and half of its own."""
    last_first = np.argsort(-nodes, axis=1)
    nodes = np.take_along_axis(nodes, last_first, 1)
    own = order * np.take_along_axis(weights, last_first, 1)
    return (np.cumsum(own, 1) - own / 2).reshape(-1), nodes.reshape(-1)


def plot(results: Results) -> dict[str, Figure]:
    """Draw accuracies, training, spectra, and the kernels as pictures."""
    arrays = results.arrays

    def training(ax: Any, name: str) -> None:
        for model, style in (("network", "network"), ("tangent model", "tangent")):
            label, line, colour = plots.MODELS[style]
            steps, loss = arrays[f"{name}_{model}_steps"], arrays[f"{name}_{model}_loss"]
            ax.plot(1 + steps, loss, line, color=colour, label=label)
        ax.set(xscale="log", yscale="log", xlabel="1 + step", ylabel="training loss")
        ax.legend()

    def spectrum(ax: Any, name: str) -> None:
        order = results.summary[name]["order of the kernel"]
        for stage, colour in _STAGE_COLOURS.items():
            values = arrays[f"{name}_{stage}_eigenvalues"]
            ax.plot(1 + np.arange(len(values)), values, color=colour, label=f"{stage} weights")
            rank, node = _ranks(
                arrays[f"{name}_{stage}_nodes"], arrays[f"{name}_{stage}_weights"], order
            )
            below = node < values[-1]
            ax.plot(rank[below], node[below], ".", color=colour, markersize=4)
        ax.plot([], [], ".", color="0.3", markersize=4, label="quadrature, each probe")
        ax.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue", ylabel="eigenvalue")
        ax.legend(loc="lower left")

    count = np.bincount(arrays["labels"])
    ends = np.cumsum(count)
    pictures, axes = plt.subplots(
        2, len(results.summary), figsize=(4.6 * len(results.summary), 8), squeeze=False
    )
    image: Any = None
    for i, name in enumerate(results.summary):
        for ax, stage in zip(axes[:, i], STAGES, strict=True):
            kernel = arrays[f"{name}_{stage}_kernel"]
            size = np.sqrt(np.diag(kernel))
            image = ax.imshow(kernel / np.outer(size, size), vmin=0, vmax=1)
            ax.set_title(f"{name}, {stage} weights")
            ax.set(xticks=ends - count / 2 - 0.5, yticks=ends - count / 2 - 0.5)
            ax.set_xticklabels(range(len(count)))
            ax.set_yticklabels(range(len(count)))
            ax.set(xlabel="digit" if ax is axes[-1, i] else "", ylabel="digit" if i == 0 else "")
            ax.grid(visible=False)
    pictures.colorbar(image, ax=axes, shrink=0.6, label="cosine of two images in the kernel")
    return {
        "accuracies": _accuracies(results),
        "training": _panels(results, training),
        "kernels": pictures,
        "spectra": _panels(results, spectrum, sharey=True),
    }


def conclude(results: Results) -> list[str]:
    """Say the test accuracies, and what training did to the kernel."""
    sentences = []
    for name, facts in results.summary.items():
        rows = ", ".join(
            f"{row} {100 * value:.1f} %" for row, value in facts["test accuracy"].items()
        )
        sentences.append(f"{name}, test accuracy: {rows}.")
        sentences.append(
            f"{name}: the weights moved by {100 * facts['relative weight movement']:.0f} % and the "
            f"kernel by {100 * facts['relative kernel change']:.0f} %; its alignment with the "
            f"labels went from {facts['alignment with the labels, initial']:.2f} to "
            f"{facts['alignment with the labels, final']:.2f}, and its ten largest eigenvalues "
            f"from {100 * facts['share of the trace in ten eigenvalues, initial']:.0f} to "
            f"{100 * facts['share of the trace in ten eigenvalues, final']:.0f} % of the trace."
        )
    return sentences
