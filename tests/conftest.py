import os

import pytest

import startup  # noqa: F401  test processes share the cores: with threads that spin a test took 40 times as long

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Tests kill processes, never the machine, so that nothing is lost that the disk has not yet written."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
