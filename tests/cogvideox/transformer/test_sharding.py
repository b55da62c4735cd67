"""The sharding table against models: no idle rule, no large parameter without one."""

import pytest
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.parameters import parameter_shapes, stack_shapes
from cogvideox.transformer.sharding import parameter_specs

# The published shapes: configuration files on the hub, by model.
PUBLISHED = {
    "CogVideoX1.5-5B": {
        "num_layers": 42,
        "num_attention_heads": 48,
        "patch_size_t": 2,
        "patch_bias": False,
        "use_rotary_positional_embeddings": True,
    },
    "CogVideoX-5b": {
        "num_layers": 42,
        "num_attention_heads": 48,
        "use_rotary_positional_embeddings": True,
    },
    "CogVideoX-2b": {"num_layers": 30, "num_attention_heads": 30},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    config = TransformerConfig(**PUBLISHED[name])
    shapes = stack_shapes(parameter_shapes(config), config.num_layers)
    specs = parameter_specs(shapes)
    assert specs.keys() == shapes.keys()
    assert specs["transformer_blocks.attn1.to_q.weight"] == P(None, "tp", None)
    assert specs["transformer_blocks.ff.net.2.weight"] == P(None, None, "tp")


def test_every_gap_is_listed():
    shapes = stack_shapes(parameter_shapes(TransformerConfig(num_layers=1)), 1)
    shapes["transformer_blocks.new.weight"] = (1, 64, 64)
    shapes["other.weight"] = (64, 64)
    del shapes["proj_out.weight"], shapes["proj_out.bias"]
    with pytest.raises(ValueError) as error:
        parameter_specs(shapes)
    for said in ("transformer_blocks.new.weight", "other.weight", "rule proj_out matches no"):
        assert said in str(error.value)
