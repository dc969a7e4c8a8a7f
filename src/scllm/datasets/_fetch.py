"""Downloading files from their public source into the cache, with a check of their content."""

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
    """Return the path of a file in the cache."""
    return Path(settings.cache_dir) / name


def fetch(name: str, url: str, digest: str | Callable[[], str], *, advice: str) -> Path:
    """Return a file from the cache, downloading it first if it is not there yet.

    Parameters
    ----------
    name
        Name of the file in the cache.
    url
        Address to download it from, which must be https.
    digest
        Algorithm and hexadecimal checksum, ``"sha256:..."``, or a function that returns it, which is only called to
        download the file.
    advice
        Part of the message that says what to do if the download fails.
    """
    path = cached(name)
    if path.is_file() and callable(digest):
        return path
    try:
        digest = digest() if callable(digest) else digest
        pooch.get_logger().setLevel("WARNING")  # scllm logs the download itself
        if not path.is_file():
            log.info("downloading %s", url)
        pooch.retrieve(url, digest, path.name, path.parent, downloader=_https(url))
    except RequestException as error:
        raise FileNotFoundError(f"Expected to download {url}, got no answer ({error}). {advice}") from error
    except ValueError as error:
        raise ValueError(
            f"Expected the file at {url} to have checksum {digest}, got another one: {error} The file has changed, or "
            f"was damaged during the download. Try again; if that does not help, {advice[0].lower()}{advice[1:]}"
        ) from error
    return path


def figshare_md5(article: int, file: int) -> str:
    """Look up the checksum that figshare gives for a file of an article."""
    url = f"https://api.figshare.com/v2/articles/{article}/files?page_size=100"
    answer = io.BytesIO()
    _https(url)(url, answer, None)
    files = {entry["id"]: entry["computed_md5"] for entry in json.loads(answer.getvalue())}
    if file not in files:
        raise RequestException(f"figshare article {article} has no file {file}")
    return f"md5:{files[file]}"


def _https(url: str) -> pooch.HTTPDownloader:
    """Make a downloader that only uses https, with a progress bar if :func:`scllm._log.show_progress` allows it."""
    _check_scheme(url)
    return pooch.HTTPDownloader(progressbar=show_progress(), timeout=_TIMEOUT, hooks={"response": _check_redirection})


def _check_redirection(response: Response, **_: object) -> None:
    if response.is_redirect:
        _check_scheme(urljoin(response.url, response.headers["location"]))


def _check_scheme(url: str) -> None:
    if not url.startswith("https://"):
        raise RequestException(f"{url} is not an https address")
