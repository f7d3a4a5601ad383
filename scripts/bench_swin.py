"""Compare our Swin V2-T with torchvision's, forward and backward, with the same weights.

    python scripts/bench_swin.py [--device cpu] [--repeats 7] [--case 565/18/bf16 ...]

The two take turns. The script prints the median time of each, the ratio (above 1: ours is faster)
and the peak memory of a step. The memory is measured in processes of their own: resident memory on
a CPU, allocated memory on a GPU.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from benchmarks.memory import peak_mib
from benchmarks.turns import in_turns, ratio, timed
from torch import Tensor, nn
from torchvision.models import swin_transformer

from moco.models.backbones import build_backbone
from moco.weights.library_names import to_our_names

BATCH = {64: 2, 224: 8, 565: 2}
CASES = ("224/7/fp32", "565/18/fp32", "224/7/bf16", "565/18/bf16")


SHAPES = {
    "swin_v2_t": {
        "patch_size": [4, 4],
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
    },
    "swin_v2_tiny_patch2": {
        "patch_size": [2, 2],
        "embed_dim": 32,
        "depths": [2, 2, 2, 2],
        "num_heads": [1, 2, 4, 8],
    },
}
"""Arguments of torchvision's class, by name in ``conf/backbone``."""


def torchvisions(window: int, backbone: str = "swin_v2_t") -> nn.Module:
    """Return torchvision's Swin V2 with any window, without its classifier."""
    model = swin_transformer.SwinTransformer(
        **SHAPES[backbone],
        window_size=[window, window],
        stochastic_depth_prob=0.0,
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )
    model.head = nn.Identity()
    return model


def models(window: int, device: str) -> dict[str, nn.Module]:
    """Return both models with the same weights."""
    torch.manual_seed(0)
    theirs = torchvisions(window)
    ours = build_backbone("swin_v2_t", window_size=window, partial_patches="drop")
    ours.load_state_dict(to_our_names(theirs.state_dict(), ours))
    return {"torchvision": theirs.to(device), "ours": ours.to(device)}


def step(model: nn.Module, images: Tensor, dtype: str) -> None:
    """Do one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        features = model(images)
    features.float().square().mean().backward()


def forward(model: nn.Module, images: Tensor, dtype: str) -> None:
    """Do one forward pass without gradients."""
    is_bf16 = dtype == "bf16"
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=is_bf16):
        model(images)


def images_of(case: str, device: str) -> Tensor:
    """Return a batch of noise (batch, 3, height, width)."""
    image_size, _, _ = parse(case)
    return torch.randn(BATCH[image_size], 3, image_size, image_size, device=device)


def parse(case: str) -> tuple[int, int, str]:
    image_size, window, dtype = case.split("/")
    return int(image_size), int(window), dtype


def peak_memory(case: str, name: str, device: str) -> float:
    """Return the MiB that one step adds to the memory of a model, in a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--memory-of", name, "--case", case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(case: str, name: str, device: str) -> None:
    _, window, dtype = parse(case)
    model, images = models(window, device)[name], images_of(case, device)
    if device == "cpu":
        print(peak_mib(partial(step, model, images, dtype)))
    else:
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        step(model, images, dtype)
        print(torch.cuda.max_memory_allocated() / 2**20 - before)


def milliseconds(turns: Sequence[Mapping[str, float]]) -> float:
    """Return the median time of the turns."""
    return 1e3 * statistics.median(turn["seconds"] for turn in turns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--case", nargs="+", default=CASES, help="image size/window/precision")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_peak_memory(arguments.case[0], arguments.memory_of, arguments.device)
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {arguments.device}")
    print(f"{arguments.repeats} repeats")
    heading = f"{'case':<14}{'batch':>6}{'work':>10}{'torchvision ms':>16}{'ours ms':>10}"
    print(f"{heading}{'ratio':>8}{'peak MiB, both':>28}")
    for case in arguments.case:
        _, window, dtype = parse(case)
        both, images = models(window, arguments.device), images_of(case, arguments.device)
        for what, work in (("fwd+bwd", step), ("forward", forward)):
            turns = {}
            for name, model in both.items():
                turns[name] = timed(partial(work, model, images, dtype), images.device)
            found = in_turns(turns, arguments.repeats)
            theirs = milliseconds(found["torchvision"])
            ours = milliseconds(found["ours"])
            faster = ratio(found["torchvision"], found["ours"])
            line = (
                f"{case:<14}{len(images):>6}{what:>10}{theirs:>16,.0f}{ours:>10,.0f}{faster:>8.2f}"
            )
            if what == "fwd+bwd" and not arguments.no_memory:
                for name in ("torchvision", "ours"):
                    line += f"{peak_memory(case, name, arguments.device):>14,.0f}"
            print(line, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
