"""Whom queries looked at: the listed weights are those that refine them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relreid_plugin.engine.attended import NOBODY, OWN, strongest
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import Features, TestFeatures
from relreid_plugin.magformer.attended import query_attention
from relreid_plugin.magformer.encoder import RelationEncoder

WIDTH, QUERIES, GALLERY = 12, 5, 30


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in (QUERIES, GALLERY):
        numbers = np.arange(count)
        parts.append(Features(torch.randn(count, WIDTH, generator=generator), numbers % 5, numbers % 3, []))
    return TestFeatures(*parts)


@pytest.mark.parametrize("neighbours", ["feature", "camera"])
@pytest.mark.parametrize("attention", ["nformer", "magformer"])
def test_the_listed_weights_refine_the_queries(attention, neighbours):
    torch.manual_seed(1)
    encoder = RelationEncoder(
        WIDTH, 4, attention=attention, neighbours=neighbours, num_layers=2, num_heads=1, k=4, num_landmarks=3
    ).eval()
    for block in encoder.blocks:  # far from even weights
        block.attn.query.weight.data *= 20
        block.attn.key.weight.data *= 20
    data = made()
    index, weight = query_attention(encoder, data, most=GALLERY)
    with torch.no_grad():
        states = encoder.refine_gallery(data.gallery.features, data.gallery.camids)
        wanted = encoder.refine_queries(data.query.features, states, data.query.camids)
        assert (index == OWN).sum(axis=2).tolist() == [[1] * QUERIES] * 2 and (index >= 0).any(axis=2).all()
        for query in range(QUERIES):
            x = encoder.inputs(data.query.features[query : query + 1])
            for layer, block in enumerate(encoder.blocks):
                values = states.layers[layer].values
                total = torch.zeros(1, 1, WIDTH)
                for item, share in zip(index[layer, query].tolist(), weight[layer, query].tolist()):
                    if item != NOBODY:
                        total += share * (block.attn.value(x).view(1, 1, -1) if item == OWN else values[item])
                x = block.feed_forward(x, block.attn._finish(total))
            torch.testing.assert_close(encoder.neck.embed(x)[0], wanted[query], rtol=1e-5, atol=1e-5)
    assert np.ptp(weight[index != NOBODY]) > 0.2
    assert (np.diff(np.where(index == NOBODY, -9, weight), axis=2) <= 0).all()


def test_fewer_are_the_strongest_of_all():
    rng = np.random.default_rng(0)
    weight, index = rng.normal(size=(6, 9)), np.tile(np.arange(9), (6, 1))
    kept = rng.random((6, 9)) > 0.2
    index[:, -1], kept[:, -1], kept[0, :-1] = OWN, True, False
    found, values = strongest(index, weight, kept, 3)
    assert found.shape == values.shape == (6, 4)
    for row in range(6):
        others = sorted((slot for slot in range(8) if kept[row, slot]), key=lambda slot: -abs(weight[row, slot]))[:3]
        wanted = sorted([*others, 8], key=lambda slot: -weight[row, slot])
        empty = 4 - len(wanted)
        assert found[row].tolist() == [OWN if slot == 8 else slot for slot in wanted] + [NOBODY] * empty
        assert values[row].tolist() == pytest.approx([weight[row, slot] for slot in wanted] + [0.0] * empty)


def test_affinity_neighbours_have_no_list():
    encoder = RelationEncoder(WIDTH, 4, neighbours="affinity", num_layers=1, k=4).eval()
    with pytest.raises(UserError, match=r"relation\.neighbours affinity"):
        query_attention(encoder, made())
