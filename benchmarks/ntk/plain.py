"""Plain JAX, what a user writes without a library: one Jacobian a batch, one product."""

import jax
import jax.numpy as jnp

from benchmarks.ntk import jitted
from benchmarks.ntk.cases import CASES, read
from benchmarks.ntk.worker import Contender, serve


def make(task: dict) -> Contender:
    f, data = CASES[task["case"]].f, read(task["data"])

    def jacobian(params, x):  # (N, K, P)
        of_one = jax.jacrev(lambda p, one: f(p, one[None])[0])
        leaves = jax.tree.leaves(jax.vmap(of_one, (None, 0))(params, x))
        return jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=-1)

    def kernel(params, x1, x2):
        with jax.default_matmul_precision("highest"):
            j1 = jacobian(params, x1)
            j2 = j1 if x2 is None else jacobian(params, x2)
            if task["reduce"] == "trace":
                return jnp.einsum("nkp,mkp->nm", j1, j2) / j1.shape[1]
            return jnp.einsum("nkp,mlp->nmkl", j1, j2)

    x2 = None if task["symmetric"] else data.x2
    return jitted.contender(kernel, data.params, data.x1, x2)


if __name__ == "__main__":
    serve(make)
