"""The slow reference of every kernel: Jacobians of the whole batch at once, one row at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# these programs run once: compiling them costs more than anything that they do
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quickly(f: Callable, *arguments: Any) -> Any:
    """Call f, compiled without optimisation."""
    return jax.jit(f, compiler_options=QUICK)(*arguments)


def is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def jacobians(f: Callable, params: Any, x: Any, forward: bool = False) -> list[list[np.ndarray]]:
    """Give dy / dw (N, *out, P) of each leaf y of the outputs and each leaf w of the parameters.

    Rows come from the pullback of the whole batch, or columns from its pushforward, without vmap.
    Leaves that are no floats have zeros.
    """
    leaves, structure = jax.tree.flatten(params)
    floats = [jnp.asarray(leaf) for leaf in leaves if is_float(leaf)]
    flat, unravel = jax.flatten_util.ravel_pytree(floats)
    shapes = [y.shape for y in jax.tree.leaves(jax.eval_shape(f, params, x))]

    def dense(flat, leaves, x):
        def outputs(flat):
            new = iter(unravel(flat))
            w = [next(new) if is_float(leaf) else leaf for leaf in leaves]
            y = jax.tree.leaves(f(structure.unflatten(w), x))
            return jnp.concatenate([leaf.reshape(-1) for leaf in y])

        if forward:
            _, push = jax.linearize(outputs, flat)
            return jax.lax.map(push, jnp.eye(flat.size, dtype=flat.dtype)).T
        y, pull = jax.vjp(outputs, flat)
        return jax.lax.map(lambda row: pull(row)[0], jnp.eye(y.size, dtype=y.dtype))

    rows = np.asarray(quickly(dense, flat, leaves, x))
    sizes = [leaf.size if is_float(leaf) else 0 for leaf in leaves]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [
        [part.reshape(*shape, -1) for part in np.split(block, np.cumsum(sizes)[:-1], axis=1)]
        for shape, block in zip(shapes, np.split(rows, ends), strict=True)
    ]


def leaf_kernels(j1: list, j2: list) -> list[list[np.ndarray]]:
    """Give Theta (N1, N2, *out, *out) of each leaf of the outputs and each of the parameters."""

    def kernel(a, b):
        theta = np.tensordot(a, b, (-1, -1))  # (N1, *out, N2, *out)
        return np.moveaxis(theta, a.ndim - 1, 1)

    return [[kernel(a, b) for a, b in zip(*y, strict=True)] for y in zip(j1, j2, strict=True)]


def error(found: Any, expected: np.ndarray) -> float:
    """Give the Frobenius norm of the difference, shapes first."""
    assert np.shape(found) == expected.shape
    return float(np.linalg.norm(np.asarray(found, expected.dtype) - expected))


def check_whole(found: Any, expected: list[list[np.ndarray]], tolerance: float = 1e-12) -> None:
    """Hold a kernel against the sum over the leaves of the parameters."""
    found = jax.tree.leaves(found)
    assert len(found) == len(expected)
    for theta, leaves in zip(found, expected, strict=True):
        whole = sum(leaves)
        assert np.linalg.norm(whole) > 0
        assert error(theta, whole) <= tolerance * np.linalg.norm(whole)


def check_leaves(found: Any, params: Any, expected: list[list[np.ndarray]]) -> None:
    """Hold the kernel of each leaf of the parameters, and their sum, against the reference."""
    count = len(jax.tree.leaves(params))
    found = jax.tree.leaves(found)
    assert len(found) == count * len(expected)
    trees = [found[i * count : (i + 1) * count] for i in range(len(expected))]
    check_whole([sum(leaves) for leaves in trees], expected)
    for kernels, leaves in zip(trees, expected, strict=True):
        whole = np.linalg.norm(sum(leaves))
        for kernel, leaf in zip(kernels, leaves, strict=True):
            own = np.linalg.norm(leaf)
            assert error(kernel, leaf) <= 1e-12 * (own if own > 1e-8 * whole else whole)
