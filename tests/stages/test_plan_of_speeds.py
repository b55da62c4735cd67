"""Planned seconds of each --speed at 768x1360x81 on v6e-8, from the exact step's estimates."""

import pytest

from cogvideox.denoising.program import Denoiser
from cogvideox.model.settings import DenoisingSettings, LatentShape
from cogvideox.transformer.backends import TpuBackend
from runtime.mesh import make_mesh
from runtime.topology import machine_devices
from stages import plan
from stages.estimates import Estimate


@pytest.fixture(scope="module")
def exact() -> Denoiser:
    from benchmarks.published_models import TRANSFORMERS

    return Denoiser(
        config=TRANSFORMERS["CogVideoX1.5-5B"],
        stored={},
        latents=LatentShape(1, 22, 16, 96, 170),
        text_tokens=226,
        guided=True,
        dtype="bfloat16",
        mesh=make_mesh((2, 4, 1), list(machine_devices("v6e-8").flat)),
        backend=TpuBackend(),
    )


def test_planned_seconds(exact: Denoiser, monkeypatch):
    """The estimates are those of docs/results.md; 8.8 GB are received in a step."""
    hbm = {"weights": 11.2e9, "inputs": 1e6, "outputs": 70e6, "temporaries": 630e6, "code": 9e6}
    hbm = {kind: int(size) for kind, size in hbm.items()}
    step = Estimate("compiled", True, hbm, 1_632_000_000, 8_825_000_000)
    skipped = Estimate("compiled", True, hbm, 1_500_000, 6_000_000)
    monkeypatch.setattr(plan, "estimate_step", lambda *_: skipped)
    settings = DenoisingSettings(768, 1360, 81, 16, 50, 6.0, False, "dpm", 0)
    seconds = plan._seconds_of_all_steps(settings, exact, step, None)  # pyright: ignore
    assert seconds == pytest.approx(
        {"exact": 47.6, "near": 27.6, "fast": 15.4, "turbo": 9.7}, abs=0.2
    )
    assert seconds["fast"] <= 15.5 and seconds["turbo"] <= 10
