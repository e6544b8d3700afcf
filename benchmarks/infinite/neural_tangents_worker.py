"""The kernels of neural-tangents 0.6.5 of the networks, or the times that they take."""

# pyright: reportMissingImports=false

import sys
import types
from typing import Any

# Imports what an old tensorflow needs; nothing of it is used here.
sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")

import jax  # noqa: E402 (after the stand-in)
import jax.numpy as jnp  # noqa: E402 (after the stand-in)
import numpy as np  # noqa: E402 (after the stand-in)
from neural_tangents import stax  # noqa: E402 (after the stand-in)

from benchmarks.infinite.cases import (  # noqa: E402 (after the stand-in)
    CASES,
    TIMED,
    inputs,
    least,
    random_inputs,
)


def kernels(names: list[str]) -> dict[str, np.ndarray]:
    jax.config.update("jax_enable_x64", True)
    found = {}
    for name in names:
        case = CASES[name]
        kernel = case.theirs(stax)[2]
        x1, x2 = inputs(case)
        for x, end in ((None, ""), (x2, "2")):
            try:
                both = kernel(x1, x, ("nngp", "ntk"))
            except NotImplementedError:  # it has no layer norm of an activation
                continue
            found |= {f"{name}|nngp{end}": both.nngp, f"{name}|ntk{end}": both.ntk}
    return {key: np.asarray(value) for key, value in found.items()}


def times(names: list[str]) -> dict[str, np.ndarray]:
    found = {}
    for name in names:
        case, n, shape = TIMED[name]
        kernel = case.theirs(stax)[2]
        x = jnp.asarray(random_inputs(n, shape))

        def call(a, b, kernel=kernel):
            both = kernel(a, b, ("nngp", "ntk"))
            return both.nngp, both.ntk

        compiled = jax.jit(call)
        found[f"{name}|x2"] = least(lambda: compiled(x, x))  # noqa: B023 (called at once)
    return found


if __name__ == "__main__":
    what, path, *names = sys.argv[1:]
    found: dict[str, Any] = (kernels if what == "kernels" else times)(names)
    np.savez(path, **found)
