"""Work in units: kept whole, in order, and not done again; stopped by an error, by Ctrl-C and by a kill."""

import json
import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from studies.lab.units import Unit, kept, load, work


def noted(folder: Path, name: str, value: object) -> object:
    """``value``, and a line about having made it."""
    with (folder / "log").open("a") as file:
        file.write(f"{name} {os.getpid()} {torch.get_num_threads()}\n")
    return value


def failing(folder: Path) -> None:
    while not (folder / "a.json").exists():  # so that something has been done when it fails
        time.sleep(0.01)
    raise RuntimeError("no such base")


def slow(folder: Path) -> None:
    (folder / "begun").touch()
    time.sleep(300)


def made(folder: Path) -> list[str]:
    log = folder / "log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def unit(folder: Path, name: str, value: object) -> Unit:
    return Unit(name, noted, (folder, name, value))


# --- one result --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("x.json", {"rows": [{"kl": 0.1, "step": 3}]}), ("x.pt", {"w": torch.tensor([0.1, 1 / 3], dtype=torch.float64)})])
def test_a_result_is_made_once_and_read_as_it_was(tmp_path: Path, name: str, value: dict) -> None:
    path = tmp_path / name
    other = path.with_name(f".{name}.99999999")  # what another process was killed over
    other.write_bytes(b"{torn")
    for _ in range(2):
        found = kept(path, lambda: noted(tmp_path, name, value))
        assert found.keys() == value.keys()
        assert found == value if name.endswith("json") else torch.equal(found["w"], value["w"]) and found["w"].dtype == torch.float64
    assert made(tmp_path) == [name] and {p.name for p in tmp_path.iterdir()} == {name, other.name, "log"}


@pytest.mark.parametrize("name, result", [("x.json", object()), ("x.pt", (lambda: 0)), ("x.json", RuntimeError), ("x.pt", RuntimeError)])
def test_what_fails_leaves_no_result(tmp_path: Path, name: str, result: object) -> None:
    def make() -> object:
        if result is RuntimeError:
            raise RuntimeError
        return result

    with pytest.raises(Exception):  # noqa: B017 - json's, pickle's or its own
        kept(tmp_path / name, make)
    assert not (tmp_path / name).exists()


# --- many, in processes --------------------------------------------------------------------------------------------------


def test_results_come_in_the_units_order_and_are_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = [unit(tmp_path, f"{name}.json", {"is": name}) for name in "cab"]
    (tmp_path / "a.json").write_text(json.dumps({"is": "from before"}))
    (tmp_path / ".b.json.4242").write_text('{"is": "half wr')  # left by a kill
    expected = [{"is": "c"}, {"is": "from before"}, {"is": "b"}]
    assert work(units, tmp_path, 1, "testing") == expected
    assert sorted(made(tmp_path)) == ["b.json", "c.json"]
    pids, threads = zip(*(line.split()[1:] for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert str(os.getpid()) not in pids and set(threads) == {"1"}
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and shown[0].startswith("testing: 1 of 2 (c), about ") and shown[1].startswith("testing: 2 of 2 (b), ")
    assert work(units, tmp_path, 1, "testing") == expected and len(made(tmp_path)) == 2 and capsys.readouterr().err == ""
    assert load(tmp_path / "b.json") == {"is": "b"}


def test_an_error_names_its_unit_and_what_was_done_stays(tmp_path: Path) -> None:
    units = [unit(tmp_path, "a.json", 1), Unit("bad.json", failing, (tmp_path,)), *(unit(tmp_path, f"later{k}.json", k) for k in range(20))]
    with pytest.raises(RuntimeError, match="no such base") as caught:
        work(units, tmp_path, 1, "testing")
    assert "in bad.json (testing)" in caught.value.__notes__
    assert load(tmp_path / "a.json") == 1 and not (tmp_path / "bad.json").exists()
    done = made(tmp_path)
    assert len(done) < 21  # what waited was let go
    units[1] = unit(tmp_path, "bad.json", "mended")
    assert work([u for u in units if (tmp_path / u.name).exists() or u.name == "bad.json"], tmp_path, 1, "testing")[1] == "mended"
    assert made(tmp_path) == [*done, "bad.json"]


def command(folder: Path) -> None:
    """A process of its own, with a group of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background inherit that it is ignored
    with (folder / "shown").open("w", buffering=1) as shown:
        sys.stderr = shown  # workers are forked and have it, too
        try:
            work([unit(folder, "a.json", 1), Unit("slow.json", slow, (folder,)), unit(folder, "b.json", 2)], folder, 2, "testing")
        except KeyboardInterrupt:
            os._exit(130)


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_stopped_goes_on_from_there(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    process = get_context("fork").Process(target=command, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / name).exists() for name in ("begun", "a.json", "b.json")):
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)  # one worker is at it, the other waits for more
        os.killpg(process.pid, sent)  # as a terminal does on Ctrl-C: the command and its workers alike
        process.join(30)
        assert process.exitcode == code  # nobody waited for the slow unit
    finally:
        process.kill()
    shown = (tmp_path / "shown").read_text().splitlines()
    assert len(shown) == 2 and all(line.startswith("testing: ") for line in shown)  # no worker's traceback
    assert not (tmp_path / "slow.json").exists()
    units = [unit(tmp_path, "a.json", "again"), unit(tmp_path, "slow.json", 3), unit(tmp_path, "b.json", 2)]
    assert work(units, tmp_path, 1, "testing") == [1, 3, 2]
    assert sorted(made(tmp_path)) == ["a.json", "b.json", "slow.json"] and made(tmp_path)[2] == "slow.json"
