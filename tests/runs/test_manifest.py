"""What a run depends on is kept with it: it resumes and exports as it began, or is refused with what differs."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file

from fedlora import resume, run
from fedlora.api import export
from fedlora.config.experiment import build
from fedlora.data.fingerprint import fingerprint
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.runs.manifest import Client, DataFingerprint, Examples, Manifest
from fedlora.runs.start import extend, read_folder

from rows import untimed
from tiny import LABELS, tiny_bert, tiny_rows

SETTINGS = {
    "model": "bert",
    "data": {"source": "rows.jsonl", "test": "test.jsonl"},
    "rounds": 1,
    "clients": {"count": 2, "partition": "iid"},
    "method": {"name": "fedsa-lora"},
    "train": {"max_length": 16, "device": "cpu"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, data and a finished run, begun there with relative paths."""
    home = tmp_path_factory.mktemp("home")
    tiny_bert(home / "bert")
    tiny_rows(home / "rows.jsonl", 24)
    tiny_rows(home / "test.jsonl", 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run(build(SETTINGS), "run")
    return home


@pytest.fixture
def changeable(home, tmp_path, monkeypatch) -> Path:
    """`home`, whose files are put back at the end; the working directory is another one."""
    shutil.copytree(home, tmp_path / "before")
    monkeypatch.chdir(tmp_path)
    yield home
    shutil.rmtree(home)
    shutil.copytree(tmp_path / "before", home)


def rewrite(path, change):
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def renamed(rows):
    return [{**row, "label": {"east": "zeast"}.get(row["label"], row["label"])} for row in rows]


def test_a_run_with_relative_paths_resumes_and_exports_from_another_working_directory(changeable, tmp_path):
    resume(changeable / "run")
    assert set(export(changeable / "run", "adapter", tmp_path / "out")) == {"000", "001"}
    saved = read_folder(changeable / "run")
    assert [Path(name).is_absolute() for name in (saved.model, saved.data.source, saved.data.test)] == [True] * 3


def test_an_export_needs_no_data_and_has_the_names_of_the_run(changeable, tmp_path):
    rewrite(changeable / "rows.jsonl", renamed)
    export(changeable / "run", "merged", tmp_path / "renamed", "001")
    for file in changeable.glob("*.jsonl"):
        file.unlink()
    export(changeable / "run", "adapter", tmp_path / "gone")
    config = json.loads((tmp_path / "renamed" / "config.json").read_text())
    assert tuple(config["id2label"].values()) == LABELS
    for client in ("000", "001"):
        before, after = (
            load_file(folder / client / "adapter_model.safetensors")
            for folder in (changeable / "run/adapter", tmp_path / "gone")
        )
        assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("rows.jsonl", renamed, "label 'east' of the run is now 'zeast'"),
        ("rows.jsonl", lambda rows: rows[:-1], "it has 24 training examples, found 23"),
        ("rows.jsonl", lambda rows: rows[::-1], "some of its 24 training examples have changed"),
        (
            "rows.jsonl",
            lambda rows: [{**rows[0], "text": "bab"}, *rows[1:]],
            "some of its 24 training examples have changed",
        ),
        ("test.jsonl", lambda rows: rows + rows[:1], "it has 9 test examples, found 10"),
        ("rows.jsonl", None, "no such file"),
    ],
)
def test_a_run_whose_data_have_changed_is_not_resumed(changeable, file, change, reason):
    before = {path: path.read_bytes() for path in (changeable / "run").rglob("*") if path.is_file()}
    private = json.loads((changeable / file).read_text().splitlines()[0])["text"]
    if change is None:
        (changeable / file).unlink()
    else:
        rewrite(changeable / file, change)
    if change is renamed:
        rewrite(changeable / "test.jsonl", renamed)
    with pytest.raises(UserError, match=reason) as rejected:
        resume(changeable / "run")
    assert private not in str(rejected.value) and "\n" not in str(rejected.value)
    assert {path: path.read_bytes() for path in (changeable / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "vocab.txt"])
def test_a_run_whose_model_has_changed_is_neither_resumed_nor_exported(changeable, tmp_path, file):
    content = (changeable / "bert" / file).read_bytes()
    (changeable / "bert" / file).write_bytes(content[:-1] + b" " if file == "model.safetensors" else content + b" ")
    for again in (lambda: resume(changeable / "run"), lambda: export(changeable / "run", "adapter", tmp_path / "out")):
        with pytest.raises(UserError, match=f"model = .*/bert' differs from that of the run: its {file} has changed"):
            again()


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (["a", "b", "d"], "label 'c' of the run is now 'd'"),
        (["b", "a", "c"], "label 'a' was number 0 and is now number 1"),
        (["a", "b"], r"it has 3 labels, found 2, without 'c'"),
        (["a", "b", "c", "d", "e", "f", "g"], "found 7, with 'd', 'e', 'f' and 1 more"),
    ],
)
def test_other_labels_are_refused_by_name(now, reason):
    was = DataFingerprint(
        labels=["a", "b", "c"],
        train=Examples(count=3, digest=""),
        test=Examples(count=1, digest=""),
        partition="",
        clients=[Client(id="0", rank=1, examples=3)],
    )
    manifest = Manifest(id="1", experiment={}, data=was, model={}, modules=[], environment="")
    manifest.require_data(was)
    with pytest.raises(UserError, match=reason):
        manifest.require_data(was.model_copy(update={"labels": now}))


