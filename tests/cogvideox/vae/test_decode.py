"""The decode over frame batches and devices, apart from whether it equals diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from cogvideox.vae.decode import load_decoder
from cogvideox.vae.kinds import DECODERS
from tests.cogvideox.vae.vae_models import thin_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thin_vae")
    thin_vae(folder)
    return folder


def mesh_of(dp: int, tp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: dp * tp]).reshape(dp, tp), ("dp", "tp"))


def random_latents(frames: int, width: int, batch: int = 1) -> np.ndarray:
    shape = (batch, 3, frames, 2, width)
    return np.random.default_rng(frames).standard_normal(shape).astype(np.float32)


def decode(decoder, latents: np.ndarray, output: str = "float32") -> np.ndarray:
    return np.concatenate(list(decoder.decode(latents, output=output)), axis=1)


@pytest.mark.parametrize(
    ("name", "shape", "width", "frames"),
    [
        ("vae_flax", (2, 4), 170, 3),
        ("vae_torchax", (1, 8), 90, 4),
        ("vae_flax", (2, 4), 85, 5),
        ("vae_torchax", (4, 2), 13, 3),
        ("vae_flax", (1, 8), 3, 1),
    ],
)
def test_every_width_over_devices_equals_one_device(folder, name, shape, width, frames):
    """1e-5 of the largest value, 1: the group sums of the devices are added in another order."""
    latents = random_latents(frames, width)
    one = load_decoder(name, folder, mesh_of(1, 1), jnp.float32)
    many = load_decoder(name, folder, mesh_of(*shape), jnp.float32)
    np.testing.assert_allclose(decode(many, latents), decode(one, latents), atol=1e-5, rtol=0)


def test_both_decoders_agree_in_bfloat16_and_stay_near_float32(folder):
    latents = random_latents(3, 5, batch=2)
    exact = decode(load_decoder("vae_flax", folder, mesh_of(1, 1), jnp.float32), latents)
    found = [
        decode(load_decoder(name, folder, mesh_of(1, 1), jnp.bfloat16), latents)
        for name in DECODERS
    ]
    np.testing.assert_array_equal(*found)
    # bfloat16 keeps 8 bits; a dozen layers of it in 0..1.
    assert np.sqrt(np.mean(np.square(found[0] - exact))) < 0.02


def test_length_does_not_matter_to_compilation(folder, monkeypatch):
    monkeypatch.setattr(
        "cogvideox.vae.decode.find_or_compile",
        lambda programs, *_, **__: [object() for _ in programs],
    )
    decoder = load_decoder("vae_flax", folder, mesh_of(1, 1), jnp.float32)
    programs = decoder.compile(random_latents(5, 4).shape, output="uint8")
    assert decoder.compile(random_latents(9, 4).shape, output="uint8") is programs
    assert decoder.compile(random_latents(4, 4).shape, output="uint8") is not programs


@pytest.fixture(scope="module")
def decoder(folder):
    return load_decoder("vae_flax", folder, mesh_of(1, 2), jnp.float32)


def test_frames_come_batch_by_batch_and_one_batch_ahead(decoder, monkeypatch):
    latents = random_latents(7, 3)
    programs = decoder.compile(latents.shape, output="uint8")
    started = []

    def counted(program):
        return lambda *args: (started.append(None), program(*args))[1]

    watched = type(programs)(*map(counted, programs))
    monkeypatch.setattr(decoder, "compile", lambda shape, output: watched)
    frames = decoder.decode(latents, output="uint8")
    assert started == []
    seen = []
    for batch in frames:
        seen.append((batch.shape, len(started)))
    assert seen == [((1, 5, 8, 12, 3), 2), ((1, 4, 8, 12, 3), 3), ((1, 4, 8, 12, 3), 3)]


def test_values_that_are_not_finite_are_an_error_that_names_the_frames(decoder):
    latents = random_latents(5, 3)
    latents[0, 0, 4, 0, 2] = np.nan
    frames = decoder.decode(latents, output="uint8")
    next(frames)
    with pytest.raises(FloatingPointError, match="latent frames 3 to 4"):
        next(frames)


def test_latents_of_another_model_are_refused(folder):
    decoder = load_decoder("vae_flax", folder, mesh_of(1, 1), jnp.float32)
    with pytest.raises(ValueError, match="16 channels, the VAE has 3"):
        decoder.compile((1, 16, 3, 2, 2), output="uint8")
