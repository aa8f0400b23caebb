"""The same job on a Ray cluster: the same bytes, whatever dies on the way."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dataset import files_of

from runtimes import BackendUnavailable
from vae_export.dataset import Opening, encode_dataset
from vae_export.dataset_sources import open_source

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="pip install 'vae-export[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="pip install 'vae-export[ray]'")

# Ray's own: sockets and pipes that it leaves to the garbage collector, and what it deprecates in itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:ray"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n in range(24):
        size = ((64, 48, 3), (48, 64, 3))[n % 2]
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(root / f"{n:02}.png")
    (root / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def run(images, tiny_bundle, tmp_path_factory):
    """run(out, options) -> (summary, files): the job over the 24 images and the broken one."""
    root = tmp_path_factory.mktemp("out")

    def encode(out, **options):
        options = {"workers": 0, "images_per_shard": 4, "batch_size": 2, **options}
        opening = Opening(str(tiny_bundle), threads=1)
        summary = encode_dataset(open_source(images), root / out, opening, **options)
        return summary, files_of(root / out)

    return encode


@pytest.fixture(scope="module")
def expected(run):
    return run("alone")[1]


@pytest.fixture
def nodes():
    """A cluster of a head and two more nodes, processes of this machine."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONPATH"] = path
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster, others
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_cluster_writes_the_bytes_of_one_machine(run, expected, nodes):
    cluster, _ = nodes
    summary, files = run("cluster", ray=cluster.address, ray_workers=2)
    assert (summary.images, summary.encoded, summary.failed) == (25, 24, 1)
    assert files == expected
    again, files = run("cluster", ray=cluster.address, ray_workers=1)
    assert (again.encoded, again.shards_written) == (0, 0) and files == expected


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "node"])
def test_what_dies_is_done_again_by_others(run, expected, nodes, victim):
    cluster, others = nodes
    died = threading.Event()

    def kill(what, done, total):
        if done >= 4 and not died.is_set():
            died.set()
            if victim == "node":
                cluster.remove_node(others[0], allow_graceful=False)
            else:
                for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
                    name = Path(f"/proc/{pid}/cmdline")
                    if name.exists() and b"ray::_MapWorker" in name.read_bytes():
                        os.kill(pid, signal.SIGKILL)
                        break

    summary, files = run(victim, ray=cluster.address, ray_workers=2, progress=kill)
    assert died.is_set() and summary.encoded == 24 and files == expected


def test_where_there_is_no_cluster_it_says_so(run):
    with pytest.raises(BackendUnavailable, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        run("nowhere", ray="127.0.0.1:1")
