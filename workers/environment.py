"""Environment of every process of a run, set before it starts. Imports nothing.

MKL_CBWR               one code path in MKL, whatever the alignment of its operands
CUBLAS_WORKSPACE_CONFIG  fixed workspaces, without which cuBLAS sums in varying order
RAY_DEDUP_LOGS         Ray would fold log lines that differ in their numbers only
HF_HUB_DISABLE_PROGRESS_BARS  job logs are not a terminal
"""

ENVIRONMENT = {
    "MKL_CBWR": "AUTO",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "RAY_DEDUP_LOGS": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
