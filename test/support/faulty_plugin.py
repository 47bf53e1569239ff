"""An SGLang plugin for a server under test: while a file exists every decision about a training
quantum fails; while another does, those of an idle server take long, and while a third does, an
update of the weights does not reach training."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

PATH_ENV = "TEST_FAULTY_PLUGIN"  # the file
NAME = "faulty"
SLOW_S = 0.3  # as long as a quantum of idle time may take
ANOTHER_NORM = "another-norm"


def activate() -> None:
    from sglang_harli.managers.scheduler.policy import qos_policy
    from sglang_harli.managers.scheduler.training import co_trainer

    path, decide = Path(os.environ[PATH_ENV]), qos_policy.decide
    slow = path.with_name("slow")

    def faulty(load: Any, *args: Any) -> Any:
        if path.exists():
            raise ZeroDivisionError("division by zero, on purpose")
        if load.idle and slow.exists():
            time.sleep(SLOW_S)
        return decide(load, *args)

    qos_policy.decide = faulty
    co_trainer.CoTrainer.weights_updated = _with_another_norm(  # type: ignore[method-assign]
        co_trainer.CoTrainer.weights_updated, path.with_name(ANOTHER_NORM)
    )


def _with_another_norm(updated: Any, path: Path) -> Any:
    """After an update of the weights training has a last norm that is not served, while ``path``
    exists."""

    def weights_updated(trainer: Any) -> None:
        from torch import nn

        norm = trainer.base.model.model.norm
        norm.weight = seen = getattr(trainer, "norm_as_served", norm.weight)
        trainer.norm_as_served = seen
        updated(trainer)  # takes the print of what is served
        if path.exists():
            norm.weight = nn.Parameter(1.5 * seen.detach(), requires_grad=False)

    return weights_updated


def environment(folder: Path) -> dict[str, str]:
    """What a server's environment needs for it; ``folder`` takes the plugin, and the files
    ``fault`` and ``slow`` in it are the switches."""
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
