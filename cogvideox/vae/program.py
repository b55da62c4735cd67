"""The two programs of a decode: one for the first batch of frames, one for all others.

diffusers decodes two latent frames at a time; with an odd number, the first batch has three. Group
statistics are per batch, and the causal convolutions pass their last two frames to the next batch.
So a different split would change the video.

The loop over batches runs on the host, so frames are encoded
while the next batch decodes. A scan would hold the full video until its end and compile the same
two bodies. See `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cogvideox.model.config import VaeConfig
from cogvideox.vae.batches import AXIS, BatchProgram, Lowered
from cogvideox.vae.layers import DecoderCaches, Forward, Layers
from cogvideox.vae.sharding import WidthShards
from cogvideox.vae.tpu.common import LANES, Interpret
from cogvideox.vae.tpu.layers import TpuLayers
from cogvideox.vae.xla.layers import XlaLayers
from runtime.programs import Program

# AutoencoderKLCogVideoX.num_latent_frames_batch_size; not in the config.
LATENT_FRAMES_PER_BATCH = 2

Output = Literal["uint8", "float32"]


def frame_batches(latent_frames: int) -> list[tuple[int, int]]:
    """Returns start and end of each batch of latent frames.

    Source: AutoencoderKLCogVideoX._decode.
    """
    odd = latent_frames % LATENT_FRAMES_PER_BATCH
    first = min(LATENT_FRAMES_PER_BATCH + odd, latent_frames)
    starts = range(first, latent_frames, LATENT_FRAMES_PER_BATCH)
    return [(0, first)] + [(start, start + LATENT_FRAMES_PER_BATCH) for start in starts]


def choose_layers(
    config: VaeConfig,
    shards: WidthShards,
    mesh: Mesh,
    dtype: jnp.dtype,
    interpret: Interpret = False,
    still: bool = False,
) -> Layers:
    """Chooses the fastest implementation of the layers for a mesh.

    Pallas kernels run on TPU in bfloat16 if every channel count is a multiple of 128; XLA's
    convolutions run everywhere else.

    Args:
        config: config of the VAE.
        shards: split of the width.
        mesh: only the platform of its devices is used.
        dtype: dtype of the run.
        interpret: choose as on a TPU; the kernels run interpreted (slowly) on any backend.
        still: see `XlaLayers.still`.
    """
    tpu = bool(interpret) or mesh.devices.flat[0].platform == "tpu"
    whole_lanes = all(c % LANES == 0 for c in config.block_out_channels)
    if tpu and whole_lanes and dtype == jnp.bfloat16:
        return TpuLayers(shards, config.norm_num_groups, interpret)
    return XlaLayers(shards, config.norm_num_groups, still)


def to_pixels(video: jax.Array, output: Output) -> jax.Array:
    """Converts -1..1 to 0..1 in float32, or to 0..255 in uint8.

    Source: VaeImageProcessor.denormalize and numpy_to_pil, which rounds half to even.
    """
    video = jnp.clip(video.astype(jnp.float32) * 0.5 + 0.5, 0, 1)
    return jnp.round(video * 255).astype(jnp.uint8) if output == "uint8" else video


class DecodeProgram(BatchProgram[Forward, DecoderCaches]):
    """A decoder on a mesh, before compilation."""

    part = "decoder"

    def shards(self, latents_shape: tuple[int, ...]) -> WidthShards:
        """Returns the split of latents [B, C, T, H, W]."""
        return WidthShards(AXIS, self.mesh.size, latents_shape[-1])

    def lower(
        self, shape: tuple[int, ...], output: Output, caches: DecoderCaches | None
    ) -> Lowered[DecoderCaches]:
        """Lowers the program for one batch of latents.

        Args:
            shape: shape of the batch, [B, C, T, H, W].
            output: dtype of the frames.
            caches: abstract caches of the previous batch; None lowers the first batch's program.

        Returns:
            The program (weights, latents [B, T, W, H, C], caches) -> (frames [B, F, 3, H s, W s],
            int32 1 if all of them are finite, caches), and the abstract caches that it returns.
        """
        shards = self.shards(shape)
        b, channels, frames, height, width = shape
        scale = self.config.spatial_scale
        layers = choose_layers(self.config, shards, self.mesh, self.dtype)
        forward = self.kind.build_forward(self.config, layers)

        def decode_columns(
            weights: Mapping[str, jax.Array], latents: jax.Array, caches: DecoderCaches | None
        ) -> tuple[jax.Array, jax.Array, DecoderCaches]:
            latents = (1 / self.config.scaling_factor) * latents.astype(jnp.float32)
            video, new_caches = forward(weights, latents.astype(self.dtype), caches)
            video = shards.keep_real(video, axis=2)
            finite = jnp.isfinite(video).all().astype(jnp.int32)
            return to_pixels(video, output), jax.lax.pmin(finite, AXIS), new_caches

        sharded = self.over_columns(decode_columns)

        def decode_batch(
            weights: Mapping[str, jax.Array], latents: jax.Array, caches: DecoderCaches | None
        ) -> tuple[jax.Array, jax.Array, DecoderCaches]:
            pixels, finite, new_caches = sharded(weights, latents, caches)
            # Drop the padded columns: [B, F, W, 3, H] -> [B, F, 3, H, W].
            return pixels[:, :, : width * scale].transpose(0, 1, 3, 4, 2), finite, new_caches

        padded = (b, frames, shards.padded_width, height, channels)
        return self.lower_batch(decode_batch, padded, jnp.float32, caches)

    def programs(self, latents_shape: tuple[int, ...], *, output: Output) -> list[Program]:
        """Returns the programs of the first batch and, if there are more, of all others.

        Args:
            latents_shape: [B, C, T, H, W].
            output: dtype of the frames.

        Raises:
            ValueError: the latents do not have the VAE's number of channels.
        """
        b, channels, frames, height, width = latents_shape
        if channels != self.config.latent_channels:
            raise ValueError(
                f"the latents have {channels} channels, the VAE has {self.config.latent_channels}"
            )
        sizes = [end - start for start, end in frame_batches(frames)]
        first = (b, channels, sizes[0], height, width)
        later = (b, channels, LATENT_FRAMES_PER_BATCH, height, width)
        return self.two_programs(
            f"{b}x{sizes[0]}x{height}x{width}-{AXIS}{self.mesh.size}-{output}",
            {"first_latents": first, "frames": output},
            lambda: self.lower(first, output, None),
            (lambda caches: self.lower(later, output, caches)) if len(sizes) > 1 else None,
        )
