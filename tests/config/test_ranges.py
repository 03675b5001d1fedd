"""Every key has a range, and every value outside of it is refused by name."""

from __future__ import annotations

import random
import string

import pytest

from relreid_plugin.config.defaults import _flat, get_default_config, merge_from_list, validate
from relreid_plugin.config.ranges import HUGE, Choice, Items, Number, Text, all_rules, check_ranges
from relreid_plugin.config.validation import schedule_notes
from relreid_plugin.errors import UserError

DEFAULTS = _flat(get_default_config())
RULES = all_rules()
NUMBERS = sorted(key for key, rule in RULES.items() if isinstance(rule, Number))
LISTS = sorted(key for key, rule in RULES.items() if isinstance(rule, Items))
FLOATS = [key for key in NUMBERS if isinstance(DEFAULTS[key], float)]


def config(*overrides):
    cfg = get_default_config()
    merge_from_list(cfg, list(overrides))
    return cfg


def set_key(cfg, key, value):
    *parents, leaf = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return cfg


def test_every_key_has_a_rule():
    kinds = {bool: None, int: Number, float: Number, str: (Choice, Text), list: Items}
    missing = [
        f"    '{key}': {'count()' if isinstance(value, int) else '…'},  # default {value!r}"
        for key, value in DEFAULTS.items()
        if not isinstance(value, bool) and key not in RULES
    ]
    assert not missing, "keys without a range; add to RULES in relreid_plugin/config/ranges.py:\n" + "\n".join(missing)
    gone = sorted(set(RULES) - set(DEFAULTS))
    assert not gone, f"ranges of keys that do not exist; take them out of RULES in relreid_plugin/config/ranges.py: {gone}"
    for key, rule in RULES.items():
        wanted = kinds[type(DEFAULTS[key])]
        numbers = isinstance(rule, Choice) and isinstance(DEFAULTS[key], int)
        assert numbers or isinstance(rule, wanted), f"{key}: a default {DEFAULTS[key]!r} and a rule {rule}"
    check_ranges(DEFAULTS)


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_outside_are_refused_with_key_value_and_range(key):
    rule, whole = RULES[key], isinstance(DEFAULTS[key], int)
    outside = [rule.high + 1 if whole else max(2 * rule.high, 1.0), rule.low - 1, 10**31, -(10**31)]
    outside += [rule.low] * rule.above + [rule.high] * rule.below
    for value in outside if whole else [*map(float, outside), float("nan"), float("inf"), float("-inf")]:
        with pytest.raises(UserError) as caught:
            validate(set_key(get_default_config(), key, value))
        said = str(caught.value)
        assert f"'{key}'" in said and str(rule) in said and repr(value) in said and "\n" not in said
    inside = [rule.low] * (not rule.above) + [rule.high] * (not rule.below)
    for value in inside:
        check_ranges({key: int(value) if whole else float(value)})


@pytest.mark.parametrize("key", LISTS)
def test_lists_of_a_wrong_length_or_with_a_wrong_element_are_refused(key):
    rule, good = RULES[key], list(DEFAULTS[key]) or ["x"]
    wrong = [good * 1002, None, "x", [None], [{}], [float("nan")]]
    wrong += [[[]]] if rule.rule.complaint([]) else []
    wrong += [[]] if 0 not in rule.sizes else []
    if isinstance(rule.rule, Number):
        for value in (10**31, float("inf"), rule.rule.low - 1, rule.rule.low if rule.rule.above else float("nan")):
            wrong.append([value, *good[1:]])
    for value in wrong:
        with pytest.raises(UserError, match=f"'{key}'"):
            check_ranges({key: value})


