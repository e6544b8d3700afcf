"""lazyjax: does this network train like its linearization?"""

from lazyjax.checkpoints import load_history, load_tree, save_history, save_tree
from lazyjax.comparison import (
    Comparison,
    Thresholds,
    Verdict,
    compare,
    compare_ensemble,
    verdicts,
)
from lazyjax.curvature import sharpness
from lazyjax.data import TARGETS, excess_risk, expected_test_error, make_dataset
from lazyjax.dynamics import Dynamics, gradient_descent, gradient_flow
from lazyjax.kernels import Estimate, estimate, explain, matrix, ntk, ntk_diagonal
from lazyjax.limits import Infinite, Posterior, gp, infinite, variances
from lazyjax.metrics import (
    Kappa,
    kappa,
    kernel_alignment,
    layer_movement,
    pattern_change,
    relative_kernel_change,
    relative_weight_movement,
    step_sizes,
    tangent_gap,
    target_alignment,
)
from lazyjax.models import (
    MLP,
    Sinusoidal,
    deep_mlp,
    from_linen,
    from_nnx,
    preactivations,
    shallow_mlp,
    sinusoidal_features,
)
from lazyjax.natural import natural_gradient, scale_by_natural_gradient
from lazyjax.operators import KernelOperator, as_operator, ntk_operator
from lazyjax.patterns import relu_inputs
from lazyjax.regression import kernel_regression, tangent_parameters
from lazyjax.selection import Selection, select
from lazyjax.sketches import sketch
from lazyjax.spectrum import (
    critical_learning_rate,
    effective_rank,
    eigenvalues,
    largest_eigenvalue,
    numerical_rank,
    wishart_edge,
)
from lazyjax.store import StoredKernel, kernel_store, open_kernel
from lazyjax.tangent import center, linearize, scale, taylor
from lazyjax.training import log_grid, progress, scale_loss, train, train_ensemble
from lazyjax.types import Dataset, History, ModelFunction, Params
from lazyjax.verification import Verification, WrongKernel, verify

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "TARGETS",
    "Comparison",
    "Dataset",
    "Dynamics",
    "Estimate",
    "History",
    "Infinite",
    "Kappa",
    "KernelOperator",
    "ModelFunction",
    "Params",
    "Posterior",
    "Selection",
    "Sinusoidal",
    "StoredKernel",
    "Thresholds",
    "Verdict",
    "Verification",
    "WrongKernel",
    "as_operator",
    "center",
    "compare",
    "compare_ensemble",
    "critical_learning_rate",
    "deep_mlp",
    "effective_rank",
    "eigenvalues",
    "estimate",
    "excess_risk",
    "expected_test_error",
    "explain",
    "from_linen",
    "from_nnx",
    "gp",
    "gradient_descent",
    "gradient_flow",
    "infinite",
    "kappa",
    "kernel_alignment",
    "kernel_regression",
    "kernel_store",
    "largest_eigenvalue",
    "layer_movement",
    "linearize",
    "load_history",
    "load_tree",
    "log_grid",
    "make_dataset",
    "matrix",
    "natural_gradient",
    "ntk",
    "ntk_diagonal",
    "ntk_operator",
    "numerical_rank",
    "open_kernel",
    "pattern_change",
    "preactivations",
    "progress",
    "relative_kernel_change",
    "relative_weight_movement",
    "relu_inputs",
    "save_history",
    "save_tree",
    "scale",
    "scale_by_natural_gradient",
    "scale_loss",
    "select",
    "shallow_mlp",
    "sharpness",
    "sinusoidal_features",
    "sketch",
    "step_sizes",
    "tangent_gap",
    "tangent_parameters",
    "target_alignment",
    "taylor",
    "train",
    "train_ensemble",
    "variances",
    "verdicts",
    "verify",
    "wishart_edge",
]
