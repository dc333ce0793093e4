"""Digests of the whole and of parts, and reads that are held against them."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mbq.artifacts.digests import (
    PART_BYTES,
    READS,
    CheckedObject,
    Digest,
    Digester,
    digest_of,
    read_chunks,
)
from mbq.artifacts.errors import CorruptError
from mbq.artifacts.store import LocalStore


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1])
def test_digest_is_that_of_the_whole_and_of_its_parts(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    digester = Digester()
    pieces = [data[: size // 3], data[size // 3 :]]
    assert b"".join(digester.through(pieces)) == data
    digest = digester.digest()
    assert digest == digest_of([data])
    assert digest.sha256 == hashlib.sha256(data).hexdigest()
    assert digest.size_bytes == size
    parts = [data[start : start + PART_BYTES] for start in range(0, size, PART_BYTES)]
    assert list(digest.part_sha256) == [hashlib.sha256(part).hexdigest() for part in parts]


def test_chunks_of_an_object_are_the_object(store: LocalStore) -> None:
    data = bytes(PART_BYTES + 17)
    store.put("big", [data])
    chunks = list(read_chunks(store, "big"))
    assert [len(chunk) for chunk in chunks] == [PART_BYTES, 17]
    assert b"".join(chunks) == data


@pytest.mark.parametrize(
    "change",
    [
        {"size_bytes": 2 * PART_BYTES},
        {"size_bytes": -1},
        {"sha256": "../../etc/passwd"},
        {"part_sha256": ["0" * 63]},
    ],
)
def test_a_digest_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    fields = digest_of([b"x"]).model_dump() | change
    with pytest.raises(ValidationError):
        Digest.model_validate(fields)


@dataclass(frozen=True)
class _Liar(LocalStore):
    """A folder whose next reads are wrong in one bit, as often as `lies` has entries."""

    lies: list[int] = field(default_factory=list)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        data = super().read(key, start, length)
        if self.lies and data:
            self.lies.pop()
            data = bytes([data[0] ^ 1]) + data[1:]
        return data


_DATA = bytes(range(251)) * (2 * PART_BYTES // 251) + b"the rest"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Digest]:
    root = tmp_path_factory.mktemp("large")
    LocalStore(root).put("large", [_DATA])
    return root, digest_of([_DATA])


@given(start=st.integers(0, len(_DATA) + 5), length=st.integers(0, len(_DATA)) | st.none())
def test_any_range_is_that_range(
    large: tuple[Path, Digest], start: int, length: int | None
) -> None:
    root, digest = large
    end = len(_DATA) if length is None else start + length
    assert CheckedObject(LocalStore(root), "large", digest).read(start, length) == _DATA[start:end]


def test_what_comes_back_wrong_is_asked_for_again(large: tuple[Path, Digest]) -> None:
    root, digest = large
    liar = _Liar(root, lies=[1] * (READS - 1))
    assert (
        CheckedObject(liar, "large", digest).read(PART_BYTES - 3, 6)
        == _DATA[PART_BYTES - 3 : PART_BYTES + 3]
    )
    assert not liar.lies


def test_what_stays_wrong_is_an_error_that_says_where(large: tuple[Path, Digest]) -> None:
    root, digest = large
    other = digest.model_copy(update={"part_sha256": (*digest.part_sha256[:1], "0" * 64, "0" * 64)})
    checked = CheckedObject(LocalStore(root), "large", other)
    assert checked.read(0, 10) == _DATA[:10]
    with pytest.raises(CorruptError, match=f"large: bytes from {PART_BYTES} on are not what"):
        checked.read(PART_BYTES, 1)
