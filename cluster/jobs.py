"""Drivers as Ray jobs: submit, look up, stop, read logs. One way to run, local or remote.

A job's id is `mbq-<run>-a<attempt>`: the run is found from the job and the job from the run, with
no database. The same run may be made in several stores, so its store, in the metadata, belongs to a
job's identity, and attempts are counted over all of them. Metadata also carries what a listing
shows. Nothing secret may go into a job: its
environment and entrypoint can be read back by everyone who may use the cluster.
"""

import logging
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mbq.artifacts.errors import ClusterError, InputError, NotFoundError, first_line
from mbq.cluster.runner import TaskResources, fitting

_JOB = re.compile(r"mbq-([0-9a-f]{12})-a(\d+)")
# ray would go to these rather than to the address that it is given.
_OTHER_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
# A dashboard that is busy may take its time; ray's client would wait for ever.
_ANSWER_SECONDS = 30.0
_AGENT_SECONDS = 60.0
_POLL_SECONDS = 0.5
# A driver is given less by Ray.
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class JobInfo:
    """What the cluster says of one attempt; `state` is Ray's word for it."""

    run: str
    attempt: int
    state: str
    message: str
    store: str

    @property
    def alive(self) -> bool:
        return self.state in ("PENDING", "RUNNING")


class Jobs:
    """The Jobs API of one cluster; `ours` says that it is the head we started on this machine."""

    def __init__(self, address: str, environment: Mapping[str, str] | None = None) -> None:
        """Connect.

        Args:
            environment: of the head we started, set before ray is imported, which reads its
                authentication there; None for any other cluster.

        Raises:
            InputError: nothing answers at the address, or it refuses us.
        """
        self.ours = environment is not None
        os.environ.update(environment or {})
        for variable in _OTHER_ADDRESSES:
            os.environ.pop(variable, None)
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            def _do_request(self, *args: Any, **kwargs: Any) -> Any:
                return super()._do_request(*args, **{"timeout": _ANSWER_SECONDS, **kwargs})

        # The log follower announces the normal end of every stream.
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        self.address = address
        try:
            self._client = Client(address)
        except Exception as error:  # ray raises RuntimeError, ConnectionError and its own kinds
            remedy = (
                "`mbq-cluster head stop`, then again"
                if self.ours
                else "check --address, or leave it out to use a local Ray"
            )
            raise InputError(
                f"cluster: cannot reach {address} ({first_line(error)}); {remedy}"
            ) from error

    def submit(
        self,
        run: str,
        attempt: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        """Start an attempt of a run. The command runs on the head node, in a shell."""
        deadline = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                self._client.submit_job(
                    submission_id=f"mbq-{run}-a{attempt}",
                    entrypoint=shlex.join(command),
                    runtime_env={"env_vars": dict(environment)},
                    metadata={"run": run, **metadata},
                )
                return
            except Exception as error:
                # A cluster that was started just now may not have what runs drivers yet.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ClusterError(
                        f"cluster: {self.address} refused the job: {first_line(error)}"
                    ) from error
            time.sleep(_POLL_SECONDS)

    def slots(self, resources: TaskResources) -> int:
        """How many such tasks its nodes can run at once; waits for the first node to come up."""
        from ray.util.state import list_nodes

        deadline = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                nodes = list_nodes(self.address, filters=[("state", "=", "ALIVE")])
            except Exception as error:
                raise ClusterError(
                    f"cluster: {self.address} does not answer: {first_line(error)}"
                ) from error
            if nodes or time.monotonic() > deadline:
                return fitting((node.resources_total or {} for node in nodes), resources)
            time.sleep(_POLL_SECONDS)

    def list(self) -> list[JobInfo]:
        """Every attempt of every run the cluster knows, oldest first."""
        try:
            jobs = self._client.list_jobs()
        except Exception as error:
            raise ClusterError(
                f"cluster: {self.address} does not answer: {first_line(error)}"
            ) from error
        infos = [info for job in jobs if (info := _info(job)) is not None]
        return sorted(infos, key=lambda info: (info.run, info.attempt))

    def latest(self, run: str, store: str) -> JobInfo | None:
        """The last attempt of a run in a store."""
        attempts = [info for info in self.list() if (info.run, info.store) == (run, store)]
        return attempts[-1] if attempts else None

    def attempts(self, run: str) -> int:
        """How many attempts of a run there were, in whatever store."""
        return max((info.attempt for info in self.list() if info.run == run), default=0)

    def stop(self, info: JobInfo) -> None:
        """Stop an attempt, and wait until it has ended: what starts next must not attach to it.

        Raises:
            ClusterError: it goes on, or nothing is known of it.
        """
        try:
            self._client.stop_job(f"mbq-{info.run}-a{info.attempt}")
        except Exception as error:
            raise ClusterError(
                f"cluster: {self.address} did not stop run {info.run}: {first_line(error)}"
            ) from error
        deadline = time.monotonic() + _STOP_SECONDS
        while any(
            job.alive for job in self.list() if (job.run, job.attempt) == (info.run, info.attempt)
        ):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"cluster: run {info.run} has not stopped within {_STOP_SECONDS:.0f} s"
                )
            time.sleep(_POLL_SECONDS)

    def logs(self, info: JobInfo) -> str:
        try:
            return self._client.get_job_logs(f"mbq-{info.run}-a{info.attempt}")
        except Exception as error:
            raise NotFoundError(
                f"the cluster has no logs of run {info.run}: {first_line(error)}"
            ) from error


def _info(job: Any) -> JobInfo | None:
    match = _JOB.fullmatch(job.submission_id or "")
    if match is None:
        return None
    return JobInfo(
        run=match[1],
        attempt=int(match[2]),
        state=str(job.status.value),
        message=str(job.message or ""),
        store=(job.metadata or {}).get("store", ""),
    )
