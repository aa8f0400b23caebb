"""Loading from the Hugging Face Hub, against a server on loopback that answers as the Hub does."""

import contextlib
import hashlib
import json

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import save

import vae_export.checkpoints.architecture
import vae_export.checkpoints.load
from runtimes.errors import ConfigError
from tests.helpers.checkpoint_samples import (
    GROUPS,
    REPO,
    VARIANTS,
    WEIGHTS,
    assert_same_weights,
    factors,
    repository,
    save_exploit,
    source_model,
    to_ldm,
    weights_of,
)
from tests.helpers.hub_server import MEMBER_TOKEN
from vae_export import AutoencoderKL, VaeConfig
from vae_export.checkpoints.hub import Hub, parse_hub_url
from vae_export.checkpoints.load import load_model


def test_a_hub_id_gives_the_model_and_its_origin(hub):
    commit = hub.add(REPO, repository("sd"))
    model = AutoencoderKL.from_pretrained(REPO)
    assert_same_weights(model, weights_of("sd"))
    source = model.source
    assert (source.given, source.kind, source.repo, source.commit) == (REPO, "hub", REPO, commit)
    assert source.weights_sha256 == hashlib.sha256(repository("sd")[WEIGHTS]).hexdigest()


def test_a_revision_is_a_branch_or_a_commit(hub):
    old = hub.add(REPO, repository("sd"))
    new = hub.add(REPO, repository("flux"))
    other = hub.add(REPO, repository("tiny"), branch="refs/pr/1")
    for revision, commit, variant in [
        (None, new, "flux"),
        ("main", new, "flux"),
        (old, old, "sd"),
        (new, new, "flux"),
        ("refs/pr/1", other, "tiny"),
    ]:
        model = AutoencoderKL.from_pretrained(REPO, revision=revision)
        assert model.source.commit == commit
        assert_same_weights(model, weights_of(variant))


def test_config_and_weights_are_of_one_commit_even_if_the_branch_moves(hub, monkeypatch):
    old, answer = hub.add(REPO, repository("sd")), hub.answer

    def answer_then_push(path, authorization):
        reply = answer(path, authorization)
        if hub.requests[-1].startswith("GET") and path.endswith("config.json"):
            hub.add(REPO, repository("flux"))
        return reply

    monkeypatch.setattr(hub, "answer", answer_then_push)
    model = AutoencoderKL.from_pretrained(REPO)
    assert model.source.commit == old
    assert_same_weights(model, weights_of("sd"))


def test_the_vae_of_a_pipeline_repository_is_in_its_subfolder(hub):
    commit = hub.add(REPO, repository(folder="vae/") | {"model_index.json": b"{}"})
    model = AutoencoderKL.from_pretrained(REPO, subfolder="vae")
    assert_same_weights(model, weights_of("tiny"))
    assert model.source.commit == commit
    with pytest.raises(ConfigError, match="is a whole pipeline: give subfolder='vae'"):
        AutoencoderKL.from_pretrained(REPO)


def test_a_repository_with_only_the_half_precision_variant_loads(hub):
    files = repository()
    hub.add(REPO, {"config.json": files["config.json"], WEIGHTS.replace(".saf", ".fp16.saf"): files[WEIGHTS]})
    assert_same_weights(AutoencoderKL.from_pretrained(REPO), weights_of("tiny"))


