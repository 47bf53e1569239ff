"""A finished adapter enters SGLang's LoRA serving in slices, so that none delays decode for long.

SGLang's own call takes an adapter whole. Here a slice copies one tensor out of shared memory or
stacks one layer; the last one registers the adapter as ``load_lora_adapter_from_tensors`` does.
Everything runs on the scheduler's thread, between batches.

Leans on: ``srt.lora.lora_manager.LoRAManager`` (``validate_new_adapter``, ``unload_lora_adapter``,
``configs``, ``loras``, ``lora_refs``), ``srt.lora.lora.LoRAAdapter`` (``_process_weight``,
``_normalize_weights``), ``srt.lora.lora_config.LoRAConfig``, ``srt.lora.lora_registry.LoRARef``.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from sglang_harli.errors import StateError, UnsupportedError
from sglang_harli.managers.scheduler.training.failures import passes
from sglang_harli.patches.lora import peft_adapter
from sglang_harli.patches.lora.padded_mlp import layer_problems
from sglang_harli.protocol.internal import SlotRef, TensorRef
from sglang_harli.protocol.shared_memory import SharedBuffer

logger = logging.getLogger(__name__)

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_FAILURES_KEPT = 64
# Least bytes of a slice, unless it is the last; less than twice that, but for a stacked layer.
SLICE_BYTES = 1 << 20


class AdapterLoader:
    """Loads adapters from shared memory into one ``LoRAManager``; those that requests wait for
    first. No method but ``unload`` raises for a bad adapter: it becomes ``failed``."""

    def __init__(self, lora_manager: Any) -> None:
        self._manager = lora_manager
        self._queue: deque[_Loading] = deque()
        self._failures: OrderedDict[str, tuple[str, bool]] = OrderedDict()  # id -> error, passing
        self._slices = 0

    # ------------------------------------------------------------------ control
    def begin(
        self, lora_id: str, lora_name: str, config: dict[str, Any], slot: SlotRef, *, urgent: bool = True
    ) -> None:
        """Validate an adapter and queue it for loading.

        An id that is loaded, or being loaded, stays as it is. A name loaded under another id comes
        from an attempt that was never taken over: it is loaded again, under the new id.

        Args:
            lora_id: SGLang's id of this version (``LoRARef.lora_id``); lora_name: served under it.
            config: PEFT's adapter_config, of which ``peft_adapter`` says what is served.
            slot: tensors by PEFT state-dict key, A [r, inputs] and B [outputs, r], in the model's
                own sizes. It may be freed once the status is ``loaded`` or ``failed``.
            urgent: requests wait for it.
        """
        if lora_id in self._manager.loras or any(loading.lora_id == lora_id for loading in self._queue):
            return
        self._failures.pop(lora_id, None)

        def queue() -> None:
            self._drop_older(lora_name, lora_id)
            self._queue.append(_Loading(self._manager, lora_id, lora_name, config, slot, urgent=urgent))

        self._try(lora_id, lora_name, queue)

    def status(self, lora_id: str) -> dict[str, Any]:
        """``state`` (loading, loaded, failed; also unknown), ``error``, ``passing``, ``slices``.

        ``passing``: no fault of the adapter's. ``slices`` stands still only if no adapter gets on.
        """
        state, error, passing = "failed", "", False
        if lora_id in self._manager.loras:
            state = "loaded"
        elif any(loading.lora_id == lora_id for loading in self._queue):
            state = "loading"
        else:
            unknown = (f"no adapter of id {lora_id} is here", False)
            error, passing = self._failures.get(lora_id, unknown)
        return {"state": state, "error": error, "passing": passing, "slices": self._slices}

    def urge(self, lora_id: str) -> None:
        """Requests wait for it by now."""
        for loading in self._queue:
            loading.urgent |= loading.lora_id == lora_id

    @property
    def pending(self) -> bool:
        """Whether ``run_slice`` has something to do."""
        return bool(self._queue)

    @property
    def urgent(self) -> bool:
        """Whether requests wait for one of them."""
        return any(loading.urgent for loading in self._queue)

    def run_slice(self) -> None:
        """Copy or stack ``SLICE_BYTES`` together; register the adapter behind its last."""
        loading = next((one for one in self._queue if one.urgent), self._queue[0] if self._queue else None)
        if loading is None:
            return
        self._slices += 1
        if not self._try(loading.lora_id, loading.lora_name, lambda: _slice(loading)):
            self._queue.remove(loading)  # loaded, or failed
            loading.close()

    def abandon(self, lora_id: str) -> None:
        """Stop loading an adapter; one that is loaded stays, and an unknown id is no error."""
        for loading in [one for one in self._queue if one.lora_id == lora_id]:
            self._queue.remove(loading)
            loading.close()

    def unload(self, lora_id: str) -> None:
        """Take an unused adapter out of serving, or stop loading it; an unknown id is no error.

        Raises:
            StateError: SGLang could not unload it.
        """
        self.abandon(lora_id)
        ref = self._manager.lora_refs.get(lora_id)
        if ref is not None:
            result = self._manager.unload_lora_adapter(ref)
            if not result.success:
                raise StateError(f"adapter {ref.lora_name!r} was not unloaded: {result.error_message}")

    # ------------------------------------------------------------------ helpers
    def _try(self, lora_id: str, lora_name: str, step: Callable[[], bool | None]) -> bool | None:
        """What ``step`` gives; where it goes wrong the adapter becomes ``failed``."""
        try:
            return step()
        except Exception as error:  # boundary: one adapter fails to load; the scheduler's loop goes on
            self._fail(lora_id, lora_name, error)
            return None

    def _drop_older(self, lora_name: str, lora_id: str) -> None:
        ids = [ref.lora_id for ref in self._manager.lora_refs.values() if ref.lora_name == lora_name]
        ids += [loading.lora_id for loading in self._queue if loading.lora_name == lora_name]
        for older in ids:
            self.unload(older)

    def _fail(self, lora_id: str, lora_name: str, error: Exception) -> None:
        text = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        logger.warning("adapter %s was not loaded: %s", lora_name, text)
        self._failures[lora_id] = f"adapter {lora_name!r} was not loaded: {text}", passes(error)
        while len(self._failures) > _FAILURES_KEPT:
            self._failures.popitem(last=False)


class _Loading:
    """One adapter on its way; each ``next`` of ``slices`` works a piece and gives its bytes."""

    def __init__(
        self,
        manager: Any,
        lora_id: str,
        lora_name: str,
        config: dict[str, Any],
        slot: SlotRef,
        *,
        urgent: bool,
    ) -> None:
        from sglang.srt.lora.lora import LoRAAdapter
        from sglang.srt.lora.lora_config import LoRAConfig
        from sglang.srt.lora.lora_registry import LoRARef

        self.lora_id, self.lora_name, self.urgent = lora_id, lora_name, urgent
        self._manager = manager
        self._tensors = slot.tensors
        self._config = LoRAConfig.from_dict(
            peft_adapter.checked_config(config), base_vocab_size=manager.base_hf_config.vocab_size
        )
        # The path is shown and compared, never read.
        self._ref = LoRARef(
            lora_id=lora_id, lora_name=lora_name, lora_path=f"__tensor__/{lora_name}", pinned=False
        )
        manager.validate_new_adapter(self._config, self._ref)
        peft_adapter.check_weights(
            self._config.hf_config,
            [(ref.name, tuple(ref.shape)) for ref in slot.tensors],
            peft_adapter.model_of(manager.base_hf_config),
        )
        self._adapter = LoRAAdapter(
            lora_id,
            self._config,
            manager.base_hf_config,
            manager.load_config,
            manager.lora_backend,
            base_model=manager.base_model,
        )
        self._slot: SharedBuffer | None = SharedBuffer.open(slot)
        self.slices: Iterator[int] = self._run()

    def close(self) -> None:
        if self._slot is not None:
            self._slot.close()
            self._slot = None

    def _run(self) -> Iterator[int]:
        for ref in self._tensors:
            whole = yield from self._take(ref)
            self._adapter._process_weight(ref.name, whole)
        self.close()
        one_layer = _OneLayer(self._adapter)
        normalize: Any = type(self._adapter)._normalize_weights
        for layer_id, layer in enumerate(self._adapter.layers):
            one_layer.layers = [layer]
            normalize(one_layer)
            for problem in layer_problems(self._manager, self._config.r, layer_id, layer.weights):
                raise UnsupportedError(problem)
            yield sum(weight.nbytes for weight in layer.weights.values())
        self._register()

    def _take(self, ref: TensorRef) -> Generator[int, None, Any]:
        """A copy of the tensor (the slot is reused) in the base's dtype, by ``SLICE_BYTES``."""
        import torch

        assert self._slot is not None
        if ref.dtype not in _DTYPES:
            raise ValueError(f"{ref.name} has dtype {ref.dtype}; accepted: {', '.join(_DTYPES)}")
        dtype = getattr(torch, ref.dtype)
        count = math.prod(ref.shape)
        if count * dtype.itemsize != ref.nbytes or ref.offset + ref.nbytes > self._slot.nbytes or count == 0:
            raise ValueError(f"{ref.name} of shape {ref.shape} does not lie in its slot")
        view = torch.frombuffer(self._slot.buffer, dtype=dtype, count=count, offset=ref.offset)
        whole = torch.empty(ref.shape, dtype=self._manager.dtype)
        flat, step = whole.view(-1), max(SLICE_BYTES // max(dtype.itemsize, whole.dtype.itemsize), 1)
        for start in range(0, count, step):
            piece = flat[start : start + step]
            piece.copy_(view[start : start + step])
            yield piece.nbytes
        return whole

    def _register(self) -> None:
        """Ends as ``load_lora_adapter_from_tensors``; checks limits again (others have come)."""
        manager = self._manager
        manager.validate_new_adapter(self._config, self._ref)
        manager.configs[self.lora_id] = self._config
        manager.loras[self.lora_id] = self._adapter
        manager.lora_refs[self.lora_id] = self._ref


def _slice(loading: _Loading) -> bool:
    """Move ``SLICE_BYTES``; whether there is more."""
    moved = 0
    while moved < SLICE_BYTES:
        if (nbytes := next(loading.slices, None)) is None:
            return False
        moved += nbytes
    return True


class _OneLayer:
    """An adapter of which SGLang's normalization sees one layer."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self.layers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)
