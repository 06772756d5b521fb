"""Mirrors over real HTTP: one that is honest, and those that lie, cut off, stall, or send without end."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from psyche.config import Data
from psyche.data.index import Shard
from psyche.data.mirrors import Mirror, MirrorError, WrongBytes
from psyche.numerics.digest import blob_root

CONTENT = bytes(range(256)) * 12_000  # three chunks
SHARD = Shard("train-00000.bin", 1, len(CONTENT), blob_root(CONTENT).hex())


class Host(BaseHTTPRequestHandler):
    """Serves CONTENT under /good, and worse under other names."""

    asked: list[str]
    gate: threading.Event

    def do_GET(self) -> None:
        self.asked.append(self.path)
        kind = self.path.split("/")[1]
        if kind == "gone":
            self.send_error(404)
            return
        self.send_response(200)
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        if kind in ("good", "truncated", "stalling", "other"):
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the reader has had enough
            self.send(kind)

    def send(self, kind: str) -> None:
        half = len(CONTENT) // 2
        match kind:
            case "other":
                self.wfile.write(CONTENT[:-1] + b"x")
            case "packed":
                self.wfile.write(gzip.compress(CONTENT))
            case "short" | "truncated":
                self.wfile.write(CONTENT[:half])
            case "stalling":
                self.wfile.write(CONTENT[:half])
                self.wfile.flush()
                self.gate.wait(60)
            case "trickling":
                while not self.gate.wait(0.05):
                    self.wfile.write(b"x")
            case "endless":
                while not self.gate.is_set():
                    self.wfile.write(CONTENT)
            case _:
                self.wfile.write(CONTENT)

    def log_message(self, *arguments: object) -> None:
        """Tests are quiet."""


@contextmanager
def host() -> Iterator[tuple[str, type[Host]]]:
    handler = type("Handler", (Host,), {"asked": [], "gate": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        handler.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


def copy(url: str, *, stall: float = 10.0) -> bytes:
    """What a mirror gives for the shard, and that nothing is written beyond its end."""
    with tempfile.TemporaryFile() as file:
        asyncio.run(Mirror(url, anonymous=False, stall=stall).copy(SHARD, SHARD.file, file.fileno()))
        file.seek(0)
        return file.read()


def test_a_copy_over_http_is_one_request() -> None:
    with host() as (url, handler):
        assert copy(f"{url}/good/") == CONTENT
        assert handler.asked == ["/good/train-00000.bin"]


@pytest.mark.parametrize("kind", ["other", "short", "endless", "packed"])
def test_other_bytes_are_the_mirrors_fault(kind: str) -> None:
    with host() as (url, _), pytest.raises(WrongBytes, match=f"{kind}/train-00000.bin has the wrong content"):
        copy(f"{url}/{kind}")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("truncated", "train-00000.bin: "), ("gone", "does not exist"), ("missing", "none/train-00000.bin: ")],
)
def test_what_breaks_or_is_not_there(kind: str, reason: str) -> None:
    with host() as (url, _):
        where = "http://127.0.0.1:9/none" if kind == "missing" else f"{url}/{kind}"
        with pytest.raises(MirrorError, match=reason) as caught:
            copy(where)
        assert not isinstance(caught.value, WrongBytes)


@pytest.mark.parametrize("kind", ["stalling", "trickling"])
def test_one_that_makes_no_progress_is_given_up(kind: str) -> None:
    with host() as (url, _), pytest.raises(MirrorError):
        copy(f"{url}/{kind}", stall=0.5)


def test_a_limit_of_this_node_is_not_held_against_the_mirror() -> None:
    async def limited(url: str, descriptor: int) -> None:
        mirror = Mirror(url, anonymous=False, stall=2.0)
        await mirror.copy(SHARD, SHARD.file, descriptor, throttle=lambda count: time.sleep(count / 750_000))

    with tempfile.TemporaryFile() as file, host() as (url, _):
        copy(f"{url}/good")  # what the first copy of a process imports takes its time
        began = time.monotonic()
        asyncio.run(limited(f"{url}/good", file.fileno()))
        assert time.monotonic() - began > 2.0, "longer than a mirror may stall"


def test_after_it_was_given_up_nothing_more_is_written() -> None:
    async def give_up(url: str, descriptor: int) -> None:
        with pytest.raises(MirrorError):
            await Mirror(url, anonymous=False, stall=0.5).copy(SHARD, SHARD.file, descriptor)

    with tempfile.TemporaryFile() as file, host() as (url, handler):
        asyncio.run(give_up(f"{url}/trickling", file.fileno()))
        file.truncate(0)
        handler.gate.wait(0.5)
        assert file.seek(0, 2) == 0


def test_any_scheme_of_fsspec_that_is_installed(tmp_path: Path) -> None:
    (tmp_path / SHARD.file).write_bytes(CONTENT)
    assert copy(f"file://{tmp_path}") == CONTENT
    with pytest.raises(MirrorError, match="does not exist"):
        copy(f"file://{tmp_path}/none")
    with pytest.raises(MirrorError, match="Protocol not known: nonsense"):
        copy("nonsense://x")


@pytest.mark.parametrize(
    "url", ["file:///etc", "/etc", "http://a::file:///etc", "memory://x", "https://a/b?c=d", "s3:x"]
)
def test_a_run_names_public_places_only(url: str) -> None:
    with pytest.raises(ValueError, match="mirrors"):
        Data(mirrors=(url,))
    Data(mirrors=("https://a.example/store", "s3://bucket/store", "hf://datasets/a/b", "gs://bucket"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/store", "not a public address"),
        ("http://localhost/store", "not a public address"),
        ("http://[::1]/store", "not a public address"),
        ("http://192.168.1.1/store", "not a public address"),
        ("http://169.254.169.254/latest", "not a public address"),
        ("file:///etc", "by http, https, s3, gs or hf only"),
        ("ftp://example.org/store", "by http, https, s3, gs or hf only"),
    ],
)
def test_a_mirror_that_the_run_names_reaches_no_private_host(tmp_path: Path, url: str, reason: str) -> None:
    with (tmp_path / "part").open("wb") as file, pytest.raises(MirrorError, match=reason):
        asyncio.run(Mirror(url, anonymous=True).copy(SHARD, SHARD.file, file.fileno()))
