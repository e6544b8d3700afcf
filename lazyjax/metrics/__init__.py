"""How lazy was it? Movements of weights, changes of kernels, gaps, and Chizat's kappa."""

from lazyjax.metrics.kernels import (
    kernel_alignment,
    relative_kernel_change,
    tangent_gap,
    target_alignment,
)
from lazyjax.metrics.movements import (
    layer_movement,
    pattern_change,
    relative_weight_movement,
    step_sizes,
)
from lazyjax.metrics.relative_scale import Kappa, kappa

__all__ = [
    "Kappa",
    "kappa",
    "kernel_alignment",
    "layer_movement",
    "pattern_change",
    "relative_kernel_change",
    "relative_weight_movement",
    "step_sizes",
    "tangent_gap",
    "target_alignment",
]
