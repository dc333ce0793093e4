"""Artifacts in S3-compatible object storage.

Written for what AWS, Ceph, Swift and smaller servers have in common: no conditional requests, no
checksum trailers, no ETag taken for a content's digest.

- Every request with a body carries its Content-MD5, which all of them check. What is read is
  checked by its readers against sha256 digests (`digests.py`, `manifest.py`); here, that the
  answer is the range that was asked for.
- An object larger than 16 MiB is written in parts (`multipart.py`); a killed writer's upload is
  found by its key and taken up, and `gc` removes what nobody took up.
- Every call is tried again for as long as the caller has patience (`s3_client.py`).
"""

import base64
import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mbq.artifacts.digests import PART_BYTES
from mbq.artifacts.errors import NotFoundError
from mbq.artifacts.multipart import Part, SentPart, StoredPart, UploadLost, write_parts
from mbq.artifacts.s3_client import STALL_SECONDS, Passing, Refused, client, persist
from mbq.artifacts.spans import Span, SpanFile, cut, md5_of
from mbq.artifacts.store import Stat, Unfinished, check_key, is_key, is_name

T = TypeVar("T")

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
    stall_seconds: float = STALL_SECONDS

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
        except Refused as refused:
            if refused.code in ("InvalidRange", "416"):
                return b""
            if refused.absent:
                raise NotFoundError(f"the store {self.uri} has no {key}") from refused
            raise

    def stat(self, key: str) -> Stat | None:
        try:
            found = self._call("read", key, lambda: self._client.head_object(**self._at(key)))
        except Refused as refused:
            if refused.absent:
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
                # Consoles and mounts leave markers of folders, which are no keys.
                if is_key(own := self._own(entry["Key"])):
                    yield Stat(own, entry["Size"], entry["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._client.delete_object(**self._at(key)))

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        root = f"{self.prefix}/" if self.prefix else ""
        for found in self._uploads(f"{self._key(prefix)}/" if prefix else root):
            upload = _Upload(self, self._own(found["Key"]), found["UploadId"])
            size = sum(part.size_bytes for part in upload.stored_parts().values())
            started = found["Initiated"].timestamp()
            yield Unfinished(upload.key, upload.handle, size, started)

    def discard(self, unfinished: Unfinished) -> None:
        _Upload(self, unfinished.key, unfinished.handle).abort()

    @property
    def _client(self) -> Any:
        return client(self.stall_seconds)

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
        return persist(f"cannot {what} {where}", self.patience_seconds, action)

    def _pages(self, operation: str, key: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """All pages of a listing. A paginator of boto3 would end where a page has to be retried."""
        arguments["Bucket"] = self.bucket

        def ask() -> dict[str, Any]:
            page: dict[str, Any] = getattr(self._client, operation)(**arguments)
            for field, needed in _NEEDED.items():
                for entry in page.get(field, ()):
                    if not needed <= entry.keys():
                        raise Passing(f"a listing lacks the {needed - entry.keys()} of an entry")
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
        spans = cut(chunks, PART_BYTES)
        held = list(itertools.islice(spans, 2))
        if len(held) < 2:
            span: Span = held[0] if held else ()
            target, md5 = self._at(key), md5_of(span).digest()
            put = self._client.put_object
            self._call("write", key, lambda: put(**target, **_body(span, md5)))
        else:
            upload = _Upload(self, key, self._find_upload(key) or self._begin_upload(key))
            # Taken out one by one: what is held here would stay in memory to the end.
            taken = (held.pop(0) for _ in range(2))
            write_parts(upload, itertools.chain(taken, spans))

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
            for page in self._pages("list_multipart_uploads", self._own(prefix), Prefix=prefix):
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
        except Refused as refused:
            # Ceph's word for an upload that is gone.
            if refused.absent:
                return {}
            raise
        return found

    def send(self, part: Part) -> StoredPart:
        named, send = self._named | {"PartNumber": part.number}, self.store._client.upload_part
        try:
            answer = self.store._call(
                "write", self.key, lambda: send(**named, **_body(part.span, part.md5))
            )
        except Refused as refused:
            if refused.code != "NotImplemented":
                raise
            # rclone replaces no part: what was begun with other bytes cannot be taken up.
            self.abort()
            raise UploadLost(str(refused)) from refused
        return StoredPart(answer["ETag"].strip('"'), part.size_bytes)

    def complete(self, parts: Sequence[SentPart]) -> None:
        named = [{"PartNumber": p.number, "ETag": f'"{p.stored.tag}"'} for p in parts]
        arguments = self._named | {"MultipartUpload": {"Parts": named}}
        try:
            self._call("write", "complete_multipart_upload", arguments)
        except Refused as refused:
            # Ceph completes nothing that has more parts than are named: those of other bytes.
            if refused.code in ("InvalidPart", "InvalidPartOrder"):
                self.abort()
            elif not refused.absent:
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


def _read_range(answer: Any, start: int, length: int | None) -> bytes:
    """The body, if it is what was asked for: servers and proxies cut bodies and ignore ranges."""
    match = _RANGE.fullmatch(answer.get("ContentRange", ""))
    with contextlib.closing(answer["Body"]) as body:
        if match is None:
            raise Passing("the store ignores ranges")
        first, last, size = map(int, match.groups())
        wanted_last = size - 1 if length is None else min(start + length, size) - 1
        if (first, last) != (start, wanted_last):
            raise Passing(f"the store answers bytes {first}-{last}, not {start}-{wanted_last}")
        data: bytes = body.read(last - first + 1)
        # Never all that somebody sends.
        more = body.read(1)
    if more or len(data) != last - first + 1:
        raise Passing(f"the store answers {len(data)} bytes for {first}-{last}")
    return data


def _body(span: Span, md5: bytes) -> dict[str, Any]:
    return {"Body": SpanFile(span), "ContentMD5": base64.b64encode(md5).decode()}
