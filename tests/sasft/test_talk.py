"""Self-dialogues from settings: what is written, what is chosen, what is refused."""

import json
from pathlib import Path

import pytest

import sasft.talk
from sasft.data import Row, read_rows
from sasft.errors import UsageError
from sasft.filters import NAMED, BreaksScoreIdentity, named_filter
from sasft.sampling import EXACT, PAPER
from sasft.talk import TalkSettings, make_writer, talk
from tests.sasft import tiny_chat


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save_chatty(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model: Path, tmp_path: Path):
    def make(**kwargs) -> TalkSettings:
        return TalkSettings(**{"model": str(model), "out": str(tmp_path / "self.jsonl"), "n": 12, "max_new_tokens": 12,
                               "precision": "fp32", "max_user_tokens": 30, "batch_size": 4, **kwargs})
    return make


def test_all_rows_are_written_and_only_the_kept_are_to_be_trained_on(settings, tmp_path: Path) -> None:
    with pytest.warns(BreaksScoreIdentity, match="finished answers"):
        done = talk(settings(filters=["finished", "answer_tokens=2-9"], max_new_tokens=6))
    written, kept = read_rows(tmp_path / "self.jsonl"), read_rows(tmp_path / "self.kept.jsonl")
    assert done.path == tmp_path / "self.kept.jsonl" and len(written) == 12
    assert kept == [row for row in sorted(written, key=lambda row: row.id) if row.finished and 2 <= len(row.response_ids) <= 9]
    assert 0 < len(kept) < 12
    spent = sum(len(row.prompt[0]["content"]) + 1 + len(row.meta["logprobs"]) for row in written)  # a token is a letter here
    assert done.generated_tokens == spent and str(done).startswith(f"{spent:,} tokens generated")
    assert done.quality.rows == len(kept) and done.quality.measures["unfinished"] == 0
    told = json.loads((tmp_path / "self.quality.json").read_text())
    assert told["file"] == "self.kept.jsonl" and told["generated_tokens"] == spent
    assert told["filters"]["rows"] == 12 and told["quality"]["rows"] == len(kept)
    before = (tmp_path / "self.jsonl").read_bytes()
    assert talk(settings(max_new_tokens=6)).path == tmp_path / "self.jsonl"  # other filters write nothing anew
    assert (tmp_path / "self.jsonl").read_bytes() == before


