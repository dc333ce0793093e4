"""From a spec to a running driver: resolve, check, then write and start.

Everything that can be wrong is found before anything is written or started; what is found wrong is
one line. Resolving fixes what names stand for: the model's commit or digest, and the very tokens.
"""

import contextlib
import ipaddress
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlparse

import numpy as np

from mbq.artifacts import keys
from mbq.artifacts.digests import digest_of
from mbq.artifacts.documents import Manifest, Results, RunDocument, Status
from mbq.artifacts.errors import ClusterError, CorruptError, InputError, NotFoundError
from mbq.artifacts.runs import find_run, put_blob
from mbq.artifacts.sealed import find_document, put_document
from mbq.artifacts.source import Source, open_source
from mbq.artifacts.spec import RunSpec, run_id
from mbq.artifacts.spec_file import apply_settings, load_spec
from mbq.artifacts.store import Store, open_store, probe, require_folder
from mbq.artifacts.tensors import Entry, encode
from mbq.cluster.jobs import Jobs
from mbq.orchestrator.check import check_source
from mbq.orchestrator.comparison import variants
from mbq.orchestrator.local import Say, default_store, jobs_of, start_local_head
from mbq.orchestrator.plan import build_plan
from mbq.orchestrator.presets import preset
from mbq.orchestrator.resources import choose_resources
from mbq.workers.data import Tokens, calibration_tokens, evaluation_tokens, sample_tokens
from mbq.workers.environment import ENVIRONMENT

