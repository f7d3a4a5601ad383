"""Where TensorBoard shows the figures of a run."""

import re

from moco.training.board_layout import charts_of, layout_of, tag_of


def test_a_tag_is_the_name_of_the_figure_behind_its_group():
    assert tag_of("train/loss") == "1_main/1_train/loss"
    assert tag_of("images_per_second") == "1_main/6_images_per_second"
    assert tag_of("label_free/rank_me") == "2_health/label_free/rank_me"
    assert tag_of("data_wait") == "3_time/data_wait"
    assert tag_of("time/data_wait") == "3_time/time/data_wait"
    assert tag_of("gradient_norm/projector") == "4_debug/gradient_norm/projector"
    assert tag_of("image_truth_prediction/3") == "1_main/7_image_truth_prediction/3"
    for of_a_user in ("accuracy", "train/accuracy", "epoch", "mine/knn/top1"):
        assert tag_of(of_a_user) == of_a_user


def test_the_first_cards_are_loss_score_learning_rate_accuracy_and_speed():
    """TensorBoard sorts its cards by tag, and makes groups of what is before the first slash."""
    names = [
        "data_wait", "images_per_second", "train/loss_of_chance", "gradient_norm/projector",
        "contrast/top5", "knn/top1", "train/loss", "epoch/loss", "train/learning_rate",
        "time/steps", "contrast/top1", "label_free/rank_me", "encoder_distance/projector",
    ]  # fmt: skip
    tags = sorted(map(tag_of, names))
    assert tags[:6] == [
        "1_main/1_train/loss",
        "1_main/2_knn/top1",
        "1_main/3_train/learning_rate",
        "1_main/4_contrast/top1",
        "1_main/5_contrast/top5",
        "1_main/6_images_per_second",
    ]
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in tags))
    assert groups == ["1_main", "2_health", "3_time", "4_debug"]


def test_the_overlaid_charts_have_tags_that_runs_write():
    for score in ("knn/top1", "segment/miou"):
        charts = {
            title: tags for part in layout_of(score).values() for title, (_, tags) in part.items()
        }
        names = {
            title: found for part in charts_of(score).values() for title, found in part.items()
        }
        for title, tags in charts.items():
            for tag, name in zip(tags, names[title], strict=True):
                written = name.replace(".*", "a class")
                assert re.fullmatch(tag, tag_of(written)), tag
    assert charts_of("knn/top1")["Is it learning?"]["loss, and the loss of chance"] == [
        "train/loss",
        "train/loss_of_chance",
    ]
