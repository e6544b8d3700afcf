"""What every test rests on: float64, no silent broadcasting, no key used twice, no window."""

import gc
import os
import tempfile

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest
from hypothesis import HealthCheck, Phase, settings

matplotlib.use("Agg")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
gc.set_threshold(100_000)  # traces are many objects and few cycles

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{tempfile.gettempdir()}/hypothesis")
settings.register_profile(
    "default",
    max_examples=30,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=300)


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="every method on every model, and ten times the random models",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: runs with --thorough only")
    settings.load_profile("thorough" if config.getoption("thorough") else "default")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("thorough"):
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")
