"""A loopback imitation of the Hugging Face Hub: as much of its API as `huggingface_hub` asks to download one file.

Tests take the fixture as `hub` (conftest.py imports it).
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

MEMBER_TOKEN = "hf_of_a_member"


class HubServer:
    """Repositories in memory. Files stored with Git LFS (.safetensors) are redirected, as the Hub does it."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  #: repo -> commit -> file -> content
        self.branches: dict[str, dict[str, str]] = {}  #: repo -> branch -> commit
        self.gated: set[str] = set()  #: the repositories for members only
        self.broken: int | None = None  #: the status of every answer, where it is not None
        self.cut = False  #: whether connections break before the first byte of a large file
        self.requests: list[str] = []  #: "METHOD /path" of all that was asked
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections open, as the Hub does

            def do_HEAD(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(urlsplit(self.path).path, self.headers["Authorization"])
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if hub.cut and self.path.startswith("/storage"):
                    self.close_connection = True
                elif self.command == "GET":
                    self.wfile.write(body)

            do_GET = do_HEAD

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Under another name, since the Hub keeps large files on another host, which huggingface_hub treats differently.
        self.storage = f"http://localhost:{self._server.server_port}/storage"

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit these files, all that the repository then has on this branch; returns the 40-hex commit."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) for a path, ORG/REPO/resolve/REVISION/FILE or the storage of large files."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if self.broken is not None:
            return self.broken, {}, b""
        if parts[0] == "storage":
            return 200, {"ETag": f'"{parts[1]}"'}, self._stored(parts[1])
        if parts[:2] == ["api", "models"] and len(parts) >= 6 and parts[4] == "tree":
            return self._tree("/".join(parts[2:4]), parts[5], "/".join(parts[6:]))
        if len(parts) < 5 or parts[2] != "resolve":
            return 404, {}, b""
        repo, revision, filename = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repo not in self.commits:
            # To a stranger, the Hub does not tell a missing repository from a private one.
            return 404 if authorization else 401, {"X-Error-Code": "RepoNotFound"}, b"Repository not found"
        if repo in self.gated and authorization != f"Bearer {MEMBER_TOKEN}":
            return 403 if authorization else 401, {"X-Error-Code": "GatedRepo"}, b"Access to this model is restricted"
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"Invalid rev id"
        headers = {"X-Repo-Commit": commit}
        if filename not in self.commits[repo][commit]:
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b"Entry not found"
        data = self.commits[repo][commit][filename]
        if not filename.endswith(".safetensors"):
            return 200, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
        sha256 = hashlib.sha256(data).hexdigest()
        large = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        return 302, headers | large | {"Location": f"{self.storage}/{sha256}"}, b""

    def _tree(self, repo: str, revision: str, folder: str) -> tuple[int, dict[str, str], bytes]:
        """The files directly in a folder, as the Hub lists them."""
        files = self.commits[repo][self.branches[repo].get(revision, revision)]
        inside = [name for name in files if name.rpartition("/")[0] == folder]
        entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in inside]
        return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()

    def _stored(self, sha256: str) -> bytes:
        files = (data for commits in self.commits.values() for tree in commits.values() for data in tree.values())
        return next(data for data in files if hashlib.sha256(data).hexdigest() == sha256)

    def close(self) -> None:
        """Stop answering: from now on connections to the port are refused, and none is open."""
        self._server.shutdown()
        self._server.server_close()
        huggingface_hub.close_session()

    def __enter__(self) -> Self:
        # The default poll interval, half a second, is what every shutdown would wait for.
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@pytest.fixture(name="hub")
def hub_fixture(tmp_path, monkeypatch):
    """An empty Hub that huggingface_hub asks instead of the real one, with an empty cache and no token."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # huggingface_hub reads its environment once, when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()  # an earlier client may hold a proxy, or connections to an earlier server
        yield server
