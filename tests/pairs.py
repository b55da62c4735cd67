"""Starts a command in two processes, each with four CPU devices, that jax.distributed joins."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_pair(*commands: list[str], timeout: int = 300) -> list[subprocess.CompletedProcess[str]]:
    """Runs Python with each of two lists of arguments; returns when both have ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    pair = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, command in enumerate(commands)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in pair]
    finally:
        for process in pair:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(pair, outputs, strict=True)
    ]
