"""Record the demo run: perplexity by width, seconds by block, sizes, and where it ran.

    make demo && MBQ_HOME=build/demo .venv/bin/python benchmarks/demo.py

Reads the finished demo run of MBQ_HOME's store and writes benchmarks/results/<date>-demo.json.
"""

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path

from mbq.artifacts import keys
from mbq.artifacts.manifest import Manifest, Results, Status, block_records, get_document
from mbq.artifacts.store import open_store
from mbq.orchestrator.status import locate
from mbq.orchestrator.submit import home

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("mbq-cluster", "ray", "torch", "transformers")


def main() -> None:
    store = open_store(str(home() / "store"))
    run = store.children(keys.RUNS)[-1]
    _, document = locate(run, store.uri)
    status = get_document(store, keys.status_key(run), Status)
    results = get_document(store, keys.results_key(run), Results)
    manifest = get_document(store, keys.manifest_key(run), Manifest)
    records = block_records(store, run, len(manifest.blocks))
    found = {
        "date": datetime.date.today().isoformat(),
        "hardware": sorted(set(manifest.hardware)),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "command": "make demo",
        "run": run,
        "spec": document.spec.model_dump(mode="json", exclude={"model", "store", "resources"}),
        "driver_seconds": status.updated_at - status.started_at,
        "block_seconds": [record.seconds for record in records.values()],
        "rows": [row.model_dump() for row in results.rows],
        "tokens": results.tokens,
        "slice_bytes": results.slice_bytes,
        "base_bytes": results.base_bytes,
    }
    for text in ("calibration", "evaluation"):
        for key in ("include", "exclude"):
            path = found["spec"][text][key]
            found["spec"][text][key] = Path(path).name if path else None
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"{found['date']}-demo.json"
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(out)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
