"""Record a finished run: perplexity by width, how bits were shared, seconds by block, and where.

    python benchmarks/record.py NAME RUN [COMMAND ...]

Reads the run from MBQ_HOME's store and writes benchmarks/results/<date>-<NAME>.json; COMMAND is
what made the run.
"""

import json
import sys
from pathlib import Path

from provenance import provenance

from mbq.artifacts import keys
from mbq.artifacts.documents import Manifest, Results, RoutingRecord, Status
from mbq.artifacts.runs import block_records
from mbq.artifacts.sealed import get_document
from mbq.orchestrator.local import default_store
from mbq.orchestrator.status import locate

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("mbq-cluster", "ray", "torch", "transformers")


def main(name: str, run: str, *command: str) -> None:
    store, document = locate(run, default_store())
    run = document.run
    status = get_document(store, keys.status_key(run), Status)
    results = get_document(store, keys.results_key(run), Results)
    manifest = get_document(store, keys.manifest_key(run), Manifest)
    records = block_records(store, run, len(manifest.blocks))
    methods = [file.removesuffix(".json") for file in store.children(f"runs/{run}/routing")]
    routing = {m: get_document(store, keys.routing_key(run, m), RoutingRecord) for m in methods}
    found = {
        **provenance(PACKAGES),
        "hardware": sorted(set(manifest.hardware)),
        "command": " ".join(command),
        "run": run,
        "method": results.method,
        "spec": document.spec.model_dump(mode="json", exclude={"model", "store", "resources"}),
        "driver_seconds": status.updated_at - status.started_at,
        "block_seconds": [record.seconds for record in records.values()],
        "rows": [row.model_dump() for row in results.rows],
        "settled": {
            method: {
                "router_bits": record.router_bits,
                "widths": [width.model_dump() for width in record.settled],
            }
            for method, record in routing.items()
        },
        "tokens": results.tokens,
        "slice_bytes": results.slice_bytes,
        "base_bytes": results.base_bytes,
    }
    for text in ("calibration", "evaluation"):
        for key in ("include", "exclude"):
            path = found["spec"][text][key]
            found["spec"][text][key] = Path(path).name if path else None
        found["spec"][text]["files"] = [Path(path).name for path in found["spec"][text]["files"]]
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"{found['date']}-{name}.json"
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
