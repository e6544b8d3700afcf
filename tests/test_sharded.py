"""Several devices: sharded programs of users, and a fault of XLA that we go round."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from thoroughness import few

PROGRAMS = str(Path(__file__).parent / "sharded_programs.py")
START = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lazyjax import ntk
from lazyjax.kernels import METHODS

mesh = Mesh(np.array(jax.devices()), ("i",))
normal = lambda *shape: jnp.asarray(np.random.default_rng(shape).standard_normal(shape))
share = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("i")))
x, w, c = normal(8, 6, 6, 2), normal(3, 3, 2, 4), normal(8, 3)

def conv(w, x, numbers=("NHWC", "HWIO", "NHWC"), **settings):
    settings = {"window_strides": (1, 1), "padding": "SAME"} | settings
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **settings)

def tail(y):
    return jnp.tanh(y).mean((1, 2)) @ c[: y.shape[-1]]

def error(one, other):
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
"""

FAULT = """
f = lambda w, x: tail(conv(w, x[None]))[0]
jacobians = jax.jit(jax.vmap(jax.jacrev(f), (None, 0)))
found = error(jacobians(w, share(x)), jacobians(w, x))
assert found > 0.1, "XLA is right: lazyjax.convolutions.one_by_one has no use from here on"
"""

KINDS = """
norm = lambda w: w / jnp.linalg.norm(w)  # a leaf that no rule covers: it is differentiated plainly
by_vjp = jax.custom_vjp(lambda w, x: conv(w, x))
by_vjp.defvjp(lambda w, x: (conv(w, x), (w, x)), lambda kept, g: jax.vjp(conv, *kept)[1](g))
by_jvp = jax.custom_jvp(lambda w, x: conv(w, x))
by_jvp.defjvp(lambda p, t: jax.jvp(conv, p, t))
step = lambda w: lambda h, _: (jnp.tanh(conv(w, h)), None)
energy = lambda w, x: jax.grad(lambda v: (jnp.tanh(conv(v, x[None])) ** 2).sum())(w)
kinds = {
    "plain": lambda w, x: tail(conv(w, x)),
    "a norm": lambda w, x: tail(conv(norm(w), x)),
    "strides": lambda w, x: tail(conv(norm(w), x, window_strides=(2, 1))),
    "dilations": lambda w, x: tail(conv(norm(w), x, rhs_dilation=(2, 2), lhs_dilation=(1, 2),
                                        padding=[(1, 2), (0, 3)])),
    "groups": lambda w, x: tail(conv(norm(w[:, :, :1]), x, feature_group_count=2)),
    "features first": lambda w, x: tail(jnp.moveaxis(conv(
        norm(w).transpose(3, 2, 0, 1), jnp.moveaxis(x, -1, 1), ("NCHW", "OIHW", "NCHW")), 1, -1)),
    "transposed": lambda w, x: tail(lax.conv_transpose(
        x, norm(w), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))),
    "remat in jit": lambda w, x: tail(jax.checkpoint(jax.jit(lambda x: conv(norm(w), x)))(x)),
    "scan": lambda w, x: tail(lax.scan(step(norm(w)[..., :2]), x, length=2)[0]),
    "custom_vjp": lambda w, x: tail(by_vjp(w, x)),
    "custom_jvp": lambda w, x: tail(by_jvp(w, x)),
    "cond": lambda w, x: tail(lax.cond(w.sum() > 0, conv, lambda w, x: conv(2 * w, x), w, x)),
    "a gradient by x": lambda w, x: jax.grad(lambda x: tail(conv(norm(w), x)).sum())(x).mean((1, 2)),
    "a gradient by the filters": lambda w, x: jax.vmap(
        lambda x: energy(norm(w), x).reshape(-1)[:3])(x),
}
for i, (name, f) in enumerate(kinds.items()):
    expected = ntk(f, w, x, method="ntk_vector_products")
    for j, method in enumerate(METHODS):
        ways = [lambda w, x: ntk(f, w, x, method=method)]
        ways.append(jax.jit(ways[0]))
        for way in ways if HOW == "every" else [ways[(i + j) % 2]]:
            found = error(way(w, share(x)), expected)
            assert found < 1e-12, (name, method, "under jit" if way is ways[1] else "", found)
"""


def on_devices(devices, *command):
    """Run a command on so many devices of the host."""
    done = subprocess.run(
        [sys.executable, *command],
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(Path(__file__).parent),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("some", marks=pytest.mark.thorough),
        pytest.param("every", marks=pytest.mark.thorough(long=True)),
    ],
)
def test_filter_gradients_of_examples_are_right_on_four_devices_where_those_of_xla_are_not(how):
    on_devices(4, "-c", f"{START}{FAULT}HOW = {how!r}{KINDS}")


@few("how", ["few", "some"])
def test_inside_sharded_programs_everything_is_as_outside(how):
    on_devices(4, PROGRAMS, how)


@pytest.mark.thorough(long=True)
def test_inside_sharded_programs_on_more_devices_and_in_every_combination():
    on_devices(8, PROGRAMS, "every")
