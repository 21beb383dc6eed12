"""Self-play against the model's own answers."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from drift.forward import on_device
from sasft.chat import Encoded, collate
from sasft.files import JsonlWriter
from sasft.methods.answers import answer_rows, end_of_turn
from sasft.methods.base import Batch, Costs, Method, Objective, of_sources, score, unwrapped
from sasft.methods.checks import check_counts, check_weights, need_rows
from sasft.methods.frozen_base import scored_rows
from sasft.mixing import TASK
from sasft.processes import first_goes_first, sharded
from sasft.sampling import row_seed
from sasft.settings import option

_OPPONENT = "opponent"
_ROWS = 64  # answers sampled together


@dataclass(frozen=True, kw_only=True)
class Spin(Method):
    r"""SPIN: the task's answers y against the model's own y' to the same prompts.

    .. math:: \ell=-\log\sigma\Big(\beta\Big[\log\frac{p_\theta(y|x)}{p_{\theta_k}(y|x)}
       -\log\frac{p_\theta(y'|x)}{p_{\theta_k}(y'|x)}\Big]\Big),\qquad y'\sim p_{\theta_k}(\cdot|x)\text{ at }T=1,

    log-probabilities summed over tokens, :math:`\theta_k` the model as the iteration finds it. Source: arXiv 2401.01335 (β =
    0.1). One run is one iteration; for the next one, start from its model. The paper starts from a model that SFT has trained
    already, with a rate of 5e-7 at 7B, and without dropout. Our choices: y' ends with its end-of-turn token, as y does; a
    pair's loss takes the place of its row's summed cross-entropy, in the share ``weight``; self rows keep theirs.
    Cost: an answer to every task row, a forward pass on both answers, and a forward and backward pass on y' whenever y is read.
    """

    name: ClassVar[str] = "spin"
    paper: ClassVar[str] = "arXiv 2401.01335"

    beta: float = option(0.1, "how steeply a pair's loss falls with the margin")
    weight: float = option(1.0, "share of the pair's loss, beside cross-entropy, in [0, 1]; 0 is SFT")
    max_new_tokens: int = option(256, "length cap of the model's own answers")
    seed: int = option(0, "seed of the model's own answers")

    def __post_init__(self) -> None:
        check_weights(beta=self.beta)
        check_weights(0, 1, weight=self.weight)
        check_counts(max_new_tokens=self.max_new_tokens)

    def encoded(self, rows: Mapping[str, Sequence[Encoded]], model: nn.Module, pad_id: int, costs: Costs,
                folder: Path | None = None) -> dict[str, list[Encoded]]:
        """Adds the source ``opponent``: row i is the model's own answer to the prompt of task row i."""
        found = super().encoded(rows, model, pad_id, costs)
        if self.weight:
            need_rows(self.name, rows, TASK)
            found[_OPPONENT] = self._answers(model, found[TASK], pad_id, costs, folder)
        return found

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        return None if self.weight == 0 else _Spin(self, model, rows, pad_id, costs)

    def _answers(self, model: nn.Module, rows: Sequence[Encoded], pad_id: int, costs: Costs,
                 folder: Path | None) -> list[Encoded]:
        order = sorted(range(len(rows)), key=lambda i: rows[i].start)
        found: dict[int, Encoded] = {}
        with first_goes_first(), ExitStack() as stack:  # the others find the answers that it has written
            sink = None if folder is None else stack.enter_context(JsonlWriter(folder / f"{self.name}-answers.jsonl"))
            if sink is not None:
                for line in map(json.loads, sink.path.read_text(encoding="utf-8").splitlines()):
                    row = rows[line["row"]]
                    found[line["row"]] = Encoded.answered(row.input_ids[: row.start], line["ids"], line["finished"])
            for i in range(0, len(order), _ROWS):
                together = order[i : i + _ROWS]
                if together[0] in found:
                    continue
                answers = answer_rows(model, [rows[k] for k in together], [row_seed(self.seed, "spin", k) for k in together],
                                      max_new_tokens=self.max_new_tokens, stop_id=end_of_turn(rows), pad_id=pad_id, costs=Costs())
                found |= dict(zip(together, answers, strict=True))
                if sink is not None:
                    sink.write({"row": k, "ids": answer.input_ids[answer.start :], "finished": answer.finished}
                               for k, answer in zip(together, answers, strict=True))
        costs.generated_tokens += sum(answer.loss_tokens for answer in found.values())
        return [found[k] for k in range(len(rows))]


class _Spin(Objective):
    in_step = True

    def __init__(self, method: Spin, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> None:
        super().__init__(costs)
        self.method, self.opponents, self.pad_id = method, rows[_OPPONENT], pad_id
        self.at_start = {source: _log_likelihoods(model, rows[source], pad_id, costs) for source in (TASK, _OPPONENT)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        scored = score(model, batch)
        nll = scored.nll()
        paired = of_sources(batch, [TASK])
        if not paired.any():  # sharded weights come together for a pass that all processes make, whatever rows they have
            return scored.total(nll) + (0.0 * self._of_opponents(model, [0]).sum() if sharded(model) else 0.0)
        at = paired.nonzero().squeeze(-1).tolist()
        numbers = [batch["index"][k] for k in at]
        mine = _by_row(nll, scored.rows, len(batch["source"]))[at] - self.at_start[TASK][numbers].to(scored.labels.device)
        theirs = self._of_opponents(model, numbers) - self.at_start[_OPPONENT][numbers].to(scored.labels.device)
        pairs = -nn.functional.logsigmoid(self.method.beta * (mine - theirs))
        if scored.weights is not None:
            pairs = pairs * batch["weight"][at]
        share = torch.where(paired.to(nll.device)[scored.rows], 1 - self.method.weight, 1.0)
        return scored.total(share * nll) + self.method.weight * pairs.sum()

    def _of_opponents(self, model: nn.Module, numbers: Sequence[int]) -> Tensor:
        """Log-likelihoods of the model's own answers to these task rows, by a pass over them."""
        batch = on_device(collate([self.opponents[i] for i in numbers], self.pad_id), next(model.parameters()).device)
        self.costs.backward_tokens += int(batch["attention_mask"].sum())
        scored = score(unwrapped(model), batch)
        return _by_row(scored.nll(), scored.rows, len(numbers))


def _by_row(nll: Tensor, rows: Tensor, n: int) -> Tensor:
    """Log-likelihoods [n] of rows, from the cross-entropies [N] of their tokens and the row of each."""
    return nll.new_zeros(n).index_add(0, rows, -nll)


def _log_likelihoods(model: nn.Module, rows: Sequence[Encoded], pad_id: int, costs: Costs) -> Tensor:
    found = torch.zeros(len(rows))
    for numbers, scored in scored_rows(model, rows, pad_id, costs):
        found[numbers] = _by_row(scored.nll(), scored.rows, len(numbers)).cpu()
    return found
