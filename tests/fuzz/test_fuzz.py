"""A slice of the fuzzers: damaged inputs end in a right result or in one line."""

import json
import subprocess
import sys

from tests.fuzz.__main__ import KINDS
from tests.fuzz.harness import ROOT


def test_damaged_inputs_of_every_kind():
    # In a process of its own: it forks, which the threads of pytest and JAX would not survive. One
    # test, because each worker of pytest-xdist would make its own run for its share of several.
    command = [sys.executable, "-m", "tests.fuzz", "--slice"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    report = json.loads(done.stdout)
    problems = {kind: found["problems"] for kind, found in report.items() if found["problems"]}
    assert not problems
    assert report.keys() == KINDS.keys()
    for kind, found in report.items():
        assert set(found["ended"]) >= {"exit 0", "exit 2"}, kind
