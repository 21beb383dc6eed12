"""Rows drawn from the lab's distributions, and its models, in the form that the package's instruments and trainer take them for real models."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sasft.chat import Encoded
from studies.lab.model import build
from studies.lab.tree import END, N_RESPONSES, PROMPTS, RESPONSES

PAD = END  # any token: padding is masked


def draw(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Numbers x · R + r [n] of rows drawn from their joint weights ``rows`` [X, R]."""
    return torch.multinomial(rows.flatten(), n, replacement=True, generator=generator)


def encoded(numbers: Tensor) -> list[Encoded]:
    """Drawn rows as token ids: a prompt that is not in the loss, a response that is."""
    found = []
    for number in numbers.tolist():
        prompt, response = PROMPTS[number // N_RESPONSES].tolist(), RESPONSES[number % N_RESPONSES]
        found.append(Encoded.answered(prompt, response, finished=response[-1] == END))
    return found


def module(params: Mapping[str, Tensor], width: int) -> nn.Module:
    """A model with the weights ``params``."""
    model = build(0, width)
    model.load_state_dict(dict(params))
    return model
