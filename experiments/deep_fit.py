"""Does a deep network that fits its data train like its tangent model?

A deep narrow ReLU network (five hidden layers of 10) is trained by full-batch gradient descent on 15
points. It fits them, but not lazily: look at the kernel, which is another one in the end, at the
hidden layers, which move, and at the tangent model, which stays far from the network. At this
learning rate it may even diverge where the network does not: the rate is then above the critical
one. The wide network beside it (the same depth, width 256, half of its critical rate) starts closer
to its tangent model and stays closer.

Source: practical, sections 2-3 (deep MLP(10), 10 000 steps, learning rate 0.1).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.comparison import compare, summarise
from experiments.results import Results
from lazyjax import checks, plots
from lazyjax.data import TARGETS, make_dataset
from lazyjax.models import deep_mlp, from_linen

SECTIONS = "2-3"
QUICK = {"steps": 500}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The practical's own setting."""

    seed: int = 0
    """Seed of the data and of the initial weights."""
    float64: bool = True
    """Whether to compute in double precision."""
    n: int = 15
    """Training points."""
    target: str = "middle"
    """Target function: simple, middle or complex."""
    width: int = 10
    """Units of each of the five hidden layers."""
    learning_rate: float = 0.1
    """Step size of gradient descent on the mean squared error."""
    steps: int = 10_000
    """Steps of full-batch gradient descent."""

    def __post_init__(self) -> None:
        checks.whole("n", self.n, least=1)
        checks.one_of("target", self.target, TARGETS)
        checks.whole("width", self.width, least=1)
        checks.positive("learning_rate", self.learning_rate)
        checks.whole("steps", self.steps, least=1)
