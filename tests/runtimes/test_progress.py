"""Progress is reported to nobody unless a callback is given."""

import inspect

from runtimes.progress import no_progress
from vae_export import export_bundle


def test_the_default_callback_says_nothing(capfd):
    assert inspect.signature(export_bundle).parameters["progress"].default is no_progress
    no_progress("a step", 1, 2)
    assert capfd.readouterr() == ("", "")
