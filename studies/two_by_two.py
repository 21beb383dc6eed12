"""Is it the style or the content of the training data that makes a model forget? The 2 x 2 design.

    python -m studies.two_by_two --profile quick

Four cells cross style (the model's own, or foreign) with content (old, or new to the model) on the same prompts, with
equal steps and equal loss tokens a step. Beside them: the task as it comes, SA-SFT with either sampler, and two
controls (the task repeated instead of mixed; self-data with their tokens shuffled).

Predictions, written before the first full run. Forgetting is KL(base ‖ model) on held-out self-prompts, in nats a
token; the smallest effect of interest is :data:`SESOI_KL`.

C2   style alone makes a model forget: foreign/old > own/old, in every style and on average.
C3   style is the larger part: style-induced share of forgetting > 1/2.
C10  SA-SFT (exact sampler) forgets less than the task alone, and than the task repeated at the same tokens.
C11  the paper's sampler sharpens: after SA-SFT with it, the entropy on human text is lower than with the exact one.

The probes are three, so that none decides alone: self-prompts answered by the exact sampler (which favour an arm
trained on such data by construction), self-prompts answered by the paper's sampler (likewise the other way), and human
prose, which favours neither.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import drift
from sasft.chat import Chat
from sasft.data import ensure_writable, write_json
from sasft.errors import UsageError
from sasft.models import load_model, weights_hash
from sasft.restyle import STYLES
from sasft.sampling import EXACT
from sasft.selfdialogue import Writer
from sasft.train import FitSettings
from sasft.versions import versions
from studies import arms as runs
from studies import cells
from studies.arms import Arm, TrainingSettings
from studies.figures import DARK, LIGHT, MARKERS, MIDDLE, error_bars, new_figure, save
from studies.stats import Effect, bootstrap, factorial, verdict

SESOI_KL = 0.01  # nats a token
SESOI_SHARE = 0.5
SESOI_ENTROPY = 0.02  # nats a token
MAIN_PROBE = "self_exact"
PROBE_LABELS = {"self_exact": "self-prompts, exact sampler", "self_paper": "self-prompts, paper's sampler",
                "human_text": "human prose"}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of the study."""

    model: str
    data: cells.DataSettings
    training: TrainingSettings
    batch_size: int = 64

    def identity(self) -> dict[str, Any]:
        """What the cache hangs on."""
        return asdict(self)


