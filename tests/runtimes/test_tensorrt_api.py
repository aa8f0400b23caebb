"""The names that our code uses are those that both TensorRT have, and the fakes have no others.

`tests/data/tensorrt_api.json` lists the classes of the real modules with their members. What our code calls on objects
of these classes is held against it through the fakes, over which all of that code runs.

Tests runtimes/tensorrt/cuda.py.
"""

import ast
import importlib
import inspect
import json
from pathlib import Path

import pytest

import runtimes
from tests.helpers.tensorrt_names import dotted, names_in

API = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_api.json").read_text())
ROOM = Path(runtimes.__file__).parent / "tensorrt"
MODULES = [ROOM / f"{name}.py" for name in ("builder", "execution", "flavours")]
CUDA = ROOM / "cuda.py"


def is_there(name, api):
    """Class, class.member, or class.enumeration.member, of which the lists have the first two."""
    owner, _, member = name.partition(".")
    return owner in api and (not member or member.partition(".")[0] in api[owner])


def rtx_alone(source):
    """Names that lines mention which only RTX reaches: functions and branches that ask for `is_rtx`."""
    kept = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = next((part for part in node.body if not isinstance(part, ast.Expr)), None)
            guarded = isinstance(first, ast.If) and ast.unparse(first.test) == "not self.flavour.is_rtx"
            if (guarded and isinstance(first.body[-1], ast.Return)) or node.name == "_choose_gpus":
                kept |= names_in(ast.unparse(node))
        elif isinstance(node, ast.Call) and dotted(node.func) == "hasattr":
            kept |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    return kept


def test_the_walk_finds_what_is_used():
    found = names_in("known = flavour.trt.Known\nknown.SM89\nself.flavour.trt.A.B.C\ntrt.__version__\nx.y = trt.D")
    assert found == {"Known", "Known.SM89", "A", "A.B", "A.B.C", "D"}


def test_the_runtime_itself_leaves_tensorrt_to_those_modules():
    others = [path for path in ROOM.glob("*.py") if path not in MODULES]
    assert CUDA in others and not any(names_in(path.read_text()) for path in others)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_what_we_take_from_tensorrt_is_in_both_or_only_reached_for_rtx(path):
    source = path.read_text()
    names = names_in(source)
    assert names, f"{path.name} takes nothing from TensorRT"
    assert not [name for name in names if not is_there(name, API["tensorrt_rtx"])]
    missing = {name for name in names if not is_there(name, API["tensorrt"])}
    assert missing <= rtx_alone(source)


def test_gpus_are_chosen_for_rtx_alone():
    """`_choose_gpus` is taken above to be reached for RTX alone: that is so where it is called."""
    calls = [
        ast.unparse(node.test)
        for node in ast.walk(ast.parse((CUDA.with_name("builder.py")).read_text()))
        if isinstance(node, ast.If) and any("_choose_gpus(" in ast.unparse(part) for part in node.body)
    ]
    assert calls == ["flavour.is_rtx and job.gpus"]


def public(kind):
    return {name for name in vars(kind) if not name.startswith("_")}


@pytest.mark.parametrize("name", API)
def test_the_fakes_have_no_names_that_the_real_ones_lack(fake_gpu, name):
    module, api = importlib.import_module(name), API[name]
    kinds = {key: kind for key, kind in vars(module).items() if isinstance(kind, type)}
    assert len(kinds) > 15
    for key, kind in kinds.items():
        assert key in api
        assert public(kind) - {"Severity"} <= {*api[key]}, key


def signature_answers_bool(function):
    lines = [line.strip() for line in (function.__doc__ or "").splitlines()]
    answers = {line.rpartition(" -> ")[2] for line in lines if " -> " in line and "self:" in line}
    return answers == {"bool"}


def test_the_fake_says_false_where_the_real_one_does(fake_gpu, real_rtx):
    """Where a method of the real one answers a bool, that of the fake answers one that must be looked at."""
    fake = importlib.import_module("tensorrt_rtx")
    checked = []
    for key, kind in vars(fake).items():
        for name in public(kind) if isinstance(kind, type) else ():
            function = vars(kind)[name]
            if inspect.isfunction(function):
                must = signature_answers_bool(getattr(getattr(real_rtx, key), name))
                assert (function.__annotations__.get("return") == "Answer") == must, f"{key}.{name}"
                checked.append(must)
    assert sum(checked) > 8 and not all(checked)


@pytest.fixture(scope="module")
def real_rtx():
    return pytest.importorskip("tensorrt_rtx", reason="pip install 'vae-export[rtx]'", exc_type=ImportError)


def test_the_installed_rtx_has_all_that_its_list_says(real_rtx):
    for kind, members in API["tensorrt_rtx"].items():
        if not hasattr(real_rtx, kind):  # reached through what a method gives
            assert kind in ("ParserError",)
            continue
        missing = [member for member in members if not hasattr(getattr(real_rtx, kind), member)]
        assert not missing, f"{kind} of TensorRT-RTX {real_rtx.__version__} lacks {missing}"


# CUDA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_cuda():
    return pytest.importorskip("cuda.bindings.runtime", reason="pip install 'vae-export[rtx]'", exc_type=ImportError)


def test_the_fake_cuda_has_the_functions_and_values_of_the_real_one(fake_gpu, real_cuda):
    fake = importlib.import_module("cuda.bindings.runtime")
    assert fake is not real_cuda
    names = [name for name in vars(fake) if name.startswith("cuda")]
    assert len(names) > 20
    for name in names:
        ours, theirs = getattr(fake, name), getattr(real_cuda, name)
        if inspect.isfunction(ours):
            assert [*inspect.signature(ours).parameters] == [*inspect.signature(theirs).parameters], name
        elif isinstance(ours, type):
            assert {member.name: member.value for member in ours}.items() <= {
                member.name: int(member) for member in theirs
            }.items()
        else:
            assert ours == theirs, name


def test_the_real_cuda_has_all_that_we_call(real_cuda):
    source = CUDA.read_text()
    called = {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and dotted(node.func) == "self.call" and isinstance(node.args[0], ast.Constant)
    }
    taken = {
        dotted(node).partition("_api.")[2]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and "_api." in dotted(node)
    }
    assert len(called) > 12 and len(taken) > 4
    for name in called | taken:
        found = real_cuda
        for part in name.split("."):
            found = getattr(found, part)
