"""One name for every parameter, whatever wrapped the model."""

import re

from torch import nn

# What DDP, torch.compile, FSDP, checkpoint wrappers and PEFT put into parameter names.
# PEFT nests LoRA on two parameters of one module (stacked experts): the inner factors keep their base_layer, which tells them apart.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer(?!(\.base_layer)*\.lora_)|original_module"
                       r"|modules_to_save\.[^.]+|token_adapter)(?=\.|$)")
_PREFIXES = re.compile(r"^(module\.|base_model\.model\.)+")


def canonical_name(name: str) -> str:
    """A parameter's or module's name in the unwrapped model.

    >>> canonical_name("module.base_model.model.model.layers.3.mlp.up_proj.base_layer.weight")
    'model.layers.3.mlp.up_proj.weight'
    >>> canonical_name("_orig_mod.lm_head.weight")
    'lm_head.weight'
    """
    stripped = _WRAPPERS.sub("", name).lstrip(".")
    return _PREFIXES.sub("", stripped)


def layer_index(name: str) -> int | None:
    """The block that a parameter belongs to: the first integer in its path; None for embeddings, final norm, head.

    >>> layer_index("model.layers.12.self_attn.q_proj.weight"), layer_index("lm_head.weight")
    (12, None)
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by canonical name; tied parameters under the first name they have.

    Of a module that PEFT trains as a whole (``modules_to_save``) that is the copy in training, not the original that it keeps beside it.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    >>> list(parameters(model))
    ['0.weight', '0.bias', '1.weight']

    Raises ``TypeError`` for what is no module, ``ValueError`` if two parameters come to one name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[str, nn.Parameter] = {}
    named = list(model.named_parameters())
    copies = {canonical_name(name): name for name, p in sorted(named, key=lambda x: x[1].requires_grad) if ".modules_to_save." in f".{name}"}
    for name, parameter in named:
        canonical = canonical_name(name)
        if copies.get(canonical, name) != name:
            continue
        if canonical in found:
            raise ValueError(f"two parameters share the canonical name {canonical!r} (the second is {name!r}); "
                             "rename one of the modules")
        found[canonical] = parameter
    return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by canonical name.

    Raises ``ValueError`` if there is none, or if some have no values (they are on the meta device).

    >>> model = nn.Linear(2, 3)
    >>> _ = model.bias.requires_grad_(False)
    >>> list(trainable(model))
    ['weight']
    """
    found = {name: p for name, p in parameters(model).items() if p.requires_grad}
    if not found:
        raise ValueError("the model has no trainable parameter, so there is no gradient and no drift; set requires_grad on some")
    empty = [name for name, p in found.items() if p.is_meta]
    if empty:
        raise ValueError(f"{len(empty)} parameters are on the meta device and have no values ({', '.join(empty[:3])}); load the weights first")
    return found


def tied(model: nn.Module) -> dict[str, str]:
    """For every further name of a shared parameter, the name that stands for it.

    >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
    >>> model[1].weight = model[0].weight
    >>> tied(model)
    {'1.weight': '0.weight'}
    """
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = canonical_name(name)
        if first.setdefault(id(parameter), canonical) != canonical:
            aliases[canonical] = first[id(parameter)]
    return aliases
