"""Stage tests: every test marked `gpu`, a row a test; one that ends the process is noted, and the others go on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import LEAST_LEFT, Stage, one_line, require

ROOT = Path(__file__).parents[2]
ENDED = (0, 1, 5)  #: exit codes of pytest: all passed, some failed, none was left to run


class Rows:
    """A plugin of pytest that tells each test as a row, and leaves out those that were run before."""

    def __init__(self, stage: Stage, pytest: Any) -> None:
        self.stage, self.pytest = stage, pytest
        self.found: dict[str, dict[str, Any]] = {}
        self.skipped: list[str] = []

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        wanted = [item for item in items if self.stage.wants(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.found = {}
        self.stage.tell({"begin": nodeid})

    def pytest_runtest_setup(self, item: Any) -> None:
        if self.stage.left < LEAST_LEFT:
            self.pytest.exit("no time is left", returncode=0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of the three phases that which failed or skipped, else the call."""
        if report.when == "call" or report.outcome != "passed":
            row: dict[str, Any] = {
                "name": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
            }
            if report.outcome == "skipped":
                place = report.longrepr
                row["lacks"] = one_line(Exception(place[2] if isinstance(place, tuple) else place))
            elif report.outcome == "failed":
                crash = getattr(report.longrepr, "reprcrash", None)
                row["failed"] = one_line(Exception(crash.message if crash else report.longreprtext))
                row["text"] = report.longreprtext[-3000:]
            self.found[report.nodeid] = row

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        row = self.found.pop(nodeid, None)
        if row is not None:
            self.stage.tell({"row": row | ({"rehearsal": True} if self.stage.rehearsal else {})})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.stage.tell({"begin": report.nodeid})
            self.stage.tell({"row": {"name": report.nodeid, "failed": one_line(Exception(report.longreprtext))}})


def run(stage: Stage) -> None:
    pytest = require("pytest", "it runs the tests")
    require("torch", "the tests compare with it")
    # Warnings are errors with the packages that the project pins, and news with those that are here.
    options = ["-m", "gpu", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-q"]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever plugins are installed here, none of them is needed
    code = int(pytest.main([*options, str(ROOT / "tests" / "gpu")], plugins=[Rows(stage, pytest)]))
    stage.note(f"pytest {pytest.__version__} ended with exit code {code}")
    if code not in ENDED:
        raise RuntimeError(f"pytest could not run the tests: it ended with exit code {code}")
