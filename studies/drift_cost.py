"""What one recording of a model's drift costs, for models of 10 million to a billion parameters.

    python -m studies.drift_cost

Every parameter's distance from θ₀ (``drift.parameter_drift``, L2 and relative) is taken of Llama-shaped float32 models with random
weights, with θ₀ held in memory and with θ₀ read from memory-mapped files. Needs 9 GB of memory and 4 GB of temporary disk; less
with ``--up_to``. Writes ``drift_cost`` (.png, .svg, .csv, .json) to ``--figures``.

Prediction, written before the first run: time is linear in the number of parameters, that is the slope on logarithmic
axes lies in 0.95 ... 1.05. It failed: every tensor costs some 0.1 ms whatever its size, which shows in small models, so time grows
more slowly than the parameters. The slope from a hundred million on was added after that, and is marked as such.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import drift
from sasft.versions import versions
from studies.figures import DARK, MIDDLE, error_bars, new_figure, save
from studies.stats import LEVEL, Effect, judge_range

SHAPES = ((256, 768, 8), (384, 1152, 12), (768, 2048, 12), (1024, 2816, 22), (2048, 5632, 19))  # hidden, intermediate, layers
VOCABULARY = 16_384
DRAWS = 4000
LINEAR, LARGE = (0.95, 1.05), 5e7
WAYS = {"memory": "θ₀ in memory", "files": "θ₀ in memory-mapped files"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m studies.drift_cost", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--up_to", type=float, default=2e9, help="largest model, in parameters")
    parser.add_argument("--repeats", type=int, default=7, help="recordings timed of every model")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="folder to write to")
    args = parser.parse_args(argv)
    models = [m for m in map(_config, SHAPES) if _size(m) <= args.up_to]
    if len(models) < 2:
        parser.error(f"--up_to must leave two models or more, got {args.up_to:.3g}; the smallest have "
                     f"{_size(_config(SHAPES[0])):,} and {_size(_config(SHAPES[1])):,} parameters")
    if args.repeats < 3:
        parser.error(f"--repeats must be at least 3, got {args.repeats}")
    args.figures.mkdir(parents=True, exist_ok=True)
    rows = [row for config in tqdm(models, desc="models", unit="model") for row in measured(config, args.repeats)]
    paths, verdicts = draw(rows, args.figures)
    for v in verdicts:
        print(f"{v['statement']}: {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}], {v['verdict']}")
    print("\n".join(map(str, paths)))
    return 0


def measured(config: LlamaConfig, repeats: int) -> Iterator[dict[str, Any]]:
    """Seconds of every recording of one model, a row each."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    n = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for way, reference in (("files", drift.Reference.open(folder)), ("memory", drift.Reference.snapshot(model))):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.001)
            drift.parameter_drift(model, reference)  # the first one reads files from disk
            for repeat in range(repeats):
                began = time.perf_counter()
                drift.parameter_drift(model, reference)
                yield {"parameters": n, "reference": way, "repeat": repeat, "seconds": time.perf_counter() - began}


def slope(parameters: NDArray[np.float64], seconds: NDArray[np.float64]) -> Effect:
    """Slope of log time over log parameters through the medians of ``seconds`` [models, repeats]; bootstrap over repeats.

    >>> print(slope(np.array([1e6, 1e7, 1e8]), np.array([[1.0] * 3, [10.0] * 3, [100.0] * 3])))
    1.000 [1.000, 1.000]
    """
    x = np.log(parameters) - np.log(parameters).mean()

    def fitted(times: NDArray[np.float64]) -> NDArray[np.float64]:
        return x @ np.log(np.median(times, 1)) / (x @ x)

    drawn = np.random.default_rng(0).integers(seconds.shape[1], size=(DRAWS, *seconds.shape))
    draws = [fitted(np.take_along_axis(seconds, columns, 1)) for columns in drawn]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Effect(float(fitted(seconds)), float(low), float(high))


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """The figure, and whether time is linear in the number of parameters."""
    figure, axis = new_figure(5.6, 4.0)
    sizes = np.array(sorted({r["parameters"] for r in rows}), dtype=float)
    verdicts = []
    for way, colour, marker in (("memory", DARK, "o"), ("files", MIDDLE, "s")):
        seconds = np.array([[r["seconds"] for r in rows if r["parameters"] == n and r["reference"] == way] for n in sizes])
        middle = np.median(seconds, 1)
        spread = [Effect(m, s.min(), s.max()) for m, s in zip(middle, seconds, strict=True)]
        axis.errorbar(sizes, middle, yerr=error_bars(spread), fmt=marker, color=colour, capsize=3, label=WAYS[way])
        rate = middle[-1] / sizes[-1]
        axis.plot(sizes, rate * sizes, color=colour, linewidth=0.8, linestyle="--" if way == "files" else "-",
                  label=f"{rate * 1e9:.2g} s per 10⁹ parameters, as the largest takes")
        for chosen, which in ((sizes > 0, "all models"), (sizes > LARGE, "models of more than 50 M, added after the first run")):
            if chosen.sum() < 2:
                continue
            found = slope(sizes[chosen], seconds[chosen])
            verdicts.append({
                "claim": "none", "statement": f"slope of log time over log parameters, {WAYS[way]}, {which}", "value": found.value,
                "low": found.low, "high": found.high, "predicted": LINEAR, "verdict": judge_range(found, *LINEAR)})
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("parameters (float32)")
    axis.set_ylabel("time of one recording (s)\nmedian, smallest and largest")
    axis.set_title("Time of one recording of a model's drift", loc="left")
    axis.legend(frameon=False, fontsize=8)
    provenance = {"threads": torch.get_num_threads(), "repeats": len(rows) // (2 * len(sizes)), "versions": versions()}
    return save(figure, folder, "drift_cost", rows, verdicts, provenance), verdicts


def _config(shape: tuple[int, int, int]) -> LlamaConfig:
    hidden, intermediate, layers = shape
    return LlamaConfig(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                       num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=True)


def _size(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config).parameters())


if __name__ == "__main__":
    sys.exit(main())
