"""The two programs of a decode: one for the first batch of frames, one for all others.

diffusers decodes two latent frames at a time; with an odd number, the first batch has three. Group
statistics are per batch, and the causal convolutions pass their last two frames to the next batch.
So a different split would change the video.

The later program donates its caches. The loop over batches runs on the host, so frames are encoded
while the next batch decodes. A scan would hold the full video until its end and compile the same
two bodies. See `cogvideox.vae.sharding` for the axis letters.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import VaeConfig
from cogvideox.vae.kinds import VaeKind
from cogvideox.vae.layers import DecoderCaches, Forward, Layers
from cogvideox.vae.sharding import WidthShards
from cogvideox.vae.tpu.common import LANES, Interpret
from cogvideox.vae.tpu.layers import TpuLayers
from cogvideox.vae.weights import abstract_weights
from cogvideox.vae.xla.layers import XlaLayers
from runtime.compiler_options import vae_options
from runtime.programs import Program, machine_fields

# AutoencoderKLCogVideoX.num_latent_frames_batch_size; not in the config.
LATENT_FRAMES_PER_BATCH = 2

# Files traced into the programs, relative to the project.
SOURCES = ("cogvideox/model/config.py", "cogvideox/vae")

AXIS = "width"
COLUMNS = P(None, None, AXIS)  # [B, T, W, ...]

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


@dataclasses.dataclass(frozen=True)
class DecodeProgram:
    """A decoder on a mesh, before compilation.

    Attributes:
        kind: how the decoder is traced.
        config: config of the VAE.
        mesh: has one axis, `AXIS`; its devices may be abstract.
        dtype: bfloat16 or float32.
    """

    kind: VaeKind[Forward]
    config: VaeConfig
    mesh: Mesh
    dtype: jnp.dtype

    @cached_property
    def abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `cogvideox.vae.weights.abstract_weights`."""
        return abstract_weights(self.config, "decoder", self.mesh, self.dtype)

    def shards(self, latents_shape: tuple[int, ...]) -> WidthShards:
        """Returns the split of latents [B, C, T, H, W]."""
        return WidthShards(AXIS, self.mesh.size, latents_shape[-1])

    def lower(
        self, shape: tuple[int, ...], output: Output, caches: DecoderCaches | None
    ) -> tuple[jax.stages.Lowered, DecoderCaches]:
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

        sharded = jax.shard_map(
            decode_columns,
            mesh=self.mesh,
            in_specs=(P(), COLUMNS, COLUMNS),
            out_specs=(COLUMNS, P(), COLUMNS),
            check_vma=False,  # Pallas kernels do not declare which axes their results vary over
        )

        def decode_batch(
            weights: Mapping[str, jax.Array], latents: jax.Array, caches: DecoderCaches | None
        ) -> tuple[jax.Array, jax.Array, DecoderCaches]:
            pixels, finite, new_caches = sharded(weights, latents, caches)
            # Drop the padded columns: [B, F, W, 3, H] -> [B, F, 3, H, W].
            return pixels[:, :, : width * scale].transpose(0, 1, 3, 4, 2), finite, new_caches

        replicated, columns = (NamedSharding(self.mesh, spec) for spec in (P(), COLUMNS))
        latents = jax.ShapeDtypeStruct(
            (b, frames, shards.padded_width, height, channels), jnp.float32, sharding=columns
        )
        program = jax.jit(
            decode_batch,
            donate_argnums=() if caches is None else (2,),
            out_shardings=(replicated, replicated, columns),
        )
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            lowered = program.lower(self.abstract_weights, latents, caches)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=columns),
            lowered.out_info[2],
        )
        return lowered, abstract

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
        lower_first = cache(lambda: self.lower(first, output, None))
        fields = {
            "vae": dataclasses.asdict(self.config),
            "first_latents": first,
            "frames": output,
            "dtype": jnp.dtype(self.dtype).name,
            "compiler_options": vae_options(self.mesh.devices.flat[0]),
            **machine_fields(self.mesh, self.kind.libraries, SOURCES),
        }
        name = self.kind.name
        label = f"{b}x{sizes[0]}x{height}x{width}-{AXIS}{self.mesh.size}-{output}"
        programs = [Program(f"{name}_first", label, fields, lambda: lower_first()[0])]
        if len(sizes) > 1:
            lower_later = lambda: self.lower(later, output, lower_first()[1])[0]  # noqa: E731
            programs.append(Program(f"{name}_later", label, fields, lower_later))
        return programs
