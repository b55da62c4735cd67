"""Claims: one owner at a time, also after kill -9, sleep and a race."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs import claims as module
from jobs.claims import Claims, is_claimed

ROOT = Path(__file__).parents[2]


def test_one_owner_until_released(tmp_path: Path):
    with Claims() as first, Claims() as second:
        claim = first.take(tmp_path)
        assert first.holds(claim) and is_claimed(tmp_path, time.time())
        assert second.take(tmp_path) is None
        first.release(claim)
        assert not is_claimed(tmp_path, time.time())
        assert second.holds(second.take(tmp_path)) and not first.holds(claim)


def test_leaving_releases(tmp_path: Path):
    with Claims() as claims:
        claims.take(tmp_path)
    assert not is_claimed(tmp_path, time.time())


def test_a_killed_process_loses_its_job_at_once(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from jobs.claims import Claims\n"
        "with Claims() as c: c.take(Path(sys.argv[1])); print('taken', flush=True); time.sleep(99)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "taken\n"
    with Claims() as claims:
        assert claims.take(tmp_path) is None
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert claims.take(tmp_path)


def test_another_machines_claim_expires(tmp_path: Path, monkeypatch):
    with Claims(expiry=60) as sleeper, Claims() as other:
        claim = sleeper.take(tmp_path)
        monkeypatch.setattr(module, "_machine", lambda: "another machine")
        assert other.take(tmp_path) is None
        os.utime(claim.path, (time.time() - 61,) * 2)
        assert other.take(tmp_path)
        assert not sleeper.holds(claim)


def test_the_keeper_shows_life(tmp_path: Path):
    with Claims(expiry=0.2) as claims:
        claim = claims.take(tmp_path)
        os.utime(claim.path, (1, 1))
        for _ in range(100):
            time.sleep(0.05)
            if claim.path.stat().st_mtime > 1:
                return
    raise AssertionError("the claim was never touched")


def test_a_race_has_one_winner_each_time(tmp_path: Path):
    """Eight takers of jobs whose last owner is gone: one each, whatever the interleaving."""
    with Claims() as claims, ThreadPoolExecutor(8) as pool:
        for i in range(25):
            folder = tmp_path / str(i)
            claims.release(claims.take(folder))
            won = [c for c in pool.map(lambda _, f=folder: claims.take(f), range(8)) if c]
            assert len(won) == 1
