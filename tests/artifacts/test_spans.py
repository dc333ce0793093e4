"""Bytes in several places: what is cut is all there, and a file of it behaves as files do."""

import io
import os

from hypothesis import given
from hypothesis import strategies as st

from mbq.artifacts.spans import SpanFile, cut, md5_of, size_of


def test_chunks_are_cut_across_their_borders() -> None:
    spans = list(cut([b"abc", b"", b"defgh", b"i"], 4))
    assert [[bytes(view) for view in span] for span in spans] == [[b"abc", b"d"], [b"efgh"], [b"i"]]
    assert [size_of(span) for span in spans] == [4, 4, 1]
    assert md5_of(spans[0]).hexdigest() == "e2fc714c4727ee9395f324cd2e7f331f"
    assert list(cut([b"", b""], 4)) == []


@given(st.lists(st.binary(max_size=9)), st.integers(1, 7))
def test_nothing_is_lost_and_all_but_the_last_are_full(chunks: list[bytes], size: int) -> None:
    spans = list(cut(chunks, size))
    assert b"".join(b"".join(span) for span in spans) == b"".join(chunks)
    assert all(size_of(span) == size for span in spans[:-1])


@given(st.lists(st.binary(max_size=9)), st.integers(0, 60))
def test_a_span_reads_as_a_file_of_its_bytes(chunks: list[bytes], start: int) -> None:
    data = b"".join(chunks)
    file, plain = SpanFile(tuple(map(memoryview, chunks))), io.BytesIO(data)
    assert file.seek(0, os.SEEK_END) == plain.seek(0, os.SEEK_END)
    assert file.seek(start) == plain.seek(start) == file.tell()
    read = b"".join(iter(lambda: bytes(file.read(4)), b""))
    assert read == plain.read()


def test_views_larger_than_a_read_come_in_several() -> None:
    data = os.urandom(2 * 1024 * 1024 + 7)
    file = SpanFile((memoryview(b"a"), memoryview(data)))
    reads = list(iter(lambda: bytes(file.read(16384)), b""))
    assert b"".join(reads) == b"a" + data
    assert max(map(len, reads)) == 1024 * 1024
