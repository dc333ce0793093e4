"""A packed checkpoint where it lies: which of its files a width needs, and whether they are right.

A folder may hold a checkpoint cut to fewer bits: the files of the lower widths, an index and a
config of what is there, and the manifest of the whole. So everything can be held against the
manifest: a cut config becomes the original when its width is set back, and an index says no more
than the headers of the files do.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mbq.artifacts.checkpoint import INDEX_FILE, Shard, index_document
from mbq.artifacts.config import CONFIG_FILE, MAX_CONFIG_BYTES, config_bits, cut_config
from mbq.artifacts.digests import PART_BYTES, CheckedObject, Digest, part_size, read_part
from mbq.artifacts.documents import Manifest
from mbq.artifacts.errors import CorruptError, InputError, NotFoundError
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.sealed import get_document
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.artifacts.store import Store
from mbq.artifacts.tensors import open_tensors
from mbq.kernels.widths import SLICE_BITS

# What transformers looks for before the index.
_PREFERRED_FILES = ("model.safetensors", "adapter_config.json")
READERS = 8

# Called with the finished fraction.
Report = Callable[[float], None]


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint in a store whose root is its folder."""

    store: Store
    manifest: Manifest

    @property
    def ceilings(self) -> tuple[int, ...]:
        """The bits that it can be cut to."""
        return tuple(range(SLICE_BITS, self.manifest.max_bits + 1, SLICE_BITS))

    def files(self, max_bits: int) -> dict[str, Digest]:
        """The files that `max_bits` need; index and config depend on these and are not among them.

        Raises:
            InputError: the checkpoint cannot be cut to that.
        """
        if max_bits not in self.ceilings:
            raise InputError(
                f"--max-bits {max_bits}: the checkpoint can be cut to "
                f"{', '.join(map(str, self.ceilings))} bits; its averages lie between 2 and these"
            )
        upper = self.manifest.slice_files[max_bits // SLICE_BITS :]
        left_out = {CONFIG_FILE, INDEX_FILE, *(name for names in upper for name in names)}
        return {n: digest for n, digest in self.manifest.files.items() if n not in left_out}

    def config(self) -> tuple[bytes, int]:
        """The config of the whole checkpoint, and the bits that are there.

        Raises:
            NotFoundError, CorruptError: there is none, or it is another.
        """
        digest = self.manifest.files[CONFIG_FILE]
        if digest.size_bytes > MAX_CONFIG_BYTES:
            raise CorruptError(f"{CONFIG_FILE} has {digest.size_bytes:,} bytes; no config has")
        try:
            config = CheckedObject(self.store, CONFIG_FILE, digest).read()
        except CorruptError as error:
            try:
                return _uncut_config(self)
            except CorruptError:
                raise error from None
        if cut_config(config, self.manifest.max_bits) != config:
            raise CorruptError(
                f"{CONFIG_FILE} of {self.store.uri} is not as this program writes it; pack again"
            )
        return config, self.manifest.max_bits


def open_checkpoint(store: Store) -> PackedCheckpoint:
    """Read the manifest of a checkpoint.

    Raises:
        NotFoundError: there is none: it is no checkpoint, or not finished.
        CorruptError: it is damaged or of another format.
    """
    try:
        manifest = get_document(store, MANIFEST_FILE, Manifest)
    except NotFoundError as error:
        raise NotFoundError(
            f"{store.uri} holds no {MANIFEST_FILE}: it is not a packed checkpoint, or not finished"
        ) from error
    if manifest.format_version != FORMAT_VERSION:
        raise CorruptError(
            f"{store.uri} has format {manifest.format_version}, this program reads "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    if not {CONFIG_FILE, INDEX_FILE} <= set(manifest.files):
        raise CorruptError(f"the manifest of {store.uri} names no {CONFIG_FILE} or {INDEX_FILE}")
    return PackedCheckpoint(store, manifest)


@dataclass(frozen=True)
class Piece:
    """A part of a file of a checkpoint."""

    file: str
    digest: Digest
    part: int

    @property
    def start(self) -> int:
        return self.part * PART_BYTES

    @property
    def size_bytes(self) -> int:
        return part_size(self.digest, self.part)


def pieces_of(file: str, digest: Digest) -> list[Piece]:
    return [Piece(file, digest, part) for part in range(len(digest.part_sha256))]


def verify(checkpoint: PackedCheckpoint, report: Report) -> list[str]:
    """Hold every byte of a checkpoint, whole or cut, against its manifest.

    Returns what is wrong, a line for each file.
    """
    store = checkpoint.store
    try:
        _, max_bits = _uncut_config(checkpoint)
    except (NotFoundError, CorruptError) as error:
        return [f"{CONFIG_FILE}: {error}"]
    files = checkpoint.files(max_bits)
    faults = _file_faults(store, files, report)
    if not faults:
        index = make_index(store, files)
        if store.stat(INDEX_FILE) is None or store.read(INDEX_FILE, 0, 2 * len(index)) != index:
            faults[INDEX_FILE] = "it is not the index of the files that are there"
    for name in foreign_files(store, checkpoint.manifest):
        faults[name] = "it is not of this checkpoint, and transformers would load it; remove it"
    return [f"{name}: {fault}" for name, fault in faults.items()]


def _uncut_config(checkpoint: PackedCheckpoint) -> tuple[bytes, int]:
    """`PackedCheckpoint.config` where it may be cut: set back, it must be the manifest's."""
    manifest = checkpoint.manifest
    config = checkpoint.store.read(CONFIG_FILE, 0, MAX_CONFIG_BYTES + 1)
    max_bits = config_bits(config)
    whole = cut_config(config, manifest.max_bits)
    expected = manifest.files[CONFIG_FILE].sha256
    # White space and keys that stand there twice would not survive the cutting.
    same = cut_config(config, max_bits) == config and hashlib.sha256(whole).hexdigest() == expected
    if not same or max_bits not in checkpoint.ceilings:
        raise CorruptError("it is not what the manifest says")
    return whole, max_bits


def _file_faults(store: Store, files: Mapping[str, Digest], report: Report) -> dict[str, str]:
    """What is wrong with each file that is not as its digest says."""
    faults = {name: fault for name, d in files.items() if (fault := _size_fault(store, name, d))}
    pieces = [
        piece for name, d in files.items() if name not in faults for piece in pieces_of(name, d)
    ]
    done, total = 0, sum(piece.size_bytes for piece in pieces)
    with ThreadPoolExecutor(READERS) as pool:
        check = functools.partial(_content_fault, store)
        for piece, fault in zip(pieces, pool.map(check, pieces), strict=True):
            if fault is not None:
                faults[piece.file] = fault
            done += piece.size_bytes
            report(done / total)
    return faults


def foreign_files(store: Store, manifest: Manifest) -> list[str]:
    """Files beside a checkpoint that transformers would load in its place."""
    strange = (name for name in _PREFERRED_FILES if name not in manifest.files)
    return [name for name in strange if store.stat(name) is not None]


def make_index(store: Store, files: Iterable[str]) -> bytes:
    """The index of some files of a checkpoint, from their headers. Raises CorruptError."""
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    tensors = {name: open_tensors(store, name).entries.values() for name in weights}
    return index_document([Shard(name, None, tuple(e), ()) for name, e in tensors.items()])


def _size_fault(store: Store, name: str, digest: Digest) -> str | None:
    stat = store.stat(name)
    if stat is None:
        return "it is missing"
    if stat.size_bytes != digest.size_bytes:
        return f"it has {stat.size_bytes:,} bytes instead of {digest.size_bytes:,}"
    return None


def _content_fault(store: Store, piece: Piece) -> str | None:
    try:
        read_part(store, piece.file, piece.digest, piece.part)
    except (NotFoundError, CorruptError) as error:
        return str(error)
    return None
