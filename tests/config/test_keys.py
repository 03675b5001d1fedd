"""Every key of the configuration is read by something, and one that cannot act is said."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MARKET, ROOT
from PIL import Image

from relreid_plugin.config.defaults import _flat, get_default_config, load_config, merge_from_list, validate
from relreid_plugin.config.idle import all_rules, idle_settings
from relreid_plugin.errors import UserError
from relreid_plugin.host.schedules import warmup_lambda

PACKAGE = ROOT / "relreid_plugin"
DECLARES = {"config.py", "idle.py", "ranges.py", "validation.py", "merging.py"}  # they name keys without using their values


class Reads(ast.NodeVisitor):
    """Keys that a module reads, with local names for parts of the configuration followed.

    ``cfg``, ``self.cfg`` and the like are the root. ``train = cfg.train`` makes ``train.lr`` a read of ``train.lr``;
    ``cfg.sampler[key]`` with a string, or inside a loop over strings, and ``Class(**cfg.relation.search)`` count too.
    """

    def __init__(self, keys: set[str]) -> None:
        self.keys, self.read = keys, set()
        self.nodes = {key.rsplit(".", 1)[0] for key in keys if "." in key}
        self.nodes |= {node.rsplit(".", 1)[0] for node in self.nodes if "." in node}
        self.names: list[dict[str, set[str]]] = [{}]
        self.strings: list[dict[str, set[str]]] = [{}]

    # --- what an expression stands for: parts of the configuration, "" being the whole ---------------------------------
    def parts(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name):
            if node.id in ("cfg", "config", "c"):
                return {""}
            return set().union(*(scope.get(node.id, set()) for scope in self.names))
        if isinstance(node, ast.Attribute):
            if node.attr == "cfg":
                return {""}
            return self.extend(self.parts(node.value), {node.attr})
        if isinstance(node, ast.Subscript):
            return self.extend(self.parts(node.value), self.texts(node.slice))
        return set()

    def texts(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return {node.value}
        if isinstance(node, ast.Name):
            return set().union(*(scope.get(node.id, set()) for scope in self.strings))
        return set()

    def extend(self, parts: set[str], names: set[str]) -> set[str]:
        found = {f"{part}.{name}".lstrip(".") for part in parts for name in names}
        return {part for part in found if part in self.nodes or part in self.keys}

    # --- walking --------------------------------------------------------------------------------------------------------
    def note(self, node: ast.AST) -> None:
        self.read |= self.parts(node) & self.keys

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.note(node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Load):
            self.note(node)
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg is None:  # **relation.search hands on every key below it
            for part in self.parts(node.value):
                self.read |= {key for key in self.keys if part and key.startswith(f"{part}.")}
        self.generic_visit(node)

    def bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts):
                self.bind(one, other)
        elif isinstance(target, ast.Name):
            parts = {part for part in self.parts(value) if part in self.nodes}
            if parts:
                self.names[-1][target.id] = parts

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def bind_loop(self, target: ast.AST, values: ast.AST) -> None:
        if isinstance(target, ast.Name) and isinstance(values, (ast.Tuple, ast.List)):
            words = set().union(set(), *(self.texts(value) for value in values.elts))
            self.strings[-1].setdefault(target.id, set()).update(words)

    def visit_For(self, node: ast.For) -> None:
        self.bind_loop(node.target, node.iter)
        self.generic_visit(node)

    def scope(self, node: ast.AST) -> None:
        self.names.append({})
        self.strings.append({})
        self.generic_visit(node)
        self.names.pop()
        self.strings.pop()

    visit_FunctionDef = visit_Lambda = scope


def keys_read(files: list[Path]) -> set[str]:
    keys = set(_flat(get_default_config()))
    read: set[str] = set()
    for file in files:
        reads = Reads(keys)
        reads.visit(ast.parse(file.read_text(encoding="utf-8")))
        read |= reads.read
    return read


def test_every_key_is_read_by_something():
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in DECLARES]
    missing = sorted(set(_flat(get_default_config())) - keys_read(files))
    assert not missing, f"keys that nothing reads: {missing}"


def test_the_walk_follows_names_and_nothing_else():
    """It finds reads through local names, loops, subscripts and ``**``; a key that is written or only named is not read."""
    keys = {"train.lr", "train.optim", "test.rerank", "vit.parts", "vit.shift", "relation.search.ef", "use_gpu"}
    source = """
