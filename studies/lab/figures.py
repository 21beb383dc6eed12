"""The lab's figures: each with its table and the verdicts that it shows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.figures import DARK, LIGHT, MARKERS, MIDDLE, effect_row, error_bars, new_figure, save
from studies.lab.effects import ACCOUNTS, Race, Rows, at_equal_gain, column
from studies.lab.experiment import DISTANCES, LAMBDAS, TASK_ONLY
from studies.lab.sweeps import SA_SFT
from studies.lab.units import pool
from studies.stats import Effect, mean_over_seeds, over_seeds

Verdicts = Mapping[str, Mapping[str, Any]]
Save = Callable[[Any, str, Sequence[Mapping[str, Any]]], list[Path]]
Draw = Callable[[Mapping[str, Rows], int, Save], list[Path]]
TOO_LARGE = 5.0  # nats a token, of a forecast that has left all bounds
CELLS = ("own/old", "own/new", "foreign/old", TASK_ONLY)


def draw_all(tables: Mapping[str, Rows], verdicts: Verdicts, n: int, folder: Path, provenance: Mapping[str, Any], workers: int) -> list[Path]:
    """Draw every figure into ``folder``, side by side; returns the paths."""
    drawings: tuple[tuple[Draw, tuple[str, ...]], ...] = (  # what takes longest first
        (draw_calibration, ()), (draw_sampled, ("sampled",)), (draw_push, ("C6",)), (draw_dose, ("C7",)), (draw_courses, ("C10",)),
        (draw_external, ("C8",)), (draw_topic, ("C9",)), (draw_entropy, ("C11",)), (draw_limits, ()), (draw_forces, ("C1",)), (draw_phase, ()), (draw_cells, ("C2", "C3")), (draw_race, ("C5",)), (draw_shared, ("C4",)))
    with pool(min(workers, len(drawings))) as processes:
        running = []
        for draw, claims in drawings:
            shown = [v for name, v in verdicts.items() if ("sampled" if name.endswith("sampled") else v["claim"]) in claims]
            running.append(processes.submit(_drawn, draw, tables, shown, n, folder, provenance))
        return sorted(path for drawn in running for path in drawn.result())


def _drawn(draw: Draw, tables: Mapping[str, Rows], shown: Sequence[Mapping[str, Any]], n: int, folder: Path, provenance: Mapping[str, Any]) -> list[Path]:
    return draw(tables, n, lambda figure, name, rows: save(figure, folder, name, rows, shown, provenance))


def draw_forces(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C1: forces at θ₀."""
    names = list(dict.fromkeys(row["source"] for row in tables["forces"]))
    found = [mean_over_seeds(column(tables["forces"], "of_task", n, source=name)) for name in names]
    order = np.argsort([e.value for e in found])
    figure, axis = new_figure(7.2, 3.9)
    floor = 1e-17
    for place, k in enumerate(order):
        e = found[k]
        colour = LIGHT if e.value < 1e-8 else MIDDLE if names[k] in ("own answers, foreign style", "truth, own style", "task") else DARK
        axis.errorbar(max(e.value, floor), place, xerr=error_bars([e]), fmt="o", markersize=6, color=colour, markeredgecolor="black", ecolor="black",
                      capsize=2, linewidth=0.9)
        axis.text(max(e.high, floor) * 1.6, place, f"{e.value:.1e}" if e.value < 1e-3 else f"{e.value:.3f}", va="center", fontsize=7.5)
    axis.set_yticks(range(len(names)), [names[k] for k in order])
    axis.set_xscale("log")
    axis.set_xlim(floor, 300)
    axis.set_xlabel("‖expected gradient at θ₀‖, as a share of the task's (log scale)")
    axis.grid(axis="y", color="0.9")
    axis.set_title("Force at θ₀ of every kind of data", loc="left")
    return keep(figure, "lab_forces", [effect_row(found[k], source=names[k]) for k in order])


