"""Blobs into object storage and checkpoints out of it, against boto3's transfers and obstore.

    python benchmarks/store.py [--servers rclone,swift,ceph] [--mib 512] [--rounds 5]

Starts each of the tests' servers in turn. After a round that does not count, the contestants take
turns round by round; each turn is a fresh process whose client is warm. Two things are timed:

    upload   random bytes, new ones each turn. Ours is `put_blob` of a block's blob as it comes, a
             list of chunks of 3 to 40 MiB: sha256 of the whole and of every part, Content-MD5 of
             every part, the transfer. `sent only` is the transfer with its Content-MD5. The others
             get the same amount as one piece.
    pull     an artificial checkpoint of five files into a new folder. Ours is `pull`: every part is
             checked against its sha256 and brought to the disk, the index is made, everything is
             synced. The others only write the files. All files are compared with the manifest
             afterwards, outside the time.

`same work` is obstore with all of our hashes, and on the disk as ours is; servers and clients share
the cores here, so that hashes cost time that they would not cost with the server elsewhere.

Speeds are medians over rounds, with the slowest and fastest. `best` is the other with the highest
median. A ratio is the median over rounds of the two speeds of one round. `cpu` is what the client's
process used, `peak` its most memory beyond what it had when the turn began, the bytes to upload
among that. obstore is compared where it is installed.
"""

import functools
import gc
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import boto3
import click
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from provenance import provenance

from mbq.artifacts.checkpoint import INDEX_FILE, QUANT_METHOD
from mbq.artifacts.config import CONFIG_FILE, cut_config
from mbq.artifacts.digests import PART_BYTES, digest_of
from mbq.artifacts.documents import Manifest
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.packed import make_index, open_checkpoint
from mbq.artifacts.pull import pull
from mbq.artifacts.runs import put_blob
from mbq.artifacts.sealed import put_document
from mbq.artifacts.spans import cut, md5_of
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.artifacts.store import open_store
from mbq.artifacts.tensors import Entry, encode
from mbq.kernels.widths import SLICE_BITS

try:
    import obstore
    from obstore.store import S3Store as Obstore
except ImportError:
    obstore = None

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
BUCKET = "mbq"
UPLOADED = "uploads/theirs"
MIB = 1024 * 1024
SLICES = 4
OURS = "mbq"
SENT_ONLY = "mbq, sent only"
SAME_WORK = "obstore, same work"
# What boto3 is given where it is tuned: no second checksum, and connections for every thread.
TUNED = {"request_checksum_calculation": "when_required", "max_pool_connections": 32}
PARTS = {"multipart_chunksize": PART_BYTES, "multipart_threshold": PART_BYTES}

Row = dict[str, float]
Upload = Callable[[list[bytes]], Any]
# Fetches the checkpoint at a prefix, of whose files it is told the sizes, into a folder.
Pull = Callable[[str, Mapping[str, int], Path], Any]


def upload_ours() -> Upload:
    store = open_store(f"s3://{BUCKET}/uploads")
    return lambda chunks: put_blob(store, chunks)


def upload_sent_only() -> Upload:
    store = open_store(f"s3://{BUCKET}/uploads")
    return lambda chunks: store.put("ours", chunks)


def upload_boto3(options: Mapping[str, Any], transfer: Mapping[str, Any]) -> Upload:
    client, config = boto3_client(options), TransferConfig(**transfer)
    return lambda data: client.upload_fileobj(BytesIO(data[0]), BUCKET, UPLOADED, Config=config)


def upload_obstore(**transfer: int) -> Upload:
    store = obstore_client()
    return lambda data: obstore.put(store, UPLOADED, data[0], **transfer)


def upload_same_work() -> Upload:
    send = upload_obstore(chunk_size=PART_BYTES, max_concurrency=8)

    def hash_and_send(data: list[bytes]) -> None:
        digest_of(data)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda span: md5_of(span).digest(), cut(data, PART_BYTES)))
        send(data)

    return hash_and_send


def pull_ours(prefix: str, sizes: Mapping[str, int], folder: Path) -> None:
    pull(open_checkpoint(open_store(f"s3://{BUCKET}/{prefix}")), folder, None, lambda size: None)


