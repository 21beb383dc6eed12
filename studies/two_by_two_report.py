"""What the 2 x 2 study found: effects with intervals, verdicts by rule, three figures, a short report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import drift
from studies.arms import scores
from studies.figures import DARK, LIGHT, MARKERS, MIDDLE, effect_row, error_bars, new_figure, save
from studies.stats import Effect, Scores, factorial, mean_over_seeds, over_seeds_and_items, verdict
from studies.two_by_two_predictions import KL_PROBES, MEAN, PREDICTIONS, RIVALS, SAMPLERS, SESOI_SHARE, prediction_id

MAIN_PROBE = "self_exact"
PREDICTED = {prediction.id: prediction for prediction in PREDICTIONS}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The finished runs of a study and where they came from."""

    results: Mapping[tuple[str, int], Mapping[str, Any]]
    arms: tuple[str, ...]
    styles: tuple[str, ...]
    seeds: int
    probes: tuple[str, ...]
    folder: Path
    provenance: Mapping[str, Any]

    def score(self, arm: str, probe: str, metric: str) -> Scores:
        """An arm's scores on a probe over seeds and items."""
        return scores(self.results, arm, probe, metric, self.seeds)

    def judged(self, effect: Effect, claim: str, *parts: str) -> dict[str, Any]:
        """The record of an effect on the probe that is the last of a prediction's ``parts``."""
        return verdict(PREDICTED[prediction_id(claim, *parts)], effect, n=self.seeds,
                       items=len(self.score(self.arms[0], parts[-1], "kl_base_model").tokens))

    @property
    def kl_probes(self) -> dict[str, str]:
        """The measured probes that forgetting is read on, with their labels."""
        return {name: label for name, label in KL_PROBES.items() if name in self.probes}


def report(outcome: Outcome, folder: Path) -> None:
    """Draw the figures into ``folder``; print the table, the verdicts and the paths."""
    table = summary_table(outcome)
    paths, verdicts = [], []
    for draw in (draw_cells, draw_gain_and_drop, draw_depth):
        made, found = draw(outcome, table, folder)
        paths += made
        verdicts += found
    print_report(table, verdicts)
    print("\npictures and tables:")
    for path in paths:
        print(f"  {path}")


# --- analysis -------------------------------------------------------------------------------------------------


def summary_table(outcome: Outcome) -> list[dict[str, Any]]:
    """One row an arm: forgetting on each probe, gain on held-out task answers, entropy, drift; with intervals."""
    table = []
    for arm in outcome.arms:
        runs = [outcome.results[arm, seed] for seed in range(outcome.seeds)]
        row: dict[str, Any] = {
            "arm": arm, "steps": runs[0]["mix"]["steps"],
            "loss_tokens": float(np.mean([sum(r["mix"]["loss_tokens"].values()) for r in runs])),
            "lambda_rows": float(np.mean([r["mix"]["lambda_rows"] for r in runs])),
            "lambda_tokens": float(np.mean([r["mix"]["lambda_tokens"] for r in runs])),
        }
        for probe in outcome.kl_probes:
            _put(row, f"kl_{probe}", over_seeds_and_items(lambda m: m["x"], {"x": outcome.score(arm, probe, "kl_base_model")}))
            for when in ("base", "model"):
                row[f"entropy_{when}_{probe}"] = outcome.score(arm, probe, f"entropy_{when}").mean()
        for probe, name, sign in (("gold_raw", "gain", -1), ("human_text", "nll_rise_human_text", 1)):
            nll = {when: outcome.score(arm, probe, f"nll_{when}") for when in ("base", "model")}
            _put(row, name, over_seeds_and_items(lambda m, sign=sign: sign * (m["model"] - m["base"]), nll))
            row[f"nll_base_{probe}"] = nll["base"].mean()
        row["drift_l2"] = float(np.mean([r["drift_l2"] for r in runs]))
        table.append(row)
    return table


