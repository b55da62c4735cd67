"""Runs with LoRAs against diffusers and peft on the same files, end to end in float32.

The tolerance is that of test_pipeline.py: what is seen is 1e-6 of the latents' standard deviation.
The random LoRAs change the latents by about as much as they vary, so a scale that is 1% wrong
fails.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch

from cogvideox.denoising.loop import LoadedDenoiser, run_loop, to_host
from cogvideox.denoising.noise import NoiseSource
from cogvideox.denoising.program import Denoiser
from cogvideox.denoising.scheduler import make_schedule
from cogvideox.model.folder import find_model, stored_tensors
from cogvideox.model.settings import DenoisingSettings, LatentShape
from cogvideox.transformer.backends import CpuBackend
from runtime.mesh import make_mesh
from stages.lora import LoraChoice, LoraLibrary
from tests.lora_files import ATTENTION, block_modules, every_linear, random_factors, write_lora
from tests.tiny_models import save_tiny_model

STEPS, TOKENS, SEED = 2, 16, 3
TOLERANCE = 1e-5


class Both:
    """One model in this project and in diffusers, its program compiled once."""

    def __init__(self, folder: Path, generation: str, **settings):
        self.folder = save_tiny_model(folder, generation, num_attention_heads=2, **settings)
        model = find_model(str(folder), ["transformer"])
        frames = 4 if generation == "1.5" else 3
        self.library = LoraLibrary(model)
        self.denoiser = Denoiser(
            config=model.transformer,
            stored=stored_tensors(model.path / "transformer"),
            latents=LatentShape(1, frames, 8, 6, 10),
            text_tokens=TOKENS,
            guided=True,
            dtype="float32",
            mesh=make_mesh((1, 1, 1)),
            backend=CpuBackend(),
        )
        self.schedule = make_schedule(
            DenoisingSettings(48, 80, 9, 16, STEPS, 3.0, False, "dpm", SEED), model.scheduler
        )
        self.steps = self.denoiser.compile()
        texts = np.random.default_rng(0).normal(size=(2, 1, TOKENS, 32)).astype(np.float32)
        self.texts = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
        self.base = self.ours()

    def ours(self, *files: tuple[Path, float]) -> np.ndarray:
        """This project's latents [B, T, C, H, W] with LoRAs, each with its weight."""
        loras = self.library.resolve([LoraChoice(str(path), weight) for path, weight in files])
        denoiser = dataclasses.replace(self.denoiser, stored=loras.merged(self.denoiser.stored))
        assert denoiser.program.fingerprint == self.denoiser.program.fingerprint
        embeds = denoiser.prompt_embeds(self.texts)
        loaded = LoadedDenoiser(denoiser, self.steps, denoiser.load(), embeds)
        *_, last = run_loop([loaded], self.schedule, SEED, NoiseSource())
        return to_host(last).latents

    def pipeline(self) -> diffusers.CogVideoXPipeline:
        pipeline = diffusers.CogVideoXPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def theirs(self, pipeline: diffusers.CogVideoXPipeline) -> np.ndarray:
        """diffusers' latents [B, T, C, H, W]."""
        with torch.no_grad():
            return pipeline(
                **{name: torch.from_numpy(text) for name, text in self.texts.items()},
                generator=torch.Generator().manual_seed(SEED),
                output_type="latent",
                num_inference_steps=STEPS,
                guidance_scale=3.0,
                height=48,
                width=80,
                num_frames=9,
            ).frames.numpy()

    def check(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        change = np.abs(theirs - self.base).max() / theirs.std()
        assert change > 0.1, "the LoRA changes nothing"
        assert np.abs(ours - theirs).max() / theirs.std() < TOLERANCE


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Both:
    return Both(tmp_path_factory.mktemp("model"), "1.5")


def test_without_a_lora(both):
    assert np.abs(both.theirs(both.pipeline()) - both.base).max() / both.base.std() < TOLERANCE


def settings_of(rank: int, **changes) -> dict[str, object]:
    """peft's settings as diffusers writes them into the header."""
    config = peft.LoraConfig(r=rank, target_modules=r".*\.attn1\..*", **changes)
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


MIXED = {"to_q": 2, "to_k": 3, "to_v": 4, "to_out.0": 6}


def mixed(module: str) -> int:
    return MIXED[module.partition("attn1.")[2]]


# Name -> format of the file, modules, ranks, settings of the header.
CASES: dict[str, tuple[str, tuple[str, ...], int | Callable[[str], int], dict | None]] = {
    "no alpha": ("diffusers", ATTENTION, 4, None),
    "mixed ranks": ("diffusers", ATTENTION, mixed, None),
    "old": ("old", ATTENTION, 4, None),
    "old processors": ("old processors", ATTENTION, 4, None),
    "alpha": ("diffusers", ATTENTION, 4, {"lora_alpha": 2}),
    "rslora": ("diffusers", ATTENTION, 4, {"lora_alpha": 3, "use_rslora": True}),
    "patterns": (
        "diffusers",
        ATTENTION,
        mixed,
        {
            "lora_alpha": 4,
            "rank_pattern": {"to_q": 2, r"attn1\.to_k": 3, "^transformer_blocks.0.attn1.to_v": 4,
                             "transformer_blocks.1.attn1.to_v": 4},
            "alpha_pattern": {"to_k": 1, "transformer_blocks.1.attn1.to_q": 8},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_format_of_diffusers(case, both, tmp_path):
    format_, names, rank, settings = CASES[case]
    factors = random_factors(both.folder, block_modules(*names), rank)
    if settings is not None:
        settings = settings_of(6 if callable(rank) else rank, **settings)
    path = write_lora(tmp_path / "lora.safetensors", factors, format_, settings)
    pipeline = both.pipeline()
    pipeline.load_lora_weights(path, adapter_name="one")
    both.check(both.theirs(pipeline), both.ours((path, 1.0)))


@pytest.mark.parametrize("weights", [(0.5, 1.0), (-0.75, 0.25)])
def test_two_adapters_with_weights(weights, both, tmp_path):
    first = random_factors(both.folder, block_modules(*ATTENTION), 4, seed=1)
    second = random_factors(both.folder, block_modules("attn1.to_q", "ff.net.2"), 3, seed=2)
    paths = [
        write_lora(tmp_path / "a.safetensors", first),
        write_lora(tmp_path / "b.safetensors", second, settings=settings_of(3, lora_alpha=6)),
    ]
    pipeline = both.pipeline()
    for name, path in zip("ab", paths, strict=True):
        pipeline.load_lora_weights(path, adapter_name=name)
    pipeline.set_adapters(["a", "b"], list(weights))
    both.check(both.theirs(pipeline), both.ours(*zip(paths, weights, strict=True)))


def test_every_linear_layer(both, tmp_path):
    factors = random_factors(both.folder, every_linear(both.folder), 2)
    path = write_lora(tmp_path / "lora.safetensors", factors)
    pipeline = both.pipeline()
    pipeline.load_lora_weights(path, adapter_name="one")
    pipeline.set_adapters("one", 0.5)
    both.check(both.theirs(pipeline), both.ours((path, 0.5)))


def test_every_layer_of_1_0_and_its_convolution(tmp_path):
    both = Both(tmp_path / "model", "1.0-sincos", activation_fn="geglu")
    factors = random_factors(both.folder, every_linear(both.folder), 2)
    assert factors["patch_embed.proj"][0].ndim == 4
    path = write_lora(tmp_path / "lora.safetensors", factors)
    pipeline = both.pipeline()
    pipeline.load_lora_weights(path, adapter_name="one")
    pipeline.set_adapters("one", 0.5)
    both.check(both.theirs(pipeline), both.ours((path, 0.5)))


def trained(transformer: torch.nn.Module, adapter: str) -> None:
    """Gives an adapter values as if it were trained: peft starts with zeros."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in transformer.named_parameters():
        if f".{adapter}." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def test_files_that_diffusers_saves(both, tmp_path):
    """With the pipeline's function, and with the model's, which writes no prefix."""
    pipeline = both.pipeline()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "ff.net.0.proj"], rank_pattern={"to_q": 2}
    )
    pipeline.transformer.add_adapter(config, "default")
    trained(pipeline.transformer, "default")
    theirs = both.theirs(pipeline)
    diffusers.CogVideoXPipeline.save_lora_weights(
        tmp_path / "pipeline",
        transformer_lora_layers=peft.get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    pipeline.transformer.save_lora_adapter(tmp_path / "model", "default")
    for folder in ("pipeline", "model"):
        both.check(theirs, both.ours((tmp_path / folder, 1.0)))


def test_files_that_peft_saves(both, tmp_path):
    pipeline = both.pipeline()
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_k", "proj_out"], use_rslora=True
    )
    wrapped = peft.get_peft_model(pipeline.transformer, config)
    trained(wrapped, "default")
    theirs = both.theirs(pipeline)
    wrapped.save_pretrained(tmp_path / "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["lora_alpha"] == 2
    both.check(theirs, both.ours((tmp_path / "peft", 1.0)))