def pull_boto3(options: Mapping[str, Any], transfer: Mapping[str, Any], files: int) -> Pull:
    client, config = boto3_client(options), TransferConfig(**transfer)

    def one(key: str, path: Path, start: int, length: int) -> None:
        client.download_file(BUCKET, key, str(path), Config=config)

    return functools.partial(pull_pieces, one, files, None)


def pull_obstore(threads: int, piece_bytes: int | None, same_work: bool = False) -> Pull:
    store = obstore_client()

    def one(key: str, path: Path, start: int, length: int) -> None:
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            if piece_bytes:
                data = obstore.get_range(store, key, start=start, length=length)
                if same_work:
                    hashlib.sha256(data).digest()
                file.write(data)
                if same_work:
                    os.fdatasync(file.fileno())
            else:
                for chunk in obstore.get(store, key).stream(4 * MIB):
                    file.write(chunk)

    return functools.partial(pull_pieces, one, threads, piece_bytes)


def pull_pieces(
    one: Callable[..., None],
    threads: int,
    piece_bytes: int | None,
    prefix: str,
    sizes: Mapping[str, int],
    folder: Path,
) -> None:
    """Whole files, or pieces of them, several at a time."""
    pieces = []
    for name, size in sizes.items():
        (folder / name).touch()
        step = piece_bytes or size
        at = range(0, size, step)
        pieces += [(f"{prefix}/{name}", folder / name, s, min(step, size - s)) for s in at]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: one(*piece), pieces))


UPLOADS: dict[str, Callable[[], Upload]] = {
    OURS: upload_ours,
    SENT_ONLY: upload_sent_only,
    "boto3, defaults": lambda: upload_boto3({}, {}),
    "boto3, 4 x 16 MiB": lambda: upload_boto3(TUNED, PARTS | {"max_concurrency": 4}),
    "boto3, 8 x 16 MiB": lambda: upload_boto3(TUNED, PARTS | {"max_concurrency": 8}),
    "obstore, defaults": lambda: upload_obstore(),
    "obstore, 8 x 16 MiB": lambda: upload_obstore(chunk_size=PART_BYTES, max_concurrency=8),
    SAME_WORK: upload_same_work,
}
PULLS: dict[str, Callable[[], Pull]] = {
    OURS: lambda: pull_ours,
    "boto3, defaults": lambda: pull_boto3({}, {}, 1),
    "boto3, 8 x 16 MiB": lambda: pull_boto3(TUNED, PARTS | {"max_concurrency": 8}, 1),
    "boto3, all files": lambda: pull_boto3(TUNED, {"max_concurrency": 4}, 8),
    "obstore, all files": lambda: pull_obstore(8, None),
    "obstore, 4 x 16 MiB": lambda: pull_obstore(4, PART_BYTES),
    "obstore, 8 x 16 MiB": lambda: pull_obstore(8, PART_BYTES),
    SAME_WORK: lambda: pull_obstore(8, PART_BYTES, same_work=True),
}
WAYS: dict[str, dict[str, Any]] = {"upload": UPLOADS, "pull": PULLS}


@click.command()
@click.option("--servers", "wanted", default="rclone,swift,ceph", show_default=True)
@click.option("--mib", default=512, show_default=True, help="Sent or pulled in a turn; to 1500.")
@click.option("--rounds", default=5, show_default=True, help="Beside one that does not count.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="The result's file.")
def main(wanted: str, mib: int, rounds: int, out: Path | None) -> None:
    """Time uploads and pulls on the tests' servers, print tables and write a result."""
    sys.path.insert(0, str(ROOT))
    from tests.support import servers

    if obstore is None:
        click.echo("obstore is not installed: boto3 only; to compare both, pip install obstore")
    found: dict[str, Any] = {}
    with TemporaryDirectory(prefix="mbq-store-") as folder:
        for name in wanted.split(","):
            if reason := servers.missing(name):
                click.echo(f"{name} is left out: {reason}")
                continue
            server = servers.start(name, Path(folder) / name)
            try:
                found[name] = {way: run(server, way, mib, rounds) for way in WAYS}
            finally:
                server.stop()
    result = {
        **provenance(),
        "versions": versions(servers.SWIFT / "python", found),
        "mib": mib,
        "ratios": {s: {w: ratios(rows) for w, rows in ws.items()} for s, ws in found.items()},
        "turns": found,
    }
    out = out or RESULTS / f"{result['date']}-store.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{result['processor']}; {result['versions']}\n{out}")


