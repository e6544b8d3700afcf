"""What was asked for, and why there is no closed form, in words."""

from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from lazyjax.comparison.optimizers import HeavyBall
from lazyjax.training import factor_of_squares, innermost
from lazyjax.types import Loss, Params


def why_none(loss: Loss, full: bool, ball: HeavyBall | None) -> str:
    """Say why there is no closed form; "" if there may be one."""
    if factor_of_squares(loss) is None:
        return f"the loss is {_name(innermost(loss))}, not optax.losses.squared_error itself"
    if not full:
        return "it is trained on mini-batches"
    if ball is None:
        return "the optimiser is not gradient descent with one rate, with or without a heavy ball"
    return ""


def _name(function: Any) -> str:
    """Name a function, as far as it has a name."""
    function = getattr(function, "func", function)
    name = getattr(function, "__name__", "<>")
    return "a function without a name" if "<" in name else name.replace("_", " ")


def settings_in_words(
    start: Params,
    loss: Loss,
    ball: HeavyBall | None,
    steps: int,
    batch_size: int | None,
    memory: int | float | str,
) -> dict[str, str]:
    """Say what was asked for."""
    optimizer = "an Optax optimiser that is not gradient descent with one rate"
    if ball is not None:
        optimizer = f"gradient descent, learning rate {ball.learning_rate:.4g}"
        if ball.momentum:
            optimizer += f", momentum {ball.momentum:.4g}"
    weights = jax.tree.leaves(start)
    return {
        "parameters": f"{sum(w.size for w in weights):,}",
        "dtype": str(jnp.result_type(*weights)),
        "loss": _name(innermost(loss)),
        "optimiser": optimizer,
        "steps": f"{steps:,}",
        "batch": "all examples" if batch_size is None else f"{batch_size:,}",
        "memory": str(memory),
        "lazyjax and jax": f"{version('lazyjax')} and {jax.__version__}",
    }
