"""A PEFT adapter checked against the served model (pure: no torch, no sglang, no peft).

SGLang ignores what it does not know: saved heads and norms, factors and ranks by module, weights of
other layers; such an adapter would not answer as under PEFT.  Here it is the same for both, or
refused by the name of the field or weight.  The rules are those of PEFT 0.21.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_harli.architectures import BY_NAME, FUSED, LINEARS
from sglang_harli.errors import UnsupportedError

PREFIX = "base_model.model."
_MARKS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_WEIGHT = re.compile(r"(?P<module>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_IN_LAYER = re.compile(r"model\.layers\.(?P<index>\d+)\.(?P<inner>.+)")
_ANY_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OUTSIDE = {"model.embed_tokens": "embed_tokens", "lm_head": "lm_head", "unembed_tokens": "lm_head"}
# Fields of adapter_config.json by which PEFT computes something else than B·A, and what they are.
_OTHER_MATH = {
    "modules_to_save": "whole modules saved beside the LoRA weights",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "trainable_token_indices": "trained embeddings of single tokens",
    "target_parameters": "LoRA of bare parameters",
    "layer_replication": "layers used more than once",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# For these PEFT takes a part out of the base's weights when it loads the adapter.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The served model as adapters name it.

    Attributes:
        layers: how many decoder layers it has.
        linears: path within a layer, such as ``self_attn.q_proj`` -> (inputs, outputs) in the
            model's own sizes; empty for an architecture whose layers are not known by name.
        embedding: (tokens, width).
    """

    layers: int
    linears: Mapping[str, tuple[int, int]]
    embedding: tuple[int, int] = (0, 0)


def model_of(config: Any) -> Model:
    """What adapters may name, from the model's transformers config, as loaded or as SGLang padded
    it; of an architecture that is not in our table SGLang's own names are checked."""
    layers = int(config.num_hidden_layers)
    if next(iter(getattr(config, "architectures", None) or [""])) not in BY_NAME:
        return Model(layers=layers, linears={})
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    inner = getattr(config, "original_intermediate_size", None) or config.intermediate_size
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    linears = {f"{place}.{name}": sizes[name] for name, place in LINEARS.items()}
    return Model(layers=layers, linears=linears, embedding=(config.vocab_size, hidden))


# ------------------------------------------------------------------ adapter_config.json
def checked_config(config: Any) -> dict[str, Any]:
    """The config with a whole number as ``r``, if it is plain LoRA with one rank and one alpha.
    UnsupportedError names the field, its value and what is accepted."""
    if not isinstance(config, dict):
        raise UnsupportedError(f"adapter_config.json holds a {type(config).__name__}, not an object")
    missing = [key for key in ("r", "lora_alpha", "target_modules", "peft_type") if config.get(key) is None]
    if missing:
        raise UnsupportedError(f"the adapter's config lacks {', '.join(missing)}")
    if str(config["peft_type"]).upper() != "LORA":
        raise UnsupportedError(f"peft_type {config['peft_type']!r} is not served; accepted: LORA")
    rank = _number(config, "r")
    if rank < 1 or rank != int(rank):
        raise UnsupportedError(f"r is {rank:g}; accepted: whole numbers from 1")
    alpha = _number(config, "lora_alpha")
    for key, common in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or any(value != common for value in pattern.values()):
            raise UnsupportedError(f"{key} is not served: use one rank and alpha for all modules")
    for key, what in _OTHER_MATH.items():
        if config.get(key):
            raise UnsupportedError(f"{key} ({what}) is not served; accepted: plain LoRA weights")
    _check_start(config.get("init_lora_weights"))
    _check_targets(config)
    return {**config, "r": int(rank)}


