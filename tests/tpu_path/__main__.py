"""Run a stage with the TPU code path on fake CPU devices.

    python -m tests.tpu_path stage2 --input_dir DIR --dtype bfloat16 --dp 2 --sp 2 --tp 2
    python -m tests.tpu_path stage3 --input_dir DIR --dtype bfloat16 --devices 4
    python -m tests.tpu_path stage3_flax ...

Compiling for a TPU shows that a program is legal and what it costs. This shows that it computes the
right numbers: the stage script runs unchanged, but with the backend and the layers it would choose
on a TPU, every Pallas call in TPU interpret mode. Interpreted kernels are slow, so use tiny models.
All arguments other than --devices go to the script.

Executables are neither read nor kept: interpreted kernels are host callbacks, which cannot be
serialised.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Name on the command line: script, default number of devices.
STAGES = {
    "stage2": ("stage2_transformer.py", 8),
    "stage3": ("stage3_vae_decoder.py", 4),
    "stage3_flax": ("stage3_vae_decoder_flax.py", 4),
}
USAGE = (
    f"usage: python -m tests.tpu_path {'|'.join(STAGES)} [--devices N] [arguments of the script]"
)


def parse(argv: list[str]) -> tuple[str, int, list[str]]:
    """The script, the number of devices, and the script's own arguments.

    Exits with code 2 on a bad command line, as the scripts do.
    """
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\n{USAGE}")
        sys.exit(0)
    if not argv or argv[0] not in STAGES:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    script, devices = STAGES[argv[0]]
    rest = []
    remaining = iter(argv[1:])
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--devices":
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value.isdigit() or int(value) < 1:
            print(f"--devices takes a positive integer, not {value!r}", file=sys.stderr)
            sys.exit(2)
        devices = int(value)
    return script, devices, rest


def environment(devices: int) -> dict[str, str]:
    """The variables that JAX must see before it is imported."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # Every interpreted copy between devices blocks a thread per device; by default there are as
        # many threads as cores, which deadlocks.
        "PJRT_NPROC": "32",
        # Interpreted kernels keep the other devices of a collective waiting for minutes.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600",
    }


def main() -> None:
    script, devices, arguments = parse(sys.argv[1:])
    os.environ.update(environment(devices))
    os.environ.pop("COGVIDEOX_EXECUTABLES", None)
    from tests.tpu_path.interpreted import tpu_path

    sys.argv = [script, *arguments]
    with tpu_path():
        runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
