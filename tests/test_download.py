"""Downloads from a server on this machine that misbehaves as told."""

import hashlib
import http.server
import io
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from filelock import FileLock

from flaxcnn import download
from flaxcnn.download import cache_directory, cached
from flaxcnn.errors import WeightsError

BODY = random.Random(0).randbytes(300_000)
HALF = len(BODY) // 2
SHA = hashlib.sha256(BODY).hexdigest()[:8]
NAME = f"net-{SHA}.pth"

# Downloads argv[2] with the hash argv[3]. Without `flaxcnn.__init__`, which imports JAX: that takes
# seconds. A background job may have come with SIGINT ignored, and Python leaves that as it is.
CHILD = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)
package = types.ModuleType("flaxcnn")
package.__path__ = [sys.argv[1]]
sys.modules["flaxcnn"] = package
sys.modules |= dict.fromkeys(sys.argv[4:])  # these cannot be imported
from flaxcnn.download import cached
print(cached(sys.argv[2], sys.argv[3]))
"""


@dataclass
class Behaviour:
    """How one request is answered."""

    status: int = 200
    location: str = ""
    body: bytes = BODY
    ranges: bool = True
    shift: int = 0  # of the start that Content-Range tells
    excess: int | None = 0  # of Content-Length over what follows; None: no Content-Length
    extra: bytes = b""  # behind what Content-Range tells
    chunked: bool = False  # in one chunk, as of a proxy; then there is no Content-Length
    stop_after: int = len(BODY)  # bytes; then the connection is closed,
    gate: threading.Event | None = None  # or, with a gate, goes on when that is opened


@dataclass
class Site:
    url: str
    behaviours: list[Behaviour] = field(default_factory=lambda: [Behaviour()])  # the last stays
    asked: list[str | None] = field(default_factory=list)  # the Range of each request
    served: list[int] = field(default_factory=list)  # bytes of each answer


class Server(http.server.ThreadingHTTPServer):
    site: Site


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        site = self.server.site
        how = site.behaviours.pop(0) if len(site.behaviours) > 1 else site.behaviours[0]
        site.asked.append(self.headers["Range"])
        # Some hosts refuse Python-urllib.
        start, status = 0, how.status if self.headers["User-Agent"] == "flaxcnn" else 403
        if how.ranges and (wanted := self.headers["Range"]):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(how.body) else 416
        content = how.body[start:] + how.extra if status in (200, 206) else b""
        now, later = content[: how.stop_after], content[how.stop_after :] if how.gate else b""
        site.served.append(len(now + later))
        self.send_response(status)
        if how.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif how.excess is not None:
            self.send_header("Content-Length", str(len(content) + how.excess))
        if status == 206:
            first, size = start + how.shift, len(how.body)
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        if how.location:
            self.send_header("Location", how.location)
        self.end_headers()
        with suppress(ConnectionError):  # of a client that was killed
            self.wfile.write(b"%x\r\n" % len(content) * how.chunked + now)
            if how.gate:
                how.gate.wait(10)  # seconds: a test that does not open it shall fail, not hang
            self.wfile.write(later)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.site = Site(f"http://127.0.0.1:{server.server_port}/models/{NAME}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.site
        server.shutdown()
        thread.join()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()  # no thread of the server waits for a test that failed


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    directory = tmp_path / "not" / "yet"
    monkeypatch.setenv("FLAXCNN_CACHE", str(directory))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(download, "TIMEOUT_S", 20.0)
    return directory


def leave_part(cache: pathlib.Path, content: bytes) -> pathlib.Path:
    cache.mkdir(parents=True)
    part = cache / f"{NAME}.part"
    part.write_bytes(content)
    return part


def child(site: Site, *missing: str) -> subprocess.Popen[str]:
    package = str(pathlib.Path(download.__file__).parent)
    command = [sys.executable, "-c", CHILD, package, site.url, SHA, *missing]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


# ------------------------------------------------------------------------------- as it should be
def test_a_file_is_downloaded_once(
    site: Site, cache: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cached(site.url, SHA)
    assert path == cache / NAME
    assert path.read_bytes() == BODY
    assert not (cache / f"{NAME}.part").exists()
    assert capsys.readouterr() == ("", f"downloading {site.url} (0.3 MB) to {path}\n")
    assert cached(site.url, SHA) == path
    assert (site.asked, site.served) == ([None], [len(BODY)])
    assert capsys.readouterr() == ("", "")


def test_a_filled_cache_needs_no_network_and_no_packages(site: Site, cache: pathlib.Path) -> None:
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(BODY)
    with child(site, "tqdm", "filelock", "platformdirs") as process:
        out, err = process.communicate(timeout=30)
    assert (out, err) == (f"{cache / NAME}\n", "")
    assert site.asked == []


def test_a_file_is_on_the_disk_before_it_has_its_name(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave the name of an empty file."""
    fsync, synced = os.fsync, []

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)
        assert not path.exists()

    path = cache_directory() / NAME
    monkeypatch.setattr(os, "fsync", sync)
    assert cached(site.url, SHA) == path
    assert synced == [path.stat().st_ino]