def _put(row: dict[str, Any], name: str, effect: Effect) -> None:
    row[name], row[f"{name}_low"], row[f"{name}_high"] = effect.value, effect.low, effect.high


def _get(row: Mapping[str, Any], name: str) -> Effect:
    return Effect(row[name], row[f"{name}_low"], row[f"{name}_high"])


def cell_effects(outcome: Outcome, probe: str) -> dict[str, dict[str, Effect]]:
    """For each foreign style and their mean: cells, main effects, interaction and style-induced share on one probe."""
    def cell(name: str) -> Scores:
        return outcome.score(name, probe, "kl_base_model")

    effects: dict[str, dict[str, Effect]] = {}
    for label, members in [*((s, (s,)) for s in outcome.styles), (MEAN, outcome.styles)]:
        arms = {f"{s}/{c}": cell(f"{s}/{c}") for s in ("own", *members) for c in ("old", "new")}

        def quantities(m: Mapping[str, float], members: Sequence[str] = members) -> dict[str, float]:
            cells = {"own_old": m["own/old"], "own_new": m["own/new"],
                     "foreign_old": float(np.mean([m[f"{s}/old"] for s in members])),
                     "foreign_new": float(np.mean([m[f"{s}/new"] for s in members]))}
            return {**cells, "foreign_old - own_old": cells["foreign_old"] - cells["own_old"], **factorial(**cells)}

        names = quantities({name: s.mean() for name, s in arms.items()})
        effects[label] = {name: over_seeds_and_items(lambda m, n=name: quantities(m)[n], arms) for name in names}
    return effects


def sampler_verdicts(outcome: Outcome) -> list[dict[str, Any]]:
    """Verdicts on SA-SFT against its controls (C10) and on the two samplers (C11), on every probe."""
    verdicts = []
    for probe in outcome.kl_probes:
        arms = {name: outcome.score(name, probe, "kl_base_model") for name in (*RIVALS, *(f"SA-SFT {s}" for s in SAMPLERS))}
        for rival in RIVALS:
            for sampler in SAMPLERS:
                effect = over_seeds_and_items(lambda m, r=rival, s=sampler: m[r] - m[f"SA-SFT {s}"], arms)
                verdicts.append(outcome.judged(effect, "C10", sampler, rival, probe))
    for probe in outcome.kl_probes:
        arms = {s: outcome.score(f"SA-SFT {s}", probe, "entropy_model") for s in SAMPLERS}
        verdicts.append(outcome.judged(over_seeds_and_items(lambda m: m["exact"] - m["paper"], arms), "C11", probe))
    return verdicts


# --- figures --------------------------------------------------------------------------------------------------

Drawn = tuple[list[Path], list[dict[str, Any]]]


