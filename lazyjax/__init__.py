"""lazyjax: does this network train like its linearization?"""

from lazyjax.checkpoints import load_history, load_tree, save_history, save_tree
from lazyjax.data import TARGETS, excess_risk, expected_test_error, make_dataset
from lazyjax.dynamics import Dynamics, gradient_descent, gradient_flow
from lazyjax.kernels import matrix, ntk
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
from lazyjax.spectrum import (
    critical_learning_rate,
    effective_rank,
    eigenvalues,
    largest_eigenvalue,
    numerical_rank,
    wishart_edge,
)
from lazyjax.tangent import center, linearize, scale, taylor
from lazyjax.training import log_grid, progress, scale_loss, train, train_ensemble
from lazyjax.types import Dataset, History, ModelFunction, Params

__all__ = [
    "MLP",
    "TARGETS",
    "Dataset",
    "Dynamics",
    "History",
    "Kappa",
    "ModelFunction",
    "Params",
    "Sinusoidal",
    "center",
    "critical_learning_rate",
    "deep_mlp",
    "effective_rank",
    "eigenvalues",
    "excess_risk",
    "expected_test_error",
    "from_linen",
    "from_nnx",
    "gradient_descent",
    "gradient_flow",
    "kappa",
    "kernel_alignment",
    "largest_eigenvalue",
    "layer_movement",
    "linearize",
    "load_history",
    "load_tree",
    "log_grid",
    "make_dataset",
    "matrix",
    "ntk",
    "numerical_rank",
    "pattern_change",
    "preactivations",
    "progress",
    "relative_kernel_change",
    "relative_weight_movement",
    "save_history",
    "save_tree",
    "scale",
    "scale_loss",
    "shallow_mlp",
    "sinusoidal_features",
    "step_sizes",
    "tangent_gap",
    "target_alignment",
    "taylor",
    "train",
    "train_ensemble",
    "wishart_edge",
]
