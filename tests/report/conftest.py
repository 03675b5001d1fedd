"""Small trained runs whose reports show pictures by their networks."""

from __future__ import annotations

import pytest

LOOKING = [
    *("model.name", "bnneck_baseline", "backbone.name", "timm:test_resnet", "head.feature_dim", 8),
    *("data.height", 64, "data.width", 32, "test.dist_metric", "cosine", "test.rivals", "[]", "train.max_epoch", 1),
]


@pytest.fixture(scope="session")
def looking_runs(tmp_path_factory):
    """The pictures, a run with RIB's bound and one without."""
    wiring = pytest.importorskip("wiring")
    place = tmp_path_factory.mktemp("looking")
    data = wiring.write_pictures(place / "data")
    runs = place / "bound", place / "plain"
    for folder, eta in zip(runs, (1, 0)):
        wiring.execute(wiring.toy_config(data, folder, *LOOKING, "rib.ibb.eta", eta))
    return data, *runs


@pytest.fixture(scope="session")
def vehicle_run(tmp_path_factory):
    """A run of three modalities that was tested with some of them missing, too."""
    wiring = pytest.importorskip("wiring")
    place = tmp_path_factory.mktemp("vehicles")
    keys = ["multimodal.test", ["R+N+T", "R", "N+T"], "test.dist_metric", "cosine", "test.rivals", ["aqe"]]
    wiring.execute(wiring.graft_config(wiring.write_vehicles(place / "data"), place / "run", *keys))
    return place / "run"
