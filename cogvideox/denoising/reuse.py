"""What denoising steps keep for later ones and take from earlier ones."""

from typing import Literal, NamedTuple

# What a step does with a reusable array: nothing, also return it, or take it in place of its work.
Reuse = Literal["off", "keep", "reuse"]


class Reusable[Array](NamedTuple):
    """Arrays that a step returns and later steps reuse; None if the step has no use for it.

    Attributes:
        residual: what all blocks add to the embedded tokens, [samples, S, E] in the run's dtype;
            the samples of the negative prompts come first. Rows of text and padding are zero.
        difference: the prediction for the prompts minus that for the negative prompts, [B, S, C]
            float32.
    """

    residual: Array | None = None
    difference: Array | None = None
