"""Steps that reuse the residual or the difference of guidance, against exact steps and diffusers.

The reference is a plain loop over diffusers' transformer and scheduler in float32. Hooks on its
blocks take the residual, or replace the blocks by it. The tolerances are those of the exact loop:
another summation order, seen are 5e-6 of the latents' standard deviation.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from cogvideox.denoising.loop import (
    LoadedDenoiser,
    parameters_for,
    programs_of_steps,
    run_loop,
    to_host,
)
from cogvideox.denoising.noise import NoiseSource
from cogvideox.denoising.program import Denoiser
from cogvideox.denoising.scheduler import Schedule, make_schedule
from cogvideox.denoising.step_mask import StepMask, parse_computed
from cogvideox.model.folder import find_model, stored_tensors
from cogvideox.model.settings import DenoisingSettings, LatentShape
from cogvideox.transformer.backends import CpuBackend
from runtime.mesh import make_mesh
from tests.tiny_models import save_tiny_model

TOKENS, STEPS, SEED = 16, 6, 5
SHAPE = LatentShape(1, 4, 8, 6, 10)
TEXTS = np.random.default_rng(0).normal(size=(2, 1, TOKENS, 32)).astype(np.float32)
MASK = "110100"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_attention_heads=8)


def make_denoiser(
    model: Path, mesh: tuple[int, int, int] = (1, 1, 1), *, guided: bool = True, gate: bool = False
) -> Denoiser:
    found = find_model(str(model), ["transformer"])
    return Denoiser(
        config=found.transformer,
        stored=stored_tensors(found.path / "transformer"),
        latents=SHAPE,
        text_tokens=TOKENS,
        guided=guided,
        dtype="float32",
        mesh=make_mesh(mesh),
        backend=CpuBackend(),
        difference="keep" if gate else "off",
    )


def make_mask(digits: str, branches: int = 2) -> StepMask:
    """A mask whose skipped steps scale the residual, by another factor in each branch."""
    computed = parse_computed(digits)
    scales = tuple(
        (1.0,) * branches if run else (0.9 - 0.05 * i, 1.2 - 0.03 * i)[-branches:]
        for i, run in enumerate(computed)
    )
    return StepMask(computed, scales)


def plan(
    model: Path,
    mask: StepMask | None = None,
    guided_steps: int | None = None,
    *,
    scheduler: str = "dpm",
    guidance_scale: float = 6.0,
    use_dynamic_cfg: bool = True,
) -> Schedule:
    settings = DenoisingSettings(
        48, 80, 9, 16, STEPS, guidance_scale, use_dynamic_cfg, scheduler, SEED
    )
    found = find_model(str(model), ["scheduler"])
    schedule = make_schedule(settings, found.scheduler)
    return dataclasses.replace(schedule, mask=mask, guided_steps=guided_steps)


def load(denoiser: Denoiser, schedule: Schedule, *more: str) -> list[LoadedDenoiser]:
    """Loads the steps of a schedule, and those that do `more` with the residual."""
    embeddings = {"negative_prompt_embeds": TEXTS[0], "prompt_embeds": TEXTS[1]}
    programs = programs_of_steps(schedule)
    parameters = denoiser.load()
    steps = denoiser.compile(None, [*programs, *more])
    loaded = [LoadedDenoiser(denoiser, steps, parameters, denoiser.prompt_embeds(embeddings))]
    if schedule.guided_steps is not None:
        gated = denoiser.gated()
        loaded.append(
            LoadedDenoiser(
                gated,
                gated.compile(None, programs),
                parameters_for(gated, parameters),
                gated.prompt_embeds(embeddings),
            )
        )
    return loaded


def states(
    loaded: list[LoadedDenoiser], schedule: Schedule, **options
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Latents and x0 after each step."""
    found = []
    for state in run_loop(loaded, schedule, SEED, NoiseSource(), **options):
        host = to_host(state)
        found.append((host.latents, host.previous_x0))
    return found


@pytest.fixture(scope="module")
def keeping(model) -> list[LoadedDenoiser]:
    """The exact step, the one that keeps the residual and the one that reuses it."""
    return load(make_denoiser(model), plan(model), "keep", "reuse")


