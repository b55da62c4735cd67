"""Decoding of latents to frames, on every device of a mesh, one batch of frames at a time.

See `cogvideox.vae.program` for the batches and their programs.
"""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cogvideox.model.config import VaeConfig
from cogvideox.vae.batches import AXIS, COLUMNS
from cogvideox.vae.kinds import DECODERS
from cogvideox.vae.program import DecodeProgram, Output, frame_batches
from cogvideox.vae.weights import load_weights
from runtime.executables import find_or_compile
from runtime.mesh import place
from runtime.programs import Program


class Executables(NamedTuple):
    """Executables for one shape of latents; `later` is None for a single batch."""

    first: jax.stages.Compiled
    later: jax.stages.Compiled | None = None


@dataclasses.dataclass(eq=False)
class Decoder:
    """A decoder on a mesh; see `make_decoder` and `load_decoder`.

    Attributes:
        program: the programs to compile.
        weights: weights by diffusers' names, in the layout of `cogvideox.vae.weights.arrange`,
            replicated; None until loaded. Compiling needs none.
        decode_seconds: time of the last `decode` on the devices and for transfers to the host,
            without the caller's own work.
    """

    program: DecodeProgram
    weights: dict[str, jax.Array] | None = None
    decode_seconds: float = 0.0
    _executables: dict[tuple[object, ...], Executables] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> VaeConfig:
        """Config of the VAE."""
        return self.program.config

    @property
    def mesh(self) -> Mesh:
        """Mesh with one axis, which splits the width."""
        return self.program.mesh

    @property
    def abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `DecodeProgram.abstract_weights`."""
        return self.program.abstract_weights

    @property
    def compiler_threads(self) -> int:
        """Number of programs to compile at once.

        GPUs use one. The compiler times candidates on the device, so two compilations would disturb
        each other; and the second program reuses the choices of the first.
        """
        return 1 if self.mesh.devices.flat[0].platform == "gpu" else 2

    def load(self, vae_folder: Path) -> None:
        """Reads the weights of a VAE folder and places them on every device.

        Raises:
            ValueError: the weights do not fit the config; see `stored_weights`.
        """
        self.weights = load_weights(
            vae_folder, self.config, "decoder", self.mesh, self.program.dtype
        )

    def programs(self, latents_shape: tuple[int, ...], *, output: Output) -> list[Program]:
        """See `DecodeProgram.programs`."""
        return self.program.programs(latents_shape, output=output)

    def compile(
        self,
        latents_shape: tuple[int, ...],
        *,
        output: Output,
        executables: Path | None = None,
    ) -> Executables:
        """Returns the executables for latents [B, C, T, H, W], the same for all even or all odd T.

        Args:
            latents_shape: [B, C, T, H, W].
            output: dtype of the frames.
            executables: folder of executables; missing ones are compiled.

        Raises:
            ValueError: the latents do not have the VAE's number of channels.
        """
        b, channels, frames, height, width = latents_shape
        batches = frame_batches(frames)
        first_frames = batches[0][1]
        key = (b, channels, first_frames, len(batches) > 1, height, width, output)
        if key not in self._executables:
            found = find_or_compile(
                self.programs(latents_shape, output=output),
                executables,
                devices=list(self.mesh.devices.flat),
                threads=self.compiler_threads,
            )
            self._executables[key] = Executables(*found)
        return self._executables[key]

    def decode(self, latents: jax.Array | np.ndarray, *, output: Output) -> Iterator[np.ndarray]:
        """Decodes a video batch by batch; fetches each batch while the next one decodes.

        Args:
            latents: [B, C, T, H, W] from the transformer, with the VAE's scaling applied.
            output: "uint8" for 0..255, rounded; "float32" for 0..1.

        Yields:
            Frames [B, F, height, width, 3] in dtype `output`, in order. They are views of planes,
            because a TPU would pad a last axis of 3 to 128.

        Raises:
            FloatingPointError: the VAE produced a value that is not finite.
        """
        compiled = self.compile(latents.shape, output=output)
        shards = self.program.shards(latents.shape)
        # [B, C, T, H, W] -> [B, T, W, H, C]; at most 100 MB, so it can stay on the host.
        latents = np.asarray(latents, dtype=np.float32).transpose(0, 2, 4, 3, 1)
        padding = shards.padded_width - shards.width
        latents = np.pad(latents, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
        columns = NamedSharding(self.mesh, COLUMNS)

        self.decode_seconds = 0.0
        caches, waiting = None, None
        with ThreadPoolExecutor(1) as fetching:
            for start, end in frame_batches(latents.shape[1]):
                executable = compiled.first if start == 0 else compiled.later
                assert executable is not None  # `compile` makes it if there are more batches
                batch = place(latents[:, start:end], columns)
                pixels, finite, caches = executable(self.weights, batch, caches)
                fetched = fetching.submit(_fetch, pixels, finite, start, end)
                if waiting is not None:
                    yield self._frames(waiting)
                waiting = fetched
            if waiting is not None:
                yield self._frames(waiting)

    def _frames(self, fetched: Future[tuple[np.ndarray, float]]) -> np.ndarray:
        frames, seconds = fetched.result()
        self.decode_seconds += seconds
        return frames


def make_decoder(name: str, config: VaeConfig, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """Returns a decoder that can compile but has no weights.

    Args:
        name: key of `cogvideox.vae.kinds.DECODERS`.
        config: config of the VAE.
        mesh: all its axes together split the width; its devices may be abstract.
        dtype: bfloat16 or float32.
    """
    one_axis = Mesh(mesh.devices.reshape(-1), (AXIS,))
    return Decoder(DecodeProgram(DECODERS[name], config, one_axis, jnp.dtype(dtype)))


def load_decoder(name: str, vae_folder: Path, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """Makes a decoder with the config and weights of a folder in diffusers' layout.

    Raises:
        ValueError: the config is unsupported, or weights do not fit it.
    """
    config = VaeConfig.from_file(Path(vae_folder) / "config.json")
    decoder = make_decoder(name, config, mesh, dtype)
    decoder.load(vae_folder)
    return decoder


def _fetch(pixels: jax.Array, finite: jax.Array, start: int, end: int) -> tuple[np.ndarray, float]:
    """Fetches a batch of frames [B, F, height, width, 3]; also returns the seconds it took."""
    begun = time.perf_counter()
    frames = np.asarray(pixels)
    if not int(finite):
        raise FloatingPointError(
            f"the VAE produced NaN or infinity in latent frames {start} to {end - 1}; "
            "latents of float16 runs can cause this, those of bfloat16 and float32 should not"
        )
    return np.moveaxis(frames, 2, -1), time.perf_counter() - begun
