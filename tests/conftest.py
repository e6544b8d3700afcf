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
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)


COMPILED_LITTLE = {
    "test_kinds_of_faults",
    "test_traces",
    "test_verification",
    "test_batches",
    "test_command_line",
    "test_digits_kernel",
    "test_docs",
    "test_kernel_models",
    "test_kernel_random_models",
    "test_kernels",
    "test_operators",
    "test_operators_spectra",
    "test_readme",
    "test_regression",
    "test_sketches",
}
"""Modules of many small programs that run once: to optimise them costs more than to run them."""


@pytest.fixture(autouse=True, scope="module")
def _compilation(request):
    little = request.module.__name__ in COMPILED_LITTLE
    jax.config.update("jax_disable_most_optimizations", little)


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="every method on every model, and 1 000 random models",
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
