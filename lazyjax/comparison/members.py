"""One member of a comparison: what is trained, on what, and what is known of it before."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.comparison.classes import Classes
from lazyjax.comparison.optimizers import HeavyBall
from lazyjax.types import Dataset, Params, PyTree
from lazyjax.widening import widened


class Member(NamedTuple):
    """What one member is trained on, and how: the arguments of `compare`, checked."""

    f: Partial
    tangent: Partial
    start: Params
    anchor: Params
    loss: Partial
    data: Dataset
    test: Dataset | None  # its y None where there are no targets
    mini_batches: bool
    ball: HeavyBall | None
    no_closed_form: str  # what is known of it before training
    classes: Classes | None
    alpha: float  # that was asked for
    epsilon: float
    settings: dict[str, str]


@jax.jit
def outputs(f: Partial, params: Params, x: PyTree) -> jax.Array:
    """Evaluate a model, in float32 at least."""
    return widened(f(params, x))


def some_of(data: Dataset, examples: np.ndarray) -> Dataset:
    """Take some of the examples, of every leaf that has them on axis 0."""
    n = checks.batch("data.x", data.x)
    if len(examples) == n:
        return data

    def some(a: Any) -> Any:
        return np.asarray(a)[examples] if np.shape(a)[:1] == (n,) else a

    return Dataset(*jax.tree.map(some, tuple(data)))
