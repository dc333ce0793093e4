"""A spec from a YAML file or a preset, with `a.b=value` settings on top: paths are made absolute,
settings merged, and what is wrong becomes one line that says what to change.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mbq.artifacts.errors import InputError, NotFoundError
from mbq.artifacts.spec import NO_SECTION, UNKNOWN_KEY, RunSpec, explain, is_path


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
        raise InputError(explain(error, _remedy)) from error


def _remedy(fault: ErrorDetails, field: str) -> str:
    """What to change in the spec."""
    if fault["type"] in UNKNOWN_KEY:
        return _suggest(fault["loc"])
    if fault["type"] == "missing":
        return f"; add it to the spec or pass --set {field}=..."
    if fault["type"] == NO_SECTION:
        first = _known_keys(fault["loc"])[0]
        return f", as in `{field}: {{{first}: ...}}`; change it in the spec"
    return f"; change it in the spec or with --set {field}=..."


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that a section of the spec may hold."""
    section: Any = RunSpec
    for part in location:
        kind = section.model_fields[str(part)].annotation
        # An optional section is a union with None.
        section = next((k for k in get_args(kind) if k is not NoneType), kind)
    return list(section.model_fields)


def _suggest(location: tuple[int | str, ...]) -> str:
    """The key that was meant, or all that there are."""
    known = _known_keys(location[:-1])
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