@pytest.mark.parametrize("form", ["blob", "resolve"])
@pytest.mark.parametrize("host", ["https://huggingface.co", "https://hf.co", "endpoint"])
def test_the_url_of_a_file_loads_it(form, host, hub):
    old = hub.add(REPO, {"folder/a vae.safetensors": save(to_ldm(weights_of("tiny")))})
    hub.add(REPO, {"README.md": b"the file is gone from main"})
    host = hub.url if host == "endpoint" else host
    url = f"{host}/{REPO}/{form}/{old}/folder/a%20vae.safetensors?download=true"
    model = AutoencoderKL.from_single_file(url, config=GROUPS)
    assert_same_weights(model, weights_of("tiny"))
    assert (model.source.given, model.source.kind, model.source.repo, model.source.commit) == (url, "hub", REPO, old)
    assert factors(model) == (None, None)


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("https://huggingface.co/a/b/blob/main/c/d.safetensors", ("a/b", "main", "c/d.safetensors")),
        ("http://hf.co/a/b/resolve/v1/d.safetensors?download=true", ("a/b", "v1", "d.safetensors")),
        ("https://huggingface.co/a/b/blob/refs%2Fpr%2F1/d.safetensors", ("a/b", "refs/pr/1", "d.safetensors")),
        ("models/https/d.safetensors", None),
    ],
)
def test_urls_are_taken_apart(url, parsed):
    assert parse_hub_url(url) == parsed


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a/b/blob/main/vae.safetensors",
        "https://huggingface.co.example.com/a/b/blob/main/vae.safetensors",
        "https://huggingface.co/a/b",
        "https://huggingface.co/a/b/tree/main/vae.safetensors",
        "https:///a/b/blob/main/vae.safetensors",
    ],
)
def test_urls_of_anything_else_are_refused(url, hub, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT")
    with pytest.raises(
        ConfigError, match=r"is not the URL of a file on the Hub, which reads https://huggingface.co/ORG"
    ):
        AutoencoderKL.from_single_file(url)
    assert hub.requests == []


def test_a_url_cannot_leave_the_cache(hub):
    hub.add(REPO, repository())
    with pytest.raises(ConfigError, match="could not get"):
        AutoencoderKL.from_single_file(f"{hub.url}/{REPO}/blob/main/..%2F..%2Fvae.safetensors")


def test_load_model_takes_any_source(hub, tiny_file, tmp_path, monkeypatch):
    """What the command line's --model may name; without one, the embedded model."""
    commit = hub.add(REPO, repository(folder="vae/") | {"ldm.safetensors": tiny_file.read_bytes()})
    source_model("tiny").save_pretrained(tmp_path / "embedded")
    monkeypatch.setattr(vae_export.checkpoints.load, "EMBEDDED", tmp_path / "embedded")
    at_commit = Hub(revision=commit)
    hub.add(REPO, {"README.md": b"all is gone from main"})
    for model, kind, origin in [
        (load_model(), "embedded", None),
        (load_model(tmp_path / "embedded"), "directory", None),
        (load_model(str(tiny_file), config=GROUPS), "file", None),
        (load_model(REPO, subfolder="vae", hub=at_commit), "hub", commit),
        (load_model(f"https://huggingface.co/{REPO}/blob/main/ldm.safetensors", hub=at_commit), "hub", commit),
    ]:
        assert_same_weights(model, weights_of("tiny"))
        assert (model.source.kind, model.source.commit) == (kind, origin)


# The Hub: config of a single file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder/config.json", "vae/config.json"])
def test_a_file_on_the_hub_has_the_config_of_its_repository(place, hub):
    files = repository()
    hub.add(REPO, {"folder/a.safetensors": files[WEIGHTS], place: files["config.json"]})
    url = f"https://huggingface.co/{REPO}/blob/main/folder/a.safetensors"
    model = AutoencoderKL.from_single_file(url)
    assert model.config == VaeConfig.from_dict(VARIANTS["tiny"])
    assert factors(AutoencoderKL.from_single_file(url, scaling_factor=2.0)) == (2.0, 0.25)
    assert factors(AutoencoderKL.from_single_file(url, config={"scaling_factor": 3.0})) == (3.0, 0.25)


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({"_class_name": "UNet2DConditionModel", "in_channels": 4}, contextlib.nullcontext),
        (VARIANTS["sd"], lambda: pytest.warns(UserWarning, match="is not the config of these weights")),
    ],
    ids=["unet", "another-vae"],
)
def test_the_config_of_another_model_in_the_repository_is_not_taken(config, warned, hub):
    hub.add(REPO, {"a.safetensors": repository()[WEIGHTS], "config.json": json.dumps(config).encode()})
    url = f"https://huggingface.co/{REPO}/blob/main/a.safetensors"
    with warned(), pytest.raises(ConfigError, match="norm_num_groups"):
        AutoencoderKL.from_single_file(url)
    with warned():
        assert factors(AutoencoderKL.from_single_file(url, config=GROUPS)) == (None, None)


