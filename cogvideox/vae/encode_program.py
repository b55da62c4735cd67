"""The two programs of an encode: one for the first batch of frames, one for all others.

diffusers encodes eight frames at a time; those that remain join the first batch. Group statistics
are per batch, and the causal convolutions pass their last two frames to the next batch. So a
different split would change the latents. See `cogvideox.vae.sharding` for the axis letters.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache, cached_property

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import VaeConfig
from cogvideox.vae.kinds import VaeKind
from cogvideox.vae.layers import EncoderCaches, EncoderForward
from cogvideox.vae.program import AXIS, COLUMNS, SOURCES, choose_layers
from cogvideox.vae.sharding import WidthShards
from cogvideox.vae.weights import abstract_weights
from runtime.compiler_options import vae_options
from runtime.programs import Program, machine_fields

# AutoencoderKLCogVideoX.num_sample_frames_batch_size; not in the config.
FRAMES_PER_BATCH = 8

LOG_VARIANCE = (-30.0, 20.0)  # limits of diffusers' DiagonalGaussianDistribution


def frame_batches(frames: int) -> list[tuple[int, int]]:
    """Returns start and end of each batch of frames. Source: AutoencoderKLCogVideoX._encode."""
    first = frames % FRAMES_PER_BATCH + FRAMES_PER_BATCH if frames > FRAMES_PER_BATCH else frames
    starts = range(first, frames, FRAMES_PER_BATCH)
    return [(0, first)] + [(start, start + FRAMES_PER_BATCH) for start in starts]


@dataclasses.dataclass(frozen=True)
class EncodeProgram:
    """An encoder on a mesh, before compilation.

    Attributes:
        kind: how the encoder is traced.
        config: config of the VAE.
        mesh: has one axis, `AXIS`; its devices may be abstract.
        dtype: bfloat16 or float32.
    """

    kind: VaeKind[EncoderForward]
    config: VaeConfig
    mesh: Mesh
    dtype: jnp.dtype

    @cached_property
    def abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `cogvideox.vae.weights.abstract_weights`."""
        return abstract_weights(self.config, "encoder", self.mesh, self.dtype)

    def shards(self, width: int) -> WidthShards:
        """Returns the split of the latents of frames of `width` pixels."""
        return WidthShards(AXIS, self.mesh.size, width // self.config.spatial_scale)

    def lower(
        self, shape: tuple[int, ...], caches: EncoderCaches | None, *, alone: bool
    ) -> tuple[jax.stages.Lowered, EncoderCaches | None]:
        """Lowers the program for one batch of frames.

        Args:
            shape: shape of the batch, [B, F, height, width, 3].
            caches: abstract caches of the previous batch; None lowers the first batch's program.
            alone: there is no other batch, so the program returns no caches. Those of an image of
                768x1360 would take 10 GB in float32.

        Returns:
            The program (weights, uint8 planes [B, F, W s, 3, H s], caches) -> (mean and standard
            deviation [B, Z, T, H, W] float32, int32 1 if all of them are finite, caches), and the
            abstract caches that it returns.
        """
        batch, frames, height, width, colours = shape
        shards = self.shards(width)
        still = alone and frames == 1
        layers = choose_layers(self.config, shards, self.mesh, self.dtype, still=still)
        forward = self.kind.build_forward(self.config, layers)

        def encode_columns(
            weights: Mapping[str, jax.Array], planes: jax.Array, caches: EncoderCaches | None
        ) -> tuple[jax.Array, jax.Array, jax.Array, EncoderCaches | None]:
            # Source: VaeImageProcessor.pil_to_numpy and normalize.
            video = 2.0 * (planes.astype(jnp.float32) / 255.0) - 1.0
            video = video.astype(self.dtype).swapaxes(3, 4)
            moments, new_caches = forward(weights, video, caches)
            moments = shards.keep_real(moments.astype(jnp.float32), axis=2)
            finite = jnp.isfinite(moments).all().astype(jnp.int32)
            mean, log_variance = jnp.split(moments, 2, axis=-1)
            deviation = jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE))
            new_caches = None if alone else new_caches
            return mean, deviation, jax.lax.pmin(finite, AXIS), new_caches

        sharded = jax.shard_map(
            encode_columns,
            mesh=self.mesh,
            in_specs=(P(), COLUMNS, COLUMNS),
            out_specs=(COLUMNS, COLUMNS, P(), COLUMNS),
            check_vma=False,  # Pallas kernels do not declare which axes their results vary over
        )

        def encode_batch(
            weights: Mapping[str, jax.Array], planes: jax.Array, caches: EncoderCaches | None
        ) -> tuple[jax.Array, jax.Array, jax.Array, EncoderCaches | None]:
            mean, deviation, finite, new_caches = sharded(weights, planes, caches)
            # Drop the padded columns: [B, T, W, H, Z] -> [B, Z, T, H, W].
            mean, deviation = (
                v[:, :, : shards.width].transpose(0, 4, 1, 3, 2) for v in (mean, deviation)
            )
            return mean, deviation, finite, new_caches

        replicated, columns = (NamedSharding(self.mesh, spec) for spec in (P(), COLUMNS))
        padded = shards.padded_width * self.config.spatial_scale
        planes = jax.ShapeDtypeStruct(
            (batch, frames, padded, colours, height), jnp.uint8, sharding=columns
        )
        program = jax.jit(
            encode_batch,
            donate_argnums=() if caches is None else (2,),
            out_shardings=(replicated, replicated, replicated, columns),
        )
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            lowered = program.lower(self.abstract_weights, planes, caches)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=columns),
            lowered.out_info[3],
        )
        return lowered, abstract

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
        lower_first = cache(lambda: self.lower(first, None, alone=alone))
        fields = {
            "vae": dataclasses.asdict(self.config),
            "first_frames": first,
            "alone": alone,
            "dtype": jnp.dtype(self.dtype).name,
            "compiler_options": vae_options(self.mesh.devices.flat[0]),
            **machine_fields(self.mesh, self.kind.libraries, SOURCES),
        }
        name = self.kind.name
        label = f"{batch}x{sizes[0]}x{height}x{width}-{AXIS}{self.mesh.size}"
        programs = [Program(f"{name}_first", label, fields, lambda: lower_first()[0])]
        if not alone:
            lower_later = lambda: self.lower(later, lower_first()[1], alone=False)[0]  # noqa: E731
            programs.append(Program(f"{name}_later", label, fields, lower_later))
        return programs
