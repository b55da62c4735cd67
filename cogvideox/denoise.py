"""Guidance and the denoising loop: one jitted step, run over a schedule."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox import transformer
from cogvideox.attention import AttentionKernel
from cogvideox.checkpoint import StoredTensor
from cogvideox.scheduler import Schedule, StepCoefficients, draw_noise, step
from cogvideox.settings import LatentShape


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The denoising program of one model and one shape on one mesh.

    Prompts, seeds, guidance scales, schedulers and step counts are arguments of the program, so
    one compilation serves them all.
    """

    config: Mapping[str, Any]  # the transformer's
    weights: Mapping[str, StoredTensor]  # headers of its safetensors files
    latents: LatentShape
    text_tokens: int
    guided: bool  # classifier-free guidance; doubles the transformer's batch
    dtype: str
    mesh: jax.sharding.Mesh
    attention: AttentionKernel

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def split_batch(self) -> NamedSharding:
        return NamedSharding(self.mesh, P("dp"))

    @property
    def tokens(self) -> int:
        """Text and video tokens of one sample, S."""
        patch = self.config["patch_size"] ** 2 * (self.config["patch_size_t"] or 1)
        _, frames, _, height, width = self.latents.sizes
        return self.text_tokens + frames * height * width // patch

    @cached_property
    def positions(self) -> dict[str, Any]:
        """The positional tables, on the host (see `transformer.positions`)."""
        return transformer.positions(self.config, self.latents, self.text_tokens)

    def check_weights(self) -> None:
        """Raises ValueError if the weight files do not fit the config or the sharding table."""
        transformer.check_weights(self.config, self.weights)

    def load(self) -> dict[str, jax.Array]:
        """Reads the weights into their shards."""
        dtype = jnp.dtype(self.dtype)
        return transformer.load_parameters(self.config, self.weights, self.mesh, dtype)

    def prompt_embeds(self, embeddings: Mapping[str, np.ndarray]) -> jax.Array:
        """The transformer's text input [B or 2B, S, E]: negative prompts first if guided."""
        parts = [embeddings["prompt_embeds"]]
        if self.guided:
            parts.insert(0, embeddings["negative_prompt_embeds"])
        return jax.device_put(np.concatenate(parts).astype(jnp.dtype(self.dtype)), self.split_batch)

    def compile(self) -> Callable:
        """Compiles the step, or reads it from the persistent cache; needs no weights."""
        return self.lower().compile()

    def lower(self) -> jax.stages.Lowered:
        """The step lowered for abstract arguments, placed as `run` places the real ones."""

        def replicated(array: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=self.replicated)

        latents = jax.ShapeDtypeStruct(self.latents.sizes, self.dtype, sharding=self.replicated)
        x0 = replicated(latents, jnp.float32)
        parameters = transformer.abstract_parameters(self.config, self.mesh, jnp.dtype(self.dtype))
        positions = jax.tree.map(replicated, self.positions)
        text = (
            self.latents.batch * (2 if self.guided else 1),
            self.text_tokens,
            self.config["text_embed_dim"],
        )
        prompt_embeds = jax.ShapeDtypeStruct(text, self.dtype, sharding=self.split_batch)
        scalars = _step_scalars(0, 0.0, StepCoefficients(*[0.0] * 6))
        step = jax.jit(
            self._step, donate_argnums=(0, 1), out_shardings=(self.replicated, self.replicated)
        )
        # Pallas asks the abstract mesh which chip it compiles for.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return step.lower(latents, x0, parameters, positions, prompt_embeds, latents, *scalars)

    @cached_property
    def _module(self) -> torch.nn.Module:
        return transformer.build_module(self.config, self.latents, self.attention, self.mesh)

    def _step(
        self,
        latents: jax.Array,
        previous_x0: jax.Array,
        parameters: Mapping[str, jax.Array],
        positions: Mapping[str, Any],
        prompt_embeds: jax.Array,
        noise: jax.Array,
        timestep: jax.Array,
        guidance_scale: jax.Array,
        weights: StepCoefficients,
    ) -> tuple[jax.Array, jax.Array]:
        """Transformer, guidance and scheduler; returns the latents and x0, [B, T, C, H, W]."""
        model_input = jnp.concatenate([latents, latents]) if self.guided else latents
        model_input = jax.lax.with_sharding_constraint(model_input, self.split_batch)
        output = transformer.predict(
            self._module, parameters, positions, model_input, prompt_embeds, timestep
        ).astype(jnp.float32)
        if self.guided:
            negative, positive = jnp.split(output, 2)
            output = negative + guidance_scale * (positive - negative)
        following, x0 = step(latents, output, previous_x0, noise, weights)
        return following.astype(latents.dtype), x0

    def run(
        self,
        compiled_step: Callable,
        parameters: Mapping[str, jax.Array],
        prompt_embeds: jax.Array,
        schedule: Schedule,
        seed: int,
    ) -> Iterator[jax.Array]:
        """Runs the denoising loop.

        Yields:
            The latents [B, T, C, H, W] after each step, once the device has computed them. Each
            is donated to the step after it, so only the last may be kept.
        """
        noises = draw_noise(seed, self.latents.sizes, getattr(torch, self.dtype), schedule)
        latents = jax.device_put(next(noises), self.replicated)
        previous_x0 = jax.device_put(np.zeros(latents.shape, np.float32), self.replicated)
        noise = jax.device_put(next(noises), self.replicated)
        positions = jax.device_put(self.positions, self.replicated)
        for i, timestep in enumerate(schedule.timesteps):
            scalars = _step_scalars(timestep, schedule.guidance_scales[i], schedule.coefficients[i])
            latents, previous_x0 = compiled_step(
                latents, previous_x0, parameters, positions, prompt_embeds, noise, *scalars
            )
            # Drawn on the host while the device computes: 50 ms of a step of seconds.
            noise = jax.device_put(next(noises, noise), self.replicated)
            yield jax.block_until_ready(latents)


def _step_scalars(
    timestep: int, guidance_scale: float, weights: StepCoefficients
) -> tuple[np.int32, np.float32, StepCoefficients]:
    """What changes from step to step, as arrays: values in the program would recompile it."""
    scalars = StepCoefficients(*map(np.float32, weights))
    return np.int32(timestep), np.float32(guidance_scale), scalars
