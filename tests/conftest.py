"""Eight fake CPU devices for all tests, whatever the machine, and one compilation cache."""

import os

# Before JAX is imported anywhere. Tests that compile for a TPU say so to the compiler themselves.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """A compilation cache of this run's own, shared by the scripts that the tests start."""
    folder = tmp_path_factory.mktemp("jax_cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    return folder
