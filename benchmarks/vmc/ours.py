"""lazyjax."""

from typing import Any

import jax

import lazyjax
from benchmarks.vmc.cases import Case
from benchmarks.vmc.worker import Step, serve


def make(case: Case, task: dict) -> Step:
    options: dict[str, Any] = {} if case.system is None else {"complex": case.system}

    @jax.jit
    def step(params, x, energies):
        return lazyjax.natural_gradient(
            case.f, params, x, energies, damping=task["damping"], center=True, **options
        )

    return step


if __name__ == "__main__":
    serve(make, f"jax {jax.__version__}")
