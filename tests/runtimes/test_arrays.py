"""Arrays of NumPy and torch: which library an array is of, and answers of the same kind."""

import numpy as np
import pytest
import torch

from runtimes.arrays import answer_in_kind, array_module, as_type, is_tensor, on_host


def test_the_library_of_an_array_is_found():
    assert array_module(torch.zeros(1)) is torch and is_tensor(torch.zeros(1))
    for other in (np.zeros(1), [1.0], None):
        assert array_module(other) is np and not is_tensor(other)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_types_are_converted_and_answers_are_of_the_same_kind(make):
    x = make([[1.5, -2.5]])
    assert str(as_type(x, "float16").dtype).endswith("float16")
    doubled = answer_in_kind(lambda array: array * 2, x)
    assert type(doubled) is type(x)
    assert np.array_equal(on_host(doubled), [[3.0, -5.0]])


def test_a_tensor_with_a_gradient_comes_to_the_host_without_it():
    x = torch.ones(2, requires_grad=True)
    assert isinstance(on_host(x), np.ndarray) and np.array_equal(on_host(x), [1.0, 1.0])
