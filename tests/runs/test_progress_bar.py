"""How far a long pass over images is."""

import io

from rich.console import Console

from moco.runs.progress_bar import image_progress


def test_a_terminal_shows_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with image_progress(console, "embedding", 100, 1000) as say:
        say(400)
    shown = console.file.getvalue()
    assert "embedding" in shown
    assert " 400/1000" in shown


def test_elsewhere_there_is_a_line_from_time_to_time(monkeypatch, caplog):
    caplog.set_level("INFO")
    times = iter([0.0, 30.0, 60.0, 90.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times, 90.0))
    console = Console(file=io.StringIO())
    progress = image_progress(console, "embedding", 1000, 10000)
    times = iter([0.0, 30.0, 60.0, 90.0])
    with progress as say:
        for done in (1000, 1600, 1900):
            say(done)
    assert console.file.getvalue().strip() == ""
    assert caplog.messages == ["embedding: 1,600 of 10,000 images, 10 per second, 14 minutes left"]
