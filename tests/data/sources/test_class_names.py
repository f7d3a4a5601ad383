"""A class without a name is "class 3" wherever people read it, and stays a number in files."""

import numpy as np
import pytest

from moco.cli.closing_tables import metric_in_words, rows_of_segmentation
from moco.data.sources.source import ArrayImages, Labelled, classes_in_words
from moco.evaluation.knn_measurement import class_tables
from moco.evaluation.reports.cards import shown_name
from moco.evaluation.reports.embedded import Embedded
from moco.evaluation.reports.segmentation_plots import shown_names
from moco.evaluation.segmenter_measurement import table_of_classes

NUMBERS = ["0", "1", "2"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (NUMBERS, ["class 0", "class 1", "class 2"]),
        (["sky", "1", "2"], ["sky", "1", "2"]),  # names that somebody gave
        (["1", "2", "3"], ["1", "2", "3"]),
        ([], []),
    ],
)
def test_numbers_become_words_and_names_stay(names, expected):
    assert classes_in_words(names) == expected
    assert classes_in_words(tuple(names)) == expected


def labelled(class_names, label_sets=None):
    images = ArrayImages(np.zeros((3, 8, 8), np.uint8), "black")
    return Labelled(images, np.arange(3), class_names, label_sets)


def test_labels_are_called_by_name_or_by_class_and_number():
    nameless, named = labelled(None), labelled(("cat", "2"))
    assert [nameless.label_name(number) for number in (0, 11, -1)] == ["class 0", "class 11", "-1"]
    assert [named.label_name(number) for number in (0, 1, 2)] == ["cat", "2", "class 2"]
    both = labelled(None, np.array([[True, False, True]]))
    assert both.label_name(0) == "class 0 + class 2"
    # What is written to files stays as it is.
    assert nameless.class_name(11) == "11"


def test_tables_and_plots_say_the_same():
    figures = {"segment/miou": 0.5}
    for number in NUMBERS:
        figures |= {f"segment/iou/{number}": 0.25, f"segment/dice/{number}": 0.4}
    rows = rows_of_segmentation(figures, NUMBERS)
    assert [name for name, _ in rows[1:]] == [f"IoU, class {number}" for number in NUMBERS]
    assert first_column(table_of_classes(NUMBERS, figures)) == ["class 0", "class 1", "class 2"]
    assert shown_names(NUMBERS) == ["class 0", "class 1", "class 2"]
    assert metric_in_words("iou/1") == "IoU of class 1"
    assert metric_in_words("dice/disc") == "Dice of disc"

    embedded = Embedded(np.zeros((3, 2)), np.arange(3), labelled(None), np.arange(3))
    assert embedded.shown_class(1, most=2) == "class 1"  # a cut number would be another one
    assert shown_name("写真", 1) == "class 1"
    names = [embedded.labelled.class_in_words(number) for number in range(2)]
    worst, confused = class_tables(names, np.array([[3, 1], [0, 4]]))
    assert first_column(worst) == ["class 0", "class 1"]
    assert first_column(confused) == ["class 0"]


def first_column(table):
    return [str(cell) for cell in table.columns[0].cells]
