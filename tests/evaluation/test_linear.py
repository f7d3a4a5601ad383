"""The linear probes: arithmetic against torch's and scikit-learn's, and what a user sees."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import nn

from moco.errors import InputError, RunError
from moco.evaluation.knn import class_places
from moco.evaluation.linear import accuracies, held_out_rows, train_heads
from moco.evaluation.linear_measurement import (
    Head,
    check_grid,
    log_edge_of_grid,
    usual_epochs,
)
from tests.test_evaluate import archive, evaluated  # noqa: F401

SMALL = {"lrs": [0.03, 0.3], "weight_decays": [0.0, 1e-3], "num_epochs": 20}


def section(kind, **settings):
    from moco.config.linear import LinearConfig, LinearOfficialConfig

    return {
        "name": kind,
        kind: {"linear": LinearConfig, "linear_official": LinearOfficialConfig}[kind](**settings),
    }


def blobs(generator, rows, width=6, classes=3):
    """Standardised features whose mean depends on the class."""
    labels = generator.integers(0, classes, rows)
    centres = np.random.default_rng(7).normal(size=(classes, width))
    features = centres[labels] + generator.normal(size=(rows, width))
    scaled = StandardScaler().fit_transform(features).astype(np.float32)
    return torch.from_numpy(scaled), torch.from_numpy(labels)


def trained_alone(features, classes, lr, weight_decay, num_epochs, batch_size):
    """One head by torch's own layers, gradient and optimizer."""
    head = nn.Linear(features.shape[1], int(classes.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": weight_decay}, {"params": [head.bias]}]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9)
    steps = num_epochs * -(-len(features) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(features), generator=order).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(features[rows]), classes[rows]).backward()
            optimizer.step()
            schedule.step()
    return head


def test_heads_that_are_trained_side_by_side_are_those_that_torch_trains_one_by_one(generator):
    features, classes = blobs(generator, 50)
    lrs, decays = [0.01, 0.1, 0.5], [0.0, 0.1, 0.01]
    heads = train_heads(features, classes, 3, lrs, decays, num_epochs=4, batch_size=16)
    logits = heads.logits(features)
    for place, (lr, decay) in enumerate(zip(lrs, decays, strict=True)):
        alone = trained_alone(features, classes, lr, decay, 4, 16)
        torch.testing.assert_close(
            heads.weights[:, place], alone.weight.detach(), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            heads.biases[:, place], alone.bias.detach(), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            logits[:, :, place], alone(features).detach(), atol=1e-4, rtol=1e-4
        )


def test_trained_to_the_end_a_head_is_scikit_learns_logistic_regression(generator):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, classes = blobs(generator, 200)
    decay = 0.01
    heads = train_heads(features, classes, 3, [0.5], [decay], num_epochs=600, batch_size=200)
    model = linear_model.LogisticRegression(C=1 / (decay * len(features)), tol=1e-8, max_iter=1000)
    model.fit(features.double().numpy(), classes.numpy())
    np.testing.assert_allclose(heads.weights[:, 0].numpy(), model.coef_, atol=2e-4)


def test_the_accuracy_of_a_head_that_diverged_is_zero(generator):
    features, classes = blobs(generator, 60)
    heads = train_heads(features, classes, 3, [0.1, 1e38], [0.0, 0.1], num_epochs=3, batch_size=20)
    sound, diverged = accuracies(heads, features, classes)
    assert sound == (heads.logits(features)[:, :, 0].argmax(1) == classes).double().mean()
    assert diverged == 0


def test_scaled_features_have_mean_0_and_deviation_1_and_constant_dimensions_stay_0(generator):
    """What the measurement expects of scikit-learn for float32."""
    features = (generator.normal(size=(500, 4)) * [1, 100, 0, 1e-3] + [0, 1e3, 0.1, 5]).astype(
        np.float32
    )
    scaled = StandardScaler().fit_transform(features)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(scaled.std(0), [1, 1, 0, 1], atol=1e-3)


def test_a_share_of_each_class_is_held_out_and_never_all_of_it(generator):
    labels = generator.permutation(np.repeat([0, 3, 4, 9], [100, 10, 2, 1]))
    is_held_out = held_out_rows(labels, 0.2, generator)
    assert [int(is_held_out[labels == label].sum()) for label in (0, 3, 4, 9)] == [20, 2, 1, 0]
    assert [
        int(held_out_rows(labels, 0.99, generator)[labels == label].sum()) for label in (0, 3)
    ] == [99, 9]


def test_places_are_those_of_the_training_classes():
    assert class_places(np.array([2, 5, 9]), np.array([9, 2, 3, 10, 0, 5])).tolist() == [
        2,
        0,
        3,
        3,
        3,
        1,
    ]


def test_small_sets_are_gone_through_more_often():
    assert usual_epochs(50_000, 256) == 30
    assert usual_epochs(1_000, 256) == 500
    assert usual_epochs(7, 256) == 2000


def test_a_grid_out_of_range_is_refused_before_anything_is_computed():
    check_grid([0.1], [0.0])
    for lrs, decays, said in (
        ([], [0.0], r"evaluation.linear.lrs=\[\]: expected finite numbers above 0"),
        ([0.1, 0.0], [0.0], r"evaluation.linear.lrs=\[0.1, 0.0\]: expected finite numbers above 0"),
        ([float("inf")], [0.0], "lrs=.*expected finite numbers above 0"),
        (
            [0.1],
            [-1.0],
            r"evaluation.linear.weight_decays=\[-1.0\]: expected finite numbers of 0 or more",
        ),
    ):
        with pytest.raises(InputError, match=said):
            check_grid(lrs, decays)


def test_a_best_learning_rate_at_the_edge_of_the_grid_is_said(caplog):
    caplog.set_level("INFO", logger="moco")
    log_edge_of_grid(Head(0.1, 0.0, 0.5), [0.01, 0.1, 1.0])
    log_edge_of_grid(Head(0.1, 0.0, 0.5), [0.1])
    assert not caplog.text
    log_edge_of_grid(Head(1.0, 0.0, 0.5), [0.01, 0.1, 1.0])
    assert "the best learning rate, 1, is at the edge of evaluation.linear.lrs" in caplog.text


@pytest.mark.slow
def test_the_grid_is_measured_once_on_the_test_part_and_its_choice_stands_beside_it(
    evaluated,  # noqa: F811
    tmp_path,
):
    figures, printed, _ = evaluated(**section("linear", **SMALL))
    held_out = {key: value for key, value in figures.items() if key.startswith("linear_grid/")}
    assert list(held_out) == [
        f"linear_grid/lr{lr}/wd{decay}/held_out_top1"
        for lr in ("0.03", "0.3")
        for decay in ("0", "0.001")
    ]
    assert figures["linear/held_out_top1"] == pytest.approx(max(held_out.values()), abs=1e-6)
    chosen = (
        f"linear_grid/lr{figures['linear/lr']:g}/wd{figures['linear/weight_decay']:g}/held_out_top1"
    )
    assert held_out[chosen] == max(held_out.values())
    assert 0.8 < figures["linear/top1"] < figures["linear/top5"] <= 1
    assert (figures["linear/num_training"], figures["linear/num_queries"]) == (1437, 360)
    assert (figures["linear/queries"], figures["linear/num_epochs"], figures["linear/feature"]) == (
        "test",
        20,
        "backbone",
    )
    assert f"{figures['linear/top1']:.4f}" in printed
    with np.load(tmp_path / "out" / "confusion.npz") as written:
        assert (written["predicted"] == written["labels"]).mean() == figures["linear/top1"]


def test_the_same_seed_gives_the_same_figures_and_the_test_labels_choose_nothing(
    evaluated,  # noqa: F811
    generator,
    tmp_path,
):
    train_labels = np.arange(60) % 3
    test_images = generator.integers(0, 256, (9, 8, 8)).astype(np.uint8)

    def figures_with(test_labels):
        data = archive(
            tmp_path / "x.npz",
            np.random.default_rng(0),
            train_labels,
            test_images=test_images,
            test_labels=test_labels,
        )
        return evaluated(data=data, **section("linear", **SMALL))[0]

    first, again = figures_with(np.arange(9) % 3), figures_with(np.arange(9) % 3)
    other = figures_with(np.arange(9)[::-1] % 3)
    assert first == again
    for key in ("linear/lr", "linear/weight_decay", "linear/held_out_top1"):
        assert first[key] == other[key]


def test_classes_that_training_lacks_are_named_and_count_as_wrong(evaluated, generator, tmp_path):  # noqa: F811
    labels = np.arange(40) % 2
    test_images = (
        60 * np.array([0, 1, 0, 1])[:, None, None] + generator.integers(0, 60, (4, 8, 8))
    ).astype(np.uint8)
    data = archive(
        tmp_path / "x.npz",
        generator,
        labels,
        test_images=test_images,
        test_labels=np.array([0, 1, 7, 8]),
    )
    figures, _, log = evaluated(data=data, **section("linear", **SMALL))
    assert "2 of 4 test images are of classes without training images, and count as wrong" in log
    assert figures["linear/top1"] <= 0.5
    assert figures["linear/top5"] <= 0.5


def test_without_a_test_part_some_training_images_are_kept_for_it(evaluated, generator, tmp_path):  # noqa: F811
    data = archive(tmp_path / "x.npz", generator, np.arange(60) % 3)
    figures, _, log = evaluated(data=data, **section("linear", **SMALL, held_out=0.2))
    assert "no test part: 12 of 60 images are kept for the test" in log
    assert (
        figures["linear/queries"],
        figures["linear/num_training"],
        figures["linear/num_queries"],
    ) == (
        "held out",
        48,
        12,
    )


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([4] * 9, "a classifier needs two classes, and the 8 labelled training images are of 1"),
        (
            [0, 1, 2, 3],
            "no class has two labelled training images, one to train on and one to hold out",
        ),
    ],
)
def test_labels_that_nothing_can_be_learned_from_are_refused(
    labels,
    said,
    evaluated,  # noqa: F811
    generator,
    tmp_path,
):
    data = archive(tmp_path / "x.npz", generator, labels)
    with pytest.raises(InputError, match=said):
        evaluated(data=data, **section("linear", **SMALL))


