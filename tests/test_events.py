"""Event files: whole after every failure, readable after a kill, and nobody else's curves torn."""

import gc
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import BinaryIO

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard.summary import scalar

from concept_guard import events
from concept_guard.events import EventFile

TESTS = Path(__file__).parent


def steps(folder: Path) -> list[int]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [e.step for e in found.Scalars("a")] if "a" in found.Tags()["scalars"] else []


def test_what_is_appended_is_there_at_once(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "deep" / "run")
    for step in (1, 2):
        file.append(step, [scalar("a", float(step))], stale_from=step)
        assert steps(tmp_path / "deep" / "run") == [*range(1, step + 1)]
    assert len(list((tmp_path / "deep" / "run").iterdir())) == 1


def test_a_write_that_fails_half_way_leaves_no_trace_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(file: BinaryIO, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    file = EventFile(tmp_path)
    file.append(1, [scalar("a", 1.0)], stale_from=1)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(events, "_write_all", torn)
        with pytest.warns(UserWarning, match="No space left on device"):
            file.append(2, [scalar("a", 2.0)], stale_from=2)
        assert path.read_bytes() == before
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            file.append(3, [scalar("a", 3.0)], stale_from=3)
        assert path.read_bytes() == before
    file.append(4, [scalar("a", 4.0)], stale_from=4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_what_waits_is_bounded_and_the_beginning_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_WAITING", 500)
    (tmp_path / "file").write_text("not a folder")
    file = EventFile(tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot be written"):
        file.append(1, [scalar("a", 1.0)], stale_from=1)
    for step in range(2, 100):
        file.append(step, [scalar("a", 1.0)], stale_from=step)
    (tmp_path / "file").unlink()
    file.append(100, [scalar("a", 1.0)], stale_from=100)
    kept = steps(tmp_path / "file")
    assert kept[0] == 1
    assert kept[-2:] == [99, 100]
    assert len(kept) < 20


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that is full; the file stays readable."""
    code = (
        "import resource, warnings; from pathlib import Path\n"
        "from torch.utils.tensorboard.summary import scalar, text\n"
        "from concept_guard.events import EventFile\n"
        f"file = EventFile({str(tmp_path / 'run')!r})\n"
        "file.append(1, [scalar('a', 1.0)], stale_from=1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for step in (2, 3):\n"
        "        said = [scalar('a', 1.0), text('t', 'x' * 3000)]\n"
        "        file.append(step, said, stale_from=step)\n"
        "assert len(caught) == 1 and 'File too large' in str(caught[0].message), caught\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "file.append(4, [scalar('a', 1.0)], stale_from=4)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


def test_a_killed_run_has_lost_no_round(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_logs import card, flag, report\n"
        "from concept_guard.logs import EventLog\n"
        "log = EventLog(sys.argv[2])\n"
        "for step in range(1, 10**6):\n"
        "    log.write(report(step, flag(5)), {5: card()}, {5: 0})\n"
        "    print(step, flush=True)\n"
    )
    words = [sys.executable, "-c", code, str(TESTS), str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) == 7:
                os.kill(run.pid, signal.SIGKILL)
                break
        last = max([7, *(int(line) for line in run.stdout if line.strip())])
    found = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0})
    found.Reload()
    kept = [e.step for e in found.Scalars("concept_guard/probe/top1")]
    assert kept[:last] == [*range(1, last + 1)]


def test_two_guards_that_write_to_one_folder_in_turns_are_told_once(tmp_path: Path) -> None:
    one, other = EventFile(tmp_path), EventFile(tmp_path)
    one.append(1, [scalar("a", 1.0)], stale_from=1)
    other.append(1, [scalar("a", 2.0)], stale_from=1)
    with pytest.warns(UserWarning, match="another guard of this process.*log_dir of its own"):
        one.append(2, [scalar("a", 1.0)], stale_from=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.append(3, [scalar("a", 1.0)], stale_from=3)
    assert [len(path.read_bytes()) > 0 for path in tmp_path.iterdir()] == [True, True]


def test_a_run_that_goes_on_where_another_one_ended_is_no_second_guard(tmp_path: Path) -> None:
    first = EventFile(tmp_path)
    first.append(1, [scalar("a", 1.0)], stale_from=1)
    second = EventFile(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.append(2, [scalar("a", 1.0)], stale_from=2)
        second.append(3, [scalar("a", 1.0)], stale_from=3)
        del first
        gc.collect()
        second.append(4, [scalar("a", 1.0)], stale_from=4)
    assert steps(tmp_path) == [1, 2, 3, 4]
