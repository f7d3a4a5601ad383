"""Measure a training step on random tensors, eager and compiled.

It is compared with the bare backbone and the peers.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from benchmarks import lower_bound, of_lightly, official, ours
from benchmarks.nets import Net, Setting, head
from benchmarks.step import Step, one_step
from benchmarks.turns import Turn
from torch import nn

from gpu_parts.measuring import Context, in_turns, rows_of_case
from gpu_parts.results import Result
from gpu_parts.rows import (
    AND_COMPILED,
    BOUND,
    BOUND_AGAIN,
    COMPILED,
    LIGHTLY,
    OFFICIAL,
    OURS,
    OURS_SHUFFLED,
    TORCHVISION,
    WITH_GRAPHS,
)
from moco.methods.moco import MoCo
from moco.training.hardware_fit import MOST_SIZES, compiler_options

REHEARSAL_NOTE = "the projector alone, backend eager, as there is no GPU"


def measure(case: str, context: Context) -> list[Result]:
    """Measure all contenders of one net in one process, in turns."""
    is_compiled = case.endswith(AND_COMPILED)
    net = context.sizes.nets[case.removesuffix(AND_COMPILED)]
    contenders = compiled(net, context) if is_compiled else as_they_are(net, context)
    rows = rows_of_case("step", case, context)
    results = in_turns(context, rows, contenders, (BOUND, OFFICIAL, LIGHTLY))
    for result in results:
        if context.is_rehearsal and result["contender"] in (COMPILED, WITH_GRAPHS):
            result["note"] = REHEARSAL_NOTE
    return results


def as_they_are(net: Net, context: Context) -> dict[str, Callable[[], Turn]]:
    """Return contenders of one precision and layout.

    The second lower bound shows what a ratio of these rounds can tell.
    """
    step = partial(one_step, net=net, setting=context.setting(net))
    contenders = {
        BOUND: partial(step, lower_bound.step),
        BOUND_AGAIN: partial(step, lower_bound.step),
        OURS: partial(step, ours.step),
    }
    if net.has_batch_norm:
        contenders[OURS_SHUFFLED] = partial(step, partial(ours.step, batch_norm="shuffle"))
    if net.window_size:
        contenders[TORCHVISION] = partial(step, torchvisions)
    if OFFICIAL in context.peers:
        build = partial(official.step, context.peers[OFFICIAL], with_accuracy=False)
        contenders[OFFICIAL] = partial(step, build)
    if LIGHTLY in context.peers:
        contenders[LIGHTLY] = partial(step, of_lightly.step)
    return contenders


def torchvisions(net: Net, setting: Setting) -> Step:
    """Return the lower bound with torchvision's backbone."""
    backbone = net.theirs()
    return lower_bound.step_of(nn.Sequential(backbone, head(backbone.feature_dim)), setting)


def compiled(net: Net, context: Context) -> dict[str, Callable[[], Turn]]:
    """Return contenders whose encoders are compiled as in `moco.train`."""
    step = partial(one_step, net=net, setting=context.setting(net))

    def ours_compiled(cuda_graphs: bool) -> Turn:
        prepare = partial(compile_encoders, context.device, cuda_graphs)
        return step(partial(ours.step, prepare=prepare))

    return {
        BOUND: partial(step, lower_bound.step),
        COMPILED: partial(ours_compiled, False),
        WITH_GRAPHS: partial(ours_compiled, True),
    }


def compile_encoders(device: torch.device, cuda_graphs: bool, method: MoCo) -> None:
    """Compile as `HardwareFit` does, without its reset: both ways share one process."""
    torch.compiler.config.recompile_limit = MOST_SIZES
    not_a_leaf = "The .grad attribute of a Tensor that is not a leaf"
    warnings.filterwarnings("ignore", not_a_leaf, UserWarning)
    if device.type == "cuda":
        method.compile_encoders(compiler_options(device, cuda_graphs))
        return
    # On a CPU, tracing five nets takes half a minute, and compiling them minutes.
    for encoder in (method.query_encoder, method.key_encoder):
        encoder.projector.compile(dynamic=False, backend="eager")