def test_classes_of_one_image_leave_none_to_choose_by(evaluated, generator, tmp_path):  # noqa: F811
    test = {"test_images": np.zeros((2, 8, 8), np.uint8), "test_labels": np.array([0, 1])}
    with pytest.raises(InputError, match="no class has two labelled training images"):
        evaluated(
            data=archive(tmp_path / "x.npz", generator, [0, 1, 2], **test),
            **section("linear", **SMALL),
        )


def test_images_without_a_label_are_left_out(evaluated, generator, monkeypatch):  # noqa: F811
    import moco.evaluation.subject as module
    from moco.data.sources.source import ArrayImages, DataSource, Labelled

    labels = np.arange(60) % 3
    images = ArrayImages(generator.integers(0, 256, (60, 8, 8), np.uint8), "mine")
    queries = Labelled(images, labels.copy())
    labels[[0, 7]] = -1

    def evaluate_with(bank_labels, kind, **settings):
        source = DataSource(images, Labelled(images, bank_labels), queries, 8)
        monkeypatch.setattr(module, "build_source", lambda *_, **__: source)
        return evaluated(**section(kind, **settings))

    figures, _, log = evaluate_with(labels, "linear", **SMALL)
    assert "skipped 2 images without a label: mine[0], mine[7]" in log
    assert figures["linear/num_training"] == 58
    with pytest.raises(InputError, match="none of 60 readable images has a label"):
        evaluate_with(np.full(60, -1), "linear", **SMALL)
    figures, _, log = evaluate_with(labels, "linear_official", **OFFICIAL)
    assert "2 of 60 training images have no label, and are not trained on" in log
    assert figures["linear_official/num_training"] == 58
    with pytest.raises(
        InputError,
        match="a classifier needs two classes, and the 0 labelled training images are of 0",
    ):
        evaluate_with(np.full(60, -1), "linear_official", **OFFICIAL)


