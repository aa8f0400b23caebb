"""Fixtures for the tests of checkpoints."""

import pytest
from safetensors.torch import save_file

from tests.helpers.checkpoint_samples import to_ldm, weights_of
from tests.helpers.hub_server import hub_fixture  # noqa: F401  (a fixture: the tests take it as `hub`)


@pytest.fixture
def tiny_file(tmp_path):
    """A file in the original format whose architecture is not one of the public ones."""
    save_file(to_ldm(weights_of("tiny")), tmp_path / "vae.safetensors")
    return tmp_path / "vae.safetensors"


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub waits ever longer between attempts to reach a server."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
