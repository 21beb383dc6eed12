"""A folder is one run's, and nothing else's."""

from pathlib import Path

import pytest

from sasft.errors import UsageError
from sasft.manifest import claim
from tests.sasft import tiny_chat


def test_a_run_claims_its_folder_and_finds_it_again(tmp_path: Path) -> None:
    for beside in (None, {"versions": "1"}):
        path = tmp_path / f"{beside}.json"
        claim(path, {"lr": 0.1, "names": ("a", "b"), "tau": float("inf")}, beside)
        claim(path, {"lr": 0.1, "names": ["a", "b"], "tau": float("inf")}, beside and {"versions": "2"})
        with pytest.raises(UsageError, match=r"holds another run \(lr is 0.1, now 0.2; seed is None, now 1\)"):
            claim(path, {"lr": 0.2, "names": ["a", "b"], "tau": float("inf"), "seed": 1}, beside)


def test_the_folder_of_a_model_is_not_that_of_a_run(tmp_path: Path) -> None:
    folder = tiny_chat.save_chatty(tmp_path / "model")
    before = (folder / "config.json").read_bytes()
    for beside in (None, {"versions": "1"}):
        with pytest.raises(UsageError, match=r"model.config.json is not the config.json of such a run, so .*model holds something else; name anoth"):
            claim(folder / "config.json", {"lr": 0.1}, beside)
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[1, 2]", "3", '{"identity": 3}', "\x00"])
def test_what_is_no_configuration_at_all_is_something_elses(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match="holds something else"):
        claim(tmp_path / "config.json", {"lr": 0.1}, {"versions": "1"})
