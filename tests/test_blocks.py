"""A batch in blocks is the batch, whatever their size, and a kernel in tiles is the kernel."""

import jax.numpy as jnp
import numpy as np
import pytest

from lazyjax.blocks import even, in_blocks, starts
from lazyjax.tiling import tiled


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 100])
def test_blocks_are_even_and_reach_every_example(n, size):
    block = even(n, size)
    assert 1 <= block <= min(n, size)
    assert -(-n // block) == -(-n // min(n, size))  # no more of them
    first = starts(n, block)
    assert set(range(n)) == {i + j for i in first for j in range(block)}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_a_function_in_blocks_is_the_function(size):
    x = {"a": normal(0, 7, 3), "b": normal(1, 7)}
    found = in_blocks(lambda x: {"y": x["a"].sum(1) * x["b"], "z": 2 * x["a"]}, x, size)
    np.testing.assert_array_equal(found["y"], x["a"].sum(1) * x["b"])
    np.testing.assert_array_equal(found["z"], 2 * x["a"])


def contract(f1, f2):
    """A kernel of two outputs, (n, m, 2, 2), that is symmetric with itself."""
    other = f1 if f2 is None else f2
    return {-1: jnp.einsum("nkp,mlp->nmkl", f1, other)}


@pytest.mark.parametrize("prepare", [None, lambda part: 3 * part])
@pytest.mark.parametrize("sides", [(1, 1), (2, 3), (3, 3), (4, 7), (7, 5)])
def test_a_kernel_in_tiles_is_the_kernel(sides, prepare):
    one, other = normal(2, 7, 2, 4), normal(3, 5, 2, 4)
    scale = 1 if prepare is None else 9
    found = tiled(contract, one, other, rows=sides[0], columns=sides[1], prepare=prepare)[-1]
    assert found.shape == (7, 5, 2, 2)
    np.testing.assert_allclose(found, scale * contract(one, other)[-1], rtol=1e-13)
    own = tiled(contract, one, None, rows=sides[0], columns=sides[1], prepare=prepare)[-1]
    np.testing.assert_allclose(own, scale * contract(one, None)[-1], rtol=1e-13)
    if sides == (1, 1):  # every tile beside the diagonal is the mirror image of another
        apart = ~np.eye(7, dtype=bool)
        np.testing.assert_array_equal(own[apart], own.transpose(1, 0, 3, 2)[apart])