OFFICIAL = {"lr": 0.01, "num_epochs": 3, "milestones": [2], "batch_size": 256}


def test_the_official_protocol_trains_on_views_and_reports_its_last_epoch(evaluated, monkeypatch):  # noqa: F811
    projection = torch.randn(3 * 16 * 16, 128, generator=torch.Generator().manual_seed(0)) / 28
    # Features of an untrained encoder hardly tell the classes apart; a projection of pixels does.
    monkeypatch.setattr(
        "moco.models.resnet.ResNet.forward", lambda _, images: images.flatten(1) @ projection
    )
    figures, printed, log = evaluated(**section("linear_official", **OFFICIAL | {"lr": 0.3}))
    assert figures["linear_official/top1"] > 0.5
    assert "epoch 3/3: loss" in log
    assert f"test top-1 {figures['linear_official/top1']:.4f}" in log.split("epoch 3/3")[1]
    assert figures["linear_official/best_top1"] >= round(figures["linear_official/top1"], 6)
    assert "official protocol, last epoch" in printed
    again, _, log = evaluated(**section("linear_official", **OFFICIAL | {"lr": 0.3}))
    assert "after 3 epochs" in log
    assert again == figures


def test_the_official_defaults_are_those_of_the_published_code():
    from moco.config.linear import LinearOfficialConfig

    settings = LinearOfficialConfig()
    assert (settings.lr, settings.batch_size, settings.sgd_momentum, settings.weight_decay) == (
        30,
        256,
        0.9,
        0,
    )
    assert (settings.num_epochs, settings.milestones, settings.step_factor, settings.init_std) == (
        100,
        [60, 80],
        0.1,
        0.01,
    )
    assert settings.view == {
        "random_resized_crop": {"scale": [0.08, 1.0]},
        "horizontal_flip": {"probability": 0.5},
    }


