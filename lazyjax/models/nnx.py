"""From a Flax NNX module to `(f, params)`."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from lazyjax.models.applied import Applied, check_one_input
from lazyjax.types import Params, PyTree


def _check_evaluation(module: nnx.Module) -> None:
    """Refuse layers that drop at random, by the attributes that `module.eval()` sets."""
    for path, layer in nnx.iter_graph(module):
        if not isinstance(layer, nnx.Module) or getattr(layer, "deterministic", True):
            continue
        rates = [getattr(layer, name, 0) for name in ("rate", "dropout_rate")]
        if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            raise ValueError(
                "`module` must be deterministic, but its dropout is on at "
                f"{'/'.join(map(str, path)) or type(layer).__name__}. "
                "Call module.eval() first."
            )


def _snapshot(state: PyTree) -> Any:
    """Give the arrays of an NNX state in dictionaries, which no change of a module reaches."""
    # what a Variable holds, not what it gives: `get_value` of a subclass may compute
    pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # its name in Flax 0.12.0
    return jax.tree.map(
        lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf,
        nnx.to_pure_dict(pure(state)),
    )


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _clone(call: Mapping[str, Any]) -> dict[str, Any]:
    """Give keywords of a call whose random streams are not those that came."""
    return {k: nnx.clone(v) if isinstance(v, nnx.Pytree) else v for k, v in call.items()}


def _apply_nnx(
    graph: Any, structures: Any, method: Any, call: Any, constants: Any, params: Params, x: PyTree
) -> Any:
    # new Variables and a new module at every call: what the call changes is lost with them
    states = [
        jax.tree.unflatten(structure, jax.tree.leaves(tree))
        for structure, tree in zip(structures, (params, constants), strict=True)
    ]
    module = nnx.merge(graph if _is_hashable(graph) else copy.deepcopy(graph), *states)
    keywords = _clone(dict(call))
    if callable(method):
        return method(module, x, **keywords)
    return getattr(module, method or "__call__")(x, **keywords)


def from_nnx(module: nnx.Module, *, method: Any = None, **call: Any) -> tuple[Partial, Params]:
    """Turn a Flax NNX module into a model function and its parameters.

    Parameters
    ----------
    module : flax.nnx.Module
        With its weights; it is not changed, and what becomes of it later does not change f. Set it
        up for evaluation first, as in `module.eval()`.
    method : str or callable, optional
        The module's method to call instead of `__call__`, or a function of (module, x).
    **call
        Keywords of every call.

    Returns
    -------
    f : jax.tree_util.Partial
        `f(params, x) -> y`, pure. All state but `nnx.Param` (batch statistics, random streams) is
        held in its leaves: constants, from which each call starts, and never updated.
    params : dict
        The `nnx.Param` arrays as plain nested dictionaries.

    Raises
    ------
    TypeError
        If `module` is no NNX module.
    ValueError
        If dropout is on in a layer of the module, there is no such method, or it requires more than
        x and the keywords.

    Notes
    -----
    Batch normalisation in training mode makes f a function of the whole batch, which `ntk` takes as
    one example: `ntk(lambda p, x: f(p, x[0])[None], params, x[None])`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f, params = from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> f(params, jnp.zeros((4, 2))).shape
    (4, 3)
    """
    if not isinstance(module, nnx.Module):
        cure = "from_linen" if isinstance(module, nn.Module) else "a model function f(params, x)"
        raise TypeError(
            f"`module` must be a flax.nnx.Module, got {type(module).__name__}. Use {cure}."
        )
    check_one_input(module, method, call)
    _check_evaluation(module)
    graph, *states = nnx.split(module, nnx.Param, ...)
    if not _is_hashable(graph):  # it holds lists and the like, which the module may change
        graph = copy.deepcopy(graph)
    if inspect.ismethod(method):  # of the module that is given: f has its own
        method = method.__func__
    structures = tuple(jax.tree.structure(state) for state in states)
    params, constants = (_snapshot(state) for state in states)
    f = Applied(_apply_nnx, graph, structures, method, tuple(sorted(_clone(call).items())))
    return Partial(f, constants), params
