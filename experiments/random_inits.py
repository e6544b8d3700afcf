"""Do narrow networks from different initial weights train alike?

Ten shallow ReLU networks of width 10 (31 parameters) from ten initialisations, each beside its own
tangent model. Look at what they have in common: after these small steps none has bent to the data
yet, all are close to one straight line. Up to there each follows its tangent model, and the gap is
a few per cent of what was learned; the lazy phase comes first, in narrow networks too.

Source: practical, section 8 (ten shallow MLP(10), 5 000 steps, learning rate 0.001).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.comparison import compare, ensemble, spread
from experiments.results import Results
from experiments.settings import Descent
from lazyjax import checks, plots
from lazyjax.comparison import Comparison
from lazyjax.data import TARGETS, make_dataset
from lazyjax.models import shallow_mlp

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

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("networks", self.networks, least=1)
        checks.whole("width", self.width, least=1)


def run(config: Config) -> Results:
    """Train the networks and their tangent models as ensembles."""
    data_key, key = jax.random.split(jax.random.key(config.seed))
    data = make_dataset(data_key, n=config.n, target=config.target)
    grid_x = jnp.linspace(-1.0, 1.0, 201)[:, None]
    f, start = ensemble(shallow_mlp(config.width), key, data.x, config.networks)
    compared, _ = compare(
        f,
        start,
        data,
        learning_rate=config.learning_rate,
        steps=config.steps,
        grid_x=grid_x,
    )
    arrays = compared.arrays() | {"target": np.asarray(TARGETS[config.target](grid_x))}
    parameters = sum(w[0].size for w in jax.tree.leaves(start))
    summary = {"parameters of a network": parameters, "over the networks": spread(compared)}
    return Results(config=config, arrays=arrays, summary=summary)


def plot(results: Results) -> dict[str, Figure]:
    """Draw functions, training, layers and kernels over the seeds."""
    compared = Comparison.of(results.arrays)
    return plots.comparison(compared, target_values=results.arrays["target"])


def conclude(results: Results) -> list[str]:
    """Say how far the networks are from each other and from their tangent models."""
    numbers = results.summary["over the networks"]
    loss = numbers["final loss of the network"]
    gap = numbers["the same over the change of the network"]
    kernel = numbers["relative kernel change"]
    return [
        f"{results.config.networks} networks of {results.summary['parameters of a network']} "
        f"parameters end at losses from {loss['least']:.1e} to {loss['most']:.1e}.",
        f"The gap between network and tangent model is {100 * gap['median']:.0f} % of what "
        f"the network learned (median; from {100 * gap['least']:.0f} to "
        f"{100 * gap['most']:.0f} %), and the kernel moved by {100 * kernel['median']:.0f} % "
        f"(from {100 * kernel['least']:.0f} to {100 * kernel['most']:.0f} %).",
    ]