def draw_cells(outcome: Outcome, table: Sequence[Mapping[str, Any]], folder: Path) -> Drawn:
    """Figure (a): forgetting in the four cells, and the style-induced share of it."""
    by_probe = {probe: cell_effects(outcome, probe) for probe in outcome.kl_probes}
    effects = by_probe[MAIN_PROBE]
    figure, (left, right) = new_figure(9.2, 3.8, 2, width_ratios=(1.7, 1))
    positions = np.arange(len(effects))
    for k, (name, label, colour) in enumerate((
            ("own_old", "own style, old content", "white"), ("own_new", "own style, new content", LIGHT),
            ("foreign_old", "foreign style, old content", MIDDLE), ("foreign_new", "foreign style, new content", DARK))):
        values = [e[name] for e in effects.values()]
        left.bar(positions + (k - 1.5) * 0.2, [v.value for v in values], 0.2, yerr=error_bars(values), color=colour,
                 edgecolor="black", linewidth=0.6, label=label, capsize=2, error_kw={"linewidth": 0.9})
    left.set_xticks(positions, list(effects))
    left.set_xlabel("foreign style")
    left.set_ylabel("forgetting: KL(base ‖ model)\non held-out self-prompts (nats/token)")
    left.legend(frameon=False, fontsize=7.5)
    left.set_title("Forgetting in the four cells", loc="left")

    for k, (probe, label) in enumerate(outcome.kl_probes.items()):
        shares = [e["share"] for e in by_probe[probe].values()]
        right.errorbar(np.arange(len(shares)) + (k - 0.5 * (len(by_probe) - 1)) * 0.18, [s.value for s in shares],
                       yerr=error_bars(shares), fmt=MARKERS[k], color=(DARK, MIDDLE, LIGHT)[k], markeredgecolor="black",
                       ecolor="black", capsize=2, linewidth=0.9, label=label)
    right.axhline(SESOI_SHARE, color="black", linewidth=0.8, linestyle="--")
    right.axhline(0, color="grey", linewidth=0.5)
    right.axhline(1, color="grey", linewidth=0.5)
    right.set_xlim(-0.6, len(effects) - 0.4)
    right.set_xticks(positions, [k.replace(" of ", "\nof ") for k in effects])
    right.set_xlabel("foreign style")
    right.set_ylabel("style-induced share of forgetting")
    right.legend(fontsize=7, title="measured on", title_fontsize=7, loc="lower right", framealpha=1, edgecolor="white")
    right.set_title("Share due to style", loc="left")

    rows = [{"probe": probe, "style": style, "quantity": name, "value": e.value, "low": e.low, "high": e.high,
             "unit": "1" if name == "share" else "nats/token"}
            for probe, group in by_probe.items() for style, es in group.items() for name, e in es.items()]
    verdicts = []
    for probe, group in by_probe.items():
        for style, e in group.items():
            verdicts.append(outcome.judged(e["foreign_old - own_old"], "C2", style, probe))
            verdicts.append(outcome.judged(e["share"], "C3", style, probe))
    return save(figure, folder, "two_by_two_cells", rows, verdicts, outcome.provenance), verdicts


def draw_gain_and_drop(outcome: Outcome, table: Sequence[Mapping[str, Any]], folder: Path) -> Drawn:
    """Figure (b): what each arm learns of the task against what it forgets."""
    figure, axes = new_figure(9.2, 4.0, 2, sharey=True)
    for axis, (probe, label) in zip(axes, outcome.kl_probes.items(), strict=False):
        for k, row in enumerate(table):
            gain, lost = _get(row, "gain"), _get(row, f"kl_{probe}")
            colour = LIGHT if "/" in row["arm"] else MIDDLE if row["arm"].startswith("SA-SFT") else DARK
            axis.errorbar(lost.value, gain.value, xerr=error_bars([lost]), yerr=error_bars([gain]),
                          fmt=MARKERS[k % len(MARKERS)], color=colour, markeredgecolor="black", ecolor="grey",
                          elinewidth=0.8, markersize=6.5, label=row["arm"])
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xscale("log")
        axis.set_xlabel(f"drop: KL(base ‖ model) on {label}\n(nats/token; log scale; further left forgets less)")
    axes[0].set_ylabel("gain: fall of NLL on held-out task answers\n(nats/token; higher learns more)")
    axes[0].set_title("Gain against drop after equal steps (tokens differ: see the table)", loc="left")
    axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    verdicts = sampler_verdicts(outcome)
    return save(figure, folder, "two_by_two_gain_drop", table, verdicts, outcome.provenance), verdicts


