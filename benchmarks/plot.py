"""A picture of a quality result: gap to full precision over code bits, ours and the peers'.

    python benchmarks/plot.py NAME

Reads the newest benchmarks/results/<date>-quality-NAME.json and writes an SVG beside it. Rows
without a gap to show on a logarithmic axis are left out.
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt

RESULTS = Path(__file__).with_name("results")


def main(name: str) -> None:
    result = max(RESULTS.glob(f"*-quality-{name}.json"))
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    series: dict[str, list[tuple[float, float, float]]] = {}
    for key, row in rows.items():
        if row.get("gap", 0.0) > 0:
            point = row["bits"], row["gap"], row["gap_error"]
            series.setdefault(_series(key, "asked" in row), []).append(point)
    # The same result gives the same file.
    plt.rcParams["svg.hashsalt"] = "mbq"
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for label, points in series.items():
        bits, gaps, errors = zip(*sorted(points), strict=True)
        line = "-" if label.startswith("elastic") else "none"
        axes.errorbar(bits, gaps, errors, marker="o", markersize=4, linestyle=line, label=label)
    axes.set(xlabel="code bits per weight", ylabel="log perplexity above full precision")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    out = result.with_suffix(".svg")
    figure.savefig(out, metadata={"Date": None})
    print(out)


def _series(key: str, ours: bool) -> str:
    if ours:
        return f"elastic, {key.split()[0].replace('_', ' ')} inputs"
    peer, _, kind = key.rsplit("-", 2)
    return f"{peer}, {kind}"


if __name__ == "__main__":
    main(*sys.argv[1:])
