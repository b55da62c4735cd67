"""Encoding of frames to the posterior of latents, one batch of frames at a time.

See `cogvideox.vae.encode_program` for the batches and their programs.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cogvideox.model.config import VaeConfig
from cogvideox.vae.batches import AXIS, COLUMNS
from cogvideox.vae.encode_program import EncodeProgram, frame_batches
from cogvideox.vae.kinds import ENCODERS
from cogvideox.vae.weights import load_weights
from runtime.executables import find_or_compile
from runtime.mesh import place


class Posterior(NamedTuple):
    """A normal distribution of latents [B, Z, T, H, W], float32: its mean and deviation."""

    mean: np.ndarray
    std: np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder on a mesh; see `load_encoder`.

    Attributes:
        program: the programs to compile.
        weights: by diffusers' names, in the layout of `cogvideox.vae.weights.arrange`, replicated.
    """

    program: EncodeProgram
    weights: dict[str, jax.Array]
    _executables: dict[tuple[int, ...], list[Callable]] = dataclasses.field(default_factory=dict)

    def compile(self, shape: tuple[int, ...], executables: Path | None = None) -> list[Callable]:
        """Returns the executables of the first batch and, if there are more, of all others.

        Args:
            shape: of the video, [B, F, height, width, 3].
            executables: folder of executables; missing ones are compiled.
        """
        if shape not in self._executables:
            programs, devices = self.program.programs(shape), list(self.program.mesh.devices.flat)
            self._executables[shape] = find_or_compile(programs, executables, devices=devices)
        return self._executables[shape]

    def encode(self, video: np.ndarray, executables: Path | None = None) -> Posterior:
        """Encodes a video or, as a video of one frame, an image.

        Args:
            video: uint8 [B, F, height, width, 3]; height and width are multiples of the VAE's
                pixels per latent.
            executables: see `compile`.

        Raises:
            FloatingPointError: the VAE produced a value that is not finite.
        """
        program, compiled = self.program, self.compile(video.shape, executables)
        shards = program.shards(video.shape[3])
        # [B, F, H, W, 3] -> [B, F, W, 3, H]: a TPU would pad a last axis of 3 to 128.
        planes = video.transpose(0, 1, 3, 4, 2)
        padding = shards.padded_width * program.config.spatial_scale - planes.shape[2]
        columns = NamedSharding(program.mesh, COLUMNS)
        caches, parts = None, []
        for start, end in frame_batches(planes.shape[1]):
            batch = np.pad(planes[:, start:end], ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
            run = compiled[0] if start == 0 else compiled[1]
            (mean, std), finite, caches = run(self.weights, place(batch, columns), caches)
            if not int(finite):
                raise FloatingPointError(
                    f"the VAE produced NaN or infinity in frames {start} to {end - 1}"
                )
            parts.append((np.asarray(mean), np.asarray(std)))
        return Posterior(*(np.concatenate(part, axis=2) for part in zip(*parts, strict=True)))


def make_encode_program(
    name: str, config: VaeConfig, mesh: Mesh, dtype: jnp.dtype
) -> EncodeProgram:
    """Returns the programs of an encoder, which need no weights.

    Args:
        name: key of `cogvideox.vae.kinds.ENCODERS`.
        config: config of the VAE.
        mesh: all its axes together split the width; its devices may be abstract.
        dtype: bfloat16 or float32.
    """
    one_axis = Mesh(mesh.devices.reshape(-1), (AXIS,))
    return EncodeProgram(ENCODERS[name], config, one_axis, jnp.dtype(dtype))


def load_encoder(name: str, vae_folder: Path, mesh: Mesh, dtype: jnp.dtype) -> Encoder:
    """Makes an encoder with the config and weights of a folder in diffusers' layout.

    Raises:
        ValueError: the config is unsupported, or weights do not fit it.
    """
    config = VaeConfig.from_file(Path(vae_folder) / "config.json")
    program = make_encode_program(name, config, mesh, dtype)
    weights = load_weights(vae_folder, config, "encoder", program.mesh, program.dtype)
    return Encoder(program, weights)
