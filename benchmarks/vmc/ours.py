"""lazyjax."""

import jax

import lazyjax
from benchmarks.vmc.cases import Case
from benchmarks.vmc.worker import Step, serve


def make(case: Case, task: dict) -> Step:
    @jax.jit
    def step(params, x, energies):
        return lazyjax.natural_gradient(
            case.f,
            params,
            x,
            energies,
            damping=task["damping"],
            center=True,
            complex=case.system,
        )

    return step


if __name__ == "__main__":
    serve(make, f"jax {jax.__version__}")
