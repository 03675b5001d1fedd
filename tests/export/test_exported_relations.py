"""The relation encoder's halves: as functions of tensors, as files, and by the command."""

from __future__ import annotations

import json

import pytest
import torch

from relreid_plugin.backbones.runtimes import open_runtime
from relreid_plugin.cli.main import main
from relreid_plugin.errors import UserError
from relreid_plugin.export.relations import ExportedRelations, landmark_rows, relation_graph
from relreid_plugin.export.writers import write_graph
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.magformer.halves import GalleryHalf, QueryHalf, reciprocal_lists
from relreid_plugin.metrics.neighbours import normalise, topk_neighbours
from relreid_plugin.metrics.reciprocal import reciprocal_graph

for needed in ("onnx", "onnxruntime"):
    pytest.importorskip(needed)

ENCODERS = {
    "magformer": {},
    "nformer": {"attention": "nformer", "residual": 0.5},
    "average": {"block": "average", "init": "identity"},
}


def encoder_of(name, *, k=4, dim=16, **options):
    torch.manual_seed(0)
    encoder = RelationEncoder(dim, 5, num_layers=2, k=k, **{**ENCODERS[name], **options}).eval()
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(0.2 * torch.randn_like(value))
        encoder.neck.bn.running_mean.normal_()
    return encoder


def rows(count, seed=1, dim=16):
    return normalise(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def test_reciprocal_lists_are_those_of_the_graph():
    features = rows(40) * torch.linspace(0.2, 2, 40)[:, None]  # by inner products not every row is its own nearest
    lists = topk_neighbours(features, features, 4)
    index, mask = reciprocal_lists(lists)
    graph = reciprocal_graph(lists)
    kept = [set(one[keep].tolist()) for one, keep in zip(index, mask)]
    assert kept == [set(one[keep].tolist()) for one, keep in zip(graph.index, graph.mask)]
    assert any(own not in row for own, row in enumerate(lists.tolist()))
    assert [int(keep.sum()) for keep in mask] == [len(one) for one in kept]


@pytest.mark.parametrize("name", ENCODERS)
def test_files_refine_as_the_encoder(name, tmp_path):
    encoder = encoder_of(name)
    for part in ("gallery", "queries"):
        graph = relation_graph(encoder, part, about={"weights": name})
        write_graph(graph, tmp_path / f"{part}.onnx", "onnx", exporter="trace")
    relations = ExportedRelations(tmp_path / "gallery.onnx", tmp_path / "queries.onnx")
    for size, count in ((60, 7), (9, 1)):  # sizes that no example had
        gallery, queries = rows(size), rows(count, seed=2)
        states = encoder.refine_gallery(gallery)
        wanted = encoder.refine_queries(queries, states)
        found = relations.refine_gallery(3 * gallery)
        assert torch.allclose(found.refined, states.refined, atol=2e-6)
        assert all(torch.allclose(a.values, b.values, atol=1e-5) for a, b in zip(found.layers, states.layers))
        assert torch.allclose(relations.refine_queries(queries, found), wanted, atol=2e-6)
        assert not torch.allclose(wanted, encoder.neck.embed(queries), atol=1e-2)
    with pytest.raises(UserError, match="fewer than the 5 landmarks"):
        relations.refine_gallery(rows(4))
    with pytest.raises(UserError, match=r"takes \(N, 16\)"):
        relations.refine_gallery(rows(9, dim=8))


def test_halves_of_different_encoders_are_not_put_together(tmp_path):
    encoder = encoder_of("magformer")
    for number, part in enumerate(("gallery", "queries")):
        write_graph(relation_graph(encoder, part, about={"weights": str(number)}), tmp_path / f"{part}.onnx", "onnx")
    with pytest.raises(UserError, match="different relation encoders"):
        ExportedRelations(tmp_path / "gallery.onnx", tmp_path / "queries.onnx")
    with pytest.raises(UserError, match="is not the gallery half"):
        ExportedRelations(tmp_path / "queries.onnx", tmp_path / "queries.onnx")


def test_landmarks_are_those_that_the_encoder_draws():
    encoder = encoder_of("magformer", landmark_seed=7)
    features = rows(30)
    wanted = [encoder.landmark_rows(features, layer).tolist() for layer in range(2)]
    assert landmark_rows(encoder, 30).tolist() == wanted


@pytest.mark.parametrize(
    "options, key",
    [
        ({"neighbours": "affinity"}, "relation.neighbours affinity"),
        ({"neighbours": "camera"}, "relation.neighbours camera"),
        ({"landmarks": "farthest"}, "relation.landmarks farthest"),
        ({"head": True}, "relation.head"),
    ],
)
def test_encoders_that_are_refused(options, key):
    encoder = encoder_of("magformer", **options)
    for half in (GalleryHalf, QueryHalf):
        with pytest.raises(UserError, match=key):
            half(encoder)


def test_the_command(tmp_path, tiny_run, capsys):
    for part in ("gallery", "queries"):
        out = tmp_path / f"{part}.onnx"
        assert main(["export", str(tiny_run), "--part", part, "--to", "onnx", "--out", str(out)]) == 0
        proof = json.loads((tmp_path / f"{part}.onnx.proof.json").read_text())
        assert proof["min_cosine"] > 0.9999 and proof["other_first"] == 0 and "inductive" in proof["compared_on"]
        assert open_runtime(out).about["kind"] == f"relation {part}"
    assert ExportedRelations(tmp_path / "gallery.onnx", tmp_path / "queries.onnx").about["dim"] == 32
    words = ["export", str(tiny_run), "--part", "gallery", "--to", "onnx", "--out", str(tmp_path / "x.onnx")]
    assert main([*words, "--fp16"]) == 2 and "exported in float32" in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()
