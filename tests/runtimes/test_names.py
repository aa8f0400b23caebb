"""The closed sets of names, and the numbers that belong to them."""

from typing import get_args

import numpy as np

from runtimes import names


def test_each_tuple_holds_what_its_type_allows():
    pairs = [(names.GRAPHS, names.Graph), (names.PRECISIONS, names.Precision), (names.IOS, names.Io)]
    assert all(values == get_args(kind) and len(set(values)) == len(values) for values, kind in pairs)


def test_the_largest_number_of_fp16_is_that_of_numpy():
    assert np.float16(names.FP16_LARGEST) == np.finfo(np.float16).max
