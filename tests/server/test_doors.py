"""Ways in: TLS, a socket file, keys."""

from __future__ import annotations

import hmac
import http.client
import json
import shutil
import socket
import ssl
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, live
from starlette.datastructures import Headers

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.server import keys
from orthrus_gguf.server.serve import Address

BODY = {"prompt": "import ", "n_predict": 8, "temperature": 0, "stream": True}


class SocketFile(http.client.HTTPConnection):
    """HTTP through a socket file."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def streamed(connection: http.client.HTTPConnection) -> str:
    """The text of an answer."""
    connection.request("POST", "/completion", json.dumps(BODY))
    answer = connection.getresponse()
    assert answer.status == 200
    lines = answer.read().decode().splitlines()
    connection.close()
    return "".join(json.loads(line[6:])["content"] for line in lines if line.startswith("data: "))


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no socket files here")
def test_a_socket_file(chat_file: Path, tmp_path: Path, server: Live) -> None:
    """It is its owner's only, takes the place of one where nobody listens, and goes in the end."""
    path = tmp_path / "orthrus.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with live(chat_file, tmp_path, "-c", 256, "--host", path, ready=False) as found:
        wait(found, lambda: SocketFile(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        assert streamed(SocketFile(path)) == streamed(plain)
        assert f"unix:{path}" in found.said()
        with pytest.raises(OrthrusError, match="another program listens there"):
            Address(str(path)).listen()
        assert found.end() == 0
    assert not path.exists()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    words = [
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    out = ["-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(["openssl", "req", *words, *names, *out], check=True, capture_output=True)
    return files


def test_tls(chat_file: Path, tmp_path: Path, server: Live, certificate: tuple[Path, Path]) -> None:
    flags = ("-c", 256, "--ssl-cert-file", certificate[0], "--ssl-key-file", certificate[1])
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with live(chat_file, tmp_path, *flags, ready=False) as found:

        def connect() -> http.client.HTTPConnection:
            return http.client.HTTPSConnection("127.0.0.1", found.port, context=context, timeout=60)

        wait(found, connect)
        plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        assert streamed(connect()) == streamed(plain)
        assert f"https://127.0.0.1:{found.port}" in found.said()
        with pytest.raises((OSError, http.client.HTTPException)):
            streamed(http.client.HTTPConnection("127.0.0.1", found.port, timeout=60))


def test_files_that_are_no_certificate(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """Are told of before anything is loaded."""
    other, locked = tmp_path / "other", tmp_path / "locked"
    other.write_text("nothing")
    words = ["-in", str(certificate[1]), "-aes128", "-passout", "pass:word", "-out", str(locked)]
    subprocess.run(["openssl", "ec", *words], check=True, capture_output=True)
    first, key = map(str, certificate)
    for pair in (("nowhere", key), (first, "nowhere"), (first, str(other)), (first, str(locked))):
        with pytest.raises(OrthrusError, match="no certificate and its key"):
            Address(port=0, certificate=pair[0], key=pair[1]).listen()


def wait(found: Live, connect: Any) -> None:
    """Until the model is there."""
    for _ in range(600):
        assert found.process.poll() is None, found.said()
        try:
            connection = connect()
            connection.request("GET", "/health")
            status = connection.getresponse().status
            connection.close()
            if status == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("it does not answer")


@pytest.mark.parametrize("given", ["first", "second", "third", "firs", "firstx", "", "é" * 5000])
def test_keys_are_compared_in_constant_time(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, whichever fits, and as texts of one length, by what the library has for it."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    class Digest(bytes):
        """One that is compared in no other way."""

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared byte by byte")

        __hash__ = bytes.__hash__

    digest = keys._digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    monkeypatch.setattr(keys, "_digest", lambda key: Digest(digest(key)))
    doors = keys.Keys(["first", "second", "third"])
    headers = Headers(raw=[(b"authorization", f"Bearer {given}".encode())])
    assert doors.fit("/completion", headers) is (given in ("first", "second", "third"))
    known = [digest(key).hex() for key in (b"first", b"second", b"third")]
    assert [other.hex() for _, other in compared] == known
    assert {len(text) for pair in compared for text in pair} == {32}
