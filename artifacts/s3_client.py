"""Calls to S3 that end in an answer, a refusal or the end of patience; the only place with boto3.

One retry policy, ours: whatever may pass is tried again, ever more slowly, until the store has been
out of order for as long as the caller has patience. Credentials come from boto3's standard chain
only; AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE are honoured. Endpoints other than AWS's are addressed
path-style.
"""

import contextlib
import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
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

from mbq.artifacts.errors import InputError, StoreError
from mbq.artifacts.multipart import UploadLost

T = TypeVar("T")

STALL_SECONDS = 30.0
_CONNECT_SECONDS = 5.0
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


class Passing(Exception):
    """What may go away when tried again."""


class Refused(StoreError):
    """The store answered no, and would again; `code` is its word for it."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, code)
        self.code = code

    @property
    def absent(self) -> bool:
        """Whether it said that there is no such thing."""
        return self.code in _ABSENT

    def __str__(self) -> str:
        return str(self.args[0])


def persist(failure: str, patience_seconds: float, action: Callable[[], T]) -> T:
    """Call until it succeeds, is refused, or patience has ended."""
    deadline = time.monotonic() + patience_seconds
    attempt = 0
    while True:
        try:
            with _told_apart(failure):
                return action()
        except Passing as error:
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
    except (BotoCoreError, HTTPError, OSError, ValueError, LookupError, RuntimeError) as error:
        # Answers that were damaged on their way are no valid XML, or lack what they must have;
        # credentials that were renewed may be old still, by a clock that is wrong.
        raise Passing(f"{type(error).__name__}: {error}") from error


def _raise_refusal(failure: str, error: ClientError) -> NoReturn:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    text = f"{failure}: {code} {error.response.get('Error', {}).get('Message', '')}".strip()
    if (status >= 500 and status != 501) or status == 429 or code in _PASSING:
        raise Passing(f"the store answers {code or status}") from error
    if code == "NoSuchUpload":
        raise UploadLost(f"{failure}: the store has lost the upload; write it again") from error
    if status == 403 or code in _FORBIDDEN:
        raise InputError(f"{text}; check the credentials and what they may do") from error
    if code == "NoSuchBucket":
        raise InputError(f"{text}; create the bucket, or name another one") from error
    if status == 404 and code not in _ABSENT:
        # The code is in the body, which may have been damaged; nothing else is known to be absent.
        raise Passing(f"the store answers {status} {code}") from error
    raise Refused(text, code) from error


_CLIENT_LOCK = threading.Lock()


def client(stall_seconds: float) -> Any:
    """This process's client. Raises InputError if the settings cannot be used."""
    # Clients may be shared by threads, but neither be made by two at once nor survive a fork.
    with _CLIENT_LOCK:
        return _make_client(stall_seconds, os.getpid())


@functools.cache
def _make_client(stall_seconds: float, process: int) -> Any:
    try:
        session = boto3.session.Session()
        client = session.client("s3", config=_config("auto", stall_seconds))
        host = urlparse(client.meta.endpoint_url).hostname or ""
        if not host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws")):
            client = session.client("s3", config=_config("path", stall_seconds))
        credentials = session.get_credentials()
    except (BotoCoreError, ValueError) as error:
        raise InputError(
            f"the object store's settings cannot be used: {error}; check AWS_PROFILE, "
            "AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE"
        ) from error
    if credentials is None:
        # Not remembered: a client that was made without would never look for them again.
        raise InputError(
            "the object store cannot be used: Unable to locate credentials; put them where boto3 "
            "looks for them (environment, profile, role)"
        )
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