_STORE_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
# They name files and profiles of this machine.
_LOCAL_VARIABLES = (
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
)
_PATH_VARIABLES = ("AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
# A driver writes its status every second, to a store that may be slow.
_LOOK_SECONDS = 5.0
_LOOKS = 18


@dataclass(frozen=True)
class Prepared:
    """A checked run and the blobs that it needs in the store."""

    document: RunDocument
    blobs: Sequence[Sequence[bytes]]


def read_spec(name: str, settings: Sequence[str]) -> tuple[str, RunSpec]:
    """A spec by file or preset, and a short name for the run."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or os.path.isfile(path):
        return path.stem, load_spec(path, settings)
    chosen = preset(name)
    if isinstance(chosen, Path):
        return name, load_spec(chosen, settings)
    return name, apply_settings(chosen, settings)


def prepare(name: str, spec: RunSpec) -> Prepared:
    """Resolve and check a spec. Reads the model's headers and the text; writes nothing.

    Raises:
        InputError: the run cannot work.
    """
    source = open_source(spec.model.source, spec.model.revision)
    check_source(source, spec)
    calibration = _token_file(calibration_tokens(spec.calibration, source))
    evaluation = (
        _token_file(evaluation_tokens(spec.evaluation, source)) if spec.evaluation else None
    )
    shown = spec.evaluation is not None and spec.slices > 1
    sample = _token_file(sample_tokens(source)) if shown else None
    files = [file for file in (calibration, evaluation, sample) if file is not None]
    document = RunDocument(
        run=run_id(spec, source.digest, digest_of(calibration).sha256),
        name=name,
        spec=spec,
        model_location=source.location,
        model_commit=source.revision,
        model_digest=source.digest,
        model_files=source.digests,
        calibration_tokens=digest_of(calibration),
        evaluation_tokens=digest_of(evaluation) if evaluation else None,
        sample_tokens=digest_of(sample) if sample else None,
        code_version=version("mbq-cluster"),
    )
    return Prepared(document, files)


def choose_store(uri: str | None, address: str | None, source: Source) -> Store:
    """The store of a run, refused when the cluster could not see it.

    Raises:
        InputError: an unknown scheme, or a path of this machine with a remote cluster.
    """
    store = open_store(uri or default_store())
    if address is not None and not _is_loopback(address):
        if uri is None or "://" not in uri:
            raise InputError(
                f"store: {store.uri} is a path of this machine, the cluster at {address} is not on "
                "it; write s3://bucket/prefix, or file:///path if every node mounts that path"
            )
        if source.revision is None and "://" not in source.location:
            raise InputError(
                f"model.source: {source.location} is a folder of this machine, the cluster at "
                f"{address} is not on it; use a Hub repository or s3://bucket/prefix"
            )
    return store


def try_out(prepared: Prepared, store: Store, address: str | None) -> None:
    """See that store and cluster answer; nothing is written or started.

    Raises:
        InputError: the store is no folder, or there is no cluster at the address.
        StoreError: the store cannot be read.
    """
    if address is not None:
        Jobs(address)
    # A folder that is not there is made when a run starts.
    with contextlib.suppress(NotFoundError):
        require_folder(store)
    store.stat(keys.spec_key(prepared.document.run))


def submit(prepared: Prepared, store: Store, address: str | None, say: Say) -> Jobs | None:
    """Write a prepared run to the store and see that a driver runs it.

    Returns the cluster it was submitted to; None if no cluster was needed.
    """
    jobs = Jobs(address) if address is not None else None
    probe(store)
    if _is_finished(store, prepared.document, say):
        if not _is_found(store, prepared.document.run):
            _write(prepared, store)
        return jobs
    jobs = jobs or jobs_of(start_local_head(say))
    attempt = _next_attempt(prepared.document.run, store, jobs)
    # A running driver keeps the document it was started with.
    if _is_running(prepared.document.run, store, jobs, say):
        if find_run(store, prepared.document.run) != prepared.document:
            say("it keeps its evaluation and resources; submit again when it has finished")
    else:
        _check_resources(prepared.document, jobs)
        _write(prepared, store)
        _start(prepared.document, attempt, store, jobs, say)
    return jobs


def resume(document: RunDocument, store: Store, address: str | None, say: Say) -> Jobs | None:
    """See that a run which the store knows is finished or has a driver."""
    if _is_finished(store, document, say):
        return None
    jobs = Jobs(address) if address is not None else jobs_of(start_local_head(say))
    attempt = _next_attempt(document.run, store, jobs)
    if not _is_running(document.run, store, jobs, say):
        _start(document, attempt, store, jobs, say)
    return jobs


def _check_resources(document: RunDocument, jobs: Jobs) -> None:
    """Raises InputError if a local Ray cannot hold a task: it does not grow, as a cluster may."""
    if jobs.ours:
        try:
            choose_resources(document, jobs.slots, build_plan(document))
        except ClusterError as error:
            raise InputError(f"the local Ray: {error}") from error


def _write(prepared: Prepared, store: Store) -> None:
    for chunks in prepared.blobs:
        put_blob(store, chunks)
    put_document(store, keys.spec_key(prepared.document.run), prepared.document)


def _is_found(store: Store, run: str) -> bool:
    """Whether a run's document can be read; without it nothing finds the run."""
    try:
        find_run(store, run)
    except (NotFoundError, CorruptError):
        return False
    return True


def _is_running(run: str, store: Store, jobs: Jobs, say: Say) -> bool:
    """Whether this cluster drives a run. Raises InputError if another one does."""
    latest = jobs.latest(run, store.uri)
    if latest is not None and latest.alive:
        say(f"run {run} is already running (attempt {latest.attempt})")
        return True
    status = find_document(store, keys.status_key(run), Status)
    if status is None or status.state != "running":
        return False
    if latest is not None and latest.attempt >= status.attempt:
        return False
    # Killed, or on another cluster: then it writes again and again, whatever its clock says. Ray
    # lets a driver whose head was killed live for a minute.
    say(f"run {run} was running: waiting to see that nobody drives it any more (at most 90 s)")
    for _ in range(_LOOKS):
        time.sleep(_LOOK_SECONDS)
        before, status = status, find_document(store, keys.status_key(run), Status)
        if status is None or status.updated_at == before.updated_at:
            return False
    raise InputError(
        f"run {run} is driven on another cluster (attempt {status.attempt}); give its --address, "
        "or stop it there first"
    )


def _next_attempt(run: str, store: Store, jobs: Jobs) -> int:
    """Asked before anything else: of two that find nobody running, both start the same one."""
    status = find_document(store, keys.status_key(run), Status)
    return 1 + max(jobs.attempts(run), status.attempt if status else 0)


def _start(document: RunDocument, attempt: int, store: Store, jobs: Jobs, say: Say) -> None:
    run = document.run
    python = sys.executable if jobs.ours else "python"
    try:
        jobs.submit(
            run,
            attempt,
            # Not from the working folder of a node: whatever lies there could be imported.
            [python, "-P", "-m", "mbq.orchestrator.run", store.uri, run, str(attempt)],
            ENVIRONMENT | _store_environment(jobs.ours),
            {"model": document.name, "store": store.uri, "version": document.code_version},
        )
    except ClusterError:
        # Another submit may have been faster by a moment, and an attempt is started once.
        latest = jobs.latest(run, store.uri)
        if latest is None or latest.attempt < attempt:
            raise
        say(f"run {run} is already running (attempt {latest.attempt})")


def _is_finished(store: Store, document: RunDocument, say: Say) -> bool:
    """Whether the checkpoint is complete and the results are those this document asks for."""
    run, evaluation = document.run, document.evaluation_tokens
    status = find_document(store, keys.status_key(run), Status)
    manifest = find_document(store, keys.manifest_key(run), Manifest)
    results = find_document(store, keys.results_key(run), Results)
    if status is None or status.state != "done" or manifest is None:
        return False
    for name, file in manifest.files.items():
        stat = store.stat(keys.checkpoint_key(run, name))
        if stat is None or stat.size_bytes != file.size_bytes:
            return False
    if evaluation is not None:
        if results is None or results.tokens_sha256 != evaluation.sha256:
            return False
        if [row.variant for row in results.rows] != variants(document.spec):
            return False
    say(f"run {run} is already finished")
    return True


def _token_file(tokens: Tokens) -> list[bytes]:
    entry = Entry("tokens", "I32", tokens.shape)
    return list(encode([entry], [np.ascontiguousarray(tokens, dtype="<i4").tobytes()]))


def _store_environment(here: bool) -> dict[str, str]:
    """Where the object store is, for the processes of a run. Never its credentials: a job's
    environment can be read by everyone who may use the cluster."""
    names = _STORE_VARIABLES + (_LOCAL_VARIABLES if here else ())
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    # Processes of a run have another working folder.
    paths = {name: os.path.abspath(found[name]) for name in _PATH_VARIABLES if name in found}
    return found | paths


def _is_loopback(address: str) -> bool:
    host = urlparse(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