QUICK = Profile(
    model="smollm2-135m-instruct",
    data=cells.DataSettings(
        problems=112, held_out_problems=16, self_rows=80, held_out_self_rows=16, styles=("telegraphic", "capitals"),
        max_answer_tokens=40, max_user_tokens=40, tries=4, text_passages=12, passage_tokens=64),
    training=TrainingSettings(
        fit=FitSettings(lr=2e-5, schedule="constant", save_every=0), steps=12, tokens_per_step=160, lam=0.5, seeds=3,
        record_every=3, align_rows=8),
)
FULL = replace(
    QUICK,
    data=replace(QUICK.data, problems=1200, held_out_problems=64, self_rows=600, held_out_self_rows=64,
                 styles=tuple(STYLES), max_answer_tokens=96, max_user_tokens=64, tries=8, text_passages=64,
                 passage_tokens=128),
    training=replace(QUICK.training, steps=64, tokens_per_step=240, seeds=5, record_every=4, align_rows=16),
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
    try:
        run(profile, args.runs, args.figures, args.workers)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run(profile: Profile, runs_folder: Path, figures_folder: Path, workers: int) -> None:
    """Build the data, train the arms, draw the figures and print the verdicts. Finished parts are not done again."""
    began = time.monotonic()
    ensure_writable(figures_folder)
    key = hashlib.sha256(json.dumps(profile.identity(), sort_keys=True).encode()).hexdigest()[:12]
    folder = runs_folder / "two_by_two" / key
    ensure_writable(folder)
    print(f"run folder {folder}", file=sys.stderr)
    arms = study_arms(profile.data.styles)

    model, tokenizer = load_model(profile.model)
    weights = weights_hash(model)
    chat = Chat(tokenizer)
    writer = Writer(model=model, chat=chat, sampler=EXACT, batch_size=profile.batch_size,
                    precision=profile.training.fit.precision, provenance={"model": profile.model, "weights_sha256": weights})
    data = cells.build(writer, profile.data, folder)
    del model, writer
    provenance = {"profile": profile.identity(), "weights_sha256": weights, "data_sha256": cells.digest(data),
                  "facts": data.facts, "versions": versions()}
    write_json(folder / "provenance.json", provenance)

    job = runs.Job(model=profile.model, settings=profile.training, train=data.train, held_out=data.held_out, arms=arms,
                   folder=folder, pad_id=chat.pad_id, threads=max(1, torch.get_num_threads() // workers))
    results = runs.run_arms(job, workers)
    seeds = profile.training.seeds
    table = summary_table(results, arms, seeds)
    pictures = [
        *draw_cells(results, profile.data.styles, seeds, figures_folder, provenance),
        *draw_gain_and_drop(table, figures_folder, provenance, sampler_verdicts(results, seeds)),
        *draw_depth(folder, seeds, figures_folder, provenance),
    ]
    print_report(table, figures_folder)
    print("\npictures and tables:")
    for path in pictures:
        print(f"  {path}")
    print(f"\n{time.monotonic() - began:.0f} s")


# --- analysis -------------------------------------------------------------------------------------------------


def summary_table(results: Mapping, arms: Sequence[Arm], seeds: int) -> list[dict[str, Any]]:
    """One row an arm: forgetting on each probe, gain on held-out task answers, entropy, drift; with intervals."""
    table = []
    for arm in arms:
        def score(probe: str, metric: str, name: str = arm.name):
            return runs.scores(results, name, probe, metric, seeds)

        row: dict[str, Any] = {"arm": arm.name, "steps": None, "loss_tokens": None, "lambda_rows": None}
        mixes = [results[arm.name, s]["mix"] for s in range(seeds)]
        row["steps"] = mixes[0]["steps"]
        row["loss_tokens"] = float(np.mean([sum(m["loss_tokens"].values()) for m in mixes]))
        row["lambda_rows"] = float(np.mean([m["lambda_rows"] for m in mixes]))
        row["lambda_tokens"] = float(np.mean([m["lambda_tokens"] for m in mixes]))
        for probe in PROBE_LABELS:
            _put(row, f"kl_{probe}", bootstrap(lambda m: m["x"], {"x": score(probe, "kl_base_model")}))
        for probe, name, sign in (("gold_raw", "gain_raw", -1), ("gold_sentence", "gain_sentence", -1),
                                  ("human_text", "nll_rise_human_text", 1)):
            before_and_after = {when: score(probe, f"nll_{when}") for when in ("base", "model")}
            _put(row, name, bootstrap(lambda m, sign=sign: sign * (m["model"] - m["base"]), before_and_after))
            row[f"{name}_base_nll"] = before_and_after["base"].mean()
        for probe in ("self_exact", "human_text"):
            row[f"entropy_rise_{probe}"] = score(probe, "entropy_model").mean() - score(probe, "entropy_base").mean()
        row["drift_l2"] = float(np.mean([results[arm.name, s]["drift_l2"] for s in range(seeds)]))
        table.append(row)
    return table


def _put(row: dict[str, Any], name: str, effect: Effect) -> None:
    row[name], row[f"{name}_low"], row[f"{name}_high"] = effect.value, effect.low, effect.high


def _get(row: Mapping[str, Any], name: str) -> Effect:
    return Effect(row[name], row[f"{name}_low"], row[f"{name}_high"])


def cell_effects(results: Mapping, styles: Sequence[str], probe: str, seeds: int) -> dict[str, dict[str, Effect]]:
    """For each foreign style and their mean: cells, main effects, interaction and style-induced share on one probe."""
    def cell(name: str):
        return runs.scores(results, name, probe, "kl_base_model", seeds)

    effects: dict[str, dict[str, Effect]] = {}
    for label, members in [*((s, (s,)) for s in styles), ("mean of styles", tuple(styles))]:
        arms = {"own/old": cell("own/old"), "own/new": cell("own/new"),
                **{f"{s}/{c}": cell(f"{s}/{c}") for s in members for c in ("old", "new")}}

        def cells_of(m: Mapping[str, float], members=members) -> dict[str, float]:
            return {"own_old": m["own/old"], "own_new": m["own/new"],
                    "foreign_old": float(np.mean([m[f"{s}/old"] for s in members])),
                    "foreign_new": float(np.mean([m[f"{s}/new"] for s in members]))}

        effects[label] = {name: bootstrap(lambda m, n=name: cells_of(m)[n], arms)
                          for name in ("own_old", "own_new", "foreign_old", "foreign_new")}
        effects[label]["foreign_old - own_old"] = bootstrap(
            lambda m: cells_of(m)["foreign_old"] - cells_of(m)["own_old"], arms)
        for name in ("style", "content", "interaction", "share"):
            effects[label][name] = bootstrap(lambda m, n=name: factorial(**cells_of(m))[n], arms)
    return effects


def sampler_verdicts(results: Mapping, seeds: int) -> list[dict[str, Any]]:
    """Verdicts on SA-SFT against its controls (C10) and on the two samplers (C11), on every probe."""
    verdicts = []
    for probe, label in PROBE_LABELS.items():
        arms = {name: runs.scores(results, name, probe, "kl_base_model", seeds)
                for name in ("task only", "task repeated", "SA-SFT exact", "SA-SFT paper", "self shuffled")}
        for rival in ("task only", "task repeated", "self shuffled"):
            for sampler in ("exact", "paper"):
                effect = bootstrap(lambda m, r=rival, s=sampler: m[r] - m[f"SA-SFT {s}"], arms)
                verdicts.append(verdict("C10", f"SA-SFT ({sampler} sampler) forgets less than {rival}; KL on {label}", effect,
                                        sesoi=SESOI_KL, unit="nats/token"))
    for probe in ("human_text", "self_exact"):
        arms = {s: runs.scores(results, f"SA-SFT {s}", probe, "entropy_model", seeds) for s in ("exact", "paper")}
        effect = bootstrap(lambda m: m["exact"] - m["paper"], arms)
        verdicts.append(verdict("C11", f"entropy is lower after SA-SFT with the paper's sampler; on {PROBE_LABELS[probe]}",
                                effect, sesoi=SESOI_ENTROPY, unit="nats/token"))
    return verdicts


# --- figures --------------------------------------------------------------------------------------------------


def draw_cells(results: Mapping, styles: Sequence[str], seeds: int, folder: Path, provenance: Mapping) -> list[Path]:
    """Figure (a): forgetting in the four cells, and the style-induced share of it."""
    by_probe = {probe: cell_effects(results, styles, probe, seeds) for probe in PROBE_LABELS}
    effects = by_probe[MAIN_PROBE]
    figure, (left, right) = new_figure(8.6, 3.6, 2, width_ratios=(1.7, 1))
    positions = np.arange(len(effects))
    for k, (name, label, colour) in enumerate((
            ("own_old", "own style, old content", LIGHT), ("own_new", "own style, new content", "white"),
            ("foreign_old", "foreign style, old content", MIDDLE), ("foreign_new", "foreign style, new content", DARK))):
        values = [e[name] for e in effects.values()]
        left.bar(positions + (k - 1.5) * 0.2, [v.value for v in values], 0.2, yerr=error_bars(values), color=colour,
                 edgecolor="black", linewidth=0.6, label=label, capsize=2, error_kw={"linewidth": 0.9})
    left.set_xticks(positions, list(effects))
    left.set_xlabel("foreign style")
    left.set_ylabel("forgetting: KL(base ‖ model)\non held-out self-prompts (nats/token)")
    left.legend(frameon=False, fontsize=7.5)
    left.set_title("Forgetting in the four cells", loc="left")

    for k, (probe, label) in enumerate(PROBE_LABELS.items()):
        shares = [e["share"] for e in by_probe[probe].values()]
        right.errorbar(np.arange(len(shares)) + (k - 1) * 0.18, [s.value for s in shares], yerr=error_bars(shares),
                       fmt=MARKERS[k], color=(DARK, MIDDLE, LIGHT)[k], markeredgecolor="black", ecolor="black", capsize=2,
                       linewidth=0.9, label=label)
    right.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    right.set_xticks(positions, [k.replace(" of ", "\nof ") for k in effects])
    right.set_ylabel("style-induced share of forgetting")
    right.legend(frameon=False, fontsize=7, title="measured on", title_fontsize=7)
    right.set_title("Share due to style", loc="left")

    rows = [{"probe": probe, "style": style, "quantity": name, "value": e.value, "low": e.low, "high": e.high,
             "unit": "1" if name == "share" else "nats/token"}
            for probe, group in by_probe.items() for style, es in group.items() for name, e in es.items()]
    verdicts = []
    for probe, group in by_probe.items():
        for style, e in group.items():
            where = f"{style}; KL on {PROBE_LABELS[probe]}"
            verdicts.append(verdict("C2", f"style alone makes the model forget ({where})", e["foreign_old - own_old"],
                                    sesoi=SESOI_KL, unit="nats/token"))
            verdicts.append(verdict("C3", f"style is the larger part of forgetting ({where})", e["share"],
                                    sesoi=SESOI_SHARE, unit="share"))
    return save(figure, folder, "two_by_two_cells", rows, verdicts, provenance)


def draw_gain_and_drop(table: Sequence[Mapping[str, Any]], folder: Path, provenance: Mapping,
                       verdicts: Sequence[Mapping]) -> list[Path]:
    """Figure (b): what each arm learns of the task against what it forgets."""
    figure, axes = new_figure(8.6, 3.9, 2, sharey=True)
    for axis, drop, label in zip(axes, ("kl_self_exact", "kl_human_text"),
                                 ("self-prompts (exact sampler)", "human prose"), strict=True):
        for k, row in enumerate(table):
            gain, lost = _get(row, "gain_raw"), _get(row, drop)
            cell = "/" in row["arm"]
            axis.errorbar(lost.value, gain.value, xerr=error_bars([lost]), yerr=error_bars([gain]), fmt=MARKERS[k % len(MARKERS)],
                          color=LIGHT if cell else MIDDLE if row["arm"].startswith("SA-SFT") else DARK,
                          markeredgecolor="black", ecolor="grey", elinewidth=0.8, markersize=6.5, label=row["arm"])
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xlabel(f"drop: KL(base ‖ model) on {label}\n(nats/token; further left forgets less)")
    axes[0].set_ylabel("gain: fall of NLL on held-out task answers\n(nats/token; higher learns more)")
    axes[0].set_title("Gain against drop, all arms at equal steps", loc="left")
    axes[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, folder, "two_by_two_gain_drop", table, verdicts, provenance)


def draw_depth(runs_folder: Path, seeds: int, folder: Path, provenance: Mapping) -> list[Path]:
    """Figure (c): relative drift per layer over the steps, task-only beside SA-SFT."""
    names = ("task only", "SA-SFT exact")
    rows = []
    for name in names:
        for seed in range(seeds):
            table = drift.read_table(runs_folder / name.replace("/", "-") / f"seed{seed}").to_pylist()
            rows += [{"arm": name, "seed": seed, "step": r["step"], "layer": r["layer"], "relative_drift": r["value"]}
                     for r in table if r["metric"] == "drift/rel" and r["layer"] is not None and r["module"] == ""]
    steps = sorted({r["step"] for r in rows})
    layers = sorted({r["layer"] for r in rows})
    grids = {name: np.array([[np.mean([r["relative_drift"] for r in rows if (r["arm"], r["step"], r["layer"]) == (name, s, layer)])
                              for s in steps] for layer in layers]) for name in names}
    top = max(grid.max() for grid in grids.values()) * 1e3
    figure, axes = new_figure(7.6, 3.9, 2, sharey=True)
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        image = axis.imshow(grid * 1e3, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=top)
        axis.set_xticks(range(len(steps)), steps)
        axis.set_xlabel("optimiser step")
        axis.set_title(name, loc="left")
    axes[0].set_ylabel("layer (0 is next to the input)")
    figure.colorbar(image, ax=axes, label="drift ‖θ − θ₀‖ / ‖θ₀‖ of a layer (×10⁻³)")
    ratio = grids[names[1]][:, -1] / grids[names[0]][:, -1]
    summary = {"claim": "description", "statement": "final relative drift of SA-SFT over task-only, layer by layer",
               "median_ratio": float(np.median(ratio)), "min_ratio": float(ratio.min()), "max_ratio": float(ratio.max())}
    return save(figure, folder, "two_by_two_depth", rows, [summary], provenance)


def print_report(table: Sequence[Mapping[str, Any]], figures_folder: Path) -> None:
    """The short table and every verdict, as text."""
    print("\nforgetting = KL(base ‖ model), nats/token; gain = fall of NLL on held-out task answers; 95 % intervals\n")
    print(f"{'arm':<18}{'KL self-prompts':>24}{'KL human prose':>24}{'gain on task':>24}{'‖δ‖₂':>7}")
    for row in table:
        print(f"{row['arm']:<18}{_get(row, 'kl_self_exact')!s:>24}{_get(row, 'kl_human_text')!s:>24}"
              f"{_get(row, 'gain_raw')!s:>24}{row['drift_l2']:>7.2f}")
    print()
    for name in ("two_by_two_cells", "two_by_two_gain_drop"):
        for v in json.loads((figures_folder / f"{name}.json").read_text(encoding="utf-8"))["verdicts"]:
            print(f"{v['claim']:<4}{v['verdict']:<13}{v['value']:>8.3f} [{v['low']:.3f}, {v['high']:.3f}] {v['unit']:<11} {v['statement']}")


if __name__ == "__main__":
    sys.exit(main())
