"""Eight fake CPU devices for all tests, whatever the machine, and one compilation cache a run."""

import os

# Before JAX is imported anywhere. Tests that compile for a TPU say so to the compiler themselves.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """A compilation cache of this run's own, shared by all workers and by the scripts they start.

    Workers of pytest-xdist have folders beside each other.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "jax_cache"
    folder.mkdir(exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    return folder
