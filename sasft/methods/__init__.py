"""Fine-tuning methods under one roof: each a small class with its source, its equation and its options.

>>> from sasft.methods import method
>>> method("sft").describe()
{'name': 'sft'}
"""

import difflib
import shlex
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from sasft.errors import UsageError
from sasft.methods import (
    constraints,
    divergence,
    external,
    grads,
    lfu,
    penalties,
    perturbation,
    rewriting,
    selection,
    spin,
    synthesis,
    weighting,
)
from sasft.methods.base import Batch, Costs, Method, Objective, Scored, Workshop, of_sources, response_loss, score

__all__ = ["METHODS", "Batch", "Costs", "Method", "Objective", "Scored", "Workshop", "method", "of_sources", "parse_method",
           "response_loss", "score"]

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (
    Method,
    constraints.SaSft, external.External, constraints.Freeze, constraints.Lora, constraints.LowLearningRate, constraints.WiseFt,
    penalties.L2Sp, penalties.Ewc,
    divergence.KlSelf, divergence.KlTask, divergence.OnlineReplay,
    weighting.Stm, weighting.Dft, weighting.Asft, weighting.Ual,
    lfu.Lfu, spin.Spin,
    selection.SLearnLlm, selection.Improved, grads.Grads, perturbation.Perturbed,
    rewriting.Rewriting, synthesis.Ssr, synthesis.SelfGuide,
)}
"""Every method by its name."""


def method(name: str, **options: Any) -> Method:
    """The method of this name with these options.

    Raises :class:`UsageError` for a name or an option that there is not, and says to which methods an option belongs.
    """
    return _kind(name, options)(**options)


def parse_method(name: str, text: str = "") -> Method:
    """As :func:`method`, with the options as text: ``name=value`` pairs with blanks between them.

    >>> parse_method("l2-sp", "weight=0.5").describe()
    {'name': 'l2-sp', 'weight': 0.5}
    """
    given: dict[str, str] = {}
    for part in shlex.split(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"options of a method are given as name=value with blanks between them, got {part!r}")
        given[key] = value
    kind = _kind(name, given)
    return kind(**{key: _value(kind, key, value) for key, value in given.items()})


def _kind(name: str, options: Iterable[str]) -> type[Method]:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no method {name!r}.{guess} There are: {', '.join(METHODS)}")
    takes = {other: [f.name for f in fields(kind)] for other, kind in METHODS.items()}
    for option in options:
        if option not in takes[name]:
            owners = [other for other, names in takes.items() if option in names]
            whose = f"; it is an option of {', '.join(owners)}" if owners else ""
            own = ", ".join(takes[name]) or "none"
            raise UsageError(f"the method {name} has no option {option!r}{whose}. Its options: {own}")
    return METHODS[name]


def _value(kind: type[Method], key: str, text: str) -> Any:
    hint = get_type_hints(kind)[key]
    types = [t for t in get_args(hint) if isinstance(t, type) and t is not type(None)] or [hint]
    optional = type(None) in get_args(hint)
    if optional and text.lower() == "none":
        return None
    if types[0] is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{key} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return types[0](text) if types[0] in (int, float) else text
    except ValueError:
        raise UsageError(f"{key} must be {'a whole number' if types[0] is int else 'a number'}, got {text!r}") from None
