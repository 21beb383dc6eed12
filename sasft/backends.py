"""Engines that sample: transformers in this process (padded or refilled batches), or vLLM (an extra)."""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

from sasft.errors import UsageError
from sasft.sampling import Sample, Sampler

Backend = Literal["padded", "refilled", "vllm"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def vllm_engine(name: str, *, revision: str | None = None, dtype: str = "bfloat16", **options: Any) -> Any:
    """A vLLM engine for the model ``name`` (folder or hub id), to be a :class:`sasft.writing.Writer`'s model.

    ``options`` go to ``vllm.LLM`` (``tensor_parallel_size``, ``max_model_len``, ``gpu_memory_utilization``, ...).
    Log-probabilities are asked for as the model has them, before temperature and truncation.

    An engine has its own kernels and so, strictly, is another model than the one that is trained (docs/theory.md F2d).

    Raises :class:`UsageError` if vLLM is not installed.
    """
    return _vllm().LLM(model=name, revision=revision, dtype=dtype, logprobs_mode="raw_logprobs", **options)


def vllm_sample(engine: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampler: Sampler, *, stop_id: int,
                greedy: bool = False) -> list[Sample]:
    """One response for every prompt from a vLLM engine, which batches by itself (cf. :func:`sasft.sampling.sample`).

    Every request has the seed of its row. A response ends at ``stop_id`` alone: what the engine's own settings take for an end is
    ignored, since the loss has the template's end of turn. Raises :class:`UsageError` if vLLM is not installed, or if the engine
    gives log-probabilities of other tokens than it drew.
    """
    if len(prompts) != len(seeds):
        raise UsageError(f"seeds must have one entry a prompt: got {len(seeds)} for {len(prompts)} prompts")
    vllm = _vllm()
    params = [vllm.SamplingParams(
        temperature=0.0 if greedy else sampler.temperature, top_p=1.0 if greedy else sampler.top_p,
        max_tokens=sampler.max_new_tokens, seed=seed >> 1,  # engines hold seeds in signed 64 bits
        stop_token_ids=[stop_id], ignore_eos=True, logprobs=0, detokenize=False) for seed in seeds]
    outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    return [_as_sample(output.outputs[0], stop_id) for output in outputs]


def _as_sample(completion: Any, stop_id: int) -> Sample:
    ids = list(completion.token_ids)
    finished = completion.finish_reason == "stop"
    try:
        logprobs = tuple(found[token].logprob for token, found in zip(ids, completion.logprobs, strict=True))
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"the vLLM engine gave {len(ids)} tokens but not the log-probability of each; make it with vllm_engine, "
                         "and check that its version is supported") from None
    return Sample(tuple(ids[:-1] if finished and ids[-1:] == [stop_id] else ids), logprobs, finished)


@cache
def vllm_version() -> str:
    """Version of the vLLM that is installed, or "not installed"."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return "not installed"


def _vllm() -> Any:
    try:
        import vllm  # heavy, and only for GPUs: an extra
    except ImportError as error:
        raise UsageError("backend 'vllm' needs the package vllm, which is not installed; pip install vllm on a machine with a "
                         "GPU, or choose the backend 'refilled'") from error
    return vllm
