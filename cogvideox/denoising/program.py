"""The denoising step as one compiled program: transformer, guidance and scheduler.

The step is one shard_map over the mesh. Every device holds a shard of the token rows of all samples
and runs the transformer on its shard of the guided batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cogvideox.denoising.scheduler import StepCoefficients, step
from cogvideox.model.config import TransformerConfig
from cogvideox.model.settings import LatentShape
from cogvideox.transformer.backends.base import Backend
from cogvideox.transformer.collectives import row_indices
from cogvideox.transformer.loading import load_parameters, stack_programs
from cogvideox.transformer.parameters import abstract_parameters
from cogvideox.transformer.tokens import PositionTables, TokenLayout, positions
from runtime.compiler_options import transformer_options
from runtime.executables import find_or_compile
from runtime.mesh import place
from runtime.programs import Program, machine_fields
from runtime.tensor_files import StoredTensor

if TYPE_CHECKING:
    from cogvideox.transformer.model import TokenTransformer

# Files traced into the step, relative to the project; its executables depend on no others.
SOURCES = (
    "cogvideox/model/config.py",
    "cogvideox/transformer",
    "cogvideox/denoising/program.py",
    "cogvideox/denoising/scheduler.py",
    "splash_attention",
)

TOKENS = P(None, ("sp", "tp"), None)  # [B, S, C]: split by rows, not by samples
_ROWS = P(("sp", "tp"), None)  # [S, E]
_BATCH = P("dp")  # the transformer's samples, guidance's included

# Fields of the transformer's config that do not affect the program: they are unused, or only affect
# the positional tables, which are arguments.
_NOT_IN_THE_PROGRAM = {
    *("sample_height", "sample_width", "sample_frames", "max_text_seq_length", "dropout"),
    *("spatial_interpolation_scale", "temporal_interpolation_scale", "temporal_compression_ratio"),
}


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Denoising program for one model and one shape on one mesh.

    Prompts, noise, guidance scales and scheduler coefficients are arguments: changing the prompt,
    seed, guidance scale, scheduler or step count does not recompile.
    """

    config: TransformerConfig
    stored: Mapping[str, StoredTensor]  # safetensors headers; {} if no weights are loaded
    latents: LatentShape
    text_tokens: int
    guided: bool  # classifier-free guidance; doubles the transformer's batch
    dtype: str
    mesh: jax.sharding.Mesh
    backend: Backend

    @property
    def layout(self) -> TokenLayout:
        """Layout of latents and text in the token sequence."""
        layout = TokenLayout(
            self.latents, self.config.patch_size, self.config.patch_size_t or 1,
            self.text_tokens, padded=0,
        )  # fmt: skip
        shards = self.mesh.shape["sp"] * self.mesh.shape["tp"]
        padded = self.backend.padded_tokens(layout.tokens, shards)
        return dataclasses.replace(layout, padded=padded)

    @cached_property
    def positions(self) -> PositionTables:
        """The positional tables, on the host (see `tokens.positions`)."""
        return positions(self.config, self.layout)

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    @property
    def position_specs(self) -> dict[str, P | tuple[P, P]]:
        # Attention uses the rows of all tokens, so the tables are not split.
        specs: dict[str, P | tuple[P, P]] = {"rotary": (P(), P()), "embedding": _ROWS}
        return {name: specs[name] for name in self.positions}

    def load(self, executables: Path | None = None) -> dict[str, jax.Array]:
        """Reads the weights into their shards; reads the stacking programs or compiles them."""
        dtype = jnp.dtype(self.dtype)
        return load_parameters(self.config, self.stored, self.mesh, dtype, executables)

    def prompt_embeds(self, embeddings: Mapping[str, np.ndarray]) -> jax.Array:
        """Builds the transformer's text input [B or 2B, S, E]; negative prompts first if guided."""
        parts = [embeddings["prompt_embeds"]]
        if self.guided:
            parts.insert(0, embeddings["negative_prompt_embeds"])
        text = np.concatenate(parts).astype(jnp.dtype(self.dtype))
        return place(text, self.sharding(_BATCH))

    def compile(self, executables: Path | None = None) -> Callable:
        """Reads the step from the folder of executables or compiles it; needs no weights."""
        devices = list(self.mesh.devices.flat)
        return find_or_compile([self.program], executables, devices=devices)[0]

    @property
    def programs(self) -> list[Program]:
        """Returns the step's program and the programs that load the weights."""
        stacks = stack_programs(self.config, self.mesh, jnp.dtype(self.dtype))
        return [self.program, *{stack.name: stack for stack in stacks.values()}.values()]

    @property
    def program(self) -> Program:
        """Returns the step's program with everything that determines its executable."""
        b, t, _, h, w = self.latents.sizes
        mesh = "".join(f"-{axis}{size}" for axis, size in self.mesh.shape.items())
        config = {
            name: value
            for name, value in dataclasses.asdict(self.config).items()
            if name not in _NOT_IN_THE_PROGRAM and value is not None
        }
        fields = {
            "transformer": config,
            "latents": self.latents.sizes,
            "text_tokens": self.text_tokens,
            "guided": self.guided,
            "dtype": self.dtype,
            "attention": self.backend.name,
            "block_sizes": self._block_sizes,
            "compiler_options": transformer_options(self.mesh.devices),
            **machine_fields(self.mesh, ("torch", "torchax", "diffusers"), SOURCES),
        }
        return Program("stage2_transformer", f"{b}x{t}x{h}x{w}{mesh}", fields, self.lower)

    @property
    def _block_sizes(self) -> dict[str, int]:
        """Returns the attention kernel's tile sizes; they depend on chip and shapes."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self.backend.block_sizes(
                self.config.attention_head_dim,
                self.layout.padded,
                self.layout.tokens,
                self.dtype,
            )

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step for abstract arguments, sharded as in the loop."""

        def abstract(shape: tuple[int, ...], dtype: DTypeLike, spec: P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(spec))

        parameters = abstract_parameters(self.config, self.mesh, jnp.dtype(self.dtype))
        position_arrays = jax.tree.map(
            lambda array, spec: abstract(array.shape, array.dtype, spec),
            self.positions,
            self.position_specs,
        )
        tokens = abstract(self.layout.shape, self.dtype, TOKENS)
        x0 = abstract(self.layout.shape, jnp.float32, TOKENS)
        text = (
            self.latents.batch * (2 if self.guided else 1),
            self.text_tokens,
            self.config.text_embed_dim,
        )
        prompt_embeds = abstract(text, self.dtype, _BATCH)
        scalars = self.step_scalars(0, 0.0, StepCoefficients(*[0.0] * 6))
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, parameters)
        step = jax.shard_map(
            self._step,
            mesh=self.mesh,
            in_specs=(
                *(TOKENS, TOKENS, specs, self.position_specs, _BATCH, TOKENS),
                *jax.tree.map(lambda _: P(), scalars),
            ),
            out_specs=(TOKENS, TOKENS),
            check_vma=False,  # pallas_call does not declare which axes its output varies over
        )
        # Pallas reads the chip it compiles for from the abstract mesh.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(step, donate_argnums=(0, 1)).lower(
                tokens, x0, parameters, position_arrays, prompt_embeds, tokens, *scalars
            )

    def _step(
        self,
        tokens: jax.Array,
        previous_x0: jax.Array,
        parameters: Mapping[str, jax.Array],
        position_arrays: Mapping[str, jax.Array | tuple[jax.Array, jax.Array]],
        prompt_embeds: jax.Array,
        noise: jax.Array,
        timestep: jax.Array,
        guidance_scale: tuple[jax.Array, ...],
        coefficients: StepCoefficients[jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Runs transformer, guidance and scheduler on one device.

        Args:
            tokens, noise: [B, s, C] in the run's dtype, this device's rows of every sample.
            previous_x0: the same in float32.
            prompt_embeds: [b, S_text, text_embed_dim], this device's samples; with guidance, the
                negative prompts come before the prompts.

        Returns:
            The next tokens and x0, [B, s, C].
        """
        samples = jnp.concatenate([tokens, tokens]) if self.guided else tokens
        own = prompt_embeds.shape[0]
        samples = jax.lax.dynamic_slice_in_dim(samples, jax.lax.axis_index("dp") * own, own)
        from cogvideox.transformer import model as transformer  # only to trace: it takes seconds

        output = transformer.predict(
            self._module, parameters, samples, prompt_embeds, timestep, position_arrays
        )
        output = jax.lax.all_gather(output.astype(jnp.float32), "dp", tiled=True)
        if self.guided:
            negative, positive = jnp.split(output, 2)
            output = negative + guidance_scale[0] * (positive - negative)
        following, x0 = step(tokens, output, previous_x0, noise, coefficients)
        # Text and padding rows stay zero; the transformer's output there is undefined.
        rows = row_indices(tokens.shape[1])[:, None]
        is_video = (rows >= self.layout.text) & (rows < self.layout.tokens)
        following, x0 = (jnp.where(is_video, x, 0) for x in (following, x0))
        return following.astype(tokens.dtype), x0

    @cached_property
    def _module(self) -> "TokenTransformer":
        from cogvideox.transformer import model as transformer

        return transformer.TokenTransformer.abstract(self.config, self.layout, self.backend)

    def step_scalars(
        self, timestep: int, guidance_scale: float, coefficients: StepCoefficients[float]
    ) -> tuple[np.int32, tuple[np.float32, ...], StepCoefficients[np.float32]]:
        """Returns the scalars of one step as arrays; constants would recompile the program.

        An unguided step has no guidance scale: JAX drops unused arguments from the executable.
        """
        guidance = (np.float32(guidance_scale),) if self.guided else ()
        return np.int32(timestep), guidance, StepCoefficients(*map(np.float32, coefficients))
