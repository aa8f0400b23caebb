"""The process of one stage: `python -m benchmarks.gpu.child JOB`, started by `supervise`.

It tells what it does as lines of JSON: {"begin": name} before each row, {"row": {...}} behind it, {"note": text},
{"lacks": text} where the stage cannot run here, {"again": true} where a new process must go on, {"skipped": names},
{"finished": true} at its end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.made import Made
from benchmarks.gpu.stage import Lacks, Stage, leave, one_line
from runtimes.errors import BackendUnavailable


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not to come between the lines

    def tell(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    job = json.loads(sys.argv[1])
    with contextlib.closing(Made(Path(job["models"]), job["rehearsal"])) as made:
        stage = Stage(
            name=job["stage"],
            out=Path(job["out"]),
            rehearsal=job["rehearsal"],
            made=made,
            tell=tell,
            deadline=time.monotonic() + job["seconds"],
            done=frozenset(job["done"]),
            only=tuple(job["only"]),
        )
        try:
            importlib.import_module(job["module"]).run(stage)
        except (Lacks, BackendUnavailable) as error:
            tell({"lacks": one_line(error)})
        stage.finish()
    leave()


if __name__ == "__main__":
    main()
