"""What every test rests on: float64, no silent broadcasting, no key used twice, no window."""

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

matplotlib.use("Agg")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")
