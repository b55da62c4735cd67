"""Estimates of memory and time from the compiler, before anything runs.

A program is either compiled, or its figures are derived from a compiled program on as many chips.
Seconds of compute are the compiler's cycles over the chip's clock. Seconds of communication are the
bytes received over the speed of the links. Only chips in `runtime.chips.PLANNED` have estimates of
time; for others there is the memory alone.
"""

import dataclasses
import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from cogvideox.denoising.program import Denoiser
from cogvideox.denoising.reuse import Reuse
from cogvideox.transformer.parameters import abstract_parameters
from cogvideox.transformer.sparse_step import SparseStep
from cogvideox.vae.decode import Decoder, frame_batches
from runtime.chips import PLANNED
from runtime.hlo_costs import memory, read_costs
from runtime.jax_types import Device
from runtime.programs import Program

# XLA has no estimate for Pallas kernels. These rates come from their schedules at
# 768x1360x81 on v6e-8 (benchmarks/transformer_step.py, benchmarks/vae_decode.py); at 720x1280x81
# attention takes 0.6% less. Attention: 31.48M cycles, 12 heads of 45,106 tokens, by precision.
_CYCLES_PER_SCORE = {
    precision: cycles / (12 * 45_106**2)
    for precision, cycles in {"bf16": 31.48e6, "int8_qk": 25.85e6}.items()
}
# The decoder of the published VAEs: 644M cycles, 21 latent frames of 96 x 22 columns on each chip.
_PUBLISHED_VAE = (128, 256, 256, 512)
_CYCLES_PER_LATENT = 644.2e6 / (21 * 96 * 22)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory and time of one stage on one mesh, per chip.

    Attributes:
        source: "compiled" or "derived".
        fits: whether it fits into the memory.
        hbm: bytes by kind; empty if the compiler found the program too large.
        cycles: of the compiler's schedule; None if the device has no estimate.
        received: bytes from other chips; None if the device has no estimate.
    """

    source: str
    fits: bool
    hbm: dict[str, int]
    cycles: int | None
    received: int | None

    def describe(self, device: Device) -> dict[str, Any]:
        """Returns JSON values, with the seconds on that chip.

        `seconds` counts compute and then communication at the links' full speed, as if nothing
        overlapped.
        """
        described: dict[str, Any] = {
            "source": self.source,
            "fits": self.fits,
            "hbm_bytes_per_chip": self.hbm,
            "seconds": None,
        }
        chip = PLANNED.get(device.device_kind)
        if chip is None or self.cycles is None or self.received is None:
            return described
        compute = self.cycles / chip.clock_hz
        communication = self.received / chip.link_bytes_per_second
        return described | {
            "seconds": round(compute + communication, 3),
            "compute_seconds": round(compute, 3),
            "communication_seconds": round(communication, 3),
            "estimated_cycles": self.cycles,
            "received_bytes_per_chip": self.received,
        }


class Compiler:
    """Compiles programs in threads while the calling thread lowers the next ones."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._started: dict[str, Future] = {}

    def start(self, program: Program) -> None:
        name = program.manifest_name
        if name not in self._started:
            options = program.fields.get("compiler_options")
            self._started[name] = self._pool.submit(program.lower().compile, options)

    def result(self, program: Program) -> jax.stages.Compiled | None:
        """The compiled program; None if it is too large for the memory."""
        self.start(program)
        try:
            return self._started[program.manifest_name].result()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None


def estimate_step(denoiser: Denoiser, compiler: Compiler, residual: Reuse = "off") -> Estimate:
    """Compiles a denoising step and reads its estimates.

    Args:
        residual: what the step does with the residual.
    """
    device = denoiser.mesh.devices.flat[0]
    compiled = compiler.result(denoiser.step_program(residual))
    if compiled is None:
        return Estimate("compiled", False, {}, None, None)
    hbm = _split_weights(memory(compiled), _weight_bytes(denoiser))
    if device.device_kind not in PLANNED:
        return Estimate("compiled", hbm["total"] <= _capacity(device), hbm, None, None)
    costs = read_costs(_text(compiled))
    cycles = sum(costs.cycles.values())
    if costs.kernel_calls:
        cycles += int(denoiser.config.num_layers * _kernel_cycles(denoiser))
    received = sum(costs.collective_bytes.values())
    return Estimate("compiled", hbm["total"] <= _capacity(device), hbm, cycles, received)


