"""Small real models and texts that tests share. Nothing here stands in for the thing under test."""

import os

# Before torch, triton or ray are imported: what a run's processes have, one thread among them, no
# accidental cluster, and kernels that need no GPU.
os.environ.update({"MKL_CBWR": "AUTO", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"})
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
for name in list(os.environ):
    if name.startswith(("AWS_", "MBQ_")) or name == "RAY_ADDRESS":
        del os.environ[name]

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from mbq.artifacts import keys, s3_client
from mbq.artifacts.documents import RunDocument
from mbq.artifacts.runs import put_blob
from mbq.artifacts.s3 import S3Store
from mbq.artifacts.sealed import put_document
from mbq.artifacts.spec_file import parse_spec
from mbq.artifacts.store import LocalStore, Store
from mbq.orchestrator.run import drive
from mbq.orchestrator.submit import prepare
from tests.support import servers
from tests.support.local_runner import LocalRunner
from tests.support.proxy import Proxy
from tests.support.servers import BUCKET, Server

# Two busy cores are slow at times; what is too slow is for the benchmarks to say.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

TEXT = "".join(
    f"Item {n}: the {('red', 'green', 'blue')[n % 3]} box number {n * 7919 % 1000} holds "
    f"{n * n % 97} things, of which {n % 13} are broken.\n"
    for n in range(800)
)

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a small random model of any configuration class, with a tokenizer of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

    def make(kind: type = LlamaConfig, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**(TINY | changes)))
        # Random biases too: transformers starts them at zero, where losing one goes unseen.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        # Columns of other sizes, as trained models have them, so that exponents are not all zero.
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data[:, ::9] *= 0.1
        model.save_pretrained(folder)
        fast.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    return make_model()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """One server of each kind for all tests; a test whose server is not installed is skipped."""
    running: dict[str, Server] = {}

    def start(name: str) -> Server:
        if reason := servers.missing(name):
            pytest.skip(reason)
        if name not in running:
            running[name] = servers.start(name, tmp_path_factory.mktemp(name))
        return running[name]

    yield start
    for server in running.values():
        server.stop()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3Store]:
    """A new prefix on a server, reached directly or through a proxy, with little patience."""

    def connect(server: Server, proxy: Proxy | None = None, prefix: str = "") -> S3Store:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        if proxy is not None:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        s3_client._make_client.cache_clear()
        prefix = prefix or f"{secrets.token_hex(4)}/store"
        return S3Store(BUCKET, prefix, patience_seconds=20.0, stall_seconds=2.0)

    return connect


@pytest.fixture(params=servers.NAMES)
def s3_store(
    request: pytest.FixtureRequest,
    start_server: Callable[[str], Server],
    connect: Callable[..., S3Store],
) -> S3Store:
    """A store on each server, empty."""
    return connect(start_server(request.param))


@pytest.fixture(params=["local", *servers.NAMES])
def any_store(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    start_server: Callable[[str], Server],
    connect: Callable[..., S3Store],
) -> Store:
    """A store of each kind, empty."""
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return connect(start_server(request.param))


@pytest.fixture(scope="session")
def tiny_document(tiny_model: Path, text_file: Path) -> Callable[..., dict[str, Any]]:
    """A spec's document for the tiny model; keyword arguments replace whole sections."""

    def make(**changes: Any) -> dict[str, Any]:
        text = {"dataset": "text", "files": [str(text_file)], "sequence_length": 32}
        return {
            "model": {"source": str(tiny_model)},
            "calibration": {**text, "samples": 12},
            "evaluation": {**text, "tokens": 512},
            "group_size": 32,
            "optimisation": {"passes": 2, "batch_size": 4},
            "routing": {"steps": 20, "width": 4, "settle_tokens": 128},
            # All blocks at once: what can go wrong between tasks goes wrong here.
            "propagation": "full_precision",
        } | changes

    return make


@dataclass(frozen=True)
class FinishedRun:
    """A run of the tiny model that went through every stage in this process."""

    store: LocalStore
    document: RunDocument

    @property
    def checkpoint(self) -> Path:
        return self.store.path(keys.manifest_key(self.document.run)).parent


@pytest.fixture(scope="session")
def write_run() -> Callable[[LocalStore, dict[str, Any]], RunDocument]:
    """Prepare a run and put into the store what a driver expects there."""

    def write(store: LocalStore, document: dict[str, Any]) -> RunDocument:
        prepared = prepare("tiny", parse_spec(document))
        for chunks in prepared.blobs:
            put_blob(store, chunks)
        put_document(store, keys.spec_key(prepared.document.run), prepared.document)
        return prepared.document

    return write


@pytest.fixture(scope="session")
def finish_run(
    tmp_path_factory: pytest.TempPathFactory,
    write_run: Callable[[LocalStore, dict[str, Any]], RunDocument],
) -> Callable[..., FinishedRun]:
    def finish(document: dict[str, Any]) -> FinishedRun:
        store = LocalStore(tmp_path_factory.mktemp("finished") / "store")
        run = write_run(store, document)
        drive(store, run, LocalRunner(), attempt=1)
        return FinishedRun(store, run)

    return finish


@pytest.fixture(scope="session")
def finished_run(
    finish_run: Callable[..., FinishedRun], tiny_document: Callable[..., dict[str, Any]]
) -> FinishedRun:
    return finish_run(tiny_document())
