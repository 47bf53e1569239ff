"""The files and uploads of one run directory: their parts, wired together."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from pathlib import Path

from sglang_harli.config import HarliOptions
from sglang_harli.service.files.catalog import Catalog
from sglang_harli.service.files.file_store import FileStore
from sglang_harli.service.files.results import ResultFiles
from sglang_harli.service.files.streams import Streams
from sglang_harli.service.files.upload_store import UploadStore
from sglang_harli.service.jobs.registry import JobRegistry

STREAMS = ".streams"  # folder of what is on its way in, emptied at every start


class Files:
    """``streams``: on their way in; ``store``: files; ``uploads``: files that come in parts;
    ``results``: files that jobs make.  ``readers``: threads that read the store."""

    def __init__(
        self, run_dir: Path, registry: JobRegistry, options: HarliOptions, readers: Executor
    ) -> None:
        catalog = Catalog(registry)
        self.streams = Streams(run_dir / STREAMS, options, lambda: catalog.bytes)
        self.store = FileStore(run_dir, catalog, self.streams)
        self.uploads = UploadStore(run_dir, catalog, self.streams, self.store, options)
        self.results = ResultFiles(registry, self.store, readers)

    async def run(self) -> None:
        """Remove what expires and what stands still; make the result files that jobs lack."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.store.run())
            group.create_task(self.uploads.run())
            group.create_task(self.results.run())

    def close(self) -> None:
        self.streams.close()
        self.uploads.close()
        self.store.close()
