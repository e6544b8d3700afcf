"""The limit of infinite width: kernels of a model, read off its operations."""

from lazyjax.limits.modules import variances
from lazyjax.limits.posterior import Posterior, gp
from lazyjax.limits.wide import Infinite, infinite

__all__ = ["Infinite", "Posterior", "gp", "infinite", "variances"]
