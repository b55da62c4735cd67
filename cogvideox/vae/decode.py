"""Latents to frames: diffusers' frame batches, on every device of a mesh, one batch at a time.

diffusers decodes two latent frames at a time; the first batch also takes the odd one. Group
statistics are per batch and the causal convolutions carry their last two frames to the next batch,
so another split would be another video.

Two executables do it: one for the first batch, one for all others, whose caches are donated. A loop
on the host runs them, because frames must leave for the encoder while the next batch decodes; one
program that scans over the batches would hold the whole video until its end, and would compile the
same two bodies.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import VaeConfig
from cogvideox.vae.layers import Layers, WidthShards
from cogvideox.vae.tpu.kernels import LANES
from cogvideox.vae.tpu.layers import ColumnLayers
from cogvideox.vae.weights import (
    arrange,
    arranged_shape,
    stored_weights,
    weight_shapes,
)
from cogvideox.vae.xla.layers import FrameLayers
from runtime.compiler_options import vae_options
from runtime.executables import find_or_compile
from runtime.mesh import place
from runtime.programs import Program, machine_fields

# AutoencoderKLCogVideoX.num_latent_frames_batch_size, which no config can change.
LATENT_FRAMES_PER_BATCH = 2

# What traces each decoder, beside JAX.
_LIBRARIES = {"vae_torchax": ("torch", "torchax", "diffusers"), "vae_flax": ("flax",)}

# What is traced into the decoders, relative to the project.
SOURCES = ("cogvideox/model/config.py", "cogvideox/vae")

AXIS = "width"
_COLUMNS = P(None, None, AXIS)  # [B, T, W, ...]

Output = Literal["uint8", "float32"]

# (weights, latents [B, T, W, H, C], cache or None) -> (video [B, F, W s, 3, H s] in -1..1, cache),
# on one device's columns.
Forward = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


def frame_batches(latent_frames: int) -> list[tuple[int, int]]:
    """Start and end of each batch of latent frames.

    Source: AutoencoderKLCogVideoX._decode.
    """
    odd = latent_frames % LATENT_FRAMES_PER_BATCH
    first = min(LATENT_FRAMES_PER_BATCH + odd, latent_frames)
    starts = range(first, latent_frames, LATENT_FRAMES_PER_BATCH)
    return [(0, first)] + [(start, start + LATENT_FRAMES_PER_BATCH) for start in starts]


def _to_pixels(video: jax.Array, output: Output) -> jax.Array:
    """-1..1 -> 0..1 in float32, or 0..255 in uint8.

    Source: VaeImageProcessor.denormalize and numpy_to_pil, which rounds half to even.
    """
    video = jnp.clip(video.astype(jnp.float32) * 0.5 + 0.5, 0, 1)
    return jnp.round(video * 255).astype(jnp.uint8) if output == "uint8" else video


class Programs(NamedTuple):
    """The two executables for one shape of latents; `later` is None for a single batch."""

    first: jax.stages.Compiled
    later: jax.stages.Compiled | None = None


@dataclasses.dataclass(eq=False)
class Decoder:
    """A decoder on a mesh; see `make_decoder` and `load_decoder`.

    Attributes:
        name: "vae_torchax" or "vae_flax", the module that traces it.
        config: of the VAE.
        mesh: of one axis, `width`.
        dtype: bfloat16 or float32.
        weights: by diffusers' names, arranged (see `vae_weights.arrange`), on every device of
            `mesh`; None until they are loaded. Compiling needs none.
        decode_seconds: what the batches of the last `decode` took on the devices and on their way
            to the host, whatever the caller did meanwhile.
    """

    name: str
    config: VaeConfig
    mesh: Mesh
    dtype: jnp.dtype
    weights: dict[str, jax.Array] | None = None
    decode_seconds: float = 0.0
    _programs: dict[Any, Programs] = dataclasses.field(default_factory=dict)

    def load(self, vae_folder: Path) -> None:
        """Reads the weights of a VAE folder and places them on every device.

        Raises:
            ValueError: they do not fit the config; see `vae_weights.stored_weights`.
        """
        stored, everywhere = stored_weights(vae_folder, self.config), NamedSharding(self.mesh, P())
        self.weights = {
            name: place(np.asarray(arrange(tensor.read()), self.dtype), everywhere)
            for name, tensor in stored.items()
        }

    @cached_property
    def abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `load` places, without its numbers."""
        everywhere = NamedSharding(self.mesh, P())
        return {
            name: jax.ShapeDtypeStruct(arranged_shape(shape), self.dtype, sharding=everywhere)
            for name, shape in weight_shapes(self.config).items()
        }

    def _shards(self, latents_shape: tuple[int, ...]) -> WidthShards:
        return WidthShards(AXIS, self.mesh.size, latents_shape[-1])

    def _layers(self, shards: WidthShards) -> Layers:
        """How this mesh computes best: in Pallas kernels where it is a TPU and they fit."""
        tpu = self.mesh.devices.flat[0].platform == "tpu"
        whole_lanes = all(c % LANES == 0 for c in self.config.block_out_channels)
        kernels = tpu and whole_lanes and self.dtype == jnp.bfloat16
        return (ColumnLayers if kernels else FrameLayers)(shards, self.config.norm_num_groups)

    def _lower(
        self, shape: tuple[int, ...], output: Output, cache: Any
    ) -> tuple[jax.stages.Lowered, Any]:
        """One batch [B, C, T, H, W] lowered, and the abstract cache that it leaves."""
        shards = self._shards(shape)
        b, channels, frames, height, width = shape
        scale = self.config.spatial_scale
        if self.name == "vae_torchax":  # its imports take seconds
            from cogvideox.vae import decoder_torchax as tracer
        else:
            from cogvideox.vae import decoder_flax as tracer
        forward = tracer.build_forward(self.config, self._layers(shards))

        def on_columns(weights: Any, latents: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            latents = (1 / self.config.scaling_factor) * latents.astype(jnp.float32)
            video, cache = forward(weights, latents.astype(self.dtype), cache)
            video = shards.keep_real(video, axis=2)
            finite = jnp.isfinite(video).all().astype(jnp.int32)
            return _to_pixels(video, output), jax.lax.pmin(finite, AXIS), cache

        sharded = jax.shard_map(
            on_columns,
            mesh=self.mesh,
            in_specs=(P(), _COLUMNS, _COLUMNS),
            out_specs=(_COLUMNS, P(), _COLUMNS),
            check_vma=False,  # the Pallas kernel does not say over which axes its results vary
        )

        def decode_batch(weights: Any, latents: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            pixels, finite, cache = sharded(weights, latents, cache)
            # [B, F, W, 3, H] without the padded columns -> [B, F, 3, H, W]
            return pixels[:, :, : width * scale].transpose(0, 1, 3, 4, 2), finite, cache

        replicated, columns = (NamedSharding(self.mesh, spec) for spec in (P(), _COLUMNS))
        latents = jax.ShapeDtypeStruct(
            (b, frames, shards.padded_width, height, channels), jnp.float32, sharding=columns
        )
        program = jax.jit(
            decode_batch,
            donate_argnums=() if cache is None else (2,),
            out_shardings=(replicated, replicated, columns),
        )
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            lowered = program.lower(self.abstract_weights, latents, cache)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=columns),
            lowered.out_info[2],
        )
        return lowered, abstract

    @property
    def compiler_threads(self) -> int:
        """How many programs to compile at once.

        For GPUs the compiler times candidates on the device, where two at once would disturb each
        other, and the second program reuses the choices of the first.
        """
        return 1 if self.mesh.devices.flat[0].platform == "gpu" else 2

    def programs(self, latents_shape: tuple[int, ...], *, output: Output) -> list[Program]:
        """The programs of the first batch and, if there are more, of all others.

        Args:
            latents_shape: [B, C, T, H, W].
            output: dtype of the frames.
        """
        b, channels, frames, height, width = latents_shape
        if channels != self.config.latent_channels:
            raise ValueError(
                f"the latents have {channels} channels, the VAE has {self.config.latent_channels}"
            )
        sizes = [end - start for start, end in frame_batches(frames)]
        first = (b, channels, sizes[0], height, width)
        later = (b, channels, LATENT_FRAMES_PER_BATCH, height, width)
        lower_first = cache(lambda: self._lower(first, output, None))
        fields = {
            "vae": dataclasses.asdict(self.config),
            "first_latents": first,
            "frames": output,
            "dtype": jnp.dtype(self.dtype).name,
            "compiler_options": vae_options(self.mesh.devices.flat[0]),
            **machine_fields(self.mesh, _LIBRARIES[self.name], SOURCES),
        }
        label = f"{b}x{sizes[0]}x{height}x{width}-{AXIS}{self.mesh.size}-{output}"
        programs = [Program(f"{self.name}_first", label, fields, lambda: lower_first()[0])]
        if len(sizes) > 1:
            lower = lambda: self._lower(later, output, lower_first()[1])[0]  # noqa: E731
            programs.append(Program(f"{self.name}_later", label, fields, lower))
        return programs

    def compile(
        self,
        latents_shape: tuple[int, ...],
        *,
        output: Output,
        executables: Path | None = None,
    ) -> Programs:
        """The programs for latents [B, C, T, H, W], once for all T of the same parity.

        Args:
            executables: a folder of them; what it does not hold is compiled.
        """
        b, channels, frames, height, width = latents_shape
        batches = frame_batches(frames)
        first_frames = batches[0][1]
        key = (b, channels, first_frames, len(batches) > 1, height, width, output)
        if key not in self._programs:
            programs = find_or_compile(
                self.programs(latents_shape, output=output),
                executables,
                devices=list(self.mesh.devices.flat),
                threads=self.compiler_threads,
            )
            self._programs[key] = Programs(*programs)
        return self._programs[key]

    def decode(self, latents: jax.Array | np.ndarray, *, output: Output) -> Iterator[np.ndarray]:
        """Frames of a video, a batch at a time, each fetched while the next one decodes.

        Args:
            latents: [B, C, T, H, W] as the transformer made them, the VAE's scaling still on.
            output: "uint8" for 0..255, rounded; "float32" for 0..1.

        Yields:
            [B, F, height, width, 3] of the asked dtype, in order: views of planes, because a TPU
            would pad a last axis of 3 to 128.

        Raises:
            FloatingPointError: the VAE produced a value that is not finite.
        """
        programs = self.compile(latents.shape, output=output)
        shards = self._shards(latents.shape)
        # [B, C, T, H, W] -> [B, T, W, H, C]; at most 100 MB, so it need not stay on the devices.
        latents = np.asarray(latents, dtype=np.float32).transpose(0, 2, 4, 3, 1)
        padding = shards.padded_width - shards.width
        latents = np.pad(latents, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
        columns = NamedSharding(self.mesh, _COLUMNS)

        self.decode_seconds = 0.0
        cache, waiting = None, None
        with ThreadPoolExecutor(1) as fetching:
            for start, end in frame_batches(latents.shape[1]):
                program = programs.first if start == 0 else programs.later
                batch = place(latents[:, start:end], columns)
                pixels, finite, cache = program(self.weights, batch, cache)
                fetched = fetching.submit(_fetch, pixels, finite, start, end)
                if waiting is not None:
                    yield self._frames(waiting)
                waiting = fetched
            yield self._frames(waiting)

    def _frames(self, fetched: Future[tuple[np.ndarray, float]]) -> np.ndarray:
        frames, seconds = fetched.result()
        self.decode_seconds += seconds
        return frames


def make_decoder(name: str, config: VaeConfig, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """A decoder that compiles but holds no weights.

    Args:
        name: "vae_torchax" or "vae_flax".
        mesh: its axes are used as one, to split the width; its devices may be absent.
        dtype: bfloat16 or float32.
    """
    return Decoder(name, config, Mesh(mesh.devices.reshape(-1), (AXIS,)), jnp.dtype(dtype))


def load_decoder(name: str, vae_folder: Path, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """`make_decoder` with the config and the weights of a folder in diffusers' layout.

    Raises:
        ValueError: the config cannot be decoded, or weights do not fit it.
    """
    decoder = make_decoder(name, VaeConfig.from_file(Path(vae_folder) / "config.json"), mesh, dtype)
    decoder.load(vae_folder)
    return decoder


def _fetch(pixels: jax.Array, finite: jax.Array, start: int, end: int) -> tuple[np.ndarray, float]:
    """The frames [B, F, height, width, 3] of a batch, and the seconds until they were here."""
    begun = time.perf_counter()
    frames = np.asarray(pixels)
    if not int(finite):
        raise FloatingPointError(
            f"the VAE made NaN or infinity of latent frames {start} to {end - 1}; "
            "latents from float16 runs do this, bfloat16 and float32 should not"
        )
    return np.moveaxis(frames, 2, -1), time.perf_counter() - begun