def test_the_config_may_be_that_of_a_hub_id(hub, tiny_file):
    hub.add("plain/vae", repository())
    hub.add("whole/pipeline", repository(folder="vae/"))
    for repo in ("plain/vae", "whole/pipeline"):
        assert AutoencoderKL.from_single_file(tiny_file, config=repo).config == VaeConfig.from_dict(VARIANTS["tiny"])


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("stabilityai/sd-vae-ft-mse-original/blob/main/vae-ft-mse-840000-ema-pruned.safetensors", (0.18215, None)),
        ("stabilityai/sdxl-vae/resolve/main/sdxl_vae.safetensors", (0.13025, None)),
        ("black-forest-labs/FLUX.1-schnell/blob/main/ae.safetensors", (0.3611, 0.1159)),
        ("stabilityai/stable-diffusion-3-medium/blob/main/sd3_medium.safetensors", (1.5305, 0.0609)),
    ],
)
def test_factors_of_public_repositories_are_known(file, expected, hub, monkeypatch):
    """With tiny files in their places, whose architecture is taken for a public one."""
    public = (*vae_export.checkpoints.architecture.PUBLIC_ARCHITECTURES, ((16, 32), 1))
    monkeypatch.setattr(vae_export.checkpoints.architecture, "PUBLIC_ARCHITECTURES", public)
    monkeypatch.setattr(vae_export.checkpoints.architecture, "PUBLIC_NORM_NUM_GROUPS", 8)
    org, name, _, _, filename = file.split("/")
    hub.add(f"{org}/{name}", {filename: save(to_ldm(weights_of("tiny")))})
    assert factors(AutoencoderKL.from_single_file(f"https://huggingface.co/{file}")) == expected


# The Hub: out of reach --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "the server is gone"])
def test_what_is_in_the_cache_loads_without_the_hub(how, hub, monkeypatch, no_waiting):
    commit = hub.add(REPO, repository() | {"ldm.safetensors": save(to_ldm(weights_of("tiny")))})
    url = f"https://huggingface.co/{REPO}/blob/main/ldm.safetensors"
    AutoencoderKL.from_pretrained(REPO)
    AutoencoderKL.from_single_file(url)
    asked, only_local = len(hub.requests), {"local_files_only": how == "local_files_only"}
    if how == "the server is gone":
        hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    for model in (
        AutoencoderKL.from_pretrained(REPO, **only_local),
        AutoencoderKL.from_pretrained(REPO, revision=commit, **only_local),
        AutoencoderKL.from_single_file(url, **only_local),
    ):
        assert_same_weights(model, weights_of("tiny"))
        assert model.source.commit == commit
        assert factors(model) == (0.5, 0.25)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "the server is gone"])
def test_a_file_without_a_config_in_its_repository_loads_from_the_cache_too(how, hub, monkeypatch, no_waiting):
    hub.add(REPO, {"a.safetensors": repository()[WEIGHTS]})
    url = f"https://huggingface.co/{REPO}/blob/main/a.safetensors"
    AutoencoderKL.from_single_file(url, config=GROUPS)
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    assert_same_weights(AutoencoderKL.from_single_file(url, config=GROUPS), weights_of("tiny"))


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "the server is gone", "the server is down"])
def test_what_is_not_in_the_cache_is_named_with_the_way_out(how, hub, monkeypatch, no_waiting):
    hub.add(REPO, repository())
    if how == "the server is gone":
        hub.close()
    elif how == "the server is down":
        hub.broken = 503
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    only_local = {"local_files_only": how == "local_files_only"}
    message = "is not in the local cache and the Hub was not reached; go online once, or give a local path"
    with pytest.raises(ConfigError, match=f"{REPO}/config.json {message}"):
        AutoencoderKL.from_pretrained(REPO, **only_local)
    with pytest.raises(ConfigError, match=f"{REPO}/vae.safetensors {message}"):
        AutoencoderKL.from_single_file(f"https://huggingface.co/{REPO}/blob/main/vae.safetensors", **only_local)


def test_offline_weights_that_are_not_in_the_cache_are_not_said_to_be_missing(hub):
    hub.add(REPO, repository())
    huggingface_hub.hf_hub_download(REPO, "config.json")
    with pytest.raises(ConfigError, match=f"{WEIGHTS} is not in the local cache"):
        AutoencoderKL.from_pretrained(REPO, local_files_only=True)