def one(cfg):
    train, test = cfg.train, cfg.test
    print(train.lr)
    for key in ("parts", "shift"):
        print(cfg.vit[key])
    make(**cfg.relation.search)
    cfg.train.optim = "sgd"
    note("test.rerank")
class Two:
    def three(self):
        return other.use_gpu
"""
    reads = Reads(keys)
    reads.visit(ast.parse(source))
    assert reads.read == {"train.lr", "vit.parts", "vit.shift", "relation.search.ef"}


# --- keys that cannot act -----------------------------------------------------------------------------------------------


def configured(*changes):
    cfg = get_default_config()
    merge_from_list(cfg, [str(change) for change in changes])
    return cfg


@pytest.mark.parametrize(
    "changes, keys",
    [
        (["sgd.momentum", 0.5, "sgd.nesterov", True], ["sgd.momentum 0.5", "sgd.nesterov True"]),
        (["adam.beta1", 0.5, "train.optim", "sgd"], ["adam.beta1 0.5"]),
        (["train.open_layers", "['fc']"], ["train.open_layers ['fc']"]),
        (["train.base_lr_mult", 0.5], ["train.base_lr_mult 0.5"]),
        (["train.stepsize", "[3]", "train.lr_scheduler", "cosine"], ["train.stepsize [3]"]),
        (["train.warmup_factor", 0.5], ["train.warmup_factor 0.5"]),
        (["train.val_fraction", 0.2], ["train.val_fraction 0.2"]),
        (["train.val_fold", 1], ["train.val_fold 1"]),
        (["video.seq_len", 3], ["video.seq_len 3"]),
        (["sampler.num_instances", 8], ["sampler.num_instances 8"]),
        (["cuhk03.labeled_images", True], ["cuhk03.labeled_images True"]),
        (["loss.triplet.margin", 0.5], ["loss.triplet.margin 0.5"]),
        (["loss.composite.ce", 0.5], ["loss.composite.ce 0.5"]),
        (["test.start_eval", 3], ["test.start_eval 3"]),
        (["test.rivals", "[]", "test.aqe.k", 3], ["test.aqe.k 3"]),
        (["test.aqe_alpha.k", 3], ["test.aqe_alpha.k 3"]),
        (["test.gnn.k1", 3, "test.gcr.k1", 3], ["test.gnn.k1 3", "test.gcr.k1 3"]),
        (["test.cajaccard.k1_intra", 3, "test.rivals", "['cajaccard']", "test.rerank", True], ["test.cajaccard.k1_intra 3"]),
        (["test.nfc.k1", 3, "test.rivals", "['gnn']"], ["test.nfc.k1 3"]),
        (["test.diffusion.k", 3], ["test.diffusion.k 3"]),
        (
            ["test.diffusion.k_query", 3, "test.rivals", "['diffusion']", "test.rival_protocol", "transductive"],
            ["test.diffusion.k_query 3"],
        ),
        (["test.rival_protocol", "inductive"], ["test.rival_protocol inductive"]),
        (["test.visrank_topk", 3], ["test.visrank_topk 3"]),
        (["relation.k", 3], ["relation.k 3"]),
        (["relation.attention", "malaa"], ["relation.attention malaa"]),
        (["graft.heads", 4], ["graft.heads 4"]),
        (["rib.dcs.seed", 4], ["rib.dcs.seed 4"]),
        (["vit.parts", 2, "model.name", "vit_baseline"], ["vit.parts 2"]),
        (["backbone.name", "timm:x"], ["backbone.name timm:x"]),
    ],
)
def test_a_key_that_cannot_act_is_said(changes, keys):
    sentences = " ".join(idle_settings(configured(*changes)))
    for key in keys:
        assert f"'{key}'" in sentences and "no effect" in sentences


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["sgd.momentum", 0.5, "train.optim", "sgd"],
        ["train.val_fraction", 0.2, "test.eval_freq", 1],
        ["test.kreciprocal.k1", 5],
        ["test.gnn.k1", 5, "test.rivals", "['gnn', 'nfc']", "test.rival_protocol", "inductive", "test.nfc.k2", 3],
        ["test.aqe_alpha.k", 5, "test.rivals", "['aqe-alpha']", "test.rerank", True],
        ["test.diffusion.k_query", 3, "test.diffusion.truncate", 9, "test.rivals", "['diffusion']"],
        ["test.kreciprocal.k1", 5, "test.rivals", "[]", "test.rerank", True],
        ["sampler.num_instances", 8, "sampler.train_sampler", "RandomIdentitySampler"],
        ["cuhk03.classic_split", True, "data.sources", "['cuhk03']"],
        ["relation.k", 3, "relation.attention", "malaa", "train.stages", "[1, 2]"],
    ],
)
def test_keys_that_act_are_passed_over(changes):
    assert idle_settings(configured(*changes)) == []


def test_the_rules_name_keys_and_no_configuration_of_the_package_holds_an_idle_one():
    keys = set(_flat(get_default_config()))
    for rule in all_rules():
        for name in rule.keys:
            assert name in keys or (name.endswith(".") and any(key.startswith(name) for key in keys)), name
    for file in sorted((ROOT / "configs").glob("*.yml")):
        assert idle_settings(load_config(file)) == [], file.name


# --- keys whose effect is new -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        ["train.start_epoch", -1],
        ["train.start_epoch", 60],
        ["test.visrank_topk", 0],
        ["test.diffusion.truncate", 5, "test.rival_protocol", "transductive"],
    ],
)
def test_ranges(changes):
    with pytest.raises(UserError, match=changes[0]):
        validate(configured(*changes))


@pytest.fixture
def table(tiny_root, tmp_path):
    """The tiny embedded persons as a table whose queries are in the gallery, too, as of another camera."""
    folder = tiny_root / "embedded_persons_tiny" / MARKET
    rows = []
    parts = [("train", "bounding_box_train"), ("query", "query"), ("gallery", "query"), ("gallery", "bounding_box_test")]
    for split, name in parts:
        for file in sorted((folder / name).glob("*.jpg")):
            camera = 99 if (split, name) == ("gallery", "query") else int(file.name.split("_c")[1][0])
            rows.append(f"{file},{file.name.split('_')[0]},{camera},{split}")
    path = tmp_path / "set.csv"
    path.write_text("path,pid,camid,split\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_a_run_from_a_later_epoch_that_draws_its_lists(table, tiny_config, command, tmp_path):
    folder = tmp_path / "run"
    overrides = ["train.stages", "[1]", "train.max_epoch", 3, "train.start_epoch", 2, "test.visrank", True]
    overrides += ["test.visrank_topk", 3, "data.save_dir", folder, "sgd.momentum", 0.5, "test.rivals", "['aqe']"]
    code, out, err = command("--config-file", tiny_config, "-s", table, "-t", table, *overrides)
    assert code == 0, err
    metrics = json.loads((folder / "metrics.json").read_text())
    # train.start_epoch: one epoch of three, at its learning rate
    (record,) = metrics["history"]["stage1"]
    factor = warmup_lambda("cosine", max_epoch=3, warmup_epochs=1)
    assert record["epoch"] == 3 and "starts after epoch 2" in out
    rates = torch.load(folder / "stage1" / "last.pth.tar", weights_only=False)["scheduler"]
    assert rates["last_epoch"] == 3 and rates["_last_lr"] == [pytest.approx(0.001 * factor(3))]
    # every query's own file is in the gallery under another camera, and is no match of it
    assert all(row["mAP"] < 0.9 for row in metrics["rows"])
    notes = " ".join(metrics["notes"])
    assert "queries are in the gallery too" in notes and "'sgd.momentum 0.5' has no effect" in notes
    assert out.index("queries are in the gallery too") < out.index("=> Start training")
    assert all(row["metric"] == "cosine" for row in metrics["rows"])
    # test.visrank without test.evaluate: one picture per query, none with the query itself in it
    queries = sorted(line.split(",")[0] for line in table.read_text().splitlines() if line.endswith(",query"))
    pictures = sorted((folder / "visrank_set.csv").glob("*.jpg"))
    assert [picture.stem for picture in pictures] == [Path(file).stem for file in queries]
    width, height = Image.open(pictures[0]).size
    assert (width, height) == (32 + 24 + 3 * 32 + 2 * 6, 64)
    # and once more by --eval-only
    shutil.rmtree(folder / "visrank_set.csv")
    assert command("--config-file", tiny_config, "-s", table, "-t", table, "--eval-only", *overrides)[0] == 0
    assert len(list((folder / "visrank_set.csv").glob("*.jpg"))) == len(queries)
