"""What can start when, without a cluster."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts.checkpoint import Linear
from mbq.artifacts.digests import Digest
from mbq.artifacts.documents import RunDocument
from mbq.artifacts.spec_file import parse_spec
from mbq.orchestrator.comparison import other_bits, settled_methods, variants
from mbq.orchestrator.plan import (
    Plan,
    Progress,
    build_plan,
    needed_captures,
    ready,
    releasable,
    remaining_flops,
    task_memory_bytes,
)

Make = Callable[..., dict[str, Any]]


def _plan(tiny_document: Make, **changes: Any) -> Plan:
    spec = parse_spec(tiny_document(**changes))
    blob = Digest(sha256="0" * 64, size_bytes=0, part_sha256=())
    return build_plan(
        RunDocument(
            run="0" * 12,
            name="tiny",
            spec=spec,
            model_location=spec.model.source,
            model_commit=None,
            model_digest="sha256:0",
            model_files=None,
            calibration_tokens=blob,
            evaluation_tokens=blob,
            sample_tokens=blob if spec.slices > 1 else None,
            code_version="0",
        )
    )


def _names(tasks: list[Any]) -> list[str]:
    return [task.name for task in tasks]


def _progress(**fields: Any) -> Progress:
    nothing: frozenset[Any] = frozenset()
    empty = Progress(nothing, nothing, nothing, nothing, published=False)
    return replace(empty, **fields)


# 3 is the one average width that a static model can have, too.
SOURCE_EVALUATIONS = ["evaluate full", *(f"evaluate rtn-{bits}" for bits in (2, 3, 4, 6, 8))]
SENSE = "sensitivity model"
SHAPES = ["64x96", "96x64", "32x64", "64x64"]
SETTLES = ["settle linear", "settle norm", "settle token"]


def test_only_the_chain_and_the_source_can_start(tiny_document: Make) -> None:
    plan = _plan(tiny_document)
    assert _names(ready(plan, _progress(), 2)) == [SENSE, "capture 000", *SOURCE_EVALUATIONS]


def test_nothing_goes_on_without_sensitivities_unless_there_is_one_slice(
    tiny_document: Make,
) -> None:
    plan = _plan(tiny_document)
    given_up = _progress(failed=set(plan.sensitivities))
    assert _names(ready(plan, given_up, 2)) == SOURCE_EVALUATIONS
    whole = _plan(tiny_document, slices=1, optimisation={"widths": [2]})
    progress = _progress(done={whole.captures[0]}, held={0})
    assert _names(ready(whole, progress, 2))[:2] == ["capture 001", "calibrate 000"]


def test_a_captured_block_calibrates_while_the_chain_goes_on(tiny_document: Make) -> None:
    plan = _plan(tiny_document)
    progress = _progress(done={plan.captures[0]}, held={0})
    assert _names(ready(plan, progress, 2))[:3] == [SENSE, "capture 001", "evaluate full"]
    sensed = replace(progress, done={plan.captures[0], *plan.sensitivities})
    assert _names(ready(plan, sensed, 2))[:2] == ["capture 001", "calibrate 000"]
    busy = replace(sensed, busy={plan.captures[1], plan.calibrations[0]})
    assert _names(ready(plan, busy, 2)) == SOURCE_EVALUATIONS


def test_sequential_waits_for_the_block_before(tiny_document: Make) -> None:
    plan = _plan(tiny_document, propagation="sequential")
    progress = _progress(done={plan.captures[0]}, held={0})
    assert "capture 001" not in _names(ready(plan, progress, 2))
    calibrated = replace(progress, done={plan.captures[0], plan.calibrations[0]})
    assert "capture 001" in _names(ready(plan, calibrated, 2))


def test_the_chain_stays_within_its_look_ahead(
    make_model: Callable[..., Path], tiny_document: Make
) -> None:
    deep = make_model(num_hidden_layers=8)
    plan = _plan(tiny_document, model={"source": str(deep)})
    for held in range(8):
        progress = _progress(done=set(plan.captures[:held]), held=set(range(held)))
        goes_on = f"capture {held:03d}" in _names(ready(plan, progress, 1))
        assert goes_on == (held < 3)


def test_a_resumed_chain_ends_at_the_last_missing_block(tiny_document: Make) -> None:
    plan = _plan(tiny_document)
    assert needed_captures(plan, {plan.calibrations[2]}) == 2
    done = {plan.calibrations[1], plan.calibrations[2], plan.captures[0], *plan.sensitivities}
    assert needed_captures(plan, done) == 1
    names = _names(ready(plan, _progress(done=done, held={0}), 2))
    assert names[0] == "calibrate 000"
    assert needed_captures(plan, set(plan.calibrations)) == 0


def test_hidden_states_are_released_when_both_users_are_done(tiny_document: Make) -> None:
    plan = _plan(tiny_document)
    first = plan.captures[0]
    held = _progress(done={first, plan.calibrations[0]}, held={0})
    assert releasable(plan, held) == set()
    moved_on = replace(held, done={first, plan.calibrations[0], plan.captures[1]}, held={0, 1})
    assert releasable(plan, moved_on) == {0}
    last = replace(held, done=set(plan.calibrations) | {first}, held={0})
    assert releasable(plan, last) == {0}


def test_files_are_packed_when_their_blocks_exist_and_evaluated_when_published(
    tiny_document: Make,
) -> None:
    plan = _plan(tiny_document)
    done = set(plan.calibrations[:2])
    assert not [n for n in _names(ready(plan, _progress(done=done), 2)) if n.startswith("pack")]
    done = set(plan.calibrations)
    packs = [n for n in _names(ready(plan, _progress(done=done), 2)) if n.startswith("pack")]
    assert len(packs) == len(plan.packs) == 5
    done |= set(plan.packs)
    assert _names(ready(plan, _progress(done=done), 2)) == [SENSE, *SOURCE_EVALUATIONS]
    done |= set(plan.sensitivities)
    assert _names(ready(plan, _progress(done=done), 2)) == [*SETTLES, *SOURCE_EVALUATIONS]
    done |= set(plan.settles)
    assert _names(ready(plan, _progress(done=done), 2))[0] == "route model-routing.safetensors"
    assert not done >= plan.checkpoint
    done |= set(plan.routes)
    assert done >= plan.checkpoint
    published = _names(ready(plan, _progress(done=done, published=True), 2))
    assert published == [
        *(f"validate {shape}" for shape in SHAPES),
        *SOURCE_EVALUATIONS,
        *(f"evaluate mbq-{b}" for b in (2, 3, 4, 6, 8)),
        *(f"evaluate routed-{b}" for b in (2.25, 2.5, 2.75, 3.5)),
        "sample text",
    ]


def test_rivals_wait_for_their_thresholds_and_the_checkpoint_does_not(tiny_document: Make) -> None:
    text = tiny_document()["evaluation"] | {"rivals": ["shuffled", "random"], "average_bits": [3]}
    plan = _plan(tiny_document, evaluation=text, routing={"method": "linear"})
    # The run itself needs one method, the shuffled rival another.
    assert [task.target for task in plan.settles] == ["linear", "token"]
    assert plan.candidates == ("linear",)
    done = {*plan.calibrations, *plan.sensitivities, plan.settles[0]}
    names = _names(ready(plan, _progress(done=done), 2))
    assert "route model-routing.safetensors" in names
    published = _progress(done=done, published=True)
    assert "evaluate random-2.75" not in _names(ready(plan, published, 2))
    settled = replace(published, done=done | set(plan.settles))
    assert {"evaluate shuffled-2.25", "evaluate random-3.5"} <= set(_names(ready(plan, settled, 2)))


def test_one_slice_shares_nothing(tiny_document: Make) -> None:
    document = tiny_document(slices=1, optimisation={"widths": [2]})
    plan = _plan(lambda: document)
    assert plan.sensitivities + plan.settles + plan.routes + plan.samples == ()
    assert variants(parse_spec(document)) == ["full", "rtn-2", "mbq-2"]


@pytest.mark.parametrize(
    ("method", "rivals", "settled"),
    [
        ("auto", [], ("linear", "norm", "token")),
        ("norm", [], ("norm",)),
        ("norm", ["oracle", "random"], ("linear", "norm")),
        ("target", ["learned", "norm"], ("norm", "target")),
    ],
)
def test_only_what_is_used_is_settled(
    tiny_document: Make, method: str, rivals: list[str], settled: tuple[str, ...]
) -> None:
    text = tiny_document()["evaluation"] | {"rivals": rivals}
    document = tiny_document(evaluation=text, routing={"method": method})
    assert settled_methods(parse_spec(document)) == settled


def test_remaining_work_falls_to_nothing(tiny_document: Make) -> None:
    plan = _plan(tiny_document)
    whole = remaining_flops(plan, set(), {})
    assert whole == pytest.approx(sum(task.flops for task in plan.tasks))
    half = {plan.calibrations[0]: 0.5}
    assert whole - remaining_flops(plan, set(), half) == plan.calibrations[0].flops / 2
    # Captures that nobody needs are no work.
    done = set(plan.tasks) - set(plan.captures)
    assert remaining_flops(plan, done, {}) == 0


def test_fewer_slices_make_fewer_files_and_variants(tiny_document: Make) -> None:
    document = tiny_document(slices=2)
    assert variants(parse_spec(document)) == [
        "full",
        *(f"rtn-{bits}" for bits in (2, 3, 4)),
        *(f"mbq-{bits}" for bits in (2, 3, 4)),
        *(f"routed-{bits}" for bits in (2.25, 2.5, 2.75, 3.5)),
    ]
    plan = _plan(lambda: document)
    assert [task.target.partition("-0")[0] for task in plan.packs] == [
        "model-base",
        "model-slice0",
        "model-slice1",
    ]
    assert variants(parse_spec(tiny_document(evaluation=None))) == []


def test_memory_grows_with_what_a_task_holds(tiny_document: Make) -> None:
    small = parse_spec(tiny_document())
    text = tiny_document()["calibration"] | {"samples": 24}
    large = parse_spec(tiny_document(calibration=text))
    plan = _plan(tiny_document)
    difference = task_memory_bytes(plan, large, 64) - task_memory_bytes(plan, small, 64)
    assert difference == 2 * 12 * 32 * 64 * 4
    # Sequential propagation holds a stream of hidden states for each trained width, too.
    difference = task_memory_bytes(
        plan, large.model_copy(update={"propagation": "sequential"}), 64
    ) - task_memory_bytes(plan, small.model_copy(update={"propagation": "sequential"}), 64)
    assert difference == (2 + 3) * 12 * 32 * 64 * 4


def test_bits_beside_the_codes_count_everything_a_width_reads(tiny_document: Make) -> None:
    # One linear of 4096 x 4096: 32 bits per 128 weights; per 4096, 32 for gain and bias and 8 for
    # an exponent.
    linears = [Linear("model.layers.0.self_attn.o_proj", 0, 4096, 4096)]
    spec = parse_spec(tiny_document(group_size=128, routing={}))
    assert other_bits(linears, spec, "rtn-4", "norm") == 0.25
    elastic = 0.25 + 40 / 4096
    assert other_bits(linears, spec, "mbq-2", "norm") == elastic
    assert other_bits(linears, spec, "routed-2.5", "linear") == elastic
    # Eight rows of float16, an offset each, and a head of 8 + 2 features for 3, 4, 6 and 8 bits.
    router = (8 * 4096 * 16 + 8 * 32 + 4 * 10 * 32) / 4096**2
    for variant, method in (("routed-3", "token"), ("learned-3", "norm"), ("shuffled-3", "norm")):
        assert other_bits(linears, spec, variant, method) == pytest.approx(elastic + router)
