"""The practical's networks, and the starts and activations that they may have."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lazyjax import checks
from lazyjax.types import Params

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
