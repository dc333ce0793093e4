"""Every error this project raises on purpose. A message gives the value, the rule and the remedy.

    MbqError                 something failed; exit code 1
    +-- InputError           what the user typed or wrote cannot work; exit code 2
    +-- NotFoundError        a run, a file or a preset does not exist; exit code 3
    +-- StoreError           the object store refused or lost something; may pass when tried again
    +-- CorruptError         bytes differ from what their digest, header or index promises
    +-- KernelError          a packed linear computes something wrong on this machine
    +-- RunError             a run ended without a checkpoint
    +-- ClusterError         the cluster stopped answering, or is unfit

All of them take one message, so they survive pickling between processes.
"""


class MbqError(Exception):
    exit_code = 1


class InputError(MbqError):
    exit_code = 2


class NotFoundError(MbqError):
    exit_code = 3


class StoreError(MbqError):
    pass


class CorruptError(MbqError):
    pass


class KernelError(MbqError):
    pass


class RunError(MbqError):
    pass


class ClusterError(MbqError):
    pass
