"""Named bars of long work, and lines of the log in their place."""

import io
import threading
import time

import pytest

import moco.phases
from moco.phases import bar_line, clock, counted, phase
from moco.screen import new_console, screen


@pytest.fixture
def shown(monkeypatch, caplog):
    """What the screen has drawn, as a terminal of 80 columns sees it."""
    caplog.set_level("INFO")
    file = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen, "is_on", True)
    monkeypatch.setattr(type(screen), "is_terminal", True)
    monkeypatch.setattr(screen, "_console", new_console(file=file, force_terminal=True, width=80))
    yield file
    screen.clear()


def wait_for(found):
    """Wait until `found` returns true."""
    for _ in range(500):
        if found():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


def test_a_short_phase_draws_nothing(shown):
    assert list(counted([1, 2, 3], "embedding", 3)) == [1, 2, 3]
    assert shown.getvalue() == ""


def test_a_long_phase_draws_a_named_bar_even_if_it_counts_nothing(shown, monkeypatch):
    monkeypatch.setattr(moco.phases, "SECONDS_WITHOUT_BAR", 0.01)
    with phase("listing a[/b]", 1000, start=100) as say:
        say(400)
        wait_for(lambda: "listing a[/b]" in shown.getvalue())
        assert "400 of 1,000 images" in shown.getvalue()
    with phase("t-SNE map", unit=""):
        wait_for(lambda: "t-SNE map" in shown.getvalue())
        assert "0:00" in shown.getvalue()


def test_elsewhere_there_is_a_line_of_the_log_from_time_to_time(caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(screen, "is_on", True)
    monkeypatch.setattr(moco.phases, "SECONDS_WITHOUT_LINE", 0.02)
    monkeypatch.setattr(moco.phases, "SECONDS_BETWEEN_LINES", 0.02)
    with phase("embedding", 10_000, start=1000) as say:
        say(1900)
        wait_for(lambda: len(caplog.messages) > 1)
    assert caplog.messages[0].startswith("embedding: 1,900 of 10,000 images, ")
    assert "/s, ETA 0:" in caplog.messages[0]


def test_inside_somebody_elses_program_nothing_is_shown(caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(screen, "is_on", False)
    threads = threading.active_count()
    with phase("embedding", 10) as say:
        say(5)
        assert threading.active_count() == threads
    assert not caplog.messages


def test_a_narrow_line_loses_its_least_important_fields():
    fields = [
        (0, "427/936"),
        (1, "loss 1.72"),
        (4, "407 img/s"),
        (2, "ETA 5:12"),
        (3, "kNN 40.5 %"),
    ]
    shown = {}
    for width in (140, 80, 60, 40, 16):
        console = new_console(file=io.StringIO(), width=width)
        console.print(bar_line("epoch 3/12", 427, 936, fields, width))
        shown[width] = console.file.getvalue().rstrip("\n")
        assert "\n" not in shown[width]
    assert shown[80].endswith("427/936  loss 1.72  407 img/s  ETA 5:12  kNN 40.5 %")
    # A bar of 40 columns, of which the part to come is invisible without colours.
    assert shown[140].index("427") == len("epoch 3/12 ") + 40 + 1
    assert shown[60].endswith("427/936  loss 1.72  ETA 5:12  kNN 40.5 %")
    assert shown[40].endswith("427/936  loss 1.72")
    console = new_console(file=io.StringIO(), width=40)
    console.print(bar_line("listing " + "/folder" * 20, 0, None, [(0, "5 images")], 40))
    assert console.file.getvalue().startswith("listing /folder/fold ")
    assert console.file.getvalue().endswith("5 images\n")


def test_a_terminal_without_unicode_gets_a_bar_of_ascii():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = new_console(file=file, width=80, force_terminal=True)
    console.print(bar_line("packing", 5, 10, [(0, "5 of 10 images")], 80))
    file.flush()
    assert b"----" in file.buffer.getvalue()


def test_durations():
    durations = [clock(seconds) for seconds in (-1, 5, 312, 3912, 90_000)]
    assert durations == ["0:00", "0:05", "5:12", "1 h 05 m", "1 d 1 h"]