def test_a_config_that_could_not_be_asked_for_is_not_taken_for_missing(hub, no_waiting):
    """Else a hiccup of the network would change the factors of the model."""
    hub.add(REPO, {"a.safetensors": repository()[WEIGHTS], "config.json": repository()["config.json"]})
    huggingface_hub.hf_hub_download(REPO, "a.safetensors")
    hub.broken = 500
    with pytest.raises(ConfigError, match=r"config.json is not in the local cache and the Hub was not reached"):
        AutoencoderKL.from_single_file(f"https://huggingface.co/{REPO}/blob/main/a.safetensors", config=GROUPS)


def test_a_download_that_breaks_off_is_an_error_and_leaves_nothing_behind(hub, no_waiting):
    hub.add(REPO, repository())
    hub.cut = True
    with pytest.raises(ConfigError, match=f"could not get {WEIGHTS} of {REPO} from the Hub"):
        AutoencoderKL.from_pretrained(REPO)
    hub.cut = False
    assert_same_weights(AutoencoderKL.from_pretrained(REPO), weights_of("tiny"))


# The Hub: what is not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "hf_of_nobody"])
def test_a_missing_or_private_repository_is_named(token, hub):
    with pytest.raises(ConfigError, match=r"no repository no/where on the Hub.*private: log in with `hf auth login`"):
        AutoencoderKL.from_pretrained("no/where", token=token)
    with pytest.raises(ConfigError, match="no repository no/where on the Hub"):
        AutoencoderKL.from_single_file("https://huggingface.co/no/where/blob/main/a.safetensors", token=token)


@pytest.mark.parametrize("token", [None, "hf_of_nobody"])
def test_a_gated_repository_says_how_to_get_in(token, hub):
    hub.add(REPO, repository())
    hub.gated.add(REPO)
    with pytest.raises(ConfigError, match=f"{REPO} is gated: accept its licence.*hf auth login"):
        AutoencoderKL.from_pretrained(REPO, token=token)
    assert_same_weights(AutoencoderKL.from_pretrained(REPO, token=MEMBER_TOKEN), weights_of("tiny"))


@pytest.mark.parametrize("revision", ["fp16", "0" * 40])
def test_a_missing_revision_is_named(revision, hub):
    hub.add(REPO, repository())
    with pytest.raises(ConfigError, match=f"{REPO} has no revision '{revision}'"):
        AutoencoderKL.from_pretrained(REPO, revision=revision)
    with pytest.raises(ConfigError, match=f"{REPO} has no revision '{revision}'"):
        AutoencoderKL.from_single_file(f"https://huggingface.co/{REPO}/blob/{revision}/{WEIGHTS}")


def test_a_missing_file_is_named(hub):
    hub.add(REPO, {"README.md": b""})
    with pytest.raises(ConfigError, match=f"{REPO} has no file vae.safetensors at revision main"):
        AutoencoderKL.from_single_file(f"https://huggingface.co/{REPO}/blob/main/vae.safetensors")
    with pytest.raises(ConfigError, match=f"{REPO} has no file config.json at revision main"):
        AutoencoderKL.from_pretrained(REPO)


def test_a_repository_with_only_a_pickle_says_how_to_convert_it(hub):
    pickled = "diffusion_pytorch_model.bin"
    hub.add(REPO, {"config.json": repository()["config.json"], pickled: b"\x80\x02"})
    with pytest.raises(ConfigError, match=f"only .safetensors is read.*hf download {REPO} {pickled}.*python -c"):
        AutoencoderKL.from_pretrained(REPO)
    assert not [request for request in hub.requests if pickled in request]


def test_the_url_of_a_pickle_is_refused_before_anything_is_downloaded(hub):
    with pytest.raises(ConfigError, match=r"model.ckpt is a pickle"):
        AutoencoderKL.from_single_file("https://huggingface.co/someone/vae/blob/main/model.ckpt")
    assert hub.requests == []


def test_a_pickle_on_the_hub_in_disguise_is_refused(hub, tmp_path):
    save_exploit(tmp_path / "exploit", "torch")
    hub.add(REPO, repository() | {WEIGHTS: (tmp_path / "exploit").read_bytes()})
    with pytest.raises(ConfigError, match="is a pickle"):
        AutoencoderKL.from_pretrained(REPO)
