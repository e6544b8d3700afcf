"""A batch in blocks is the batch, whatever their size, and a kernel in tiles is the kernel."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_reference import quickly
from thoroughness import few

from lazyjax.blocks import even, in_blocks, starts
from lazyjax.tiling import tiled


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 100])
def test_blocks_are_even_and_reach_every_example(n, size):
    block = even(n, size)
    assert 1 <= block <= min(n, size)
    assert -(-n // block) == -(-n // min(n, size))  # no more of them
    first = starts(n, block)
    assert set(range(n)) == {i + j for i in first for j in range(block)}


@few("size", [3, 1, 2, 7, 20])
def test_a_function_in_blocks_is_the_function(size):
    x = {"a": normal(0, 7, 3), "b": normal(1, 7)}

    def f(x):
        return {"y": x["a"].sum(1) * x["b"], "z": 2 * x["a"]}

    found, whole = quickly(lambda x: (in_blocks(f, x, size), f(x)), x)
    np.testing.assert_array_equal(found["y"], whole["y"])
    np.testing.assert_array_equal(found["z"], whole["z"])


def contract(f1, f2):
    """A kernel of two outputs, (n, m, 2, 2), that is symmetric with itself."""
    other = f1 if f2 is None else f2
    return {-1: jnp.einsum("nkp,mlp->nmkl", f1, other)}


SIDES = [(1, 1), (2, 3), (3, 3), (4, 7), (7, 5)]
TRIPLED = [((2, 3), True), ((1, 1), False)]
ROWS = sorted(product(SIDES, [True, False]), key=lambda row: row not in TRIPLED)


@few(("sides", "tripled"), ROWS, 2)
def test_a_kernel_in_tiles_is_the_kernel(sides, tripled):
    one, other = normal(2, 7, 2, 4), normal(3, 5, 2, 4)

    def tiles(one, other):
        by = (3, 3 if other is None else 2) if tripled else None
        prepare = by and tuple((lambda part, c=c: c * part) for c in by)
        return tiled(contract, one, other, rows=sides[0], columns=sides[1], prepare=prepare)[-1]

    found = quickly(tiles, one, other)
    assert found.shape == (7, 5, 2, 2)
    expected = (6 if tripled else 1) * np.einsum("nkp,mlp->nmkl", one, other)
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    own = quickly(tiles, one, None)
    expected = (9 if tripled else 1) * np.einsum("nkp,mlp->nmkl", one, one)
    np.testing.assert_allclose(own, expected, rtol=1e-13)
    if sides == (1, 1):  # every tile beside the diagonal is the mirror image of another
        apart = ~np.eye(7, dtype=bool)
        np.testing.assert_array_equal(own[apart], own.transpose(1, 0, 3, 2)[apart])
