"""Between torch tensors and the bytes of safetensors: row-major and little-endian."""

import torch
from torch import Tensor

from mbq.artifacts.tensors import Entry, TensorFile

_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


def entry_of(name: str, tensor: Tensor) -> Entry:
    """How a file describes a tensor."""
    return Entry(name, _DTYPES[tensor.dtype], tuple(tensor.shape))


def read_tensor(file: TensorFile, name: str) -> Tensor:
    """One tensor of a file. Raises CorruptError like `TensorFile.read`."""
    data = bytearray(file.read(name))
    entry = file.entries[name]
    if not data:
        return torch.empty(entry.shape, dtype=_TORCH[entry.dtype])
    return torch.frombuffer(data, dtype=_TORCH[entry.dtype]).view(entry.shape)


def tensor_bytes(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes()
