"""Options of an export: given as one object, by name, or both."""

import dataclasses

import pytest

from vae_export import export_bundle
from vae_export.options import ExportOptions


def test_options_by_name_replace_those_of_the_object(two_level_model, tmp_path):
    options = ExportOptions(precision="fp16", rescale=False, run_validation=False)
    manifest = export_bundle(two_level_model, tmp_path / "b", options, precision="fp32").manifest
    assert manifest.precision == "fp32"
    assert "measurements" not in (manifest.validation or {}), "the rest of the object holds"
    assert options.precision == "fp16", "the object is as it was"


def test_a_misspelled_option_is_named(two_level_model, tmp_path):
    with pytest.raises(TypeError, match="precison"):
        export_bundle(two_level_model, tmp_path / "b", precison="fp16")
    assert not (tmp_path / "b").exists()


def test_options_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExportOptions().target = "flax"  # type: ignore[misc]  # what the test is about
