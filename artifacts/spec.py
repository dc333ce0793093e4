"""What a user asks for: one frozen document, refused with one clear line when it cannot work.

Fields before `store` in `RunSpec` decide the bytes of the checkpoint and therefore the run id,
model and calibration text by what they contain; store, resources and evaluation do not. How a file
becomes a spec: `spec_file.py`. Imports neither torch nor ray.

    run_id(spec, model_digest, tokens_sha256)  ->  "3f2a91c04b7d"
"""

import hashlib
import json
import reprlib
from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from mbq.kernels.widths import SLICE_BITS, WORD_BITS, widths_up_to

# Of documents and files, and of what a spec means: the same spec never stands for other bytes.
FORMAT_VERSION = 15
# What is kept of each fits into one document (`sealed.py`).
MOST_SEQUENCES = 200_000

# Names and rules in a message may come from a hostile document.
_SHOWN_CHARACTERS = 500
# As pydantic calls them.
UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
NO_SECTION = "model_type"
# What pydantic says of them is in words of Python.
_RULES = {"tuple_type": "must be a list", NO_SECTION: "must hold fields"}

Dataset = Literal["wikitext2", "c4", "ptb", "text", "jsonl", "stdlib"]
Rival = Literal["linear", "norm", "learned", "shuffled", "random", "oracle"]
Positive = Annotated[float, Field(gt=0)]


class Document(BaseModel):
    """Frozen, and nothing in it that we do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelChoice(Document):
    """A model: a local folder (starts with `.`, `/` or `~`) or a Hub repository at a revision."""

    source: Annotated[str, Field(min_length=1)]
    revision: str = "main"


class Text(Document):
    """Where text comes from.

    `wikitext2`, `c4` and `ptb` are loaded from the Hub; `text` and `jsonl` read `files`; `stdlib`
    is the source text of the running Python's standard library, narrowed by `include` or
    `exclude`, files that list one relative path a line.
    """

    dataset: Dataset
    files: tuple[str, ...] = ()
    include: str | None = None
    exclude: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.files) != (self.dataset in ("text", "jsonl")):
            need = "needs at least one file" if not self.files else "takes no files"
            raise ValueError(f"dataset {self.dataset} {need}; files belong to text and jsonl")
        if self.dataset != "stdlib" and (self.include or self.exclude):
            raise ValueError(f"include and exclude belong to stdlib, not to {self.dataset}")
        return self


class CalibrationText(Text):
    """What blocks are calibrated on.

    Attributes:
        samples: sequences.
        sequence_length: tokens of each.
        seed: of the windows that are taken from the text, and of all training.
    """

    samples: Annotated[int, Field(ge=1, le=65_536)] = 128
    sequence_length: Annotated[int, Field(ge=8, le=131_072)] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Optimisation(Document):
    """How a block is trained (`workers/calibrate.py`).

    Attributes:
        method: `joint` trains weights, ranges, gains and biases; `clip` ranges alone, as the paper.
        passes: over the sequences, in each stage of training.
        batch_size: sequences a step.
        widths: bits at which the block's output is to be right; others follow from these.
        weight_rate: learning rate of weights, in 2-bit steps of their group.
        clip_rate: of the ranges, as logits of their share of the largest weights.
        gain_rate: of gains and biases at 2 bits; half of it for each bit more.
        balance: exponent of the running mean by which each width's loss is divided: with 0 absolute
            errors count, which are those of the lowest width, with 1 relative ones.
    """

    method: Literal["joint", "clip"] = "joint"
    passes: Annotated[int, Field(ge=2, le=1000)] = 6
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    widths: tuple[int, ...] = (2, 3, 4)
    weight_rate: Positive = 2e-3
    clip_rate: Positive = 1e-2
    gain_rate: Positive = 1e-2
    balance: Annotated[float, Field(ge=0, le=1)] = 0.25


class Routing(Document):
    """How bits are shared over tokens and linears (`workers/route.py` says what the methods are).

    Attributes:
        method: `auto` takes, of `linear`, `norm` and `token`, what loses least at equal total bits.
        width: rows of a learned router's trunk.
        steps: of training a router.
        rate: its learning rate.
        tokens: of the calibration text that the routers of a block are fitted on.
        sensitivity_samples: sequences that go backward through the full-precision model, and say
            how much linears and their output channels count.
        settle_tokens: of the calibration text that thresholds are corrected on.
        target_bits: average of every linear that `target` trains for.
    """

    method: Literal["auto", "linear", "norm", "token", "gates", "target"] = "auto"
    width: Annotated[int, Field(ge=1, le=1024)] = 8
    steps: Annotated[int, Field(ge=1, le=100_000)] = 300
    rate: Positive = 1e-2
    tokens: Annotated[int, Field(ge=64, le=1_000_000)] = 8192
    sensitivity_samples: Annotated[int, Field(ge=1, le=65_536)] = 8
    settle_tokens: Annotated[int, Field(ge=64, le=1_000_000)] = 4096
    target_bits: Annotated[float, Field(ge=2, le=8)] = 3.0

    @property
    def learned(self) -> str:
        """How the learned routers are trained."""
        return self.method if self.method in ("gates", "target") else "token"


class Resources(Document):
    """What a task may use.

    Attributes:
        device: `auto` takes GPUs if a node has one when the run starts.
        workers: tasks that use the device at once; default: all that fit.
        memory_gib: host memory that a task reserves; default: what the plan expects it to take.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=1, le=4096)] | None = None
    memory_gib: Positive | None = None