def draw_cells(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C2, C3: the four cells, by whole responses and by what they say."""
    arms = tables["arms"]
    last = max(row["step"] for row in arms)
    labels = ("own style\nold content", "own style\nnew content", "foreign style\nold content", "foreign style\nnew content")
    figure, axes = new_figure(8.0, 3.5, 2)
    rows = []
    for axis, (metric, unit, title) in zip(axes, (("kl", "nats/token", "In how it answers: KL of whole responses"),
                                                  ("content", "nats/response", "In what it says: KL of the content alone")), strict=True):
        found = [mean_over_seeds(column(arms, metric, n, arm=arm, step=last)) for arm in CELLS]
        axis.bar(range(4), [e.value for e in found], color=[LIGHT, LIGHT, MIDDLE, MIDDLE], hatch=["", "//", "", "//"], edgecolor="black", linewidth=0.7)
        axis.errorbar(range(4), [e.value for e in found], yerr=error_bars(found), fmt="none", ecolor="black", capsize=3, linewidth=1)
        axis.set_xticks(range(4), labels, fontsize=7.5)
        axis.set_ylabel(f"forgetting on the other topics ({unit})")
        axis.set_title(title, loc="left", fontsize=9)
        rows += [effect_row(e, cell=arm, metric=metric, unit=unit) for arm, e in zip(CELLS, found, strict=True)]
    return keep(figure, "lab_cells", rows)


def draw_shared(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C4: how alike style's gradients are over prompts and between topics, beside content's."""
    start = tables["start"]
    quantities = (("coherence", "coherence\nover prompts"), ("cos_topics", "cosine of\nmeans, between\ntopics"),
                  ("shared", "leading planes,\nbetween topics:\nmean cos²"))
    figure, axis = new_figure(6.4, 3.7)
    rows = []
    for k, (kind, colour, marker) in enumerate((("style", MIDDLE, "o"), ("content", DARK, "s"))):
        found = [mean_over_seeds(column(start, f"{name}_{kind}", n)) for name, _ in quantities]
        places = np.arange(len(found)) + (k - 0.5) * 0.3
        for place, (name, _) in zip(places, quantities, strict=True):
            axis.plot(place + np.linspace(-0.07, 0.07, n), column(start, f"{name}_{kind}", n), linestyle="none", marker=".", markersize=4, color="0.6")
        axis.errorbar(places, [e.value for e in found], yerr=error_bars(found), fmt=marker, color=colour, markeredgecolor="black", ecolor="black",
                      capsize=3, linewidth=1, label=f"effects of {kind} on the gradient")
        rows += [effect_row(e, quantity=name, of=kind) for e, (name, _) in zip(found, quantities, strict=True)]
        null = mean_over_seeds(column(start, f"shared_null_{kind}", n))
        axis.plot([places[-1] - 0.12, places[-1] + 0.12], [null.value] * 2, color="black", linestyle=":")
        rows.append(effect_row(null, quantity="shared, permuted", of=kind))
        rows.append({"quantity": "shared, largest p", "of": kind, "value": column(start, f"shared_p_{kind}", n).max(), "low": "", "high": ""})
    axis.plot([], [], color="black", linestyle=":", label="mean cos² if pairs of effects are permuted")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(len(quantities)), [label for _, label in quantities])
    axis.set_ylabel("1 = all alike, 0 = unrelated")
    axis.legend(frameon=False, fontsize=7.5)
    axis.set_title("How alike the gradients' effects are wherever they are taught (dots: seeds)", loc="left")
    return keep(figure, "lab_shared", rows)


