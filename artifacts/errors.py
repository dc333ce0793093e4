"""The errors of this project. A message gives the value, the rule and the remedy.

    MbqError                 something failed; exit code 1
    +-- InputError           what the user typed or wrote cannot work; exit code 2
    +-- NotFoundError        a run or a file does not exist; exit code 3
    +-- StoreError           the object store refused or lost something; may pass when tried again
    +-- NumericError         a loss, a gradient or an input is not finite
    +-- CorruptError         bytes differ from what their digest, header or index promises
    +-- KernelError          a packed linear computes something wrong on this machine
    +-- RunError             a run ended without a checkpoint
    +-- ClusterError         the cluster stopped answering, or is unfit

Stores, clusters and drivers have kinds of their own (`Refused`, `UploadLost`; `TaskCrashed`,
`InputLost`; `Stopped`, `Superseded`), where they raise them. `kernels/`, which imports nothing of
ours, raises ValueError and RuntimeError. All can be pickled between processes.
"""


class MbqError(Exception):
    exit_code = 1


class InputError(MbqError):
    exit_code = 2


class NotFoundError(MbqError):
    exit_code = 3


class StoreError(MbqError):
    pass


class NumericError(MbqError):
    pass


class CorruptError(MbqError):
    pass


class KernelError(MbqError):
    pass


class RunError(MbqError):
    pass


class ClusterError(MbqError):
    pass


def printable(text: str) -> str:
    """The text without what a terminal would obey: it may come from a store that is hostile."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line; its name if it says nothing.

    The second line belongs to a first that announces it.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
