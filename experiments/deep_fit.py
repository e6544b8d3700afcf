"""Does a deep network that fits its data train like its tangent model?

A deep narrow ReLU network (five hidden layers of 10) is trained by full-batch gradient descent on
15 points, with its tangent model beside it. Look at the kernel, which ends as another one, at the
hidden layers, which move, and at the gap, which grows to the size of the function itself. A wide
network of the same depth, at half of its critical learning rate, stays closer.

Source: practical, sections 2-3 (deep MLP(10), 10 000 steps, learning rate 0.1).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.comparison import compare, summarise
from experiments.results import Results
from experiments.settings import Descent
from lazyjax import checks, plots
from lazyjax.comparison import Comparison, join
from lazyjax.data import TARGETS, make_dataset
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

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("width", self.width, least=1)
        checks.whole("wide", self.wide, least=1)
        checks.positive("wide_fraction", self.wide_fraction)


def run(config: Config) -> Results:
    """Train both networks, their tangent models and the closed forms."""
    data_key, narrow_key, wide_key = jax.random.split(jax.random.key(config.seed), 3)
    data = make_dataset(data_key, n=config.n, target=config.target)
    grid_x = jnp.linspace(-1.0, 1.0, 201)[:, None]

    parts, rates = [], []
    for width, key, fraction in (
        (config.width, narrow_key, None),
        (config.wide, wide_key, config.wide_fraction),
    ):
        f, params = from_linen(deep_mlp(width), key, data.x)
        rate = config.learning_rate
        if fraction is not None:
            rate = fraction * critical_learning_rate(ntk(f, params, data.x))
        start = jax.tree.map(lambda w: w[None], params)
        compared, _ = compare(
            f, start, data, learning_rate=float(rate), steps=config.steps, grid_x=grid_x
        )
        parts.append(compared)
        rates.append(float(rate))

    compared = join(parts)
    arrays = compared.arrays() | {"target": np.asarray(TARGETS[config.target](grid_x))}
    summary = summarise(compared, _labels(config))
    for label, rate in zip(summary, rates, strict=True):
        summary[label]["learning rate"] = rate
    return Results(config=config, arrays=arrays, summary=summary)


def _labels(config: Config) -> list[str]:
    return [f"width {config.width}", f"width {config.wide}"]


def plot(results: Results) -> dict[str, Figure]:
    """Draw functions, training, layers and kernels."""
    return plots.comparison(
        Comparison.of(results.arrays),
        _labels(results.config),
        target_values=results.arrays["target"],
    )


def conclude(results: Results) -> list[str]:
    """Say how far each network was from its tangent model."""
    sentences = []
    for label, numbers in results.summary.items():
        ratio = numbers["learning rate"] / numbers["critical learning rate"]
        sentences.append(
            f"{label}, at {ratio:.2f} of the critical learning rate: the network ends at a loss of "
            f"{numbers['final loss of the network']:.2e}, its tangent model at "
            f"{numbers['final loss of the tangent model']:.2e}. The kernel moved by "
            f"{100 * numbers['relative kernel change']:.0f} %, and the gap between the two is "
            f"{100 * numbers['the same over the change of the network']:.0f} % of what the network "
            "learned."
        )
    return sentences
