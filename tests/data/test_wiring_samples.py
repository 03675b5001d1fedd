"""Samples of several images in the host's terms: data sets, sums, what is read, and which transform reads it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from wiring import GRAFT, keys_of, settings, write_vehicles

from relreid_plugin.data.samples import MultimodalSplits
from relreid_plugin.errors import UserError
from relreid_plugin.host import multimodal
from relreid_plugin.host.multimodal import Files, LocalMultimodal, MultimodalDataset, SampleTransform, Strip, use_modalities


def samples(name="made", *, modalities=("R", "N"), start=0, strip=False, **changed):
    """Splits of three training samples of two identities, one query, two of the gallery."""

    def source(part, i):
        return f"{name}/{part}{i}.jpg" if strip else tuple(f"{name}/{part}{i}{letter}.jpg" for letter in modalities)

    parts = {
        "train": [(source("t", i), i // 2, start + 2 * (i % 2)) for i in range(3)],
        "query": [(source("q", 0), 5, 0)],
        "gallery": [(source("g", i), 5 + i, 1) for i in range(2)],
        "has_cameras": True,
        "train_identities": ["a", "b"],
        "notes": ["a note", "another"],
        "group": "scene",
        "shared_identities": ["x"],
        "identity_names": {5: "five"},
    }
    return MultimodalSplits(modalities=modalities, **{**parts, **changed})


def dataset(name="made", splits=None, **options):
    return MultimodalDataset(name, "there", splits or samples(name), **{"mode": "train", "verbose": False, **options})


def test_a_data_set_of_samples(capsys):
    found = dataset()
    assert capsys.readouterr().out == ""
    assert (found.name, found.dataset_dir, found.group, found.modalities) == ("made", "there", "scene", ("R", "N"))
    assert found.has_cameras is True and found.train_identities == ["a", "b"] and found.notes == ["a note", "another"]
    assert found.shared_identities == ["x"] and found.identity_names == {5: "five"}
    assert found.data is found.train and (found.num_train_pids, found.num_train_cams) == (2, 2)
    assert found.train[1] == (("made/t1R.jpg", "made/t1N.jpg"), 0, 2, 0) and type(found.train[1][0]) is Files
    assert found.train[1][0].modalities == ("R", "N") and found.query[0][1:] == (5, 0, 0)
    assert [item[1:] for item in found.gallery] == [(5, 1, 0), (6, 1, 0)]
    strips = dataset(splits=samples(strip=True))
    assert strips.train[0] == ("made/t0.jpg", 0, 0, 0) and type(strips.train[0][0]) is Strip
    assert strips.train[0][0].modalities == ("R", "N")
    assert dataset(mode="query").data == found.query


def test_when_notes_of_a_data_set_are_printed(capsys):
    said = "made: a note\nmade: another\n"
    for options, wanted in (
        ({"verbose": True, "mode": "train"}, True),
        ({}, True),
        ({"verbose": False, "mode": "train"}, False),
        ({"verbose": True, "mode": "query"}, False),
        ({"mode": "gallery"}, False),
        ({"verbose": True}, True),
    ):
        MultimodalDataset("made", "there", samples(), **options)
        assert capsys.readouterr().out.startswith(said) is wanted


@pytest.mark.parametrize("split", ["train", "query", "gallery"])
def test_a_data_set_without_a_split(split):
    with pytest.raises(UserError, match=f"data set 'made' has no {split} samples in 'there'"):
        dataset(splits=samples(**{split: []}))


def test_what_an_item_is(monkeypatch):
    monkeypatch.setattr(multimodal, "read_views", lambda source, modalities: ["views of", source, modalities])
    for found, path in ((dataset(), "made/t2R.jpg"), (dataset(splits=samples(strip=True)), "made/t2.jpg")):
        item = found[2]
        source = found.train[2][0]
        assert item == {"img": ["views of", source, ("R", "N")], "pid": 1, "camid": 0, "impath": path, "dsetid": 0}
        found.transform = lambda source: ("transformed", source)
        assert found[2]["img"] == ("transformed", source)


def test_the_sum_of_data_sets():
    one, other = (
        dataset("one", transform="first"),
        dataset("other", samples("other", start=1, has_cameras=False, group="camera")),
    )
    both = one + other
    assert type(both) is MultimodalDataset and both.name == "one+other" and both.dataset_dir == "there"
    assert (both.group, both.modalities, both.has_cameras) == ("scene", ("R", "N"), False)
    assert (one + copy.copy(one)).has_cameras is True
    assert both.notes == ["a note", "another"] * 2 and both.transform == "first" and both.mode == "train"
    assert both.query == one.query and both.gallery == one.gallery and both.data is both.train
    # cameras of the first are 0 and 2, identities 0 and 1
    assert [item[1:] for item in both.train] == [(0, 0, 0), (0, 2, 0), (1, 0, 0), (2, 4, 1), (2, 6, 1), (3, 4, 1)]
    assert [item[0] for item in both.train[3:]] == [item[0] for item in other.train]
    assert [item[1:] for item in (both + one).train[6:]] == [(4, 7, 2), (4, 9, 2), (5, 7, 2)]
    assert [item[1:] for item in one.train] == [(0, 0, 0), (0, 2, 0), (1, 0, 0)]
    everything = dataset("one", combineall=True)
    assert len((everything + other).train) == len(everything.train) + 3  # not combined once more
    with pytest.raises(UserError, match="data set 'plain' has one image per sample.*together with 'one'"):
        one + SimpleNamespace(name="plain")
    with pytest.raises(UserError, match="data set 'int' has one image per sample"):
        one + 3


def test_the_views_that_a_transform_reads(monkeypatch):
    noted = []

    def read(source, own, wanted, ranges):
        noted.append((type(source), source, own, wanted, ranges))
        return "views"

    monkeypatch.setattr(multimodal, "read_views", read)
    transform = SampleTransform(["N", "R"], lambda views: (views, "tensor"), {"N": (0, 9)})
    assert transform(Strip("a.jpg", ("R", "N"))) == ("views", "tensor") == transform(Files(("a", "b"), ("R", "N")))
    assert noted == [
        (str, "a.jpg", ("R", "N"), ("N", "R"), {"N": (0, 9)}),
        (tuple, ("a", "b"), ("R", "N"), ("N", "R"), {"N": (0, 9)}),
    ]
    assert SampleTransform(("R",), None).ranges == {} and repr(SampleTransform(("R", "N"), "x")) == "SampleTransform(R+N, x)"


def multimodal_settings(*pairs):
    return settings(*keys_of(GRAFT), *pairs)


def manager(train, *tests, target=None):
    loaders = {
        f"set{i}": {part: SimpleNamespace(dataset=data) for part in ("query", "gallery")} for i, data in enumerate(tests)
    }
    second = None if target is None else SimpleNamespace(dataset=target)
    return SimpleNamespace(train_loader=SimpleNamespace(dataset=train), train_loader_t=second, test_loader=loaders)


@pytest.fixture
def checked(monkeypatch):
    """What is asked of the check of the files."""
    calls = []
    monkeypatch.setattr(
        multimodal, "check_samples", lambda *values, **options: (calls.append((values, options)), [f"note {len(calls)}"])[1]
    )
    return calls


def test_which_modalities_are_read(checked, capsys, tmp_path):
    train, target = dataset("one"), dataset("target", samples("target"))
    query = dataset("test", samples("test", modalities=("R", "N", "T"), strip=True, notes=["of the test"]), mode="query")
    other = dataset("again", samples("again", notes=["of the test", "b"]), mode="gallery")
    keys = ["multimodal.modalities", ["N", "R"], "multimodal.mean", [[0.1], [0.2]], "multimodal.std", [[0.5], [0.25]]]
    keys += ["multimodal.pixel_range", [[], [0, 1000]], "data.check_images", "none", "data.height", 8, "data.width", 4]
    cfg = multimodal_settings(*keys, "data.transforms", ["random_erase"])
    host = manager(train, query, other, target=target)
    use_modalities(cfg, host)
    assert capsys.readouterr().out == "note: note 1\nnote: note 2\n"
    (first, one), (second, two) = checked
    wanted = {"wanted": ["N", "R"], "ranges": {"N": None, "R": (0, 1000)}}
    assert one == two == wanted and first[1:] == (("R", "N"), "none") and second[1:] == (("R", "N", "T"), "none")
    own = [*(item[0] for item in train.data), *(item[0] for item in target.data), *(item[0] for item in other.data)]
    assert first[0] == own and all(type(source) is tuple for source in first[0])
    assert second[0] == ["test/q0.jpg"] and all(type(source) is str for source in second[0])
    assert (
        train.transform is target.transform is host.transform_tr and query.transform is other.transform is host.transform_te
    )
    for transform, training in ((host.transform_tr, True), (host.transform_te, False)):
        assert type(transform) is SampleTransform and transform.modalities == ("N", "R")
        assert transform.ranges == {"N": None, "R": (0, 1000)} and transform.transform.training is training
    assert host.notes == ["test: of the test", "again: of the test", "again: b"]
    grey = [Image.new("RGB", (4, 8), (51, 51, 51)), Image.new("RGB", (4, 8), (102, 102, 102))]
    values = host.transform_te.transform(grey)
    assert values.shape == (2, 3, 8, 4)
    assert torch.allclose(values[0], torch.tensor((0.2 - 0.1) / 0.5)) and torch.allclose(
        values[1], torch.tensor((0.4 - 0.2) / 0.25)
    )
    np.random.seed(0)  # noqa: NPY002
    assert any(bool((host.transform_tr.transform(grey) == 0).any()) for _ in range(10))  # erased
    assert not any(bool((host.transform_te.transform(grey) == 0).any()) for _ in range(10))


def test_one_mean_is_that_of_all_modalities(checked):
    host = manager(dataset("one"), dataset("test", samples("test"), mode="query"))
    use_modalities(multimodal_settings("multimodal.modalities", ["R", "N"]), host)  # one row
    values = host.transform_te.transform([Image.new("RGB", (32, 16), (51, 51, 51))] * 2)
    assert torch.allclose(values, torch.tensor((0.2 - 0.5) / 0.25)) and len(checked) == 1


def test_modalities_that_are_missing(checked):
    for train, test in ((dataset("one"), dataset("test", samples("test", modalities=("R", "N", "T")), mode="query")),):
        with pytest.raises(UserError, match="asks for T, but data set 'one' has only R, N; take a selection of these"):
            use_modalities(multimodal_settings("multimodal.modalities", ["T", "R"]), manager(train, test))
        with pytest.raises(UserError, match="asks for T, but data set 'one' has only R, N"):
            use_modalities(multimodal_settings("multimodal.modalities", ["T", "R"]), manager(test, train))
        with pytest.raises(UserError, match="asks for T, but data set 'one' has only R, N"):
            use_modalities(multimodal_settings("multimodal.modalities", ["T"]), manager(test, test, target=train))
        short = dataset("short", samples("short", modalities=("R",)), mode="query")
        with pytest.raises(UserError, match="asks for N, T, but data set 'short' has only R;"):
            use_modalities(multimodal_settings(), manager(short, short))
    assert checked == []
    cfg = multimodal_settings("multimodal.modalities", ["R"])
    cfg.data.k_tfm = 2
    with pytest.raises(UserError, match="'model.name graft' takes one augmented copy of a sample; set 'data.k_tfm 1'"):
        use_modalities(cfg, manager(dataset(), dataset()))


def test_where_data_sets_of_samples_are(tmp_path):
    root = write_vehicles(tmp_path)
    found = multimodal.RGBNT100(str(root), verbose=False)
    assert found.name == "rgbnt100" and found.dataset_dir.endswith("RGBNT100") and found.modalities == ("R", "N", "T")
    assert multimodal.RGBN300.key == "rgbn300" and multimodal.RGBNT201.dataset_dir == "RGBNT201"
    own = LocalMultimodal("RGBNT100", str(root), verbose=False)
    assert own.name == "RGBNT100" and [item[1:] for item in own.train] == [item[1:] for item in found.train]
    pattern = r"(?P<identity>\d+)_c(?P<camera>\d)_"
    given = LocalMultimodal("RGBNT100", str(root), name_pattern=pattern, verbose=False)
    assert [item[1:] for item in given.query] == [item[1:] for item in own.query]
    with pytest.raises(UserError):
        LocalMultimodal("RGBNT100", str(root), name_pattern=r"(?P<identity>x)", verbose=False)
    with pytest.raises(UserError, match="RGBN300"):
        multimodal.RGBN300(str(root / "none"))
