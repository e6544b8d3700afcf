"""NetKet's two ways to this step, `VMC_SR` with `use_ntk=True`, in an environment of its own.

What its driver calls once samples and local energies are there: with the matrix of all derivatives
(`on_the_fly=False`), and with the kernel by Jacobian contraction (`on_the_fly=True`), whole or in
chunks of samples (`chunk_size_bwd`). Its forces have a factor 2, taken out of the energies here.
"""

# pyright: reportMissingImports=false

from importlib.metadata import version

import netket
from netket._src.ngd.sr_srt_common import srt
from netket._src.ngd.srt_onthefly import srt_onthefly

from benchmarks.vmc.cases import Case
from benchmarks.vmc.worker import Step, serve


def make(case: Case, task: dict) -> Step:
    compute = srt if task["way"] == "dense" else srt_onthefly

    def log_psi(variables, x):
        return case.f(variables["params"], x)

    def step(params, x, energies):
        update, _, _ = compute(
            log_psi,
            energies / 2,
            params,
            {},
            x,
            diag_shift=task["damping"],
            solver_fn=netket.optimizer.solver.cholesky,
            mode="real" if case.system is None else "complex",
            chunk_size=task["chunk"],
        )
        return update

    return step


if __name__ == "__main__":
    serve(make, f"NetKet {netket.__version__} with jax {version('jax')}")
