"""Artifacts in S3-compatible object storage; the only place that knows boto3.

Written for what AWS, Ceph, Swift and smaller servers have in common: no conditional requests, no
checksum trailers, no ETag taken for a content's digest.

- Every request with a body carries its Content-MD5, which all of them check. What is read is
  checked by its readers against sha256 digests (`tensors.py`, `manifest.py`); here, that the
  answer is the range that was asked for.
- An object larger than 16 MiB is written in parts (`multipart.py`); a killed writer's upload is
  found by its key and taken up, and `gc` removes what nobody took up.
- One retry policy, ours: whatever may pass is tried again, ever more slowly, until the store has
  been out of order for as long as the caller has patience.

Credentials come from boto3's standard chain only; AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE are
honoured. Endpoints other than AWS's are addressed path-style.
"""

import base64
import contextlib
import functools
import hashlib
import itertools
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlparse

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    CredentialRetrievalError,
    InvalidConfigError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from urllib3.exceptions import HTTPError

from mbq.artifacts.digests import PART_BYTES
from mbq.artifacts.errors import InputError, NotFoundError, StoreError
from mbq.artifacts.multipart import Part, SentPart, StoredPart, UploadLost, cut, write_parts
from mbq.artifacts.store import Stat, Unfinished, check_key, is_name

T = TypeVar("T")

_CONNECT_SECONDS = 5.0
_STALL_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 10.0
_CONNECTIONS = 32

