"""Is a wide network lazy where a thin one is not?

Shallow ReLU networks of width 5, 10, 100 and 1000, trained alike, each beside its tangent model.
Look at the movement of the weights and at the gap: both fall as the width grows, the kernel hardly
moves at width 1000, and the network and its tangent model become one curve. The thin networks learn
with another kernel than the one they began with.

The practical plots "the movement of the last layer", which is the output bias alone. Here the
movement is that of all weights, and each layer has its own curve.

Source: practical, section 9 (50 000 steps, learning rate 0.002).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.comparison import compare, summarise
from experiments.results import Results
from experiments.settings import Descent
from lazyjax import checks, plots
from lazyjax.comparison import Comparison, join
from lazyjax.data import TARGETS, make_dataset
from lazyjax.models import from_linen, shallow_mlp

SECTIONS = "9"
QUICK = {"steps": 500, "widths": (5, 50)}


@dataclass(frozen=True, kw_only=True)
class Config(Descent):
    """The practical's own setting."""

    widths: tuple[int, ...] = (5, 10, 100, 1000)
    """Hidden units of each network."""
    learning_rate: float = 0.002
    """Step size of gradient descent on the mean squared error."""
    steps: int = 50_000
    """Steps of full-batch gradient descent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("number of `widths`", len(self.widths), least=1)
        for width in self.widths:
            checks.whole("widths", width, least=1)


def run(config: Config) -> Results:
    """Train a network of each width and its tangent model."""
    data_key, *keys = jax.random.split(jax.random.key(config.seed), 1 + len(config.widths))
    data = make_dataset(data_key, n=config.n, target=config.target)
    grid_x = jnp.linspace(-1.0, 1.0, 201)[:, None]
    parts = []
    for width, key in zip(config.widths, keys, strict=True):
        f, params = from_linen(shallow_mlp(width), key, data.x)
        start = jax.tree.map(lambda w: w[None], params)
        compared, _ = compare(
            f,
            start,
            data,
            learning_rate=config.learning_rate,
            steps=config.steps,
            grid_x=grid_x,
        )
        parts.append(compared)
    compared = join(parts)
    arrays = compared.arrays() | {"target": np.asarray(TARGETS[config.target](grid_x))}
    return Results(config=config, arrays=arrays, summary=summarise(compared, _labels(config)))


def _labels(config: Config) -> list[str]:
    return [f"width {width}" for width in config.widths]


_LAWS = {
    "relative weight movement of the network": "movement of the weights",
    "relative kernel change": "kernel change",
    "the same over the change of the network": "gap over what was learned",
}


def plot(results: Results) -> dict[str, Figure]:
    """Draw functions, training, layers, kernels, and the end of training against the width."""
    figures = plots.comparison(
        Comparison.of(results.arrays),
        _labels(results.config),
        target_values=results.arrays["target"],
    )
    figure, ax = plt.subplots(figsize=(6, 4))
    widths = np.array(results.config.widths)
    for (name, label), marker in zip(_LAWS.items(), "osD", strict=True):
        values = [results.summary[member][name] for member in _labels(results.config)]
        ax.plot(widths, values, marker=marker, label=label)
    ax.plot(
        widths,
        results.summary[_labels(results.config)[0]][next(iter(_LAWS))]
        * (widths / widths[0]) ** -0.5,
        ":",
        color="0.5",
        label=r"slope $-1/2$",
    )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="width",
        ylabel="relative, at the end of training",
        title="the wider, the lazier",
    )
    ax.legend()
    return figures | {"laziness": figure}


def conclude(results: Results) -> list[str]:
    """Say how movement, kernel change and gap depend on the width."""
    sentences = []
    for label, numbers in results.summary.items():
        sentences.append(
            f"{label}: the weights moved by "
            f"{100 * numbers['relative weight movement of the network']:.2g} %, the kernel by "
            f"{100 * numbers['relative kernel change']:.2g} %; the gap to the tangent model is "
            f"{100 * numbers['the same over the change of the network']:.2g} % of what the network "
            f"learned, at a loss of {numbers['final loss of the network']:.1e} "
            f"(tangent model {numbers['final loss of the tangent model']:.1e})."
        )
    return sentences
