"""What to tell a user whose machine gave out: a full GPU, memory or disk, a lost loader process."""

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moco.errors import RunError
from moco.runs.run_folder import last_good

FAILURES = (EOFError, MemoryError, OSError, RuntimeError)
"""The exceptions in which a machine's failure can show."""


@contextmanager
def failures_without_training_named(batch_size: str, kept: str = "") -> Iterator[None]:
    """Raise a `RunError` that says what to change, as `failures_named`, without a training.

    Args:
        batch_size: the name of the program's setting, such as ``evaluation.batch_size``.
        kept: what is left of the work done.
    """
    try:
        yield
    except FAILURES as error:
        explanation = explained(error, batch_size)
        if explanation is None:
            raise
        raise RunError("; ".join(filter(None, (explanation, kept)))) from error


@contextmanager
def failures_named(folder: Path) -> Iterator[None]:
    """Raise a `RunError` that says what to change if the machine gives out inside the block.

    That is a full GPU, disk or memory, or a lost loader process. The message names the run's last
    good checkpoint. Other errors, such as a defect in a dataset's code, pass unchanged.
    """
    usual_hook = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            usual_hook(args)

    # TensorBoard's writing thread is the first to see a full disk. The same error is raised in the
    # main thread at the next point of a curve. The thread's own traceback would only hide our line.
    threading.excepthook = hook
    try:
        yield
    except FAILURES as error:
        explanation = explained(error)
        if explanation is None:
            raise
        raise RunError(f"{explanation}; in the run {folder}; {last_good(folder)}") from error
    finally:
        threading.excepthook = usual_hook


# What else helps when a GPU is full, in a training.
IN_TRAINING = (
    ", more trainer.accumulate_grad_batches, trainer.precision=bf16-mixed or, for a Swin, "
    "backbone.gradient_checkpointing=true"
)
# Patterns in the message of a RuntimeError, or of an error of a loader process, and what they mean.
# The first that matches counts. {batch_size} stands for the setting's name, which differs between
# programs.
SIGNS = {
    r"shared memory|/torch_\d+|bus error": (
        "the loader processes have used up the shared memory; use fewer data.num_workers or a "
        "smaller {batch_size}, or give the container more (docker run --shm-size=8g, or a memory "
        "volume on /dev/shm)"
    ),
    # EOFError is the end of a pipe to a process.
    r"DataLoader worker .*(exited unexpectedly|killed by signal)|^EOFError": (
        "a loader process was ended from outside, mostly by the kernel because the memory was "
        "full; use fewer data.num_workers or a smaller {batch_size}, or give the job more memory"
    ),
    r"Too many open files|received 0 items of ancdata": (
        "too many files are open; raise the limit with 'ulimit -n 65536' before the start, or use "
        "fewer data.num_workers"
    ),
    r"^OutOfMemoryError|(CUDA|HIP).* out of memory|CU\w+_STATUS_ALLOC_FAILED": (
        "the GPU is out of memory; a smaller {batch_size}{in_training} needs less"
    ),
    r"^BackendCompilerFailed|^InductorError|^TorchRuntimeError": (
        "torch.compile fails at these encoders; trainer.compile=false does without"
    ),
    r"MemoryError|can('t|not) allocate memory|not enough memory|bad_alloc": (
        "the machine is out of memory; fewer data.num_workers or a smaller {batch_size} needs "
        "less, or give the job more"
    ),
}
REMEDIES = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some of your quota and start again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and start again",
    errno.EROFS: "make the file system writable and start again, or choose another folder",
    errno.EACCES: "make it writable for you and start again, or choose another folder",
}
"""What to do about an error of the operating system that is nobody's mistake."""


def explained(error: BaseException, batch_size: str = "data.batch_size") -> str | None:
    """Return what happened and what to change, or None if the machine has not given out.

    Args:
        error: what was raised.
        batch_size: the name of the program's setting.
    """
    if isinstance(error, RunError):
        return None  # it says so itself
    text = str(error)
    if "PytorchStreamWriter" in text and isinstance(error.__context__, OSError):
        # A full disk, about which torch's zip writer complains in words of its own.
        return explained(error.__context__, batch_size)
    number = error.errno if isinstance(error, OSError) else None
    if number is not None:
        text = os.strerror(number)  # without a path, which may hold any words
    in_training = IN_TRAINING if batch_size == "data.batch_size" else ""
    for sign, explanation in SIGNS.items():
        if re.search(sign, f"{type(error).__name__}: {text}", re.IGNORECASE):
            explanation = explanation.format(batch_size=batch_size, in_training=in_training)
            # A lost loader process names the image that it was reading.
            last_read = re.search(r"; it was reading .*$", text)
            return explanation + last_read[0] if last_read else explanation
    if number is not None:
        return "; ".join(filter(None, (str(error), REMEDIES.get(number))))
    if not isinstance(error, OSError):
        return None
    # A loader process sends its traceback as text, and no error number.
    return f"in a loader process, {text.splitlines()[-1]}"