_UNUSABLE = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
    ConfigNotFound,
    InvalidConfigError,
    ParamValidationError,
)
_FORBIDDEN = {
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
_ABSENT = {"404", "NoSuchKey", "NotFound"}
# Refusals of a request that was damaged, cut off or came too fast; 5xx are told by their number.
_PASSING = {
    "BadDigest",
    "IncompleteBody",
    "MalformedXML",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
# How each listing is continued: the argument, and where the answer gives its next value.
_MARKERS = {
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_multipart_uploads": {
        "KeyMarker": "NextKeyMarker",
        "UploadIdMarker": "NextUploadIdMarker",
    },
    "list_parts": {"PartNumberMarker": "NextPartNumberMarker"},
}
# What every entry of a listing must have.
_NEEDED = {
    "Contents": {"Key", "Size", "LastModified"},
    "CommonPrefixes": {"Prefix"},
    "Uploads": {"Key", "UploadId", "Initiated"},
    "Parts": {"PartNumber", "ETag", "Size"},
}
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _Passing(Exception):
    """What may go away when tried again."""


@dataclass(frozen=True)
class S3Store:
    """A prefix of a bucket.

    Attributes:
        prefix: plain names joined by `/`; empty for the whole bucket.
        patience_seconds: how long a call keeps trying.
        stall_seconds: how long a connection may stay silent before it is given up.
    """

    bucket: str
    prefix: str
    patience_seconds: float
    stall_seconds: float = _STALL_SECONDS

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def put(self, key: str, chunks: Iterable[bytes]) -> None:
        try:
            self._put(key, chunks)
        except UploadLost:
            # Servers may forget uploads when they restart. What can be read twice is sent twice.
            if iter(chunks) is chunks:
                raise
            self._put(key, chunks)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        last = "" if length is None else start + length - 1
        wanted = self._at(key) | {"Range": f"bytes={start}-{last}"}

        def read() -> bytes:
            return _read_range(self._client.get_object(**wanted), start, length)

        try:
            return self._call("read", key, read)
        except _Refused as refused:
            if refused.code in ("InvalidRange", "416"):
                return b""
            if refused.code in _ABSENT:
                raise NotFoundError(f"the store {self.uri} has no {key}") from refused
            raise

    def stat(self, key: str) -> Stat | None:
        try:
            found = self._call("read", key, lambda: self._client.head_object(**self._at(key)))
        except _Refused as refused:
            if refused.code in _ABSENT:
                return None
            raise
        return Stat(key, found["ContentLength"], found["LastModified"].timestamp())

    def children(self, prefix: str) -> list[str]:
        folder = f"{self._key(prefix)}/"
        names: set[str] = set()
        for page in self._pages("list_objects_v2", prefix, Prefix=folder, Delimiter="/"):
            found = [entry["Key"] for entry in page.get("Contents", ())]
            found += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
            names.update(name.removeprefix(folder).rstrip("/") for name in found)
        return sorted(filter(is_name, names))

    def walk(self, prefix: str) -> Iterator[Stat]:
        folder = f"{self._key(prefix)}/"
        for page in self._pages("list_objects_v2", prefix, Prefix=folder):
            for entry in page.get("Contents", ()):
                modified = entry["LastModified"].timestamp()
                yield Stat(self._own(entry["Key"]), entry["Size"], modified)

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._client.delete_object(**self._at(key)))

    def unfinished(self) -> Iterator[Unfinished]:
        for found in self._uploads(f"{self.prefix}/" if self.prefix else ""):
            upload = _Upload(self, self._own(found["Key"]), found["UploadId"])
            size = sum(part.size_bytes for part in upload.stored_parts().values())
            started = found["Initiated"].timestamp()
            yield Unfinished(upload.key, upload.handle, size, started)

    def discard(self, unfinished: Unfinished) -> None:
        _Upload(self, unfinished.key, unfinished.handle).abort()

    @property
    def _client(self) -> Any:
        return _client(self.stall_seconds, os.getpid())

    def _key(self, key: str) -> str:
        return self._joined(check_key(key))

    def _joined(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _own(self, key: str) -> str:
        """A key of the bucket as one of this store."""
        return key.removeprefix(f"{self.prefix}/") if self.prefix else key

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(key)}

    def _call(self, what: str, key: str, action: Callable[[], T]) -> T:
        where = f"{self.uri}/{key}"
        return _persist(f"cannot {what} {where}", self.patience_seconds, action)

    def _pages(self, operation: str, key: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """All pages of a listing. A paginator of boto3 would end where a page has to be retried."""
        arguments["Bucket"] = self.bucket

        def ask() -> dict[str, Any]:
            page: dict[str, Any] = getattr(self._client, operation)(**arguments)
            for field, needed in _NEEDED.items():
                for entry in page.get(field, ()):
                    if not needed <= entry.keys():
                        raise _Passing(f"a listing lacks the {needed - entry.keys()} of an entry")
            return page

        while True:
            page = self._call("list", key, ask)
            yield page
            # Two signs of more to come: one of them may have been damaged.
            if not page.get("IsTruncated") and not page.get("NextContinuationToken"):
                return
            for argument, following in _MARKERS[operation].items():
                arguments[argument] = page.get(following, "")

    def _put(self, key: str, chunks: Iterable[bytes]) -> None:
        pieces = cut(chunks, PART_BYTES)
        held = list(itertools.islice(pieces, 2))
        if len(held) < 2:
            data = b"".join(held)
            arguments = self._at(key) | _body(data, hashlib.md5(data).digest())
            self._call("write", key, lambda: self._client.put_object(**arguments))
        else:
            upload = _Upload(self, key, self._find_upload(key) or self._begin_upload(key))
            # Taken out one by one: what is held here would stay in memory to the end.
            taken = (held.pop(0) for _ in range(2))
            write_parts(upload, itertools.chain(taken, pieces))

    def _begin_upload(self, key: str) -> str:
        target = self._at(key)
        begun = self._call("write", key, lambda: self._client.create_multipart_upload(**target))
        return str(begun["UploadId"])

    def _find_upload(self, key: str) -> str | None:
        """The latest upload of this very key that has not ended."""
        target = self._key(key)
        uploads = [upload for upload in self._uploads(target) if upload["Key"] == target]
        latest = max(uploads, key=lambda upload: upload["Initiated"], default=None)
        return None if latest is None else str(latest["UploadId"])

    def _uploads(self, prefix: str) -> Iterator[dict[str, Any]]:
        # rclone says so of a bucket without uploads.
        with contextlib.suppress(UploadLost):
            for page in self._pages("list_multipart_uploads", prefix, Prefix=prefix):
                # Not every server filters by the prefix.
                yield from (u for u in page.get("Uploads", ()) if u["Key"].startswith(prefix))


@dataclass(frozen=True)
class _Upload:
    """One multipart upload of one key (`multipart.Upload`)."""

    store: S3Store
    key: str
    handle: str

    def stored_parts(self) -> dict[int, StoredPart]:
        found = {}
        pages = self.store._pages("list_parts", self.key, **self._named)
        try:
            for page in pages:
                for part in page.get("Parts", ()):
                    tag = part["ETag"].strip('"')
                    found[part["PartNumber"]] = StoredPart(tag, part["Size"])
        except UploadLost:
            return {}
        except _Refused as refused:
            # Ceph's word for an upload that is gone.
            if refused.code in _ABSENT:
                return {}
            raise
        return found

    def send(self, part: Part) -> StoredPart:
        arguments = self._named | _body(part.data, part.md5) | {"PartNumber": part.number}
        try:
            answer = self._call("write", "upload_part", arguments)
        except _Refused as refused:
            if refused.code != "NotImplemented":
                raise
            # rclone replaces no part: what was begun with other bytes cannot be taken up.
            self.abort()
            raise UploadLost(str(refused)) from refused
        return StoredPart(answer["ETag"].strip('"'), len(part.data))

    def complete(self, parts: Sequence[SentPart]) -> None:
        named = [{"PartNumber": p.number, "ETag": f'"{p.stored.tag}"'} for p in parts]
        arguments = self._named | {"MultipartUpload": {"Parts": named}}
        try:
            self._call("write", "complete_multipart_upload", arguments)
        except _Refused as refused:
            # Ceph completes nothing that has more parts than are named: those of other bytes.
            if refused.code in ("InvalidPart", "InvalidPartOrder"):
                self.abort()
            elif refused.code not in _ABSENT:
                raise
            raise UploadLost(str(refused)) from refused

    def abort(self) -> None:
        with contextlib.suppress(UploadLost):
            self._call("abort the upload of", "abort_multipart_upload", self._named)

    def read_back(self, start: int, length: int) -> bytes:
        try:
            return self.store.read(self.key, start, length)
        except NotFoundError:
            return b""

    @property
    def _named(self) -> dict[str, Any]:
        target = {"Bucket": self.store.bucket, "Key": self.store._joined(self.key)}
        return target | {"UploadId": self.handle}

    def _call(self, what: str, operation: str, arguments: dict[str, Any]) -> Any:
        action = getattr(self.store._client, operation)
        return self.store._call(what, self.key, lambda: action(**arguments))


class _Refused(StoreError):
    """The store answered no, and would again; `code` is its word for it."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


def _persist(failure: str, patience_seconds: float, action: Callable[[], T]) -> T:
    """Call until it succeeds, is refused, or patience has ended."""
    deadline = time.monotonic() + patience_seconds
    attempt = 0
    while True:
        try:
            with _told_apart(failure):
                return action()
        except _Passing as error:
            # Jitter: many workers must not come back in step.
            pause = min(2.0**attempt * 0.1, _LONGEST_PAUSE_SECONDS) * (0.5 + random.random())
            if time.monotonic() + pause > deadline:
                raise StoreError(f"{failure}: {error}") from error
            time.sleep(pause)
            attempt += 1


@contextlib.contextmanager
def _told_apart(failure: str) -> Iterator[None]:
    """Translate what boto3 raises into what may pass and what is final."""
    try:
        yield
    except _UNUSABLE as error:
        raise InputError(
            f"{failure}: {error}; check the bucket's name, and that the process has credentials "
            "where boto3 looks for them (environment, profile, role)"
        ) from error
    except ClientError as error:
        _raise_refusal(failure, error)
    except (BotoCoreError, HTTPError, OSError, ValueError, LookupError) as error:
        # Answers that were damaged on their way are no valid XML, or lack what they must have.
        raise _Passing(f"{type(error).__name__}: {error}") from error


def _raise_refusal(failure: str, error: ClientError) -> NoReturn:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    text = f"{failure}: {code} {error.response.get('Error', {}).get('Message', '')}".strip()
    if (status >= 500 and status != 501) or status == 429 or code in _PASSING:
        raise _Passing(f"the store answers {code or status}") from error
    if code == "NoSuchUpload":
        raise UploadLost(f"{failure}: the store has lost the upload; write it again") from error
    if status == 403 or code in _FORBIDDEN:
        raise InputError(f"{text}; check the credentials and what they may do") from error
    if code == "NoSuchBucket":
        raise InputError(f"{text}; create the bucket, or name another one") from error
    if status == 404 and code not in _ABSENT:
        # The code is in the body, which may have been damaged; nothing else is known to be absent.
        raise _Passing(f"the store answers {status} {code}") from error
    raise _Refused(text, code) from error


def _read_range(answer: Any, start: int, length: int | None) -> bytes:
    """The body, if it is what was asked for: servers and proxies cut bodies and ignore ranges."""
    match = _RANGE.fullmatch(answer.get("ContentRange", ""))
    with contextlib.closing(answer["Body"]) as body:
        if match is None:
            raise _Passing("the store ignores ranges")
        first, last, size = map(int, match.groups())
        wanted_last = size - 1 if length is None else min(start + length, size) - 1
        if (first, last) != (start, wanted_last):
            raise _Passing(f"the store answers bytes {first}-{last}, not {start}-{wanted_last}")
        # One more than there should be, never all that somebody sends.
        data: bytes = body.read(last - first + 2)
    if len(data) != last - first + 1:
        raise _Passing(f"the store answers {len(data)} bytes for {first}-{last}")
    return data


def _body(data: bytes, md5: bytes) -> dict[str, Any]:
    return {"Body": data, "ContentMD5": base64.b64encode(md5).decode()}


_CLIENT_LOCK = threading.Lock()


def _client(stall_seconds: float, process: int) -> Any:
    # Clients may be shared by threads, but neither be made by two at once nor survive a fork.
    with _CLIENT_LOCK:
        return _make_client(stall_seconds, process)


@functools.cache
def _make_client(stall_seconds: float, process: int) -> Any:
    try:
        session = boto3.session.Session()
        client = session.client("s3", config=_config("auto", stall_seconds))
        host = urlparse(client.meta.endpoint_url).hostname or ""
        if not host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws")):
            client = session.client("s3", config=_config("path", stall_seconds))
    except (BotoCoreError, ValueError) as error:
        raise InputError(
            f"the object store's settings cannot be used: {error}; check AWS_PROFILE, "
            "AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE"
        ) from error
    return client


def _config(addressing: str, stall_seconds: float) -> Config:
    return Config(
        signature_version="s3v4",
        # Content-MD5 is signed with the headers and stands for the body: no need to hash it again.
        s3={"addressing_style": addressing, "payload_signing_enabled": False},
        retries={"total_max_attempts": 1},
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=stall_seconds,
        tcp_keepalive=True,
        max_pool_connections=_CONNECTIONS,
        # Trailers break on Ceph and rclone over TLS; Content-MD5 is what all servers check.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
