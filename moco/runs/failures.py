"""What to tell a user whose machine gave out: a full GPU, memory or disk, a lost loader process."""

import errno
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moco.errors import RunError
from moco.runs.run_folder import last_good

RUN_FOLDER = "hydra.run.dir=PATH"
FAILURES = (EOFError, MemoryError, OSError, RuntimeError)
"""The exceptions in which a machine's failure can show."""


@contextmanager
def failures_without_training_named(
    batch_size: str, kept: str | None = None, place: str = RUN_FOLDER
) -> Iterator[None]:
    """Raise a `RunError` that says what to change, as `failures_named`, without a training.

    Args:
        batch_size: the name of the program's setting, such as ``evaluation.batch_size``.
        kept: what is left of the work done.
        place: the setting that says where the program's files go.
    """
    try:
        yield
    except FAILURES as error:
        if isinstance(error, RunError):
            raise
        explanation = explained(error, batch_size, "", place)
        if explanation is None:
            raise
        if kept:
            explanation = f"{explanation}; {kept}"
        raise RunError(explanation) from error


@contextmanager
def failures_named(folder: Path) -> Iterator[None]:
    """Raise a `RunError` that says what to change if the machine gives out inside the block.

    That is a full GPU, disk or memory, or a lost loader process. The message names the run's last
    good checkpoint. Other errors, such as a defect in a dataset's code, pass unchanged.
    """
    usual_hook = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not is_of_tensorboard(args.thread):
            usual_hook(args)

    # TensorBoard's writing thread is the first to see a full disk. The same error is raised in the
    # main thread at the next point of a curve. The thread's own traceback would only hide our line.
    threading.excepthook = hook
    try:
        yield
    except FAILURES as error:
        if isinstance(error, RunError):
            raise
        explanation = explained(error)
        if explanation is None:
            raise
        raise RunError(f"{explanation}; in the run {folder}; {last_good(folder)}") from error
    finally:
        threading.excepthook = usual_hook


def is_of_tensorboard(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")


# {batch_size} stands for the setting's name, which differs between programs.
GPU_IS_FULL = "the GPU is out of memory; a smaller {batch_size}{or_in_training} needs less"
OR_IN_TRAINING = (
    ", more trainer.accumulate_grad_batches, trainer.precision=bf16-mixed or, for a Swin, "
    "backbone.gradient_checkpointing=true"
)
MEMORY_IS_FULL = (
    "the machine is out of memory; fewer data.num_workers or a smaller {batch_size} needs less, "
    "or give the job more"
)
TOO_MANY_FILES = (
    "too many files are open; raise the limit with 'ulimit -n 65536' before the start, "
    "or use fewer data.num_workers"
)
SHARED_MEMORY_IS_FULL = (
    "the loader processes have used up the shared memory; use fewer data.num_workers or a smaller "
    "{batch_size}, or give the container more (docker run --shm-size=8g, or a memory volume on "
    "/dev/shm)"
)
LOADER_WAS_KILLED = (
    "a loader process was ended from outside, mostly by the kernel because the memory was full; "
    "use fewer data.num_workers or a smaller {batch_size}, or give the job more memory"
)
CANNOT_COMPILE = "torch.compile fails at these encoders; trainer.compile=false does without"
# Patterns in the message of a RuntimeError, or of an error of a loader process, and what they mean.
# The first that matches counts.
SIGNS = (
    (r"shared memory|/torch_\d+|bus error", SHARED_MEMORY_IS_FULL),
    # EOFError is the end of a pipe to a process.
    (
        r"DataLoader worker .*(exited unexpectedly|killed by signal)|^EOFError",
        LOADER_WAS_KILLED,
    ),
    (r"Too many open files|received 0 items of ancdata", TOO_MANY_FILES),
    (
        r"(CUDA|HIP).* out of memory|(CUBLAS|CUDNN|CUFFT|CUSOLVER)_STATUS_ALLOC_FAILED",
        GPU_IS_FULL,
    ),
    (r"^BackendCompilerFailed|^InductorError|^TorchRuntimeError", CANNOT_COMPILE),
    (
        r"MemoryError|can('t|not) allocate memory|not enough memory|std::bad_alloc",
        MEMORY_IS_FULL,
    ),
)
REMEDIES = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some of your quota and start again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and start again",
    errno.EROFS: "make the file system writable and start again, or choose another {place}",
    errno.EACCES: "make it writable for you and start again, or choose another {place}",
    errno.EIO: "the disk or the network file system fails; start again where it works",
    errno.ESTALE: "the network file system was lost; start again where it is mounted",
}
"""What to do about an error of the operating system that is nobody's mistake."""


def explained(
    error: BaseException,
    batch_size: str = "data.batch_size",
    or_in_training: str = OR_IN_TRAINING,
    place: str = RUN_FOLDER,
) -> str | None:
    """Return what happened and what to change, or None if the machine has not given out.

    Args:
        error: what was raised.
        batch_size: the name of the program's setting.
        or_in_training: what else helps when a GPU is full.
        place: the setting that says where the program's files go.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return GPU_IS_FULL.format(batch_size=batch_size, or_in_training=or_in_training)
    text = str(error)
    if "PytorchStreamWriter" in text and isinstance(error.__context__, OSError):
        # A full disk, about which torch's zip writer complains in words of its own.
        return explained(error.__context__, batch_size, or_in_training, place)
    if isinstance(error, OSError) and error.errno is not None:
        return explained_os_error(error, batch_size, place)
    for sign, explanation in SIGNS:
        if re.search(sign, f"{type(error).__name__}: {text}", re.IGNORECASE):
            explanation = explanation.format(batch_size=batch_size, or_in_training=or_in_training)
            # A lost loader process names the image that it was reading.
            last_read = re.search(r"; it was reading .*$", text)
            return explanation + last_read[0] if last_read else explanation
    if isinstance(error, OSError):
        # A loader process sends its traceback as text, and no error number.
        return f"in a loader process, {text.splitlines()[-1]}"
    return None


def explained_os_error(error: OSError, batch_size: str, place: str) -> str:
    """Return the same for an error that the operating system reported by number."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TOO_MANY_FILES
    if error.errno == errno.ENOMEM:
        return MEMORY_IS_FULL.format(batch_size=batch_size)
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None:
        return str(error)
    return f"{error}; {remedy.format(place=place)}"
