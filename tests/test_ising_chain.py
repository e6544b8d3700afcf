import math
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thoroughness import few

from experiments.ising_chain import (
    METHODS,
    NETWORKS,
    QUICK,
    Config,
    conclude,
    configurations,
    ground_energy,
    local_energies,
    plot,
    run,
    sample,
)


def hamiltonian(sites, field):
    """By Kronecker products of the matrices of one spin; spin 0 is the last factor."""
    z, flip = np.diag([1.0, -1.0]), np.array([[0.0, 1.0], [1.0, 0.0]])

    def product(factors):
        return reduce(np.kron, [factors.get(i, np.eye(2)) for i in reversed(range(sites))])

    bonds = sum(product({i: z, (i + 1) % sites: z}) for i in range(sites))
    return -bonds - field * sum(product({i: flip}) for i in range(sites))


@pytest.mark.parametrize("field", [0.5, 1.0, 1.7])
@few("sites", [4, 6, 8], 2)
def test_the_ground_energy_is_that_of_the_dense_matrix(sites, field):
    lowest = np.linalg.eigvalsh(hamiltonian(sites, field))[0]
    assert ground_energy(sites, field) == pytest.approx(lowest, rel=1e-12)


def test_local_energies_are_those_of_the_dense_matrix():
    psi = np.random.default_rng(0).uniform(0.2, 2, 2**6)
    found = local_energies(jnp.log(psi), jnp.asarray(configurations(6)), 0.8)
    assert found.shape == (64,)
    np.testing.assert_allclose(found, hamiltonian(6, 0.8) @ psi / psi, rtol=1e-12)


def test_local_energies_of_the_ground_state_are_its_energy():
    values, vectors = np.linalg.eigh(hamiltonian(6, 1.0))
    log_psi = jnp.log(jnp.abs(vectors[:, 0]))
    found = local_energies(log_psi, jnp.asarray(configurations(6)), 1.0)
    np.testing.assert_allclose(found, np.full(64, values[0]), rtol=1e-8)


def test_samples_have_the_probabilities_they_are_drawn_with():
    p = jnp.asarray([0.1, 0.0, 0.6, 0.3])
    drawn = np.asarray(sample(jax.random.key(0), p, 40_000))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 40_000, p, atol=0.01)


@few("name", NETWORKS)
def test_wave_functions_begin_even_under_a_flip_of_all_spins(name):
    f, draw = NETWORKS[name]
    config, x = Config(**QUICK), jnp.asarray(configurations(8))
    params = draw(jax.random.key(0), config)
    assert f(params, x).shape == (256,)
    np.testing.assert_allclose(f(params, x), f(params, -x), rtol=1e-12)


@pytest.fixture(scope="module")
def results():
    return run(Config(**QUICK))


@pytest.mark.thorough
def test_natural_gradients_find_the_ground_state_of_a_small_chain(results):
    for network in NETWORKS:
        for method in METHODS:
            errors = results.arrays[f"{network}, {method}"]
            assert errors.shape == (QUICK["steps"],)
            assert np.all(errors > -1e-12)  # the variational principle
        facts = results.summary[network]
        final = {m: facts[m]["final relative error of the energy"] for m in METHODS}
        assert max(final["minSR"], final["SPRING"]) < 5e-4
        assert final["gradient descent"] > 5 * final["minSR"]


@pytest.mark.thorough
def test_figures_and_conclusions_tell_the_methods(results):
    assert set(plot(results)) == {"energies"}
    told = " ".join(conclude(results))
    assert "RBM, to a relative error of the energy of 1e-4: minSR" in told
    slow = results.summary["FFN"]["gradient descent"]
    assert math.isinf(slow["steps to 1e-4"])
    assert "gradient descent is never below 1e-4 and ends at" in told


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sites": 7}, ValueError, "`sites` must be even and at most 20, got 7"),
        ({"sites": 22}, ValueError, "`sites` must be even and at most 20, got 22"),
        ({"sites": 2}, ValueError, "`sites` must be at least 4"),
        ({"networks": ("CNN",)}, ValueError, "`networks` must be one of RBM, FFN"),
        ({"networks": ()}, ValueError, "number of `networks.* must be at least 1"),
        ({"widths": (0, 3)}, ValueError, "`widths` must be at least 1"),
        ({"widths": (3,)}, ValueError, "`widths` must be of 2 layers, got 1"),
        ({"samples": 1}, ValueError, "`samples` must be at least 2"),
        ({"damping": 0.0}, ValueError, "`damping` must be positive"),
        ({"steps": 2.5}, TypeError, "`steps` must be a whole number"),
    ],
)
def test_bad_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        Config(**change)
