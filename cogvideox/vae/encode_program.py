"""The two programs of an encode: one for the first batch of frames, one for all others.

diffusers encodes eight frames at a time; those that remain join the first batch. Group statistics
are per batch, and the causal convolutions pass their last two frames to the next batch. So a
different split would change the latents. See `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from cogvideox.vae.batches import AXIS, BatchProgram, Lowered
from cogvideox.vae.layers import EncoderCaches, EncoderForward
from cogvideox.vae.program import choose_layers
from cogvideox.vae.sharding import WidthShards
from runtime.programs import Program

# AutoencoderKLCogVideoX.num_sample_frames_batch_size; not in the config.
FRAMES_PER_BATCH = 8

LOG_VARIANCE = (-30.0, 20.0)  # limits of diffusers' DiagonalGaussianDistribution


def frame_batches(frames: int) -> list[tuple[int, int]]:
    """Returns start and end of each batch of frames. Source: AutoencoderKLCogVideoX._encode."""
    first = frames % FRAMES_PER_BATCH + FRAMES_PER_BATCH if frames > FRAMES_PER_BATCH else frames
    starts = range(first, frames, FRAMES_PER_BATCH)
    return [(0, first)] + [(start, start + FRAMES_PER_BATCH) for start in starts]


class EncodeProgram(BatchProgram[EncoderForward, EncoderCaches]):
    """An encoder on a mesh, before compilation."""

    part = "encoder"

    def shards(self, width: int) -> WidthShards:
        """Returns the split of the latents of frames of `width` pixels."""
        return WidthShards(AXIS, self.mesh.size, width // self.config.spatial_scale)

    def lower(
        self, shape: tuple[int, ...], caches: EncoderCaches | None, *, alone: bool
    ) -> Lowered[EncoderCaches]:
        """Lowers the program for one batch of frames.

        Args:
            shape: shape of the batch, [B, F, height, width, 3].
            caches: abstract caches of the previous batch; None lowers the first batch's program.
            alone: there is no other batch, so the program returns no caches. Those of an image of
                768x1360 would take 10 GB in float32.

        Returns:
            The program (weights, uint8 planes [B, F, W s, 3, H s], caches) -> ((mean, standard
            deviation) [B, Z, T, H, W] float32, int32 1 if all of them are finite, caches), and the
            abstract caches that it returns.
        """
        batch, frames, height, width, colours = shape
        shards = self.shards(width)
        still = alone and frames == 1
        layers = choose_layers(self.config, shards, self.mesh, self.dtype, still=still)
        forward = self.kind.build_forward(self.config, layers)

        def encode_columns(
            weights: Mapping[str, jax.Array], planes: jax.Array, caches: EncoderCaches | None
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, EncoderCaches | None]:
            # Source: VaeImageProcessor.pil_to_numpy and normalize.
            video = 2.0 * (planes.astype(jnp.float32) / 255.0) - 1.0
            video = video.astype(self.dtype).swapaxes(3, 4)
            moments, new_caches = forward(weights, video, caches)
            moments = shards.keep_real(moments.astype(jnp.float32), axis=2)
            finite = jnp.isfinite(moments).all().astype(jnp.int32)
            mean, log_variance = jnp.split(moments, 2, axis=-1)
            deviation = jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE))
            new_caches = None if alone else new_caches
            return (mean, deviation), jax.lax.pmin(finite, AXIS), new_caches

        sharded = self.over_columns(encode_columns)

        def encode_batch(
            weights: Mapping[str, jax.Array], planes: jax.Array, caches: EncoderCaches | None
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, EncoderCaches | None]:
            (mean, deviation), finite, new_caches = sharded(weights, planes, caches)
            # Drop the padded columns: [B, T, W, H, Z] -> [B, Z, T, H, W].
            mean, deviation = (
                v[:, :, : shards.width].transpose(0, 4, 1, 3, 2) for v in (mean, deviation)
            )
            return (mean, deviation), finite, new_caches

        padded = (batch, frames, shards.padded_width * self.config.spatial_scale, colours, height)
        return self.lower_batch(encode_batch, padded, jnp.uint8, caches)

    def programs(self, shape: tuple[int, ...]) -> list[Program]:
        """Returns the programs of the first batch and, if there are more, of all others.

        Args:
            shape: of the video, [B, F, height, width, 3].
        """
        batch, frames, height, width, colours = shape
        sizes = [end - start for start, end in frame_batches(frames)]
        alone = len(sizes) == 1
        first = (batch, sizes[0], height, width, colours)
        later = (batch, FRAMES_PER_BATCH, height, width, colours)
        return self.two_programs(
            f"{batch}x{sizes[0]}x{height}x{width}-{AXIS}{self.mesh.size}",
            {"first_frames": first, "alone": alone},
            lambda: self.lower(first, None, alone=alone),
            None if alone else (lambda caches: self.lower(later, caches, alone=False)),
        )
