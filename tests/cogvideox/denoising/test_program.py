"""The step's program: its executable is kept, and rows without a patch stay zero."""

import dataclasses

import jax
import numpy as np
import pytest

from cogvideox.denoising.program import TOKENS, Denoiser
from cogvideox.denoising.reuse import Reusable
from cogvideox.denoising.scheduler import StepCoefficients
from cogvideox.model.config import TransformerConfig
from cogvideox.model.settings import LatentShape
from cogvideox.transformer.backends import CpuBackend
from cogvideox.transformer.parameters import abstract_parameters
from runtime.executables import compile_into, find_or_compile
from runtime.mesh import make_mesh, place

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


@pytest.mark.parametrize("difference", ["off", "keep", "reuse"])
@pytest.mark.parametrize("residual", ["off", "keep", "reuse"])
@pytest.mark.parametrize("guided", [False, True])
def test_an_executable_is_kept_and_found(guided, residual, difference, tmp_path):
    """JAX drops unused arguments, which the manifest would list."""
    if difference != "off" and not guided:
        pytest.skip("without guidance there is no difference")
    program = dataclasses.replace(denoiser(guided), difference=difference).step_program(residual)
    assert compile_into([program], tmp_path) == [program.manifest_name]

    def lower() -> jax.stages.Lowered:
        raise AssertionError("the second run must not compile")

    again = dataclasses.replace(program, lower=lower)
    assert find_or_compile([again], tmp_path, devices=jax.devices()[:1])


def test_rows_without_a_patch_stay_zero():
    """Three rows of text before the four of the patches, one of padding after them."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, num_attention_heads=2)
    latents, mesh = LatentShape(1, 1, 4, 4, 4), make_mesh((1, 2, 1))
    made = Denoiser(config, {}, latents, 3, True, "float32", mesh, CpuBackend())
    assert made.layout.shape[1] == 8

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    parameters = {
        name: place(normal(leaf.shape), leaf.sharding)
        for name, leaf in abstract_parameters(config, mesh, np.dtype("float32")).items()
    }
    tokens, previous_x0, noise = (
        place(made.layout.from_latents(normal(latents.sizes)), made.sharding(TOKENS))
        for _ in range(3)
    )
    positions = jax.tree.map(
        place, made.positions, jax.tree.map(made.sharding, made.position_specs)
    )
    texts = ("negative_prompt_embeds", "prompt_embeds")
    prompts = made.prompt_embeds({name: normal((1, 3, 8)) for name in texts})
    scalars = made.step_scalars(5, 2.0, StepCoefficients(*[0.5] * 6))
    results = made.lower().compile()(
        *(tokens, previous_x0, parameters, positions, prompts, noise, (), Reusable(), *scalars)
    )[:2]
    for rows in map(np.asarray, results):
        assert not rows[:, :3].any() and not rows[:, 7:].any()
        assert np.isfinite(rows).all() and rows[:, 3:7].all()
