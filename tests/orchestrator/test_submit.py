"""When a run is submitted to a cluster, and as which attempt."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts import keys
from mbq.artifacts.documents import Status
from mbq.artifacts.errors import ClusterError, CorruptError, InputError
from mbq.artifacts.runs import find_run
from mbq.artifacts.sealed import get_document, put_document
from mbq.artifacts.spec_file import parse_spec
from mbq.artifacts.store import LocalStore
from mbq.cluster.jobs import JobInfo
from mbq.cluster.runner import TaskResources, fitting
from mbq.orchestrator import submit as submitting
from mbq.orchestrator.submit import prepare, resume, submit

Make = Callable[..., dict[str, Any]]


@dataclass
class _Cluster:
    """Knows of that many attempts, none of them alive, and keeps what is submitted to it."""

    known_attempts: int = 0
    ours: bool = False
    submitted: list[tuple[str, int, list[str]]] = field(default_factory=list)
    environments: list[Mapping[str, str]] = field(default_factory=list)

    def latest(self, run: str, store: str) -> JobInfo | None:
        known = self.known_attempts
        return JobInfo(run, known, "FAILED", "", store) if known else None

    def attempts(self, run: str) -> int:
        return self.known_attempts

    def submit(
        self,
        run: str,
        attempt: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        if attempt <= self.known_attempts:
            raise ClusterError("Request failed with status code 500")
        self.submitted.append((run, attempt, list(command)))
        self.environments.append(environment)

    def slots(self, resources: TaskResources) -> int:
        return fitting([{"CPU": 2.0, "memory": 8.0 * 2**30}], resources)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> _Cluster:
    found = _Cluster()
    monkeypatch.setattr(submitting, "Jobs", lambda address: found)
    return found


@pytest.fixture
def finished(finished_run: Any, tmp_path: Path) -> LocalStore:
    """A store of one's own that holds the finished run."""
    return LocalStore(Path(shutil.copytree(finished_run.store.root, tmp_path / "store")))


def _submit(document: dict[str, Any], store: LocalStore) -> list[str]:
    """What it says."""
    said: list[str] = []
    submit(prepare("tiny", parse_spec(document)), store, "http://head:8265", said.append)
    return said


def test_what_is_finished_is_not_submitted_again(
    cluster: _Cluster, finished: LocalStore, finished_run: Any, tiny_document: Make
) -> None:
    said = _submit(tiny_document(), finished)
    assert resume(finished_run.document, finished, "http://head:8265", said.append) is None
    assert said == [f"run {finished_run.document.run} is already finished"] * 2
    assert cluster.submitted == []


@pytest.mark.parametrize(
    "changes", [{"average_bits": [2.5]}, {"rivals": ["norm"]}, {"tokens": 256}]
)
def test_another_evaluation_of_a_finished_run_is_work(
    cluster: _Cluster,
    finished: LocalStore,
    finished_run: Any,
    tiny_document: Make,
    changes: dict[str, Any],
) -> None:
    run = finished_run.document.run
    document = tiny_document(evaluation=tiny_document()["evaluation"] | changes)
    assert _submit(document, finished) == []
    # The driver works on what is asked now, as an attempt after the one that finished.
    python = ["python", "-P", "-m", "mbq.orchestrator.run"]
    assert cluster.submitted == [(run, 2, [*python, finished.uri, run, "2"])]
    assert find_run(finished, run) == prepare("tiny", parse_spec(document)).document
    # One without an evaluation asks for less than there is.
    assert _submit(tiny_document(evaluation=None), finished) == [f"run {run} is already finished"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("manifest.json", None),
        ("tokenizer.json", None),
        ("model-slice3-00001-of-00001.safetensors", None),
        ("model-slice3-00001-of-00001.safetensors", 0),
        ("model-slice3-00001-of-00001.safetensors", -1),
    ],
)
def test_a_damaged_checkpoint_is_not_finished(
    cluster: _Cluster, finished: LocalStore, finished_run: Any, name: str, kept: int | None
) -> None:
    """Whether a file is gone, empty, or a byte short."""
    run = finished_run.document.run
    path = finished.path(keys.checkpoint_key(run, name))
    data = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(data[:kept])
    resume(finished_run.document, finished, "http://head:8265", lambda text: None)
    assert [attempt for _, attempt, _ in cluster.submitted] == [2]


