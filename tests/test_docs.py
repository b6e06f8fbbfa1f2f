"""The pages for people: lines and tables that can be read, links that lead somewhere, every flag and tag known."""

import ast
import csv
import functools
import json
import re
from pathlib import Path

import pytest

import collect_data
import hyper_mappo
import pretrain_vae
import world_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HISTORY = ROOT / "docs/results/history.md"  # may name flags of earlier versions
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "benchmark").glob("*.py")]
TRAINING = ("hyper_mappo.py", "pretrain_vae.py", "world_model.py")
METRICS = ROOT / "docs/metrics.md"
LONGEST_LINE, LONGEST_CELL = 200, 100
TAG = re.compile(r"\b(charts|losses|hyper|nonstationarity|eval|eval_policies|heldout_losses|vq)/(\w+)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Flags of torchrun, TensorBoard and of every program
FOREIGN = set(
    "--standalone --nproc-per-node --nnodes --rdzv-backend --rdzv-endpoint --index-url --logdir --help".split()
)


def for_each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


# ---------------------------------------------------------------- reading pages


def read(file):
    return file.read_text(encoding="utf-8")


def without_code(text):
    """A page's text without fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def table_cells(text):
    """The cells of all tables of a page."""
    cells = []
    for line in without_code(text).splitlines():
        row = line.strip()
        if row.startswith("|"):
            cells += [cell.strip() for cell in row.strip("|").split("|")]
    return cells


def is_sentence(cell):
    """More than a phrase: it ends like a sentence, goes on after one, or is as long as one."""
    goes_on = re.search(r"[a-z)`][.!?] [A-Z]", cell) is not None
    return goes_on or cell.endswith(".") or len(cell) > LONGEST_CELL


def anchors(text):
    """The anchors that GitHub gives a page's headings."""
    found, times = set(), {}
    for heading in re.findall(r"^#+ +(.+)$", without_code(text), flags=re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        anchor = words.replace(" ", "-")
        number = times.get(anchor, 0)
        times[anchor] = number + 1
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def dead_links(page):
    """Links and pictures to files or headings that are not there. Addresses of the web are not looked at."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            dead.append(target)
        elif anchor and anchor not in anchors(read(file)):
            dead.append(target)
    return dead


def command_lines(text):
    """(script, what follows it) for every script that is named with arguments in a code span or block."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", without_code(text))
    lines = [line for block in blocks for line in block.splitlines()] + spans
    commands = []
    for line in lines:
        match = re.search(r"([\w/]+\.py)(\s[^#&]*)", line)
        if match:
            commands.append((match[1], match[2].strip()))
    return commands


def section(text, heading):
    """The part of a page under a heading of the second level."""
    match = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert match, f"no section {heading}"
    return match[1]


def is_explained(name, text):
    """Whether a tag or column stands in a section as code, alone or as one of a family like `eval_policies/NAME`."""
    known = set(re.findall(r"`([^`]+)`", text))
    for family, same_as in (("heldout_losses/", "losses/"), ("eval_policies/", "eval/")):
        if name.startswith(family) and family + "NAME" in known:
            name = same_as + name.removeprefix(family)
    if re.fullmatch(r"charts/return_seat_\d*", name):
        name = "charts/return_seat_i"
    name = re.sub(r"^partners/(draws|return_of|return_with)_.*", r"partners/\1_NAME", name)
    return name in known


# ---------------------------------------------------------------- reading scripts


@functools.cache
def flags_of(script):
    """The flags of a script with an Args of its own: the fields of all its ...Args, and --no-... of its switches."""
    classes = [node for node in ast.parse(read(script)).body if isinstance(node, ast.ClassDef)]
    if "Args" not in [node.name for node in classes]:
        return set()
    flags = set()
    for node in classes:
        if not node.name.endswith("Args"):
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign):
                continue
            name = field.target.id.replace("_", "-")
            flags.add(f"--{name}")
            if "bool" in ast.unparse(field.annotation):
                flags.add(f"--no-{name}")
    return flags


def tags_of(source):
    """The TensorBoard tags in a script's strings; of f"charts/return_seat_{i}" what comes before the brace."""
    tags = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            tags.update(match[0] for match in TAG.finditer(node.value))
    return tags


# ---------------------------------------------------------------- the pages


@for_each(PAGES)
def test_lines_are_not_too_long(page):
    lines = read(page).splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE] == []


@for_each(PAGES)
def test_no_table_cell_holds_a_sentence(page):
    assert [cell for cell in table_cells(read(page)) if is_sentence(cell)] == []


@for_each(PAGES)
def test_links_and_pictures_lead_somewhere(page):
    assert dead_links(page) == []


@for_each([page for page in PAGES if page != HISTORY])
def test_named_flags_exist(page):
    text = read(page)
    known = FOREIGN.union(*(flags_of(script) for script in SCRIPTS))
    assert set(FLAG.findall(text)) - known == set()
    for script, arguments in command_lines(text):
        own = flags_of(ROOT / script) if (ROOT / script).exists() else set()
        if own:
            assert set(FLAG.findall(arguments)) - own - {"--help"} == set(), f"{script} {arguments}"


