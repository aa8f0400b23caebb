"""The command line: python -m benchmarks.gpu [STAGE ...]; see benchmarks/gpu/__init__.py and docs/gpu/README.md."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from benchmarks.gpu import report
from benchmarks.gpu.stage import STAGES
from benchmarks.gpu.supervise import Options, run_stage

#: NVIDIA's packages are those of tests/fakes: every line of the stage runs, and no number means anything
FAKED = ("rtx-faked", "trt-faked")
REHEARSAL_SECONDS, REHEARSAL_ROW_SECONDS = 600.0, 300.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all, unless given")
    parser.add_argument("--out", type=Path, help="folder of the results; out/gpu, or out/gpu-rehearsal")
    parser.add_argument("--models", type=Path, help="folder of the model files that stages make; OUT/models")
    parser.add_argument("--limit", type=float, default=480, metavar="SECONDS", help="for each stage; 480")
    parser.add_argument("--row-limit", type=float, default=150, metavar="SECONDS", help="for each row; 150")
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="TEXT", help="only rows with one of these in their name"
    )
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the smallest sizes")
    arguments = parser.parse_args()
    known = (*STAGES, *FAKED) if arguments.rehearse else STAGES
    for stage in arguments.stages:
        if stage not in known:
            parser.error(f"no stage {stage!r}; there are {', '.join(known)}")
    arguments.stages = arguments.stages or list(known)
    arguments.out = (arguments.out or Path("out/gpu-rehearsal" if arguments.rehearse else "out/gpu")).absolute()
    arguments.models = (arguments.models or arguments.out / "models").absolute()
    return arguments


def main() -> int:
    """0; 1 where a stage crashed, or where anything failed or was wrong in a rehearsal."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that processes and files go
    options = Options(
        out=arguments.out,
        models=arguments.models,
        command=shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        rehearsal=arguments.rehearse,
        seconds=max(arguments.limit, REHEARSAL_SECONDS) if arguments.rehearse else arguments.limit,
        row_seconds=max(arguments.row_limit, REHEARSAL_ROW_SECONDS) if arguments.rehearse else arguments.row_limit,
        only=tuple(arguments.rows),
        go_on=arguments.go_on,
    )
    lines, code = [], 0
    for stage in arguments.stages:
        print(f"{stage}:", flush=True)
        data = run_stage(stage, options)
        lines.append(report.as_line(data))
        bad = [*report.failures(data), *report.wrong_results(data)]
        print("\n".join([*bad, lines[-1], f"written to {arguments.out / stage}.json and .md"]), flush=True)
        if not data["end"].startswith(("complete", "ran out", "ended by")) or (arguments.rehearse and bad):
            code = 1
    print("\n".join(["", *lines]))
    return code


if __name__ == "__main__":
    sys.exit(main())
