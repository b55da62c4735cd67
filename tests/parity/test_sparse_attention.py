"""Sparse steps against diffusers with a mask, on meshes, and next to exact and masked steps.

The reference is diffusers' transformer in float32 whose attention gets a mask of tokens: for every
pair of tokens whether the rule of the head keeps the pair of their tile and chunk. Tolerances are
those of the exact loop, 2e-5 of the latents' standard deviation: another summation order.
"""

from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from cogvideox.denoising.block_errors import compile_errors, measuring
from cogvideox.denoising.loop import place_positions, run_loop, to_devices, to_host
from cogvideox.denoising.loop_checkpoint import LoopCheckpoint
from cogvideox.denoising.noise import NoiseSource
from cogvideox.denoising.program import Denoiser
from cogvideox.denoising.scheduler import Schedule, make_schedule
from cogvideox.model.folder import find_model, stored_tensors
from cogvideox.model.settings import DenoisingSettings, LatentShape
from cogvideox.transformer.backends import CpuBackend
from cogvideox.transformer.block_rules import DENSE, Rule, SparseAttention, spatial, temporal
from runtime.mesh import make_mesh
from stages.speed import Lossy
from stages.steps import compile_steps, denoisers_of, load_steps
from tests.tiny_models import save_tiny_model

TOKENS, STEPS, SEED, HEADS, LAYERS = 16, 2, 5, 8, 3
# 2 frames of 24 rows of 40 tokens: 2 tiles and 4 chunks a frame.
SHAPE = LatentShape(1, 4, 8, 48, 80)
TEXTS = np.random.default_rng(0).normal(size=(2, 1, TOKENS, 32)).astype(np.float32)
DENSE_STEPS = 1
# Heads of unequal work, so that meshes with sp move them. The first layer is dense.
OF_HEADS = (0, 0, 0, 1, 1, 1, 2, 2)
RULES = SparseAttention(
    (temporal(0), spatial(0), Rule((6, 0))), (OF_HEADS, OF_HEADS, OF_HEADS[::-1]), dense_layers=1
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"sample_height": SHAPE.height, "sample_width": SHAPE.width}
    return save_tiny_model(folder, num_attention_heads=HEADS, num_layers=LAYERS, **sizes)


def make_denoiser(model: Path, mesh: tuple[int, int, int] = (1, 1, 1)) -> Denoiser:
    found = find_model(str(model), ["transformer"])
    return Denoiser(
        config=found.transformer,
        stored=stored_tensors(found.path / "transformer"),
        latents=SHAPE,
        text_tokens=TOKENS,
        guided=True,
        dtype="float32",
        mesh=make_mesh(mesh),
        backend=CpuBackend(),
    )


def plan(model: Path, lossy: Lossy) -> Schedule:
    settings = DenoisingSettings(384, 640, 9, 16, STEPS, 4.0, False, "dpm", SEED)
    return lossy.apply(make_schedule(settings, find_model(str(model), ["scheduler"]).scheduler))


def run(model: Path, lossy: Lossy, mesh: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
    """The final latents of a run on a mesh."""
    schedule = plan(model, lossy)
    denoisers = denoisers_of(make_denoiser(model, mesh), lossy, STEPS)
    embeddings = {"negative_prompt_embeds": TEXTS[0], "prompt_embeds": TEXTS[1]}
    steps = compile_steps(denoisers, schedule, None)
    loaded = load_steps(denoisers, steps, denoisers[0].load(), embeddings)
    *_, state = run_loop(loaded, schedule, SEED, NoiseSource())
    return to_host(state).latents


def token_masks(sparse: SparseAttention) -> np.ndarray:
    """Which tokens see each other, text first, in every layer and head: bool [L, N, S, S]."""
    frames, height = np.arange(2), np.arange(24)
    frame, row = (x.reshape(-1) for x in np.meshgrid(frames, height, indexing="ij"))
    # Tiles of 12 rows, chunks of 6.
    below = row[None, :] // 6 * 6 - (row[:, None] // 12 * 12 + 11)
    above = row[:, None] // 12 * 12 - (row[None, :] // 6 * 6 + 5)
    gap = np.maximum(0, np.maximum(below, above))
    frame_gap = np.abs(frame[:, None] - frame)
    table, keep = sparse.table(LAYERS, HEADS), []
    for rule in sparse.all_rules:
        reach = np.array([rule.at(0), rule.at(1)])[frame_gap]
        rows = np.kron(gap <= reach, np.ones((40, 40), np.bool_))
        keep.append(np.pad(rows, ((TOKENS, 0), (TOKENS, 0)), constant_values=True))
    return np.stack(keep)[table]


def reference(model: Path, sparse: SparseAttention, dense_steps: int) -> np.ndarray:
    """diffusers' transformer and scheduler in a plain loop, masked from `dense_steps` on."""
    path = str(model)
    transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        path, subfolder="transformer"
    )
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(
        path, transformer=transformer, text_encoder=None, tokenizer=None
    )
    scheduler = pipeline.scheduler
    masks = torch.from_numpy(token_masks(sparse))
    attend, layer = torch.nn.functional.scaled_dot_product_attention, [0]

    def masked(q, k, v, **options):
        own = masks[layer[0] % LAYERS]
        layer[0] += 1
        return attend(q, k, v, **options | {"attn_mask": own})

    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(SEED)
    sample = torch.randn(SHAPE.sizes, generator=generator)
    texts = torch.from_numpy(TEXTS[:, 0])
    rotary = pipeline._prepare_rotary_positional_embeddings(384, 640, SHAPE.frames, "cpu")
    x0 = None
    for i, timestep in enumerate(scheduler.timesteps):
        function = masked if i >= dense_steps else attend
        with (
            torch.no_grad(),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", function),
        ):
            both = torch.cat([sample, sample])
            output = transformer(both, texts, timestep.expand(2), image_rotary_emb=rotary).sample
        negative, positive = output.float().chunk(2)
        previous = scheduler.timesteps[i - 1] if i else None
        sample, x0 = scheduler.step(
            negative + 4.0 * (positive - negative), x0, timestep, previous, sample,
            generator=generator, return_dict=False,
        )  # fmt: skip
    return sample.numpy()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / theirs.std())


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    return reference(model, RULES, DENSE_STEPS)


