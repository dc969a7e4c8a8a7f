"""Files from their public source: checked, kept in the cache, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO, TypeVar
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from scllm import settings
from scllm._log import log

__all__ = ["cached", "fetch", "figshare_md5"]

T = TypeVar("T")
_TIMEOUT = 60
_CHUNK = 1 << 20


def cached(name: str) -> Path:
    """Where a fetched file is kept."""
    return Path(settings.cache_dir) / name


def fetch(name: str, url: str, digest: str | Callable[[], str], *, advice: str) -> Path:
    """The file from the cache, or from its source into the cache.

    Parameters
    ----------
    name
        Of the file in the cache.
    url
        Where it is, https only.
    digest
        Algorithm and hexadecimal checksum, ``"sha256:..."``; a function is asked for it when the file is fetched.
    advice
        What to do where the source cannot be reached.
    """
    path = cached(name)
    if path.is_file() and (callable(digest) or _digest(path, digest) == digest):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s", url)
    descriptor, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            expected = _download(url, handle, digest, advice)
            handle.flush()
            os.fsync(handle.fileno())
        found = _digest(Path(fresh), expected)
        if found != expected:
            raise ValueError(
                f"{url} gave a file with checksum {found}, {expected} expected: it has changed, or was damaged on the "
                f"way. Try again; if it stays so, {advice[0].lower()}{advice[1:]}"
            )
        Path(fresh).replace(path)
    finally:
        Path(fresh).unlink(missing_ok=True)
    return path


def figshare_md5(article: int, file: int) -> str:
    """The checksum that figshare states for a file of an article."""
    with _open(f"https://api.figshare.com/v2/articles/{article}/files?page_size=100") as answer:
        files = {entry["id"]: entry["computed_md5"] for entry in json.load(answer)}
    if file not in files:
        raise OSError(f"figshare article {article} has no file {file}")
    return f"md5:{files[file]}"


def _download(url: str, handle: IO[bytes], digest: str | Callable[[], str], advice: str) -> str:
    """Write what is at the address, and say which checksum it should have."""
    expected = _reach(url, advice, digest) if callable(digest) else digest
    with _reach(url, advice, lambda: _open(url)) as answer:
        while chunk := _reach(url, advice, lambda: answer.read(_CHUNK)):
            handle.write(chunk)
    return expected


def _reach(url: str, advice: str, get: Callable[[], T]) -> T:
    """What the other side is asked for; what goes wrong on this side is none of its errors."""
    try:
        return get()
    # json.JSONDecodeError and unreadable answers are ValueErrors
    except (OSError, HTTPException, ValueError) as error:
        reason = f"HTTP status {error.code}" if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise FileNotFoundError(
            f"{url} could not be fetched ({reason}), a connection to it expected. {advice}"
        ) from error


def _open(url: str) -> IO[bytes]:
    _check_scheme(url)
    request = Request(url, headers={"User-Agent": "scllm"})
    return build_opener(_Https).open(request, timeout=_TIMEOUT)


class _Https(HTTPRedirectHandler):
    """Follows redirections to https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if not newurl.startswith("https://"):
            fp.close()
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    if not url.startswith("https://"):
        raise OSError(f"{url} is not an https address")


def _digest(path: Path, like: str) -> str:
    """Checksum of a file by the algorithm of another one."""
    algorithm = like.split(":")[0]
    with path.open("rb") as handle:
        return f"{algorithm}:{hashlib.file_digest(handle, algorithm).hexdigest()}"
