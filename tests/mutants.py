"""Deliberate mistakes, each with the tests that must catch it.

    python -m tests.mutants                   all of them, slowly
    python -m tests.mutants --only NAME       one of them
    python -m tests.mutants --texts           only check that each old text occurs exactly once

The tree is copied to a temporary folder, one mistake is made there, and its tests run. A mutant is
killed if they fail. First all these tests must pass without any mistake. Tests that do not end in
15 minutes count as failed only if they pass without the mistake in half that time. Exit code 1 if
a mutant survives or its old text does not occur exactly once. Whoever changes a mutated line
changes its mutant too.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT = 900  # seconds, of one mutant


class Mutant(NamedTuple):
    """A mistake: in `file`, `old` becomes `new`; at least one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BACKENDS = "tests/cogvideox/transformer/backends"
BACKEND = f"{BACKENDS}/tpu/test_backend.py"
HOPPER = "tests/splash_attention/test_hopper_lowering.py"
CHOICE = f"{BACKENDS}/test_choice.py"
MESHES = "tests/parity/test_meshes.py::test_mesh_equals_one_device"
MASKS = "tests/parity/test_step_masks.py"
PIPELINE = "tests/parity/test_pipeline.py::test_scripts_equal_diffusers[1.5 dpm]"
TRAPS = "tests/parity/test_traps.py"
ROBUST = "tests/splash_attention/test_splash_robustness.py"
LISTS = "tests/splash_attention/test_splash_block_lists.py"
INT8 = "tests/splash_attention/test_splash_int8.py"
SHARDED = "tests/splash_attention/test_splash_sharded.py"
EXECUTABLES = "tests/runtime/test_executables.py"
FILES = "tests/runtime/test_files.py"
TENSOR_FILES = "tests/runtime/test_tensor_files.py"
JSON = "tests/runtime/test_json_files.py"
BAD_FILES = "tests/scripts/test_bad_input.py::TestStageFiles"
CHECKPOINTS = "tests/stages/test_checkpoints.py"
TEST_MASKS = "tests/cogvideox/denoising/test_step_mask.py"
TEST_CALIBRATION = "tests/cogvideox/denoising/test_calibration.py"
CALIBRATE = "tests/stages/test_calibrate.py"
ACCESS_TESTS = "tests/web/test_access.py"
PREVIEWS = "tests/stages/test_preview.py"
VAE = "tests/parity/test_vae_parity.py"
VAE_DECODE = f"{VAE}::test_decode_equals_diffusers"
VAE_SHARDS = "tests/cogvideox/vae/test_decode.py::test_every_width_over_devices_equals_one_device"
FROM_PYTHON = "tests/stages/test_pipeline_from_python.py"
TRAPS_OF_CONDITIONS = "tests/parity/test_condition_traps.py"
VAE_ENCODE = "tests/parity/test_vae_encoder.py::test_encode_equals_diffusers"
VAE_PROGRAM = "tests/cogvideox/vae/test_decode_program.py"
VAE_TPU = "tests/cogvideox/vae/test_tpu_layers.py"
UPSAMPLE = "tests/cogvideox/vae/test_tpu_upsample.py"

TPU_FILE = "cogvideox/transformer/backends/tpu/backend.py"
BLOCK = "cogvideox/transformer/block.py"
COLLECTIVES = "cogvideox/transformer/collectives.py"
PARAMETERS = "cogvideox/transformer/parameters.py"
PROGRAM = "cogvideox/denoising/program.py"
LOOP = "cogvideox/denoising/loop.py"
SCHEDULER = "cogvideox/denoising/scheduler.py"
STEP_MASK = "cogvideox/denoising/step_mask.py"
CALIBRATION = "cogvideox/denoising/calibration.py"
SEGMENT_ERRORS = "cogvideox/denoising/segment_errors.py"
VAE_FILE = "cogvideox/vae/program.py"
VAE_NORM = "cogvideox/vae/norm.py"
SHARDS = "cogvideox/vae/sharding.py"
JSON_FILE = "runtime/json_files.py"

