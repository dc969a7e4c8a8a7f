"""Files from their public source: checked, kept in the cache, whole or not there."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import pooch
from requests import RequestException, Response

from scllm import settings
from scllm._log import log, show_progress

__all__ = ["cached", "fetch", "figshare_md5"]

_TIMEOUT = 60


def cached(name: str) -> Path:
    """Where a downloaded file is kept."""
    return Path(settings.cache_dir) / name


def fetch(name: str, url: str, digest: str | Callable[[], str], *, advice: str) -> Path:
    """Return a file from the cache, or download it into the cache.

    Parameters
    ----------
    name
        Of the file in the cache.
    url
        Where it is, https only.
    digest
        Algorithm and hexadecimal checksum, ``"sha256:..."``; a function is asked for it when the file is downloaded.
    advice
        What to do if the source cannot be reached.
    """
    path = cached(name)
    if path.is_file() and callable(digest):
        return path
    try:
        digest = digest() if callable(digest) else digest
        pooch.get_logger().setLevel("WARNING")  # scllm's own logger says it
        if not path.is_file():
            log.info("downloading %s", url)
        pooch.retrieve(url, digest, path.name, path.parent, downloader=_https(url))
    except RequestException as error:
        raise FileNotFoundError(f"Expected to download {url}, got no answer ({error}). {advice}") from error
    except ValueError as error:
        raise ValueError(
            f"Expected the file at {url} to have checksum {digest}, got another one: {error} It has changed, or was "
            f"damaged on the way. Try again; if it stays so, {advice[0].lower()}{advice[1:]}"
        ) from error
    return path


def figshare_md5(article: int, file: int) -> str:
    """The checksum that figshare states for a file of an article."""
    url = f"https://api.figshare.com/v2/articles/{article}/files?page_size=100"
    answer = io.BytesIO()
    _https(url)(url, answer, None)
    files = {entry["id"]: entry["computed_md5"] for entry in json.loads(answer.getvalue())}
    if file not in files:
        raise RequestException(f"figshare article {article} has no file {file}")
    return f"md5:{files[file]}"


def _https(url: str) -> pooch.HTTPDownloader:
    """Downloads over https only, with a progress bar where one may be drawn."""
    _check_scheme(url)
    return pooch.HTTPDownloader(progressbar=show_progress(), timeout=_TIMEOUT, hooks={"response": _check_redirection})


def _check_redirection(response: Response, **_: object) -> None:
    if response.is_redirect:
        _check_scheme(urljoin(response.url, response.headers["location"]))


def _check_scheme(url: str) -> None:
    if not url.startswith("https://"):
        raise RequestException(f"{url} is not an https address")
