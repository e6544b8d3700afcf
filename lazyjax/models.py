"""Flax modules of the practical, and the door from a Flax module to `(f, params)`.

No Flax type goes further in: what leaves here is a model function and a plain pytree.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from flax.core import unfreeze
from jax.tree_util import Partial
from jax.typing import DTypeLike

from lazyjax import checks
from lazyjax.types import Params, PyTree

Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "gelu": nn.gelu,
    "softplus": nn.softplus,
    "silu": nn.silu,
    "erf": jax.scipy.special.erf,
    "sin": jnp.sin,
    "identity": lambda x: x,
}


class Parametrization(NamedTuple):
    """How a linear layer begins: samplers of `(key, shape, dtype, fan_in)`, and its factor."""

    kernel: Callable[..., jax.Array]
    bias: Callable[..., jax.Array]
    factor: Callable[[int], float]  # of the kernel in the forward pass, by fan_in


def _uniform(key: jax.Array, shape: Any, dtype: DTypeLike, fan_in: int) -> jax.Array:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _normal(key: jax.Array, shape: Any, dtype: DTypeLike, fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / jnp.asarray(math.sqrt(fan_in), dtype)


def _standard_normal(key: jax.Array, shape: Any, dtype: DTypeLike, fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _zeros(key: jax.Array, shape: Any, dtype: DTypeLike, fan_in: int) -> jax.Array:
    return jnp.zeros(shape, dtype)


PARAMETRIZATIONS: dict[str, Parametrization] = {
    # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), weights and biases: PyTorch's default
    "pytorch": Parametrization(_uniform, _uniform, lambda fan_in: 1.0),
    # N(0, 1/fan_in), biases 0: LeCun et al. 1998
    "lecun": Parametrization(_normal, _zeros, lambda fan_in: 1.0),
    # N(0, 1) with 1/sqrt(fan_in) in the forward pass: Jacot, Gabriel, Hongler 2018
    "ntk": Parametrization(_standard_normal, _standard_normal, lambda fan_in: fan_in**-0.5),
}


class Linear(nn.Module):
    """A linear layer with bias, its parameters of the dtype of the input.

    y = factor(d_in) x W + b, with W (d_in, d_out) and b (d_out,) as the parametrization has them.
    """

    features: int
    parametrization: str = "pytorch"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (N, d_in) to (N, d_out)."""
        d_in, dtype = x.shape[-1], x.dtype
        sample = PARAMETRIZATIONS[self.parametrization]
        kernel = self.param("kernel", sample.kernel, (d_in, self.features), dtype, d_in)
        y = x @ kernel * jnp.asarray(sample.factor(d_in), dtype)
        if self.use_bias:
            bias = self.param("bias", sample.bias, (self.features,), dtype, d_in)
            y = y + jnp.broadcast_to(bias, y.shape)
        return y


