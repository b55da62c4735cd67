"""The parameter table: shapes are those of diffusers' module, and every large one is split."""

import dataclasses
import math

import diffusers
import pytest
import torch
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.parameters import BLOCKS, parameter_table, stored_names, stored_shapes

# The published shapes: configuration files on the hub, by model.
PUBLISHED = {
    "CogVideoX1.5-5B": TransformerConfig(
        num_layers=42,
        num_attention_heads=48,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    ),
    "CogVideoX-5b": TransformerConfig(
        num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True
    ),
    "CogVideoX-2b": TransformerConfig(num_layers=30, num_attention_heads=30),
}


@pytest.mark.parametrize(
    "config",
    [
        {"patch_size_t": 2, "use_rotary_positional_embeddings": True},
        {"patch_size_t": 2, "patch_bias": False, "activation_fn": "geglu"},
        {"attention_bias": False, "activation_fn": "swiglu"},
        {"patch_bias": False, "norm_elementwise_affine": False, "activation_fn": "gelu"},
        {"patch_size": 4, "in_channels": 8, "out_channels": 8, "activation_fn": "linear-silu"},
    ],
)
def test_shapes_are_those_of_diffusers(config):
    config = TransformerConfig(num_layers=2, num_attention_heads=3, **config)
    with torch.device("meta"):
        module = diffusers.CogVideoXTransformer3DModel(**dataclasses.asdict(config))
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert stored_shapes(config) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_split(name):
    table = parameter_table(PUBLISHED[name])
    for parameter_name, parameter in table.items():
        in_block = parameter_name.startswith(BLOCKS)
        matrix = len(parameter.shape) - in_block >= 2
        assert ("tp" in parameter.spec) == in_block or not matrix, parameter_name
        assert len(parameter.spec) <= len(parameter.shape)
        # Every matrix of a block is a product in `linear`, and a linear layer takes a LoRA.
        assert parameter.quantizable == (in_block and matrix), parameter_name
        assert parameter.lora == matrix, parameter_name
    assert table[f"{BLOCKS}attn1.to_q.weight"].spec == P(None, "tp", None)
    assert table[f"{BLOCKS}attn1.to_out.0.weight"].spec == P(None, None, "tp")
    assert table[f"{BLOCKS}ff.net.2.weight"].spec == P(None, None, "tp")
    split = sum(math.prod(p.shape) for p in table.values() if "tp" in p.spec)
    assert split > 0.99 * sum(math.prod(p.shape) for p in table.values())


def test_rows_that_are_reordered():
    """The q/k norms rotate with q and k; a gated layer needs both halves on every shard."""
    rotary = {f"attn1.{name}.{kind}" for name in ("to_q", "to_k", "norm_q", "norm_k")
              for kind in ("weight", "bias")}  # fmt: skip
    gated = {"ff.net.0.proj.weight", "ff.net.0.proj.bias"}
    for activation, expected_gated in (("geglu", gated), ("gelu", set())):
        orders: dict[str, set[str]] = {"rotary": set(), "gated": set(), "stored": set()}
        table = parameter_table(TransformerConfig(num_layers=1, activation_fn=activation))
        for name, parameter in table.items():
            orders[parameter.row_order].add(name.removeprefix(BLOCKS))
        assert orders["rotary"] == rotary
        assert orders["gated"] == expected_gated


def test_names_in_the_files():
    table = parameter_table(TransformerConfig(num_layers=2))
    name = f"{BLOCKS}ff.net.2.bias"
    assert stored_names(name, table[name]) == [f"{BLOCKS}{i}.ff.net.2.bias" for i in (0, 1)]
    assert stored_names("proj_out.bias", table["proj_out.bias"]) == ["proj_out.bias"]
