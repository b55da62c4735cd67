"""The denoising loop on meshes of eight devices equals one device, in float32.

The tolerance is rounding: a row-parallel product is summed in another order. What is seen is 3e-6
of the latents' standard deviation after four steps; 2e-5 would not hide a lost bias or head.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from cogvideox.denoising.loop import LoadedDenoiser, run_loop, to_host
from cogvideox.denoising.noise import NoiseSource
from cogvideox.denoising.program import Denoiser
from cogvideox.denoising.scheduler import make_schedule
from cogvideox.model.folder import find_model, stored_tensors
from cogvideox.model.settings import DenoisingSettings, LatentShape
from cogvideox.transformer import loading as weight_loading
from cogvideox.transformer.backends import CpuBackend
from runtime.mesh import choose_mesh, fitting_meshes, make_mesh
from tests.tiny_models import save_tiny_model

TOKENS = 16


def final_latents(folder: Path, mesh_shape: tuple[int, int, int]) -> np.ndarray:
    model = find_model(str(folder), ["transformer"])
    mesh = make_mesh(mesh_shape)
    settings = DenoisingSettings(48, 80, 9, 16, 4, 6.0, True, "dpm", 0)
    denoiser = Denoiser(
        config=model.transformer,
        stored=stored_tensors(model.path / "transformer"),
        latents=LatentShape(1, 4, 8, 6, 10),
        text_tokens=TOKENS,
        guided=True,
        dtype="float32",
        mesh=mesh,
        backend=CpuBackend(),
    )
    parameters = denoiser.load()
    texts = np.random.default_rng(0).normal(size=(2, 1, TOKENS, 32))
    embeds = denoiser.prompt_embeds({"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]})
    schedule = make_schedule(settings, model.scheduler)
    loaded = LoadedDenoiser(denoiser, denoiser.compile(), parameters, embeds)
    *_, last = run_loop([loaded], schedule, 0, NoiseSource())
    return to_host(last).latents


# Gated, the MLP's first layer has twice the columns, and every shard needs both halves of some.
@pytest.fixture(scope="module", params=[("1.5", "gelu-approximate"), ("1.0-sincos", "geglu")])
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    generation, activation = request.param
    return save_tiny_model(folder, generation, num_attention_heads=8, activation_fn=activation)


@pytest.fixture(scope="module")
def one_device(model) -> np.ndarray:
    return final_latents(model, (1, 1, 1))


@pytest.mark.parametrize(
    "mesh_shape",
    [(1, 1, 8), (2, 1, 4), (2, 1, 2), (1, 1, 4), (2, 1, 1)]
    + [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)],
)
def test_mesh_equals_one_device(mesh_shape, model, one_device):
    difference = np.abs(final_latents(model, mesh_shape) - one_device).max()
    assert difference / one_device.std() < 2e-5


@pytest.mark.parametrize("mesh_shape", [(2, 1, 4), (1, 2, 1)])
def test_layers_stacked_on_the_devices_are_those_stacked_before(mesh_shape, model, monkeypatch):
    found = find_model(str(model), ["transformer"])
    stored, mesh = stored_tensors(found.path / "transformer"), make_mesh(mesh_shape)
    load = weight_loading.load_parameters
    config, dtype = found.transformer, jax.numpy.dtype("bfloat16")
    assert not weight_loading.stack_programs(config, mesh, dtype)
    before = load(config, stored, mesh, dtype)
    monkeypatch.setattr(weight_loading, "STACKED_ON_DEVICES_BYTES", 0)
    assert len(weight_loading.stack_programs(config, mesh, dtype)) > 10
    after = load(config, stored, mesh, dtype)
    assert list(before) == list(after)
    for name, parameter in after.items():
        assert parameter.sharding.is_equivalent_to(before[name].sharding, parameter.ndim)
        np.testing.assert_array_equal(np.asarray(parameter), np.asarray(before[name]))


def test_weights_are_split_where_the_table_says(model):
    found = find_model(str(model), ["transformer"])
    mesh = make_mesh((2, 1, 4))
    config = found.transformer
    stored = stored_tensors(found.path / "transformer")
    parameters = weight_loading.load_parameters(config, stored, mesh, np.dtype("float32"))
    width = config.width
    layers = config.num_layers

    def shard(name: str) -> tuple[int, ...]:
        return parameters[f"transformer_blocks.{name}"].addressable_shards[0].data.shape

    # torch's [out, in]: q, k, v split their outputs, the output projection its inputs.
    assert shard("attn1.to_q.weight") == (layers, width // 4, width)
    assert shard("attn1.to_q.bias") == (layers, width // 4)
    assert shard("attn1.to_out.0.weight") == (layers, width, width // 4)
    assert shard("attn1.to_out.0.bias") == (layers, width)
    hidden = 4 * width * (2 if config.activation_fn == "geglu" else 1)
    assert shard("ff.net.0.proj.weight") == (layers, hidden // 4, width)
    assert shard("ff.net.2.weight") == (layers, width, width)
    for name, parameter in parameters.items():
        if "transformer_blocks" not in name:
            assert parameter.is_fully_replicated, name
        elif name.endswith("weight") and parameter.ndim == 3:
            assert not parameter.is_fully_replicated, name


def test_meshes_that_fit():
    assert jax.device_count() == 8

    def chosen(dp, sp, tp, num_heads):
        return choose_mesh(dp, sp, tp, batch=2, num_heads=num_heads, num_devices=8)

    assert chosen(None, None, None, 48) == (2, 4, 1)
    assert chosen(None, None, 4, 48) == (2, 1, 4)
    assert chosen(1, 1, None, 48) == (1, 1, 8)
    assert chosen(None, None, None, 30) == (2, 3, 1)
    assert (2, 1, 4) not in fitting_meshes(2, 30, 8)
    with pytest.raises(ValueError, match="1x5x1"):
        chosen(None, None, 4, 30)
