"""Half precision computes in its own dtype, but is summed and kept in float32.

Kernels have it in `leaves.split` and `factors.model`, losses and movements in `loop`, data in
`training`; metrics, norms and closed forms widen what they are given.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lazyjax.types import PyTree


def widened(tree: PyTree) -> Any:
    """Give floats of less than float32 as float32, and all other leaves as they are."""

    def wide(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits >= 32:
            return leaf
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(wide, tree)