class MLP(nn.Module):
    """A multilayer perceptron of any depth, widths and activation.

    Attributes
    ----------
    widths : tuple of int
        Units of the hidden layers, `hidden_0`, `hidden_1`, ..
    outputs : int
        Units of the last layer, `output`.
    activation : str
        A name of `ACTIVATIONS`.
    parametrization : str
        A name of `PARAMETRIZATIONS`: pytorch, lecun or ntk.
    use_bias : bool

    Raises
    ------
    TypeError, ValueError
        When it is made, if a width is no whole number from 1, or a name is unknown.
    """

    widths: Sequence[int]
    outputs: int = 1
    activation: str = "relu"
    parametrization: str = "pytorch"
    use_bias: bool = True

    def __post_init__(self) -> None:
        for width in self.widths:
            checks.whole("widths", width, least=1)
        checks.whole("outputs", self.outputs, least=1)
        checks.one_of("activation", self.activation, ACTIVATIONS)
        checks.one_of("parametrization", self.parametrization, PARAMETRIZATIONS)
        object.__setattr__(self, "widths", tuple(self.widths))  # hashable, for the cache of jit
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (N, d) to (N, outputs)."""
        for i, width in enumerate(self.widths):
            layer = Linear(width, self.parametrization, self.use_bias, name=f"hidden_{i}")
            z = layer(x)
            self.sow("intermediates", "preactivations", z)
            x = ACTIVATIONS[self.activation](z)
        return Linear(self.outputs, self.parametrization, self.use_bias, name="output")(x)


def shallow_mlp(width: int = 10, **options: Any) -> MLP:
    """Make the practical's shallow network: one hidden layer, 3 width + 1 parameters on the line.

    Parameters
    ----------
    width : int
    **options
        Those of `MLP`: outputs, activation, parametrization, use_bias.

    Returns
    -------
    MLP

    Raises
    ------
    TypeError, ValueError
        As `MLP`.
    """
    return MLP((width,), **options)


def deep_mlp(width: int = 10, **options: Any) -> MLP:
    """Make the practical's deep network: five hidden layers, 4 width^2 + 7 width + 1 parameters.

    Parameters
    ----------
    width : int
    **options
        Those of `MLP`: outputs, activation, parametrization, use_bias.

    Returns
    -------
    MLP

    Raises
    ------
    TypeError, ValueError
        As `MLP`.
    """
    return MLP((width,) * 5, **options)


def _check_features(dimension: int, frequency: float, first_k: int) -> None:
    checks.whole("dimension", dimension, least=2)
    checks.whole("first_k", first_k, least=0)
    checks.positive("frequency", frequency)
    if dimension % 2:
        raise ValueError(
            f"`dimension` must be even, half of it sines and half cosines, got {dimension}. "
            f"Use {dimension + 1}."
        )


def sinusoidal_features(
    x: jax.Array, *, dimension: int, frequency: float = 2 * math.pi, first_k: int = 0
) -> jax.Array:
    """Compute sin(frequency k x) and cos(frequency k x) for k = first_k, first_k + 1, ..

    Parameters
    ----------
    x : (N, 1)
    dimension : int
        Number of features, even: the sines first, then the cosines.
    frequency : float
        2 pi has period 1; the practical's section 24 uses 0.2 pi.
    first_k : int
        The practical starts at 0: a sine that is dead, and a cosine that equals the bias.

    Returns
    -------
    (N, dimension) array

    Raises
    ------
    TypeError, ValueError
        If `dimension` is odd or below 2, `frequency` is not positive, `first_k` is negative, or x
        is not (N, 1).
    """
    _check_features(dimension, frequency, first_k)
    if x.ndim != 2 or x.shape[1] != 1:
        raise ValueError(f"`x` must have shape (N, 1), got {x.shape}. Use x[:, None].")
    k = jnp.arange(first_k, first_k + dimension // 2, dtype=x.dtype)[None]
    r = jnp.asarray(frequency, x.dtype) * k * x
    return jnp.concatenate([jnp.sin(r), jnp.cos(r)], axis=1)


class Sinusoidal(nn.Module):
    """The practical's linear model: `sinusoidal_features`, then a linear layer with bias.

    Attributes
    ----------
    dimension, frequency, first_k
        As in `sinusoidal_features`.
    parametrization : str
        Of the linear layer `output`.

    Raises
    ------
    TypeError, ValueError
        When it is made, as `sinusoidal_features`, or if the parametrization is unknown.
    """

    dimension: int
    frequency: float = 2 * math.pi
    first_k: int = 0
    parametrization: str = "pytorch"

    def __post_init__(self) -> None:
        _check_features(self.dimension, self.frequency, self.first_k)
        checks.one_of("parametrization", self.parametrization, PARAMETRIZATIONS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (N, 1) to (N, 1)."""
        features = sinusoidal_features(
            x, dimension=self.dimension, frequency=self.frequency, first_k=self.first_k
        )
        return Linear(1, self.parametrization, name="output")(features)


# --- the door