@pytest.mark.parametrize(
    ("known", "said", "expected"), [(0, None, 1), (4, None, 5), (4, 2, 5), (2, 7, 8), (0, 7, 8)]
)
def test_an_attempt_has_a_number_of_its_own(
    cluster: _Cluster,
    finished: LocalStore,
    finished_run: Any,
    known: int,
    said: int | None,
    expected: int,
) -> None:
    """One more than the cluster counts, over all stores, and than the last driver wrote."""
    run, key = finished_run.document.run, keys.status_key(finished_run.document.run)
    status = get_document(finished, key, Status)
    finished.delete(key)
    if said is not None:
        stopped = {"state": "stopped", "attempt": said}
        put_document(finished, key, status.model_copy(update=stopped))
    cluster.known_attempts = known
    resume(finished_run.document, finished, "http://head:8265", lambda text: None)
    assert [attempt for _, attempt, _ in cluster.submitted] == [expected]
    assert cluster.submitted[0][2][-2:] == [run, str(expected)]


def test_of_two_that_submit_at_once_one_attaches(
    cluster: _Cluster, store: LocalStore, tiny_document: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*arguments: Any) -> None:
        put_document(*arguments)
        cluster.known_attempts = 1

    # While the tokens are uploaded, which takes longest.
    monkeypatch.setattr(submitting, "put_document", overtaken)
    (said,) = _submit(tiny_document(), store)
    assert said.endswith("is already running (attempt 1)")
    assert cluster.submitted == []


def test_files_of_this_machine_are_named_for_processes_that_run_elsewhere(
    finished_run: Any, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _Cluster(ours=True)
    monkeypatch.setattr(submitting, "start_local_head", lambda say: None)
    monkeypatch.setattr(submitting, "jobs_of", lambda head: found)
    monkeypatch.setenv("AWS_CA_BUNDLE", "certificates/ca.pem")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    resume(finished_run.document, store, None, lambda text: None)
    (environment,) = found.environments
    assert environment["AWS_CA_BUNDLE"] == str(Path.cwd() / "certificates" / "ca.pem")
    assert environment["AWS_PROFILE"] == "mine"


@pytest.mark.parametrize("kept", [None, 300])
def test_a_finished_run_whose_document_is_lost_gets_it_back(
    cluster: _Cluster,
    finished: LocalStore,
    finished_run: Any,
    tiny_document: Make,
    kept: int | None,
) -> None:
    run = finished_run.document.run
    path = finished.path(keys.spec_key(run))
    data = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(data[:kept])
        with pytest.raises(CorruptError, match="or submit the same spec again"):
            find_run(finished, run)
    assert _submit(tiny_document(), finished) == [f"run {run} is already finished"]
    assert find_run(finished, run) == finished_run.document
    assert cluster.submitted == []


@pytest.mark.parametrize(
    ("resources", "message"),
    [({"memory_gib": 500}, "the local Ray: .*500"), ({"device": "cuda"}, "the local Ray: .*GPU")],
)
def test_what_a_local_ray_lacks_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
    store: LocalStore,
    tiny_document: Make,
    resources: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(submitting, "start_local_head", lambda say: None)
    monkeypatch.setattr(submitting, "jobs_of", lambda head: _Cluster(ours=True))
    prepared = prepare("tiny", parse_spec(tiny_document(resources=resources)))
    with pytest.raises(InputError, match=message):
        submit(prepared, store, None, lambda text: None)
    assert store.children(keys.RUNS) == []
