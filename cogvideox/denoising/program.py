"""The denoising step as one compiled program: transformer, guidance and scheduler.

The step is one shard_map over the mesh. Every device holds a shard of the token rows of all samples
and runs the transformer on its shard of the guided batch.

A step has two lossy forms. One reuses the residual of an earlier step (see `step_mask`): what all
blocks add to the embedded tokens. The other reuses the difference of guidance (see
`Denoiser.gated`). They are programs of their own over the same weights; the exact step's program
has no trace of them.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cogvideox.denoising.reuse import Reusable, Reuse
from cogvideox.denoising.scheduler import StepCoefficients, step
from cogvideox.model.config import TransformerConfig
from cogvideox.model.settings import LatentShape
from cogvideox.transformer.backends.base import Backend
from cogvideox.transformer.block_rules import SparseAttention
from cogvideox.transformer.collectives import row_indices
from cogvideox.transformer.loading import load_parameters, stack_programs
from cogvideox.transformer.parameters import BLOCKS, abstract_parameters
from cogvideox.transformer.sparse_step import SparseStep, make_sparse_step
from cogvideox.transformer.tiling import choose_tiling
from cogvideox.transformer.tokens import PositionTables, TokenLayout, positions
from runtime.compiler_options import transformer_options
from runtime.executables import find_or_compile
from runtime.mesh import fitting_meshes, make_mesh, place
from runtime.programs import Program, machine_fields
from runtime.tensor_files import StoredTensor

if TYPE_CHECKING:
    from cogvideox.transformer.model import TokenTransformer

# Files traced into the step, relative to the project; its executables depend on no others.
SOURCES = (
    "cogvideox/model/config.py",
    "cogvideox/transformer",
    "cogvideox/denoising/program.py",
    "cogvideox/denoising/reuse.py",
    "cogvideox/denoising/scheduler.py",
    "splash_attention",
)

TOKENS = P(None, ("sp", "tp"), None)  # [B, S, C]: split by rows, not by samples
_ROWS = P(("sp", "tp"), None)  # [S, E]
_BATCH = P("dp")  # the transformer's samples, guidance's included
RESIDUAL = P("dp", ("sp", "tp"), None)  # [samples, S, E]

# Fields of the transformer's config that do not affect the program: they are unused, or only affect
# the positional tables, which are arguments.
_NOT_IN_THE_PROGRAM = {
    *("sample_height", "sample_width", "sample_frames", "max_text_seq_length", "dropout"),
    *("spatial_interpolation_scale", "temporal_interpolation_scale", "temporal_compression_ratio"),
}


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Denoising programs for one model and one shape on one mesh.

    Prompts, noise, guidance scales, scheduler coefficients and the scales of a residual are
    arguments: changing the prompt, seed, guidance scale, scheduler, step count or step mask does
    not recompile.

    Attributes:
        stored: safetensors headers; {} if no weights are loaded.
        guided: classifier-free guidance; doubles the transformer's batch.
        difference: "off" in exact steps. "keep" also returns the difference of guidance; "reuse"
            takes it and runs the transformer only for the prompts, without negative prompts.
        sparse: which tokens attention keeps; None keeps all.
    """

    config: TransformerConfig
    stored: Mapping[str, StoredTensor]
    latents: LatentShape
    text_tokens: int
    guided: bool
    dtype: str
    mesh: jax.sharding.Mesh
    backend: Backend
    difference: Reuse = "off"
    sparse: SparseAttention | None = None

    @property
    def branches(self) -> int:
        """Parts of the transformer's batch: 2 with negative prompts, else 1."""
        return 2 if self.guided and self.difference != "reuse" else 1

    @property
    def samples(self) -> int:
        """Samples of the transformer's batch."""
        return self.branches * self.latents.batch

    @property
    def layout(self) -> TokenLayout:
        """Layout of latents and text in the token sequence."""
        layout = TokenLayout(
            self.latents, self.config.patch_size, self.config.patch_size_t or 1,
            self.text_tokens, padded=0,
        )  # fmt: skip
        shards = self.mesh.shape["sp"] * self.mesh.shape["tp"]
        tiling = choose_tiling(layout.grid, layout.text) if self.sparse else None
        padded = self.backend.padded_tokens(tiling.rows if tiling else layout.tokens, shards)
        return dataclasses.replace(layout, padded=padded, tiling=tiling)

    @cached_property
    def sparse_step(self) -> SparseStep | None:
        """What attention keeps on this mesh, if it is sparse."""
        how = self.mesh.shape["tp"], self.mesh.shape["sp"], self.backend.precision.attention
        return self.sparse and make_sparse_step(self.sparse, self.config, self.layout, *how)

    @cached_property
    def positions(self) -> PositionTables:
        """The positional tables (`tokens.positions`) and those of a sparse step, on the host."""
        tables = positions(self.config, self.layout, self.stored)
        return tables | ({"sparse": self.sparse_step.tables} if self.sparse_step else {})

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    @property
    def position_specs(self) -> dict[str, Any]:
        # Attention uses the rows of all tokens, so its tables are not split.
        specs: dict[str, Any] = jax.tree.map(lambda _: P(), self.positions)
        return specs | ({"embedding": _ROWS} if "embedding" in specs else {})

    def load(
        self, executables: Path | None = None, names: Collection[str] | None = None
    ) -> dict[str, jax.Array]:
        """Reads the weights into their shards; reads the stacking programs or compiles them.

        Args:
            names: of the parameters to load; None loads all.
        """
        dtype = jnp.dtype(self.dtype)
        return load_parameters(self.config, self.stored, self.mesh, dtype, executables, names)

    def prompt_embeds(self, embeddings: Mapping[str, np.ndarray]) -> jax.Array:
        """Builds the transformer's text input [samples, S, E], negative prompts first."""
        parts = [embeddings["prompt_embeds"]]
        if self.branches == 2:
            parts.insert(0, embeddings["negative_prompt_embeds"])
        text = np.concatenate(parts).astype(jnp.dtype(self.dtype))
        return place(text, self.sharding(_BATCH))

    def compile(
        self, executables: Path | None = None, residuals: Sequence[Reuse] = ("off",)
    ) -> dict[Reuse, Callable]:
        """Reads steps from the folder of executables or compiles them; needs no weights.

        Args:
            residuals: what the steps do with the residual, one program each.
        """
        programs, devices = [self.step_program(r) for r in residuals], list(self.mesh.devices.flat)
        found = find_or_compile(programs, executables, devices=devices)
        return dict(zip(residuals, found, strict=True))

    @property
    def stack_programs(self) -> list[Program]:
        """Returns the programs that load the weights."""
        stacks = stack_programs(self.config, self.mesh, jnp.dtype(self.dtype))
        return list({stack.name: stack for stack in stacks.values()}.values())

    @property
    def program(self) -> Program:
        """Returns the program of the step that has no use for a residual."""
        return self.step_program("off")

    def step_program(self, residual: Reuse) -> Program:
        """Returns a step's program with everything that determines its executable."""
        b, t, _, h, w = self.latents.sizes
        mesh = "".join(f"-{axis}{size}" for axis, size in self.mesh.shape.items())
        config = {
            name: value
            for name, value in dataclasses.asdict(self.config).items()
            if name not in _NOT_IN_THE_PROGRAM and value is not None
        }
        reuses = {"residual": residual, "difference": self.difference}
        reuses = {what: how for what, how in reuses.items() if how != "off"}
        fields = {
            "transformer": config,
            "latents": self.latents.sizes,
            "text_tokens": self.text_tokens,
            "guided": self.guided,
            "dtype": self.dtype,
            "attention": self.backend.name,
            **self.backend.precision.options,
            "block_sizes": self._block_sizes,
            **({"sparse": self.sparse_step.fields} if self.sparse_step else {}),
            "compiler_options": transformer_options(self.mesh.devices),
            **reuses,
            **machine_fields(self.mesh, ("torch", "torchax", "diffusers"), SOURCES),
        }
        kinds = ["sparse"] * bool(self.sparse) + list(self.backend.precision.options.values())
        kinds += [f"{how}_{what}" for what, how in reuses.items()]
        name = "_".join(["stage2_transformer", *kinds])
        return Program(name, f"{b}x{t}x{h}x{w}{mesh}", fields, partial(self.lower, residual))

    @property
    def _block_sizes(self) -> dict[str, int]:
        """Returns the attention kernel's tile sizes; they depend on chip and shapes."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            lengths = self.layout.padded, self.layout.tokens
            return self.backend.block_sizes(self.config.attention_head_dim, *lengths, self.dtype)

    @staticmethod
    def arguments_of[Value](residual: Reuse, arrays: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the weights or position tables that a step takes; a reused residual needs few.

        JAX drops unused arguments from the executable, which the manifest would still list.
        """
        unused = (BLOCKS, "rotary", "sparse") if residual == "reuse" else ()
        return {name: array for name, array in arrays.items() if not name.startswith(unused)}

    def lower(self, residual: Reuse = "off") -> jax.stages.Lowered:
        """Lowers a step for abstract arguments, sharded as in the loop."""

        def abstract(shape: tuple[int, ...], dtype: DTypeLike, spec: P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(spec))

        position_specs = self.arguments_of(residual, self.position_specs)
        position_arrays = jax.tree.map(
            lambda array, spec: abstract(array.shape, array.dtype, spec),
            self.arguments_of(residual, self.positions),
            position_specs,
        )
        parameters = abstract_parameters(self.config, self.mesh, jnp.dtype(self.dtype))
        parameters = self.arguments_of(residual, parameters)
        tokens = abstract(self.layout.shape, self.dtype, TOKENS)
        x0 = abstract(self.layout.shape, jnp.float32, TOKENS)
        text = (self.samples, self.text_tokens, self.config.text_embed_dim)
        prompt_embeds = abstract(text, self.dtype, _BATCH)
        residual_shape = (self.samples, self.layout.padded, self.config.width)
        reusable = Reusable(abstract(residual_shape, self.dtype, RESIDUAL), x0)
        reused, kept = (
            Reusable(
                reusable.residual if residual == how else None,
                reusable.difference if self.difference == how else None,
            )
            for how in ("reuse", "keep")
        )
        image = (tokens,) if self.config.image_to_video else ()
        scales = (1.0,) * self.branches if residual == "reuse" else ()
        scalars = self.step_scalars(0, 0.0, StepCoefficients(*[0.0] * 6), scales)
        specs, image_specs, reused_specs, kept_specs = (
            jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
            for tree in (parameters, image, reused, kept)
        )
        step = jax.shard_map(
            partial(self._step, residual),
            mesh=self.mesh,
            in_specs=(
                *(TOKENS, TOKENS, specs, position_specs, _BATCH, TOKENS),
                *(image_specs, reused_specs, *jax.tree.map(lambda _: P(), scalars)),
            ),
            out_specs=(TOKENS, TOKENS, kept_specs),
            check_vma=False,  # pallas_call does not declare which axes its output varies over
        )
        # Pallas reads the chip it compiles for from the abstract mesh.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(step, donate_argnums=(0, 1)).lower(
                *(tokens, x0, parameters, position_arrays, prompt_embeds, tokens),
                *(image, reused, *scalars),
            )

    def _step(
        self,
        residual: Reuse,
        tokens: jax.Array,
        previous_x0: jax.Array,
        parameters: Mapping[str, jax.Array],
        position_arrays: Mapping[str, jax.Array | tuple[jax.Array, jax.Array]],
        prompt_embeds: jax.Array,
        noise: jax.Array,
        image: tuple[jax.Array, ...],
        reused: Reusable[jax.Array],
        timestep: jax.Array,
        guidance_scale: tuple[jax.Array, ...],
        coefficients: StepCoefficients[jax.Array],
        residual_scales: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, jax.Array, Reusable[jax.Array]]:
        """Runs transformer, guidance and scheduler on one device.

        Args:
            tokens, noise: [B, s, C] in the run's dtype, this device's rows of every sample.
            previous_x0: the same in float32.
            prompt_embeds: [b, S_text, text_embed_dim], this device's samples; with guidance, the
                negative prompts come before the prompts.
            image: of an image-to-video model the latents of the image, [B, s, C]; else empty.
            reused: this device's part of what the step takes from earlier ones.
            residual_scales: factors of the reused residual, by branch.

        Returns:
            The next tokens and x0, [B, s, C], and what the step keeps for later ones.
        """
        samples = jnp.concatenate([tokens, *image], axis=-1) if image else tokens
        samples = self.own_samples(samples, prompt_embeds)
        from cogvideox.transformer import model as transformer  # only to trace: it takes seconds

        output, made = transformer.predict(
            *(self._module, parameters, samples, prompt_embeds, timestep, position_arrays),
            residual=self._scaled(reused.residual, residual_scales),
            return_residual=residual == "keep",
        )
        output = jax.lax.all_gather(output.astype(jnp.float32), "dp", tiled=True)
        difference = None
        if self.branches == 2:
            negative, positive = jnp.split(output, 2)
            difference = positive - negative
            output = negative + guidance_scale[0] * difference
        elif reused.difference is not None:
            # negative = positive - difference in the line above.
            output = output + (guidance_scale[0] - 1) * reused.difference
        following, x0 = step(tokens, output, previous_x0, noise, coefficients)
        # Text and padding rows stay zero; the transformer's output there is undefined.
        is_video = self.layout.is_video(row_indices(tokens.shape[1])[:, None])
        kept = Reusable(made, difference if self.difference == "keep" else None)
        following, x0, kept = jax.tree.map(
            lambda x: jnp.where(is_video, x, 0), (following, x0, kept)
        )
        return following.astype(tokens.dtype), x0, kept

    def own_samples(self, tokens: jax.Array, prompt_embeds: jax.Array) -> jax.Array:
        """Returns this device's samples of the guided batch, of tokens [B, s, C]."""
        samples = jnp.concatenate([tokens, tokens]) if self.branches == 2 else tokens
        own = prompt_embeds.shape[0]
        return jax.lax.dynamic_slice_in_dim(samples, jax.lax.axis_index("dp") * own, own)

    def _scaled(
        self, residual: jax.Array | None, scales: tuple[jax.Array, ...]
    ) -> jax.Array | None:
        """Multiplies this device's residual [b, s, E] by its branches' scales, in float32."""
        if residual is None:
            return None
        own = residual.shape[0]
        branches = (jax.lax.axis_index("dp") * own + jnp.arange(own)) // self.latents.batch
        return jnp.stack(scales)[branches, None, None] * residual

    @cached_property
    def _module(self) -> "TokenTransformer":
        from cogvideox.transformer import model as transformer

        return transformer.TokenTransformer.abstract(
            *(self.config, self.layout, self.backend),
            self.sparse_step and self.sparse_step.lists,
        )

    def step_scalars(
        self,
        timestep: int,
        guidance_scale: float,
        coefficients: StepCoefficients[float],
        residual_scales: Sequence[float] = (),
    ) -> tuple[
        np.int32, tuple[np.float32, ...], StepCoefficients[np.float32], tuple[np.float32, ...]
    ]:
        """Returns the scalars of one step as arrays; constants would recompile the program.

        An unguided step has no guidance scale: JAX drops unused arguments from the executable.

        Args:
            residual_scales: by branch, if the step reuses a residual.
        """
        guidance = (np.float32(guidance_scale),) if self.guided else ()
        scales = tuple(map(np.float32, residual_scales))
        return (
            *(np.int32(timestep), guidance),
            *(StepCoefficients(*map(np.float32, coefficients)), scales),
        )

    def gated(self) -> "Denoiser":
        """Returns the steps that run only the prompts and reuse the difference of guidance.

        They use a mesh of the same devices. Half of the batch leaves devices along dp idle, so
        these join sp, as many as split the heads. tp stays, so every device keeps its shards of
        the weights.

        Raises:
            ValueError: a process would have no device.
        """
        heads, tp = self.config.num_attention_heads, self.mesh.shape["tp"]
        fitting = fitting_meshes(self.latents.batch, heads, self.mesh.size)
        shape = next(shape for shape in fitting if shape[2] == tp)
        mesh = make_mesh(shape, list(self.mesh.devices.flat))
        return dataclasses.replace(self, mesh=mesh, difference="reuse")
