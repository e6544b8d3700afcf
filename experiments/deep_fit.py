"""Does a deep network that fits its data train like its tangent model?

A deep narrow ReLU network (five hidden layers of 10) is trained by full-batch gradient descent on
15 points, with its tangent model beside it. Look at the kernel, which ends as another one, at the
hidden layers, which move, and at the gap, which grows to the size of the function itself. A wide
network of the same depth, at half of its critical learning rate, stays closer.

Source: practical, sections 2-3 (deep MLP(10), 10 000 steps, learning rate 0.1).
"""

from dataclasses import dataclass

import jax
import optax
from matplotlib.figure import Figure

from experiments.results import Results, ending, rows
from experiments.settings import Descent
from lazyjax.comparison import Comparison, compare, join
from lazyjax.kernels import ntk
from lazyjax.models import deep_mlp, from_linen
from lazyjax.spectrum import critical_learning_rate

SECTIONS = "2-3"
QUICK = {"steps": 300, "wide": 32}


@dataclass(frozen=True, kw_only=True)
class Config(Descent):
    """The practical's own setting, and a wide network beside it."""

    width: int = 10
    """Units of each of the five hidden layers."""
    learning_rate: float = 0.1
    """Step size of gradient descent on the mean squared error."""
    wide: int = 64
    """Units of each hidden layer of the wide network beside it."""
    wide_fraction: float = 0.5
    """Learning rate of the wide network, as a fraction of its critical one."""


def run(config: Config) -> Results:
    """Train both networks, their tangent models and the closed forms."""
    data_key, narrow_key, wide_key = jax.random.split(jax.random.key(config.seed), 3)
    data = config.dataset(data_key)
    narrow = from_linen(deep_mlp(config.width), narrow_key, data.x)
    wide = from_linen(deep_mlp(config.wide), wide_key, data.x)
    wide_rate = config.wide_fraction * critical_learning_rate(ntk(*wide, data.x))
    compared = join(
        [
            compare(f, w, data, optax.sgd(rate), steps=config.steps, test=config.grid())
            for (f, w), rate in ((narrow, config.learning_rate), (wide, float(wide_rate)))
        ]
    )
    summary = dict(zip(_labels(config), rows(compared), strict=True))
    return Results(config=config, arrays=compared.arrays(), summary=summary)


def _labels(config: Config) -> list[str]:
    return [f"width {config.width}", f"width {config.wide}"]


def plot(results: Results) -> dict[str, Figure]:
    """Draw functions, training, layers and kernels."""
    compared = Comparison.of(results.arrays)
    return compared.plot(_labels(results.config), target=compared.test_y)


def conclude(results: Results) -> list[str]:
    """Say how far each network was from its tangent model."""
    return [
        f"{label}, at {numbers['learning rate'] / numbers['critical learning rate']:.2f} of the "
        f"critical learning rate: {ending(numbers)}"
        for label, numbers in results.summary.items()
    ]
