"""Samples of several pictures: extracted by a run, stored, searched, and what becomes of those that lack one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_graft import graft_config  # noqa: F401

from relreid_plugin.cli.main import main
from relreid_plugin.cli.train import main as train
from relreid_plugin.errors import UserError
from relreid_plugin.extractor import load_extractor
from relreid_plugin.search import FeatureExtractor, FeatureStore


@pytest.fixture(scope="module")
def run(graft_config, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs") / "graft"
    keys = ["train.stages", "[1]", "train.max_epoch", "1", "multimodal.test", "['R+N+T','R+T']"]
    assert train(["--config-file", str(graft_config), "data.save_dir", str(folder), *keys]) == 0
    return folder


@pytest.fixture(scope="module")
def extractor(run):
    return load_extractor(run)


def banked(run, part=""):
    return torch.load(run / "bank" / f"embedded_vehicles_tiny{part}-query.pt", weights_only=True)


def views(path):
    """The pictures of a strip."""
    whole = np.asarray(Image.open(path))
    return [np.ascontiguousarray(part) for part in np.split(whole, 3, axis=1)]


def test_rows_are_those_that_the_run_was_tested_with(run, extractor):
    bank = banked(run)
    strips = bank["paths"]
    torch.testing.assert_close(extractor(strips), bank["features"], rtol=0, atol=1e-5)
    assert extractor.dim == bank["features"].shape[1] and extractor.modalities == ("R", "N", "T")
    whole = extractor(strips[:2])
    for samples in (
        [tuple(views(path)) for path in strips[:2]],
        [dict(zip("RNT", views(path))) for path in strips[:2]],
        iter([dict(zip("TNR", views(path)[::-1])) for path in strips[:2]]),
    ):
        torch.testing.assert_close(extractor(samples), whole, rtol=0, atol=1e-5)
    blue = [tuple(view[..., ::-1] for view in views(strips[0]))]
    torch.testing.assert_close(extractor(blue, bgr=True), whole[:1], rtol=0, atol=1e-5)
    assert extractor([]).shape == (0, extractor.dim)


def test_a_sample_that_lacks_a_picture_is_refused_skipped_or_tested_without_it(run, extractor):
    strips = banked(run)["paths"][:3]
    samples = [dict(zip("RNT", views(path))) for path in strips]
    whole = extractor(strips)
    samples[1]["N"] = None
    with pytest.raises(UserError, match="sample 1 lacks N; add it, or set 'multimodal.missing' to 'skip' or 'without'"):
        extractor(samples)
    with pytest.raises(UserError, match=r"sample 0 lacks T \('nowhere.jpg' does not exist\)"):
        extractor({**samples[0], "T": "nowhere.jpg"})
    skipping = load_extractor(run, overrides=["multimodal.missing", "skip"])
    torch.testing.assert_close(skipping(samples), whole[[0, 2]], rtol=0, atol=1e-5)
    assert skipping.skipped == 1
    without = load_extractor(run, overrides=["multimodal.missing", "without"])
    wanted = whole.clone()
    wanted[1] = banked(run, "-RT")["features"][1]
    torch.testing.assert_close(without(samples), wanted, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="sample 0 has none of R, N, T"):
        without({})


@pytest.mark.parametrize(
    "sample, sentence",
    [
        ({"R": None, "X": 1}, "sample 0 has the modality 'X'"),
        ((1, 2), "sample 0 is a tuple; give a mapping, a tuple of pictures of R, N, T"),
        ([3], "sample 0 is a int"),
        (3, "samples are a int"),
        ("nowhere.jpg", "image 'nowhere.jpg' does not exist"),
    ],
)
def test_what_is_no_sample_is_refused(extractor, sample, sentence):
    with pytest.raises(UserError, match=sentence):
        extractor(sample)


def test_options_of_single_pictures_are_refused(run, extractor):
    with pytest.raises(UserError, match="leave out crops"):
        extractor([], crops=[])
    with pytest.raises(UserError, match="does not take 'pixel_range'"):
        load_extractor(run, pixel_range=[0, 1])


def test_a_gallery_of_samples_is_stored_and_searched(run, tmp_path, capsys):
    store = str(tmp_path / "store")
    assert main(["extract", str(run), store, "--target", "embedded_vehicles_tiny"]) == 0
    gallery = FeatureStore(store)
    records = FeatureExtractor(run).test_records("embedded_vehicles_tiny")
    assert len(gallery) == len(records) and gallery.pids.tolist() == [int(record[1]) for record in records]
    query = banked(run)["paths"][0]
    capsys.readouterr()
    assert main(["search", str(run), store, query, "-k", "2", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "ranking.png").is_file()
