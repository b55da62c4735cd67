"""The step's program: unguided runs keep their executable, and equal models share one."""

import dataclasses

import jax
import pytest

from cogvideox.denoising.program import Denoiser
from cogvideox.model.config import TransformerConfig
from cogvideox.model.settings import LatentShape
from cogvideox.transformer.backends import CpuBackend
from runtime.executables import compile_into, find_or_compile
from runtime.mesh import make_mesh

CONFIG = TransformerConfig(
    num_layers=1,
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=8,
    use_rotary_positional_embeddings=True,
)


def denoiser(guided: bool) -> Denoiser:
    latents = LatentShape(1, 1, 4, 4, 4)
    mesh = make_mesh((1, 1, 1))
    return Denoiser(CONFIG, {}, latents, 4, guided, "float32", mesh, CpuBackend())


@pytest.mark.parametrize("guided", [False, True])
def test_an_executable_is_kept_and_found(guided, tmp_path):
    """JAX drops unused arguments, which the manifest would list."""
    program = denoiser(guided).program
    assert compile_into([program], tmp_path) == [program.manifest_name]

    def lower() -> jax.stages.Lowered:
        raise AssertionError("the second run must not compile")

    again = dataclasses.replace(program, lower=lower)
    assert find_or_compile([again], tmp_path, devices=jax.devices()[:1])
