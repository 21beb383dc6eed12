"""Models by name, adapters by seed, and a hash that knows the same weights again."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from drift.names import parameters
from sasft import models
from sasft.errors import UsageError
from sasft.models import LoraSettings, load_model, resolve, weights_hash
from tests.sasft.tiny_chat import CHATML, tokenizer


def refused(message: str):
    return pytest.raises(UsageError, match=message)


def save_model(folder: Path, **tokens) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )).save_pretrained(folder)
    tokenizer(**{"template": CHATML, **tokens}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def load(name: Path | str, **kwargs) -> nn.Module:
    return load_model(str(name), device="cpu", **kwargs)[0]


def test_a_local_folder(folder):
    model, tokens = load_model(str(folder), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert tokens.chat_template == CHATML and tokens.pad_token_id == 0
    expected = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_tokenizer_s_padding_ends_no_turn(tmp_path):
    folder = save_model(tmp_path / "model", pad="<|im_end|>")
    assert load_model(str(folder), device="cpu")[1].pad_token == "<|endoftext|>"


def test_loading_is_quiet_and_leaves_progress_bars_as_they_were(folder, capfd):
    transformers_logging.enable_progress_bar()
    load(folder)
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled()


def test_an_embedded_name_leads_to_its_folder(folder, monkeypatch):
    monkeypatch.setattr(models, "embedded_folder", lambda name: folder / name)
    assert resolve("smollm2-135m-instruct") == folder / "smollm2-135m-instruct"
    with refused(r"revision='v2' is for hub models, but smollm2-135m-instruct is embedded; leave"):
        resolve("smollm2-135m-instruct", revision="v2")
    with refused(r"revision='v2' is for hub models, but .* is a local folder; leave it out"):
        resolve(str(folder), revision="v2")


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UsageError) as caught:
        resolve("SmolLM2-135M")
    assert str(caught.value) == (
        "there is no model 'SmolLM2-135M'. Did you mean 'smollm2-135m-instruct'? A model is an "
        "embedded one (smollm2-135m-instruct), a folder with a config.json, or a hub id (org/name)")
    with refused(r"there is no model 'gpt-4'\. A model is"):
        resolve("gpt-4")
    with refused(r"holds no model: neither config\.json nor adapter_config\.json is in it"):
        resolve(str(tmp_path))


def test_a_hub_id_is_fetched_at_its_revision(folder, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(models, "snapshot_download", download)
    assert resolve("org/name", revision="v2") == folder
    assert parameters(load("org/name")).keys() == parameters(load(folder)).keys()
    assert asked == [("org/name", "v2"), ("org/name", None)]


def test_a_hub_id_without_a_connection(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as caught:
        load_model("no-such-org/no-such-model", revision="v2")
    assert str(caught.value) == (
        "no-such-org/no-such-model at revision v2 is no local folder, is not in the local hub "
        "cache, and the hub cannot be reached; connect, give a local folder, or use an embedded "
        "model (smollm2-135m-instruct)")


@pytest.mark.parametrize(("kind", "message"), [
    (errors.RepositoryNotFoundError, r"org/name is neither a local folder nor a model on the hub"),
    (errors.GatedRepoError, r"gives org/name at revision v2 to registered users only; .*hf auth"),
    (errors.RevisionNotFoundError, r"the hub has no revision 'v2' of org/name; name a branch"),
])
def test_what_the_hub_refuses(monkeypatch, kind, message):
    def refuse(*args, **kwargs):
        raise kind.__new__(kind)  # its __init__ wants a response of the hub's own HTTP library

    monkeypatch.setattr(models, "snapshot_download", refuse)
    with refused(message):
        resolve("org/name", revision="v2")


def test_folders_that_cannot_be_loaded(tmp_path):
    without = save_model(tmp_path / "no-template", template=None)
    with refused(r"the tokenizer of '.*no-template' has no chat template"):
        load(without)

    torn = save_model(tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"half")
    with refused(r"torn cannot be loaded: "):
        load(torn)

    lacking = save_model(tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with refused(r"lacking cannot be loaded: its files lack the weights "
                                         r"\['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        load(lacking)

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with refused(r"empty cannot be loaded: "):
        load(empty)


def test_adapters_depend_on_their_seed_alone_and_begin_at_the_base(folder):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load(folder, lora=LoraSettings(r=4, alpha=8.0), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (load(folder, lora=LoraSettings(r=4, alpha=8.0), seed=s) for s in (3, 4))

    def draws(model: nn.Module) -> torch.Tensor:
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(draws(first), draws(again))
    assert not torch.equal(draws(first), draws(other))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, load(folder)(ids).logits)
    assert not first.training
    trained = [n for n, p in first.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2  # A and B, of 7 linear layers, in 2 blocks
    q = first.base_model.model.model.layers[0].self_attn.q_proj
    assert (q.r["default"], q.scaling["default"]) == (4, 2.0)


def test_adapters_on_chosen_layers(folder):
    model = load(folder, lora=LoraSettings(target_modules=("q_proj",)))
    assert {n.split(".")[-4] for n, _ in model.named_parameters() if "lora_" in n} == {"q_proj"}
    with refused(r"target_modules=\('nothing',\) do not fit the model: .*nothing"):
        load(folder, lora=LoraSettings(target_modules=("nothing",)))


@pytest.mark.parametrize(("settings", "message"), [
    ({"r": 0}, r"r \(the rank of the adapters\) must be at least 1, got 0"),
    ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
])
def test_impossible_adapters(settings, message):
    with refused(message):
        LoraSettings(**settings)


@pytest.fixture
def trained(folder) -> peft.PeftModel:
    model = load(folder, lora=LoraSettings(r=2), seed=1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


def test_a_saved_adapter_brings_its_base_along(folder, trained, tmp_path, monkeypatch):
    saved = tmp_path / "adapter"
    trained.save_pretrained(saved)
    tokenizer().save_pretrained(saved)
    model = load(saved)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained(ids).logits)
    assert any(p.requires_grad for p in model.parameters())
    with refused(rf"has a LoRA adapter already, so lora must be None; .* model {folder}"):
        load(saved, lora=LoraSettings())

    moved = folder.rename(tmp_path / "elsewhere")
    with refused(r"is of an adapter for the model .*model, which cannot be found: there is no"):
        load(saved)

    # An embedded model is found again by its name, wherever the cache was back then.
    config = json.loads((saved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/another/cache/models/smollm2-135m-instruct"
    (saved / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(models, "embedded_folder", lambda name: moved)
    assert weights_hash(load(saved)) == weights_hash(trained)


def test_the_hash_knows_the_same_weights_again(folder, trained, tmp_path):
    model = load(folder)
    base = weights_hash(model)
    shutil.copytree(folder, tmp_path / "copy")
    assert weights_hash(load(tmp_path / "copy")) == base
    assert weights_hash(load(folder, lora=LoraSettings(), seed=5)) == base
    assert weights_hash(trained) != base
    assert weights_hash(trained.merge_and_unload()) != base
    assert weights_hash(load(folder, dtype=torch.bfloat16)) != base
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert weights_hash(model) != base


def test_the_hash_sees_names_and_shapes():
    a = nn.Sequential(nn.Linear(4, 2, bias=False))
    b = nn.Sequential(nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        b[0].weight.copy_(a[0].weight.reshape(4, 2))
    renamed = nn.ModuleDict({"other": a[0]})
    scalar = nn.Module()
    scalar.weight = nn.Parameter(torch.tensor(1.0))
    assert len({weights_hash(m) for m in (a, b, renamed, scalar)}) == 4
