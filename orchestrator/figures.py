"""The figures of a report, as SVG text that needs no font, script or file from elsewhere."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mbq.artifacts.documents import BlockRecord, Row
from mbq.kernels.widths import SLICE_BITS
from mbq.workers.variants import FULL, PACKED, ROUNDED, ROUTED, parse

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # Element ids are made from it: the same report is the same file.
    "svg.hashsalt": "mbq",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
}
_MOST_BITS = 8
# Text must stay readable on it.
_DARKEST = 0.7
_COLOURS = mpl.colormaps["YlOrRd"]


def colours(bits: Sequence[float]) -> list[str]:
    """Backgrounds of tokens, from the one that got the fewest bits to the one that got most."""
    low, high = min(bits), max(bits)
    shares = [(b - low) / (high - low) if high > low else 0.0 for b in bits]
    return [str(mpl.colors.to_hex(_COLOURS(_DARKEST * share))) for share in shares]


def curve(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    """Gap to full precision against the code bits that were read."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        kind, _ = parse(row.variant)
        if kind != FULL:
            series.setdefault(kind, []).append(row)
    styles: dict[str, dict[str, Any]] = {
        ROUTED: {"fmt": "o-", "color": "#b2182b", "zorder": 5},
        PACKED: {"fmt": "s", "color": "#2166ac", "zorder": 4},
        ROUNDED: {"fmt": "x", "color": "#777777"},
    }
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for kind, found in series.items():
            found = sorted(found, key=lambda row: row.realised_bits or 0.0)
            axes.errorbar(
                [row.realised_bits or 0.0 for row in found],
                [row.gap for row in found],
                yerr=[row.gap_error for row in found],
                label=names[kind],
                markersize=4,
                linewidth=1,
                **styles.get(kind, {"fmt": ".--", "alpha": 0.8}),
            )
        # Gaps span three orders of magnitude and end around zero.
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set_xlabel("code bits read per weight, average over tokens and weights")
        axes.set_ylabel("log perplexity minus that of full precision")
        axes.legend()
        return _svg(figure)


def linear_bits(by_average: Mapping[float, Mapping[str, float]]) -> str:
    """Bits of every linear (columns) of every block (rows), a map per average width."""
    local = [name.split(".", 3)[3] for name in next(iter(by_average.values()))]
    columns = list(dict.fromkeys(local))
    blocks = 1 + max(int(name.split(".")[2]) for name in next(iter(by_average.values())))
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        height = 1.4 + 0.22 * blocks
        figure = Figure(figsize=(2.6 * len(by_average) + 1, height), layout="constrained")
        axes = figure.subplots(1, len(by_average), squeeze=False, sharey=True)[0]
        for place, (average, bits) in zip(axes, by_average.items(), strict=True):
            grid = np.full((blocks, len(columns)), np.nan)
            for name, value in bits.items():
                _, _, block, rest = name.split(".", 3)
                grid[int(block), columns.index(rest)] = value
            # Not imshow, which embeds a bitmap: the page allows no images.
            image = place.pcolormesh(grid, cmap=_COLOURS, vmin=SLICE_BITS, vmax=_MOST_BITS)
            short = [name.rpartition(".")[2].removesuffix("_proj") for name in columns]
            place.set_xticks(np.arange(len(columns)) + 0.5, short, rotation=60)
            place.set_title(f"average {average:g}")
        axes[0].set_yticks(np.arange(blocks) + 0.5, range(blocks))
        axes[0].invert_yaxis()
        axes[0].set_ylabel("block")
        bar = figure.colorbar(image, ax=list(axes), label="code bits", shrink=0.8)
        if bar.solids is not None:
            bar.solids.set_rasterized(False)
        return _svg(figure)


def block_errors(records: Sequence[BlockRecord]) -> str:
    """Mean squared output error of every block after calibration, by width."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        axes = figure.subplots()
        blocks = [record.block for record in records]
        for bits in records[0].loss_after:
            after = [record.loss_after[bits] for record in records]
            before = [record.loss_before[bits] for record in records]
            (line,) = axes.plot(blocks, after, "o-", markersize=3, label=f"{bits} bits")
            axes.plot(blocks, before, ":", color=line.get_color(), linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel("block (dotted: before training)")
        axes.set_ylabel("mean squared output error")
        axes.legend(ncols=4)
        return _svg(figure)


def outliers(records: Sequence[BlockRecord]) -> str:
    """Overlap of the tenth of tokens with the largest errors between widths, mean over blocks."""
    widths = sorted(records[0].outlier_overlap)
    overlap = np.mean(
        [[[r.outlier_overlap[a][b] for b in widths] for a in widths] for r in records], axis=0
    )
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(3.6, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.pcolormesh(overlap, cmap="Blues", vmin=0, vmax=1)
        axes.invert_yaxis()
        labels = [str(bits) for bits in widths]
        middles = np.arange(len(widths)) + 0.5
        axes.set_xticks(middles, labels)
        axes.set_yticks(middles, labels)
        for (row, column), value in np.ndenumerate(overlap):
            shade = "white" if value > 0.6 else "black"
            x, y = column + 0.5, row + 0.5
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", color=shade)
        axes.set_xlabel("bits")
        axes.set_ylabel("bits")
        return _svg(figure)


def _svg(figure: Any) -> str:
    """The figure without the XML prologue and metadata, which name outside addresses."""
    with io.StringIO() as out:
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        text = out.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
