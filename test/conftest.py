"""Makes ``support`` importable: pytest puts the folder of this file on the path.

``from support.server import start_server`` and ``from support.models import make_model``.

Options and the closing summaries of tests stand here because pytest reads options before it
looks into the folders of the tests.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import settings

# No test is about time: how long an example takes says how busy the machine is.
settings.register_profile("harli", deadline=None)
settings.load_profile("harli")


def pytest_addoption(parser: pytest.Parser) -> None:
    from support.kills import kill_report

    kill_report.add_options(parser)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from support.kills import kill_report

    kill_report.write_summary(terminalreporter, config)
    if "support.openai_calls" in sys.modules:
        sys.modules["support.openai_calls"].write_summary(terminalreporter, config)