def draw_depth(outcome: Outcome, table: Sequence[Mapping[str, Any]], folder: Path) -> Drawn:
    """Figure (c): relative drift per layer at the end, task-only beside SA-SFT (the table has all recorded steps)."""
    names = ("task only", "SA-SFT exact")
    recorded = {(name, seed): drift.load(outcome.folder / name / f"seed{seed}").table.to_pylist()
                for name in names for seed in range(outcome.seeds)}
    rows = [{"arm": name, "seed": seed, "step": r["step"], "layer": r["layer"], "relative_drift": r["value"]}
            for (name, seed), run in recorded.items() for r in run
            if r["metric"] == "drift/rel" and r["layer"] is not None and r["module"] == ""]
    value = {(r["arm"], r["seed"], r["step"], r["layer"]): r["relative_drift"] for r in rows}
    steps, layers = sorted({r["step"] for r in rows}), sorted({r["layer"] for r in rows})

    def at(name: str, step: int, layer: int) -> NDArray[np.float64]:
        return np.array([value[name, seed, step, layer] for seed in range(outcome.seeds)])

    drawn = [effect_row(mean_over_seeds(at(name, step, layer)), quantity=name, step=step, layer=layer)
             for name in names for step in steps for layer in layers]
    ratios = [mean_over_seeds(at(names[1], steps[-1], layer) / at(names[0], steps[-1], layer)) for layer in layers]
    drawn += [effect_row(e, quantity=f"{names[1]} / {names[0]}", step=steps[-1], layer=layer) for layer, e in zip(layers, ratios, strict=True)]

    figure, (left, right) = new_figure(8.0, 3.9, 2, sharey=True)
    for k, (name, colour) in enumerate(zip(names, (DARK, MIDDLE), strict=True)):
        ends = [mean_over_seeds(1e3 * at(name, steps[-1], layer)) for layer in layers]
        left.errorbar([e.value for e in ends], np.array(layers) + (k - 0.5) * 0.3, xerr=error_bars(ends), fmt=MARKERS[k], markersize=4, color=colour,
                      markeredgecolor="black", ecolor="grey", elinewidth=0.8, label=name)
    left.set_xlabel(f"drift ‖θ − θ₀‖ / ‖θ₀‖ of a layer after {steps[-1]} steps (×10⁻³)")
    left.set_ylabel("layer (0 is next to the input)")
    left.legend(frameon=False, fontsize=7.5)
    left.set_title("Drift by depth", loc="left")
    right.errorbar([e.value for e in ratios], layers, xerr=error_bars(ratios), fmt="o", markersize=4, color=LIGHT, markeredgecolor="black", ecolor="grey",
                   elinewidth=0.8)
    right.axvline(1, color="black", linewidth=0.8, linestyle="--")
    right.set_xlabel(f"the same, {names[1]} over {names[0]}, by seed")
    right.set_title("What self-data leave of it", loc="left")

    middle = [e.value for e in ratios]
    notes = [{"claim": "none", "statement": "final relative drift of SA-SFT exact over task only, layer by layer",
              "median": float(np.median(middle)), "lowest": min(middle), "highest": max(middle)}]
    for step in (0, steps[-1]):
        notes += [{"claim": "none", "statement": f"cosine of the expected task and self gradients (noise-corrected), step {step}, "
                                                 "one seed", "value": r["value"], "stderr": r["stderr"]}
                  for r in recorded[names[1], 0]
                  if r["metric"] == "align/cos" and r["layer"] is None and r["step"] == step]
    return save(figure, folder, "two_by_two_depth", drawn, notes, outcome.provenance), []


def print_report(table: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> None:
    """The short table and every verdict, as text."""
    print("\nforgetting = KL(base ‖ model), nats/token; gain = fall of NLL on held-out task answers; 95 % intervals\n")
    print(f"{'arm':<18}{'KL self-prompts':>24}{'KL human answers':>24}{'gain on task':>24}{'‖δ‖₂':>7}")
    for row in table:
        print(f"{row['arm']:<18}{_get(row, 'kl_self_exact')!s:>24}{_get(row, 'kl_human_chat')!s:>24}"
              f"{_get(row, 'gain')!s:>24}{row['drift_l2']:>7.2f}")
    print()
    for v in verdicts:
        print(f"{v['claim']:<4}{v['verdict']:<13}{v['value']:>8.3f} [{v['low']:.3f}, {v['high']:.3f}] {v['unit']:<11}"
              f"{v['statement']}")
