"""Which kernel, and how it is cut."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mbq.kernels import dispatch
from mbq.kernels.digits import ROW_MULTIPLE, join_digits
from mbq.kernels.reference import routed_linear
from mbq.kernels.triton_bytes import FEW
from tests.support.weights import error, random_weight

FOLDER = Path(dispatch.__file__).parent


@pytest.mark.parametrize(("rows", "blocks"), [(128, 1), (4096, 16), (11008, 43), (128256, 16)])
@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 64])
@pytest.mark.parametrize("kind", ["mixed", "2", "4", "8", "any"])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("architecture", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_the_rule_of_thumb_leaves_work_for_every_program(
    rows: int, blocks: int, tokens: int, kind: str, small: bool, architecture: tuple[int, int]
) -> None:
    tile = dispatch.default_tile(
        rows, blocks, dispatch.token_tile(tokens, kind), kind, small, architecture
    )
    assert rows % tile.rows == 0
    assert 1 <= tile.split <= blocks
    # Matrix units take 16 rows of a warp.
    assert tokens <= FEW or tile.rows % (16 * tile.warps) == 0


def test_shipped_tiles_fit_their_shapes() -> None:
    files = list(FOLDER.glob("tiles_sm*.json"))
    assert files
    for file in files:
        by_kind = json.loads(file.read_text(encoding="utf-8"))
        assert set(by_kind) <= {"mixed", "2", "4", "8", "any"}
        for shape, by_width in [item for kind in by_kind.values() for item in kind.items()]:
            rows, inputs = map(int, shape.split(" x "))
            assert rows % ROW_MULTIPLE == 0
            for tokens, (tile, split, warps, stages) in by_width.items():
                if int(tokens) <= FEW:
                    assert (tile in (16, 32), split, stages) == (True, 1, 1)
                else:
                    assert tile % (16 * warps) == 0
                assert rows % tile == 0
                assert split * 256 <= inputs
                assert warps in (1, 2, 4, 8, 16)
                assert stages >= 1


def test_tiles_that_were_measured_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    shipped = json.loads((FOLDER / "tiles_sm90.json").read_text(encoding="utf-8"))
    gpu = torch.device("cuda", 7)
    expected = dispatch.triton_tiles.Tile(*shipped["2"]["22016 x 4096"]["8"])
    assert dispatch.tile(22016, 4096, 128, 7, gpu, "2") == expected
    assert dispatch.tile(22016, 4096, 64, 7, gpu, "2") != expected


def test_any_width_is_cut_like_the_largest_where_it_was_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    tiles = {"8": {"128 x 256": {"1": [16, 1, 2, 1]}, "256 x 256": {"1": [16, 1, 2, 1]}}}
    tiles["any"] = {"256 x 256": {"1": [32, 1, 1, 1]}}
    monkeypatch.setattr(dispatch, "_measured", lambda architecture: tiles)
    # Cuts are kept, by device.
    gpu = torch.device("cuda", 6)
    largest, measured = (dispatch.tile(n, 256, 128, 1, gpu, "any") for n in (128, 256))
    assert largest == dispatch.triton_tiles.Tile(16, 1, 2, 1)
    # A few tokens like one, but not eight.
    assert dispatch.tile(256, 256, 128, 3, gpu, "8") == largest
    rule = dispatch.default_tile(256, 1, 8, "8", False, (9, 0))
    assert dispatch.tile(256, 256, 128, 7, gpu, "8") == rule
    assert measured == dispatch.triton_tiles.Tile(32, 1, 1, 1)


def test_a_tile_that_reaches_into_the_next_linear_is_made_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = {"2": {"256 x 256": {"16": [256, 1, 8, 2]}}}
    monkeypatch.setattr(dispatch, "_measured", lambda architecture: tiles)
    dispatch.tile.cache_clear()
    made = [random_weight(128, 256, 128) for _ in range(2)]
    x = torch.randn(12, 256).half()
    out_TN = dispatch.decode(x, 2, 8, join_digits([weight for weight, *_ in made]))
    dispatch.tile.cache_clear()
    expected = [routed_linear(x, *rest, torch.full((12,), 2)) for _, *rest in made]
    assert error(out_TN, torch.cat(expected, dim=1)) < 1e-3


def test_on_a_cpu_weights_are_dequantized() -> None:
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    assert not dispatch.decodes(x, 1, 128)


@pytest.mark.parametrize(
    ("capability", "served"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_few_enough_tokens_on_a_gpu_are_decoded(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], served: bool
) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: capability)
    with FakeTensorMode():
        x = torch.empty(1, 256, dtype=torch.bfloat16, device="cuda")
    assert dispatch.decodes(x, 64, 128) == served
    assert not dispatch.decodes(x, 65, 128)
    assert not dispatch.decodes(x, 64, 96)
    assert dispatch.decodes(x, 32, 32) == served
    assert not dispatch.decodes(x, 33, 64)


@pytest.mark.parametrize(
    ("mixed", "bits", "kind"),
    [
        (True, None, "mixed"),
        (False, 2, "2"),
        (False, 3, "4"),
        (False, 6, "8"),
        (False, None, "any"),
    ],
)
def test_kinds_of_products(mixed: bool, bits: int | None, kind: str) -> None:
    assert dispatch.kind_of(mixed, bits) == kind


@pytest.mark.parametrize("widths", [4, 8, [[3], [6]], [[2, 8, 3], [4, 4, 4]]])
def test_widths_of_all_kinds_are_multiplied(widths: int | list[list[int]]) -> None:
    torch.manual_seed(0)
    made = [random_weight(70, 256, 128) for _ in range(2)]
    joined = join_digits([weight for weight, *_ in made])
    x = torch.randn(3, 256).half()
    asked = widths if isinstance(widths, int) else torch.tensor(widths)
    out_TN = dispatch.decode(x, asked, 8, joined)
    for number, (out, (_, weight_WNK, bias_WN)) in enumerate(
        zip(joined.sides(out_TN), made, strict=True)
    ):
        bits = torch.tensor(widths if isinstance(widths, int) else widths[number]).expand(3)
        assert error(out, routed_linear(x, weight_WNK, bias_WN, bits)) < 2e-3
