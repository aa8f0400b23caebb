"""An ONNX graph reaches outside of itself in no way: seen in its bytes, before ONNX Runtime or TensorRT parses them."""

import onnx
import pytest
from onnx import TensorProto, helper

from runtimes import CompatibilityError, IntegrityError, onnx_scan, open_vae
from runtimes.names import GRAPHS
from runtimes.onnx_scan import check_onnx
from runtimes.tensorrt.builder import BuildJob, build_plan

SAMPLE = helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["b", 3, "h", "w"])
MOMENTS = helper.make_tensor_value_info("latent_parameters", TensorProto.FLOAT, ["b", 8, "y", "x"])


def model(*nodes, tensors=(), **options):
    graph = helper.make_graph(list(nodes), "graph", [SAMPLE], [MOMENTS], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10, **options)


def tensor(**fields):
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def external(location="../secret"):
    made = tensor(data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="location", value=location)
    return made


def said_only():
    """A location without the flag: some parsers look at one, some at the other."""
    made = external()
    made.ClearField("data_location")
    return made


def constant(**value):
    return helper.make_node("Constant", [], ["c"], **value)


def branch(*nodes, tensors=()):
    inside = helper.make_graph(list(nodes), "inside", [], [MOMENTS], list(tensors))
    other = helper.make_graph([], "other", [], [MOMENTS])  # not the same: nested, there would be 2^depth of them
    return helper.make_node("If", ["c"], ["latent_parameters"], then_branch=inside, else_branch=other)


def sparse():
    return helper.make_sparse_tensor(external(), tensor(name="i", data_type=TensorProto.INT64), [1])


def sparse_initializer():
    made = model()
    made.graph.sparse_initializer.append(sparse())
    return made


def nested(depth):
    node = branch()
    for _ in range(depth):
        node = branch(node)
    return node


def listed_graph():
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.append(helper.make_attribute("graphs", [helper.make_graph([custom()], "g", [], [])]))
    return node


def custom(domain="com.example"):
    return helper.make_node("Custom", ["sample"], ["latent_parameters"], domain=domain)


def function():
    opsets = [helper.make_opsetid("", 22)]
    return helper.make_function("local", "Own", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets)


def training():
    made = model()
    made.training_info.add()
    return made


REACHES_OUT = {
    "external data": (lambda: model(tensors=[external()]), "external data"),
    "external data of an absolute path": (lambda: model(tensors=[external("/etc/passwd")]), "external data"),
    "external data, flag alone": (lambda: model(tensors=[tensor(data_location=1)]), "external data"),
    "external data, no flag": (lambda: model(tensors=[said_only()]), "external data"),
    "external data in a constant": (lambda: model(constant(value=external())), "external data"),
    "external data in a sparse tensor": (sparse_initializer, "external data"),
    "external data in a sparse constant": (lambda: model(constant(sparse_value=sparse())), "external data"),
    "external data in a branch": (lambda: model(branch(tensors=[external()])), "external data"),
    "a plan elsewhere": (
        lambda: model(
            helper.make_node("EPContext", ["sample"], ["y"], domain="com.microsoft", ep_cache_context="../x")
        ),
        "domain 'com.microsoft'",
    ),
    "an operator of its own": (lambda: model(custom()), "domain 'com.example'"),
    "an operator of its own in a branch": (lambda: model(branch(custom())), "domain 'com.example'"),
    "an operator of its own in a list of graphs": (lambda: model(listed_graph()), "domain 'com.example'"),
    "ONNX's own other domain": (lambda: model(custom("ai.onnx.ml")), "domain 'ai.onnx.ml'"),
    "a domain that is no text": (
        lambda: model(custom()).SerializeToString().replace(b"com.example", b"\xff" * 11),
        "do",
    ),
    "an imported domain": (lambda: with_opset("com.microsoft"), "domain 'com.microsoft'"),
    "functions": (lambda: model(functions=[function()]), "functions"),
    "training": (training, "training"),
    "graphs in graphs": (lambda: model(nested(20)), "nested"),
}


def with_opset(domain):
    made = model()
    made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


def serialized(made):
    return made if isinstance(made, bytes) else made.SerializeToString()


@pytest.mark.parametrize("case", REACHES_OUT)
def test_references_to_files_or_code_outside_of_the_graph_are_refused(case):
    make, says = REACHES_OUT[case]
    with pytest.raises(IntegrityError, match=says) as error:
        check_onnx(serialized(make()), "model.onnx")
    assert "model.onnx" in str(error.value)


@pytest.mark.parametrize("case", REACHES_OUT)
def test_a_refused_graph_never_reaches_onnx_runtime_or_tensorrt(bundle_copy, monkeypatch, case):
    data = serialized(REACHES_OUT[case][0]())
    monkeypatch.setattr("onnxruntime.InferenceSession", pytest.fail)
    with pytest.raises(IntegrityError, match=r"vae_encoder/model\.onnx"):
        open_vae(bundle_copy(files={"vae_encoder/model.onnx": data}))
    monkeypatch.setattr("runtimes.tensorrt.builder.load_flavour", pytest.fail)
    with pytest.raises(IntegrityError, match="graph of the encoder"):
        build_plan(data, BuildJob("tensorrt-rtx", "sample", ()), "encoder")


