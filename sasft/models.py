"""Chat models by one name: an embedded model, a local folder, or a hub id with its revision."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from drift.names import parameters
from sasft.chat import Chat
from sasft.embedded import EMBEDDED, embedded_folder
from sasft.errors import UsageError

_ADAPTER = "adapter_config.json"
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
_HUB_COPIES = ["*/*", "consolidated*"]  # the same weights in other formats


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    r"""LoRA adapters (arXiv 2106.09685): :math:`W = W_0 + \frac{\alpha}{r} B A`, first ``B = 0``.

    ``target_modules``: names of the layers that get one, as PEFT takes them; ``all-linear`` is
    every linear layer but the vocabulary head.
    """

    r: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UsageError(f"r (the rank of the adapters) must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must lie in [0, 1), got {self.dropout}")


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    lora: LoraSettings | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    attention: str | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    ``name``: see :func:`resolve`; a folder that holds a LoRA adapter brings its base model along
    and stays trainable. ``lora`` adds adapters, drawn from ``seed`` alone. ``device``: a GPU if
    there is one, unless told. ``attention``: an implementation as transformers names it; None takes
    its choice. (On a CPU and rows of about a hundred tokens, ``eager`` trains a third faster than
    ``sdpa``; its memory grows with the square of the length.) The tokenizer's ``pad_token`` is one that ends no turn
    (:class:`sasft.chat.Chat`).

    Raises :class:`UsageError` if the name leads nowhere, if the hub cannot be reached, if the model
    cannot be loaded, if it has no usable chat template, or if no layer matches ``target_modules``.
    """
    folder = resolve(name, revision=revision)
    adapter = folder / _ADAPTER
    base = _base_of(adapter) if adapter.exists() else folder
    with _loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = Chat(tokenizer).pad_id  # checks the template before weights are read
    with _loading(name):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, output_loading_info=True, attn_implementation=attention)
        if found["missing_keys"]:  # transformers would go on with random values in their place
            raise ValueError(f"its files lack the weights {sorted(found['missing_keys'])}")
        if adapter.exists():
            model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    if lora is not None:
        if adapter.exists():
            raise UsageError(f"{name} has a LoRA adapter already, so lora must be None; to start "
                             f"a new one, load its base model {base}")
        model = with_adapters(model, lora, seed)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def resolve(name: str, *, revision: str | None = None) -> Path:
    """The folder of a model's files, fetched first where needed.

    ``name`` is, in this order: an embedded model (:data:`sasft.embedded.EMBEDDED`); a local folder
    with a ``config.json``, or one with a LoRA adapter; a hub id ``org/name``, of which ``revision``
    names a branch, tag or commit. Without a connection, a copy in the local hub cache will do.

    Raises :class:`UsageError` that says which of the three was tried and what is wrong.
    """
    folder = Path(name).expanduser()
    if revision is not None and (name in EMBEDDED or folder.exists()):
        raise UsageError(f"revision={revision!r} is for hub models, but {name} is "
                         f"{'embedded' if name in EMBEDDED else 'a local folder'}; leave it out")
    if name in EMBEDDED:
        return embedded_folder(name)
    if folder.exists():
        if not any((folder / file).exists() for file in ("config.json", _ADAPTER)):
            raise UsageError(f"{folder} holds no model: neither config.json nor {_ADAPTER} is in "
                             "it; name the folder that save_pretrained has written")
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _from_hub(name, revision)
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.4)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"there is no model {name!r}.{guess} A model is an embedded one "
                     f"({', '.join(EMBEDDED)}), a folder with a config.json, or a hub id "
                     "(org/name)")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 that says which weights these are, whatever wraps the model and wherever it lies.

    It runs over every parameter's canonical name, dtype, shape and bytes, in the order of names,
    tied parameters once (0.3 s for 135M parameters in fp32). LoRA adapters count unless all their
    ``B`` are zero, when they change nothing: a model with fresh adapters hashes as its base.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> weights_hash(a) == weights_hash(b)
    False
    >>> _ = b.load_state_dict(a.state_dict())
    >>> weights_hash(a) == weights_hash(b)
    True
    """
    found = parameters(model)
    if not any(bool(p.any()) for name, p in found.items() if "lora_B." in name):
        found = {name: p for name, p in found.items() if ".lora_" not in name}
    total = hashlib.sha256()
    for name in sorted(found):
        tensor = found[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _from_hub(name: str, revision: str | None) -> Path:
    at = f"{name} at revision {revision}" if revision else name
    local = f"give a local folder, or use an embedded model ({', '.join(EMBEDDED)})"
    try:
        return Path(snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES))
    except LocalEntryNotFoundError as error:
        raise UsageError(f"{at} is no local folder, is not in the local hub cache, and the hub "
                         f"cannot be reached; connect, {local}") from error
    except GatedRepoError as error:
        raise UsageError(f"the hub gives {at} to registered users only; accept its terms there and "
                         f"log in (hf auth login), {local}") from error
    except RevisionNotFoundError as error:
        raise UsageError(f"the hub has no revision {revision!r} of {name}; name a branch, tag or "
                         "commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(f"{name} is neither a local folder nor a model on the hub that you can "
                         f"see; check its name, {local}") from error


def _base_of(adapter: Path) -> Path:
    """The folder of an adapter's base model, which it names by the path that it had when saved."""
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    name = base if Path(base).exists() or Path(base).name not in EMBEDDED else Path(base).name
    try:
        return resolve(name)
    except UsageError as error:
        raise UsageError(f"{adapter} is of an adapter for the model {base}, which cannot be found: "
                         f"{error}") from error


def with_adapters(model: nn.Module, lora: LoraSettings, seed: int) -> nn.Module:
    """The model inside a PEFT model, with new adapters drawn from ``seed`` alone.

    Raises :class:`UsageError` if no layer matches ``target_modules``.
    """
    targets = lora.target_modules
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets))
    # PEFT draws A from torch's global generator, which is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(f"target_modules={targets!r} do not fit the model: {error}") from error


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Load without progress bars (it takes a second or two); say in a sentence what went wrong."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(f"{name} cannot be loaded: {error}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
