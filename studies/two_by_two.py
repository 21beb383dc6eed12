"""Is it the style or the content of the training data that makes a model forget? The 2 x 2 design.

    python -m studies.two_by_two --profile quick

Four cells cross style (the model's own, or foreign) with content (old, or new to the model) on the same prompts, with
equal steps and equal loss tokens a step. Beside them: the task as it comes, SA-SFT with either sampler, and two
controls (the task repeated instead of mixed; self-data with their tokens shuffled).

Predictions, written before the first full run. Forgetting is KL(base ‖ model) on held-out self-prompts, in nats a
token. The smallest effects of interest: 0.01 nats a token of KL, 0.02 of entropy, and a share of one half.

C2   style alone makes a model forget: foreign/old > own/old, in every style and on average.
C3   style is the larger part: style-induced share of forgetting > 1/2.
C10  SA-SFT (exact sampler) forgets less than the task alone, and than the task repeated at the same tokens.
C11  the paper's sampler sharpens: after SA-SFT with it, the entropy on held-out prompts is lower than with the exact one.

``studies/two_by_two_predictions.py`` spells them out for every style and probe; C10 is judged for the paper's sampler, and against
self-data with shuffled tokens, by the same bound.

The probes are three, so that none decides alone: self-prompts answered by the exact sampler (which favour an arm
trained on such data by construction), self-prompts answered by the paper's sampler (likewise the other way), and human
prose as answers in a chat, which favours neither. The NLL of human prose outside a chat is reported beside them.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sasft.chat import Chat
from sasft.errors import UsageError
from sasft.files import ensure_writable, write_json
from sasft.models import load_model, weights_hash
from sasft.restyle import STYLES
from sasft.sampling import EXACT
from sasft.selfdialogue import Writer
from sasft.terminal import exit_code
from sasft.trainer import FitSettings
from sasft.versions import versions
from studies import arms as runs
from studies import cells
from studies.arms import Arm, TrainingSettings
from studies.stats import short_hash
from studies.two_by_two_report import Outcome, report


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of the study."""

    model: str
    data: cells.DataSettings
    training: TrainingSettings
    probes: tuple[str, ...]
    batch_size: int = 64


QUICK = Profile(
    model="smollm2-135m-instruct",
    data=cells.DataSettings(
        problems=96, held_out_problems=8, self_rows=64, held_out_self_rows=16,
        styles=("telegraphic", "capitals"), max_answer_tokens=36, max_user_tokens=32, tries=4, passages=8, passage_tokens=40),
    training=TrainingSettings(
        fit=FitSettings(lr=3e-5, schedule="constant", save_every=0, micro_rows=8), steps=8, tokens_per_step=128, lam=0.5, seeds=3,
        record_every=2, align_rows=4, attention="eager"),
    probes=("self_exact", "human_chat", "human_text", "gold_raw"),
)
FULL = replace(
    QUICK,
    data=replace(QUICK.data, problems=1200, held_out_problems=64, self_rows=600, held_out_self_rows=64,
                 styles=tuple(STYLES), max_answer_tokens=96, max_user_tokens=64, tries=8, passages=64,
                 passage_tokens=128),
    training=replace(QUICK.training, fit=replace(QUICK.training.fit, micro_rows=32), steps=64, tokens_per_step=240, seeds=5, record_every=4, align_rows=16, attention="sdpa"),
    probes=(*QUICK.probes, "self_paper"),
)
PROFILES = {"quick": QUICK, "full": FULL}


def study_arms(styles: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of the study, cells first."""
    crossed = [f"{style}/{content}" for style in ("own", *styles) for content in ("old", "new")]
    return (
        *(Arm(name=name, task=name) for name in crossed),
        Arm(name="task only", task="raw", record=True),
        Arm(name="SA-SFT exact", task="raw", self_data="self_exact", record=True),
        Arm(name="SA-SFT paper", task="raw", self_data="self_paper"),
        Arm(name="task repeated", task="raw", matched_to="SA-SFT exact"),
        Arm(name="self shuffled", task="raw", self_data="self_shuffled"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studies.two_by_two", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--model", help="embedded name, folder or hub id; default: the profile's")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where data and runs are kept (default: runs)")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="where figures go (default: figures)")
    parser.add_argument("--workers", type=int, default=2, help="training processes side by side (default: 2)")
    args = parser.parse_args(argv)
    profile = PROFILES[args.profile]
    if args.model:
        profile = replace(profile, model=args.model)
    return exit_code(lambda: run(profile, args.runs, args.figures, args.workers))


def run(profile: Profile, runs_folder: Path, figures_folder: Path, workers: int) -> None:
    """Build the data, train the arms, draw the figures and print the verdicts. Finished parts are not done again."""
    began = time.monotonic()
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    ensure_writable(figures_folder)
    home = runs_folder / "two_by_two"
    ensure_writable(home)
    attention = profile.training.attention
    model, tokenizer = load_model(profile.model, attention=attention)
    weights = weights_hash(model)
    chat = Chat(tokenizer)
    writer = Writer(model=model, chat=chat, sampler=EXACT, batch_size=profile.batch_size,
                    precision=profile.training.fit.precision, provenance={"model": profile.model, "weights_sha256": weights})
    # Data have a folder of their own: other training settings find them ready.
    data = cells.build(writer, profile.data, home / f"data-{short_hash(weights, asdict(profile.data), writer.identity(), attention)}")
    del model, writer
    runs.give_back_memory()
    identity = {"profile": asdict(profile), "weights_sha256": weights, "data_sha256": cells.digest(data)}
    folder = home / f"runs-{short_hash(identity)}"
    provenance = {**identity, "facts": data.facts, "versions": versions()}
    ensure_writable(folder)
    write_json(folder / "provenance.json", provenance)
    print(f"runs are kept in {folder}", file=sys.stderr)

    arms = study_arms(profile.data.styles)
    job = runs.Job(model=profile.model, settings=profile.training, train=data.train,
                   held_out={name: data.held_out[name] for name in profile.probes}, arms=arms,
                   folder=folder, pad_id=chat.pad_id, threads=max(1, torch.get_num_threads() // workers))
    results = runs.run_arms(job, workers)
    outcome = Outcome(results=results, arms=tuple(a.name for a in arms), styles=profile.data.styles,
                      seeds=profile.training.seeds, probes=profile.probes, folder=folder, provenance=provenance)
    report(outcome, figures_folder)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
