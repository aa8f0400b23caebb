"""A job on a real Ray cluster of several nodes on this machine: the same bytes, also where workers and a node die.

Tests vae_export/dataset/ray.py, vae_export/dataset/shard_work.py.
"""

import contextlib
import os
import signal
import threading
import time
from typing import Any

import psutil
import pytest

from runtimes import BackendUnavailable, ConfigError
from tests.helpers.dataset_samples import encode, make_folder, written

pytest.importorskip("pyarrow", reason="pip install 'vae-export[dataset]'")
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
pytest.importorskip("ray.data", reason="pip install 'vae-export[ray]'")

# Ray leaves pipes and sockets of its processes to the garbage collector, and sets fields of its own that it deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), 40)


@pytest.fixture(scope="module")
def expected(folder, onnx_bundle, tmp_path_factory):
    """What the job on one machine writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    encode(folder, onnx_bundle, out)
    return written(out)


@pytest.fixture
def cluster(pytestconfig, monkeypatch):
    """Three nodes of this machine: a head on which nothing runs, and two of two cores each."""
    import ray
    from ray.cluster_utils import Cluster

    root = pytestconfig.rootpath
    monkeypatch.setenv("PYTHONPATH", str(root))
    made: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.workers = [made.add_node(num_cpus=2) for _ in range(2)]
    yield made
    with contextlib.suppress(Exception):
        ray.shutdown()
    made.shutdown()


def test_two_workers_on_two_nodes_write_the_same(cluster, folder, tiny_bundle, expected, tmp_path):
    summary = encode(folder, tiny_bundle, tmp_path / "out", ray=cluster.address, ray_workers=2)
    assert (summary.encoded, summary.shards_written) == (40, 10)
    assert written(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_worker_and_a_node_are_killed_in_the_middle(cluster, tiny_bundle, tmp_path):
    folder = make_folder(tmp_path / "images", 400)
    encode(folder, tiny_bundle, tmp_path / "expected")
    killed = []

    def kill():
        while len(list((tmp_path / "out" / "shards").glob("0*"))) < 5:
            time.sleep(0.05)
        actors = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "MapWorker" in " ".join(process.info["cmdline"] or [])
        ]
        os.kill(actors[0].pid, signal.SIGKILL)
        killed.append("worker")
        while len(list((tmp_path / "out" / "shards").glob("0*"))) < 20:
            time.sleep(0.05)
        cluster.remove_node(cluster.workers[1], allow_graceful=False)
        killed.append("node")

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    summary = encode(folder, tiny_bundle, tmp_path / "out", ray=cluster.address, ray_workers=2)
    killer.join(timeout=10)
    assert killed == ["worker", "node"] and summary.encoded == 400
    assert written(tmp_path / "out") == written(tmp_path / "expected")


def test_what_is_there_is_not_done_again_and_errors_are_listed(cluster, tiny_bundle, tmp_path):
    folder = make_folder(tmp_path / "images", 10)
    encode(folder, tiny_bundle, tmp_path / "out")
    (folder / "001.png").write_bytes(b"broken")
    summary = encode(folder, tiny_bundle, tmp_path / "out", ray=cluster.address, ray_workers=1)
    assert (summary.encoded, summary.unchanged, summary.failed) == (0, 9, 1)


def test_no_cluster_is_said_in_a_line(folder, tiny_bundle, tmp_path):
    with pytest.raises(BackendUnavailable, match=r"no Ray cluster at '127.0.0.1:9'"):
        encode(folder, tiny_bundle, tmp_path / "out", ray="127.0.0.1:9")


def test_more_runtimes_than_there_are_cpus_are_refused(folder, tiny_bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"1000 runtimes of 1 CPUs.*the \d+ CPUs that this process may use"):
        encode(folder, tiny_bundle, tmp_path / "out", ray="local", ray_workers=1000)
