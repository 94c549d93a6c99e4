"""Published files: downloaded once per machine, checked by their hash, kept in a cache directory.

A file has its final name only when it is whole and checked. Until then it is NAME.part, which an
interrupted download leaves and the next one continues.
"""

import contextlib
import hashlib
import http.client
import os
import pathlib
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

from flaxcnn.errors import WeightsError

TIMEOUT_S = 30.0  # of a connection on which nothing comes
PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # before each new attempt after a connection broke off
CHUNK_BYTES = 2**18

_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)  # what is a plain file name on every system
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", re.ASCII)


class _NetworkError(Exception):
    """The server cannot be reached, refuses, or broke off."""


def cache_directory() -> pathlib.Path:
    """Where downloaded files are kept: $FLAXCNN_CACHE, or the user's cache directory of flaxcnn."""
    chosen = os.environ.get("FLAXCNN_CACHE")
    if chosen:
        return pathlib.Path(chosen).expanduser()
    import platformdirs  # here, as with $FLAXCNN_CACHE nothing but Python is needed

    return platformdirs.user_cache_path("flaxcnn")


def cached(url: str, sha256_prefix: str) -> pathlib.Path:
    """The file of `url` in the cache directory, under its own name; downloaded if it is not there.

    With the file there, nothing is asked of the network. Of several processes one downloads, and
    the others wait for it.

    Args:
        url: http or https; the last part of its path is the file's name.
        sha256_prefix: the first hex digits, at least eight, of the file's SHA-256, which
            torchvision's file names end in ("resnet50-11ad3fa6.pth").

    Raises:
        WeightsError: if the file cannot be had (no network, the server refuses, another content),
            or cannot be kept (disk full, directory not writable); it says what would work.
    """
    path = cache_directory() / _file_name(url)
    if not re.fullmatch("[0-9a-f]{8,64}", sha256_prefix):
        raise WeightsError(f"{url}: {sha256_prefix!r} is not the first hex digits of a SHA-256")
    try:
        # A file that is there is not hashed again: it got its name once it was checked and on the
        # disk, VGG's 550 MB would take half a second or more of every start, and the reader of the
        # file checks its structure. What was put there by hand is trusted like other files of the
        # user's.
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(path):
                if not path.is_file():  # it may have come while we waited
                    _download(url, path, sha256_prefix)
    except _NetworkError as error:
        raise WeightsError(
            f"{url} could not be downloaded: {error}; try again, or download it elsewhere and put "
            f"it at {path}, or set FLAXCNN_CACHE to a directory that has it"
        ) from None
    except OSError as error:
        raise WeightsError(
            f"{url} cannot be kept as {path}: {error}; "
            "set FLAXCNN_CACHE to a directory that can be written and has room"
        ) from None
    return path