def test_a_field_that_stands_twice_is_seen_twice():
    """Parsers of protocol buffers merge them: the second graph would hide behind the first."""
    with pytest.raises(IntegrityError, match="external data"):
        check_onnx(model().SerializeToString() + model(tensors=[external()]).SerializeToString(), "model.onnx")
    with pytest.raises(CompatibilityError, match="2 graphs"):
        check_onnx(model().SerializeToString() * 2, "model.onnx")


def test_all_fields_are_those_of_onnx():
    """The tables are onnx.proto's: every message that leads to a tensor, a node or a domain is walked."""
    protos = {
        kind: getattr(onnx, f"{kind}Proto")
        for kind in ("Model", "Graph", "Node", "Attribute", "SparseTensor", "Tensor")
    }
    protos["OperatorSet"] = onnx.OperatorSetIdProto
    names = {proto.DESCRIPTOR.name: kind for kind, proto in protos.items()} | {
        "FunctionProto": "Function", "TrainingInfoProto": "Training",
    }  # fmt: skip
    for kind, proto in protos.items():
        fields = proto.DESCRIPTOR.fields
        assert {field.number for field in fields} <= onnx_scan._KNOWN[kind], kind
        inner = {
            f.number: names[f.message_type.name] for f in fields if f.message_type and f.message_type.name in names
        }
        assert inner == onnx_scan._MESSAGES[kind]


def test_what_only_some_parsers_read_is_refused():
    """ONNX Runtime 1.32 takes the low 32 bits of a tag: to one that takes all of them, the field is another."""
    node = helper.make_node("Gelu", ["sample"], ["latent_parameters"], domain="com.microsoft")
    encoded = node.SerializeToString()
    hidden = encoded.replace(b"\x3a\x0dcom.microsoft", b"\xba\x80\x80\x80\x10\x0dcom.microsoft")
    assert hidden != encoded
    graph = helper.make_graph([], "graph", [SAMPLE], [MOMENTS]).SerializeToString()
    graph = b"\x0a" + bytes([len(hidden)]) + hidden + graph
    head = helper.make_model(helper.make_graph([], "g", [], []), ir_version=10)
    head.ClearField("graph")
    opset = helper.make_opsetid("com.microsoft", 1).SerializeToString()
    opset = opset.replace(b"\x0a\x0d", b"\x8a\x80\x80\x80\x10\x0d")
    data = head.SerializeToString() + b"\x3a" + varint(len(graph)) + graph + b"\x42" + varint(len(opset)) + opset
    with pytest.raises(CompatibilityError, match="32 bits"):
        check_onnx(data, "model.onnx")


def varint(value):
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def test_too_many_fields_take_no_time(monkeypatch):
    monkeypatch.setattr(onnx_scan, "MOST_FIELDS", 1000)
    with pytest.raises(IntegrityError, match="more than 1,000 fields"):
        check_onnx(b"\x08\x08" * 1001, "model.onnx")


MALFORMED = {
    "nothing of ONNX": b"\x93NUMPY\x01\x00",
    "a group": b"\x3b\x3c",
    "field number zero": b"\x02\x00",
    "a number without end": b"\x08" + b"\xff" * 10,
    "cut within a number": b"\x08\x80",
    "longer than it is": b"\x3a\x7f\x0a",
    "longer than anything": b"\x3a" + b"\xff" * 9 + b"\x01",
    "cut within fixed64": b"\x09\x00\x00",
    "ONNX Runtime's own format": b"\x18\x00\x00\x00ORTM" + bytes(64),
    "both formats at once": b"\x08\x08\x12\x01ORT\x4d",
    "a tag of 33 bits": b"\xba\x80\x80\x80\x10\x00",
    "a tag of more bytes than it needs": b"\xba\x00\x00",
    "a number of 65 bits": b"\x08" + b"\xff" * 9 + b"\x02",
    "a number of more bytes than it needs": b"\x08\x88\x00",
    "a field that ONNX does not know": b"\x7a\x00",
    "a graph of another wire type": b"\x38\x01",
    "no graph": b"\x08\x08",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_incomplete_models_are_refused(case):
    with pytest.raises(CompatibilityError, match="not a whole ONNX model"):
        check_onnx(MALFORMED[case], "model.onnx")


def test_every_graph_of_ours_passes_cut_ones_do_not(onnx_bundle, tileable_bundle):
    for path in sorted([*onnx_bundle.rglob("*.onnx"), *tileable_bundle.rglob("*.onnx")]):
        data = path.read_bytes()
        check_onnx(data, path.name)
        with pytest.raises(CompatibilityError, match="not a whole"):
            check_onnx(data[:-1], path.name)


def test_names_and_texts_that_look_like_forbidden_content_are_accepted():
    check_onnx(model(tensors=[tensor(doc_string="external data, com.example")]).SerializeToString(), "model.onnx")


def test_an_opened_bundle_is_one_whose_graphs_passed(onnx_bundle, monkeypatch):
    seen = []
    monkeypatch.setattr("runtimes.onnxruntime.check_onnx", lambda data, file: seen.append(file))
    open_vae(onnx_bundle).close()
    assert seen == [f"vae_{graph}/model.onnx" for graph in GRAPHS]
