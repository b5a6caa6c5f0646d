"""One at a time in a folder, for as long as the process lives and no longer."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from mogan.disk.locks import alone_at, alone_in
from mogan.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from mogan.disk.locks import alone_in
with alone_in(Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that works in the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_with_the_name_of_the_first_and_a_kill_lets_go(other, tmp_path):
    with pytest.raises(UserError, match=rf"at work in .*process {other.pid} on .*wait for it"), alone_in(tmp_path):
        pass
    with pytest.raises(UserError, match="at work"), alone_in(tmp_path, "0/2"):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_shards_work_side_by_side_but_none_twice_and_none_beside_the_whole(tmp_path):
    with alone_in(tmp_path, "0/2"), alone_in(tmp_path, "1/2"):
        for shard in ("1/2", None):
            with pytest.raises(UserError, match="at work"), alone_in(tmp_path, shard):
                pass
    with alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_number_share_clips_with_these_and_wait(tmp_path):
    with alone_in(tmp_path, "0/2"), alone_at(tmp_path / "a[1].json", "0/2"):
        for other in (alone_in(tmp_path, "1/3"), alone_at(tmp_path / "a[1].json", "1/3")):
            with pytest.raises(UserError, match=r"another number \(0/2 beside 1/3\)"):
                other.__enter__()
        with alone_in(tmp_path, "1/2"), alone_at(tmp_path / "b.json", "1/3"):
            pass
    (tmp_path / ".lock-0-of-2").touch()  # of a process that was killed
    with alone_in(tmp_path, "1/3"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock-0-of-2"]


def test_files_are_locked_one_by_one(tmp_path):
    with alone_at(tmp_path / "a.json"), alone_at(tmp_path / "b.json"):
        again = alone_at(tmp_path / "a.json")
        with pytest.raises(UserError, match=r"at work in .*a\.json"):
            again.__enter__()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_start_at_once_one_at_a_time_is_in(tmp_path):
    """The file is taken away at the end: who opened it just before must not hold a lock that nobody sees."""
    code = """
import os, sys, time
from pathlib import Path
from mogan.errors import UserError
from mogan.disk.locks import alone_in
folder, end, entered = Path(sys.argv[1]), time.monotonic() + 1.5, 0
while time.monotonic() < end:
    try:
        with alone_in(folder):
            os.close(os.open(folder / "one", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "one")
            entered += 1
    except UserError:
        continue
print(entered)
"""
    several = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(4)]
    counts = [int(process.communicate()[0]) for process in several]
    assert [process.returncode for process in several] == [0] * 4
    assert sum(counts) > 10


def test_a_file_system_without_locks_is_told_and_does_not_stop_the_work(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("mogan.disk.locks.fcntl.flock", none)
    began = time.monotonic()
    with alone_in(tmp_path):
        pass
    assert "has no locks" in capsys.readouterr().out
    assert time.monotonic() - began < 5