def _number(config: dict[str, Any], key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnsupportedError(f"{key} is {value!r}; accepted: numbers")
    return value


def _check_start(start: Any) -> None:
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise UnsupportedError(
            f"init_lora_weights is {start!r}, for which PEFT changes the base's weights: save the adapter again "
            "with path_initial_model_for_weight_conversion, as a plain LoRA"
        )


def _check_targets(config: dict[str, Any]) -> None:
    """Names only: a pattern is a program that would run on the scheduler's thread."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if isinstance(targets, str) and targets not in ("all-linear", "all"):
        raise UnsupportedError(
            f"target_modules is the pattern {targets!r}; accepted: a list of module names, or all-linear"
        )
    if not isinstance(targets, str) and (not _is_names(targets) or not targets):
        raise UnsupportedError(
            f"target_modules is {targets!r:.200}; accepted: a list of module names, or all-linear"
        )
    if not _is_names(excluded):
        raise UnsupportedError(f"exclude_modules is {excluded!r:.200}; accepted: a list of module names")
    layers = config.get("layers_to_transform") or []
    if any(not isinstance(index, int) for index in (layers if isinstance(layers, list) else [layers])):
        raise UnsupportedError(f"layers_to_transform is {layers!r:.200}; accepted: a list of layers' numbers")
    patterns = config.get("layers_pattern") or []
    for name in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name):
            raise UnsupportedError(f"layers_pattern has {name!r:.200}; accepted: names such as layers")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def check_limits(config: Mapping[str, Any], max_rank: int | None, served: Iterable[str] | None) -> None:
    """Check a checked config against what this server takes.

    Args:
        max_rank: of SGLang's memory pool; None: what the adapters given at start need.
        served: modules that the pool holds, in PEFT's or SGLang's names; None as above.

    UnsupportedError names the value, the limit and the flag that raises it.
    """
    rank = config["r"]
    if max_rank is not None and rank > max_rank:
        raise UnsupportedError(
            f"r is {rank}, and this server takes at most {max_rank}: start it with --max-lora-rank {rank}"
        )
    targets = config["target_modules"]
    if served is None or isinstance(targets, str):
        return
    held = {FUSED.get(name, name) for name in served}
    for name in targets if "all" not in held else ():
        leaf = name.rpartition(".")[2]
        if FUSED.get(leaf, leaf) not in held and (leaf != "unembed_tokens" or "lm_head" not in held):
            raise UnsupportedError(_not_served(f"target_modules has {name}", name, held))


def _not_served(what: str, module: str, held: set[str]) -> str:
    names = sorted(name for leaf in held for name in ([k for k, v in FUSED.items() if v == leaf] or [leaf]))
    return (
        f"{what}, and this server serves LoRA for {', '.join(names)}: start it with {module.rpartition('.')[2]} "
        "in --lora-target-modules as well"
    )


# ------------------------------------------------------------------ the weights
def plain_name(name: str) -> str:
    """A weight's name without the adapter's, which PEFT drops when it saves and accepts anyway."""
    for side in ("lora_A", "lora_B"):
        name = name.replace(f".{side}.default.weight", f".{side}.weight")
    return re.sub(r"\.lora_embedding_([AB])\.default$", r".lora_embedding_\1", name)


def check_weights(
    config: Mapping[str, Any], weights: Iterable[tuple[str, tuple[int, ...]]], model: Model
) -> None:
    """Check that PEFT would use and SGLang can take each weight, by (name, shape); ``config`` is a
    checked one.  UnsupportedError names the weight and what the model has, takes or lacks."""
    sides: dict[str, set[str]] = {}
    names: set[str] = set()
    for name, shape in weights:
        key = plain_name(name)
        if key in names:
            raise UnsupportedError(f"{name} comes twice in the adapter's files")
        names.add(key)
        found = _WEIGHT.fullmatch(key)
        if not model.linears:
            _check_unknown(key, model.layers)
            continue
        if found is None:
            if _is_frozen_embedding(config, key, tuple(shape), model):
                continue
            raise UnsupportedError(f"{name} is not a LoRA weight{_what_else(name)}")
        if not name.startswith(PREFIX):
            raise UnsupportedError(
                f"{name} does not begin with {PREFIX}, as the weights of a PEFT adapter do: PEFT would leave it out"
            )
        module = found["module"].removeprefix(PREFIX)
        _check_place(config, name, module, tuple(shape), found, model)
        sides.setdefault(module, set()).add(found["side"] or found["embedding"])
    if not names or (not sides and model.linears):
        raise UnsupportedError("the adapter has no LoRA weights")
    for module, there in sides.items():
        if len(there) == 1:
            side = "B" if "A" in there else "A"
            raise UnsupportedError(
                f"the adapter has no lora_{side} for {PREFIX}{module}, only the other half"
            )


def _is_frozen_embedding(config: Mapping[str, Any], key: str, shape: tuple[int, ...], model: Model) -> bool:
    """PEFT saves the base's embedding beside a LoRA of it, unchanged unless tokens were added."""
    module = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    return module in _OUTSIDE and shape == model.embedding and targeted(config, module)


def _check_unknown(key: str, layers: int) -> None:
    """Of an architecture whose layers are not known by name."""
    if not any(mark in key for mark in _MARKS):
        raise UnsupportedError(f"{key} is not a LoRA weight{_what_else(key)}")
    index = _ANY_LAYER.search(key)
    if index is not None and int(index[1]) >= layers:
        raise UnsupportedError(_too_many(key, int(index[1]), layers))


def _check_place(
    config: Mapping[str, Any],
    name: str,
    module: str,
    shape: tuple[int, ...],
    found: re.Match[str],
    model: Model,
) -> None:
    inside = _IN_LAYER.fullmatch(module)
    if inside is not None and int(inside["index"]) >= model.layers:
        raise UnsupportedError(_too_many(name, int(inside["index"]), model.layers))
    sizes = model.linears.get(inside["inner"]) if inside is not None else None
    if sizes is None and module not in _OUTSIDE:
        raise UnsupportedError(
            f"{name} is of {module}, which the model does not have; its layers have {', '.join(model.linears)}"
        )
    if not targeted(config, module):
        names = config["target_modules"]
        listed = names if isinstance(names, str) else ", ".join(names)
        raise UnsupportedError(
            f"{name} is not of the target modules {listed}{_restrictions(config)}: PEFT would leave it out"
        )
    if sizes is not None:
        rank = config["r"]
        needed = (rank, sizes[0]) if found["side"] == "A" else (sizes[1], rank)
        if shape != needed:
            raise UnsupportedError(
                f"{name} has shape {shape}, but the served model at rank {rank} needs {needed}: was the adapter "
                "trained on this model, with one rank for all modules?"
            )


def _too_many(name: str, index: int, layers: int) -> str:
    return f"{name} is of layer {index}, and the model has {layers} layers (0 to {layers - 1})"


def _what_else(name: str) -> str:
    if "magnitude" in name:
        return ": DoRA (use_dora) is not served"
    if name.endswith(".bias"):
        return ": biases (bias, lora_bias) are not served"
    if any(mark in name for mark in _MARKS):
        return " as PEFT names them (….lora_A.weight, ….lora_B.weight)"
    return ": modules that are saved whole (modules_to_save) are not served"


def _restrictions(config: Mapping[str, Any]) -> str:
    keys = ("exclude_modules", "layers_to_transform", "layers_pattern")
    given = [f"{key} {config[key]!r}" for key in keys if config.get(key) not in (None, [], "")]
    return f" under {', '.join(given)}" if given else ""


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT gives ``module`` (such as ``model.layers.0.mlp.up_proj``) a LoRA."""
    if any(module == name or module.endswith(f".{name}") for name in config.get("exclude_modules") or ()):
        return False
    targets = config["target_modules"]
    if isinstance(targets, str):  # all-linear: not the head, nor the embedding, which is none
        return module not in _OUTSIDE
    if module in targets:
        return True
    names = (module, _OUTSIDE.get(module, module))  # SGLang's name of the head may be the one in the file
    if not any(name == target or name.endswith(f".{target}") for name in names for target in targets):
        return False
    only = config.get("layers_to_transform")
    if only is None or only == []:
        return True
    index = _layer_index(module, config.get("layers_pattern"))
    return index is not None and index in ([only] if isinstance(only, int) else only)


def _layer_index(module: str, patterns: Any) -> int | None:
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
        return int(found["idx"]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(?P<idx>\d+)\.", module)
        if found:
            return int(found["idx"])
    return None


# ------------------------------------------------------------------ files
def safetensors_weights(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor of a safetensors file, from its header.  UnsupportedError: it is
    not such a file, or names a tensor twice."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if 0 < size <= path.stat().st_size else b""
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object is the last to be closed
        return dict(found)

    try:
        if not isinstance(json.loads(header, object_pairs_hook=keep), dict):
            raise ValueError("an object is expected")
        return [(name, tuple(entry["shape"])) for name, entry in pairs if name != "__metadata__"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedError(f"{path} is not a safetensors file") from error