def test_topics_systems_and_turns_come_from_files(settings, tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_bytes("\ufeffbees\r\n\r\n  rivers \r\n".encode())  # as some editors write it
    (tmp_path / "systems.txt").write_text("Be brief.\n")
    talk(settings(topics=str(tmp_path / "topics.txt"), systems=str(tmp_path / "systems.txt"), turns=2))
    rows = read_rows(tmp_path / "self.jsonl")
    assert {row.meta["topic"] for row in rows} == {"bees", "rivers"} and rows[0].prompt[0]["content"] == "Be brief."
    assert any(len(row.prompt) == 4 for row in rows)


def test_a_topic_is_dropped_and_what_is_left_of_it_told(settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    sums = [f"What is {i} + {i + 1}?" for i in range(20)]
    others = [f"Who lives in the {a} by the {b}?" for a in ("house", "garden", "forest", "city")
              for b in ("sea", "road", "hill", "lake", "inn")]
    rows = [Row(str(i), "self", ({"role": "user", "content": text},), "Let me see.", (5, 6))
            for i, text in enumerate([*sums, *others])]
    monkeypatch.setattr(sasft.talk, "write_in_parallel", lambda *args, **kwargs: rows)
    with pytest.warns(BreaksScoreIdentity, match="the ablation of mathematics"):
        done = talk(settings(ablate=["mathematics"]))
    assert [row.prompt[0]["content"] for row in read_rows(done.path)] == others
    assert done.ablations[0].dropped == 20 and "mathematics: 20 of 40 rows dropped" in str(done)
    assert done.quality.topics["mathematics"] == 0


def test_an_ablation_that_cannot_be_checked_is_refused(settings) -> None:
    with pytest.raises(UsageError, match="needs at least 10 texts about it .* write more of them .* All rows stay in"):
        talk(settings(ablate=["mathematics"]))


def test_bad_data_is_refused_and_stays_on_disk(settings, tmp_path: Path) -> None:
    done = talk(settings(limits=["foreign=none", "nats_per_token=0.5"]))
    with pytest.raises(UsageError, match=f"nats_per_token is .*, above the limit 0.5.*stay in {tmp_path / 'self.jsonl'}"):
        done.check()
    assert len(read_rows(tmp_path / "self.jsonl")) == 12
    assert json.loads((tmp_path / "self.quality.json").read_text())["limits"]["nats_per_token"] == 0.5


def test_a_file_of_other_user_turns_is_refused(settings) -> None:
    talk(settings(n=4))
    with pytest.raises(UsageError, match="holds rows of another run .*max_user_tokens is 30, now 31"):
        talk(settings(n=4, max_user_tokens=31))


def test_what_is_looked_at_is_what_training_would_read(settings) -> None:
    talk(settings(n=6))
    with pytest.raises(UsageError, match="holds 6 rows, of which n=4 asks for the first 4; training would read them all"):
        talk(settings(n=4))
    assert talk(settings(n=4, filters=["random=3"])).quality.rows == 3  # written to a file of their own


def test_dialogues_that_would_outgrow_the_model_are_refused_before_any_is_written(settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"5.. tokens \(.. before the first user turn, then 5 x \(30 \+ 70\).* takes 512"):
        talk(settings(turns=5, max_new_tokens=70))
    assert not (tmp_path / "self.jsonl").exists()


def test_samplers(settings) -> None:
    def drawn(**kwargs) -> tuple[float, float]:
        sampler = settings(**kwargs).draws()
        return sampler.temperature, sampler.top_p

    assert drawn() == drawn(sampler="paper") == (PAPER.temperature, PAPER.top_p)
    assert drawn(sampler="exact") == (EXACT.temperature, EXACT.top_p)
    assert drawn(temperature=0.5) == (0.5, PAPER.top_p) and drawn(temperature=1.0, top_p=1.0) == (1, 1)


def test_the_writer_is_the_model_as_training_has_it(settings) -> None:
    writer = make_writer(settings(backend="padded"))
    assert writer.identity()["batch_size"] == 4 and writer.backend == "padded" and writer.precision == "fp32"
    assert writer.provenance["weights_sha256"]


@pytest.mark.parametrize("kwargs, message", [
    ({"out": ""}, "out is missing"),
    ({"n": 0}, "n must be at least 1, got 0"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"filters": ["distinct=0.9", "distinct"]}, "filters name that of distinct prompts twice"),
    ({"sampler": "exact", "temperature": 0.7}, "the sampler exact has a temperature .* temperature 0.7 is asked for"),
    ({"filters": ["clean"]}, "there is no filter 'clean'; there are: distinct: prompts"),
    ({"filters": ["prompt_words"]}, "the filter prompt_words can't take no value; it keeps =LEAST-MOST words"),
    ({"filters": ["prompt_words=few"]}, "can't take 'few'"),
    ({"filters": ["finished=yes"]}, "the filter finished is given 'finished=yes'"),
    ({"filters": ["random=0"]}, r"n \(rows to keep\) must be at least 1"),
    ({"ablate": ["sports"]}, "there is no topic 'sports' to ablate; there are mathematics"),
    ({"ablate_reads": "prompt"}, "ablate names none"),
    ({"limits": ["badness=1"]}, "limits name 'badness', which is none; there are unfinished"),
    ({"limits": ["empty"]}, "limits are given as NAME=VALUE"),
    ({"topics": "none.txt"}, "topics none.txt can't be read as UTF-8 text"),
    ({"turns": 0}, "turns must be at least 1"),
])
def test_contradictory_settings_are_refused(settings, kwargs, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(**kwargs)


def test_every_filter_has_a_name() -> None:
    values = {"prompt_words": "=1-9", "answer_tokens": "=1-9", "random": "=3"}
    breaking = [name for name in NAMED if named_filter(name + values.get(name, "")).breaks_f1]
    assert breaking == list(NAMED)[5:]
