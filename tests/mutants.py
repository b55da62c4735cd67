"""Deliberate mistakes, each with the tests that must catch it.

    python -m tests.mutants                   all of them, slowly
    python -m tests.mutants --only NAME       one of them
    python -m tests.mutants --texts           only check that each old text occurs exactly once

The tree is copied to a temporary folder, one mistake is made there, and its tests run. A mutant is
killed if they fail. Exit code 1 if one survives or its old text is not found exactly once. Whoever
changes a mutated line changes its mutant too.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT = 900


class Mutant(NamedTuple):
    """A mistake: in `file`, `old` becomes `new`; at least one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BACKEND = "tests/cogvideox/transformer/backends/tpu/test_backend.py"
MESHES = "tests/parity/test_meshes.py"
PIPELINE = "tests/parity/test_pipeline.py::test_scripts_equal_diffusers"
ROBUST = "tests/splash_attention/test_splash_robustness.py"
INT8 = "tests/splash_attention/test_splash_int8.py"
SHARDED = "tests/splash_attention/test_splash_sharded.py"
EXECUTABLES = "tests/runtime/test_executables.py"
TPU_STAGE2 = "tests/tpu_path/test_stage2.py"
TPU_STAGE3 = "tests/tpu_path/test_stage3.py"

TPU_FILE = "cogvideox/transformer/backends/tpu/backend.py"
BLOCK = "cogvideox/transformer/block.py"
COLLECTIVES = "cogvideox/transformer/collectives.py"
PROGRAM = "cogvideox/denoising/program.py"
SCHEDULER = "cogvideox/denoising/scheduler.py"

MUTANTS = (
    # The transformer on TPU.
    Mutant("tpu output tokens not parted", TPU_FILE,
           "parts = part_tokens(out, shards, interpret=self.interpret)",
           "parts = out.reshape(out.shape[0], shards, out.shape[1], -1)",
           (BACKEND, TPU_STAGE2)),
    Mutant("bound on values is their minimum", TPU_FILE,
           "largest_value=bounds.values.reshape(*q.shape[:2], head_dim).max(-1)",
           "largest_value=bounds.values.reshape(*q.shape[:2], head_dim).min(-1)",
           (BACKEND,)),
    Mutant("padded keys not masked", TPU_FILE,
           "kv_len=keys,", "kv_len=k.shape[1],", (BACKEND, TPU_STAGE2)),
    # The transformer.
    Mutant("rotary sign", "cogvideox/transformer/norms.py",
           "[even * cos - odd * sin", "[even * cos + odd * sin", (PIPELINE, TPU_STAGE2)),
    Mutant("text gate for video", BLOCK,
           "gate = jnp.where((rows < self.text_tokens)",
           "gate = jnp.where((rows >= self.text_tokens)",
           (PIPELINE,)),
    Mutant("text and video modulation swapped", BLOCK,
           "video_and_text[:, ::-1, i]", "video_and_text[:, :, i]", (PIPELINE,)),
    Mutant("text rows at the wrong place", COLLECTIVES,
           "first = jnp.minimum(rows[0], text.shape[1])", "first = jnp.zeros_like(rows[0])",
           (MESHES,)),
    Mutant("rows of sp and tp exchanged", COLLECTIVES,
           'jax.lax.axis_index("sp") * jax.lax.axis_size("tp") + jax.lax.axis_index("tp")',
           'jax.lax.axis_index("tp") * jax.lax.axis_size("sp") + jax.lax.axis_index("sp")',
           (MESHES,)),
    Mutant("sum over tp dropped", COLLECTIVES,
           'return jax.lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True)',
           'return jnp.split(x, jax.lax.axis_size("tp"), axis=1)[0]', (MESHES,)),
    Mutant("sp order of arriving parts", "cogvideox/transformer/projections.py",
           "starts = [(i - own) % shards * size for i in range(shards)]",
           "starts = [(i + own) % shards * size for i in range(shards)]", (MESHES,)),
    # Denoising.
    Mutant("guidance halves swapped", PROGRAM,
           "negative, positive = jnp.split(output, 2)", "positive, negative = jnp.split(output, 2)",
           (PIPELINE,)),
    Mutant("padding rows not cleared", PROGRAM,
           "(rows >= self.layout.text) & (rows < self.layout.tokens)",
           "(rows >= self.layout.text)", (TPU_STAGE2, "tests/cogvideox/denoising")),
    Mutant("scheduler drops the second order", SCHEDULER,
           "return sample, x0 * (1 + back), -x0 * back, noise",
           "return sample, x0, 0.0, noise", (PIPELINE,)),
    Mutant("one noise draw too few", SCHEDULER,
           "drawn = 2 if second_order else 1", "drawn = 1", (PIPELINE,)),
    Mutant("dynamic guidance off by a step", SCHEDULER,
           "((steps - timestep) / steps) ** 5.0", "((steps - timestep - 1) / steps) ** 5.0",
           (PIPELINE,)),
    Mutant("checkpoint of another run accepted", "cogvideox/denoising/loop_checkpoint.py",
           'if file.metadata.get("fingerprint") != fingerprint:', "if False:",
           ("tests/stages/test_checkpoints.py",)),
    Mutant("padding frames dropped at the end", "stages/denoise.py",
           "return latents[:, padding_frames:].swapaxes(1, 2)",
           "return latents[:, : latents.shape[1] - padding_frames].swapaxes(1, 2)", (PIPELINE,)),
    # Stage files, executables, jobs.
    Mutant("checksum of a section not compared", "stages/sections.py",
           "    if not is_whole(section):", "    if False:",
           ("tests/stages", "tests/scripts/test_bad_input.py")),
    Mutant("stale stage file accepted", "stages/files.py",
           'if file.section[key] != config.get(stage, {}).get("fingerprint"):', "if False:",
           ("tests/stages", "tests/scripts/test_bad_input.py")),
    Mutant("checksum of a stage file not compared", "runtime/tensor_files.py",
           "if digest != self.metadata.get(_DATA_DIGEST):", "if False:",
           ("tests/scripts/test_bad_input.py", "tests/stages/test_checkpoints.py")),
    Mutant("header of a stage file not compared", "runtime/tensor_files.py",
           "if digest != file.metadata.get(_HEADER_DIGEST):", "if False:",
           ("tests/scripts/test_bad_input.py",)),
    Mutant("changed weights accepted", "stages/files.py",
           "if was and model.digest(part) != was:", "if False:",
           ("tests/scripts/test_bad_input.py",)),
    Mutant("checksum of an executable not compared", "runtime/artifacts.py",
           'if hashlib.sha256(data).hexdigest() != manifest["executable"]["sha256"]:', "if False:",
           (EXECUTABLES,)),
    Mutant("fingerprint of an executable not compared", "runtime/artifacts.py",
           'if artifact.manifest["fingerprint"] != program.fingerprint:', "if False:",
           (EXECUTABLES,)),
    Mutant("claim of a living process ignored", "jobs/claims.py",
           "if latest and _is_alive(folder / str(latest), now):", "if False:",
           ("tests/jobs/test_claims.py", "tests/jobs/test_batch.py")),
    # The attention kernel.
    Mutant("kernel masks one key too many", "splash_attention/bodies.py",
           "return _key_index(config, start, shape, axis) < refs.kv_len[0]",
           "return _key_index(config, start, shape, axis) < refs.kv_len[0] - 1", (ROBUST,)),
    Mutant("keys past the end not zeroed in P.V", "splash_attention/bodies.py",
           "    if check:\n        # Padding may hold NaN",
           "    if False:\n        # Padding may hold NaN",
           (ROBUST,)),
    Mutant("unsafe groups kept", "splash_attention/bodies.py",
           "unsafe = jnp.max(jnp.where(safe", "unsafe = jnp.min(jnp.where(safe", (ROBUST,)),
    Mutant("int8 scale of the wrong power", "splash_attention/quantize.py",
           "jnp.exp2(jnp.ceil(jnp.log2(", "jnp.exp2(jnp.floor(jnp.log2(", (INT8,)),
    Mutant("int8 second digit without the first", "splash_attention/quantize.py",
           "second = jnp.round(_SHARE * first + _GAIN / _SHARE * (x - first))",
           "second = jnp.round(_GAIN / _SHARE * (x - first))", (INT8,)),
    Mutant("ring forgets to rescale", "splash_attention/sharded.py",
           "out = out * jnp.exp2(log_total - merged) + part", "out = out + part", (SHARDED,)),
    Mutant("ring counts keys of the wrong shard", "splash_attention/sharded.py",
           "shard = (here - step) % axes.tokens",
           "shard = (here + step) % axes.tokens", (SHARDED,)),
    # The VAE.
    Mutant("even and odd rows swapped", "cogvideox/vae/tpu/upsample.py",
           "_pack_bfloat16(even, odd, interpret)", "_pack_bfloat16(odd, even, interpret)",
           ("tests/cogvideox/vae/test_tpu_upsample.py", TPU_STAGE3)),
    Mutant("values checked on one device only", "cogvideox/vae/program.py",
           "jax.lax.pmin(finite, AXIS)", "finite", ("tests/cogvideox/vae/test_program.py",)),
    Mutant("gallery does not escape", "jobs/gallery.py",
           "autoescape=True,", "autoescape=False,", ("tests/jobs/test_gallery.py",)),
)  # fmt: skip


