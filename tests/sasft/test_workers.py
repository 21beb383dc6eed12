"""Jobs in processes of their own: what fails is told, and stops no other."""

import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from sasft.errors import UsageError
from sasft.workers import Job, call, in_processes, on_ray


def leave(path: Path) -> None:
    path.touch()


def fail(what: str) -> None:
    print("said on the way")
    raise ValueError(f"{what} {os.environ.get('CUDA_VISIBLE_DEVICES')}".strip())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait() -> None:
    time.sleep(600)


def test_a_job_that_fails_or_dies_stops_no_other_and_those_that_run_end_with_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    jobs = [Job(die, (), tmp_path / "2.txt"), Job(fail, ("no place for it on",), tmp_path / "1.txt"), Job(wait, (), tmp_path / "3.txt")]
    began, running = time.monotonic(), in_processes(jobs, 2, 1)
    ended = {job.log.stem: error for job, error in (next(running), next(running))}
    running.close()
    assert ended == {"1": "ValueError: no place for it on 7", "2": "its process was killed by SIGKILL, for lack of memory perhaps"}
    said = (tmp_path / "1.txt").read_text()
    assert said.startswith("said on the way\nTraceback") and time.monotonic() - began < 500


def test_output_goes_to_the_log_and_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert call(Job(os.system, ("echo from another program",), tmp_path / "a" / "log.txt"), 1) is None
    assert call(Job(fail, ("no",), tmp_path / "a" / "log.txt"), 1).startswith("ValueError: no")
    assert call(Job(leave, (Path("left"),), tmp_path / "a" / "log.txt", folder=tmp_path / "a"), 1) is None and (tmp_path / "a" / "left").exists()
    os.write(1, b"back\n")
    assert capfd.readouterr().out.endswith("back\n")
    said = (tmp_path / "a" / "log.txt").read_text()
    assert said.startswith("from another program\n") and "Traceback" in said


class RayError(Exception):
    pass


class FakeRay(types.ModuleType):
    """Ray's functions that are used, run in this process; a task that dies raises as Ray does."""

    exceptions = types.SimpleNamespace(RayError=RayError)

    def __init__(self) -> None:
        super().__init__("ray")
        self.up, self.asked, self.options = False, [], {}

    def is_initialized(self) -> bool:
        return self.up

    def init(self, *, address: str, log_to_driver: bool) -> None:
        self.asked.append(address)
        if address != "local":
            raise ConnectionError(f"nobody at {address}")
        self.up = True

    def shutdown(self) -> None:
        self.up = False

    def remote(self, **options):
        self.options = options
        return lambda function: types.SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def wait(self, references):
        return references[-1:], references[:-1]

    def get(self, reference):
        function, arguments = reference
        if arguments[0].function is die:
            raise RayError("the worker died unexpectedly")
        return function(*arguments)

    def cancel(self, reference, *, force: bool) -> None:
        self.asked.append((reference[1][0].log.stem, force))


def test_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    jobs = [Job(leave, (tmp_path / "left",), tmp_path / "1.txt"), Job(die, (), tmp_path / "2.txt"), Job(fail, ("no",), tmp_path / "3.txt")]
    ended = {job.log.stem: error for job, error in on_ray(jobs, "local", cpus=1, gpus=0.5)}
    assert ended == {"3": ended["3"], "2": "Ray lost its process: the worker died unexpectedly", "1": None} and ended["3"].startswith("ValueError: no")
    assert ray.options == {"num_cpus": 1, "num_gpus": 0.5, "max_retries": 0, "max_calls": 1} and not ray.up
    running = on_ray(jobs, "local", cpus=1, gpus=0)
    next(running), running.close()
    assert ray.asked[-2:] == [("1", True), ("2", True)] and not ray.up, "what still runs is ended"
    with pytest.raises(UsageError, match="no Ray was reached at '10.0.0.1:6379': nobody at .*name `local`"):
        next(on_ray(jobs, "10.0.0.1:6379", cpus=1, gpus=0))
    ray.up = True  # a Ray that the caller has started is left running
    assert len(list(on_ray(jobs, "local", cpus=1, gpus=0))) == 3 and ray.up


def test_without_ray_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"ray is not installed: pip install 'sasft\[ray\]'"):
        next(on_ray([], "local", cpus=1, gpus=0))


def test_on_the_real_ray(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    jobs = [Job(fail, ("it was not to be",), tmp_path / "1.txt"), Job(die, (), tmp_path / "2.txt"), Job(leave, (tmp_path / "left",), tmp_path / "3.txt")]
    ended = {job.log.stem: error for job, error in on_ray(jobs, "local", cpus=1, gpus=0)}
    assert ended["1"].startswith("ValueError: it was not to be") and ended["3"] is None and (tmp_path / "left").exists()
    assert "Ray lost its process" in ended["2"]
    assert not ray.is_initialized()
