"""tools/same_graphs.py: what counts as the same graph, and what does not."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tools.same_graphs import compare


def graph(*, weight=2.0, inner="h", node="mul", doc="", kind="Relu"):
    """x -> x * weight -> Relu"""
    nodes = [
        helper.make_node("Mul", ["x", "w"], [inner], name=node, doc_string=doc),
        helper.make_node(kind, [inner], ["y"], name="last"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n"]) for name in "xy")
    weights = [numpy_helper.from_array(np.array([weight], np.float32), "w")]
    made = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)]).SerializeToString()


@pytest.fixture
def compared(tmp_path, capsys):
    """compared(before, after, ...): files {name: bytes} of two directories -> the exit code and what was printed."""

    def run(before, after, **options):
        for name, files in (("before", before), ("after", after)):
            for file, data in files.items():
                path = tmp_path / name / "bundle" / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        arguments = {"only": "*", "allow_renamed": False, **options}
        return compare(tmp_path / "before", tmp_path / "after", **arguments), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({}, 0, "1 equal"),
        ({"doc": "from line 7"}, 0, "the same graph: bundle/g.onnx"),
        ({"inner": "hidden", "node": "first"}, 1, "renamed: bundle/g.onnx: "),
        ({"weight": 2.5}, 1, "differs: bundle/g.onnx: "),
        ({"kind": "Sigmoid"}, 1, "differs: bundle/g.onnx: "),
    ],
    ids=["equal", "doc", "names", "weight", "operator"],
)
def test_graphs_are_compared_node_by_node(compared, changed, code, says):
    found, printed = compared({"g.onnx": graph()}, {"g.onnx": graph(**changed)})
    assert (found, says in printed) == (code, True), printed


def test_names_of_inner_values_may_differ_where_it_is_allowed(compared):
    assert compared({"g.onnx": graph()}, {"g.onnx": graph(inner="hidden")}, allow_renamed=True)[0] == 0


def test_a_file_on_one_side_alone_is_a_difference_and_a_plan_is_none(compared):
    code, printed = compared({"a.bin": b"1", "m.plan": b"1"}, {"b.bin": b"1", "m.plan": b"2"})
    assert code == 1 and printed.count("missing: ") == 2 and "plan" not in printed


def test_of_a_manifest_what_describes_the_graphs_is_compared(compared):
    manifest = {"target": "onnx", "rewrites": [], "tools": {"torch": "1"}, "validation": {}}
    same = {**manifest, "tools": {"torch": "2"}, "validation": {"verdict": "skipped"}}
    assert compared(*({"manifest.json": json.dumps(each).encode()} for each in (manifest, same)))[0] == 0
    other = {**manifest, "rewrites": [{"name": "row_norms"}]}
    code, printed = compared(*({"manifest.json": json.dumps(each).encode()} for each in (manifest, other)))
    assert code == 1 and "the fields rewrites" in printed


def test_what_holds_nothing_is_not_called_equal(compared):
    with pytest.raises(SystemExit, match="nothing to compare"):
        compared({"a": b""}, {"a": b""}, only="other-*")
