"""Faults that were mended, put back one at a time: do the random models find them?

    python tests/faults_put_back.py [FAULT ...]

Prints for each fault the seeds whose first thirty random models meet it, and after how many.
"""

import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import jax
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import UnsatisfiedAssumption

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # each program runs once

from test_kernel_random_models import CALLS, check, nets  # noqa: E402 (JAX is told first)

from lazyjax.factors import pair, planning, walk  # noqa: E402 (JAX is told first)

SEEDS, MODELS = range(1, 6), 30


def without(module, text):
    """Give a module whose code lacks some text."""
    source = Path(module.__file__).read_text()
    if text not in source:
        raise ValueError(f"`text` must be in {module.__name__}, got {text!r}. Write what is there.")
    changed = ModuleType(module.__name__)
    changed.__dict__.update(module.__dict__)
    exec(compile(source.replace(text, ""), module.__file__, "exec"), changed.__dict__)
    return changed


NO_LITERAL = """        if isinstance(product, Literal):
            return None
"""
bias, factors_of_use = walk.Bias, pair._factors_of_use
FAULTS = {
    "none, which nothing must meet": nullcontext(),
    "the factor of a bias": patch.object(walk, "Bias", lambda leaf, factor: bias(leaf, 1.0)),
    "lookups in two orders": patch.object(walk, "in_order", lambda roles: True),
    "factors out of range": patch.object(
        pair, "_factors_of_use", lambda *a: factors_of_use(*a[:-1], False)
    ),
    "literals": patch.object(planning, "find", without(walk, NO_LITERAL).find),
}


def found_after(number):
    """Count the models of a seed up to the first that fails; None if none does."""
    count = 0

    def one(net, call):
        nonlocal count
        count += 1
        try:
            check(net, call)
        except UnsatisfiedAssumption:
            count -= 1
            raise

    models = settings(
        max_examples=MODELS,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )(seed(number)(given(net=nets(), call=CALLS)(one)))
    try:
        models()
    except Exception:
        return count
    return None


def main(names):
    for name in names or FAULTS:
        with warnings.catch_warnings(), FAULTS[name]:
            warnings.simplefilter("ignore")  # of overflow, which the fault itself makes
            after = [found_after(number) for number in SEEDS]
        seeds = [f"{n}" if n else "not" for n in after]
        print(
            f"{name}: {len(SEEDS) - after.count(None)} of {len(SEEDS)} seeds, after "
            f"{', '.join(seeds)} models",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
