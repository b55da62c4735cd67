"""The parameters' shapes from the config are those of diffusers' module."""

import dataclasses

import diffusers
import pytest
import torch

from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.parameters import parameter_shapes


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
    assert parameter_shapes(config) == expected