def test_words_are_chosen_or_hold_what_a_file_can():
    for key, rule in RULES.items():
        if isinstance(rule, Choice):
            with pytest.raises(UserError, match=f"'{key}'"):
                check_ranges({key: "no such word"})
        if isinstance(rule, Text):
            for value in ("a\0b", "\ud800", 3, None):
                with pytest.raises(UserError, match=f"'{key}'"):
                    check_ranges({key: value})


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["train.max_epoch", "-1"], "train.max_epoch"),
        (["data.workers", "-1"], "data.workers"),
        (["train.warmup_epochs", "-1"], "train.warmup_epochs"),
        (["data.norm_std", "[0.2, 0, 0.2]"], "data.norm_std"),
        (["data.norm_mean", "[0.5, 0.5]"], "3 elements, got 2"),
        (["multimodal.std", "[[0.2, -0.1, 0.2]]"], "multimodal.std"),
        (["multimodal.std", "[[0.2, 0.2]]"], "1 or 3 elements, got 2"),
        (["multimodal.mean", "[0.4, 0.4, 0.4]"], "multimodal.mean"),
        (["train.seed", "-1"], "train.seed"),
        (["train.seed", str(2**32)], "4294967295"),
        (["train.stepsize", "[40, 20]"], "must rise"),
        (["train.stepsize", "[0]"], "train.stepsize"),
        (["train.stepsize", "[]", "train.lr_scheduler", "multi_step"], "train.stepsize"),
        (["relation.train.betas", "[0.9]"], "2 elements"),
        (["relation.train.betas", "[0.9, 1.0]"], "relation.train.betas"),
        (["train.lr", "0"], "train.lr"),
        (["train.lr", "nan"], "train.lr"),
        (["train.lr", "1e400"], "train.lr"),
        (["train.optim", "sgd", "sgd.nesterov", "True", "sgd.momentum", "0"], "sgd.nesterov"),
        (["loss.name", "triplet", "loss.triplet.weight_t", "0"], "loss.triplet"),
        (["loss.name", "composite", "loss.composite.ce", "0", "loss.composite.center", "0"], "loss.composite"),
        (["rib.places", "[3]", "rib.attention", "dcs", "model.name", "bnneck_baseline"], "rib.places"),
        (["multimodal.test", "[7]"], "multimodal.test"),
        (["train.fixbase_epoch", "1", "train.open_layers", "[]"], "open_layers"),
        (["data.sources", "[]"], "data.sources"),
        (["data.save_dir", " "], "data.save_dir"),
        (["data.type", "video", "video.sample_method", "all"], "batch_size 1"),
    ],
)
def test_what_no_training_can_use(overrides, words):
    with pytest.raises(UserError, match=words) as caught:
        validate(config(*overrides))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.max_epoch", "0"],
        ["train.warmup_epochs", "20", "train.max_epoch", "5"],
        ["data.workers", "0"],
        ["train.seed", str(2**32 - 1)],
        ["test.eval_freq", "-1"],
        ["train.weight_decay", "0"],
        ["train.stepsize", "[]", "train.lr_scheduler", "cosine"],
        ["data.norm_mean", "[0, 0, 0]", "data.norm_std", "[1, 1, 1]"],
        ["multimodal.mean", "[[0.4]]", "multimodal.std", "[[0.2], [0.2], [0.2]]"],
        ["head.feature_dim", "0"],
        ["loss.triplet.margin", "0"],
    ],
)
def test_what_makes_sense_is_taken(overrides):
    validate(config(*overrides))


def test_odd_schedules_are_said():
    assert schedule_notes(config()) == []
    said = schedule_notes(
        config("train.max_epoch", "5", "train.warmup_epochs", "10", "train.fixbase_epoch", "5", "train.stepsize", "[20, 40]")
    )
    assert [note.split("'")[1].split()[0] for note in said] == [
        "train.warmup_epochs",
        "train.lr_scheduler",
        "train.fixbase_epoch",
    ]
    late = config("train.max_epoch", "40", "train.lr_scheduler", "multi_step", "train.stepsize", "[20, 40, 60]")
    assert ["40, 60" in note for note in schedule_notes(late)] == [True]
    assert schedule_notes(config("train.max_epoch", "0", "train.warmup_epochs", "3")) == []


ODD = [
    "", " ", "-1", "0", "1", "2", "3", "0.5", "-0.0", "1e-4", "1e309", "nan", "inf", "-inf", "None", "True", "false", "yes",
    "[]", "[[]]", "()", "{}", "{1: 2}", "[1]", "[1, 2]", "[0.1, 0.2, 0.3]", "['a', 'b']", "['a'", "[a, b]", "[None]",
    "b'x'", "1j", "0x10", "010", "1_000", "'quoted'", "9" * 30, "9" * 5000, "-" * 3000 + "1", "(" * 400, "[" * 3000,
    "[" * 150 + "]" * 150, "+".join("1" * 3000), "x" * 20_000, "a\0b", "\ud800", "é", "../..", "/", "[float]",
    "__import__('os')", "{[]: 1}", "1 if 1 else 2",
]  # fmt: skip


@pytest.mark.parametrize("key", sorted(DEFAULTS))
def test_odd_values_are_taken_or_refused_in_one_sentence(key):
    draw = random.Random(f"odd {key}")
    made = ["".join(draw.choices(string.printable, k=draw.randrange(1, 12))) for _ in range(12)]
    made += [repr([draw.choice([draw.uniform(-2, 2), draw.randrange(-3, 10**6), "x"]) for _ in range(draw.randrange(5))])]
    made += [repr(draw.uniform(-2, 2) * 10.0 ** draw.randrange(-300, 300)) for _ in range(4)]
    raw = [None, True, -1, 10**400, float("nan"), [], {}, {"a": 1}, [[1]], object(), b"x", 1j]
    cfg = get_default_config()
    for value in [*ODD, *made, *raw]:
        set_key(cfg, key, DEFAULTS[key])
        try:
            merge_from_list(cfg, [key, value])
            validate(cfg)
            schedule_notes(cfg)
        except UserError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 1500, said


def test_triples_of_odd_values_never_raise_anything_else():
    draw = random.Random(11)
    keys = sorted(DEFAULTS)
    for _ in range(300):
        opts = []
        for key in draw.sample(keys, 3):
            rule = RULES.get(key)
            values = [*ODD, "True", repr(DEFAULTS[key])]
            values += map(str, rule.values) if isinstance(rule, Choice) else []
            opts += [key, draw.choice(values)]
        cfg = get_default_config()
        try:
            merge_from_list(cfg, opts)
            validate(cfg)
            schedule_notes(cfg)
        except UserError as error:
            assert "\n" not in str(error)


def test_huge_is_below_what_overflows():
    import torch

    assert torch.isfinite(torch.tensor(HUGE, dtype=torch.float32) * 1e6)
    assert all(RULES[key].high <= HUGE for key in FLOATS)
