"""Which backend runs on which platform."""

import pytest

from cogvideox.transformer.backends import CpuBackend, GpuBackend, TpuBackend, choose_backend


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
        ("splash", "gpu", "bfloat16", "needs a TPU, this is a GPU"),
        ("cudnn", "tpu", "bfloat16", "needs a GPU, this is a TPU"),
        ("cudnn", "gpu", "float32", "bfloat16 only, not float32"),
    ],
)
def test_what_does_not_run_is_refused(attention, platform, dtype, said):
    with pytest.raises(ValueError, match=said):
        choose_backend(attention, platform, dtype)