def test_a_terminal_shows_a_bar(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    cached(site.url, SHA)
    assert NAME in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "downloading" not in terminal.getvalue()


def test_the_cache_is_where_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLAXCNN_CACHE", "~/weights")
    assert cache_directory() == tmp_path / "weights"


@pytest.mark.skipif(sys.platform != "linux", reason="what XDG specifies")
def test_the_cache_is_the_users_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("FLAXCNN_CACHE", "")
    assert cache_directory() == pathlib.Path("/caches/flaxcnn")
    monkeypatch.delenv("FLAXCNN_CACHE")
    assert cache_directory() == pathlib.Path("/caches/flaxcnn")


def test_a_redirection_is_followed_with_the_range(site: Site, cache: pathlib.Path) -> None:
    leave_part(cache, BODY[:HALF])
    site.behaviours = [Behaviour(302, "/elsewhere", ranges=False), Behaviour()]
    assert cached(site.url, SHA).read_bytes() == BODY
    assert site.asked == [f"bytes={HALF}-"] * 2


# ------------------------------------------------------------------------------------- continued
def test_only_the_rest_is_asked_for(
    site: Site, cache: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_part(cache, BODY[:-1000])
    assert cached(site.url, SHA).read_bytes() == BODY
    assert (site.asked, site.served) == (["bytes=299000-"], [1000])
    assert "(0.3 MB, of which 0.3 MB are there)" in capsys.readouterr().err


def test_a_server_without_ranges_sends_all(site: Site, cache: pathlib.Path) -> None:
    leave_part(cache, BODY[:HALF])
    site.behaviours = [Behaviour(ranges=False)]
    assert cached(site.url, SHA).read_bytes() == BODY
    assert (site.asked, site.served) == ([f"bytes={HALF}-"], [len(BODY)])


def test_a_whole_part_is_only_checked(site: Site, cache: pathlib.Path) -> None:
    leave_part(cache, BODY)
    assert cached(site.url, SHA).read_bytes() == BODY
    assert (site.asked, site.served) == ([f"bytes={len(BODY)}-"], [0])


@pytest.mark.parametrize("wrong", [b"x" * HALF, b"x" * len(BODY), BODY + b"x"])
def test_a_part_of_something_else_is_downloaded_again(
    wrong: bytes, site: Site, cache: pathlib.Path
) -> None:
    leave_part(cache, wrong)
    assert cached(site.url, SHA).read_bytes() == BODY
    assert site.asked == [f"bytes={len(wrong)}-", None]
    assert site.served == [max(len(BODY) - len(wrong), 0), len(BODY)]


def test_another_range_than_asked_for_is_not_appended(site: Site, cache: pathlib.Path) -> None:
    leave_part(cache, BODY[:HALF])
    site.behaviours = [Behaviour(shift=-1)]
    assert cached(site.url, SHA).read_bytes() == BODY
    assert site.asked == [f"bytes={HALF}-", None]


def test_a_connection_that_breaks_off_is_continued(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.behaviours = [Behaviour(stop_after=1000), Behaviour(stop_after=500), Behaviour()]
    assert cached(site.url, SHA).read_bytes() == BODY
    assert site.asked == [None, "bytes=1000-", "bytes=1500-"]
    assert site.served == [1000, 500, len(BODY) - 1500]
    assert "ended after 1500 of 300000 bytes; trying again in 0 s" in capsys.readouterr().err


def test_a_chunk_that_breaks_off_is_continued(site: Site) -> None:
    site.behaviours = [Behaviour(stop_after=1000, chunked=True), Behaviour()]
    assert cached(site.url, SHA).read_bytes() == BODY
    assert site.asked == [None, "bytes=1000-"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_is_continued(
    stop: signal.Signals, site: Site, cache: pathlib.Path, gate: threading.Event
) -> None:
    site.behaviours = [Behaviour(stop_after=HALF, gate=gate), Behaviour()]
    part = cache / f"{NAME}.part"
    with child(site) as process:
        while not part.exists() or not part.stat().st_size:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(stop)
        process.communicate(timeout=30)
    assert process.returncode == -stop
    size = part.stat().st_size
    assert BODY.startswith(part.read_bytes())
    assert not (cache / NAME).exists()
    assert cached(site.url, SHA).read_bytes() == BODY
    assert (site.asked, site.served[1]) == ([None, f"bytes={size}-"], len(BODY) - size)


def test_an_interrupt_leaves_the_part_and_frees_the_lock(
    site: Site, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    site.behaviours = [Behaviour(stop_after=1000)]
    monkeypatch.setattr(download.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached(site.url, SHA)
    assert (cache / f"{NAME}.part").read_bytes() == BODY[:1000]
    with FileLock(cache / f"{NAME}.lock").acquire(timeout=0):
        pass


def test_two_processes_share_one_download(
    site: Site, cache: pathlib.Path, gate: threading.Event
) -> None:
    site.behaviours = [Behaviour(stop_after=HALF, gate=gate)]
    with child(site) as first:
        assert first.stderr
        assert first.stderr.readline().startswith("downloading")  # so it has the lock
        with child(site) as second:
            assert second.stderr
            line = second.stderr.readline()
            gate.set()
            for process in (first, second):
                assert process.communicate(timeout=30) == (f"{cache / NAME}\n", "")
    assert line == f"waiting for another process, which downloads {cache / NAME}\n"
    assert (site.asked, site.served) == ([None], [len(BODY)])
    assert (cache / NAME).read_bytes() == BODY


# ---------------------------------------------------------------------------------------- refused
def assert_nothing_is_left(cache: pathlib.Path) -> None:
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("continued", [False, True])
def test_another_content_is_refused(continued: bool, site: Site, cache: pathlib.Path) -> None:
    if continued:
        leave_part(cache, BODY[:HALF])
    site.behaviours = [Behaviour(body=BODY[:-1] + b"x")]
    with pytest.raises(WeightsError, match=f"300000 bytes .* begins with [0-9a-f]{{8}}, not {SHA}"):
        cached(site.url, SHA)
    assert_nothing_is_left(cache)
    assert site.asked == ([f"bytes={HALF}-"] if continued else []) + [None]


def test_a_failure_says_what_would_work(site: Site, cache: pathlib.Path) -> None:
    site.behaviours = [Behaviour(404)]
    with pytest.raises(WeightsError) as caught:
        cached(site.url, SHA)
    assert str(caught.value) == (
        f"{site.url} could not be downloaded: the server says 404 Not Found; try again, or "
        f"download it elsewhere and put it at {cache / NAME}, "
        "or set FLAXCNN_CACHE to a directory that has it"
    )
    assert_nothing_is_left(cache)
    assert site.asked == [None]


def test_a_server_that_is_not_there_is_told_at_once(site: Site) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        port = unused.getsockname()[1]
        with pytest.raises(WeightsError, match=r"refused; try again, .* put it at .*pth, or set"):
            cached(f"http://127.0.0.1:{port}/{NAME}", SHA)


def test_what_came_stays_when_the_connection_breaks_each_time(
    site: Site, cache: pathlib.Path
) -> None:
    site.behaviours = [Behaviour(stop_after=1000)]
    with pytest.raises(WeightsError, match="the connection ended after 3000 of 300000 bytes"):
        cached(site.url, SHA)
    assert site.asked == [None, "bytes=1000-", "bytes=2000-"]  # as there are two pauses
    assert (cache / f"{NAME}.part").read_bytes() == BODY[:3000]


def test_a_silent_connection_is_given_up(
    site: Site, cache: pathlib.Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(download, "PAUSES_S", (0.0,))
    site.behaviours = [Behaviour(stop_after=1000, gate=gate)]
    with pytest.raises(WeightsError, match="could not be downloaded: timed out; try again"):
        cached(site.url, SHA)
    assert site.asked == [None, "bytes=1000-"]
    assert (cache / f"{NAME}.part").read_bytes() == BODY[:2000]


def test_a_server_that_tells_no_size_is_read_to_the_end(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.behaviours = [Behaviour(excess=None)]
    assert cached(site.url, SHA).read_bytes() == BODY
    assert "(size unknown)" in capsys.readouterr().err


def test_a_server_that_tells_too_large_a_size_is_asked_for_the_rest(site: Site) -> None:
    site.behaviours = [Behaviour(excess=1)]
    assert cached(site.url, SHA).read_bytes() == BODY
    assert site.asked == [None, f"bytes={len(BODY)}-"]


def test_a_server_that_tells_too_small_a_size_is_refused(site: Site, cache: pathlib.Path) -> None:
    site.behaviours = [Behaviour(excess=-1)]
    with pytest.raises(WeightsError, match="299999 bytes came"):
        cached(site.url, SHA)
    assert_nothing_is_left(cache)


def test_no_more_is_kept_than_was_announced(site: Site, cache: pathlib.Path) -> None:
    leave_part(cache, BODY[:HALF])
    site.behaviours = [Behaviour(extra=b"more")]
    assert cached(site.url, SHA).read_bytes() == BODY
    assert site.asked == [f"bytes={HALF}-"]


def test_a_part_that_was_not_asked_for_is_refused(site: Site, cache: pathlib.Path) -> None:
    site.behaviours = [Behaviour(206, shift=5)]
    with pytest.raises(WeightsError, match="the server answers 206"):
        cached(site.url, SHA)
    assert_nothing_is_left(cache)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file:///etc/hostname", "Redirection to url 'file:///etc/hostname' is not allowed"),
        ("ftp://127.0.0.1:1/x", "redirects to ftp://127.0.0.1:1/x, which is refused"),
        ("//[", "Invalid IPv6 URL"),
    ],
)
def test_a_redirection_to_anything_but_http_is_refused(
    target: str, message: str, site: Site
) -> None:
    site.behaviours = [Behaviour(302, target)]
    with pytest.raises(WeightsError, match=message):
        cached(site.url, SHA)
    assert site.asked == [None]


def test_a_circle_of_redirections_is_told_in_one_line(site: Site) -> None:
    site.behaviours = [Behaviour(302, "/circle")]
    with pytest.raises(WeightsError, match=r"says 302 .* an infinite loop\..* try again") as caught:
        cached(site.url, SHA)
    assert "\n" not in str(caught.value)


def test_a_redirection_from_https_to_http_is_refused() -> None:
    request = urllib.request.Request("https://example.org/x")
    redirects = download._Redirects()

    def follow(url: str) -> urllib.request.Request | None:
        return redirects.redirect_request(request, io.BytesIO(), 302, "Found", {}, url)

    with pytest.raises(download._NetworkError, match=r"http://example\.org/x, which is refused"):
        follow("http://example.org/x")
    followed = follow("https://example.com/y")
    assert followed
    assert followed.full_url == "https://example.com/y"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hostname",
        "ftp://127.0.0.1/x.pth",
        "net.pth",
        "http://127.0.0.1/models/",
        "http://127.0.0.1/models/..",
        "http://127.0.0.1/.hidden",
        "http://127.0.0.1/a%2F..%2Fx.pth",
        "http://127.0.0.1/a\\x.pth",
    ],
)
def test_other_urls_are_refused(url: str, cache: pathlib.Path) -> None:
    with pytest.raises(WeightsError, match=r"only http and https|plain file name"):
        cached(url, SHA)
    assert not cache.exists()


@pytest.mark.parametrize("prefix", ["", SHA[:7], SHA.upper(), "latest00"])
def test_a_hash_that_checks_nothing_is_refused(prefix: str, site: Site) -> None:
    with pytest.raises(WeightsError, match="not the first hex digits"):
        cached(site.url, prefix)
    assert site.asked == []


# ---------------------------------------------------------------------------------- cannot be kept
def test_a_cache_that_is_a_file_is_refused(site: Site, cache: pathlib.Path) -> None:
    cache.parent.mkdir()
    cache.touch()
    with pytest.raises(WeightsError, match=r"File exists.*set FLAXCNN_CACHE to a directory that"):
        cached(site.url, SHA)
    assert site.asked == []


@pytest.fixture
def read_only() -> Iterator[pathlib.Path]:
    """A directory with one file that this process cannot write to, even if it is root's."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        (directory / "there.pth").touch()
        directory.chmod(0o555)
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield directory
        if root:
            os.seteuid(0)
        directory.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="a directory there has no such mode")
def test_a_read_only_cache_is_refused_and_still_read(
    site: Site, read_only: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAXCNN_CACHE", str(read_only))
    with pytest.raises(WeightsError, match=r"Permission denied.*set FLAXCNN_CACHE to a directory"):
        cached(site.url, SHA)
    assert site.asked == []
    assert cached(site.url.replace(NAME, "there.pth"), SHA) == read_only / "there.pth"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_told(site: Site, cache: pathlib.Path) -> None:
    cache.mkdir(parents=True)
    (cache / f"{NAME}.part").symlink_to("/dev/full")
    with pytest.raises(WeightsError, match=r"No space left on device.*has room"):
        cached(site.url, SHA)
    assert len(site.asked) == 1
