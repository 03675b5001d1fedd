"""Folders and tables of images without splits: what is read, how it is divided, and that it is the same next time."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import MARKET
from PIL import Image

from relreid_plugin.cli.main import main
from relreid_plugin.data.names import name_pattern
from relreid_plugin.data.unsplit import is_local, read_local, read_unsplit_folder
from relreid_plugin.errors import UserError

FORMS = {
    "flat": "{who}_c{camera}_{shot}.png",
    "folders": "{who}/c{camera}_{shot}.png",
    "cameras": "{who}/c{camera}/{shot}.png",
}


def scene(folder, form, *, people=6, shots=2):
    """Two cameras, some shots of everyone under each."""
    for who in range(1, people + 1):
        for camera in (1, 2):
            for shot in range(shots):
                path = folder / form.format(who=f"p{who:02d}", camera=camera, shot=shot)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 8), (who, camera, shot)).save(path)
    return folder


def table(place, folder, *, columns=("path", "pid", "camid", "time"), leave_out=()):
    lines = [",".join(columns)]
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        who, camera, _ = path.stem.split("_")
        row = {"path": f"{folder.name}/{path.name}", "pid": who, "camid": camera, "split": ""}
        row["time"] = "" if number in leave_out else f"2024-05-01T12:{30 * (number % 2) + number // 2:02d}:00"
        lines.append(",".join(row[column] for column in columns))
    place.write_text("\n".join(lines) + "\n")
    return place


def placed(splits):
    """Split to identity, camera and place of every image, by what is written."""
    names = splits.identity_names
    parts = {"query": splits.query, "gallery": splits.gallery}
    found = {split: [(names[pid], camid, path) for path, pid, camid in items] for split, items in parts.items()}
    return {**found, "train": [(splits.train_identities[label], camid, path) for path, label, camid in splits.train]}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_in_any_form_and_a_table_are_divided_alike(form, tmp_path):
    folder = scene(tmp_path / form, FORMS[form])
    assert is_local(folder, "camera") and not is_local(folder)
    found = placed(read_local(folder, rule="identity", train=True))
    assert {split: len(items) for split, items in found.items()} == {"train": 12, "query": 6, "gallery": 6}
    trained, tested = ({who for who, *_ in items} for items in (found["train"], found["query"]))
    assert len(trained) == len(tested) == 3 and not trained & tested
    for split in found:
        for who, camera, path in found[split]:
            assert who in path and f"c{camera + 1}" in path
    if form == "flat":
        short = lambda parts: {split: [item[0] + item[2][-10:] for item in items] for split, items in parts.items()}  # noqa: E731
        rows = table(tmp_path / "t.csv", folder)
        assert short(placed(read_local(rows, rule="identity", train=True))) == short(found)


def test_every_rule_finds_its_parts(tmp_path):
    folder = scene(tmp_path / "flat", FORMS["flat"])
    rows = table(tmp_path / "t.csv", folder)
    by = {rule: placed(read_local(rows, rule=rule)) for rule in ("image", "camera", "time")}
    files = lambda rule, split: {path for *_, path in by[rule][split]}  # noqa: E731
    assert files("image", "query") == files("image", "gallery") and len(files("image", "query")) == 24
    assert len(files("camera", "query")) == 12 and not files("camera", "query") & files("camera", "gallery")
    assert files("time", "train") == files("time", "gallery") and all(
        path.endswith("_0.png") for path in files("time", "train")
    )
    assert not by["image"]["train"] and not by["camera"]["train"]


def test_parts_are_those_of_the_file_beside_the_images_until_the_images_change(tmp_path):
    folder = scene(tmp_path / "flat", FORMS["flat"])
    first = read_local(folder, rule="camera")
    kept = tmp_path / "flat.split-camera.json"
    assert f"(12 query, 12 gallery), as written into '{kept}'" in first.notes[0] and first.rule == "camera"
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps({**content, "query": content["query"][1:]}))  # what is written counts, not what is drawn
    again = read_local(folder, rule="camera")
    assert again.query == first.query[1:] and f"as '{kept}' says (11 query" in again.notes[0] and len(again.notes) == 1
    Image.new("RGB", (40, 80)).save(folder / "p01_c1_0.png")
    assert "images of" in read_local(folder, rule="camera").notes[1]
    (folder / "notes.txt").write_text("no image")
    assert read_local(folder, rule="camera").query == again.query
    for change in (
        lambda: Image.new("RGB", (4, 8)).save(folder / "p01_c1_9.png"),
        lambda: (folder / "p02_c1_0.png").unlink(),
    ):
        change()
        with pytest.raises(UserError, match=r"divides other images \(24 rows\).*take it away"):
            read_local(folder, rule="camera")
    (folder / "p01_c1_9.png").rename(folder / "p02_c1_0.png")
    assert read_local(folder, rule="camera").query == again.query
    kept.write_text(json.dumps({**content, "query": [24]}))
    with pytest.raises(UserError, match="damaged"):
        read_local(folder, rule="camera")


def test_what_cannot_be_divided_is_refused_in_a_sentence(tmp_path):
    folder = scene(tmp_path / "flat", FORMS["flat"], people=3, shots=1)
    rows = table(tmp_path / "t.csv", folder, leave_out=(1, 4))
    for place, options, words in (
        (rows, {}, "may be missing where 'data.split_rule' divides it"),
        (rows, {"rule": "time"}, "2 of 6 images of .* have none"),
        (folder, {"rule": "time"}, "needs times"),
        (folder, {"rule": "image", "train": True}, "leaves no training images; take identity or time"),
        (folder, {"rule": "identity"}, "3 identities"),
        (folder, {"rule": "camara"}, "did you mean 'camera'"),
        (table(tmp_path / "odd.csv", folder, columns=("path", "pid", "split"), leave_out=()), {}, "'split' is empty"),
    ):
        with pytest.raises(UserError, match=words):
            read_local(place, **options)
    (tmp_path / "bad.csv").write_text((tmp_path / "t.csv").read_text().replace("12:01:00", "noon"))
    with pytest.raises(UserError, match=r"bad.csv, line 4: the column 'time' holds '2024-05-01Tnoon'"):
        read_local(tmp_path / "bad.csv", rule="time")
    scene(folder, FORMS["cameras"], people=1)
    with pytest.raises(UserError, match=r"lies in 0 folders and .* elsewhere"):
        read_local(folder, rule="image")
    assert len(read_unsplit_folder(folder, name_pattern(r"(?:p\d+/)?(?:c\d/)?(?P<identity>\w+)"))[0]) == 10
    (tmp_path / "half" / "train").mkdir(parents=True)
    assert not is_local(tmp_path / "half", "image")
    assert not list(tmp_path.glob("*.split-*"))


def test_splits_of_its_own_are_kept_and_it_says_so(tiny_root):
    folder = tiny_root / "embedded_persons_tiny" / MARKET
    found, wanted = read_local(folder, rule="image"), read_local(folder)
    assert (found.query, found.train, found.rule) == (wanted.query, wanted.train, "")
    assert "does nothing here" in found.notes[-1] and not list(folder.parent.glob("*.split-*"))


def test_a_folder_without_splits_trains_is_tested_and_shown(tiny_root, tiny_config, tmp_path, command, capsys):
    source = tiny_root / "embedded_persons_tiny" / MARKET / "bounding_box_test"
    (tmp_path / "people").mkdir()
    for path in source.glob("[0-9]*.jpg"):
        if not path.name.startswith("0000"):
            shutil.copy(path, tmp_path / "people")
    words = [
        "--config-file",
        tiny_config,
        "-s",
        "people",
        "-t",
        "people",
        "data.root",
        tmp_path,
        "data.save_dir",
        tmp_path / "run",
    ]
    words += ["train.max_epoch", "0", "train.stages", "[1]", "relation.attention", "none", "train.val_fraction", "0"]
    code, _, said = command(*words)
    assert (
        code == 2 and said.count("\n") == 1 and "has no splits; name the rule that divides it by 'data.split_rule'" in said
    )
    code, said, _ = command(*words, "data.split_rule", "identity")
    assert code == 0 and "is divided by the rule 'identity'" in said
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert main(["test", "--config-file", str(tmp_path / "run" / "config.yml")]) == 0
    assert f"is divided as '{tmp_path / 'people.split-identity.json'}' says" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"][0]["mAP"] == rows[0]["mAP"]


def test_a_folder_without_training_images_is_tested_and_not_trained(tmp_path, capsys):
    from relreid_plugin.host import open_dataset, resolve_dataset

    folder = scene(tmp_path / "flat", FORMS["flat"], people=2)
    resolve_dataset("flat", tmp_path, split_rule="image")
    options = {"root": tmp_path, "cache_dir": tmp_path, "verbose": False}
    found = open_dataset("flat", **options, mode="query")
    assert (len(found.train), len(found.query), len(found.gallery)) == (0, 8, 8)
    with pytest.raises(UserError, match="leaves no training images"):
        open_dataset("flat", **options, mode="train")
    assert main(["data", "show", str(folder), "--out", str(tmp_path / "x.png")]) == 2
    assert "--split-rule (image, identity, camera, time)" in capsys.readouterr().err
    assert main(["data", "show", str(folder), "--out", str(tmp_path / "x.png"), "--split-rule", "image"]) == 0
    assert "is divided as" in (said := capsys.readouterr().out) and "8 images of 2 identities" in said