def texts(mutants: tuple[Mutant, ...], root: Path = ROOT) -> list[str]:
    """Problems with the old texts: each must occur exactly once in its file."""
    problems = []
    for mutant in mutants:
        count = (root / mutant.file).read_text("utf-8").count(mutant.old)
        if count != 1:
            problems.append(f"{mutant.name}: its old text occurs {count} times in {mutant.file}")
        for test in mutant.tests:
            if not (root / test.partition("::")[0]).exists():
                problems.append(f"{mutant.name}: there is no {test}")
    return problems


def survives(mutant: Mutant) -> bool:
    """Whether the mutant's tests pass on a copy of the tree with the mistake in it."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "stage_outputs")
        shutil.copytree(ROOT, root, ignore=ignored)
        path = root / mutant.file
        path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
        # PYTHONPATH: an editable install would otherwise import the tree without the mistake.
        command = [sys.executable, "-m", "pytest", "-x", "-q", *mutant.tests]
        try:
            done = subprocess.run(
                ["env", f"PYTHONPATH={root}", *command],
                cwd=root,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode not in (0, 1):  # no test ran, or pytest itself failed
        raise RuntimeError(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=[m.name for m in MUTANTS])
    parser.add_argument("--texts", action="store_true", help="check the old texts, run no test")
    arguments = parser.parse_args()
    chosen = tuple(m for m in MUTANTS if not arguments.only or m.name in arguments.only)
    problems = texts(chosen)
    if problems or arguments.texts:
        print("\n".join(problems) or f"{len(chosen)} mutants fit the tree")
        return 1 if problems else 0
    alive = 0
    for mutant in chosen:
        start = time.perf_counter()
        survived = survives(mutant)
        alive += survived
        state = "SURVIVED" if survived else "killed"
        print(f"{state:<9}{mutant.name} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - alive} killed, {alive} survived")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
