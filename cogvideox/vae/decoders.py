"""The table of decoders: TorchAx and Flax.

Both compute the same program. Importing torchax takes seconds, so each module is imported only
when its decoder is traced; a stage that finds its executables imports neither.
"""

import dataclasses
from collections.abc import Callable

from cogvideox.model.config import VaeConfig
from cogvideox.vae.layers import Forward, Layers

BuildForward = Callable[[VaeConfig, Layers], Forward]


def _build_torchax(config: VaeConfig, layers: Layers) -> Forward:
    from cogvideox.vae.decoder_torchax import build_forward

    return build_forward(config, layers)


def _build_flax(config: VaeConfig, layers: Layers) -> Forward:
    from cogvideox.vae.decoder_flax import build_forward

    return build_forward(config, layers)


@dataclasses.dataclass(frozen=True)
class DecoderKind:
    """One way to trace the decoder.

    Attributes:
        name: for the names of programs and the record of what made a video.
        libraries: distributions beside JAX that trace it.
        build_forward: returns the decoder's forward; imports `libraries`.
    """

    name: str
    libraries: tuple[str, ...]
    build_forward: BuildForward


DECODERS = {
    kind.name: kind
    for kind in (
        DecoderKind("vae_torchax", ("torch", "torchax", "diffusers"), _build_torchax),
        DecoderKind("vae_flax", ("flax",), _build_flax),
    )
}
