"""Exported files and packages as extractors: the features of the model that they were made of, from pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relreid_plugin.backbones.exported import open_onnx
from relreid_plugin.cli.main import main
from relreid_plugin.errors import UserError
from relreid_plugin.export.graphs import image_graph
from relreid_plugin.export.writers import write_graph
from relreid_plugin.extractor import load_extractor
from relreid_plugin.features.opening import Request

for needed in ("onnx", "onnxruntime"):
    pytest.importorskip(needed)


class Small(torch.nn.Module):
    """A network with cameras, whose features tell colour, place and camera."""

    uses_cameras = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 8, 5, stride=4)

    def forward(self, images, cameras=None):
        found = self.layer(images).relu().flatten(1)
        return found if cameras is None else found + (cameras >= 0).float().unsqueeze(1)


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


def made(folder, name="model.onnx", **options):
    about = {"model": "small", "pixel_range": []}
    graph = image_graph(Small().eval(), size=(24, 16), mean=MEAN, std=STD, about=about, **options)
    write_graph(graph, folder / name, "onnx", exporter="trace")
    return graph


def photos():
    generator = np.random.default_rng(0)
    return [
        generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((24, 16), (48, 16), (30, 20))
    ]


@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_pictures_through_a_file(with_preprocessing, tmp_path):
    made(tmp_path, with_preprocessing=with_preprocessing)
    extractor = load_extractor(f"onnx:{tmp_path / 'model.onnx'}")
    assert extractor.size == (24, 16) and extractor.dim == 8 * 5 * 3
    found = extractor(photos())
    from PIL import Image

    small = np.stack([np.asarray(Image.fromarray(photo).resize((16, 24), 2)) for photo in photos()])
    images = torch.from_numpy(((small / 255 - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        wanted = Small().eval()(images)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(load_extractor(tmp_path / "model.onnx")(photos()), found)


def test_files_are_told_apart_by_what_is_in_them(tmp_path):
    made(tmp_path, "a.onnx")
    made(tmp_path, "b.onnx", with_preprocessing=True)
    prints = [load_extractor(f"onnx:{tmp_path / name}").fingerprint for name in ("a.onnx", "b.onnx", "a.onnx")]
    assert prints[0] == prints[2] != prints[1]


def test_what_is_no_image_model_is_refused(tmp_path):
    graph = made(tmp_path)
    with pytest.raises(UserError, match="does not take 'size'"):
        open_onnx(str(tmp_path / "model.onnx"), Request(size=(8, 8)))
    graph.about.clear()
    del graph.inputs["cameras"]
    write_graph(graph, tmp_path / "foreign.onnx", "onnx", exporter="trace")
    with pytest.raises(UserError, match="give the size"):
        load_extractor(f"onnx:{tmp_path / 'foreign.onnx'}")
    extractor = load_extractor(f"onnx:{tmp_path / 'foreign.onnx'}", size=(24, 16), mean=MEAN, std=STD)
    assert "made elsewhere" in extractor.notes[0]
    assert torch.allclose(extractor(photos()), load_extractor(f"onnx:{tmp_path / 'model.onnx'}")(photos()), atol=1e-5)
    graph.about.update(kind="relation gallery")
    write_graph(graph, tmp_path / "half.onnx", "onnx", exporter="trace")
    with pytest.raises(UserError, match="not an image model"):
        load_extractor(f"onnx:{tmp_path / 'half.onnx'}")


def test_a_package_takes_pictures_as_its_run(tmp_path, tiny_run):
    assert main(["package", str(tiny_run), "--out", str(tmp_path / "package"), "--licence", "mit"]) == 0
    found = load_extractor(tmp_path / "package")(photos())
    assert torch.allclose(found, load_extractor(tiny_run)(photos()), atol=1e-6) and found.shape == (3, 32)