def draw_push(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C6: the force of self-data against what F₄ foretells."""
    line = [row for row in tables["push"] if row["course"] == "line"]
    figure, (left, right) = new_figure(8.2, 3.5, 2)
    for seed in range(n):
        some = sorted((r for r in line if r["seed"] == seed), key=lambda r: r["drift"])
        left.plot([r["drift"] for r in some], [r["slope"] for r in some], marker="o", markersize=3, color=DARK, alpha=0.6, linewidth=0.8)
    left.axhline(1, color="black", linestyle="--", linewidth=0.8)
    left.set_xscale("log")
    left.set_xlabel("‖δ‖₂ on the line to where the task leads")
    left.set_ylabel("slope of the self-data's gradient on F δ")
    left.set_title("The push beside F δ (each line a seed)", loc="left", fontsize=9)
    rows = [{**r, "panel": "line"} for r in line]
    steps = sorted({r["step"] for r in tables["push"] if r["course"] != "line"})
    for k, (course, colour) in enumerate(((TASK_ONLY, DARK), ("SA-SFT 0.5", MIDDLE))):
        for name, style, label in (("cos_drift", "-", "cos(g self, δ)"), ("cos_task", "--", "cos(g self, g task)")):
            found = [mean_over_seeds(column(tables["push"], name, n, course=course, step=step)) for step in steps]
            right.errorbar(steps, [e.value for e in found], yerr=error_bars(found), color=colour, linestyle=style, marker=MARKERS[k], markersize=4,
                           capsize=2, linewidth=1, label=f"{label}, {course.removesuffix(' 0.5')}")
            rows += [{"panel": "course", "course": course, "step": step, "quantity": name, **effect_row(e)} for step, e in zip(steps, found, strict=True)]
    right.axhline(0, color="black", linewidth=0.6)
    right.set_xscale("log")
    right.set_xlabel("step of gradient descent (log scale)")
    right.set_ylabel("cosine")
    right.set_ylim(-1.05, 1.05)
    right.legend(frameon=False, fontsize=7, loc="center right")
    right.set_title("Where it points on the course of training", loc="left", fontsize=9)
    names = list(dict.fromkeys(k for r in rows for k in r))
    return keep(figure, "lab_push", [{k: r.get(k, "") for k in names} for r in rows])


def draw_dose(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C7: forgetting against λ, foretold at θ₀ and observed; drift that λ removes along style and content."""
    arms, dose = tables["arms"], tables["dose"]
    steps = sorted({row["step"] for row in dose})
    shown = (steps[2], steps[4], steps[-1])
    figure, (left, right) = new_figure(8.6, 3.8, 2)
    lams, rows = (0.0, *LAMBDAS), []
    for step, colour, marker in zip(shown, (LIGHT, MIDDLE, DARK), MARKERS, strict=False):
        observed = [mean_over_seeds(column(arms, "kl", n, arm=TASK_ONLY if lam == 0 else f"SA-SFT {lam}", step=step)) for lam in lams]
        left.errorbar(lams, [e.value for e in observed], yerr=error_bars(observed), fmt=marker, color=colour, markeredgecolor="black", ecolor="black",
                      capsize=2, label=f"observed after {step} steps", linewidth=0.9)
        for name, line in (("kl_foretold_gn", "-"), ("kl_foretold", ":")):
            foretold = [np.exp(np.log(column(dose, name, n, lam=lam, step=step)).mean()) for lam in lams]
            left.plot(lams, [f if f < TOO_LARGE else np.nan for f in foretold], linestyle=line, color=colour, linewidth=1.3)
            rows += [{"step": step, "lam": lam, "quantity": name, "value": f, "low": "", "high": ""} for lam, f in zip(lams, foretold, strict=True)]
        rows += [{"step": step, "lam": lam, "quantity": "kl", "value": e.value, "low": e.low, "high": e.high} for lam, e in zip(lams, observed, strict=True)]
    left.set_yscale("log")
    left.set_xlabel("λ, share of self-data")
    left.set_ylabel("forgetting (KL, nats/token; log scale)")
    left.set_title("The dose curve, and what θ₀ foretells of it", loc="left", fontsize=9)
    left.plot([], [], color="black", label="foretold, Gauss-Newton part of H")
    left.plot([], [], color="black", linestyle=":", label=f"foretold, H (beyond {TOO_LARGE:g}: not drawn)")
    left.legend(frameon=False, fontsize=6.5, loc="lower left")
    for kind, colour, marker in (("style", MIDDLE, "o"), ("content", DARK, "s")):
        free = column(dose, f"along_{kind}", n, lam=0.0, step=steps[-1])
        removed = [mean_over_seeds(1 - column(dose, f"along_{kind}", n, lam=lam, step=steps[-1]) / free) for lam in LAMBDAS]
        right.errorbar(LAMBDAS, [e.value for e in removed], yerr=error_bars(removed), color=colour, marker=marker, capsize=2, linewidth=1,
                       label=f"in the span of {kind}'s gradients")
        rows += [{"step": steps[-1], "lam": lam, "quantity": f"removed along {kind}", "value": e.value, "low": e.low, "high": e.high}
                 for lam, e in zip(LAMBDAS, removed, strict=True)]
    right.axhline(0, color="black", linewidth=0.6)
    right.set_xlabel("λ, share of self-data")
    right.set_ylabel("share of the drift that self-data remove")
    right.set_title(f"Drift in style's and in content's span, after {steps[-1]} steps", loc="left", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    return keep(figure, "lab_dose", rows)


def draw_race(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C5: which account ranks runs as their forgetting does."""
    figure, axis = new_figure(7.4, 3.9)
    rows = []
    found = {(outcome, name): over_seeds(lambda s, r=race, k=name: r.correlation(k, s), n, draws=1000)
             for outcome in ("kl", "content") for race in (Race(tables, outcome, n),) for name in race.accounts}
    order = sorted(ACCOUNTS, key=lambda name: -found["content", name].value)
    for k, (outcome, label, colour) in enumerate((("kl", "KL of whole responses", MIDDLE), ("content", "KL of what is said", DARK))):
        names = [name for name in order if (outcome, name) in found]
        effects = [found[outcome, name] for name in names]
        axis.errorbar([e.value for e in effects], [order.index(name) + (k - 0.5) * 0.28 for name in names], xerr=error_bars(effects), fmt=MARKERS[k],
                      color=colour, markeredgecolor="black", ecolor="black", capsize=2, linewidth=0.9, label=f"forgetting as {label}")
        rows += [effect_row(e, outcome=outcome, account=ACCOUNTS[name]) for name, e in zip(names, effects, strict=True)]
    axis.set_yticks(range(len(order)), [ACCOUNTS[name] for name in order])
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_xlim(-0.1, 1.02)
    axis.set_xlabel("rank correlation with forgetting, over all arms, steps and seeds")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.12, 0.5))
    axis.set_title("Which account foretells forgetting", loc="left")
    return keep(figure, "lab_race", rows)


def draw_courses(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C10: gain against drop on the course of each arm, and what each saves over the task alone at equal gain."""
    arms = tables["arms"]
    chosen = (TASK_ONLY, "task at half rate", "SA-SFT 0.5", "SA-SFT paper", "SA-SFT without a topic", "external 0.5", "external 1.0", "self shuffled")
    untold = [arm for lam in LAMBDAS if (arm := f"SA-SFT {lam}") not in chosen]  # of these the table speaks alone
    steps = sorted({row["step"] for row in arms})
    figure, axes = new_figure(9.2, 3.9, 2, sharey=True)
    rows = []
    for axis, (metric, unit) in zip(axes, (("kl", "KL of responses, nats/token"), ("content", "KL of what is said, nats/response")), strict=True):
        for k, arm in enumerate((*chosen, *untold)):
            lost = [mean_over_seeds(column(arms, metric, n, arm=arm, step=step)) for step in steps]
            gained = [mean_over_seeds(column(arms, "gain", n, arm=arm, step=step)) for step in steps]
            if arm in chosen:
                colour = (DARK, MIDDLE, LIGHT)[k % 3]
                axis.plot([max(e.value, 1e-6) for e in lost[1:]], [e.value for e in gained[1:]], color=colour, linewidth=1, linestyle=("-", "--", ":")[k // 3])
                axis.errorbar(lost[-1].value, gained[-1].value, xerr=error_bars(lost[-1:]), yerr=error_bars(gained[-1:]), fmt=MARKERS[k], color=colour,
                              markeredgecolor="black", ecolor="grey", elinewidth=0.8, markersize=6.5, label=arm)
            rows += [{"arm": arm, "step": step, "metric": metric, "drop": d.value, "drop_low": d.low, "drop_high": d.high, "gain": g.value,
                      "gain_low": g.low, "gain_high": g.high, "saved": "", "saved_low": "", "saved_high": ""}
                     for step, d, g in zip(steps, lost, gained, strict=True)]
            if arm != TASK_ONLY:
                saved = mean_over_seeds(at_equal_gain(arms, metric, n, arm))
                rows[-1] |= {"saved": saved.value, "saved_low": saved.low, "saved_high": saved.high}
        axis.set_xscale("log")
        axis.set_xlabel(f"drop on the other topics\n({unit}; log scale)")
    axes[0].set_ylabel("gain: rise of P(task's fact)\n(higher learns more)")
    axes[0].set_title("Gain against drop: courses, and where they end", loc="left", fontsize=9)
    axes[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return keep(figure, "lab_gain_drop", rows)


def _ends(tables: Mapping[str, Rows], n: int, keep: Save, name: str, title: str, arms: Mapping[str, str], panels: Sequence[tuple[str, str]]) -> list[Path]:
    """Where some arms end (``arms``: name → label), in one panel a metric (``panels``: metric, label of its axis)."""
    last = max(row["step"] for row in tables["arms"])
    figure, axes = new_figure(2.4 + 2.9 * len(panels), 0.34 * len(arms) + 1.5, len(panels), sharey=True, squeeze=False)
    rows = []
    for axis, (metric, label) in zip(axes[0], panels, strict=True):
        for place, arm in enumerate(arms):
            values = column(tables["arms"], metric, n, arm=arm, step=last)
            effect = mean_over_seeds(values)
            axis.plot(values, place + np.linspace(-0.2, 0.2, n), linestyle="none", marker=".", markersize=4, color="0.6")
            axis.errorbar(effect.value, place, xerr=error_bars([effect]), fmt="o", markersize=5.5, color=MIDDLE, markeredgecolor="black", ecolor="black",
                          capsize=3, linewidth=1)
            rows.append(effect_row(effect, arm=arm, metric=metric))
        axis.set_xlabel(label)
        axis.grid(axis="y", color="0.9")
    axes[0][0].set_yticks(range(len(arms)), list(arms.values()))
    axes[0][0].invert_yaxis()
    axes[0][0].set_title(title, loc="left", fontsize=9)
    return keep(figure, name, rows)


def draw_external(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C8: forgetting with external data, by how far their style is from the base's."""
    arms = {"SA-SFT 0.5": "self-data", **{f"external {d}": f"external data, {d:.0%} of the way to a foreign style" for d in DISTANCES},
            "external, as varied": "external data, style as varied as the base's", TASK_ONLY: "the task alone"}
    panels = (("kl", "forgetting after as many steps\n(KL, nats/token)"), ("content", "… of what is said\n(KL, nats/response)"))
    return _ends(tables, n, keep, "lab_external", "What is mixed in, λ = ½ (dots: seeds)", arms, panels)


def draw_topic(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C9: forgetting of a topic that the self-data leave out."""
    arms = {TASK_ONLY: "the task alone", "SA-SFT without a topic": "SA-SFT without the topic", "SA-SFT 0.5": "SA-SFT"}
    panels = (("kl_dropped", "forgetting on that topic\n(KL, nats/token)"), ("content_dropped", "… of what is said\n(KL, nats/response)"))
    return _ends(tables, n, keep, "lab_topic", "A topic left out of the self-data (dots: seeds)", arms, panels)


def draw_entropy(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """C11: entropy of the model's answers after data of either sampler."""
    arms = {"own/old": "the base", "SA-SFT 0.5": "SA-SFT, exact sampler", "SA-SFT paper": "SA-SFT, the paper's sampler", TASK_ONLY: "the task alone"}
    return _ends(tables, n, keep, "lab_entropy", "Entropy after training, λ = ½ (dots: seeds)", arms, (("entropy", "entropy on the other topics (nats/token)"),))


def draw_phase(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """Where SA-SFT helps: coupling of style and content against capacity."""
    sweep = [row for row in tables["sweeps"] if row["sweep"] == "phase"]
    couplings, widths = sorted({r["coupling"] for r in sweep}), sorted({r["width"] for r in sweep})
    figure, axes = new_figure(8.6, 3.4, 2)
    rows = []
    for axis, (metric, unit) in zip(axes, (("kl", "nats/token"), ("content", "nats/response")), strict=True):
        grid = np.full((len(couplings), len(widths)), np.nan)
        for i, coupling in enumerate(couplings):
            for j, width in enumerate(widths):
                some = [r for r in sweep if r["coupling"] == coupling and r["width"] == width]
                values = at_equal_gain(some, metric, n, SA_SFT)
                effect = mean_over_seeds(values[np.isfinite(values)]) if np.isfinite(values).any() else Effect(np.nan, np.nan, np.nan)
                grid[i, j] = effect.value
                rows.append(effect_row(effect, metric=metric, unit=unit, coupling=coupling, width=width, seeds=int(np.isfinite(values).sum())))
        top = np.nanmax(np.abs(grid))
        image = axis.imshow(grid, origin="lower", aspect="auto", cmap="Greys", vmin=min(0.0, np.nanmin(grid)), vmax=top)
        for row in rows[-grid.size:]:
            i, j = couplings.index(row["coupling"]), widths.index(row["width"])
            axis.text(j, i, f"{row['value']:.2f}\n[{row['low']:.2f}, {row['high']:.2f}]", ha="center", va="center", fontsize=7,
                      color="white" if abs(row["value"]) > 0.6 * top else "black")
        axis.set_xticks(range(len(widths)), widths)
        axis.set_yticks(range(len(couplings)), couplings)
        axis.set_xlabel("width of the model")
        axis.set_ylabel("coupling of style to content")
        figure.colorbar(image, ax=axis, label=f"forgetting saved ({unit})")
        axis.set_title("KL of whole responses" if metric == "kl" else "KL of what is said", loc="left", fontsize=9)
    figure.suptitle("What SA-SFT (λ = ½) saves over the task alone, at equal gain", x=0.01, ha="left", fontsize=10)
    return keep(figure, "lab_phase", rows)


def draw_limits(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """Forgetting with and without self-data as every other thing is varied, after equally many steps and at equal gain."""
    sweep = [row for row in tables["sweeps"] if row["sweep"] != "phase"]
    last = max(row["step"] for row in sweep)
    names = list(dict.fromkeys(row["sweep"] for row in sweep))
    conditions = [(name, value) for name in names for value in sorted({r["value"] for r in sweep if r["sweep"] == name})]
    figure, axes = new_figure(8.6, 0.32 * len(conditions) + 1.3, 2, sharey=True)
    rows = []
    where = [[r for r in sweep if r["sweep"] == name and r["value"] == value] for name, value in conditions]
    for metric, unit in (("kl", "nats/token"), ("content", "nats/response")):
        for arm, colour, marker in ((TASK_ONLY, DARK, "o"), (SA_SFT, MIDDLE, "s")):
            found = [mean_over_seeds(column(some, metric, n, arm=arm, step=last)) for some in where]
            gains = [mean_over_seeds(column(some, "gain", n, arm=arm, step=last)).value for some in where]
            rows += [{**effect_row(e, varied=name, setting=value, quantity=arm, metric=metric, unit=unit), "gain": gain, "seeds": n}
                     for (name, value), e, gain in zip(conditions, found, gains, strict=True)]
            if metric == "kl":
                axes[0].errorbar([e.value for e in found], range(len(found)), xerr=error_bars(found), fmt=marker, color=colour, markeredgecolor="black",
                                 ecolor="black", capsize=2, linewidth=0.9, label=arm)
        saved = [at_equal_gain(some, metric, n, SA_SFT) for some in where]
        met = [values[np.isfinite(values)] for values in saved]  # some seeds never gain as much
        found = [mean_over_seeds(values) if len(values) else Effect(np.nan, np.nan, np.nan) for values in met]
        rows += [{**effect_row(e, varied=name, setting=value, quantity="saved at equal gain", metric=metric, unit=unit), "gain": "", "seeds": len(values)}
                 for (name, value), e, values in zip(conditions, found, met, strict=True)]
        if metric == "kl":
            axes[1].errorbar([e.value for e in found], range(len(found)), xerr=error_bars(found), fmt="D", color=LIGHT, markeredgecolor="black",
                             ecolor="black", capsize=2, linewidth=0.9)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("forgetting after equally many steps\n(KL, nats/token; log scale)")
    axes[1].axvline(0, color="black", linewidth=0.6)
    axes[1].set_xlabel("what SA-SFT saves over the task alone\nat equal gain (KL, nats/token)")
    axes[0].set_yticks(range(len(conditions)), [f"{name} {value:.4g}" for name, value in conditions])
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=7)
    axes[0].set_title("The task alone and SA-SFT (λ = ½) as one thing is varied", loc="left", fontsize=9)
    return keep(figure, "lab_limits", rows)


def draw_sampled(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """Drawn rows under Adam: what is forgotten, and what the recorder said of it."""
    drawn = tables["sampled"]
    last = max(row["step"] for row in drawn)
    names = list(dict.fromkeys(row["arm"] for row in drawn))
    figure, (left, right) = new_figure(8.4, 3.6, 2)
    found = [mean_over_seeds(column(drawn, "kl", n, arm=arm, step=last)) for arm in names]
    left.barh(range(len(names)), [e.value for e in found], color=MIDDLE, edgecolor="black", linewidth=0.6)
    left.errorbar([e.value for e in found], range(len(names)), xerr=error_bars(found), fmt="none", ecolor="black", capsize=2, linewidth=0.9)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel(f"forgetting after {last} steps (KL, nats/token)")
    left.set_title("Drawn rows, Adam, the package's trainer", loc="left", fontsize=9)
    moved = [row for row in drawn if row["step"] > 0]
    right.errorbar([r["kl"] for r in moved], [r["recorded_kl"] for r in moved], yerr=[1.96 * r["recorded_kl_error"] for r in moved], fmt="o", markersize=2.5,
                   color=DARK, ecolor="grey", elinewidth=0.7)
    ends = [min(r["kl"] for r in moved), max(r["kl"] for r in moved)]
    right.plot(ends, ends, color="black", linestyle="--", linewidth=0.8)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("KL over all responses (nats/token; log scale)")
    right.set_ylabel("KL that drift recorded on 256 rows")
    right.set_title("What was recorded on the way, beside what was there", loc="left", fontsize=9)
    return keep(figure, "lab_sampled", drawn)


def draw_calibration(tables: Mapping[str, Rows], n: int, keep: Save) -> list[Path]:
    """Every estimator against the exact value: bias, and coverage of its interval."""
    rows = tables["calibration"]
    figure, (left, right) = new_figure(9.6, 0.24 * len(rows) + 1.2, 2, sharey=True, gridspec_kw={"width_ratios": (1.2, 1)})
    for place, row in enumerate(rows):
        plain = row["estimator"].startswith(("uncorrected", "sampled log"))
        bias, error = row["bias"] / row["spread"], 1.96 * row["bias_error"] / row["spread"]
        left.errorbar(bias, place, xerr=error, fmt="s" if plain else "o", markersize=4.5, color=LIGHT if plain else DARK, markeredgecolor="black",
                      ecolor="black", capsize=2, linewidth=0.8)
        if row["coverage"] is not None:
            right.errorbar(row["coverage"], place, xerr=[[row["coverage"] - row["coverage_low"]], [row["coverage_high"] - row["coverage"]]],
                           fmt="s" if plain else "o", markersize=4.5, color=LIGHT if plain else DARK, markeredgecolor="black", ecolor="black", capsize=2, linewidth=0.8)
    left.axvline(0, color="black", linewidth=0.6)
    left.set_xscale("symlog", linthresh=1)
    left.set_yticks(range(len(rows)), [f"{r['quantity']}  ·  {r['estimator']}  ·  n = {r['rows']}" for r in rows], fontsize=6.5)
    left.invert_yaxis()
    left.set_xlabel("bias, in standard deviations of the estimate\n(symmetric log scale; squares: what others use)")
    right.axvspan(0.93, 0.97, color="0.85")
    right.axvline(0.95, color="black", linewidth=0.6, linestyle="--")
    right.set_xlabel("how often the 95 % interval covers the truth\n(band: 93 to 97 %)")
    left.set_title(f"Estimators against exact values ({min(r['repeats'] for r in rows)} to {max(r['repeats'] for r in rows)} repeats)", loc="left", fontsize=9)
    return keep(figure, "lab_calibration", rows)
