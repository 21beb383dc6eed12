"""What the tests of methods share: a tiny model, with adapters or without, rows of two sources, and a run of a method on them."""

from pathlib import Path

import torch
from torch import nn

from sasft.chat import Encoded, collate
from sasft.methods import Batch, Costs, Method, Objective
from sasft.mixing import SELF, TASK, Plan, make_plan
from sasft.models import LoraSettings, load_model
from sasft.trainer import FitSettings, fit
from tests.sasft import tiny_chat

QUESTIONS = ["What is it?", "Why?", "Say a word, please.", "How many are there?", "Go on", "And then?", "Who says so?", "Where?"]
SETTINGS = {"lr": 1e-2, "precision": "fp32", "schedule": "constant", "save_every": 0, "micro_rows": 8}


def tiny(folder: Path | None = None, lora: bool = False) -> nn.Module:
    """The model in full, or with adapters that have no effect yet."""
    if not lora:
        return tiny_chat.chatty()
    tiny_chat.save_chatty(folder / "model")
    return load_model(str(folder / "model"), lora=LoraSettings(r=2), device="cpu")[0]


def rows() -> dict[str, list[Encoded]]:
    chat = tiny_chat.chat()

    def encoded(questions: list[str], answer: str) -> list[Encoded]:
        return [chat.encode(({"role": "user", "content": q},), f"{answer}{' indeed' * (i % 3)}") for i, q in enumerate(questions)]

    return {TASK: encoded(QUESTIONS, "it is so"), SELF: encoded(QUESTIONS[:6], "well well")}


def batch_of(data: dict[str, list[Encoded]], keys: list[tuple[str, int]]) -> Batch:
    batch = collate([data[s][i] for s, i in keys], 0)
    return {**batch, "source": [s for s, _ in keys], "index": [i for _, i in keys]}


def plan_of(data: dict[str, list[Encoded]], steps: int = 4) -> Plan:
    return make_plan([r.loss_tokens for r in data[TASK]], [r.loss_tokens for r in data[SELF]], steps=steps, lam=0.5, rows_per_step=4)


def run(method: Method, model: nn.Module, out: Path, steps: int = 4, callbacks=(), costs: Costs | None = None, **settings) -> nn.Module:
    """All stages of a method after encoding, on the tiny rows."""
    costs = Costs() if costs is None else costs
    chosen = FitSettings(**{**SETTINGS, **settings})
    chosen.lr = method.learning_rate(chosen.lr)
    model = method.prepare(model)
    data = method.encoded(rows(), model, 0, costs)
    objective = method.objective(model, data, 0, costs)
    fit(model, data, plan_of(data, steps), chosen, pad_id=0, out=out, objective=objective, callbacks=callbacks, progress=False)
    return model


def started(method: Method, model: nn.Module, data: dict[str, list[Encoded]]) -> tuple[Objective, dict[str, list[Encoded]]]:
    """The objective of a method on ``data``, and the rows as it has them."""
    data = method.encoded(data, model, 0, costs := Costs())
    return method.objective(model, data, 0, costs), data


def gradients(model: nn.Module, loss) -> dict:
    """Gradients of a loss by name; 0 where it does not reach."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() if p.grad is not None else p.detach() * 0 for n, p in model.named_parameters() if p.requires_grad}


def apart(a: dict, b: dict) -> float:
    """The largest difference of two sets of tensors, over the largest entry of the second."""
    return max(float((a[n] - b[n]).abs().max()) for n in b) / max(1e-12, max(float(b[n].abs().max()) for n in b))


def weights(model: nn.Module) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def wander(model: nn.Module, by: float = 0.02, seed: int = 1) -> nn.Module:
    """Move every trainable weight a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator))
    return model