def test_a_fingerprint_tells_every_value_their_columns_and_their_order():
    columns = {"text": ["a", "b", "ab"], "label": [0, 1, 1]}
    others = [
        {"text": ["b", "a", "ab"], "label": [1, 0, 1]},
        {"text": ["a", "b", "ab"], "label": [0, 1, 0]},
        {"text": ["a", "ba", "b"], "label": [0, 1, 1]},
        {"text_pair": ["a", "b", "ab"], "label": [0, 1, 1]},
        {"text": ["a", "b"], "label": [0, 1]},
    ]
    found = [fingerprint(datasets.Dataset.from_dict(table)) for table in (columns, *others)]
    assert len(set(found)) == len(found)
    assert fingerprint(datasets.Dataset.from_dict({"label": columns["label"], "text": columns["text"]})) == found[0]


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_of_a_method_is_written_out(name):
    written = tomllib.loads(build({"method": {"name": name}}).to_toml())["method"]
    defaults = {"name": name, "head": TABLE[name].head, "norms": TABLE[name].norms, "weights": TABLE[name].weights}
    wanted = {**defaults, **TABLE[name].settings()}
    assert written == {key: value for key, value in wanted.items() if value is not None}


def test_a_later_release_with_other_defaults_does_not_change_an_old_run(home, monkeypatch):
    monkeypatch.setitem(TABLE, "fedsa-lora", replace(TABLE["fedsa-lora"], head="averaged", norms=True))
    later, saved = build(SETTINGS).method, read_folder(home / "run").method
    assert (later.head, later.norms) == ("averaged", True)
    assert (saved.head, saved.norms, saved.rank) == ("local", False, 8)


def test_settings_that_are_none_are_kept_as_none(home):
    manifest = Manifest.find(home / "run")
    experiment = read_folder(home / "run")
    assert manifest is not None and manifest.experiment == experiment.model_dump(mode="json")
    assert manifest.experiment["train"]["clip_norm"] is None is manifest.experiment["data"]["labels"]


@pytest.mark.parametrize(
    ("line", "edited", "reason"),
    [
        ("seed = 0", "seed = 1", "seed = 1, in the run it is 0"),
        ("rank = 8", "rank = 4", "method.rank = 4, in the run it is 8"),
        ("rounds = 1", "", "rounds = None, in the run it is 1"),
        ("[train]", "[train]\nclip_norm = 1.0", "train.clip_norm = 1.0, in the run it is None"),
    ],
)
def test_an_edited_setting_is_refused_with_what_differs(changeable, tmp_path, line, edited, reason):
    file = changeable / "run" / "experiment.toml"
    file.write_text(file.read_text().replace(line, edited, 1))
    for again in (lambda: resume(changeable / "run"), lambda: export(changeable / "run", "adapter", tmp_path / "out")):
        with pytest.raises(UserError, match=reason):
            again()


def test_an_experiment_file_with_a_bit_flipped_or_cut_or_deleted_is_named(changeable):
    file = changeable / "run" / "experiment.toml"
    whole = file.read_bytes()
    digit = whole.index(b"rounds = ") + 9  # whoever raises it edits the file
    places = [at for at in range(0, len(whole), 7) if at != digit]
    bent = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in places]
    for content in [*bent, whole[: len(whole) // 2], whole[: whole.rindex(b"[train]")], b"", None]:
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=r"experiment\.toml"):
            read_folder(changeable / "run")


@pytest.mark.parametrize("override", ["train.lr=0.5", "rounds=0", "method.name=fedit", "data.rows=3"])
def test_a_resumed_run_may_have_more_rounds_and_no_other_change(changeable, override):
    before = (changeable / "run" / "experiment.toml").read_bytes()
    with pytest.raises(UserError, match="--set"):
        extend(changeable / "run", [override])
    assert (changeable / "run" / "experiment.toml").read_bytes() == before


@pytest.mark.parametrize("how", ["set", "edited"])
def test_a_run_of_one_round_raised_to_two_is_a_run_of_two(changeable, tmp_path, how):
    whole = run(build({**SETTINGS, "rounds": 2, "model": str(changeable / "bert")}, paths(changeable)), tmp_path / "whole")
    file = changeable / "run" / "experiment.toml"
    if how == "edited":
        file.write_text(file.read_text().replace("rounds = 1", "rounds = 2"))
    raised = resume(changeable / "run", overrides=["rounds=2"] if how == "set" else [])
    rows = [[untimed(row) for row in result.rows] for result in (whole, raised)]
    assert [row.round for row in rows[0]] == [0, 1, 2] and rows[0] == rows[1]
    for client, folder in whole.adapters.items():
        one, other = (load_file(path / "adapter_model.safetensors") for path in (folder, raised.adapters[client]))
        assert all(one[key].equal(other[key]) for key in one)
    manifest = Manifest.find(changeable / "run")
    assert read_folder(changeable / "run").rounds == 2 == tomllib.loads(file.read_text())["rounds"]
    assert manifest is not None and manifest.experiment["rounds"] == 2


def paths(home):
    return [f"data.source={home / 'rows.jsonl'}", f"data.test={home / 'test.jsonl'}"]
