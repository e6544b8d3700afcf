"""The practical's linear model, of sines and cosines."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lazyjax import checks
from lazyjax.models.networks import PARAMETRIZATIONS, Linear


def _check_features(dimension: int, frequency: float, first_k: int) -> None:
    checks.whole("dimension", dimension, least=2)
    checks.whole("first_k", first_k, least=0)
    checks.positive("frequency", frequency)
    if dimension % 2:
        raise ValueError(
            f"`dimension` must be even, half of it sines and half cosines, got {dimension}. "
            f"Use {dimension + 1}."
        )


def sinusoidal_features(
    x: jax.Array, *, dimension: int, frequency: float = 2 * math.pi, first_k: int = 0
) -> jax.Array:
    """Compute sin(frequency k x) and cos(frequency k x) for k = first_k, first_k + 1, ..

    Parameters
    ----------
    x : (N, 1)
    dimension : int
        Number of features, even: the sines first, then the cosines.
    frequency : float
        2 pi has period 1; the practical's section 24 uses 0.2 pi.
    first_k : int
        The practical starts at 0: a sine that is dead, and a cosine that equals the bias.

    Returns
    -------
    (N, dimension) array

    Raises
    ------
    TypeError, ValueError
        If `dimension` is odd or below 2, `frequency` is not positive, `first_k` is negative, or x
        is not (N, 1).
    """
    _check_features(dimension, frequency, first_k)
    if x.ndim != 2 or x.shape[1] != 1:
        raise ValueError(f"`x` must have shape (N, 1), got {x.shape}. Use x[:, None].")
    k = jnp.arange(first_k, first_k + dimension // 2, dtype=x.dtype)[None]
    r = jnp.asarray(frequency, x.dtype) * k * x
    return jnp.concatenate([jnp.sin(r), jnp.cos(r)], axis=1)


class Sinusoidal(nn.Module):
    """The practical's linear model: `sinusoidal_features`, then a linear layer with bias.

    Attributes
    ----------
    dimension, frequency, first_k
        As in `sinusoidal_features`.
    parametrization : str
        Of the linear layer `output`.

    Raises
    ------
    TypeError, ValueError
        When it is made, as `sinusoidal_features`, or if the parametrization is unknown.
    """

    dimension: int
    frequency: float = 2 * math.pi
    first_k: int = 0
    parametrization: str = "pytorch"

    def __post_init__(self) -> None:
        _check_features(self.dimension, self.frequency, self.first_k)
        checks.one_of("parametrization", self.parametrization, PARAMETRIZATIONS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (N, 1) to (N, 1)."""
        features = sinusoidal_features(
            x, dimension=self.dimension, frequency=self.frequency, first_k=self.first_k
        )
        return Linear(1, self.parametrization, name="output")(features)
