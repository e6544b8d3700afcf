"""The numbers that everything rests on are right on this machine's jaxlib, as users compile."""

import os
import subprocess
import sys

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np


def layer_norm(x):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


@jax.jit
def cotangents(x, d):
    # x (N, S, D), d (N, K, S, D) -> (N, K, S, D), the pattern of per-output Jacobians
    return jax.vmap(lambda xn, dn: jax.vmap(jax.vjp(layer_norm, xn)[1])(dn)[0])(x, d)


rng = np.random.default_rng(0)
x, d = rng.normal(size=(8, 64, 128)), rng.normal(size=(8, 10, 64, 128))
single = cotangents(jnp.asarray(x, jnp.float32), jnp.asarray(d, jnp.float32))
double = cotangents(jnp.asarray(x), jnp.asarray(d))
assert double.dtype == jnp.float64
assert jnp.linalg.norm(single - double) < 1e-5 * jnp.linalg.norm(double)  # 0.10.2: 0.1
"""


def test_float32_cotangents_of_a_layer_norm_are_those_of_float64():
    settings = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**settings, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
