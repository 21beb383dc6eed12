"""vLLM through its offline API: what the engine is asked for, what is made of its answers, and what is said without it."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sasft.backends import vllm_engine, vllm_sample
from sasft.errors import UsageError
from sasft.sampling import EXACT, Sampler, sample
from sasft.selfdialogue import Writer, write_dialogues
from tests.drift import zoo
from tests.sasft import tiny_chat

STOP = 2


@dataclass(kw_only=True)
class SamplingParams:
    """The fields of vLLM's that are used here, with its defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class LLM:
    """The shape of vLLM's offline engine, on a model of transformers."""

    model: object = None
    asked: list = field(default_factory=list)
    options: dict = field(default_factory=dict)

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        assert isinstance(sampling_params, list) and len(sampling_params) == len(prompts)
        self.asked += zip(prompts, sampling_params, strict=True)
        return [SimpleNamespace(outputs=[self._complete(prompt["prompt_token_ids"], params)])
                for prompt, params in zip(prompts, sampling_params, strict=True)]

    def _complete(self, prompt, params):
        sampler = Sampler(temperature=params.temperature or 1.0, top_p=params.top_p, max_new_tokens=params.max_tokens)
        stop, = params.stop_token_ids
        row = sample(self.model, [prompt], [params.seed], sampler, stop_id=stop, pad_id=0, greedy=params.temperature == 0)[0]
        ids = [*row.ids, stop] if row.finished else list(row.ids)  # the engine leaves the stop token in place
        logprobs = None if params.logprobs is None else [
            {token: SimpleNamespace(logprob=lp, rank=1), token + 1: SimpleNamespace(logprob=-99.0, rank=2)}
            for token, lp in zip(ids, row.logprobs, strict=True)]
        return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop" if row.finished else "length",
                               stop_reason=stop if row.finished else None, text="")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams
    module.LLM = lambda **options: LLM(zoo.llama(), options=options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


PROMPTS = [[5], [6, 7, 8], [9, 4], [3, 3, 3, 3, 3]]
SEEDS = [2**64 - 1, 1, 2, 3]


def test_the_engine_is_asked_for_the_sampler_s_distribution_and_each_row_s_seed(vllm) -> None:
    engine = vllm_engine("a/model", tensor_parallel_size=2)
    assert engine.options == {"model": "a/model", "revision": None, "dtype": "bfloat16", "logprobs_mode": "raw_logprobs",
                              "tensor_parallel_size": 2}
    vllm_sample(engine, PROMPTS, SEEDS, Sampler(temperature=0.7, top_p=0.9, max_new_tokens=20), stop_id=STOP)
    assert [prompt for prompt, _ in engine.asked] == [{"prompt_token_ids": p} for p in PROMPTS]
    assert {(p.temperature, p.top_p, p.max_tokens, p.ignore_eos, *p.stop_token_ids) for _, p in engine.asked} == {
        (0.7, 0.9, 20, True, STOP)}
    assert len({p.seed for _, p in engine.asked}) > 1 and all(0 <= p.seed < 2**63 for _, p in engine.asked)
    vllm_sample(engine, PROMPTS[:1], [0], EXACT, stop_id=STOP, greedy=True)
    assert engine.asked[-1][1].temperature == 0.0


def test_its_answers_are_samples(vllm) -> None:
    engine, sampler = vllm_engine("a/model"), Sampler(temperature=1, top_p=1, max_new_tokens=40)
    rows = vllm_sample(engine, PROMPTS, SEEDS, sampler, stop_id=STOP)
    assert rows == [sample(zoo.llama(), [p], [s >> 1], sampler, stop_id=STOP, pad_id=0)[0]
                    for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert {r.finished for r in rows} == {True, False}
    for row in rows:
        assert len(row.logprobs) == len(row.ids) + row.finished and STOP not in row.ids


def test_rows_of_the_engine_say_so(vllm, tmp_path: Path) -> None:
    engine = LLM(tiny_chat.chatty())
    writer = Writer(model=engine, chat=tiny_chat.chat(), precision="bf16", batch_size=4, backend="vllm",
                    provenance={"model": "chatty"}, sampler=Sampler(temperature=1, top_p=1, max_new_tokens=12))
    rows = write_dialogues(writer, 12, tmp_path / "self.jsonl", max_user_tokens=30, progress=False)
    assert len(rows) == 12 and {r.meta["backend"] for r in rows} == {"vllm not installed"}
    assert {r.finished for r in rows} == {True, False}
    asked = len(engine.asked)
    assert write_dialogues(writer, 12, tmp_path / "self.jsonl", max_user_tokens=30, progress=False) == rows
    assert len(engine.asked) == asked


def test_without_log_probabilities_there_are_no_samples(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = vllm_engine("a/model")
    monkeypatch.setattr(LLM, "_complete", lambda self, prompt, params: SimpleNamespace(
        token_ids=[5, STOP], logprobs=None, finish_reason="stop"))
    with pytest.raises(UsageError, match="2 tokens but not the log-probability of each"):
        vllm_sample(engine, PROMPTS[:1], [0], EXACT, stop_id=STOP)


def test_without_vllm_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for call in (lambda: vllm_engine("a/model"), lambda: vllm_sample(None, [[5]], [0], EXACT, stop_id=STOP)):
        with pytest.raises(UsageError, match="needs the package vllm, which is not installed; .* choose the backend 'refilled'"):
            call()
    with pytest.raises(UsageError, match="seeds must have one entry a prompt: got 0 for 1"):
        vllm_sample(None, [[5]], [], EXACT, stop_id=STOP)
