"""Nothing but VaeError comes out of bad bytes: hypothesis tries what could hurt, and what was found stays mended."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.fuzz_entries import CASES, ENTRIES, seeds, small_checkpoint, survives
from vae_export.checkpoints.load import EMBEDDED

SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
FEW, MANY = settings(SETTINGS, max_examples=50), settings(SETTINGS, max_examples=120)

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_seeds_are_good(entry):
    found = list(seeds(entry))
    assert found
    assert all(survives(entry, seed) for seed in found)


@pytest.mark.parametrize("case", sorted(CASES.glob("*/*")), ids=lambda case: f"{case.parent.name}/{case.name}")
def test_what_was_found_once_is_mended(case):
    survives(case.parent.name, case.read_bytes())


def mutated(draw, data):
    """A few of: other bytes somewhere, a piece left out, a piece twice, cut short."""
    for _ in range(draw(st.integers(1, 4))):
        first, last = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        piece = data[first : min(last, first + 64)]
        put = draw(st.one_of(st.binary(max_size=16), st.just(piece * 2), st.just(b""), st.just(b"\xff" * len(piece))))
        data = data[:first] + put + data[first + len(piece) :]
        if draw(st.integers(0, 9)) == 0:
            data = data[: draw(st.integers(0, len(data)))]
    return data


@pytest.mark.parametrize("entry", ENTRIES)
@FEW
@given(data=st.data())
def test_mutated_files(entry, data):
    good = data.draw(st.sampled_from(list(seeds(entry))))
    survives(entry, data.draw(st.composite(mutated)(good)))


@pytest.mark.parametrize("entry", ENTRIES)
@FEW
@given(data=st.binary(max_size=500))
def test_files_of_anything(entry, data):
    survives(entry, data)


def replaced(value, keys, put):
    """JSON with `put` at these keys, or without what is there where `put` is `...`."""
    if not keys:
        return put
    copy = list(value) if isinstance(value, list) else dict(value)
    if put is ... and len(keys) == 1:
        del copy[keys[0]]
    else:
        copy[keys[0]] = replaced(copy[keys[0]], keys[1:], put)
    return copy


def places(value, keys=()):
    yield keys
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*keys, key))


@pytest.mark.parametrize("entry", ["manifest", "config"])
@MANY
@given(data=st.data())
def test_json_with_anything_anywhere(entry, data):
    good = json.loads(data.draw(st.sampled_from(list(seeds(entry)))))
    good.pop("manifest_sha256", None)
    for _ in range(data.draw(st.integers(1, 3))):
        keys = data.draw(st.sampled_from(list(places(good))))
        good = replaced(good, keys, data.draw(anything | (st.just(...) if keys else st.nothing())))
        if not isinstance(good, (dict, list)):
            break
    survives(entry, json.dumps(good).encode())


@MANY
@given(st.data())
def test_configs_of_plausible_values(data):
    """Near what is right, where a rule may have been forgotten: what is accepted can be built, or is refused."""
    fields = json.loads((EMBEDDED / "config.json").read_bytes())
    sizes = st.integers(-1, 9) | st.sampled_from([16, 32, 1 << 16, 1 << 31, 1 << 63, 10**30])
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        fields[name] = data.draw(
            st.one_of(sizes, st.lists(sizes, max_size=5), st.floats(), st.none(), st.text(max_size=8), st.booleans())
        )
    survives("config", json.dumps(fields).encode())


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "nothing", ""]


@MANY
@given(data=st.data())
def test_safetensors_headers_of_anything(data):
    """The names of a VAE, with shapes, types and places that need not fit."""
    good = small_checkpoint()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        numbers = st.integers(-2, 600) | st.sampled_from([1 << 31, 1 << 62, 1 << 64])
        what = data.draw(st.sampled_from(["shape", "dtype", "data_offsets", "entry", "gone", "name"]))
        if what == "gone":
            header.pop(name, None)
        elif what == "name":
            header[data.draw(st.text(max_size=60))] = header.pop(name, {})
        elif what == "entry" or not isinstance(header.get(name), dict):
            header[name] = data.draw(anything)
        else:
            values = {"shape": st.lists(numbers, max_size=6), "dtype": st.sampled_from(DTYPES)}
            header[name][what] = data.draw(values.get(what, st.lists(numbers, min_size=2, max_size=2)))
    text = json.dumps(header).encode()
    said = data.draw(
        st.sampled_from([len(text), 0, 8, len(text) + 1, 1 << 40, 1 << 63])
        if data.draw(st.integers(0, 9)) == 0
        else st.just(len(text))
    )
    file = said.to_bytes(8, "little") + text + good[8 + length :]
    survives("checkpoint", file)
    survives("latents", file)


def test_atheris_runs(tmp_path):
    """The harness works, for some seconds; `make fuzz` gives it a minute."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("pip install atheris")
    done = subprocess.run([sys.executable, Path(__file__).with_name("run.py"), "--seconds", "2", "manifest"],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Done" in done.stdout
