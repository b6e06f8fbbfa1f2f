import os

import pytest

# Test processes share the cores: threads that spin while they wait for each other made single tests 40 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Tests kill processes, never the machine, so that nothing is lost that the disk has not yet written."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
