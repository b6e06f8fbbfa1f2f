import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^# --- same in: (.+) \[(.+)\] ---$(.*?)^# --- end \[\2\] ---$", re.M | re.S)


def test_fenced_copies_are_the_same_in_all_files_that_they_name():
    found = {}
    for path in ROOT.glob("*.py"):
        for others, name, text in FENCE.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, {})[path.name] = ({*others.split(", "), path.name}, text)
    assert "checkpoint files" in found
    for name, copies in found.items():
        texts = {text for _, text in copies.values()}
        assert len(texts) == 1, f"[{name}] differs between {sorted(copies)}"
        assert all(files == set(copies) for files, _ in copies.values()), f"[{name}] is not where its fences say"
