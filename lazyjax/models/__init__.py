"""Flax modules of the practical, and the doors from a Flax module to `(f, params)`.

No Flax type goes further in: what leaves here is a model function and a plain pytree.
"""

from lazyjax.models.linen import from_linen
from lazyjax.models.networks import (
    ACTIVATIONS,
    MLP,
    PARAMETRIZATIONS,
    Activation,
    Linear,
    Parametrization,
    deep_mlp,
    preactivations,
    shallow_mlp,
)
from lazyjax.models.nnx import from_nnx
from lazyjax.models.sinusoidal import Sinusoidal, sinusoidal_features

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "PARAMETRIZATIONS",
    "Activation",
    "Linear",
    "Parametrization",
    "Sinusoidal",
    "deep_mlp",
    "from_linen",
    "from_nnx",
    "preactivations",
    "shallow_mlp",
    "sinusoidal_features",
]
