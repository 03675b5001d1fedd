"""Configurations and records on disk: read whole, or refused in one sentence that names line and key."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
import yaml
from conftest import ROOT

from relreid_plugin.cli.train import main
from relreid_plugin.config.defaults import _flat, get_default_config, merge_from_file, merge_from_list
from relreid_plugin.data.embedded import dataset
from relreid_plugin.data.images import taken_at
from relreid_plugin.engine import loggers, resume
from relreid_plugin.engine.resume import finished_metrics
from relreid_plugin.engine.runner import read_metrics
from relreid_plugin.errors import UserError
from relreid_plugin.features import verified
from relreid_plugin.reading import MOST_VALUES, read_json, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi")
)


MERGED = {"relation.train.seed": 4, "train.seed": 3, "train.lr": 1.0}


def write(folder, text):
    path = folder / "c.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text,words",
    [
        ("train: {lr: 1}\ntrain: {lr: 2}\n", r"'train' comes twice, in lines 1 and 2"),
        ("train:\n  lr: 1\n  max_epoch: 3\n  lr: 2\n", r"'lr' comes twice, in lines 2 and 4"),
        ("relation:\n  train:\n    bank: {a: 1, a: 2}\n", r"'a' comes twice"),
        ("train: {'lr': 1, lr: 2}\n", "comes twice"),
        (BOMB, "values, aliases counted"),
        (MERGE_BOMB, "values, aliases counted"),
        ("a: &a [*a]\n", "inside of what it repeats"),
        ("a: &a {b: *a}\n", "inside of what it repeats"),
        ("data: *nothing\n", "undefined alias|nothing"),
        ("a: " + "[" * 20_000, "nested more than"),
        ("a: " + "{b: " * 20_000, "nested more than"),
        ("- " * 20_000, "nested more than"),
        ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 300)), "nested more than"),
        ("x: [" + "1," * (MOST_VALUES + 1) + "]\n", "more than 10,000 values"),
        ("train: 3\n", "'train' must hold keys of its own"),
        ("train:\n", "'train' must hold keys of its own"),
        ("train: [lr, 3]\n", "'train' must hold keys of its own"),
        ("just words\n", "must be a YAML mapping"),
        ("- a\n- b\n", "must be a YAML mapping"),
        ("1: 2\n", "line 1.*key '1' is no text"),
        ("train: {yes: 2}\n", "key 'yes' is no text"),
        ("train: {null: 2}\n", "is no text"),
        ("? [a, b]\n: 2\n", "of several values is no text"),
        ("train: {lr: 1}\n---\ntrain: {lr: 2}\n", "second document"),
        ("train: {lr: !!python/object/apply:os.system ['true']}\n", "tag .* is not read"),
        ("train: {lr: !!python/name:os.system }\n", "tag .* is not read"),
        ("data: {save_dir: !!binary aGk=}\n", "tag .* is not read"),
        ("a: !mine x\n", "tag '!mine' is not read"),
        ("train: {lr: !!bool maybe}\n", "not a YAML file"),
        ("train: {seed: !!int x}\n", "not a YAML file"),
        ("train:\n\tlr: 1\n", "line 2.*a tab; indent with spaces"),
        ("train: {lr: 1\n", "not a YAML file"),
        ("train: {seed: 010}\n", "'010' is a number in base 8"),
        ("train: {seed: 1:30}\n", "'1:30' is a number in base 60"),
        ("train: {lr: 1:30.5}\n", "base 60"),
        ("train: {seed: " + "9" * 5000 + "}\n", "not a YAML file"),
        (b"train: {lr: 1}\0\n", "not a YAML file"),
        (b"train: {lr: '\xff'}\n", "no UTF-8"),
        ("train: {lr: 1}\n".encode("utf-16"), "no UTF-8"),
        ("#" * (1 << 20) + "\n", "bytes, more than"),
        ("train.lr: 1\n", r"'train.lr' is written with dots; in a file write 'train: \{lr: …\}'"),
        ("relation.train.lr: 1\n", r"'relation: \{train: \{lr: …\}\}'"),
        ("train: {lr: null}\n", "'train.lr' must be a number .* got None"),
        ("train: {lr: yes}\n", "'train.lr' must be a number .* got True"),
        ("train: {lr: {a: 1}}\n", "'train.lr' must be a number"),
        ("data: {save_dir: 123}\n", "put it in quotes"),
        ("relation: {attention: no}\n", "put it in quotes"),
        ("data: {sources: '[viper, grid]'}\n", "list that cannot be read"),
        ("trian: {lr: 1}\n", "unknown key 'trian'; did you mean 'train'"),
    ],
)
def test_what_is_no_configuration(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=words) as caught:
        merge_from_file(get_default_config(), path)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 700 and "c.yml" in said


def test_the_bombs_are_small():
    assert len(BOMB) < 400 and len(MERGE_BOMB) < 500


@pytest.mark.parametrize(
    "text,expected",
    [
        ("train: {lr: 1e-4}\n", {"train.lr": 1e-4}),
        ("train: {lr: '1e-4'}\n", {"train.lr": 1e-4}),
        ("train: {lr: 1.0e-4, max_epoch: 0}\n", {"train.lr": 1e-4, "train.max_epoch": 0}),
        ("train: {lr: 1}\n", {"train.lr": 1.0}),
        ("use_gpu: no\n", {"use_gpu": False}),
        ("data: {save_dir: 2024-01-01}\n", {"data.save_dir": "2024-01-01"}),
        ("data: {save_dir: '010'}\n", {"data.save_dir": "010"}),
        ("data: {save_dir: !!str 010}\n", {"data.save_dir": "010"}),
        ("data: {sources: viper}\n", {"data.sources": ["viper"]}),
        ("multimodal: {modalities: [R, N]}\n", {"multimodal.modalities": ["R", "N"]}),
        ("\ufefftrain: {lr: 1}\n", {"train.lr": 1.0}),
        ("%YAML 1.1\n---\ntrain: {lr: 1}\n...\n", {"train.lr": 1.0}),
        ("train:\r\n  lr: 1\r\n", {"train.lr": 1.0}),
        ("", {}),
        ("# nothing\n", {}),
        ("data: {sources: &s [viper], targets: *s}\n", {"data.sources": ["viper"], "data.targets": ["viper"]}),
        (
            "train: &t {lr: 1, seed: 3}\nrelation: {train: {<<: *t, seed: 4}}\n",
            {"relation.train.seed": 4, "train.seed": 3, "train.lr": 1.0},
        ),
    ],
)
def test_what_is_read_as_it_was_meant(tmp_path, text, expected):
    cfg = get_default_config()
    merge_from_file(cfg, write(tmp_path, text))
    changed = {key: value for key, value in _flat(cfg).items() if value != _flat(get_default_config())[key]}
    assert expected.items() <= {**_flat(cfg), **changed}.items()
    assert set(changed) <= {*expected, "relation.train.lr"}


def test_plain_files_are_read_as_pyyaml_reads_them(tmp_path):
    for path in sorted((ROOT / "configs").glob("*.yml"))[::6]:
        assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8")), path.name
    dumped = write(tmp_path, get_default_config().dump())
    cfg = get_default_config()
    merge_from_file(cfg, dumped)
    assert cfg == get_default_config()


def test_only_regular_files_are_opened(tmp_path):
    fifo, loop = tmp_path / "pipe.yml", tmp_path / "loop.yml"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    for path in (fifo, tmp_path, "/dev/zero", loop, tmp_path / "none.yml", "a\0b", "x" * 5000, tmp_path / ("y" * 300)):
        caught = []

        def read(place=path, found=caught):
            try:
                merge_from_file(get_default_config(), place)
            except UserError as error:
                found.append(str(error))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(20)
        assert caught and "\n" not in caught[0] and len(caught[0]) < 6000, path


def identifier(folder):
    return loggers._identifier(folder, "mlflow", False, lambda: "new")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize(
    ("name", "read", "expected"),
    [
        ("verified.json", lambda folder: verified._recorded(folder), {}),
        ("metrics.json", lambda folder: finished_metrics(folder, {}, None), None),
        ("config.yml", lambda folder: resume._config_text(folder), None),
        ("dataset.json", lambda folder: dataset._read_record(folder, "a"), None),
        ("loggers.json", lambda folder: bool(pytest.raises(UserError, identifier, folder)), True),
        ("photo.jpg", lambda folder: taken_at(folder / "photo.jpg") > 0, True),
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name, read, expected):
    os.mkfifo(tmp_path / (loggers.IDS if name == "loggers.json" else name))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for a writer"))
    signal.alarm(20)
    try:
        assert read(tmp_path) == expected
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "content",
    ['{"a": 1', "[" * 100_000, '{"a": 1, "a": 2}', "[]", "3", "", "\0", b"\xff\xfe", '{"a": ' * 50_000, "9" * 5000],
)
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"metrics\.json.*(damaged|UTF-8)") as caught:
        read_json(path, what="metrics of a run", remedy="test the run again")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"metrics\.json"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("metrics", [{}, {"rows": []}, {"rows": [{}], "history": {}}, {"rows": [3], "history": {}}])
def test_metrics_without_their_parts_are_named(tmp_path, metrics):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "opts,words",
    [
        (["train.lr=0.1", "x"], "equals sign; write 'train.lr 0.1'"),
        (["train.lr"], "stands alone"),
        (["0.1", "train.lr"], "'train.lr' behind it is one"),
        (["train", "1"], "holds keys of its own"),
        (["train.max_epochs", "1"], "did you mean 'train.max_epoch'"),
        (["TRAIN.LR", "1"], "did you mean 'train.lr'"),
        (["", "1"], "unknown key"),
        (["data.sources", "[viper,grid]"], "list that cannot be read"),
        (["train.seed", "9" * 20_000], "20,000 characters"),
        (["--lr", "1"], "unknown option"),
    ],
)
def test_slips_in_overrides_are_named(opts, words):
    with pytest.raises(UserError, match=words):
        merge_from_list(get_default_config(), opts)


def test_a_key_given_twice_is_said(tmp_path, capsys):
    from relreid_plugin.cli.train import parse

    cfg, _ = parse(
        ["-s", "viper", "-t", "viper", "train.lr", "0.1", "data.sources", "grid", "train.lr", "0.2", "train.lr", "0.2"]
    )
    said = capsys.readouterr().out
    assert cfg.train.lr == 0.2 and cfg.data.sources == ["grid"]
    assert "note: 'train.lr' is given more than once; the last one counts: '0.2'" in said and "'data.sources'" in said
    parse(["train.lr", "0.1"])
    assert "note" not in capsys.readouterr().out


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    for text in (BOMB, "train: 3\n", "train.lr: 1\n", "train: {max_epoch: -1}\n"):
        assert main(["--config-file", str(write(tmp_path, text))]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