MUTANTS = (
    # The transformer's backends.
    Mutant("tpu output tokens not parted", TPU_FILE,
           "parts = part_tokens(out, shards, interpret=self.interpret)",
           "parts = out.reshape(out.shape[0], shards, out.shape[1], -1)",
           (f"{BACKEND}::test_output_tokens_go_to_their_shards",)),
    Mutant("bound on values is their minimum", TPU_FILE,
           '"largest_value": bounds.values.reshape(*heads, head_dim).max(-1)',
           '"largest_value": bounds.values.reshape(*heads, head_dim).min(-1)',
           (f"{BACKEND}::test_the_largest_channel_bounds_a_heads_values",)),
    Mutant("padded keys not masked", TPU_FILE,
           'options["kv_len"] = keys', 'options["kv_len"] = k.shape[1]',
           (f"{BACKEND}::test_attention_equals_the_reference",)),
    Mutant("cudnn chosen in float32", "cogvideox/transformer/backends/__init__.py",
           'elif on_gpu and dtype == "bfloat16":', "elif on_gpu:", (CHOICE,)),
    Mutant("splash chosen on other GPUs", "cogvideox/transformer/backends/__init__.py",
           'attention = "splash" if on_hopper else "cudnn"', 'attention = "splash"', (CHOICE,)),
    Mutant("keys of the last tile seen twice", "splash_attention/hopper/tiles.py",
           "jnp.where(i == 0, self.tiles - 1, i - 1)", "jnp.where(i == 0, self.tiles - 1, i)",
           (f"{HOPPER}::test_every_key_is_in_one_tile",)),
    Mutant("padding of a listed chunk not masked on Hopper", "splash_attention/hopper/kernel.py",
           "jnp.where(column < valid, scores, -jnp.inf)", "scores",
           (f"{HOPPER}::test_lists_in_interpret_mode",)),
    Mutant("another head's rule on Hopper", "splash_attention/hopper/kernel.py",
           "ListedKeys(tables, tables.rule[head], tile)",
           "ListedKeys(tables, tables.rule[head[0], 0], tile)",
           (f"{HOPPER}::test_lists_in_interpret_mode",)),
    Mutant("tiles of padding visited on Hopper", "splash_attention/hopper/tiles.py",
           "jnp.argsort(valid == 0, axis=2, stable=True)",
           "jnp.argsort(valid == -1, axis=2, stable=True)",
           (f"{HOPPER}::test_a_list_visits_the_keys_of_its_chunks",)),
    Mutant("executables loaded without the runtime of Mosaic GPU",
           "cogvideox/transformer/backends/gpu.py", "        load_runtime()", "        pass",
           (f"{HOPPER}::test_a_backend_loads_the_runtime_that_its_executables_need",)),
    Mutant("lists of queries out of order on GPUs", "cogvideox/transformer/backends/gpu.py",
           "q = in_order(q)", "q = q + 0", (f"{BACKENDS}/test_gpu.py",)),
    Mutant("float16 weights bounded as bfloat16", "splash_attention/hopper/attention.py",
           "if q.dtype == jnp.float16:", "if q.dtype == jnp.float32:",
           (f"{HOPPER}::test_the_path_of_each_head",)),
    Mutant("padding of values not cleared", "splash_attention/hopper/attention.py",
           "v = v.at[:, kv_len : AllKeys(kv_len, config.block_kv).end].set(0)", "",
           (f"{HOPPER}::test_padding_of_values_is_cleared",)),
    Mutant("keys added without the denominator so far",
           "cogvideox/transformer/backends/gpu.py",
           "total = so_far + weights.sum(-1, keepdims=True)",
           "total = weights.sum(-1, keepdims=True)", (f"{BACKENDS}/test_gpu.py",)),
    # The transformer.
    Mutant("rotary sign", "cogvideox/transformer/norms.py",
           "[even * cos - odd * sin", "[even * cos + odd * sin",
           ("tests/cogvideox/transformer/test_norms.py",)),
    Mutant("q and k rows not reordered", PARAMETERS,
           'bias=config.attention_bias, row_order="rotary",', "bias=config.attention_bias,",
           ("tests/cogvideox/transformer/test_parameters.py::test_rows_that_are_reordered",)),
    Mutant("row-parallel layer split by columns", PARAMETERS,
           'linear(f"{BLOCKS}attn1.to_out.0", width, width, "row")',
           'linear(f"{BLOCKS}attn1.to_out.0", width, width, "column")',
           ("tests/cogvideox/transformer/test_parameters.py::test_published_models_are_split",)),
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
           "starts = [(i + own) % shards * size for i in range(shards)]",
           ("tests/cogvideox/transformer/test_projections.py",)),
    # Denoising.
    Mutant("guidance halves swapped", PROGRAM,
           "negative, positive = jnp.split(output, 2)", "positive, negative = jnp.split(output, 2)",
           (PIPELINE,)),
    Mutant("padding rows not cleared", "cogvideox/transformer/tokens.py",
           "(rows >= self.text) & (rows < self.tokens)",
           "(rows >= self.text)", ("tests/cogvideox/denoising/test_program.py",)),
    Mutant("heads moved without their output rows", "cogvideox/transformer/block.py",
           "[(name, 0) for name in _HEADS_FIRST] + [(_HEADS_LAST, 1)]",
           "[(name, 0) for name in _HEADS_FIRST]",
           ("tests/parity/test_sparse_attention.py",)),
    Mutant("first sparse layer not dense", "cogvideox/transformer/block_rules.py",
           "table[: self.dense_layers] = len(self.rules)",
           "table[: self.dense_layers - 1] = len(self.rules)",
           ("tests/cogvideox/transformer/test_block_rules.py",)),
    Mutant("sparse from the first step", "cogvideox/denoising/parts.py",
           "Part(start, stop, start >= dense, start >= guided)",
           "Part(start, stop, dense < steps, start >= guided)",
           ("tests/parity/test_sparse_attention.py",)),
    Mutant("padding counts as error of a rule", "cogvideox/denoising/block_errors.py",
           "is_token[layout.video] = True", "is_token[:] = True",
           ("tests/parity/test_sparse_attention.py",)),
    Mutant("a resumed calibration of rules repeats seeds", "stages/calibrate_blocks.py",
           "enumerate(texts[done:], done)", "enumerate(texts[done:])",
           ("tests/stages/test_calibrate_blocks.py",)),
    Mutant("plan counts dense attention in sparse steps", "stages/estimates.py",
           "cycles = int((cycles - dense) * rows) + sparse",
           "cycles = int((cycles - dense) * rows) + dense",
           ("tests/stages/test_plan_of_speeds.py",)),
    Mutant("sparse tile forgets rows above", "cogvideox/transformer/sparse_step.py",
           "(i, max(0, chunk.start - stop + 1, start - chunk.stop + 1))",
           "(i, max(0, chunk.start - stop + 1))",
           ("tests/cogvideox/transformer/test_block_rules.py",)),
    Mutant("radial window one row short", "cogvideox/transformer/block_rules.py",
           "rows = (window - 1) // line + 1", "rows = (window - 1) // line",
           ("tests/cogvideox/transformer/test_block_rules.py",)),
    Mutant("scheduler drops the second order", SCHEDULER,
           "return sample, x0 * (1 + back), -x0 * back, noise",
           "return sample, x0, 0.0, noise", (f"{TRAPS}::test_steps_and_noise_equal_diffusers",)),
    Mutant("one noise draw too few", SCHEDULER,
           "drawn = 2 if second_order else 1", "drawn = 1",
           (f"{TRAPS}::test_dpm_draws_noise_twice_in_middle_steps",)),
    Mutant("dynamic guidance off by a step", SCHEDULER,
           "((steps - timestep) / steps) ** 5.0", "((steps - timestep - 1) / steps) ** 5.0",
           (f"{TRAPS}::test_dynamic_guidance_is_float64",)),
    Mutant("resumed loop draws the first noise again", LOOP,
           "remaining = enumerate(itertools.islice(noises, done.steps, None), done.steps)",
           "remaining = enumerate(noises, done.steps)",
           (f"{CHECKPOINTS}::test_killed_after_any_step",)),
    Mutant("resumed loop forgets x0", LOOP,
           "rows(state.previous_x0), Reusable", "rows(0 * state.previous_x0), Reusable",
           (f"{CHECKPOINTS}::test_killed_after_any_step",)),
    Mutant("residual scales of the branches exchanged", PROGRAM,
           "jnp.stack(scales)[branches, None", "jnp.stack(scales)[-1 - branches, None",
           (f"{MASKS}::test_reuse_equals_a_plain_loop_over_diffusers",)),
    Mutant("gated step adds the whole guidance", PROGRAM,
           "output + (guidance_scale[0] - 1) * reused.difference",
           "output + guidance_scale[0] * reused.difference",
           (f"{MASKS}::test_reuse_equals_a_plain_loop_over_diffusers",)),
    Mutant("gated step reuses the negative residual", LOOP,
           "residual[-denoiser.samples :]", "residual[: denoiser.samples]",
           (f"{MASKS}::test_reuse_equals_a_plain_loop_over_diffusers",)),
    Mutant("errors of MagCache's rule do not add up", STEP_MASK,
           "errors = [e + abs(1 - p) for", "errors = [abs(1 - p) for", (TEST_MASKS,)),
    Mutant("minimax compares the smallest weights first", STEP_MASK,
           "tuple(sorted((*found[0], weight), reverse=True))",
           "tuple(sorted((*found[0], weight)))", (TEST_MASKS,)),
    Mutant("skipped step scaled by its own ratio alone", STEP_MASK,
           "tuple(s * r for s, r in", "tuple(r for s, r in", (TEST_MASKS,)),
    Mutant("edge to the end takes a gain", CALIBRATION,
           "error if j == steps else", "error if j > steps else", (TEST_CALIBRATION,)),
    Mutant("calibration of another model accepted", CALIBRATION,
           "if mine.model != target.model:", "if False:", (TEST_CALIBRATION,)),
    Mutant("segment scaled by the ratios of the step before", SEGMENT_ERRORS,
           "np.prod(ratios[i + 1 : k + 1], axis=0)", "np.prod(ratios[i:k], axis=0)",
           (f"{CALIBRATE}::test_errors_are_those_of_masks_that_skip_one_segment",)),
    Mutant("padding frames count in a calibration", SEGMENT_ERRORS,
           "self._host(tokens)[:, self._padding :]", "self._host(tokens)[:, 0:]",
           (f"{CALIBRATE}::test_errors_are_those_of_masks_that_skip_one_segment",)),
    Mutant("checkpoint of another run accepted", "cogvideox/denoising/loop_checkpoint.py",
           'if file.metadata.get("fingerprint") != fingerprint:', "if False:", (CHECKPOINTS,)),
    Mutant("padding frames dropped at the end", "stages/denoise.py",
           "return latents[:, padding_frames:].swapaxes(1, 2)",
           "return latents[:, : latents.shape[1] - padding_frames].swapaxes(1, 2)", (PIPELINE,)),
    # Stage files, executables, jobs.
    Mutant("checksum of a section not compared", "stages/sections.py",
           "    if not is_whole(section):", "    if False:",
           (f"{BAD_FILES}::test_a_config_edited_by_hand",)),
    Mutant("stale stage file accepted", "stages/files.py",
           'if file.section[key] != config.get(stage, {}).get("fingerprint"):', "if False:",
           ("tests/scripts/test_bad_input.py::test_latents_whose_prompt_was_encoded_anew",)),
    Mutant("checksum of a stage file not compared", "runtime/tensor_files.py",
           "if digest != self.metadata.get(_DATA_DIGEST):", "if False:",
           (TENSOR_FILES,)),
    Mutant("header of a stage file not compared", "runtime/tensor_files.py",
           "if digest != file.metadata.get(_HEADER_DIGEST):", "if False:",
           (TENSOR_FILES,)),
    Mutant("changed weights accepted", "stages/files.py",
           "if was and model.digest(part) != was:", "if False:",
           (f"{BAD_FILES}::test_of_another_model",)),
    Mutant("checksum of an executable not compared", "runtime/artifacts.py",
           'if hashlib.sha256(data).hexdigest() != manifest["executable"]["sha256"]:', "if False:",
           (EXECUTABLES,)),
    Mutant("fingerprint of an executable not compared", "runtime/artifacts.py",
           'if artifact.manifest["fingerprint"] != program.fingerprint:', "if False:",
           (f"{EXECUTABLES}::test_the_artifact_of_another_program_under_this_ones_name_is_refused",)),
    Mutant("claim of a living process ignored", "jobs/claims.py",
           "if latest and self._is_taken(folder / str(latest), now):", "if False:",
           ("tests/jobs/test_claims.py::test_one_owner_until_released",)),
    Mutant("gallery does not escape", "jobs/gallery.py",
           "autoescape=True,", "autoescape=False,",
           ("tests/jobs/test_gallery.py::test_text_stays_text",)),
    Mutant("file written in place", "runtime/files.py",
           "yield temporary\n            if durable:\n                flush(temporary)\n"
           "            os.replace(temporary, path)",
           "yield path\n            flush(path)",
           (f"{FILES}::test_a_failed_write_keeps_the_old_file",)),
    Mutant("temporary files of the dead kept", "runtime/files.py",
           'if match and not Path("/proc", match[1]).exists():', "if False:", (FILES,)),
    Mutant("repeated keys of JSON accepted", JSON_FILE,
           "if len(value) < len(pairs):", "if False:", (JSON,)),
    Mutant("weights of integers accepted", "cogvideox/model/folder.py",
           "if stored[name].dtype not in FLOAT_DTYPES", "if False",
           ("tests/scripts/test_bad_input.py::test_integers_are_no_weights",)),
    Mutant("removed output folder not noticed", "runtime/open_folder.py",
           "if now is None or not os.path.samestat(opened, now):", "if False:",
           ("tests/runtime/test_open_folder.py",)),
    Mutant("memory of JSON not bounded", JSON_FILE,
           "MAX_BYTES = 16 << 20", "MAX_BYTES = 64 << 20", (JSON,)),
    Mutant("depth of JSON not limited", JSON_FILE,
           "        if depth > limit:", "        if False:", (JSON,)),
    Mutant("length of JSON not limited", JSON_FILE,
           "    if len(text) > max_bytes:", "    if False:", (JSON,)),
    Mutant("NaN of JSON accepted", JSON_FILE,
           "parse_constant=_refuse, ", "", (JSON,)),
    # The server and previews.
    Mutant("key not asked for", "web/access.py",
           'if scope["path"] not in _OPEN and not self._keys.admit(headers):', "if False:",
           (f"{ACCESS_TESTS}::test_the_key_is_asked_for",)),
    Mutant("pages of other sites may send", "web/access.py",
           'if origin is not None and origin not in (f"http://{host}", f"https://{host}"):',
           "if False:", (f"{ACCESS_TESTS}::test_pages_of_other_sites_change_nothing",)),
    Mutant("queue without a limit", "web/store.py",
           "if waiting >= self.max_queue:", "if False:",
           (f"{ACCESS_TESTS}::test_a_full_queue_is_said",)),
    Mutant("padding frames in previews", "stages/preview.py",
           "x0_to_host(state)[:, self._padding :]", "x0_to_host(state)[:, 0:]",
           (f"{PREVIEWS}::test_previews_show_x0_and_change_no_latent",)),
    Mutant("first latent taken for four frames", "cogvideox/video/preview.py",
           "single = latent_frames % 2", "single = 0",
           (f"{PREVIEWS}::test_frames_are_averaged_over_what_a_latent_stands_for",)),
    # The attention kernel.
    Mutant("padding of a listed chunk weighed", "splash_attention/bodies.py",
           "end = jnp.where(key < valid, scores[first:], NO_SCORE)", "end = scores[first:]",
           (f"{LISTS}::test_random_lists",)),
    Mutant("end of a list weighed", "splash_attention/bodies.py",
           "jnp.where(chunk.valid > 0, sums, 0.0)", "sums", (f"{LISTS}::test_random_lists",)),
    Mutant("rule of the first head for all", "splash_attention/refs.py",
           "index = self.chunks[self.rule[pl.program_id(0)], pl.program_id(1), entry]",
           "index = self.chunks[self.rule[0], pl.program_id(1), entry]",
           (f"{LISTS}::test_random_lists",)),
    Mutant("kernel masks one key too many", "splash_attention/bodies.py",
           "return _key_index(config, chunk.start, shape, axis) < refs.kv_len[0]",
           "return _key_index(config, chunk.start, shape, axis) < refs.kv_len[0] - 1", (ROBUST,)),
    Mutant("keys past the end not zeroed in P.V", "splash_attention/bodies.py",
           "    if check:\n        # Padding may hold NaN",
           "    if False:\n        # Padding may hold NaN",
           (f"{ROBUST}::test_padding_is_inert",)),
    Mutant("unsafe groups kept", "splash_attention/bodies.py",
           "unsafe = jnp.max(jnp.where(safe", "unsafe = jnp.min(jnp.where(safe",
           (f"{ROBUST}::test_adversarial",)),
    Mutant("int8 scale of the wrong power", "splash_attention/quantize.py",
           "jnp.exp2(jnp.ceil(jnp.log2(", "jnp.exp2(jnp.floor(jnp.log2(", (INT8,)),
    Mutant("int8 second digit without the first", "splash_attention/quantize.py",
           "second = jnp.round(_SHARE * first + _GAIN / _SHARE * (x - first))",
           "second = jnp.round(_GAIN / _SHARE * (x - first))", (INT8,)),
    Mutant("int8 steps of k without its mean", "cogvideox/transformer/backends/tpu/int8_heads.py",
           "jnp.maximum(high.max((1, 3)) - mean, mean - low.min((1, 3)))",
           "jnp.maximum(high.max((1, 3)), -low.min((1, 3)))", (BACKEND,)),
    Mutant("int8 statistics see padding", "cogvideox/transformer/backends/tpu/int8_heads.py",
           "valid = (mask_ref[:, at] > 0) & (index < last)", "valid = index < last", (BACKEND,)),
    Mutant("precision not recorded", "stages/speed.py",
           "return found | self.precision.options or EXACT", "return found or EXACT",
           ("tests/stages/test_speed.py",)),
    Mutant("ring forgets to rescale", "splash_attention/sharded.py",
           "out = out * jnp.exp2(log_total - merged) + part", "out = out + part",
           (f"{SHARDED}::test_ring_of_the_kernel",)),
    Mutant("ring counts keys of the wrong shard", "splash_attention/sharded.py",
           "shard = (here - step) % axes.tokens",
           "shard = (here + step) % axes.tokens", (f"{SHARDED}::test_ring_of_the_kernel",)),
    # The VAE.
    Mutant("even and odd rows swapped", "cogvideox/vae/tpu/upsample.py",
           "_pack_bfloat16(even, odd, interpret)", "_pack_bfloat16(odd, even, interpret)",
           (UPSAMPLE,)),
    Mutant("words of two rows read in the other order", "cogvideox/vae/tpu/upsample.py",
           "jnp.stack([words & 0xFFFF, words >> 16], axis=1)",
           "jnp.stack([words >> 16, words & 0xFFFF], axis=1)", (UPSAMPLE,)),
    Mutant("doubled frames out of order", "cogvideox/vae/tpu/upsample.py",
           "last = 2 * t + 1 - stored % 2", "last = jnp.minimum(2 * t + 1, frames - 1)",
           (VAE_TPU,)),
    Mutant("cached frames swapped on tpu", "cogvideox/vae/tpu/causal_conv.py",
           "refs.new_cache[0, t, 0] = refs.ring[newest, frames + t]",
           "refs.new_cache[0, 1 - t, 0] = refs.ring[newest, frames + t]", (VAE_TPU,)),
    Mutant("cached frames swapped", "cogvideox/vae/xla/layers.py",
           "before_last, last = (x.squeeze(1) for x in cache)",
           "last, before_last = (x.squeeze(1) for x in cache)",
           (f"{VAE_DECODE}[vae_flax-four_levels-4]",)),
    Mutant("values checked on one device only", VAE_FILE,
           "jax.lax.pmin(finite, AXIS)", "finite",
           (f"{VAE_PROGRAM}::test_a_value_that_is_not_finite_on_one_device_only_is_an_error",)),
    Mutant("scaling factor twice", VAE_FILE,
           "(1 / self.config.scaling_factor) * latents",
           "(1 / self.config.scaling_factor**2) * latents",
           (f"{VAE_DECODE}[vae_flax-four_levels-1]",)),
    Mutant("uint8 cut off, not rounded", VAE_FILE,
           "jnp.round(video * 255)", "jnp.floor(video * 255)",
           (f"{VAE}::test_uint8_frames_are_those_of_diffusers",)),
    Mutant("norms over all frames", VAE_FILE,
           "first = min(LATENT_FRAMES_PER_BATCH + odd, latent_frames)", "first = latent_frames",
           (f"{VAE_DECODE}[vae_flax-four_levels-4]",)),
    Mutant("norms of one device's columns", VAE_NORM,
           "sums = lax.psum(sums, shards.axis).reshape(",
           "sums = (shards.count * sums).reshape(", (VAE_SHARDS,)),
    Mutant("norms count padding", VAE_NORM,
           "real_width = shards.width *", "real_width = shards.padded_width *", (VAE_SHARDS,)),
    Mutant("latents of a later frame", VAE_NORM,
           "return repeat, repeat - 1", "return repeat, 0",
           (f"{VAE_DECODE}[vae_flax-four_levels-3]",)),
    Mutant("neighbours exchanged", SHARDS,
           "lax.ppermute(edges[:, :, 1:], self.axis, to_right),\n"
           "            lax.ppermute(edges[:, :, :1], self.axis, to_left),",
           "lax.ppermute(edges[:, :, :1], self.axis, to_left),\n"
           "            lax.ppermute(edges[:, :, 1:], self.axis, to_right),", (VAE_SHARDS,)),
    Mutant("padded border columns sent", SHARDS,
           "edges = jnp.where(own, edges, 0)", "edges = edges + 0 * own", (VAE_SHARDS,)),
    Mutant("remaining frames encoded last", "cogvideox/vae/encode_program.py",
           "first = frames % FRAMES_PER_BATCH + FRAMES_PER_BATCH if frames > FRAMES_PER_BATCH "
           "else frames",
           "first = min(frames, FRAMES_PER_BATCH)", (f"{VAE_ENCODE}[flax-moments_conv-17-26-8]",)),
    Mutant("first frame averaged with the second", "cogvideox/vae/xla/resample.py",
           "odd = frames % 2", "odd = 0", (f"{VAE_ENCODE}[flax-moments_conv-17-26-8]",)),
    Mutant("encoder with the decoder's epsilon", "cogvideox/vae/norm.py",
           "variance + norm.eps", "variance + 1e-6",
           (f"{VAE_ENCODE}[torchax-moments_conv-1-14-1]",)),
    # Images and videos that a run starts from.
    Mutant("start from Python left out", "stages/pipeline.py",
           "run = dataclasses.replace(run, conditioning=conditioning)",
           "run = dataclasses.replace(run)", (f"{FROM_PYTHON}::test_starts_from_a_video",)),
    Mutant("fit from Python left out", "stages/pipeline.py",
           "image_fit=image_fit,", 'image_fit="stretch",',
           (f"{FROM_PYTHON}::test_starts_from_an_image_as_the_stages_do",)),
    Mutant("image in the wrong latent frame", "cogvideox/denoising/conditioning.py",
           "image[:, :1] = encoded", "image[:, -1:] = encoded",
           (f"{TRAPS_OF_CONDITIONS}::test_the_image_is_the_first_latent_frame_of_every_video",)),
    Mutant("noise drawn before the posterior's sample", "cogvideox/denoising/noise_process.py",
           "for size in itertools.chain(before, itertools.repeat(shape)):",
           "for size in itertools.chain([shape], before, itertools.repeat(shape)):",
           (f"{TRAPS_OF_CONDITIONS}::test_the_image_is_the_first_latent_frame_of_every_video",)),
    Mutant("strength rounded", "cogvideox/model/settings.py",
           "return min(int(self.num_inference_steps * self.strength)",
           "return min(round(self.num_inference_steps * self.strength)",
           (f"{TRAPS_OF_CONDITIONS}::test_strength_cuts_the_product_off",)),
    Mutant("executables of the encoder not read", "stages/condition.py",
           "executables = None if options.on_cpu else options.executables", "executables = None",
           ("tests/scripts/test_compile_ahead.py::"
            "test_the_encoder_that_is_compiled_ahead_is_that_of_stage_1",)),
    Mutant("all steps shown", "cogvideox/model/settings.py",
           'f"{self.executed_steps} of {steps}"', 'f"{steps} of {steps}"',
           ("tests/jobs/test_status.py::test_a_strength_shows_the_steps_that_run",)),
    Mutant("latents of a video divided by the factor", "cogvideox/denoising/conditioning.py",
           'inverted = kind == "image" and vae.invert_scale_latents',
           "inverted = vae.invert_scale_latents",
           (f"{TRAPS_OF_CONDITIONS}::test_noise_is_added_in_the_dtype_of_the_run",)),
    Mutant("guidance counts all steps", "cogvideox/denoising/scheduler.py",
           "steps = settings.executed_steps  # unlike", "steps = settings.num_inference_steps  #",
           (f"{TRAPS_OF_CONDITIONS}::test_the_first_step_that_runs_draws_once_and_guidance_counts_"
            "the_steps_that_run",)),
    Mutant("column right of the frames not fetched", "cogvideox/vae/xla/resample.py",
           "beside = None if right is None else read(right)",
           "beside = None if right is None else 0 * read(right)",
           (f"{VAE_ENCODE}[flax-moments_conv-17-26-8]",)),
    Mutant("LoRA scale without alpha", "cogvideox/lora/scales.py",
           "return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilised else rank)",
           "return 1.0", ("tests/cogvideox/lora/test_reading.py",)),
    Mutant("LoRA added in the order of the file's rows", "cogvideox/lora/merging.py",
           "up = read_rows(update.up.mapped(), (index[0],)).astype(np.float32)",
           "up = update.up.mapped()[index[0]].astype(np.float32)",
           ("tests/cogvideox/lora/test_merging.py",)),
    Mutant("LoRA of the last file only", "cogvideox/lora/merging.py",
           "updates.setdefault(name, []).append((update, weight))",
           "updates[name] = [(update, weight)]", ("tests/cogvideox/lora/test_merging.py",)),
    Mutant("old LoRA left in the weights", "stages/lora.py",
           "return frozenset() if mine == theirs else self.parameters | other.parameters",
           "return frozenset() if mine == theirs else self.parameters",
           ("tests/jobs/test_lora_jobs.py",)),
    Mutant("values of a LoRA not checked", "cogvideox/lora/reading.py",
           "if bool(((block & exponent) == exponent).any()):", "if False:",
           ("tests/cogvideox/lora/test_reading.py",)),
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


