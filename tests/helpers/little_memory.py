"""A process that gets no more memory."""

import contextlib
import resource
from pathlib import Path


@contextlib.contextmanager
def little_memory():
    """A context in which this process gets 256 MiB of address space more than it has, on Linux."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
