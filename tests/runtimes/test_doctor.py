"""The diagnosis of a backend: what works on this machine, and what to install where the package is missing."""

import pytest

from runtimes import BackendUnavailable
from runtimes.backends import BACKENDS
from runtimes.doctor import check_backend


def test_a_backend_that_is_installed_works_on_the_cpu():
    assert check_backend("onnxruntime")["cpu"] == "works"


def test_a_backend_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(BACKENDS._places, "toy", "runtimes.no_such_backend:Toy")
    with pytest.raises(ImportError):  # a bug in our own code is not hidden
        check_backend("toy")

    def missing(self, name):
        raise BackendUnavailable("toys are not installed: pip install toys")

    monkeypatch.setattr(type(BACKENDS), "__getitem__", missing)
    assert check_backend("toy") == {"any device": "toys are not installed: pip install toys"}
