import math
import re
from dataclasses import fields
from pathlib import Path

import pytest

import collect_data
import hyper_mappo
import pretrain_vae
import test_obs_reward_model
import world_model

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^# --- same in: ([^\n]+) \[([^\n]+)\] ---$(.*?)^# --- end \[\2\] ---$", re.M | re.S)


def test_fenced_copies_are_the_same_in_all_files_that_they_name():
    found = {}
    for path in ROOT.glob("*.py"):
        for others, name, text in FENCE.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, {})[path.name] = ({*others.split(", "), path.name}, text)
    assert {"checkpoint files", "limits"} <= set(found)
    for name, copies in found.items():
        texts = {text for _, text in copies.values()}
        assert len(texts) == 1, f"[{name}] differs between {sorted(copies)}"
        assert all(files == set(copies) for files, _ in copies.values()), f"[{name}] is not where its fences say"


@pytest.mark.parametrize("script", [collect_data, hyper_mappo, pretrain_vae, test_obs_reward_model, world_model])
def test_every_number_has_its_limits(script):
    """A flag that is added without limits would pass -1 or NaN to whatever reads it."""
    checked_elsewhere = {"hyper_rank", "heldout_fraction"}  # its limit depends on the form; dataset.split_episodes
    numbers = {f.name for f in fields(script.Args) if f.type.split(" | ")[0] in ("int", "float")} - checked_elsewhere
    limited = [name for _, names in script.LIMITS.values() for name in names.split()]
    assert sorted(limited) == sorted(numbers)
    for limit, (holds, names) in script.LIMITS.items():
        assert not holds(math.nan) and not holds(-1), limit
        for name in names.split():
            with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be {limit}, got -1"):
                script.check_limits(script.Args(**{name: -1}), script.LIMITS)
    script.check_limits(script.Args(), script.LIMITS)
    if "max_grad_norm" in numbers:  # infinity means no clipping
        script.check_limits(script.Args(max_grad_norm=math.inf), script.LIMITS)
