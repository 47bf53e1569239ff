"""SGLang's KV pool with the unified pool's memory under its buffers.

Shapes, dtypes and addresses are SGLang's own for the server's life, so that attention backends and
CUDA graphs see nothing. Leans on SGLang: ``mem_cache.memory_pool.MHATokenToKVPool``
(``_create_buffers_normal``, the only method that is overridden, and ``_kv_buffer_shapes``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch import Tensor

from sglang_harli.mem_cache.backing.interface import Backing

MakeBacking = Callable[[int, int, int, int], Backing]  # slots, bytes of a row, buffers, page size


class HarliMHATokenToKVPool(MHATokenToKVPool):
    """SGLang's KV pool whose buffers are the unified pool's memory.

    ``make_backing`` makes that memory (``harli_backing``) once SGLang has its size: in turn the
    keys and the values of each layer.

    Raises:
        ValueError: a layout whose rows the pool cannot hold (``pool_setup`` asks for none).
    """

    harli_backing: Backing

    def __init__(self, *args: Any, make_backing: MakeBacking, **kwargs: Any) -> None:
        self._make_backing = make_backing
        super().__init__(*args, **kwargs)

    def _create_buffers_normal(self) -> None:
        shape, v_shape = self._kv_buffer_shapes()
        if self.kv_cache_layout != "nhd" or shape != v_shape:
            raise ValueError(
                f"layout {self.kv_cache_layout!r} with rows of {shape[1:]} and {v_shape[1:]}: the unified pool holds "
                "'nhd' with keys and values alike"
            )
        row_bytes = math.prod(shape[1:]) * self.store_dtype.itemsize
        self.harli_backing = self._make_backing(shape[0], row_bytes, 2 * self.layer_num, self.page_size)

        def buffer(number: int) -> Tensor:
            return self.harli_backing.kv_bytes(number).view(self.store_dtype).view(shape)

        self.k_buffer = [buffer(2 * layer) for layer in range(self.layer_num)]
        self.v_buffer = [buffer(2 * layer + 1) for layer in range(self.layer_num)]