def derive_step(denoiser: Denoiser, known: Estimate, known_for: Denoiser) -> Estimate:
    """Derives the estimates of a step from those of the same step on another mesh.

    Every mesh shares the work evenly, so cycles and temporaries scale with the number of chips,
    and with the samples, of which a gated step has half.
    Weights and exchanged bytes are counted exactly. With tp each chip also holds the gathered
    tokens of its samples.
    """
    fewer = known_for.mesh.size / denoiser.mesh.size * denoiser.samples / known_for.samples
    gathered = _tokens_bytes(denoiser) if denoiser.mesh.shape["tp"] > 1 else 0
    hbm = {
        "weights": _weight_bytes(denoiser),
        "inputs": int(known.hbm["inputs"] * fewer),
        "outputs": int(known.hbm["outputs"] * fewer),
        "temporaries": int(known.hbm["temporaries"] * fewer) + gathered,
        "code": known.hbm["code"],
    }
    hbm["total"] = sum(hbm.values())
    cycles = None if known.cycles is None else int(known.cycles * fewer)
    device = denoiser.mesh.devices.flat[0]
    fits = hbm["total"] <= _capacity(device)
    return Estimate("derived", fits, hbm, cycles, _received(denoiser))


def derive_lossy(denoiser: Denoiser, known: Estimate, known_for: Denoiser) -> Estimate:
    """Derives the estimates of a step with sparse or int8 attention from those of the exact step.

    Both are on the same mesh. Attention is counted by its lists and precision; everything else
    scales with the rows.
    """
    rows = denoiser.layout.padded / known_for.layout.padded
    hbm = {
        kind: size if kind in ("weights", "code") else int(size * rows)
        for kind, size in known.hbm.items()
        if kind != "total"
    }
    hbm["total"] = sum(hbm.values())
    cycles = known.cycles
    if cycles is not None:
        dense, sparse = (
            int(one.config.num_layers * _kernel_cycles(one)) for one in (known_for, denoiser)
        )
        cycles = int((cycles - dense) * rows) + sparse
    fits = hbm["total"] <= _capacity(denoiser.mesh.devices.flat[0])
    return Estimate("derived", fits, hbm, cycles, _received(denoiser))


def estimate_decode(decoder: Decoder, latents: tuple[int, ...], compiler: Compiler) -> Estimate:
    """Compiles the decoder for latents [B, C, T, H, W] and reads its estimates."""
    device = decoder.mesh.devices.flat[0]
    programs = decoder_programs(decoder, latents)
    results = [compiler.result(program) for program in programs]
    compiled = [result for result in results if result is not None]
    if len(compiled) < len(programs):
        return Estimate("compiled", False, {}, None, None)
    arrays = decoder.abstract_weights.values()
    weights = sum(array.size * array.dtype.itemsize for array in arrays)
    # Between two batches only the caches stay in memory, and they are arguments.
    hbm = max((memory(program) for program in compiled), key=lambda hbm: hbm["total"])
    hbm = _split_weights(hbm, weights)
    fits = hbm["total"] <= _capacity(device)
    if device.device_kind not in PLANNED:
        return Estimate("compiled", fits, hbm, None, None)
    costs = [read_costs(_text(program)) for program in compiled]
    runs = (1, len(frame_batches(latents[2])) - 1)
    cycles = sum(n * sum(cost.cycles.values()) for n, cost in zip(runs, costs, strict=False))
    received = sum(
        n * sum(cost.collective_bytes.values()) for n, cost in zip(runs, costs, strict=False)
    )
    if any(cost.kernel_calls for cost in costs):
        if decoder.config.block_out_channels != _PUBLISHED_VAE:
            return Estimate("compiled", fits, hbm, None, None)
        batch, _, frames, height, width = latents
        columns = math.ceil(width / decoder.mesh.size)
        cycles += int(_CYCLES_PER_LATENT * batch * frames * height * columns)
    return Estimate("compiled", fits, hbm, cycles, received)


def derive_decode(
    decoder: Decoder, latents: tuple[int, ...], known: Estimate, known_for: tuple[int, ...]
) -> Estimate:
    """Derives the estimates of a decode from those of another size on the same mesh.

    Cycles scale with the latents of the columns on a chip, memory with those of one frame.
    """

    def columns(shape: tuple[int, ...]) -> int:
        batch, _, _, height, width = shape
        return batch * height * math.ceil(width / decoder.mesh.size)

    area = columns(latents) / columns(known_for)
    length = latents[2] / known_for[2]
    hbm = {
        kind: size if kind in ("weights", "code") else int(size * area)
        for kind, size in known.hbm.items()
        if kind != "total"
    }
    hbm["total"] = sum(hbm.values())
    cycles = None if known.cycles is None else int(known.cycles * area * length)
    # Neighbours exchange one column each, whatever the width.
    heights = latents[0] * latents[3] / (known_for[0] * known_for[3])
    received = None if known.received is None else int(known.received * heights * length)
    fits = hbm["total"] <= _capacity(decoder.mesh.devices.flat[0])
    return Estimate("derived", fits, hbm, cycles, received)