class Evaluation(Text):
    """What is measured in the end.

    Attributes:
        tokens: at most as many are read of the text.
        sequence_length: tokens of each sequence.
        average_bits: widths that are shared over tokens and linears; default: 2.25, 2.5, 2.75, 3.5.
        rivals: other ways of sharing 2.25, 2.5, 2.75 and 3.5 bits, measured beside the run's own.
    """

    tokens: Annotated[int, Field(ge=256, le=100_000_000)] = 131_072
    sequence_length: Annotated[int, Field(ge=8, le=131_072)] = 2048
    average_bits: tuple[Annotated[float, Field(ge=2, le=8)], ...] | None = None
    rivals: tuple[Rival, ...] = ()

    @model_validator(mode="after")
    def _averages_are_distinct(self) -> Self:
        averages = self.average_bits or ()
        if len(set(averages)) < len(averages) or any(bits != round(bits, 3) for bits in averages):
            raise ValueError(
                f"average_bits {list(averages)} must be distinct, with at most three decimals"
            )
        if len(set(self.rivals)) < len(self.rivals):
            raise ValueError(f"rivals {list(self.rivals)} must be distinct; name each once")
        return self

    @model_validator(mode="after")
    def _losses_fit_a_document(self) -> Self:
        if self.tokens // self.sequence_length > MOST_SEQUENCES:
            raise ValueError(
                f"tokens {self.tokens} are more than {MOST_SEQUENCES:,} sequences of "
                f"{self.sequence_length}; the loss of each is kept: use fewer, or longer ones"
            )
        return self

    @model_validator(mode="after")
    def _holds_two_sequences(self) -> Self:
        if self.tokens < 2 * self.sequence_length:
            raise ValueError(
                f"tokens {self.tokens} must hold at least two sequences of {self.sequence_length}: "
                "a standard error needs two"
            )
        return self


