"""A claim has one owner at a time, also after kill -9, sleep and a race."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs import claims as module
from jobs.claims import Claims, is_claimed
from runtime.errors import InputError

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


def _edit(claim: Path, **changes) -> None:
    claim.write_text(json.dumps(json.loads(claim.read_text()) | changes))


def test_a_clock_that_is_ahead_blocks_no_job_and_a_living_process_keeps_its_own(tmp_path: Path):
    with Claims(expiry=0.3) as sleeper, Claims(expiry=60) as other:
        claim = sleeper.take(tmp_path)
        assert claim
        sleeper._held.clear()  # it does not touch the claim any more
        _edit(claim.path, machine="another machine")
        ahead = time.time() + 3600
        os.utime(claim.path, (ahead, ahead))
        assert other.take(tmp_path) is None and not is_claimed(tmp_path, time.time())
        time.sleep(0.2)
        os.utime(claim.path, (ahead + 1, ahead + 1))  # a sign of life
        time.sleep(0.2)
        assert other.take(tmp_path) is None
        time.sleep(0.35)
        assert other.take(tmp_path)


DAMAGED_CLAIMS = {
    "empty": b"",
    "half": b'{"host": "a", "machi',
    "deep": b"[" * 200_000,
    "list": b"[]",
    "binary": b"\xff\x00",
    "no expiry": b'{"host": "a", "machine": "b", "pid": 1, "started": null}',
    "for ever": b'{"host":"a","machine":"b","pid":1,"started":null,"expiry":1e300}',
    "text as expiry": b'{"host":"a","machine":"b","pid":1,"started":null,"expiry":"5"}',
    "no process": b'{"host":"a","machine":"b","pid":"../self","started":null,"expiry":5}',
}


@pytest.mark.parametrize("content", DAMAGED_CLAIMS.values(), ids=DAMAGED_CLAIMS.keys())
def test_a_damaged_claim_is_named_and_taken_over(content, tmp_path: Path, capsys):
    with Claims() as claims:
        claim = claims.take(tmp_path)
        assert claim
        claim.path.write_bytes(content)
        assert not is_claimed(tmp_path, time.time())
        assert claims.holds(claims.take(tmp_path))
    assert str(claim.path) in capsys.readouterr().out


def test_other_names_are_not_claims(tmp_path: Path):
    (tmp_path / "claims").mkdir()
    for name in ("9" * 40, "9" * 10, "\u0663", "07", "0", "\u00b2", "1.5", "note"):
        (tmp_path / "claims" / name).touch()
    os.mkfifo(tmp_path / "claims/3")
    with Claims() as claims:
        claim = claims.take(tmp_path)
        assert claim and claim.path.name == "4" and claims.holds(claim)
        (tmp_path / "claims" / ("9" * 9)).touch()
        with pytest.raises(InputError, match="999999999 is no claim"):
            claims.take(tmp_path)


def test_a_claim_is_flushed_before_it_counts(tmp_path: Path, monkeypatch):
    """After a power cut a claim is complete or absent."""
    order: list[str] = []
    link = os.link

    def fsync(descriptor):
        order.append("flush")

    def linking(*paths):
        order.append("link")
        link(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", linking)
    with Claims() as claims:
        claims.take(tmp_path)
    assert order == ["flush", "link"]


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
    """Eight threads claim released jobs at once; exactly one gets each job."""
    with Claims() as claims, ThreadPoolExecutor(8) as pool:
        for i in range(25):
            folder = tmp_path / str(i)
            folder.mkdir()
            claims.release(claims.take(folder))
            won = [c for c in pool.map(lambda _, f=folder: claims.take(f), range(8)) if c]
            assert len(won) == 1
