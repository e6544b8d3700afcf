"""The slow reference of every kernel: Jacobians of the whole batch at once, one row at a time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lazyjax.kernels import METHODS
from lazyjax.kernels.orders import ORDERS

# these programs run once: compiling them costs more than anything that they do
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):  # later versions have no others
    QUICK["xla_cpu_use_fusion_emitters"] = False


STRUCTURED = METHODS["structured_derivatives"]
ORDERED = {
    f"structured_derivatives by {order}": STRUCTURED._replace(
        engine=partial(STRUCTURED.engine, order=order)
    )
    for order in ORDERS
}
"""Rows for `METHODS` that contract every part in one order, where that admits it."""


def quickly(f: Callable, *arguments: Any) -> Any:
    """Call f, compiled without optimisation, and give NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(f, compiler_options=QUICK)(*arguments))


def is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def jacobians(f: Callable, params: Any, x: Any, forward: bool = False) -> list[list[np.ndarray]]:
    """Give dy / dw (N, *out, P) of each leaf y of the outputs and each leaf w that holds floats.

    Rows come from the pullback of the whole batch, or columns from its pushforward, without vmap.
    """
    leaves, structure = jax.tree.flatten(params)

    def dense(leaves, x):
        flat, unravel = ravel_pytree([leaf for leaf in leaves if is_float(leaf)])

        def outputs(flat):
            moving = iter(unravel(flat))
            w = [next(moving) if is_float(leaf) else leaf for leaf in leaves]
            y = jax.tree.leaves(f(structure.unflatten(w), x))
            return jnp.concatenate([leaf.reshape(-1) for leaf in y]), y

        if forward:
            _, push, y = jax.linearize(outputs, flat, has_aux=True)
            return jax.lax.map(push, jnp.eye(flat.size, dtype=flat.dtype)).T, y
        flat_y, pull, y = jax.vjp(outputs, flat, has_aux=True)
        return jax.lax.map(lambda row: pull(row)[0], jnp.eye(flat_y.size, dtype=flat_y.dtype)), y

    rows, y = quickly(dense, leaves, x)
    blocks = np.split(rows, np.cumsum([leaf.size for leaf in y])[:-1])
    ends = np.cumsum([np.size(leaf) for leaf in leaves if is_float(leaf)])[:-1]
    return [
        [part.reshape(*leaf.shape, -1) for part in np.split(block, ends, axis=1)]
        for leaf, block in zip(y, blocks, strict=True)
    ]


def leaf_kernels(j1: list, j2: list) -> list[list[np.ndarray]]:
    """Give Theta (N1, N2, *out, *out) of each leaf of the outputs and of the parameters."""

    def kernel(a, b):
        theta = np.tensordot(a, b, (-1, -1))  # (N1, *out, N2, *out)
        return np.moveaxis(theta, a.ndim - 1, 1)

    return [[kernel(a, b) for a, b in zip(*y, strict=True)] for y in zip(j1, j2, strict=True)]


def reduced(theta: np.ndarray, reduce: str) -> np.ndarray:
    """Keep of a kernel (N1, N2, *out, *out) what `reduce` says."""
    out = theta.shape[2 : theta.ndim // 2 + 1]
    k = math.prod(out)
    flat = theta.reshape(*theta.shape[:2], k, k)
    return {
        "none": theta,
        "diagonal": np.einsum("nmkk->nmk", flat).reshape(*theta.shape[:2], *out),
        "trace": np.einsum("nmkk->nm", flat) / k,
        "sum": np.einsum("nmkl->nm", flat) / k,
    }[reduce]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Give the Frobenius norm of the difference, shapes first."""
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected))


def check_whole(found: Any, expected: list[list[np.ndarray]], tolerance: float = 1e-12) -> None:
    """Hold a kernel against the sum over the leaves of the parameters."""
    found = jax.tree.leaves(found)
    assert len(found) == len(expected)
    for theta, leaves in zip(found, expected, strict=True):
        whole = sum(leaves)
        assert np.linalg.norm(whole) > 0
        assert error(theta, whole) <= tolerance * np.linalg.norm(whole)


def check_leaves(found: Any, expected: list[list[np.ndarray]]) -> None:
    """Hold the kernel of each leaf of the parameters, and their sum, against the reference."""
    found = jax.tree.leaves(found)  # leaves that hold no floats have None
    for leaves in expected:
        kernels, found = found[: len(leaves)], found[len(leaves) :]
        check_whole([sum(kernels)], [leaves])
        whole = np.linalg.norm(sum(leaves))
        for kernel, leaf in zip(kernels, leaves, strict=True):
            own = np.linalg.norm(leaf)
            assert error(kernel, leaf) <= 1e-12 * (own if own > 1e-8 * whole else whole)
    assert not found


def check_symmetric(found: Any) -> None:
    """Hold a kernel of one batch against itself with the examples and the outputs swapped."""
    for theta in jax.tree.leaves(found):
        k = (theta.ndim - 2) // 2
        swap = (1, 0, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))
        np.testing.assert_array_equal(theta, np.transpose(theta, swap))