class RunSpec(Document):
    """One run, from model to validated checkpoint.

    Attributes:
        slices: how many are stored, of 2 bits each.
        group_size: inputs that share a scale and a zero.
        propagation: what blocks learn from: the output of the quantized blocks before them, one
            after the other (`sequential`), or of the original ones, all at once.
        dtype: of activations, and of weights where they are not trained.
        threads: of a task on a CPU.
        microbatch: sequences a forward pass.
        store: where the run lies; a command's --store wins.
    """

    model: ModelChoice
    calibration: CalibrationText
    slices: Annotated[int, Field(ge=1, le=4)] = 4
    group_size: Annotated[int, Field(ge=WORD_BITS, le=4096)] = 128
    optimisation: Optimisation = Optimisation()
    routing: Routing = Routing()
    propagation: Literal["sequential", "full_precision"] = "sequential"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    microbatch: Annotated[int, Field(ge=1, le=4096)] = 8

    store: str | None = None
    resources: Resources = Resources()
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.group_size % WORD_BITS:
            raise ValueError(
                f"group_size {self.group_size} is not a multiple of {WORD_BITS}: a stored word "
                "holds 32 inputs; use 32, 64, 128 or 256"
            )
        most = self.max_bits
        if self.routing.method == "target" and self.routing.target_bits > most:
            raise ValueError(
                f"routing.target_bits {self.routing.target_bits} is more than {most}, the bits of "
                f"{self.slices} slices; lower it"
            )
        averages = self.evaluation.average_bits if self.evaluation else None
        if averages and (max(averages) > most or self.slices == 1):
            raise ValueError(
                f"evaluation.average_bits {list(averages)} must lie between 2 and {most}, the bits "
                f"of {self.slices} slices, with at least 2 slices; change one to fit the other"
            )
        widths = self.optimisation.widths
        allowed = list(widths_up_to(most))
        if not widths or len(set(widths)) < len(widths) or not set(widths) <= set(allowed):
            raise ValueError(
                f"optimisation.widths {list(widths)} must be distinct bits out of {allowed}, those "
                f"of {self.slices} slices; set one to fit the other"
            )
        if self.optimisation.method == "clip" and SLICE_BITS not in widths:
            raise ValueError(
                f"optimisation.widths {list(widths)} must hold {SLICE_BITS} where the method is "
                "clip: it trains ranges for the first slice alone to begin with"
            )
        return self

    @property
    def max_bits(self) -> int:
        """Bits of all slices."""
        return SLICE_BITS * self.slices

    @property
    def streams(self) -> tuple[int, ...]:
        """Widths with hidden states of their own, beside those of the full-precision model."""
        return self.optimisation.widths if self.propagation == "sequential" else ()

    @property
    def element_bytes(self) -> int:
        """Of an activation."""
        return 2 if self.dtype == "bfloat16" else 4


def explain(
    error: ValidationError, remedy: Callable[[ErrorDetails, str], str] = lambda fault, field: ""
) -> str:
    """The first fault of a document in one line; a key that we do not know before all others.

    Args:
        remedy: what to add, given the fault and the field that it is in.
    """
    faults = error.errors(include_url=False, include_context=False)
    # A key that is misspelt is missing, too, and what is missing says nothing of the spelling.
    fault = min(faults, key=lambda fault: fault["type"] not in UNKNOWN_KEY)
    # A list is set as a whole; a key that we do not know may be a number.
    unknown = fault["type"] in UNKNOWN_KEY
    parts = [str(part) for part in fault["loc"] if unknown or not isinstance(part, int)]
    field = ".".join(parts)[:_SHOWN_CHARACTERS]
    rest = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if unknown:
        return f"{field}: unknown key{remedy(fault, field)}{rest}"
    if fault["type"] == "missing":
        return f"{field}: missing{remedy(fault, field)}{rest}"
    said = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
    rule = _RULES.get(fault["type"], said)[:_SHOWN_CHARACTERS]
    if not fault["loc"]:
        # The rule concerns several fields and names them.
        return f"{rule}{rest}"
    value = fault["input"]
    shown = "" if isinstance(value, dict | list | BaseModel) else f"{reprlib.repr(value)} "
    return f"{field}: {shown}{rule}{remedy(fault, field)}{rest}"


def run_id(spec: RunSpec, model_digest: str, tokens_sha256: str) -> str:
    """Twelve hex digits that name a run: equal for everything that gives the same bytes."""
    identity = {
        "format_version": FORMAT_VERSION,
        "model": model_digest,
        "tokens": tokens_sha256,
        "seed": spec.calibration.seed,
        **spec.model_dump(
            mode="json",
            include={
                "slices",
                "group_size",
                "optimisation",
                "routing",
                "propagation",
                "dtype",
                "threads",
                "microbatch",
            },
        ),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def is_path(location: str) -> bool:
    """Whether a model location is written as a path and not as a repository id."""
    return location.startswith((".", "/", "~"))
