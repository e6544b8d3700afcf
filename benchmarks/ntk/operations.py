"""How many multiply-adds ours needs, as `lazyjax.estimate` counts them for its fastest method."""

from typing import Any

from lazyjax.kernels.budgets import candidates
from lazyjax.kernels.computation import check


def counted_operations(data: Any, f: Any, reduce: str, symmetric: bool, options: dict) -> float:
    """Count the multiply-adds of `ntk` on the data of a case."""
    call = check(
        f,
        data.params,
        data.x1,
        None if symmetric else data.x2,
        reduce=reduce,
        method="auto",
        wrt=None,
        per_leaf=False,
        outputs=None,
        batch_size=options.get("batch_size"),
        precision="highest",
    )
    return candidates(call)[0].operations
