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
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.results import Results, ending, rows
from experiments.settings import Descent
from lazyjax.comparison import Comparison, compare, join
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


def run(config: Config) -> Results:
    """Train a network of each width and its tangent model."""
    data_key, *keys = jax.random.split(jax.random.key(config.seed), 1 + len(config.widths))
    data, grid = config.dataset(data_key), config.grid()
    optimizer, steps = optax.sgd(config.learning_rate), config.steps
    networks = [
        from_linen(shallow_mlp(width), key, data.x)
        for width, key in zip(config.widths, keys, strict=True)
    ]
    compared = join([compare(f, w, data, optimizer, steps=steps, test=grid) for f, w in networks])
    summary = dict(zip(_labels(config), rows(compared), strict=True))
    return Results(config=config, arrays=compared.arrays(), summary=summary)


def _labels(config: Config) -> list[str]:
    return [f"width {width}" for width in config.widths]


_LAWS = {
    "relative weight movement of the network": "movement of the weights",
    "relative kernel change": "kernel change",
    "gap as a share of what was learned": "gap over what was learned",
}


def plot(results: Results) -> dict[str, Figure]:
    """Draw functions, training, layers, kernels, and the end of training against the width."""
    compared, labels = Comparison.of(results.arrays), _labels(results.config)
    figures = compared.plot(labels, target=compared.test_y)
    figure, ax = plt.subplots(figsize=(6, 4))
    widths = np.array(results.config.widths)
    for (name, label), marker in zip(_LAWS.items(), "osD", strict=True):
        values = [results.summary[member][name] for member in labels]
        ax.plot(widths, values, marker=marker, label=label)
    moved = results.summary[labels[0]][next(iter(_LAWS))]
    law = moved * (widths / widths[0]) ** -0.5
    ax.plot(widths, law, ":", color="0.5", label=r"slope $-1/2$")
    ax.set(xscale="log", yscale="log", xlabel="width", ylabel="relative, at the end of training")
    ax.set_title("the wider, the lazier")
    ax.legend()
    return figures | {"laziness": figure}


def conclude(results: Results) -> list[str]:
    """Say how movement, kernel change and gap depend on the width."""
    return [f"{label}: {ending(numbers)}" for label, numbers in results.summary.items()]
