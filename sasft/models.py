"""Chat models by one name: an embedded model, a local folder, or a hub id with its revision."""

import difflib
import hashlib
import json
import re
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from drift.names import parameters
from sasft.embedded import EMBEDDED, embedded_folder, verify_built
from sasft.errors import UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    r"""LoRA adapters: :math:`W_0 + \frac{\alpha}{r} BA` with ``B = 0`` at the start.

    ``targets``: names of the layers to adapt, or ``all-linear`` for every linear layer but the head.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"the LoRA rank must be at least 1, got {self.rank}")


def load_model(name: str, *, revision: str | None = None, lora: LoraSettings | None = None, seed: int = 0,
               dtype: torch.dtype = torch.float32, device: str | torch.device | None = None,
               ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, with LoRA adapters if asked for.

    ``name``: an embedded model (``smollm2-135m-instruct``), a folder that holds a ``config.json``, or a hub id ``org/name``, for
    which ``revision`` names a commit, tag or branch. ``seed`` draws the adapters. ``device``: by default a GPU if there is one.

    Raises :class:`UsageError` for a name that is none of the three, and for a hub that can't be reached.
    """
    place = _resolve(name, revision)
    # Asked first, since the hub's client retries for most of a minute before it gives up.
    offline = isinstance(place, str) and not _hub_answers()
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(place, revision=revision, dtype=dtype, local_files_only=offline)
            tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, local_files_only=offline)
    except OSError as error:
        raise _explained(name, revision, place, offline, error) from error
    if lora is not None:
        # PEFT draws A from the global generator; the caller's state is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
            try:
                model = get_peft_model(model, LoraConfig(
                    r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
                    task_type="CAUSAL_LM"))
            except ValueError as error:
                raise UsageError(f"LoRA targets {lora.targets!r} don't fit {name}: {error}") from None
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def _resolve(name: str, revision: str | None) -> Path | str:
    """What transformers is to load: a folder, or a hub id."""
    if name in EMBEDDED:
        if revision:
            raise UsageError(f"revision={revision!r} is for hub models; {name} is embedded and has one fixed version")
        folder = embedded_folder(name)
        _verify_once(folder)
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(f"the folder {path} holds no config.json, so it is no model; name the folder that "
                             "save_pretrained wrote")
        return path
    if _HUB_ID.fullmatch(name):
        return name
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.4)
    raise UsageError(f"unknown model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ";")
                     + f" There are: the embedded models {', '.join(EMBEDDED)}; a folder with a config.json; a hub id such as "
                       "HuggingFaceTB/SmolLM2-135M-Instruct")


@lru_cache
def _verify_once(folder: Path) -> None:
    verify_built(folder, json.loads((folder / "sasft.json").read_text(encoding="utf-8")))


def _hub_answers(timeout: float = 5.0) -> bool:
    """Whether the model hub answers at all (any HTTP status counts); honours HF_HUB_OFFLINE and proxies."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _explained(name: str, revision: str | None, place: Path | str, offline: bool, error: OSError) -> UsageError:
    at = f" at revision {revision}" if revision else ""
    if isinstance(place, Path):
        return UsageError(f"the model in {place} can't be loaded: {error}")
    if offline:
        return UsageError(f"the model hub can't be reached to load {name}{at}, and no copy of it is in the local cache: connect, "
                          f"give a local folder, or use an embedded model ({', '.join(EMBEDDED)})")
    return UsageError(f"the hub has no model {name}{at} that can be loaded here: {str(error).splitlines()[0]}")


@contextmanager
def _quiet():
    """No progress bars and no notes while a finished model is read: it takes a second or two."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter's canonical name, type, shape and bytes: which weights these are.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> weights_hash(a) == weights_hash(b)
    False
    >>> _ = b.load_state_dict(a.state_dict()); weights_hash(a) == weights_hash(b)
    True
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters(model).items()):
        data = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.view(torch.uint8).numpy().data if data.dim() else data.reshape(1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
