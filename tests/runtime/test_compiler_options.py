"""The compilers accept the options that are meant for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu", reason="make setup ACCELERATOR=tpu")

ROOT = Path(__file__).parents[2]
CODE = """
import jax, json, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from runtime import chips, compiler_options, topology
device = topology.chip_device(chips.V6E)
sharding = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
argument = jax.ShapeDtypeStruct((8, 128), "float32", sharding=sharding)
lowered = jax.jit(lambda x: x @ x.T).lower(argument)
all_options = [
    compiler_options.transformer_options(np.array([device])), compiler_options.vae_options(device)
]
for options in all_options:
    lowered.compile(options)
print(json.dumps(all_options))
"""


def test_a_tpu_compiler_takes_the_options_of_every_program():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    # As JSON they are among the fields that a program's fingerprint covers.
    transformer, vae = json.loads(run.stdout.splitlines()[-1])
    assert transformer and vae
