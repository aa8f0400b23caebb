"""Fuzz the entries with atheris: python tests/fuzz/run.py [--seconds 60] [ENTRY ...]

Each gets its share of the time, in a process of its own, with the seeds of `tests/helpers/fuzz_entries.py` and the
cases found so far. What is found lies in out/fuzz: put it into tests/fuzz/cases/ENTRY, and mend it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where this file is run by its path
OUT = ROOT / "out" / "fuzz"
MEMORY = 2048  # MB, of a process that fuzzes


def fuzz(entry: str, seconds: int) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["runtimes", "vae_export"]):
        from tests.helpers import fuzz_entries as entries
    corpus = OUT / f"corpus-{entry}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(entries.seeds(entry)):
        (corpus / f"seed-{number}").write_bytes(seed)
    cases = entries.CASES / entry
    options = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY}", "-timeout=10", "-max_len=500000"]
    places = [str(corpus), *([str(cases)] if cases.exists() else [])]
    artifacts = f"-artifact_prefix={OUT}/{entry}-"
    atheris.Setup([sys.argv[0], *options, artifacts, *places], lambda data: entries.survives(entry, data) and None)
    atheris.Fuzz()


def main() -> int:
    if sys.argv[1:2] == ["--one"]:  # before anything is imported: what is to be fuzzed is instrumented on its way in
        fuzz(sys.argv[2], int(sys.argv[3]))
    from tests.helpers.fuzz_entries import ENTRIES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("entries", nargs="*", default=list(ENTRIES), metavar="ENTRY", help=", ".join(ENTRIES))
    parser.add_argument("--seconds", type=int, default=60, help="of all of them together")
    arguments = parser.parse_args()
    unknown = set(arguments.entries) - set(ENTRIES)
    if unknown:
        parser.error(f"no entry {', '.join(sorted(unknown))}; known are {', '.join(ENTRIES)}")
    share = max(1, arguments.seconds // len(arguments.entries))
    failed = []
    for entry in arguments.entries:
        command = [sys.executable, __file__, "--one", entry, str(share)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        runs = [line for line in done.stderr.splitlines() if "Done" in line or "ERROR" in line]
        print(f"{entry:12} {share} s: {runs[-1].strip() if runs else f'ended with {done.returncode}'}", flush=True)
        if done.returncode:
            failed.append(entry)
            print(done.stdout[-4000:], done.stderr[-4000:])
    if failed:
        print(f"found something in {', '.join(failed)}: see {OUT}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
