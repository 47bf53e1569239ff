"""Takes the print of a bound base: a sample of its weights, by transformers' names and shapes.

The values read are a function of a parameter's name and shape alone, whatever SGLang fuses, pads or
wraps. Reading waits for the device once: at start-up, and after an update of the weights.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.protocol.base_print import BasePrint

SHOWN = 4  # values of each kind of parameter that can be compared across dtypes, over the layers
HASHED = 16  # values of each parameter that go into the digest
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def take(base: FrozenBase, model: str, path: str) -> BasePrint:
    """The print of a base as it is now; ``model``: served name; ``path``: folder or hub id."""
    sampled = _sample(base)
    digest = hashlib.sha256()
    for name, values in sampled.items():
        digest.update(name.encode())
        digest.update(values.astype("<f4").tobytes())
    return BasePrint(
        model=model,
        path=str(Path(path).absolute()) if Path(path).is_dir() else path,
        dtype=str(base.dtype).removeprefix("torch."),
        math=base.math,
        weights=_shown(sampled),
        digest=digest.hexdigest()[:32],
    )


def _sample(base: FrozenBase) -> dict[str, np.ndarray]:
    """HASHED values of each parameter, float32, by its name; tied ones once."""
    names, parts = [], []
    with torch.inference_mode():
        for name, parameter in base.model.named_parameters():
            places = _places(name, tuple(parameter.shape))
            index = tuple(torch.from_numpy(axis).to(parameter.device) for axis in places)
            names.append(name)
            parts.append(parameter.detach()[index])
        values = torch.stack(parts).to(torch.float32).cpu().numpy()
    return dict(zip(names, values, strict=True))


def _places(name: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The indices of the sampled values, one array an axis."""
    seed = hashlib.sha256(f"{name} {shape}".encode()).digest()
    flat = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:8], "little"))).integers(
        math.prod(shape), size=HASHED
    )
    return list(np.unravel_index(flat, shape))


def _shown(sampled: dict[str, np.ndarray]) -> dict[str, tuple[float, ...]]:
    """SHOWN values of each kind of parameter, of layers spread over the model."""
    kinds: dict[str, list[np.ndarray]] = defaultdict(list)
    for name, values in sampled.items():
        kinds[_LAYER.sub(".layers.", name)].append(values)
    shown = {}
    for number, (kind, layers) in enumerate(sorted(kinds.items())):
        count = len(layers)
        chosen = [layers[(n * count // SHOWN + number) % count][n] for n in range(SHOWN)]
        shown[kind] = tuple(float(value) if math.isfinite(value) else 0.0 for value in chosen)
    return shown