def decoder_programs(decoder: Decoder, latents: tuple[int, ...]) -> list[Program]:
    return decoder.programs(latents, output="uint8")


def _text(compiled: jax.stages.Compiled) -> str:
    """The optimized HLO of a program."""
    text = compiled.as_text()
    assert text is not None
    return text


def _capacity(device: Device) -> float:
    """Bytes of a device's memory; infinite if the backend does not report it, as for CPUs."""
    if device.device_kind in PLANNED:
        return PLANNED[device.device_kind].hbm_bytes
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def _split_weights(hbm: dict[str, int], weights: int) -> dict[str, int]:
    """Splits the bytes of the arguments into weights and other inputs."""
    rest = {name: size for name, size in hbm.items() if name != "arguments"}
    return {"weights": weights, "inputs": hbm["arguments"] - weights, **rest}


def _weight_bytes(denoiser: Denoiser) -> int:
    abstract = abstract_parameters(denoiser.config, denoiser.mesh, jax.numpy.dtype(denoiser.dtype))
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in abstract.values()
    )


def _samples(denoiser: Denoiser) -> int:
    """Samples of each dp group."""
    return denoiser.samples // denoiser.mesh.shape["dp"]


def _tokens_bytes(denoiser: Denoiser) -> int:
    """Bytes of the tokens that an sp shard of a dp group holds after a gather over tp."""
    width = denoiser.config.width
    item = jax.numpy.dtype(denoiser.dtype).itemsize
    return _samples(denoiser) * denoiser.layout.padded * width * item // denoiser.mesh.shape["sp"]


def _received(denoiser: Denoiser) -> int:
    """Bytes a chip receives in a step; tests/cogvideox/transformer/test_collectives.py counts them.

    Over sp, q, k, v and the output are exchanged. Over tp, the tokens are gathered twice and summed
    twice.
    """
    sp, tp = denoiser.mesh.shape["sp"], denoiser.mesh.shape["tp"]
    tokens = _tokens_bytes(denoiser)
    changed = 4 * tokens // tp * (sp - 1) // sp
    gathered = 4 * tokens * (tp - 1) // tp
    return denoiser.config.num_layers * (changed + gathered)


def _kernel_cycles(denoiser: Denoiser) -> float:
    """Cycles of the Pallas kernels of one block on one chip."""
    chip = PLANNED[denoiser.mesh.devices.flat[0].device_kind]
    shards = denoiser.mesh.shape["sp"] * denoiser.mesh.shape["tp"]
    heads = denoiser.config.num_attention_heads // shards
    if denoiser.sparse_step is None:
        rate = _CYCLES_PER_SCORE[denoiser.backend.precision.attention]
        attention = heads * denoiser.layout.tokens**2 * rate
    else:
        attention = sparse_cycles(denoiser.sparse_step, heads, denoiser.backend.precision.attention)
    attention *= _samples(denoiser)
    # Memory limits the four norms and, with sp, the two kernels that join and split its shards.
    kernels = 6 if denoiser.mesh.shape["sp"] > 1 else 4
    if denoiser.backend.precision.attention == "int8_qk":
        kernels += 5  # as long take the statistics of k and the arithmetic of quantising
    moved = kernels * 2 * _tokens_bytes(denoiser) // denoiser.mesh.shape["tp"]
    return attention + moved / chip.hbm_bytes_per_second * chip.clock_hz


def sparse_cycles(step: SparseStep, heads: int, precision: str = "bf16") -> float:
    """Cycles of sparse attention of one sample in a block, the mean of all blocks.

    Args:
        heads: of a chip; the chip with the most work counts.
        precision: of attention.
    """
    lists, rule = step.lists, step.tables.rule
    bodies = -(-np.asarray(lists.lengths) // lists.unroll)
    of_devices = bodies.sum(1)[rule].reshape(len(rule), -1, heads).sum(-1).max(-1)
    scores = of_devices.mean() * lists.unroll * lists.block_q * lists.chunk
    return float(scores * _CYCLES_PER_SCORE[precision])
