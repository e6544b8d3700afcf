"""What all measures take: real floats of float32 at least, and norms that are not zero."""

from typing import Any

import jax
import jax.numpy as jnp

from lazyjax import checks
from lazyjax.types import PyTree
from lazyjax.widening import widened


def floats(tree: PyTree) -> Any:
    """Give real floats of float32 at least: of integers, and of both parts of complex numbers."""

    def real(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if jnp.iscomplexobj(leaf):
            return jnp.stack([leaf.real, leaf.imag], axis=-1)
        return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(float)

    return widened(jax.tree.map(real, tree))


def not_zero(name: str, size: jax.Array, cure: str) -> jax.Array:
    """Require a norm above 0, where it is known: it is divided by."""
    if checks.is_known(size) and size == 0:
        raise ValueError(f"`{name}` must not be zero, got zeros only. {cure}")
    return size
