"""External rows in the place of self rows; and methods that choose or alter rows, run from files."""

import json
from collections import Counter
from pathlib import Path

import pytest

from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.methods import Workshop, method
from sasft.methods.external import EXTERNAL
from sasft.mixing import SELF, TASK, mix
from sasft.mixture import MixSettings, make_mixture
from sasft.models import load_model, weights_hash
from sasft.sampling import EXACT
from sasft.train import train
from sasft.trainer import FitSettings, fit
from sasft.writing import Writer, answer
from tests.sasft import tiny_chat
from tests.sasft.methods import scripted
from tests.sasft.methods.workshops import greedy_answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scripted.files(tmp_path)
    lines = [{"q": f"What about {i}?", "a": f"a page on {i}"} for i in range(5)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def web(folder: Path, **options) -> dict:
    file = f"{folder / 'web.jsonl'}:prompt=q,response=a"
    return {"method": "external", "method_options": " ".join(f"{k}={v}" for k, v in {"file": file, **options}.items())}


def steps(out: Path) -> list[list[tuple[str, int]]]:
    return [[tuple(key) for key in json.loads(line)["rows"]] for line in (out / "plan.jsonl").read_text().splitlines()]


def test_shares() -> None:
    assert method("external").shares(0.4) == pytest.approx({TASK: 0.6, SELF: 0, EXTERNAL: 0.4})
    assert method("external", share=0.25).shares(0.4) == pytest.approx({TASK: 0.6, SELF: 0.3, EXTERNAL: 0.1})
    assert method("external", share=0.0).shares(0.4) == method("sft").shares(0.4) == {TASK: 0.6, SELF: 0.4}
    assert method("external").shares(0.0) == {TASK: 1, SELF: 0}


@pytest.mark.parametrize("share, rows_of_a_step", [(1.0, {TASK: 2, EXTERNAL: 2}), (0.5, {TASK: 2, SELF: 1, EXTERNAL: 1})])
def test_a_run_with_external_rows_is_training_on_their_mix(share: float, rows_of_a_step, folder: Path) -> None:
    own = {} if share < 1 else {"self_data": None}
    summary = train(scripted.settings(folder, "run", lam=0.5, **own, **web(folder, share=share)))
    assert all(Counter(source for source, _ in step) == rows_of_a_step for step in steps(folder / "run"))
    assert {s: summary["mix"]["rows"][s] for s in rows_of_a_step} == {s: 3 * n for s, n in rows_of_a_step.items()}
    model, tokenizer = load_model(str(folder / "model"), device="cpu")
    files = {TASK: folder / "task.jsonl", SELF: folder / "self.jsonl", EXTERNAL: f"{folder / 'web.jsonl'}:prompt=q,response=a"}
    rows = {s: encode_rows(read_rows(files[s]), tiny_chat.chat(), 200)[0] for s in rows_of_a_step}
    plan = mix({s: [r.loss_tokens for r in of] for s, of in rows.items()}, {s: n / 4 for s, n in rows_of_a_step.items()}, steps=3,
               rows_per_step=4)
    fit(model, rows, plan, FitSettings(lr=1e-2, precision="fp32", schedule="constant", save_every=0), pad_id=0, out=folder / "fit",
        progress=False)
    assert weights_hash(model) == summary["weights_sha256"]


def test_without_a_share_it_is_sa_sft_and_without_lam_sft(folder: Path) -> None:
    plain = train(scripted.settings(folder, "a", lam=0.5))
    assert train(scripted.settings(folder, "b", lam=0.5, method="external", method_options="share=0"))["weights_sha256"] == plain["weights_sha256"]
    alone = train(scripted.settings(folder, "c", self_data=None))
    assert train(scripted.settings(folder, "d", self_data=None, **web(folder)))["weights_sha256"] == alone["weights_sha256"]
    task = [[key for key in step if key[0] == TASK] for step in steps(folder / "a")]
    train(scripted.settings(folder, "e", lam=0.5, **web(folder)))
    assert [[key for key in step if key[0] == TASK] for step in steps(folder / "e")] == task  # SA-SFT's task rows, in its order


def test_the_file_is_part_of_the_runs_identity(folder: Path) -> None:
    train(scripted.settings(folder, "run", lam=0.5, **web(folder)))
    with (folder / "web.jsonl").open("a") as file:
        file.write('{"q": "One more?", "a": "yes"}\n')
    with pytest.raises(UsageError, match="holds another run .data_sha256.external is "):
        train(scripted.settings(folder, "run", lam=0.5, **web(folder)))


def test_external_rows_that_are_not_there_are_missed_before_any_work(folder: Path) -> None:
    with pytest.raises(UsageError, match="the method external mixes in rows of the source 'external', of which there are none; name their file"):
        scripted.settings(folder, "run", lam=0.5, method="external")
    with pytest.raises(UsageError, match="lam is 0.5, but self_data names no file"):
        scripted.settings(folder, "run", lam=0.5, self_data=None, **web(folder, share=0.5))
    with pytest.raises(UsageError, match=r"share must be a number in \[0, 1\], got 2.0"):
        scripted.settings(folder, "run", lam=0.5, **web(folder, share=2))
    with pytest.raises(UsageError, match="columns of .*web.jsonl name the field 'question', which rows do not have"):
        method("external", file=f"{folder / 'web.jsonl'}:question=q")
    with pytest.raises(UsageError, match="external mixes in rows from elsewhere, but there are rows of task, self alone"):
        rows = read_rows(folder / "task.jsonl")
        method("external").rows({TASK: rows, SELF: rows}, Workshop(chat=tiny_chat.chat(), folder=folder))


def test_a_mix_brings_its_external_rows_along(folder: Path) -> None:
    def mixed(name: str, *sources: str) -> str:
        make_mixture(MixSettings(sources=list(sources), steps=3, rows_per_step=4, model=str(folder / "model"), out=str(folder / name)))
        return str(folder / name)

    task, external = f"task={folder / 'task.jsonl'}", f"web={folder / 'web.jsonl'}:prompt=q,response=a"
    settled = {name: None for name in ("self_data", "lam", "steps", "rows_per_step")} | {"task": ""}
    both = mixed("both", task, external)
    found = train(scripted.settings(folder, "a", mix=both, method="external", **settled))
    assert found["mix"]["rows"] == {TASK: 6, "web": 6}
    assert found["weights_sha256"] == train(scripted.settings(folder, "b", mix=both, **settled))["weights_sha256"]
    with pytest.raises(UsageError, match="external mixes in rows from elsewhere, but there are rows of task alone"):
        train(scripted.settings(folder, "c", mix=mixed("alone", task), method="external", **settled))
    with pytest.raises(UsageError, match="the method external reads .*web.jsonl.*, but the mix .*both has settled what is read"):
        scripted.settings(folder, "d", mix=both, **settled, **web(folder))


# --- methods that choose or alter rows, from files ------------------------------------------------------------------

ACTIVE = {
    "slearnllm": "max_new_tokens=4", "improved": "samples=2", "grads": "lr=1e-2 rows_per_step=4",
    "perturbed": "rate=0.5",
}
NEUTRAL = {"slearnllm": "pass_mark=2", "improved": "samples=1", "grads": "share=1", "perturbed": "rate=0"}
COSTS = {"slearnllm": {"generated_tokens"}, "improved": {"forward_tokens", "generated_tokens"},
         "grads": {"backward_tokens"}, "perturbed": set()}


def with_own_rows(folder: Path) -> Path:
    """A model that does not end its turn at once, self rows that it has written, and two task answers that are its own."""
    model = tiny_chat.chatty(end=0.0)
    model.save_pretrained(folder / "model")
    writer = Writer(model=model, chat=tiny_chat.chat(), sampler=EXACT, precision="fp32", provenance={"weights_sha256": weights_hash(model)})
    (folder / "self.jsonl").unlink()
    answer(writer, {str(i): f"say {i}" for i in range(6)}, folder / "self.jsonl", source="self", progress=False)
    rows = [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        prompt = writer.chat.prompt_ids(({"role": "user", "content": row["prompt"]},))
        row["response"] = writer.chat.tokenizer.decode(greedy_answer(model, writer.chat, prompt, 4))
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ACTIVE)
def test_methods_that_choose_rows_run_from_files(name: str, rank: int, folder: Path) -> None:
    with_own_rows(folder)
    common = {"lam": 0.5, "lora_rank": rank, "steps": 2}
    plain = train(scripted.settings(folder, "plain", **common))
    summary = train(scripted.settings(folder, "active", method=name, method_options=ACTIVE[name], **common))
    assert summary["weights_sha256"] != plain["weights_sha256"]
    assert {cost for cost, n in summary["costs"].items() if n} == {"self_data_tokens", *COSTS[name]}
    neutral = train(scripted.settings(folder, "neutral", method=name, method_options=NEUTRAL[name], **common))
    assert neutral["weights_sha256"] == plain["weights_sha256"] and neutral["costs"] == plain["costs"]
    assert {run["costs"]["self_data_tokens"] for run in (plain, summary)} == {sum(len(r.meta["logprobs"]) for r in read_rows(folder / "self.jsonl"))}
    if name == "slearnllm":
        assert json.loads((folder / "active" / "method" / "slearnllm.json").read_text())["kept"] == 6
