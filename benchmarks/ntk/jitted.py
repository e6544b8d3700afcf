"""What the JAX contenders share: compile ahead of time, then call. For any age of JAX."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.ntk.worker import Contender


def megabytes(compiled: Any) -> float | None:
    """Give temporaries and results of a compiled function, where JAX can tell."""
    try:
        analysis = compiled.memory_analysis()
        size = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return size / 2**20 or None  # jaxlib 0.4.23 answers 0 on a CPU


def contender(kernel: Callable[..., Any], *arguments: Any, **extra: Any) -> Contender:
    """Serve `jit(kernel)(*arguments)`; tracing counts as compilation."""
    arguments = jax.tree_util.tree_map(jax.device_put, arguments)
    compiled = []

    def compile_() -> float | None:
        compiled.append(jax.jit(kernel).lower(*arguments).compile())
        return megabytes(compiled[0])

    def call() -> Any:
        return jax.block_until_ready(compiled[0](*arguments))

    return Contender(compile_, call, np.asarray, extra)
