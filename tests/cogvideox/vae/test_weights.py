"""Reading a VAE folder: its config, its weights, and errors that list every mismatch."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from safetensors.torch import load_file, save_file

from cogvideox.model.config import VaeConfig
from cogvideox.vae import decoder_flax, decoder_torchax, encoder_flax, encoder_torchax
from cogvideox.vae.decode import load_decoder
from cogvideox.vae.sharding import WidthShards
from cogvideox.vae.weights import arrange, arranged_shape, is_downsampler, weight_shapes
from cogvideox.vae.xla.layers import XlaLayers
from tests.cogvideox.vae.vae_models import thin_vae

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"


@pytest.fixture
def folder(tmp_path):
    thin_vae(tmp_path)
    return tmp_path


def load(folder, dtype=jnp.float32):
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    return load_decoder("vae_torchax", folder, mesh, dtype)


def test_every_weight_that_does_not_fit_is_named(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    del tensors["decoder.conv_in.conv.weight"]
    del tensors["decoder.up_blocks.0.upsamplers.0.conv.bias"]
    tensors["decoder.mid_block.resnets.9.norm1.norm_layer.weight"] = torch.zeros(2)
    tensors["decoder.norm_out.conv_y.conv.weight"] = torch.zeros(4, 2, 1, 1, 1)
    tensors["encoder.anything"] = torch.zeros(1)  # expected, skipped
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert "missing decoder.conv_in.conv.weight" in message
    assert "missing decoder.up_blocks.0.upsamplers.0.conv.bias" in message
    assert "extra decoder.mid_block.resnets.9.norm1.norm_layer.weight" in message
    assert "decoder.norm_out.conv_y.conv.weight is [4, 2, 1, 1, 1], not [4, 3, 1, 1, 1]" in message
    assert message.count(";") == 3


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_the_weights_that_are_wanted_are_those_of_all_implementations(tmp_path, half, pointwise):
    thin_vae(tmp_path, use_post_quant_conv=pointwise, use_quant_conv=pointwise)
    config = VaeConfig.from_file(tmp_path / "config.json")
    wanted = weight_shapes(config, half)
    names = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
    stored = load_file(tmp_path / WEIGHTS_FILE)
    expected = {
        name: tuple(tensor.shape) for name, tensor in stored.items() if name.startswith(names[half])
    }
    assert wanted == expected
    flax, torchax = {
        "encoder": (encoder_flax, encoder_torchax),
        "decoder": (decoder_flax, decoder_torchax),
    }[half]
    arranged = {n: arranged_shape(shape, is_downsampler(n)) for n, shape in wanted.items()}
    parameters = flax.parameters_by_diffusers_name(flax.abstract_model(config))
    assert {name: parameter.shape for name, parameter in parameters.items()} == arranged
    layers = XlaLayers(WidthShards("width", 1, 1), config.norm_num_groups)
    state = torchax.build_model(config, layers).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == wanted


def test_a_decoder_is_made_and_loaded_without_what_only_tracing_needs(folder):
    """Their imports take longer than a decode."""
    program = """
import sys
import jax, numpy as np
from cogvideox.model.config import VaeConfig
from cogvideox.vae.decode import load_decoder
mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tp",))
decoder = load_decoder("vae_torchax", sys.argv[1], mesh, "float32")
print([program.fingerprint for program in decoder.programs((1, 3, 5, 2, 4), output="uint8")])
found = {"torch", "diffusers", "torchax", "flax"} & {*sys.modules}
sys.exit(f"imported: {found}" if found else 0)
"""
    subprocess.run([sys.executable, "-c", program, folder], check=True)


def test_upsamplers_of_bfloat16_files_are_summed_in_float32():
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(arrange(weight), arrange(weight.astype(np.float32)))


def test_files_in_parts_and_in_bfloat16(folder):
    whole = load(folder, jnp.bfloat16)
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(folder / WEIGHTS_FILE).items()}
    (folder / WEIGHTS_FILE).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    in_parts = load(folder, jnp.float32)
    for mine, reference in zip(
        jax.tree.leaves(in_parts.weights), jax.tree.leaves(whole.weights), strict=True
    ):
        assert mine.dtype == jnp.float32
        # The upsamplers' sums are made before rounding to bfloat16 in one and after in the other.
        np.testing.assert_allclose(mine, reference.astype(jnp.float32), rtol=2**-6, atol=2**-8)


def test_absent_weights(folder):
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match="no .safetensors weights"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_block_types": ["CogVideoXUpBlock3D"]}, "up_block_types must be 3 times"),
        ({"act_fn": "gelu"}, "act_fn must be silu, not 'gelu'"),
        ({"norm_num_groups": 3}, r"block_out_channels \[4, 8, 8\] do not divide"),
        ({"use_post_quant_conv": True, "out_channels": 4}, "use_post_quant_conv needs"),
        ({"use_quant_conv": True, "out_channels": 4}, "use_quant_conv needs"),
    ],
)
def test_configs_that_cannot_be_decoded(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        VaeConfig.from_file(folder / "config.json")


@pytest.mark.parametrize("shape", [(4,), (6, 5, 1, 1, 1), (6, 5, 3, 3, 3), (6, 5, 3, 3)])
def test_arranged_shape(shape):
    assert arrange(np.zeros(shape, np.float32)).shape == arranged_shape(shape)


def test_arranged_shape_of_a_downsampler():
    assert arrange(np.zeros((6, 5, 3, 3), np.float32), downsampler=True).shape == (3, 3, 5, 6)