def copy_of_tree(folder: Path) -> Path:
    root = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "stage_outputs", "shared")
    shutil.copytree(ROOT, root, ignore=ignored)
    return root


def fails(root: Path, tests: Sequence[str], timeout: float | None) -> str | None:
    """The first failure of tests on a tree, or None if they pass.

    Raises:
        subprocess.TimeoutExpired: they do not end in time; all processes they started are killed.
        RuntimeError: no test ran, or pytest itself failed.
    """
    # PYTHONPATH: an editable install would otherwise import the tree without the mistake.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", *tests]
    running = subprocess.Popen(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = running.communicate(timeout=timeout)
    except BaseException:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        raise
    if running.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*)", output, re.MULTILINE)
    if running.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest ended with {running.returncode}\n{output}")
    return failed[1]


def killed_by(mutant: Mutant) -> str | None:
    """What caught the mutant, or None if its tests pass.

    Raises:
        RuntimeError: the tests do not end in `TIMEOUT`, and without the mistake neither, or they
            fail without it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = copy_of_tree(Path(temporary))
        path = root / mutant.file
        right = path.read_text("utf-8")
        path.write_text(right.replace(mutant.old, mutant.new), "utf-8")
        try:
            return fails(root, mutant.tests, TIMEOUT)
        except subprocess.TimeoutExpired:
            path.write_text(right, "utf-8")
            start = time.perf_counter()
            try:
                failure = fails(root, mutant.tests, TIMEOUT / 2)
            except subprocess.TimeoutExpired:
                failure = f"no end in {TIMEOUT // 2} s"
            if failure:
                raise RuntimeError(f"{mutant.name}: without the mistake: {failure}") from None
            took = time.perf_counter() - start
            return f"no end in {TIMEOUT} s; {took:.0f} s without the mistake"


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
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    with tempfile.TemporaryDirectory() as temporary:
        if failure := fails(copy_of_tree(Path(temporary)), tests, None):
            print(f"the tests fail without any mistake: {failure}")
            return 1
    alive = 0
    for mutant in chosen:
        start = time.perf_counter()
        killer = killed_by(mutant)
        alive += killer is None
        state = "killed" if killer else "SURVIVED"
        seconds = time.perf_counter() - start
        print(f"{state:<9}{mutant.name} ({seconds:.0f} s) {killer or ''}".rstrip(), flush=True)
    print(f"{len(chosen) - alive} killed, {alive} survived")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