@pytest.mark.parametrize("scheduler", ["dpm", "ddim"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_step_that_keeps_the_residual_equals_the_exact_one(scheduler, dynamic, keeping, model):
    schedule = plan(model, scheduler=scheduler, use_dynamic_cfg=dynamic)
    exact = states(keeping, schedule)
    kept = states(keeping, schedule, uses=["keep"] * STEPS)
    for ours, theirs in zip(kept, exact, strict=True):
        assert [x.tobytes() for x in ours] == [x.tobytes() for x in theirs]


def test_a_mask_of_ones_runs_the_exact_program(keeping, model):
    exact = states(keeping, plan(model))
    ones = plan(model, make_mask("1" * STEPS))
    assert programs_of_steps(ones) == ["off"]
    assert [x.tobytes() for x, _ in states(keeping, ones)] == [x.tobytes() for x, _ in exact]


class Reference:
    """Denoises with diffusers in float32; hooks on the blocks take or replace the residual."""

    def __init__(self, model: Path) -> None:
        self.pipeline = diffusers.CogVideoXPipeline.from_pretrained(model)
        self.transformer = self.pipeline.transformer
        self.scales: torch.Tensor | None = None  # [branches, 1, 1]; None computes the step
        blocks = self.transformer.transformer_blocks
        blocks[0].register_forward_pre_hook(self._embedded, with_kwargs=True)
        blocks[-1].register_forward_hook(self._computed)

    def _embedded(self, _, arguments: tuple, keywords: dict) -> None:
        self.before = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]

    def _computed(self, _, arguments: tuple, output: tuple[torch.Tensor, torch.Tensor]):
        if self.scales is None:
            self.residual = output[0] - self.before
            return output
        branches = len(self.scales)
        return self.before + self.scales * self.residual[-branches:], output[1]

    @torch.no_grad()
    def run(
        self, digits: str, scales: list[tuple[float, ...]], guided_steps: int, dynamic: bool,
        scheduler: str, guidance_scale: float,
    ) -> np.ndarray:  # fmt: skip
        """Returns the latents [B, T, C, H, W] after the last step."""
        kind = {"dpm": diffusers.CogVideoXDPMScheduler, "ddim": diffusers.CogVideoXDDIMScheduler}
        stepper = kind[scheduler].from_config(self.pipeline.scheduler.config)
        stepper.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(SEED)
        latents = torch.randn(SHAPE.sizes, generator=generator)
        rotary = self.pipeline._prepare_rotary_positional_embeddings(48, 80, 4, torch.device("cpu"))
        guided, x0, before = guidance_scale > 1, None, None
        for i, timestep in enumerate(stepper.timesteps):
            branches = 2 if guided and i < guided_steps else 1
            skipped = digits[i] == "0"
            self.scales = torch.tensor(scales[i][-branches:])[:, None, None] if skipped else None
            output = self.transformer(
                hidden_states=torch.cat([latents] * branches),
                encoder_hidden_states=torch.from_numpy(TEXTS[-branches:, 0]),
                timestep=timestep.expand(branches),
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
            scale = guidance_scale
            if dynamic:
                phase = np.pi * ((STEPS - timestep.item()) / STEPS) ** 5.0
                scale = 1 + guidance_scale * (1 - np.cos(phase)) / 2
            if branches == 2:
                negative, output = output.chunk(2)
                difference = output - negative
            if guided:
                output = (output - difference) + scale * difference
            if scheduler == "dpm":
                latents, x0 = stepper.step(
                    output, x0, timestep, before, latents, generator=generator, return_dict=False
                )
            else:
                latents = stepper.step(output, timestep, latents, return_dict=False)[0]
            before = timestep
        return latents.numpy()


@pytest.fixture(scope="module")
def reference(model) -> Reference:
    return Reference(model)


CASES = {
    "dpm, dynamic": (MASK, None, {}),
    "ddim": (MASK, None, {"scheduler": "ddim", "use_dynamic_cfg": False}),
    "unguided": (MASK, None, {"guidance_scale": 1.0, "use_dynamic_cfg": False}),
    "gate": ("1" * STEPS, 3, {}),
    "gate in a gap": (MASK, 2, {}),
    "gate and mask, ddim": ("110101", 3, {"scheduler": "ddim"}),
}


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / theirs.std())


def run_case(model: Path, case: str, mesh: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
    digits, guided_steps, options = CASES[case]
    guided = options.get("guidance_scale", 6.0) > 1
    mask = make_mask(digits, branches=1 + guided)
    schedule = plan(model, mask, guided_steps, **options)
    denoiser = make_denoiser(model, mesh, guided=guided, gate=guided_steps is not None)
    *_, (latents, _) = states(load(denoiser, schedule), schedule)
    return latents


@pytest.fixture(scope="module")
def one_device(model) -> Callable[[str], np.ndarray]:
    found = {}

    def get(case: str) -> np.ndarray:
        if case not in found:
            found[case] = run_case(model, case)
        return found[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_reuse_equals_a_plain_loop_over_diffusers(case, model, reference, one_device):
    digits, guided_steps, options = CASES[case]
    guidance = options.get("guidance_scale", 6.0)
    scales = make_mask(digits, branches=2 if guidance > 1 else 1).scales
    expected = reference.run(
        digits, list(scales), STEPS if guided_steps is None else guided_steps,
        options.get("use_dynamic_cfg", True), options.get("scheduler", "dpm"), guidance,
    )  # fmt: skip
    assert deviation(one_device(case), expected) < 1e-4


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("dpm, dynamic", (2, 4, 1)),
        ("dpm, dynamic", (2, 2, 2)),
        ("dpm, dynamic", (1, 2, 4)),
        ("gate in a gap", (2, 4, 1)),
        ("gate in a gap", (2, 2, 2)),
        ("gate and mask, ddim", (2, 1, 4)),
        ("gate", (1, 8, 1)),
    ],
)
def test_meshes_equal_one_device(case, mesh, model, one_device):
    assert deviation(run_case(model, case, mesh), one_device(case)) < 2e-5


def test_gated_steps_use_every_device_and_copy_no_weights(model):
    denoiser = make_denoiser(model, (2, 2, 2), gate=True)
    gated = denoiser.gated()
    assert dict(gated.mesh.shape) == {"dp": 1, "sp": 4, "tp": 2}
    assert (denoiser.branches, gated.branches) == (2, 1)
    weights = denoiser.load()
    for name, moved in parameters_for(gated, weights).items():
        before = {shard.device: shard.data for shard in weights[name].addressable_shards}
        for shard in moved.addressable_shards:
            pointers = (shard.data, before[shard.device])
            assert len({data.unsafe_buffer_pointer() for data in pointers}) == 1, name


def test_a_gated_mesh_takes_as_many_devices_as_split_the_heads(tmp_path):
    few = save_tiny_model(tmp_path, num_attention_heads=2)
    denoiser = make_denoiser(few, (2, 2, 1), gate=True)
    gated = denoiser.gated()
    assert dict(gated.mesh.shape) == {"dp": 1, "sp": 2, "tp": 1}
    assert deviation(run_case(few, "gate", (2, 2, 1)), run_case(few, "gate")) < 2e-5
