"""Norms keep their digits at every scale and in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyjax.norms import asymmetry, norm, scale_of
from lazyjax.widening import widened


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e37, 6e37])
def test_a_norm_is_free_of_scale(size):
    a = jnp.asarray([3.0, -4.0], jnp.float32) * jnp.float32(size)
    assert norm({"a": a, "b": jnp.zeros(3, jnp.float32)}) == pytest.approx(5 * size, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_norm_of_half_precision_is_taken_in_float32(dtype):
    found = norm(jnp.full(10_000, 300.0, dtype))
    assert found.dtype == jnp.float32
    assert found == pytest.approx(30_000, rel=1e-6)


def test_zero_has_the_norm_zero_and_the_scale_one():
    assert norm(jnp.zeros(3)) == 0
    assert norm({}) == 0
    assert scale_of(jnp.zeros(3)) == 1


def test_a_scale_is_a_power_of_two_for_each_column():
    a = jnp.asarray([[1.0, 3e20], [-5.0, 1e19]])
    scale = scale_of(a, 0)
    assert scale.shape == (1, 2)
    assert np.all(np.frexp(scale)[0] == 0.5)
    assert np.all((np.abs(a / scale).max(0) >= 1) & (np.abs(a / scale).max(0) < 2))


def test_the_derivative_of_a_norm_is_the_unit_vector():
    np.testing.assert_allclose(jax.grad(norm)(jnp.asarray([3.0, 4.0])), [0.6, 0.8], rtol=1e-15)


def test_only_floats_below_float32_are_widened():
    tree = [jnp.ones(2, jnp.float16), jnp.ones(2, jnp.float64), jnp.ones(2, int)]
    assert [leaf.dtype for leaf in widened(tree)] == [jnp.float32, jnp.float64, jnp.int64]


@pytest.mark.parametrize("size", [1e-30, 1.0, 3e38])
def test_an_asymmetry_is_free_of_scale(size):
    square = jnp.asarray([[1.0, 0.5], [0.25, 1.0]], jnp.float32) * jnp.float32(size)
    assert asymmetry(square) == pytest.approx((0.125 / 2.3125) ** 0.5, rel=1e-6)
    assert asymmetry(square / 2 + square.T / 2) == 0
    assert asymmetry(0 * square) == 0
