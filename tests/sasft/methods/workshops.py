"""A workshop with the tiny model in it, rows to work on, and what the model says and thinks, one token at a time."""

from collections.abc import Callable
from pathlib import Path

import torch

from sasft.chat import Chat
from sasft.data import Row
from sasft.methods import Workshop
from sasft.sampling import EXACT
from sasft.writing import Writer
from tests.sasft import tiny_chat
from tests.sasft.methods import scripted


def workshop(folder: Path, says: Callable[[str], str] | None = None, seed: int = 0) -> Workshop:
    """With the tiny model as its writer, one that does not end its turn at once, or with one that answers the user's last turn as
    ``says`` has it."""
    if says is not None:
        return scripted.workshop(folder, lambda text, _: says(text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]), seed)
    chat = tiny_chat.chat()
    writer = Writer(model=tiny_chat.chatty(end=0.0), chat=chat, sampler=EXACT, provenance={"weights_sha256": "mine"}, precision="fp32",
                    batch_size=3)
    return Workshop(chat=chat, folder=folder, writer=writer, seed=seed)


def task_rows(pairs: list[tuple[str, str]]) -> list[Row]:
    return [Row(f"t{i}", "task", ({"role": "user", "content": x},), y) for i, (x, y) in enumerate(pairs)]


def log_likelihood(model, chat: Chat, prompt: list[int], text: str) -> float:
    """Summed log-probability of a text after a prompt."""
    total, ids = 0.0, list(prompt)
    for token in chat.tokenizer(text, add_special_tokens=False).input_ids:
        with torch.no_grad():
            total += torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[token].item()
        ids.append(token)
    return total


def greedy_answer(model, chat: Chat, prompt: list[int], cap: int) -> list[int]:
    """The most probable tokens, without the end of turn."""
    ids: list[int] = []
    while len(ids) < cap:
        with torch.no_grad():
            token = int(model(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax())
        if token == chat.end_of_turn:
            break
        ids.append(token)
    return ids