def test_an_interrupted_official_measurement_goes_on_to_the_same_bits(
    evaluated,  # noqa: F811
    generator,
    tmp_path,
    monkeypatch,
):
    import moco.evaluation.linear_official as module

    test = {
        "test_images": generator.integers(0, 256, (9, 8, 8), np.uint8),
        "test_labels": np.arange(9) % 3,
    }
    data = archive(tmp_path / "x.npz", generator, np.arange(60) % 3, **test)
    settings = {"data": data, **section("linear_official", **OFFICIAL | {"batch_size": 32})}
    others = {"data": data, **section("linear_official", lr=0.02, num_epochs=1)}
    whole, _, _ = evaluated(**settings)
    head = tmp_path / "out" / module.HEAD_FILE
    weight = torch.load(head, weights_only=True)["head"]["weight"]
    head.unlink()
    train_epoch = module.train_epoch

    def killed(probe, views, subject, classes, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(probe, views, subject, classes, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluated(**settings)
    resumed, _, log = evaluated(**settings)
    assert "after 2 epochs" in log
    assert resumed == whole
    assert torch.equal(torch.load(head, weights_only=True)["head"]["weight"], weight)
    assert "of another checkpoint, other data or settings" in evaluated(**others)[2]


def test_the_heads_steps_are_those_of_torchs_sgd_with_the_published_schedule(tmp_path):
    from dataclasses import asdict

    from moco.config.linear import LinearOfficialConfig
    from moco.evaluation.linear_official import OfficialProbe

    settings = asdict(LinearOfficialConfig(batch_size=128, weight_decay=0.01))
    probe = OfficialProbe(5, 3, settings, torch.device("cpu"), tmp_path / "head", "")
    assert 0.002 < probe.head.weight.std() < 0.02
    assert not probe.head.bias.any()
    rates = []
    for epoch in (0, 59, 60, 79, 80, 99):
        probe.begin_epoch(epoch)
        rates.append(probe.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([15, 15, 1.5, 1.5, 0.15, 0.15])  # half of 30 at half the batch
    own, features = nn.Linear(5, 3), torch.randn(4, 5)
    own.load_state_dict(probe.head.state_dict())
    loss = F.cross_entropy(own(features[:3]), torch.tensor([0, 2, 1]))
    loss.backward()
    torch.testing.assert_close(probe.step(features[:3], torch.tensor([0, 2, 1])), loss.detach())
    with torch.no_grad():
        own.weight -= 0.15 * (own.weight.grad + 0.01 * own.weight)
    torch.testing.assert_close(probe.head.weight.detach(), own.weight.detach())


def test_a_view_of_files_is_that_of_the_query_in_pretraining(image_tree):
    from moco.data.augment.views import ViewPair
    from moco.data.loading.loaders import LabelledViews, PairMaker
    from moco.data.sources.source import FileImages, Labelled

    (image_tree / "a" / "99.png").write_bytes(b"no image")
    paths = sorted(str(path) for path in image_tree.rglob("*.png"))
    bad = next(row for row, path in enumerate(paths) if path.endswith("99.png"))
    images, labels = FileImages(paths), np.arange(len(paths)) % 4
    operations = {
        "random_resized_crop": {"scale": [0.3, 1.0]},
        "horizontal_flip": {"probability": 0.5},
    }
    norm = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    views = LabelledViews(
        Labelled(images, labels),
        operations,
        "here",
        **norm,
        image_size=8,
        batch_size=7,
        seed=5,
        num_workers=0,
        device=torch.device("cpu"),
    )
    pair = ViewPair(operations, operations, **norm, image_size=8, seed=5)
    seen = []
    for views_of_batch, own, indices in views.epoch(3):
        for image, label, index in zip(views_of_batch, own.tolist(), indices.tolist(), strict=True):
            seen.append(index)
            if index == bad:
                assert label == -1
                continue
            batch = PairMaker(pair)([(index, images.opened(index), "")], 3)
            torch.testing.assert_close(
                image, pair.finished(batch.views, 3, batch.indices)[0][0], rtol=0, atol=0
            )
            assert label == labels[index]
    assert sorted(seen) == list(range(len(paths)))
    assert [index for _, _, rows in views.epoch(4) for index in rows.tolist()] != seen


def test_a_view_without_a_crop_names_the_setting(evaluated):  # noqa: F811
    with pytest.raises(
        InputError, match=r"evaluation.linear_official.view: random_resized_crop is missing"
    ):
        evaluated(**section("linear_official", view={"horizontal_flip": {}}))


def test_a_loss_that_is_not_finite_says_what_to_try(evaluated):  # noqa: F811
    with pytest.raises(
        RunError, match=r"not finite in epoch \d; try a lower evaluation.linear_official.lr"
    ):
        evaluated(**section("linear_official", lr=1e38, num_epochs=2))


def test_the_official_protocol_needs_a_test_part(evaluated, generator, tmp_path):  # noqa: F811
    data = archive(tmp_path / "x.npz", generator, np.arange(60) % 3)
    with pytest.raises(InputError, match="linear_official needs a test part"):
        evaluated(data=data, **section("linear_official", **OFFICIAL))
