"""Eight fake CPU devices for all tests, whatever the machine, and one compilation cache a run."""

import os

# Before JAX is imported anywhere. Tests that compile for a TPU say so to the compiler themselves.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from pathlib import Path

import pytest

# `make quick`: the files that find the most for their time. Of the others, those that compare with
# diffusers on many meshes, start many processes or compile for TPUs take minutes.
QUICK = (
    "tests/test_architecture.py",
    "tests/test_docs.py",
    "tests/cogvideox/model",
    "tests/cogvideox/transformer/backends",
    "tests/cogvideox/transformer/test_norms.py",
    "tests/cogvideox/transformer/test_parameters.py",
    "tests/cogvideox/transformer/test_projections.py",
    "tests/cogvideox/vae/test_weights.py",
    "tests/cogvideox/video/test_formats.py",
    "tests/cogvideox/video/test_pixels.py",
    "tests/jobs/test_claims.py",
    "tests/jobs/test_jobfile.py",
    "tests/jobs/test_records.py",
    "tests/jobs/test_status.py",
    "tests/runtime/test_executables.py",
    "tests/runtime/test_files.py",
    "tests/runtime/test_hlo_costs.py",
    "tests/runtime/test_sources.py",
    "tests/splash_attention/test_splash_block_sizes.py",
    "tests/toyworld/test_captions.py",
    "tests/parity/test_pipeline.py",
)


def pytest_collection_modifyitems(config, items):
    """Marks the tests of `make quick`."""
    quick = [config.rootpath / path for path in QUICK]
    missing = [str(path) for path in quick if not path.exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py names tests that do not exist: {missing}")
    for item in items:
        if any(Path(item.path).is_relative_to(path) for path in quick):
            item.add_marker(pytest.mark.quick)


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
