"""Run scripts/benchmark.py at tiny sizes.

The tests check that all contenders do the same work and that every row is there. They never check
how long something took.
"""

import copy
import importlib
import json
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.conftest import REPOSITORY

# A stand-in for the official class. It has the same signature, and makes the same demands on the
# encoder, on CUDA and on the process group.
STAND_IN = """
import torch
from torch import distributed, nn

class MoCo(nn.Module):
    def __init__(self, base_encoder, dim, K, m, T, mlp):
        super().__init__()
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        width = self.encoder_q.fc.weight.shape[1]
        self.encoder_q.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.encoder_q.fc)
        self.encoder_k.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.encoder_k.fc)
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", torch.randn(dim, K))

    def _momentum_update_key_encoder(self):
        pass

    def forward(self, im_q, im_k):
        assert distributed.get_world_size() == 1
        query, key = self.encoder_q(im_q), self.encoder_k(im_k)
        positive = (query * key).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, query @ self.queue.to(query.dtype)], dim=1)
        return logits, torch.zeros(len(query), dtype=torch.long).cuda()
"""


@pytest.fixture(scope="module", autouse=True)
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        yield


@pytest.fixture
def official(tmp_path):
    """Make a checkout with the stand-in; its process group ends with the test."""
    (tmp_path / "official" / "moco").mkdir(parents=True)
    (tmp_path / "official" / "moco" / "builder.py").write_text(STAND_IN)
    yield f"official={tmp_path / 'official'}"
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Run a subcommand in this process, as if no peer was installed.

    Returns:
        Its rows by case and contender, from its JSON file.
    """
    peers = importlib.import_module("benchmarks.peers")
    monkeypatch.setattr(peers, "version_of", lambda package: None)

    def measure(kind, *arguments):
        benchmark = importlib.import_module("benchmark")
        file = tmp_path / f"{kind}.json"
        given = [kind, "--tiny", "--threads", "1", "--repeats", "2", "--json", str(file)]
        given += arguments
        with torch.random.fork_rng():
            benchmark.run(benchmark.parsed(given), Console(quiet=True))
        content = json.loads(file.read_text())
        assert content["benchmark"] == kind
        assert content["machine"]["torch"] == torch.__version__
        assert content["machine"]["threads"] == 1
        for row in content["rows"]:
            assert 0 < row["lowest"] <= row["median"] <= row["highest"]
            assert all(ratio > 0 for ratio in row["ratios"].values())
        return {(row["case"], row["contender"]): row for row in content["rows"]}

    return measure


def contenders(rows, case):
    return [contender for its_case, contender in rows if its_case == case]


@pytest.mark.slow
def test_a_step_is_measured_alike_in_each_precision_and_layout(measured, official):
    rows = measured(
        "step", "--against", official, "--only", "*fp32, contiguous*", "*bf16, channels_last*"
    )
    alike = [
        "lower bound",
        "lower bound, again",
        "ours",
        "ours, batch_norm=shuffle",
        "official",
        "official, with its accuracy",
    ]
    for case in ("resnet_tiny, fp32, contiguous", "resnet_tiny, bf16, channels_last"):
        assert contenders(rows, case) == alike
    assert {len(row["turns"]) for row in rows.values()} == {2}
    assert {turn["images"] for row in rows.values() for turn in row["turns"]} == {16}
    assert all(row["ratios"].keys() == {"lower bound", "official"} for row in rows.values())


@pytest.mark.slow
def test_the_default_settings_are_measured_in_the_trainer(measured):
    rows = measured("step", "--only", "*defaults*", "--steps", "2", "--repeats", "1")
    assert contenders(rows, "resnet_tiny, defaults") == [
        "lower bound",
        "ours, default settings, Trainer",
    ]


@pytest.mark.slow
def test_switches_are_measured_beside_the_plain_method(measured):
    pytest.importorskip("segmentation_models_pytorch")
    rows = measured("switches")
    counts = ["neighbours=1", "neighbours=5", "neighbours=20"]
    assert contenders(rows, "tiny, neighbours") == ["plain", "plain, again", *counts]
    terms = ["dense term", "dense term on an FPN", "dense term on an FPN of 128 channels"]
    assert contenders(rows, "tiny, decoder") == ["plain", *terms]
    assert all(row["ratios"].keys() == {"plain"} for row in rows.values())


@pytest.mark.slow
def test_the_loss_is_measured_in_time_and_memory(measured):
    rows = measured("loss", "--only", "N 8*", "memory*ours")
    assert contenders(rows, "N 8, K 64") == ["two matrix products", "ours", "plain form"]
    assert contenders(rows, "memory, N 8, K 64") == ["two matrix products", "ours"]
    assert all(
        "peak_mib" in row["turns"][0]
        for (case, _), row in rows.items()
        if case.startswith("memory")
    )


def test_updates_are_measured_against_flat_passes(measured, official):
    rows = measured("update", "--against", official)
    assert contenders(rows, "resnet_tiny, momentum update") == ["flat lerp_", "ours", "official"]
    for optimizer in ("sgd", "adamw"):
        assert contenders(rows, f"resnet_tiny, {optimizer} step") == [
            "flat, fused",
            "ours",
            "torch's default",
        ]


# One contender decodes with torchvision.
@pytest.mark.filterwarnings("ignore:.*decoding and encoding capabilities.*:DeprecationWarning")
def test_pipelines_of_data_take_the_same_images(measured):
    rows = measured("data")
    for what, count in (("files", 4), ("memory", 16)):
        turns = [row["turns"] for (case, _), row in rows.items() if case == what]
        assert len(turns) >= 2
        assert {turn["images"] for of_one in turns for turn in of_one} == {count}


@pytest.mark.slow
def test_knn_is_measured_against_the_bare_product(measured):
    rows = measured("knn", "--repeats", "1", "--only", "*ours")
    (case,) = {case for case, _ in rows}
    assert contenders(rows, case) == ["product", "ours"]


@pytest.mark.slow
def test_swin_is_measured_against_torchvisions(measured):
    rows = measured("swin", "--repeats", "1", "--only", "*, forward:*")
    assert contenders(rows, "64/4/fp32, forward") == ["torchvision", "ours"]


@pytest.mark.slow
def test_matches_and_local_crops_are_measured_against_the_plain_method(measured):
    rows = measured("crops", "--repeats", "1")
    (case,) = {case for case, _ in rows}
    assert contenders(rows, case)[:3] == ["plain", "plain, again", "dense_match=feature"]
    assert {turn["images"] for row in rows.values() for turn in row["turns"]} == {16}


@pytest.mark.slow
def test_networks_of_timm_are_measured_beside_the_bare_ones(measured):
    rows = measured("timm", "--repeats", "1", "--calls", "1")
    expected = ["timm alone", "ours", "ours, with feature maps"]
    assert contenders(rows, "convnext_atto, 96 px") == expected


@pytest.mark.slow
def test_a_training_with_data_is_measured_against_its_step(measured, official):
    rows = measured(
        "end_to_end", "--against", official, "--steps", "2", "--repeats", "1", "--workers", "0"
    )
    assert contenders(rows, "resnet_tiny, batch 16, noise") == [
        "our step alone",
        "ours, with data",
        "official",
    ]
    assert {turn["images"] for row in rows.values() for turn in row["turns"]} == {16}


def test_programs_are_started_in_turns(measured):
    rows = measured("startup", "--repeats", "1")
    assert contenders(rows, "start-up") == ["python", "moco.train --help"]


class Counted(nn.Linear):
    """A layer that notes its passes."""

    def __init__(self):
        super().__init__(3, 2)
        self.passes = []

    def forward(self, rows):
        self.passes.append("with gradient" if torch.is_grad_enabled() else "without")
        output = super().forward(rows)
        if output.requires_grad:
            output.register_hook(lambda gradient: self.passes.append("backward"))
        return output


def test_the_lower_bound_is_two_forward_passes_one_backward_and_one_step(monkeypatch):
    lower_bound = importlib.import_module("benchmarks.lower_bound")
    nets = importlib.import_module("benchmarks.nets")
    queries, keys = Counted(), Counted()
    monkeypatch.setattr(lower_bound.copy, "deepcopy", lambda module: keys)
    steps = []

    def note_step(optimizer):
        steps.append(optimizer.param_groups[0]["params"])

    monkeypatch.setattr(torch.optim.SGD, "step", note_step)
    step = lower_bound.step_of(queries, nets.Setting(torch.device("cpu")))
    step(torch.randn(4, 3), torch.randn(4, 3))
    assert queries.passes == ["with gradient", "backward"]
    assert keys.passes == ["without"]
    assert [[id(parameter) for parameter in given] for given in steps] == [
        [id(p) for p in queries.parameters()]
    ]


def test_forms_of_the_loss_have_the_same_gradient():
    loss = importlib.import_module("benchmarks.loss")
    gradients = []
    for form in (loss.ours, loss.plain):
        query, key, negatives = loss.rows(8, 64, torch.device("cpu"))
        form(query, key, negatives)()
        gradients.append(query.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_flat_passes_change_the_parameters_as_the_others_do():
    update = importlib.import_module("benchmarks.update")
    query_encoder, key_encoder = nn.Linear(3, 4), nn.Linear(3, 4)
    expected = update.flat_lerp(query_encoder, key_encoder)()
    update.ours(query_encoder, key_encoder)()
    torch.testing.assert_close(update.flat(key_encoder), expected)
    for optimizer in ("sgd", "adamw"):
        module = nn.Conv2d(3, 4, 2, bias=False)
        others = [copy.deepcopy(module) for _ in range(2)]
        one = update.stepping(optimizer, "flat, fused", module)
        one.step()
        for name, other in zip(("ours", "torch's default"), others, strict=True):
            update.stepping(optimizer, name, other).step()
            torch.testing.assert_close(
                update.flat(other), one.param_groups[0]["params"][0].detach()
            )


def test_turns_alternate_and_ratios_are_taken_within_a_round():
    turns = importlib.import_module("benchmarks.turns")
    order, seconds = [], {"slow": iter([9, 2, 40, 6]), "fast": iter([9, 1, 10, 3])}

    def contender(name):
        def turn():
            order.append(name)
            return {"seconds": next(seconds[name])}

        return lambda: turn

    case = turns.Case("a case", {"fast": contender("fast"), "slow": contender("slow")}, ("fast",))
    fast, slow = turns.measure(case, 3, [], print)
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    # The median of 2/1, 40/10 and 6/3. The ratio of the means would be 48/14.
    assert slow.ratios == {"fast": 2}
    assert (fast.median("seconds"), slow.median("seconds")) == (3, 6)


def test_each_sitting_builds_anew_and_all_its_rounds_count():
    turns = importlib.import_module("benchmarks.turns")
    built = []

    def contender(name):
        def build():
            built.append(name)
            seconds = iter({"bound": [9, 2, 2], "ours": [9, 2 * len(built), 2 * len(built)]}[name])
            return lambda: {"seconds": next(seconds)}

        return build

    case = turns.Case(
        "a case", {"bound": contender("bound"), "ours": contender("ours")}, ("bound",)
    )
    bound, ours = turns.measure(case, 2, [], print, sittings=3)
    assert built == ["bound", "ours"] * 3
    assert [turn["seconds"] for turn in bound.turns] == [2] * 6
    assert [turn["seconds"] for turn in ours.turns] == [4, 4, 8, 8, 12, 12]
    assert ours.ratios == {"bound": 4}


def test_a_contender_that_gives_up_in_a_later_sitting_has_no_row():
    turns = importlib.import_module("benchmarks.turns")
    builds = []

    def build():
        builds.append("two")
        if len(builds) == 2:
            raise turns.LeftOut("not enough memory")
        return lambda: {"seconds": 1.0}

    said = []
    case = turns.Case("a case", {"one": lambda: lambda: {"seconds": 1.0}, "two": build}, ("one",))
    (row,) = turns.measure(case, 2, [], said.append, sittings=3)
    assert (row.contender, len(row.turns)) == ("one", 6)
    assert said == ["left out: a case: two: not enough memory"]
    assert len(builds) == 2


def test_a_contender_that_gives_up_is_named_and_the_others_go_on():
    turns = importlib.import_module("benchmarks.turns")

    def giving_up():
        raise turns.LeftOut("not enough memory")

    said = []
    case = turns.Case(
        "a case", {"one": lambda: lambda: {"seconds": 1.0}, "two": lambda: giving_up}, ("one",)
    )
    rows = turns.measure(case, 2, [], said.append)
    assert [row.contender for row in rows] == ["one"]
    assert said == ["left out: a case: two: not enough memory"]


def test_only_keeps_the_lower_bound_beside_what_it_chooses():
    turns = importlib.import_module("benchmarks.turns")
    case = turns.Case(
        "net, fp32",
        dict.fromkeys(["lower bound", "ours", "lightly"], lambda: None),
        ("lower bound", "lightly"),
    )
    assert turns.chosen(case, ["*fp32: ours"]) == ["lower bound", "ours"]
    assert turns.chosen(case, ["other*"]) == []


def test_the_clock_leaves_the_first_steps_and_the_last_out():
    ours = importlib.import_module("benchmarks.ours")
    assert "trainer.max_steps=6" in ours.for_steps(2, torch.device("cpu"))
    clock = ours.StepClock(2, 1)
    clock.ends = [10.0, 11.0, 14.0, 99.0]
    assert clock.seconds == 2.0
    clock = ours.StepClock(2, 3)
    clock.ends = [0.0, 5.0, 10.0, 11.0, 14.0]
    assert clock.seconds == 2.0


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("lihtly", "--against lihtly: unknown peer 'lihtly'; did you mean 'lightly'?"),
        ("official=/nowhere", "--against official=/nowhere: no moco/builder.py there"),
        ("solo-learn", "--against solo-learn: its newest release, 1.0.2, requires torch 1.9.1"),
    ],
)
def test_a_peer_that_is_not_there_is_one_line(capsys, asked, line):
    benchmark = importlib.import_module("benchmark")
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["loss", "--tiny", "--threads", "1", "--against", asked])
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {line}")


@pytest.mark.parametrize("option", ["--repeats", "--sittings", "--threads"])
@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_a_count_below_one_is_refused(capsys, option, count):
    benchmark = importlib.import_module("benchmark")
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["loss", "--tiny", f"{option}={count}"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"error: argument {option}: '{count}' is not a whole number of at least 1")


@pytest.mark.slow
def test_a_contender_in_a_process_of_its_own_takes_turns_and_tells_what_went_wrong():
    step = importlib.import_module("benchmarks.step")
    lower_bound = importlib.import_module("benchmarks.lower_bound")
    nets = importlib.import_module("benchmarks.nets")
    turns = importlib.import_module("benchmarks.turns")
    net, setting = nets.TINY["resnet_tiny"], nets.Setting(torch.device("cpu"))
    with turns.apart(partial(step.one_step, lower_bound.step, net, setting), num_threads=1) as turn:
        for _ in range(2):
            measured = turn()
            assert measured["seconds"] > 0
            assert measured["images"] == net.batch_size
    broken = turns.apart(partial(int, "no number"), num_threads=1)
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"), broken:
        pass
