"""What only object storage has: endpoints, certificates, credentials, uploads taken up again."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from mbq.artifacts import s3_client
from mbq.artifacts.digests import PART_BYTES
from mbq.artifacts.errors import InputError, StoreError
from mbq.artifacts.s3 import S3Store
from mbq.artifacts.store import open_store, probe
from tests.support import servers
from tests.support.proxy import Proxy
from tests.support.servers import BUCKET, NAMES, Server

_SUBJECT = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]


@pytest.fixture
def certified(tmp_path: Path, start_server: Callable[[str], Server]) -> Iterator[Server]:
    """A server that speaks TLS with a certificate of its own making."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl: apt-get install openssl")
    start_server("rclone")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run(
        [*make, "-keyout", key, "-out", certificate, *_SUBJECT], check=True, capture_output=True
    )
    server = servers.start_certified(tmp_path / "server", certificate, key)
    yield server
    server.stop()


def test_over_tls_with_a_certificate_of_ones_own(
    certified: Server, connect: Callable[..., S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert certified.endpoint.startswith("https://")
    store = connect(certified)
    data = os.urandom(2 * PART_BYTES + 5)
    for key, content in (("small", b"x"), ("large", data)):
        store.put(key, [content])
        assert store.read(key) == content
    monkeypatch.delenv("AWS_CA_BUNDLE")
    s3_client._make_client.cache_clear()
    impatient = S3Store(store.bucket, store.prefix, patience_seconds=0.1)
    with pytest.raises(StoreError, match="certificate verify failed"):
        impatient.read("small")


def test_credentials_that_come_later_are_found(
    start_server: Callable[[str], Server],
    connect: Callable[..., S3Store],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = connect(start_server("rclone"))
    given = os.environ["AWS_ACCESS_KEY_ID"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/no/such/file")
    s3_client._make_client.cache_clear()
    with pytest.raises(InputError, match="Unable to locate credentials"):
        store.put("key", [b"x"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", given)
    store.put("key", [b"x"])
    assert store.read("key") == b"x"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "check the credentials"),
        ("AWS_ACCESS_KEY_ID", "nobody", "check the credentials"),
        ("AWS_PROFILE", "nobody", "nobody"),
        ("AWS_CA_BUNDLE", "/no/such/file", None),
        ("AWS_ENDPOINT_URL_S3", "not a url", "AWS_ENDPOINT_URL_S3"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_settings_are_wrong_input(
    start_server: Callable[[str], Server],
    connect: Callable[..., S3Store],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    variable: str,
    value: str,
    words: str | None,
) -> None:
    store = connect(start_server(name))
    monkeypatch.setenv(variable, value)
    s3_client._make_client.cache_clear()
    if words is None:
        # Certificates do not matter to a server without TLS.
        probe(store)
        return
    with pytest.raises(InputError, match=words):
        store.children("runs")


@pytest.mark.parametrize("name", NAMES)
def test_a_bucket_that_is_not_there(
    start_server: Callable[[str], Server], connect: Callable[..., S3Store], name: str
) -> None:
    connect(start_server(name))
    store = open_store("s3://no-such-bucket-here/x")
    for action in (lambda: store.children("runs"), lambda: store.put("a", [b"x"])):
        with pytest.raises(InputError, match="create the bucket"):
            action()
    with pytest.raises(InputError, match="no-such-bucket-here"):
        probe(store)


def test_an_account_that_may_not_list_uploads_is_told_at_once(
    start_server: Callable[[str], Server],
    connect: Callable[..., S3Store],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = connect(start_server("rclone"))

    def refuse(**arguments: Any) -> None:
        answer = {"Error": {"Code": "AccessDenied", "Message": "s3:ListBucketMultipartUploads"}}
        raise ClientError(answer, "ListMultipartUploads")

    monkeypatch.setattr(s3_client.client(store.stall_seconds), "list_multipart_uploads", refuse)
    place = f"s3://{store.bucket}/{store.prefix}"
    with pytest.raises(InputError, match=f"cannot list {place}/: .*ListBucketMultipartUploads"):
        probe(store)


def test_endpoints_that_are_not_amazons_are_addressed_path_style(
    start_server: Callable[[str], Server], connect: Callable[..., S3Store]
) -> None:
    server = start_server("rclone")
    with Proxy(server.endpoint) as proxy:
        store = connect(server, proxy)
        proxy.exchanges.clear()
        store.put("key", [b"x"])
        assert proxy.exchanges[0].path.startswith(f"/{BUCKET}/{store.prefix}/key")


def test_amazons_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    s3_client._make_client.cache_clear()
    target = {"Bucket": BUCKET, "Key": "a/b"}
    url = s3_client.client(1.0).generate_presigned_url("get_object", Params=target)
    assert url.startswith(f"https://{BUCKET}.s3.amazonaws.com/a/b?")
    s3_client._make_client.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_an_upload_that_was_cut_off_is_taken_up(
    start_server: Callable[[str], Server], connect: Callable[..., S3Store], name: str
) -> None:
    server = start_server(name)
    data = [os.urandom(PART_BYTES) for _ in range(6)]
    with Proxy(server.endpoint) as proxy:
        store = connect(server, proxy)

        def chunks() -> Iterator[bytes]:
            yield from data[:5]
            # What a process does that is killed: nothing more, and no clean-up.
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.put("key", chunks())
        assert [found.size_bytes for found in store.unfinished()] == [5 * PART_BYTES]
        proxy.exchanges.clear()
        store.put("key", data)
        sent = [e.sent_bytes for e in proxy.exchanges if e.sent_bytes >= PART_BYTES]
        assert sent == [PART_BYTES]
        assert store.read("key") == b"".join(data)
        assert list(store.unfinished()) == []
