"""An SGLang plugin for a server under test: while a file exists every decision about a training quantum fails; while
another does, those of an idle server take long, and while a third does, an update of the weights does not reach training."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

PATH_ENV = "TEST_FAULTY_PLUGIN"  # the file
NAME = "faulty"
SLOW_S = 0.3  # as long as a quantum of idle time may take
ANOTHER_NORM = "another-norm"


def activate() -> None:
    from sglang_harli.managers import qos_policy

    path, decide = Path(os.environ[PATH_ENV]), qos_policy.decide
    slow = path.with_name("slow")

    def faulty(load: Any, *args: Any) -> Any:
        if path.exists():
            raise ZeroDivisionError("division by zero, on purpose")
        if load.idle and slow.exists():
            time.sleep(SLOW_S)
        return decide(load, *args)

    qos_policy.decide = faulty
    scheduler = sys.modules.get("sglang_harli.managers.scheduler")
    if scheduler is not None:  # in the scheduler's process
        scheduler.build = _with_a_norm_of_its_own(scheduler.build, path.with_name(ANOTHER_NORM))


def _with_a_norm_of_its_own(build: Any, path: Path) -> Any:
    """After an update of the weights serving has a last norm that training does not see, while ``path`` exists."""

    def wrapped(scheduler: Any, side: Any) -> Any:
        from torch import nn

        trainer, refusal = build(scheduler, side)
        norm, updated = scheduler.tp_worker.model_runner.model.model.norm, trainer.weights_updated
        seen = norm.weight

        def weights_updated() -> None:
            norm.weight = nn.Parameter(1.5 * seen.detach(), requires_grad=False) if path.exists() else seen
            updated()

        trainer.weights_updated = weights_updated
        return trainer, refusal

    return wrapped


def environment(folder: Path) -> dict[str, str]:
    """What a server's environment needs for it; ``folder`` takes the plugin, and the files ``fault`` and ``slow`` in it are the switches."""
    metadata = folder / "harli_test_faulty-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: harli-test-faulty\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\n{NAME} = support.faulty_plugin:activate\n"
    )
    path = os.pathsep.join(
        [str(folder), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return {"PYTHONPATH": path, "SGLANG_PLUGINS": f"harli,{NAME}", PATH_ENV: str(folder / "fault")}
