"""The tables of decoders and encoders: TorchAx and Flax.

Both compute the same program. Importing torchax takes seconds, so each module is imported only
when it is traced; a stage that finds its executables imports neither.
"""

import dataclasses
from collections.abc import Callable

from cogvideox.model.config import VaeConfig
from cogvideox.vae.layers import EncoderForward, Forward, Layers


def _build_torchax(config: VaeConfig, layers: Layers) -> Forward:
    from cogvideox.vae.decoder_torchax import build_forward

    return build_forward(config, layers)


def _build_flax(config: VaeConfig, layers: Layers) -> Forward:
    from cogvideox.vae.decoder_flax import build_forward

    return build_forward(config, layers)


def _build_torchax_encoder(config: VaeConfig, layers: Layers) -> EncoderForward:
    from cogvideox.vae.encoder_torchax import build_forward

    return build_forward(config, layers)


def _build_flax_encoder(config: VaeConfig, layers: Layers) -> EncoderForward:
    from cogvideox.vae.encoder_flax import build_forward

    return build_forward(config, layers)


@dataclasses.dataclass(frozen=True)
class VaeKind[AnyForward]:
    """One way to trace the decoder or the encoder.

    Attributes:
        name: for the names of programs and the record of what made a file.
        libraries: distributions beside JAX that trace it.
        build_forward: returns the forward; imports `libraries`.
    """

    name: str
    libraries: tuple[str, ...]
    build_forward: Callable[[VaeConfig, Layers], AnyForward]


_TORCHAX, _FLAX = ("torch", "torchax", "diffusers"), ("flax",)

DECODERS = {
    kind.name: kind
    for kind in (
        VaeKind("vae_torchax", _TORCHAX, _build_torchax),
        VaeKind("vae_flax", _FLAX, _build_flax),
    )
}

ENCODERS = {
    kind.name: kind
    for kind in (
        VaeKind("vae_encoder_torchax", _TORCHAX, _build_torchax_encoder),
        VaeKind("vae_encoder_flax", _FLAX, _build_flax_encoder),
    )
}
