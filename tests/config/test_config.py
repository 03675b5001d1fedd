"""Merging and checking configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from relreid_plugin.cli.train import parse
from relreid_plugin.config.defaults import get_default_config, merge_from_file, merge_from_list, validate
from relreid_plugin.errors import UserError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_valid(path):
    cfg = get_default_config()
    merge_from_file(cfg, path)
    validate(cfg)
    again = get_default_config()
    merge_from_list(again, ["train.seed", "1"])
    assert cfg.data.save_dir.startswith("runs/")


def test_there_are_configurations():
    assert {"magformer.yml", "magformer_embedded.yml", "magformer_grocery.yml"} <= {path.name for path in CONFIGS}


def test_the_papers_settings():
    cfg = get_default_config()
    merge_from_file(cfg, next(path for path in CONFIGS if path.name == "magformer.yml"))
    assert (cfg.train.lr, cfg.train.stepsize, cfg.train.warmup_epochs) == (0.00035, [40, 70], 10)
    assert (cfg.train.batch_size, cfg.sampler.num_instances, cfg.train.max_epoch) == (128, 4, 160)
    relation = cfg.relation
    assert (relation.num_layers, relation.num_heads, relation.num_landmarks, relation.k) == (4, 2, 5, 20)
    assert (relation.train.lr, relation.train.betas, relation.train.weight_decay) == (1.5e-4, [0.9, 0.98], 0.05)
    assert relation.init == "paper" and relation.neighbours == "feature" and relation.protocols[0] == "inductive"


@pytest.mark.parametrize(
    "key,text,value",
    [
        ("train.lr", "1", 1.0),
        ("train.lr", "5e-4", 5e-4),
        ("data.combineall", "true", True),
        ("data.sources", "viper", ["viper"]),
        ("data.sources", "['viper','grid']", ["viper", "grid"]),
        ("train.stepsize", "(20, 40)", [20, 40]),
        ("data.save_dir", "123", "123"),
        ("relation.train.betas", "[0, 1]", [0.0, 1.0]),
        ("test.rivals", "[]", []),
    ],
)
def test_values_are_read_in_the_type_of_the_key(key, text, value):
    cfg = get_default_config()
    merge_from_list(cfg, [key, text])
    node = cfg
    for part in key.split("."):
        node = node[part]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    "key,text",
    [("train.max_epoch", "1.5"), ("train.max_epoch", "True"), ("data.combineall", "1"), ("train.stepsize", "['a']")],
)
def test_wrong_types_name_the_key(key, text):
    with pytest.raises(UserError, match=key):
        merge_from_list(get_default_config(), [key, text])


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["loss.name", "tripletz"], "'triplet'"),
        (["relation.protocols", "['inductiv']"], "'inductive'"),
        (["train.stages", "[1,2]"], "relation.attention"),
        (["train.stages", "[3]"], "train.stages"),
        (["test.ranks", "[0]"], "test.ranks"),
        (["relation.search.index", "ivf", "relation.search.backend", "torch"], "faiss"),
        (["loss.name", "triplet", "train.fixbase_epoch", "2"], "weight_x"),
        (["relation.train.spread", "[2.0, 1.0]"], "spread"),
        (["data.height", "0"], "data.height"),
    ],
)
def test_impossible_values_are_named(overrides, words):
    cfg = get_default_config()
    merge_from_list(cfg, overrides)
    with pytest.raises(UserError, match=words):
        validate(cfg)


def test_options_and_overrides_in_any_order(tmp_path):
    config = tmp_path / "c.yml"
    config.write_text("train: {max_epoch: 3}\n")
    cfg, args = parse(["--config-file", str(config), "-s", "viper", "grid", "-t", "viper", "train.lr", "0.1", "--resume"])
    assert cfg.data.sources == ["viper", "grid"] and cfg.data.targets == ["viper"]
    assert cfg.train.lr == 0.1 and cfg.train.max_epoch == 3 and args.resume and not args.eval_only


def test_stage_must_exist(tmp_path):
    with pytest.raises(UserError, match="--stage 2"):
        parse(["--stage", "2"])
