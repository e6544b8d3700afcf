"""Plain JAX, what a user writes without a library: one matrix of all derivatives."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_factor, cho_solve

from benchmarks.vmc.cases import Case
from benchmarks.vmc.worker import Step, serve


def make(case: Case, task: dict) -> Step:
    def rows(params, x, part=lambda y: y):  # (N, P)
        of_one = jax.grad(
            lambda p, one: part(case.f(p, one[None])[0]), holomorphic=case.system == "hermitian"
        )
        return jax.vmap(lambda one: ravel_pytree(of_one(params, one))[0])(x)

    @jax.jit
    def step(params, x, energies):
        _, back = ravel_pytree(params)
        if case.system == "real":  # real and imaginary parts, one under the other
            parts = [rows(params, x, jnp.real), rows(params, x, jnp.imag)]
            e = jnp.stack([energies.real, energies.imag])
        else:
            parts, e = [rows(params, x)], energies[None]
        A = jnp.concatenate([part - part.mean(0)[None] for part in parts]) / len(x) ** 0.5
        e = (e - e.mean(1)[:, None]).reshape(-1) / len(x) ** 0.5
        K = A @ A.conj().T
        c = cho_solve(cho_factor(K + task["damping"] * jnp.eye(len(K), dtype=K.dtype)), e)
        return back(A.conj().T @ c)

    return step


if __name__ == "__main__":
    serve(make, f"jax {jax.__version__}")
