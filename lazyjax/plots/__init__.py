"""Figures: comparisons, histories, and what experiments share when they draw their own."""

from lazyjax.plots.changes import kernels, measures
from lazyjax.plots.comparisons import comparison
from lazyjax.plots.courses import history, layers, training
from lazyjax.plots.looks import COLOURS, MODELS, Look, data, style, target
from lazyjax.plots.outputs import functions, predictions

__all__ = [
    "COLOURS",
    "MODELS",
    "Look",
    "comparison",
    "data",
    "functions",
    "history",
    "kernels",
    "layers",
    "measures",
    "predictions",
    "style",
    "target",
    "training",
]
