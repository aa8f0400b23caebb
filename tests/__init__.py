"""The tests. A regular package, so that no installed package named `tests` takes its place."""

import pytest

pytest.register_assert_rewrite("tests.helpers")  # a failing assertion there shows its values too
