"""The settings that experiments share: a config is made of these and of its own.

A setting is a field with a sentence under it, which the command line shows; one that has another
default or another meaning in an experiment is declared again there, sentence included.
"""

from dataclasses import dataclass

from lazyjax import checks
from lazyjax.data import TARGETS


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
        checks.whole("n", self.n, least=1)
        checks.one_of("target", self.target, TARGETS)


@dataclass(frozen=True, kw_only=True)
class Descent(Fit):
    """Those of an experiment that trains by full-batch gradient descent."""

    learning_rate: float = 0.01
    """Step size of gradient descent on the mean squared error."""
    steps: int = 10_000
    """Steps of full-batch gradient descent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("learning_rate", self.learning_rate)
        checks.whole("steps", self.steps, least=1)
