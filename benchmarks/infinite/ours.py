"""Our kernels of the networks, or the times that they take."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.infinite.cases import CASES, TIMED, inputs, least, random_inputs
from lazyjax import infinite


def kernels(names: list[str]) -> dict[str, np.ndarray]:
    """Give both kernels of each network, for a batch with itself and with another."""
    jax.config.update("jax_enable_x64", True)
    found = {}
    for name in names:
        case = CASES[name]
        x1, x2 = map(jnp.asarray, inputs(case))
        w = [jnp.zeros(shape) for shape in case.shapes]
        alone, both = (infinite(case.f, w, x1, x, variance=1.0) for x in (None, x2))
        found |= {f"{name}|nngp": alone.nngp, f"{name}|ntk": alone.ntk}
        found |= {f"{name}|nngp2": both.nngp, f"{name}|ntk2": both.ntk}
    return found


def times(names: list[str]) -> dict[str, np.ndarray]:
    """Give the seconds of a call."""
    found = {}
    for name in names:
        case, n, shape = TIMED[name]
        x = jnp.asarray(random_inputs(n, shape))
        w = [jax.ShapeDtypeStruct(s, jnp.float32) for s in case.shapes]
        both = jax.jit(lambda a, b, f=case.f, w=w: infinite(f, w, a, b, variance=1.0))
        alone = jax.jit(lambda a, f=case.f, w=w: infinite(f, w, a, variance=1.0))
        found[f"{name}|x2"] = least(lambda: both(x, x))  # noqa: B023 (called at once)
        found[f"{name}|alone"] = least(lambda: alone(x))  # noqa: B023 (called at once)
    return found


if __name__ == "__main__":
    what, path, *names = sys.argv[1:]
    found: dict[str, Any] = (kernels if what == "kernels" else times)(names)
    np.savez(path, **found)
