"""The settings that experiments share: a config is made of these and of its own.

A setting is a field with a sentence under it, which the command line shows; one that has another
default or another meaning in an experiment is declared again there, sentence included.
"""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax import checks
from lazyjax.data import TARGETS, make_dataset
from lazyjax.types import Dataset

_FROM_0 = ("noise", "first_k")  # settings that may be 0


def require_even(name: str, value: int) -> None:
    """Require a number of features, half of them sines and half cosines."""
    checks.whole(name, value, least=2)
    if value % 2:
        raise ValueError(
            f"`{name}` must be even, half of it sines and half cosines, got {value}. "
            f"Use {value + 1}."
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Those of every experiment."""

    seed: int = 0
    """Seed of the data and of the initial weights."""
    float64: bool = True
    """Whether to compute in double precision."""


@dataclass(frozen=True, kw_only=True)
class Fit(Settings):
    """Those of an experiment on points of a target function."""

    n: int = 15
    """Training points."""
    target: str = "middle"
    """Target function: simple, middle or complex."""

    def __post_init__(self) -> None:
        """Require whole numbers from 1, others above 0, and lists of them that are not empty."""
        checks.one_of("target", self.target, TARGETS)
        for field in fields(self):
            name, values, like = field.name, getattr(self, field.name), field.default
            if isinstance(like, tuple):
                checks.whole(f"number of `{name}`", len(values), least=1)
                like = like[0]
            else:
                values = (values,)
            for value in values:
                if type(like) is int and name != "seed":
                    checks.whole(name, value, least=0 if name in _FROM_0 else 1)
                elif type(like) is float and name in _FROM_0:
                    checks.not_negative(name, value)
                elif type(like) is float:
                    checks.positive(name, value)

    def dataset(self, key: jax.Array, *, noise: float = 0.0) -> Dataset:
        """Draw the points, in the order of x, which is that of kernels in figures."""
        data = make_dataset(key, n=self.n, noise=noise, target=self.target)
        x, y = map(np.asarray, data)  # little operations of jnp would each be compiled
        order = np.argsort(x[:, 0])
        return Dataset(x[order], y[order])

    def grid(self, points: int = 201) -> Dataset:
        """Give the target on [-1, 1], where functions are drawn."""
        x = jnp.linspace(-1.0, 1.0, points)[:, None]
        return Dataset(x, TARGETS[self.target](x))


@dataclass(frozen=True, kw_only=True)
class Descent(Fit):
    """Those of an experiment that trains by full-batch gradient descent."""

    learning_rate: float = 0.01
    """Step size of gradient descent on the mean squared error."""
    steps: int = 10_000
    """Steps of full-batch gradient descent."""