def _file_name(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise WeightsError(f"{url}: only http and https are downloaded")
    name = parts.path.rpartition("/")[2]
    if not _NAME.fullmatch(name):
        raise WeightsError(f"{url}: its path does not end in a plain file name")
    return name


# ------------------------------------------------------------------------------------- one process
@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of this file; the system frees it if the process dies."""
    from filelock import FileLock, Timeout  # here, as a filled cache does not need it

    lock = FileLock(_beside(path, ".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process, which downloads {path}")
        held = lock.acquire()
    with held:
        yield


def _download(url: str, path: pathlib.Path, sha256_prefix: str) -> None:
    part = _beside(path, ".part")
    continued = _fetch(url, part)
    digest = _settled(part)
    if continued and not digest.startswith(sha256_prefix):
        _say(f"{part} does not fit what the server has; from the start again")
        part.unlink()
        _fetch(url, part)
        digest = _settled(part)
    if not digest.startswith(sha256_prefix):
        size_bytes = part.stat().st_size
        part.unlink()
        raise _NetworkError(
            f"{size_bytes} bytes came whose SHA-256 begins with {digest[:8]}, not {sha256_prefix}"
        )
    os.replace(part, path)


def _settled(part: pathlib.Path) -> str:
    """The SHA-256 of a file that is on the disk for good, so that a power cut cannot undo it."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------- the bytes
class _Answer(NamedTuple):
    response: http.client.HTTPResponse
    start: int  # of its first byte in the file
    total: int | None  # bytes of the whole file, where the server says so


def _fetch(url: str, part: pathlib.Path) -> bool:
    """Downloads what `part` lacks. True if something was continued, which may not fit together."""
    pauses_s = iter(PAUSES_S)
    answered = continued = False
    while True:
        start = part.stat().st_size if part.exists() else 0
        try:
            answer = _ask(url, start)
            if answer is None:
                return True
            answered = True
            continued |= answer.start > 0
            with answer.response:
                _receive(answer, part, url)
        except _NetworkError as error:
            # Without any answer the machine is likely offline: say so at once.
            pause_s = next(pauses_s, None) if answered else None
            if pause_s is None:
                raise
            _say(f"{error}; trying again in {pause_s:g} s")
            time.sleep(pause_s)
        else:
            return continued


def _ask(url: str, start: int) -> _Answer | None:
    """Asks for the file from byte `start` on. None: there is nothing beyond it."""
    # Some hosts refuse the name that urllib gives itself.
    request = urllib.request.Request(url, headers={"User-Agent": "flaxcnn"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    opener = urllib.request.build_opener(_Redirects)
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        raise _NetworkError(f"the server says {error.code} {_reason(error)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last: a bad redirection
        raise _NetworkError(_reason(error)) from None
    if response.status == http.HTTPStatus.OK:
        return _Answer(response, 0, response.length)
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found and int(found[1]) == start:
        total = None if found[2] == "*" else int(found[2])
        return _Answer(response, start, total)
    response.close()
    if start:  # not what we asked for, so it is not appended
        return _ask(url, 0)
    raise _NetworkError(f"the server answers {response.status}, with a part of the file or none")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only, where urllib goes to ftp too, and never from https to http.

    The hash prefix of 32 bits guards against damage, not against someone in between.
    """

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        allowed = {"https", urllib.parse.urlsplit(req.full_url).scheme}
        if urllib.parse.urlsplit(newurl).scheme not in allowed:
            fp.close()
            raise _NetworkError(f"the server redirects to {newurl}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(answer: _Answer, part: pathlib.Path, url: str) -> None:
    """Writes the answer to `part`: after what is there, or in its place."""
    from tqdm import tqdm  # here, as a filled cache does not need it

    size, total = answer.start, answer.total
    if not sys.stderr.isatty():
        there = f", of which {_megabytes(size)} are there" if size else ""
        _say(f"downloading {url} ({_megabytes(total)}{there}) to {part.with_suffix('')}")
    with (
        open(part, "ab" if size else "wb") as file,
        # disable=None: no bar where there is no terminal.
        tqdm(
            total=total, initial=size, desc=part.stem, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        for chunk in _chunks(answer):
            file.write(chunk)
            size += len(chunk)
            bar.update(len(chunk))
    if total is not None and size < total:
        raise _NetworkError(f"the connection ended after {size} of {total} bytes")


def _chunks(answer: _Answer) -> Iterator[bytes]:
    """What comes, as it comes, and no more than was announced."""
    left = sys.maxsize if answer.total is None else answer.total - answer.start
    try:
        # `read1` and not `read`: that would lose what came of a chunk when the connection breaks.
        while left > 0 and (chunk := answer.response.read1(min(CHUNK_BYTES, left))):
            yield chunk
            left -= len(chunk)
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(_reason(error)) from None


# ------------------------------------------------------------------------------------------- words
def _reason(error: Exception) -> str:
    said = str(error.reason if isinstance(error, urllib.error.URLError) else error)
    return " ".join(said.split()) or type(error).__name__  # one line


def _megabytes(size_bytes: int | None) -> str:
    return "size unknown" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"


def _beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(path.name + suffix)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
