"""The one table from parameters to mesh axes, and its checks.

torch's linear layers compute x @ W.T with W [out, in]. Column parallel splits the outputs (W's
first axis and the bias), row parallel the inputs (W's second axis); a column parallel layer
followed by a row parallel one needs a single all-reduce, after the second (Megatron-LM,
arXiv 1909.08053). So the heads are split over tp from the q/k/v projections to the output
projection, and the MLP's hidden width from its first to its second layer.
"""

from collections.abc import Mapping

from jax.sharding import PartitionSpec as P

COLUMN = {"weight": P("tp", None), "bias": P("tp")}
ROW = {"weight": P(None, "tp"), "bias": P(None)}
# Token-wise work at the model's ends, on tensors that every shard holds whole.
REPLICATED = {"weight": P(), "bias": P()}

RULES: Mapping[str, Mapping[str, P]] = {
    "transformer_blocks.attn1.to_q": COLUMN,
    "transformer_blocks.attn1.to_k": COLUMN,
    "transformer_blocks.attn1.to_v": COLUMN,
    "transformer_blocks.attn1.to_out.0": ROW,
    "transformer_blocks.ff.net.0.proj": COLUMN,
    "transformer_blocks.ff.net.2": ROW,
    # The modulations are 14% of the 5B model's weights; their outputs are gathered, [B, 6E] each.
    "transformer_blocks.norm1.linear": COLUMN,
    "transformer_blocks.norm2.linear": COLUMN,
    "patch_embed.proj": REPLICATED,
    "patch_embed.text_proj": REPLICATED,
    "time_embedding.linear_1": REPLICATED,
    "time_embedding.linear_2": REPLICATED,
    "norm_out.linear": REPLICATED,
    "proj_out": REPLICATED,
}

_STACKED = "transformer_blocks."


def parameter_spec(name: str, shape: tuple[int, ...]) -> P | None:
    """The PartitionSpec of one parameter, None where the table has no rule for a matrix.

    Anything with two axes is a matrix and needs a rule; vectors (norms, biases) are replicated
    without one. The parameters of the blocks are stacked along a leading, unsharded axis.
    """
    module, _, kind = name.rpartition(".")
    stacked = name.startswith(_STACKED)
    if module in RULES:
        spec = RULES[module][kind]
        return P(None, *spec) if stacked else spec
    return P() if len(shape) - stacked < 2 else None


def parameter_specs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, P]:
    """A PartitionSpec for every parameter of a model.

    Args:
        shapes: name to shape; names as in the checkpoint, without the block's number.

    Raises:
        ValueError: listing every rule that matches no parameter and every matrix without a rule.
    """
    specs = {name: parameter_spec(name, shape) for name, shape in shapes.items()}
    problems = [
        f"no rule for {name} {list(shapes[name])}" for name in shapes if specs[name] is None
    ]
    modules = {name.rpartition(".")[0] for name in shapes}
    problems += [f"rule {module} matches no parameter" for module in RULES if module not in modules]
    if problems:
        raise ValueError("sharding table and model differ: " + "; ".join(problems))
    return specs
