"""Stage 2 on the TPU path, interpreted, against diffusers and against the CPU path.

float32: within 1e-4 of the reference's standard deviation, as on every other path; seen are 6e-6.
bfloat16: the two paths round in different places, so neither is the other's reference. Both are
measured against float32, and the TPU path may be at most 1.1 times as far off as the CPU path.
"""

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy's bfloat16, which safetensors looks up by name)
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.parity.test_pipeline import PROMPT, reference, relative_error
from tests.tiny_models import save_tiny_model
from tests.tpu_path.runs import run_on_tpu_path, run_script, start_on_tpu_path

SIZE = {"height": 48, "width": 80, "num_frames": 9}
MESHES = {"one device": (1, 1, 1), "dp=2 sp=2 tp=2": (2, 2, 2)}


class Case:
    """A tiny model, diffusers' latents for it, and the output of stage 1."""

    def __init__(self, folder: Path, generation: str, scheduler: str, **model: Any) -> None:
        self.folder = folder
        path = save_tiny_model(folder / "model", generation, **model)
        settings = {"num_inference_steps": 3, "guidance_scale": 5.0}
        self.expected, _ = reference(
            path,
            scheduler,
            seed=3,
            max_sequence_length=16,
            negative_prompt="blue",
            **settings,
            **SIZE,
        )
        texts = ("--prompt", PROMPT, "--negative_prompt", "blue", "--model_id", path)
        run_script("stage1_text_encoder.py", *texts, "--dtype=float32", "--output_dir", folder)
        self.arguments = [f"--{name}={value}" for name, value in {**settings, **SIZE}.items()]
        self.arguments += [f"--scheduler={scheduler}", "--seed=3", "--allow_unsupported"]
        self.arguments += ["--input_dir", str(folder)]

    def latents(self, dtype: str, mesh: tuple[int, int, int], *more: str, tpu: bool) -> np.ndarray:
        """Returns the latents [C, T, H, W] of stage 2 on a mesh."""
        output = self.folder / f"{'tpu' if tpu else 'cpu'}-{dtype}-{'x'.join(map(str, mesh))}"
        arguments = [*self.arguments, "--dtype", dtype, "--output_dir", output, *more]
        arguments += [f"--{axis}={n}" for axis, n in zip(("dp", "sp", "tp"), mesh, strict=True)]
        if tpu:
            # On 2 to 7 devices the interpreter can deadlock; on one it has no barriers.
            run_on_tpu_path("stage2", "--devices", 1 if mesh == (1, 1, 1) else 8, *arguments)
        else:
            run_script("stage2_transformer.py", *arguments, devices=int(np.prod(mesh)))
        (latents,) = load_file(output / "stage2_latents.safetensors").values()
        return latents[0].astype(np.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(
        tmp_path_factory.mktemp("case"),
        "1.5",
        "dpm",
        num_attention_heads=4,
        attention_head_dim=64,
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_float32_equals_diffusers(case: Case, mesh: str):
    ours = case.latents("float32", MESHES[mesh], tpu=True)
    assert relative_error(ours, case.expected) < 1e-4


@pytest.mark.parametrize("mesh", MESHES)
def test_bfloat16_is_as_good_as_on_the_cpu_path(case: Case, mesh: str):
    def error(latents: np.ndarray) -> float:
        difference = np.square(latents - case.expected).mean()
        return float(np.sqrt(difference) / case.expected.std())

    ours, cpu = (error(case.latents("bfloat16", MESHES[mesh], tpu=tpu)) for tpu in (True, False))
    assert 0 < ours <= 1.1 * cpu


def test_other_positions_and_head_size(tmp_path: Path):
    """Covers heads of 128, the sincos embedding of 1.0, a gated MLP, tokens over three shards."""
    case = Case(
        tmp_path,
        "1.0-sincos",
        "ddim",
        num_attention_heads=3,
        attention_head_dim=128,
        activation_fn="geglu",
        num_layers=1,
    )
    assert relative_error(case.latents("float32", (1, 3, 1), tpu=True), case.expected) < 1e-4


def test_bad_command_line():
    for arguments, said in (
        (("stage4",), "usage: python -m tests.tpu_path"),
        (("stage2", "--devices", "none"), "--devices takes a positive integer, not 'none'"),
        (("stage2", "--no_such_argument"), "--no_such_argument"),
    ):
        done = start_on_tpu_path(*arguments)
        assert done.returncode == 2
        assert said in done.stderr


def test_int8_attention_equals_the_cpu_path(case: Case):
    """A dense layer and a sparse one; from the exact step both are 1.8e-3 away.

    The last bit of a norm moves some numbers to the next step of int8, which makes 3e-4.
    """
    options = ("--attention_precision=int8_qk", "--sparse_attention=fast", "--dense_steps=0")
    options += ("--num_inference_steps=1",)
    cpu, ours = (case.latents("float32", (1, 1, 1), *options, tpu=tpu) for tpu in (False, True))
    assert 0 < relative_error(ours, cpu) < 5e-4


def test_sparse_attention_equals_the_cpu_path(case: Case):
    """Heads of unequal work: sp moves them."""
    rules = case.folder / "rules.json"
    rules.write_text(
        '{"rules": {"alone": ["all", "none"]}, "heads": [["alone", "alone", "dense", "dense"], '
        '["dense", "alone", "dense", "alone"]]}'
    )
    sparse = ("--sparse_attention", str(rules), "--dense_steps=1", "--dense_layers=0")
    sparse += ("--num_inference_steps=2",)
    cpu = case.latents("float32", (1, 1, 1), *sparse, tpu=False)
    assert relative_error(case.latents("float32", (2, 2, 2), *sparse, tpu=True), cpu) < 1e-4
