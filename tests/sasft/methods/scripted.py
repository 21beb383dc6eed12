"""What the tests of methods that write rows share: a writer that says what a script has it say, and runs from files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sasft.data import Row
from sasft.methods import Workshop
from sasft.sampling import EXACT, Sample
from sasft.train import TrainSettings
from sasft.writing import Writer
from tests.sasft import tiny_chat

CUT = "~cut"
"""At the end of what is said: the length cap has cut it."""


@dataclass(frozen=True, kw_only=True)
class Scripted(Writer):
    """Says ``script(text of the prompt, seed)`` and keeps the prompts that it was given, with their samplers."""

    script: Callable[[str, int], str]
    asked: list[str] = field(default_factory=list)
    samplers: list[dict] = field(default_factory=list)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **kwargs) -> list[Sample]:
        texts = [self.chat.tokenizer.decode(prompt) for prompt in prompts]
        self.asked.extend(texts)
        self.samplers.append(self.sampler.describe())
        return [self._said(self.script(text, seed)) for text, seed in zip(texts, seeds, strict=True)]

    def _said(self, text: str) -> Sample:
        ids = tuple(self.chat.tokenizer(text.removesuffix(CUT), add_special_tokens=False).input_ids)
        finished = not text.endswith(CUT)
        return Sample(ids, (-0.5,) * (len(ids) + finished), finished)


def writer(script: Callable[[str, int], str], batch_size: int = 4) -> Scripted:
    return Scripted(model=None, chat=tiny_chat.chat(), sampler=EXACT, provenance={"model": "script"}, precision="fp32",
                    batch_size=batch_size, script=script)


def workshop(folder: Path, script: Callable[[str, int], str], seed: int = 0, batch_size: int = 4) -> Workshop:
    w = writer(script, batch_size)
    return Workshop(chat=w.chat, folder=folder, writer=w, seed=seed)


def row(prompt: str, response: str, source: str = "task", **kwargs) -> Row:
    return Row("same id", source, ({"role": "user", "content": prompt},), response, **kwargs)


def tokens(*texts: str) -> int:
    """Generated tokens of finished answers, the end of turn included."""
    return sum(len(tiny_chat.tokenizer()(text).input_ids) + 1 for text in texts)


def files(folder: Path) -> Path:
    """A model's folder, and files of task and self rows."""
    tiny_chat.save_chatty(folder / "model")
    questions = ["What is it?", "Why?", "Say a word.", "How many?", "Go on", "And then?", "Who?", "Where?"]
    for name, answer in (("task", "it is so"), ("self", "well well")):
        lines = [{"prompt": f"{q} {i}", "response": f"{answer} {i}"} for i, q in enumerate(questions)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(folder: Path, out: str, **kwargs) -> TrainSettings:
    return TrainSettings(**{"model": str(folder / "model"), "task": str(folder / "task.jsonl"), "self_data": str(folder / "self.jsonl"),
                            "out": str(folder / out), "lam": 0.0, "steps": 3, "rows_per_step": 4, "lr": 1e-2, "precision": "fp32",
                            "schedule": "constant", "record_every": 0, "save_every": 0, "save_model": False, **kwargs})
