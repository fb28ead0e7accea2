"""The static server for trials: ranges, tags, and nothing but the repository."""

from __future__ import annotations

import gzip
import http.client
from pathlib import Path
from typing import Any

import pytest

from edgead.runtime.errors import StorageError
from edgead.server_side.ota.serve import RepositoryServer


def ask(server: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def engine_of(place: Any) -> tuple[str, bytes]:
    path = next((place.folder / "targets" / "engines").iterdir())
    return f"/targets/engines/{path.name}", path.read_bytes()


def test_a_file_comes_whole_with_its_length_and_tag(place: Any, server: Any) -> None:
    path, data = engine_of(place)
    status, body, headers = ask(server, path)
    assert (status, body) == (200, data)
    assert int(headers["Content-Length"]) == len(data)
    assert "immutable" in headers["Cache-Control"]
    assert ask(server, "/metadata/timestamp.json")[2]["Cache-Control"] == "no-cache"
    status, body, again = ask(server, path, "HEAD")
    assert (status, body, again["ETag"]) == (200, b"", headers["ETag"])


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-7", -7, None), ("bytes=5-999999", 5, None)],
)
def test_a_range_is_that_part_of_the_file(place: Any, server: Any, asked: str, first: int, end: int | None) -> None:
    path, data = engine_of(place)
    status, body, headers = ask(server, path, Range=asked)
    assert (status, body) == (206, data[first:end])
    assert headers["Content-Range"].endswith(f"/{len(data)}")


@pytest.mark.parametrize("asked", ["bytes=999999-", "bytes=9-5", "bytes=-0"])
def test_a_range_outside_of_the_file_is_416(place: Any, server: Any, asked: str) -> None:
    path, data = engine_of(place)
    status, _, headers = ask(server, path, Range=asked)
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(data)}")


@pytest.mark.parametrize("asked", ["bytes=-", "lines=1-2", "bytes=1-2,4-5", "bytes=a-b"])
def test_a_range_of_another_kind_is_ignored(place: Any, server: Any, asked: str) -> None:
    path, data = engine_of(place)
    assert ask(server, path, Range=asked)[:2] == (200, data)


def test_a_resumed_download_of_a_changed_file_starts_again(place: Any, server: Any) -> None:
    path, data = engine_of(place)
    tag = ask(server, path, "HEAD")[2]["ETag"]
    assert ask(server, path, Range="bytes=10-", If_Range=tag)[:2] == (206, data[10:])
    assert ask(server, path, Range="bytes=10-", If_Range='"other"')[:2] == (200, data)
    assert ask(server, path, If_None_Match=tag)[:2] == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/publisher.json",
        "/.lock",
        "/metadata",
        "/metadata/",
        "/metadata/../publisher.json",
        "/metadata/%2e%2e/publisher.json",
        "/targets/..%2fpublisher.json",
        "//etc/passwd",
        "/targets/%00",
        "/metadata/.timestamp.json.part",
        "/metadata/" + "a" * 3000,
    ],
)
def test_nothing_else_is_served(server: Any, path: str) -> None:
    assert ask(server, path)[:2] == (404, b"")


def test_a_port_that_is_taken_is_a_clear_error(server: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="listen"):
        RepositoryServer(tmp_path, port=server.server_port)


@pytest.mark.parametrize("asked", ["gzip", "br, GZIP;q=0.5", "deflate,x-gzip"])
def test_metadata_comes_in_gzip_for_who_asks_for_it(place: Any, server: Any, asked: str) -> None:
    data = (place.folder / "metadata" / "1.root.json").read_bytes()
    status, body, headers = ask(server, "/metadata/1.root.json", Accept_Encoding=asked)
    assert (status, gzip.decompress(body), headers["Content-Encoding"]) == (200, data, "gzip")
    assert len(body) < 0.7 * len(data)
    assert int(headers["Content-Length"]) == len(body)
    assert body == ask(server, "/metadata/1.root.json", Accept_Encoding=asked)[1]
    assert body[4:8] == bytes(4)  # no time, so that two servers send the same bytes
    assert ask(server, "/metadata/1.root.json", "HEAD", Accept_Encoding=asked)[2] | {"Date": ""} == headers | {
        "Date": ""
    }
    assert ask(server, "/metadata/1.root.json", Accept_Encoding=asked, If_None_Match=headers["ETag"])[:2] == (304, b"")
    assert server.requests[0] == ("/metadata/1.root.json", 200, len(body))


@pytest.mark.parametrize("asked", ["", "identity", "br", "gzip;q=0", "gzip;q=0.0", "gzipped", "*"])
def test_metadata_comes_as_it_is_for_who_does_not(place: Any, server: Any, asked: str) -> None:
    data = (place.folder / "metadata" / "1.root.json").read_bytes()
    status, body, headers = ask(server, "/metadata/1.root.json", Accept_Encoding=asked)
    assert (status, body) == (200, data)
    assert "Content-Encoding" not in headers
    packed = ask(server, "/metadata/1.root.json", Accept_Encoding="gzip")[2]
    assert headers["Vary"] == packed["Vary"] == "Accept-Encoding"
    assert headers["ETag"] != packed["ETag"]


def test_ranges_and_targets_are_never_packed(place: Any, server: Any) -> None:
    path, data = engine_of(place)
    status, body, headers = ask(server, path, Accept_Encoding="gzip")
    assert (status, body, "Content-Encoding" in headers) == (200, data, False)
    root = (place.folder / "metadata" / "1.root.json").read_bytes()
    assert ask(server, "/metadata/1.root.json", Accept_Encoding="gzip", Range="bytes=5-")[:2] == (206, root[5:])


def test_metadata_that_changes_is_packed_anew(place: Any, server: Any) -> None:
    path = place.folder / "metadata" / "timestamp.json"
    for data in (b"a" * 1000, b"b" * 1000):
        path.write_bytes(data)
        assert gzip.decompress(ask(server, "/metadata/timestamp.json", Accept_Encoding="gzip")[1]) == data
