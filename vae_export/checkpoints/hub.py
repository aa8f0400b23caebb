"""Download files of a Hugging Face Hub repository; its failures become `ConfigError` with advice."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from runtimes.errors import ConfigError


class Hub(NamedTuple):
    """Settings for requests to the Hub. HF_ENDPOINT and HF_HUB_OFFLINE apply as in huggingface_hub."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | None = None
    local_files_only: bool = False

    @property
    def offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    def download(self, repo: str, filename: str, *, optional: bool = False) -> Path | None:
        """Download a file and return its local path; None if it is `optional` and the repository lacks it.

        Offline, also None if it is `optional` and the cache lacks it. Otherwise raises `ConfigError`.
        """
        from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache

        if optional and re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            cached = try_to_load_from_cache(repo, filename, self.cache_dir, self.revision)
            if cached is _CACHED_NO_EXIST:  # the files of a commit never change
                return None
        # The class comes from httpx, httpx2 or requests, depending on the version of huggingface_hub.
        http_error: type[Exception] = getattr(errors, "HTTPError", OSError)
        try:
            return Path(
                hf_hub_download(
                    repo,
                    filename,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=self.local_files_only,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            # Also raised when the Hub cannot be reached. Then None would silently load other files, so this raises.
            if optional and self.offline:
                return None
            raise ConfigError(
                f"{repo}/{filename} is not in the local cache and the Hub was not reached; go online once, or give a "
                f"local path ({first_line(error)})"
            ) from None
        except errors.EntryNotFoundError:
            if optional:
                return None
            raise ConfigError(
                f"repository {repo} has no file {filename} at revision {self.revision or 'main'}"
            ) from None
        except errors.GatedRepoError:
            raise ConfigError(
                f"repository {repo} is gated: accept its licence on the Hub, then log in with `hf auth login`"
            ) from None
        except errors.RevisionNotFoundError:
            raise ConfigError(f"repository {repo} has no revision {self.revision!r}") from None
        except errors.RepositoryNotFoundError:
            raise ConfigError(
                f"no repository {repo} on the Hub (or it is private: log in with `hf auth login`)"
            ) from None
        except (http_error, OSError, ValueError) as error:  # ValueError: an invalid name of a repository or file
            raise ConfigError(f"could not get {filename} of {repo} from the Hub: {first_line(error)}") from None

    def names_in(self, repo: str, folder: str, near: Path) -> list[str]:
        """Return the file names in a repository's folder; offline, those in the cache beside the file `near`."""
        from huggingface_hub import HfApi, RepoFile, errors

        if self.offline:
            return [path.name for path in near.parent.iterdir()]
        http_error: type[Exception] = getattr(errors, "HTTPError", OSError)
        try:
            tree = HfApi(token=self.token).list_repo_tree(repo, folder.rstrip("/") or None, revision=self.revision)
            return [entry.path.rpartition("/")[2] for entry in tree if isinstance(entry, RepoFile)]
        except (http_error, OSError, ValueError) as error:
            raise ConfigError(
                f"repository {repo} has no weights of the plain name, and its files could not be listed "
                f"({first_line(error)}); give variant= (--variant) if the weights have one"
            ) from None

    def pinned(self, downloaded: Path) -> Hub:
        """Return these settings with the commit of a downloaded file as revision: the branch may move meanwhile."""
        return self._replace(revision=commit_of(downloaded) or self.revision)


def parse_hub_url(text: str) -> tuple[str, str, str] | None:
    """Parse `https://huggingface.co/ORG/REPO/blob/REV/path/file` -> (ORG/REPO, REV, path/file); None if not a URL.

    Raises `ConfigError` for the URL of anything but a file on the Hub.
    """
    if not re.match(r"https?://", text):
        return None
    url = urlsplit(text)
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    hosts = {"huggingface.co", "www.huggingface.co", "hf.co", urlsplit(endpoint).netloc}
    parts = [unquote(part) for part in url.path.strip("/").split("/")]
    if url.netloc not in hosts or len(parts) < 5 or parts[2] not in ("blob", "resolve", "raw"):
        raise ConfigError(
            f"{text} is not the URL of a file on the Hub, which reads "
            "https://huggingface.co/ORG/REPO/blob/REVISION/FILE; for a file from elsewhere, download it and give "
            "its path"
        )
    return f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:])


def check_repository(source: str) -> str:
    """Return `source` if it has the form of a Hub id, ORG/REPO; otherwise raise `ConfigError`."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith(("./", "../", "~")):
        return source
    raise ConfigError(f"{source} is neither a directory or file here nor a Hub id (ORG/REPO)")


def commit_of(path: Path) -> str | None:
    """Return the commit in the path of a Hub cache file, .../snapshots/COMMIT/file; None for other paths."""
    match = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(path))
    return match.group(1) if match else None


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or its class name if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