def test_readme_gives_the_first_command_on_the_first_screen():
    lines = read(ROOT / "README.md").splitlines()
    command = "python hyper_mappo.py --env-id pursuit --agent-id --track"
    first = next(i for i, line in enumerate(lines) if command in line)
    assert first < 15 and not any("![" in line for line in lines[:first])


def test_readers_path_names_what_is_there():
    path = section(read(ROOT / "docs/hyper_mappo.md"), "Reader's path")
    files = [ROOT / "hyper_mappo.py", ROOT / "runs.py", ROOT / "envs/__init__.py"]
    sources = "\n".join(read(file) for file in files)
    names = {name for code in re.findall(r"`([^`]+)`", path) for name in re.findall(r"[A-Za-z_]\w+", code)}
    assert len(names) > 10
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", sources)] == []


@pytest.mark.parametrize("script", TRAINING)
def test_every_tag_in_a_script_is_explained(script):
    tags = tags_of(read(ROOT / script))
    assert tags
    explanations = section(read(METRICS), script)
    assert [tag for tag in sorted(tags) if not is_explained(tag, explanations)] == []


# ---------------------------------------------------------------- what runs write


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    policies = ("nearest_stag", "nearest_hare", "random")
    fields = {"env_id": "stag_hunt", "num_steps": 1500, "num_envs": 16, "policies": policies, "name": "hunt"}
    collect_data.main(collect_data.Args(**fields, data_dir=str(folder), cuda=False))
    return str(folder / "hunt")


def first_line(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return next(csv.reader(lines))


def assert_explained(names, script):
    """Each name is explained, or is a number of eval/ that a file gives by group."""
    explanations = section(read(METRICS), script)
    known = [name for name in names if is_explained(name, explanations) or is_explained(f"eval/{name}", explanations)]
    assert [name for name in names if name not in known] == []


def test_what_hyper_mappo_writes_is_explained(tmp_path):
    sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 64, "hidden_size": 8}
    fields = {"env_id": "stag_hunt", "partners": ("random:1",), "eval_episodes": 1, "cuda": False}
    run_dir = hyper_mappo.main(hyper_mappo.Args(**sizes, **fields, runs_dir=str(tmp_path)))
    assert_explained(first_line(run_dir / "metrics.csv"), "hyper_mappo.py")
    assert_explained(json.loads((run_dir / "eval.json").read_text()), "hyper_mappo.py")


@pytest.mark.parametrize("model", ["cvae", "vqvae"])
def test_what_pretrain_vae_writes_is_explained(model, data_dir, tmp_path):
    sizes = {"hidden_size": 16, "history_size": 8, "latent_size": 4, "epochs": 1, "batch_size": 256}
    fields = {"data": data_dir, "model": model, "loss": "both", "holdout_policies": ("random",), "cuda": False}
    run_dir = pretrain_vae.main(pretrain_vae.Args(**sizes, **fields, runs_dir=str(tmp_path)))
    for file in ("metrics.csv", "moa_eval_epoch1.csv", "probe.csv"):
        assert_explained(first_line(run_dir / file), "pretrain_vae.py")


def test_what_world_model_writes_is_explained(data_dir, tmp_path):
    fields = {"data": data_dir, "loss": "latent", "total_updates": 2, "hidden_size": 8, "holdout_policies": ("random",)}
    run_dir = world_model.main(world_model.Args(**fields, cuda=False, runs_dir=str(tmp_path)))
    assert_explained(first_line(run_dir / "metrics.csv"), "world_model.py")


# ---------------------------------------------------------------- these checks can fail


def test_checks_of_pages_find_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    text = "# A page, to read\n\n## Same\n\n## Same\n\n"
    text += "[a](#a-page-to-read) [b](#same-1) [c](#same-2) [d](gone.md) ![e](gone.png)\n"
    page.write_text(text)
    assert dead_links(page) == ["#same-2", "gone.md", "gone.png"]
    assert is_sentence("It does this.") and is_sentence("one thing. Another") and is_sentence("x" * 101)
    assert not is_sentence("mean of 3.5 steps, e.g. a walk") and not is_sentence("")
    assert table_cells("| a | b |\n|---|---|\n```\n| c |\n```\n") == ["a", "b", "---", "---"]


def test_checks_of_names_find_what_is_wrong():
    assert command_lines("`python a.py --b` and\n```\npython c.py \\\n  --d  # --e\n```\n") == [
        ("c.py", "--d"),
        ("a.py", "--b"),
    ]
    assert tags_of('x = "losses/a eval/b"\ny = f"charts/seat_{i}"\nz = {f"losses/{name}": 1}') == {
        "losses/a",
        "eval/b",
        "charts/seat_",
    }
    text = "`losses/a` and `heldout_losses/NAME`"
    assert is_explained("losses/a", text) and is_explained("heldout_losses/a", text)
    assert not is_explained("losses/b", text) and not is_explained("heldout_losses/b", text)
    assert not is_explained("eval_policies/a", text)
    assert {"--track", "--no-track", "--num-envs"} <= flags_of(ROOT / "hyper_mappo.py")
    assert "--no-num-envs" not in flags_of(ROOT / "hyper_mappo.py")
