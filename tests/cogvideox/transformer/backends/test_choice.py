"""Which backend runs on which platform."""

import pytest

from cogvideox.transformer.backends import (
    CpuBackend,
    GpuBackend,
    HopperBackend,
    TpuBackend,
    choose_backend,
)


@pytest.mark.parametrize(
    ("attention", "platform", "dtype", "expected"),
    [
        ("auto", "tpu", "bfloat16", TpuBackend),
        ("auto", "tpu", "float32", TpuBackend),
        ("auto", "gpu", "bfloat16", GpuBackend),
        ("auto", "gpu", "float32", CpuBackend),  # cuDNN has no float32 attention
        ("auto", "cpu", "bfloat16", CpuBackend),
        ("splash", "tpu", "bfloat16", TpuBackend),
        ("cudnn", "gpu", "bfloat16", GpuBackend),
        ("reference", "tpu", "bfloat16", CpuBackend),
        ("reference", "gpu", "bfloat16", CpuBackend),
    ],
)
def test_the_fastest_that_runs_is_chosen(attention, platform, dtype, expected):
    assert type(choose_backend(attention, platform, dtype)) is expected


@pytest.mark.parametrize(
    ("attention", "platform", "dtype", "said"),
    [
        ("splash", "cpu", "bfloat16", "needs a TPU or a GPU, this is a CPU"),
        ("cudnn", "tpu", "bfloat16", "needs a GPU, this is a TPU"),
        ("cudnn", "gpu", "float32", "bfloat16 only on a GPU, not float32"),
    ],
)
def test_what_does_not_run_is_refused(attention, platform, dtype, said):
    with pytest.raises(ValueError, match=said):
        choose_backend(attention, platform, dtype)


@pytest.mark.parametrize(
    ("attention", "capability", "dtype", "expected"),
    [
        ("auto", "9.0", "bfloat16", HopperBackend),
        ("auto", "8.0", "bfloat16", GpuBackend),
        ("auto", "10.0", "bfloat16", GpuBackend),
        ("auto", "9.0", "float32", CpuBackend),
        ("splash", "9.0", "bfloat16", HopperBackend),
        ("cudnn", "9.0", "bfloat16", GpuBackend),
    ],
)
def test_hopper_gpus_take_the_projects_kernel(attention, capability, dtype, expected):
    assert type(choose_backend(attention, "gpu", dtype, capability)) is expected


@pytest.mark.parametrize(
    ("capability", "dtype", "said"),
    [
        ("8.0", "bfloat16", "compute capability 9.0, this GPU has 8.0; use auto or cudnn"),
        ("9.0", "float32", "bfloat16 only on a GPU, not float32"),
    ],
)
def test_splash_refuses_other_gpus_and_dtypes(capability, dtype, said):
    with pytest.raises(ValueError, match=said):
        choose_backend("splash", "gpu", dtype, capability)