class _Apply:
    """A module as a function; equal for equal modules, so that jit compiles once.

    `apply(*static, constants, params, x)`, and what is static decides equality.
    """

    def __init__(self, apply: Callable[..., Any], *static: Any):
        self.apply, self.static = apply, static

    def __call__(self, constants: Any, params: Params, x: PyTree) -> Any:
        try:
            return self.apply(*self.static, constants, params, x)
        except errors.ModifyScopeVariableError as error:
            raise ValueError(
                "`f` must be in evaluation mode, but its module updates variables that are "
                "constants here, as batch normalisation does in training. Pass train=False or "
                f"use_running_average=True. It said: {error}"
            ) from error
        except errors.InvalidRngError as error:
            raise ValueError(
                "`f` must be deterministic, but its module asks for random numbers, as dropout "
                f"does that is on. Pass train=False or deterministic=True. It said: {error}"
            ) from error

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        try:
            return isinstance(other, _Apply) and bool(
                self.apply == other.apply and self.static == other.static
            )
        except (TypeError, ValueError):  # fields that do not compare, arrays among them
            return False

    def __hash__(self) -> int:
        try:
            return hash((self.apply, self.static))
        except TypeError:
            return hash((self.apply, type(self.static[0])))


def _check_one_input(module: Any, method: Any, call: Mapping[str, Any]) -> None:
    """Require a method that takes x, and beside it the keywords of the call."""
    function = method if callable(method) else getattr(module, method or "__call__", None)
    kind = type(module).__name__
    if function is None:
        raise ValueError(
            f"`method` must name a method of {kind}, got {method or '__call__'!r}. Name one, or "
            "pass method=lambda module, x: ..."
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # what is written in C tells nothing
        return
    takes_module = callable(method) and not inspect.ismethod(method)
    others = parameters[2:] if takes_module else parameters[1:]
    missing = [
        p.name
        for p in others
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in call
    ]
    if missing:
        raise ValueError(
            f"`module` must be called with one input, and {kind} requires {missing} too. Give a "
            f"setting as a keyword, {missing[0]}=..., or put several inputs into one: "
            'method=lambda module, x: module(x["a"], x["b"]).'
        )


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
    >>> f, params = from_linen(shallow_mlp(10), jax.random.key(0), jnp.zeros((1, 1)))
    >>> f(params, jnp.zeros((4, 1))).shape
    (4, 1)
    """
    if not isinstance(module, nn.Module):
        cure = "from_nnx" if isinstance(module, nnx.Module) else "a model function f(params, x)"
        raise TypeError(
            f"`module` must be a flax.linen.Module, got {type(module).__name__}. Use {cure}."
        )
    _check_one_input(module, method, call)
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
    f = _Apply(_apply_linen, module, method, tuple(sorted(call.items())))
    return Partial(f, constants), variables["params"]


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
    >>> f, params = from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> f(params, jnp.zeros((4, 2))).shape
    (4, 3)
    """
    if not isinstance(module, nnx.Module):
        cure = "from_linen" if isinstance(module, nn.Module) else "a model function f(params, x)"
        raise TypeError(
            f"`module` must be a flax.nnx.Module, got {type(module).__name__}. Use {cure}."
        )
    _check_one_input(module, method, call)
    _check_evaluation(module)
    graph, *states = nnx.split(module, nnx.Param, ...)
    if not _is_hashable(graph):  # it holds lists and the like, which the module may change
        graph = copy.deepcopy(graph)
    if inspect.ismethod(method):  # of the module that is given: f has its own
        method = method.__func__
    structures = tuple(jax.tree.structure(state) for state in states)
    params, constants = (_snapshot(state) for state in states)
    f = _Apply(_apply_nnx, graph, structures, method, tuple(sorted(_clone(call).items())))
    return Partial(f, constants), params


def preactivations(module: MLP) -> Callable[[Params, jax.Array], tuple[jax.Array, ...]]:
    """Give the function that computes the inputs of a network's activations.

    Parameters
    ----------
    module : MLP

    Returns
    -------
    callable
        `g(params, x (N, d))` -> one array (N, width) a hidden layer.

    Raises
    ------
    TypeError
        If the module is no `MLP`: another has no layers to look into by name.
    """
    if not isinstance(module, MLP):
        raise TypeError(
            f"`module` must be an MLP of lazyjax, got {type(module).__name__}. For another model "
            "write a function of (params, x) that returns its pre-activations."
        )

    def g(params: Params, x: jax.Array) -> tuple[jax.Array, ...]:
        _, state = module.apply({"params": params}, x, mutable=["intermediates"])
        return tuple(state["intermediates"]["preactivations"])

    return g
