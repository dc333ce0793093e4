"""What a user asks for: one frozen document, refused with one clear line when it cannot work.

Fields before `store` in `RunSpec` decide the bytes of the checkpoint and therefore the run id,
model and calibration text by what they contain; store, resources and evaluation do not. Imports
neither torch nor ray.

    load_spec("demo.yaml", ["calibration.samples=64"])  ->  RunSpec
    run_id(spec, model_digest, tokens_sha256)           ->  "3f2a91c04b7d"
"""

import difflib
import hashlib
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mbq.artifacts.errors import InputError, NotFoundError
from mbq.kernels.widths import SLICE_BITS, widths_up_to

# Of documents and files, and of what a spec means: the same spec never stands for other bytes.
FORMAT_VERSION = 9
WORD_INPUTS = 32
# What is kept of each fits into one document (`sealed.py`).
MOST_SEQUENCES = 200_000

# Names and rules in a message may come from a hostile document.
_SHOWN_CHARACTERS = 500

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
    samples: Annotated[int, Field(ge=1, le=65_536)] = 128
    sequence_length: Annotated[int, Field(ge=8, le=131_072)] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Optimisation(Document):
    """How a block is trained. Rates of weights are in 2-bit steps of their group."""

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

    `auto` takes, of `linear`, `norm` and `token`, what loses least at equal total bits.
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
    """What a task may use. `workers` blocks are calibrated at once; default: all that fit."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=1, le=4096)] | None = None
    memory_gib: Positive | None = None


class Evaluation(Text):
    """What is measured in the end.

    `average_bits` are widths that are shared over tokens and linears (default: 2.25, 2.5, 3 and
    3.5); `rivals` are other ways of sharing them, measured at 2.25, 2.5, 3 and 3.5 beside the run's
    own.
    """

    tokens: Annotated[int, Field(ge=256, le=100_000_000)] = 131_072
    sequence_length: Annotated[int, Field(ge=8, le=131_072)] = 2048
    average_bits: tuple[Annotated[float, Field(ge=2, le=8)], ...] | None = None
    rivals: tuple[Rival, ...] = ()

    @model_validator(mode="after")
    def _is_clear(self) -> Self:
        averages = self.average_bits or ()
        if len(set(averages)) < len(averages) or any(bits != round(bits, 3) for bits in averages):
            raise ValueError(
                f"average_bits {list(averages)} must be distinct, with at most three decimals"
            )
        if len(set(self.rivals)) < len(self.rivals):
            raise ValueError(f"rivals {list(self.rivals)} must be distinct; name each once")
        return self

    @model_validator(mode="after")
    def _is_no_book(self) -> Self:
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
    """One run, from model to validated checkpoint."""

    model: ModelChoice
    calibration: CalibrationText
    slices: Annotated[int, Field(ge=1, le=4)] = 4
    group_size: Annotated[int, Field(ge=WORD_INPUTS, le=4096)] = 128
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
        if self.group_size % WORD_INPUTS:
            raise ValueError(
                f"group_size {self.group_size} is not a multiple of {WORD_INPUTS}: a stored word "
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


def load_spec(path: Path, settings: Sequence[str] = ()) -> RunSpec:
    """Read a YAML spec and apply `a.b=value` settings.

    Relative paths in the file are taken from the file's folder, those in settings from the working
    folder.

    Raises:
        NotFoundError: there is no such file.
        InputError: the document is not a valid spec.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no spec file {path}; give a YAML file or a preset"
        ) from error
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} must hold a mapping with model and calibration at its top")
    _resolve_paths(document, path.parent.resolve())
    return apply_settings(document, settings)


def apply_settings(document: Mapping[str, Any], settings: Sequence[str]) -> RunSpec:
    """A spec from a document whose paths are absolute, with `a.b=value` settings on top."""
    overrides: dict[str, Any] = {}
    for setting in settings:
        _apply(overrides, setting)
    _resolve_paths(overrides, Path.cwd())
    return parse_spec(_merge(document, overrides))


def parse_spec(document: Mapping[str, Any]) -> RunSpec:
    """Validate a parsed document; the first thing wrong becomes one line.

    Raises:
        InputError: names the field, the value, the rule and what to do.
    """
    try:
        return RunSpec.model_validate(document)
    except ValidationError as error:
        raise InputError(explain(error, of_spec=True)) from error


def explain(error: ValidationError, of_spec: bool = False) -> str:
    """The first fault of a document in one line.

    Args:
        of_spec: the document is a spec: say what to change in it.
    """
    faults = error.errors(include_url=False, include_context=False)
    fault = faults[0]
    # A list is set as a whole.
    parts = [str(part) for part in fault["loc"] if not isinstance(part, int)]
    field = ".".join(parts)[:_SHOWN_CHARACTERS]
    rest = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        return f"{field}: unknown key{_suggest(fault['loc']) if of_spec else ''}{rest}"
    if fault["type"] == "missing":
        remedy = f"; add it to the spec or pass --set {field}=..." if of_spec else ""
        return f"{field}: missing{remedy}{rest}"
    rule = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
    rule = rule[:_SHOWN_CHARACTERS]
    if not fault["loc"]:
        # The rule concerns several fields and names them.
        return f"{rule}{rest}"
    value = fault["input"]
    shown = "" if isinstance(value, dict | list | BaseModel) else f"{reprlib.repr(value)} "
    remedy = f"; change it in the spec or with --set {field}=..." if of_spec else ""
    return f"{field}: {shown}{rule}{remedy}{rest}"


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


def _suggest(location: tuple[int | str, ...]) -> str:
    section: Any = RunSpec
    for part in location[:-1]:
        kind = section.model_fields[str(part)].annotation
        # An optional section is a union with None.
        section = next((k for k in get_args(kind) if k is not NoneType), kind)
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known keys are {', '.join(known)}"


def _apply(document: dict[str, Any], setting: str) -> None:
    name, equals, text = setting.partition("=")
    if not equals or not all(name.split(".")):
        raise InputError(f"--set {setting}: write it as field=value, as in calibration.samples=64")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"--set {setting}: the value is not YAML; quote it") from error
    *parents, last = name.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
        if not isinstance(document, dict):
            raise InputError(f"--set {setting}: {parent} is already a value, not a section")
    # YAML reads 1e-3 as a string; pydantic turns it into the number it is.
    document[last] = value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both and isinstance(old, dict) else value
    return merged


def _resolve_paths(document: dict[str, Any], folder: Path) -> None:
    """Make the paths of a raw document absolute, in place; leave what is no path alone."""

    def absolute(value: object) -> object:
        if not isinstance(value, str) or "://" in value:
            return value
        return os.path.abspath(folder / os.path.expanduser(value))

    model = document.get("model")
    if (
        isinstance(model, dict)
        and isinstance(source := model.get("source"), str)
        and is_path(source)
    ):
        model["source"] = absolute(source)
    for section in (document.get("calibration"), document.get("evaluation")):
        if not isinstance(section, dict):
            continue
        for key in ("include", "exclude"):
            if section.get(key) is not None:
                section[key] = absolute(section[key])
        if isinstance(files := section.get("files"), list):
            section["files"] = [absolute(file) for file in files]
    if document.get("store") is not None:
        document["store"] = absolute(document["store"])
