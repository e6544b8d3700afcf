"""Do narrow networks from different initial weights train alike?

Ten shallow ReLU networks of width 10 (31 parameters) from ten initialisations, each beside its own
tangent model. Look at what they have in common: after these small steps none has bent to the data
yet, all are close to one straight line. Up to there each follows its tangent model, and the gap is
a few per cent of what was learned; the lazy phase comes first, in narrow networks too.

Source: practical, section 8 (ten shallow MLP(10), 5 000 steps, learning rate 0.001).
"""

from dataclasses import dataclass

import jax
import optax
from matplotlib.figure import Figure

from experiments.results import Results, percent, rows, spread
from experiments.settings import Descent
from lazyjax.comparison import Comparison, compare_ensemble
from lazyjax.models import from_linen, shallow_mlp

SECTIONS = "8"
QUICK = {"steps": 300, "networks": 3}


@dataclass(frozen=True, kw_only=True)
class Config(Descent):
    """The practical's own setting."""

    networks: int = 10
    """How many initialisations."""
    width: int = 10
    """Hidden units."""
    learning_rate: float = 0.001
    """Step size of gradient descent on the mean squared error."""
    steps: int = 5000
    """Steps of full-batch gradient descent."""


def run(config: Config) -> Results:
    """Train the networks and their tangent models as ensembles."""
    data_key, key = jax.random.split(jax.random.key(config.seed))
    data, module = config.dataset(data_key), shallow_mlp(config.width)
    keys = jax.random.split(key, config.networks)
    f, start = jax.vmap(lambda key: from_linen(module, key, data.x))(keys)
    optimizer = optax.sgd(config.learning_rate)
    compared = compare_ensemble(f, start, data, optimizer, steps=config.steps, test=config.grid())
    summary = {
        "parameters of a network": sum(w[0].size for w in jax.tree.leaves(start)),
        "over the networks": spread(rows(compared)),
    }
    return Results(config=config, arrays=compared.arrays(), summary=summary)


def plot(results: Results) -> dict[str, Figure]:
    """Draw functions, training, layers and kernels over the seeds."""
    compared = Comparison.of(results.arrays)
    return compared.plot(target=compared.test_y)


def conclude(results: Results) -> list[str]:
    """Say how far the networks are from each other and from their tangent models."""
    numbers = results.summary["over the networks"]
    loss = numbers["final loss of the network"]
    gap, kernel = (
        f"{percent(own['median'])} (from {percent(own['least'])} to {percent(own['most'])})"
        for own in (
            numbers["gap as a share of what was learned"],
            numbers["relative kernel change"],
        )
    )
    return [
        f"{results.config.networks} networks of {results.summary['parameters of a network']} "
        f"parameters end at losses from {loss['least']:.1e} to {loss['most']:.1e}.",
        f"The gap between network and tangent model is, in the median, {gap} of what the network "
        f"learned, and the kernel moved by {kernel}.",
    ]
