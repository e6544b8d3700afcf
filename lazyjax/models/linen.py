"""From a Flax linen module to `(f, params)`."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import unfreeze
from jax.tree_util import Partial

from lazyjax.models.applied import Applied, check_one_input
from lazyjax.types import Params, PyTree


def _apply_linen(
    module: nn.Module, method: Any, call: Any, constants: Any, params: Params, x: PyTree
) -> Any:
    return module.apply({**constants, "params": params}, x, method=method, **dict(call))


def from_linen(
    module: nn.Module,
    key: jax.Array | None,
    x: PyTree,
    *,
    variables: Mapping[str, Any] | None = None,
    method: Any = None,
    **call: Any,
) -> tuple[Partial, Params]:
    """Turn a Flax linen module into a model function and its parameters.

    Parameters
    ----------
    module : flax.linen.Module
    key : key or None
        For the initial weights; None will do with `variables`.
    x : array (N, ...) or pytree
        An input to initialise with; only its shapes and dtypes matter to most modules.
    variables : mapping, optional
        Those of a trained model, with its `params`; nothing is initialised then.
    method : str or callable, optional
        The module's method to call instead of `__call__`, or a function of (module, x).
    **call
        Keywords of every call, at initialisation too, such as train=False.

    Returns
    -------
    f : jax.tree_util.Partial
        `f(params, x) -> y`. Collections other than `params` (batch statistics) are its leaves:
        constants, never updated. It raises a ValueError where the module is in training mode: if it
        updates those collections, or asks for random numbers that the call has not.
    params : dict

    Raises
    ------
    TypeError
        If `module` is no linen module.
    ValueError
        If there is neither a key nor variables, the variables hold no `params`, there is no such
        method, or it requires more than x and the keywords.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from lazyjax.models.networks import shallow_mlp
    >>> f, params = from_linen(shallow_mlp(10), jax.random.key(0), jnp.zeros((1, 1)))
    >>> f(params, jnp.zeros((4, 1))).shape
    (4, 1)
    """
    if not isinstance(module, nn.Module):
        cure = "from_nnx" if isinstance(module, nnx.Module) else "a model function f(params, x)"
        raise TypeError(
            f"`module` must be a flax.linen.Module, got {type(module).__name__}. Use {cure}."
        )
    check_one_input(module, method, call)
    if variables is None:
        if key is None:
            raise ValueError(
                "`key` must be given to initialise the module, got None. Use "
                "key=jax.random.key(0), or pass the `variables` of a trained model."
            )
        # under jit: one compilation, where every little operation would have its own
        variables = jax.jit(lambda key, x: module.init(key, x, method=method, **call))(key, x)
    variables = unfreeze(dict(variables or {}))
    if "params" not in variables:
        raise ValueError(
            f"`variables` must hold the collection 'params', got {sorted(variables)}. "
            "Pass {'params': params, ...}."
        )
    sown = ("params", "intermediates")
    constants = {name: value for name, value in variables.items() if name not in sown}
    f = Applied(_apply_linen, module, method, tuple(sorted(call.items())))
    return Partial(f, constants), variables["params"]
