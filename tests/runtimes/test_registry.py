"""A registry lists its names without importing anything, and imports an entry when it is read."""

import sys

import pytest

from runtimes import ConfigError
from runtimes.registry import Registry


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with one entry, in a module that nothing has imported."""
    (tmp_path / "a_module_of_this_test.py").write_text("thing = 5")
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("toy", ConfigError, {"one": "a_module_of_this_test:thing"})
    sys.modules.pop("a_module_of_this_test", None)


def test_names_are_listed_without_an_import_and_reading_one_imports_it(registry):
    assert list(registry) == ["one"] and len(registry) == 1 and "one" in registry
    assert "a_module_of_this_test" not in sys.modules
    assert registry["one"] == 5
    assert "a_module_of_this_test" in sys.modules


def test_an_unknown_name_is_answered_with_the_known(registry):
    registry.register("two", 2)
    with pytest.raises(ConfigError, match="toy 'three' is not known; known are one, two"):
        registry["three"]


def test_objects_are_registered_as_they_are_and_removed(registry):
    registry.register("two", print)
    assert registry["two"] is print
    registry.unregister("two")
    assert "two" not in registry
