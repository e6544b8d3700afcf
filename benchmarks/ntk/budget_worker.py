"""One kernel within a budget, in a process of its own: what XLA says of it, and what it takes."""

import jax

from benchmarks.ntk.cases import CASES, read
from benchmarks.ntk.worker import Contender, growth, serve
from lazyjax import estimate, ntk
from lazyjax.kernels import check, kernels
from lazyjax.kernels.budgets import peak, within_budget


def make(task: dict) -> Contender:
    f, data = CASES[task["case"]].f, read(task["data"])
    params = jax.tree.map(jax.device_put, data.params)
    x1, x2 = jax.device_put(data.x1), jax.device_put(data.x2)

    def measure() -> dict:
        fastest = next(iter(estimate(f, params, x1, x2).values())).memory
        budget = int(task["share"] * fastest)
        try:
            request = within_budget(check(f, params, x1, x2, reduce=task["reduce"]), budget)
        except ValueError as error:
            return {"budget": budget / 2**20, "refused": str(error).split(" for this")[0]}
        compiled = kernels.lower(request).compile()
        inputs = sum(leaf.nbytes for leaf in jax.tree.leaves((params, x1, x2))) / 2**20
        process = inputs + growth(lambda: jax.block_until_ready(compiled(request)))
        xla = peak(request) / 2**20
        return {
            "budget": budget / 2**20,
            "xla": xla,
            "process": process,
            "options": str(request.options),
        }

    return Contender(
        lambda: None, lambda: ntk(f, params, x1, x2), lambda k: k, {"measure": measure}
    )


if __name__ == "__main__":
    serve(make)
