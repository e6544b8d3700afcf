"""How each parameter enters a model, and the factors a and d of its derivative.

From a model on one example to what is kept of a batch: the jaxpr is walked (`walk`), leaves are
followed through layouts (`views`) to products (`rules`), and of each part the two factors (`pair`)
or their product, the Jacobian, are computed as a plan says (`planning`).
"""

from lazyjax.factors.model import (
    Model,
    dtype_of,
    jacobian,
    model_of,
    output_shapes,
    require_reverse,
    times,
)
from lazyjax.factors.pair import Factors, Shape, bias_jacobian, jacobian_of
from lazyjax.factors.planning import (
    FACTORS,
    JACOBIAN,
    Features,
    Plan,
    Treatment,
    covered,
    features,
    join,
    leaf_of,
    plan,
)
from lazyjax.factors.rules import RULES
from lazyjax.factors.transposed import pull, pull_jacobians, pull_part
from lazyjax.factors.walk import Part

__all__ = [
    "FACTORS",
    "JACOBIAN",
    "RULES",
    "Factors",
    "Features",
    "Model",
    "Part",
    "Plan",
    "Shape",
    "Treatment",
    "bias_jacobian",
    "covered",
    "dtype_of",
    "features",
    "jacobian",
    "jacobian_of",
    "join",
    "leaf_of",
    "model_of",
    "output_shapes",
    "plan",
    "pull",
    "pull_jacobians",
    "pull_part",
    "require_reverse",
    "times",
]