def run(server: Any, way: str, mib: int, rounds: int) -> dict[str, list[Row]]:
    """All rounds of all contestants on one server."""
    names = [name for name in WAYS[way] if obstore or not name.startswith("obstore")]
    rows: dict[str, list[Row]] = {name: [] for name in names}
    if way == "pull":
        for prefix, size in (("small", SLICES + 1), ("large", mib)):
            apart(server, write_checkpoint, prefix, size)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            try:
                rows[name].append(apart(server, measure, way, name, mib))
            except Exception as error:
                # Not every client gets on with every server: rclone's ranges lack the status 206.
                if name == OURS or number:
                    raise
                click.echo(f"{name} fails on {server.name}: {str(error).splitlines()[0]}")
                names.remove(name)
                del rows[name]
    rows = {name: turns[1:] for name, turns in rows.items()}
    click.echo(table(f"{server.name}, {way}, {mib} MiB", rows))
    return rows


def apart(server: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh process that knows the server, once nothing is left of what came before."""
    if server.name == "ceph":
        # It keeps the bytes of deleted objects for hours if it is not told otherwise.
        collect = ["radosgw-admin", "-c", "ceph.conf", "gc", "process", "--include-all"]
        subprocess.run(collect, cwd=server.folder, capture_output=True, check=True)
    os.sync()
    os.environ.update(server.environment)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(way: str, contestant: str, mib: int) -> Row:
    """One turn: time, memory, and a check that it did what it should."""
    with TemporaryDirectory(prefix="mbq-store-") as folder:
        turn = upload_turn(contestant, mib) if way == "upload" else pull_turn(contestant, folder)
        act = next(turn)
        gc.collect()
        # Forget the peak so far.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, cpu, started = memory_mib("VmRSS"), time.process_time(), time.perf_counter()
        act()
        row = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        row |= {"mib_per_second": mib / row["seconds"], "peak_mib": memory_mib("VmHWM") - before}
        next(turn, None)
    return row


def upload_turn(contestant: str, mib: int) -> Iterator[Callable[[], Any]]:
    """What to time; then check it and remove what was stored."""
    send = UPLOADS[contestant]()
    send([os.urandom(MIB)])
    chunks = list(random_chunks(mib * MIB))
    if contestant not in (OURS, SENT_ONLY):
        chunks = [b"".join(chunks)]
    yield lambda: send(chunks)
    client = boto3_client(TUNED)
    found = client.list_objects_v2(Bucket=BUCKET, Prefix="uploads/")["Contents"]
    for entry in found:
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    if mib * MIB not in [entry["Size"] for entry in found]:
        raise RuntimeError(f"{contestant} stored {found}")


def pull_turn(contestant: str, folder: str) -> Iterator[Callable[[], Any]]:
    """What to time; then check it."""
    fetch = PULLS[contestant]()
    for prefix in ("small", "large"):
        files = open_checkpoint(open_store(f"s3://{BUCKET}/{prefix}")).manifest.files
        sizes = {name: digest.size_bytes for name, digest in files.items()}
        target = Path(folder, prefix)
        target.mkdir()
        if prefix == "small":
            fetch(prefix, sizes, target)
    yield lambda: fetch("large", sizes, target)
    for name, digest in files.items():
        with (target / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest.sha256:
                raise RuntimeError(f"{contestant} made another {name}")


def write_checkpoint(prefix: str, mib: int) -> None:
    """Random tensors in the files of a packed checkpoint, a base and its slices."""
    store = open_store(f"s3://{BUCKET}/{prefix}")
    stems = ["base", *(f"slice{e}" for e in range(SLICES))]
    names = [f"model-{stem}-00001-of-00001.safetensors" for stem in stems]
    digests = {}
    for name in names:
        data = list(random_chunks(mib * MIB // len(names) // 4 * 4))
        entries = [Entry(f"{name}.{i}", "I32", (len(c) // 4,)) for i, c in enumerate(data)]
        chunks = list(encode(entries, data))
        store.put(name, chunks)
        digests[name] = digest_of(chunks)
    config = json.dumps({"quantization_config": {"quant_method": QUANT_METHOD}}).encode()
    config = cut_config(config, SLICES * SLICE_BITS)
    for name, body in ((INDEX_FILE, make_index(store, names)), (CONFIG_FILE, config)):
        store.put(name, [body])
        digests[name] = digest_of([body])
    named = {"run": "benchmark", "model_digest": "0" * 64, "blocks": (), "hardware": ()}
    sizes = {"format_version": FORMAT_VERSION, "max_bits": SLICES * SLICE_BITS, "group_size": 128}
    slices = tuple((name,) for name in names[1:])
    manifest = Manifest(files=digests, slice_files=slices, **named, **sizes)
    put_document(store, MANIFEST_FILE, manifest)


def random_chunks(size_bytes: int) -> Iterator[bytes]:
    """As many bytes in chunks of 3 to 40 MiB, multiples of 4 bytes as tensors are."""
    while size_bytes:
        chunk = min(random.randrange(3 * MIB, 40 * MIB, 4), size_bytes)
        yield os.urandom(chunk)
        size_bytes -= chunk


def boto3_client(options: Mapping[str, Any]) -> Any:
    config = Config(s3={"addressing_style": "path"}, **options)
    return boto3.session.Session().client("s3", config=config)


def obstore_client() -> Any:
    options = {"allow_http": True, "timeout": "300s"}
    return Obstore(BUCKET, endpoint=os.environ["AWS_ENDPOINT_URL_S3"], client_options=options)


def memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def ratios(rows: Mapping[str, list[Row]]) -> dict[str, dict[str, float]]:
    """Ours to the best of the others, and to those that do the same work."""
    speeds = {name: [row["mib_per_second"] for row in turns] for name, turns in rows.items()}
    plain = [name for name in speeds if name not in (OURS, SENT_ONLY, SAME_WORK)]
    best = max(plain, key=lambda name: median(speeds[name]))
    compared = [(OURS, best), (SENT_ONLY, best), (OURS, SAME_WORK)]
    found = {}
    for one, other in compared:
        if one in speeds and other in speeds:
            pairs = [mine / theirs for mine, theirs in zip(speeds[one], speeds[other], strict=True)]
            found[f"{one} / {other}"] = {
                "median": median(pairs),
                "min": min(pairs),
                "max": max(pairs),
            }
    return found


def table(title: str, rows: Mapping[str, list[Row]]) -> str:
    lines = [f"\n{title}\n{'':22}  MiB/s    min    max   cpu s  peak MiB"]
    for name, turns in rows.items():
        speeds = [row["mib_per_second"] for row in turns]
        cpu, peak = (median(row[key] for row in turns) for key in ("cpu_seconds", "peak_mib"))
        numbers = f"{median(speeds):7.0f}{min(speeds):7.0f}{max(speeds):7.0f}{cpu:8.2f}{peak:10.0f}"
        lines.append(f"{name:22}{numbers}")
    for pair, found in ratios(rows).items():
        lines.append(f"{pair}: {found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})")
    return "\n".join(lines)


def versions(swift: Path, servers: Mapping[str, Any]) -> dict[str, str]:
    commands: dict[str, list[str | Path]] = {
        "rclone": [Path(sys.executable).with_name("rclone"), "version"],
        "swift": [swift, "-c", "from importlib.metadata import *; print(version('swift'))"],
        "ceph": ["ceph", "--version"],
    }
    told = {
        name: version(name) for name in ("boto3", "botocore", *(["obstore"] if obstore else []))
    }
    for name in servers:
        done = subprocess.run(commands[name], capture_output=True, text=True, check=False)
        told[name] = done.stdout.partition("\n")[0]
    return told


if __name__ == "__main__":
    main()