@pytest.fixture(scope="module")
def exact(model) -> np.ndarray:
    return run(model, Lossy())


def test_sparse_steps_equal_the_masked_reference(model, expected, exact):
    """On a mesh whose sp moves heads; the next test runs one device."""
    assert relative(exact, expected) > 1e-3
    lossy, mesh = Lossy(sparse=RULES, dense_steps=DENSE_STEPS), (2, 2, 2)
    step = denoisers_of(make_denoiser(model, mesh), lossy, STEPS)[-1].sparse_step
    assert step.tables.order is not None
    assert relative(run(model, lossy, mesh), expected) < 2e-5


def test_a_rule_that_keeps_all_equals_dense_attention(model, exact):
    ours = run(model, Lossy(sparse=SparseAttention((DENSE,)), dense_steps=1))
    assert relative(ours, exact) < 2e-5


CANDIDATES = (spatial(0), temporal(0))


def errors_of_rules(model: Path, mesh: tuple[int, int, int]) -> np.ndarray:
    """Errors in the first step, [L, N, R]."""
    measured = measuring(make_denoiser(model, mesh), CANDIDATES)
    measure, noise = compile_errors(measured), np.random.default_rng(1).normal(size=SHAPE.sizes)
    tokens, *_ = to_devices(measured, LoopCheckpoint(0, noise.astype(np.float32), noise))
    embeddings = {"negative_prompt_embeds": TEXTS[0], "prompt_embeds": TEXTS[1]}
    prompts, positions = measured.prompt_embeds(embeddings), place_positions(measured)
    return measure(tokens, measured.load(), positions, prompts, np.int32(900))


def reference_errors(model: Path) -> np.ndarray:
    """The same by diffusers: every call of attention again with the masks of each rule."""
    transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        str(model), subfolder="transformer"
    )
    masks = [torch.from_numpy(token_masks(SparseAttention((rule,)))[0, 0]) for rule in CANDIDATES]
    attend, found = torch.nn.functional.scaled_dot_product_attention, []

    def compare(q, k, v, **options):
        dense = attend(q, k, v, **options)
        others = [attend(q, k, v, **options | {"attn_mask": mask}) - dense for mask in masks]
        of_heads = [x.square().sum((0, 2, 3)).sqrt().numpy() for x in (dense, *others)]
        found.append(np.stack(of_heads[1:], -1) / of_heads[0][:, None])
        return dense

    noise = np.random.default_rng(1).normal(size=SHAPE.sizes).astype(np.float32)
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(
        str(model), transformer=transformer, text_encoder=None, tokenizer=None
    )
    rotary = pipeline._prepare_rotary_positional_embeddings(384, 640, SHAPE.frames, "cpu")
    sample = torch.from_numpy(np.concatenate([noise, noise]))
    with (
        torch.no_grad(),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", compare),
    ):
        texts = torch.from_numpy(TEXTS[:, 0])
        transformer(sample, texts, torch.tensor([900, 900]), image_rotary_emb=rotary)
    return np.stack(found)


def test_errors_of_rules_equal_the_reference(model):
    expected = reference_errors(model)
    assert expected.min() > 1e-4
    assert errors_of_rules(model, (2, 2, 2)) == pytest.approx(expected, rel=1e-3)
