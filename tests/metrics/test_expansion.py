"""Query expansion and database augmentation against plain loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relreid_plugin.errors import UserError
from relreid_plugin.metrics.expansion import Expansions, average_query_expansion, database_augmentation


def unit(x):
    norm = np.linalg.norm(x)
    return x / norm if norm else x


def naive(query, gallery, k, alpha, include_self=True, own=False):
    query, gallery = (np.array([unit(row) for row in part.double().numpy()]) for part in (query, gallery))
    out = []
    for i, q in enumerate(query):
        similarity = (gallery * q).sum(1).astype(np.float32)
        order = [j for j in np.argsort(-similarity, kind="stable") if not (own and j == i)][:k]
        total = q.copy() if include_self else np.zeros_like(q)
        for j in order if q.any() else []:
            total = total + max(float(similarity[j]), 0.0) ** alpha * gallery[j]
        out.append(unit(total))
    return np.array(out)


def sets(queries=9, gallery=40, d=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for n in (queries, gallery))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.float16, 5e-3)])
@pytest.mark.parametrize(
    "k, alpha, include_self", [(5, 0.0, True), (3, 3.0, True), (1, 0.5, False), (0, 1.0, True), (99, 2.0, True)]
)
def test_query_expansion_equals_naive(dtype, tolerance, k, alpha, include_self):
    query, gallery = sets(dtype=dtype)
    got = average_query_expansion(query, gallery, k=k, alpha=alpha, include_self=include_self)
    np.testing.assert_allclose(got.numpy(), naive(query, gallery, k, alpha, include_self), atol=tolerance)
    np.testing.assert_allclose(got.norm(dim=1).numpy(), 1, atol=1e-5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("k, alpha", [(4, 0.0), (2, 3.0), (0, 0.0), (100, 1.0)])
def test_database_augmentation_equals_naive(k, alpha):
    _, gallery = sets()
    got = database_augmentation(gallery, k=k, alpha=alpha)
    np.testing.assert_allclose(got.numpy(), naive(gallery, gallery, k, alpha, own=True), atol=1e-7)


def test_a_query_is_alone_with_the_gallery():
    query, gallery = sets(dtype=torch.float32, queries=30, gallery=500, d=64)
    together = average_query_expansion(query, gallery, k=4, alpha=2)
    alone = torch.cat([average_query_expansion(row[None], gallery, k=4, alpha=2) for row in query])
    assert torch.equal(together, alone)


def test_ties_are_taken_in_gallery_order():
    gallery = torch.tensor([[0.0, 1], [1, 1], [1, -1], [1, 1], [2, -2]])
    got = average_query_expansion(torch.tensor([[1.0, 0]]), gallery, k=1, include_self=False)
    assert torch.allclose(got, torch.tensor([[0.5, 0.5]]).sqrt())


def test_duplicates_of_a_gallery_image_do_not_push_out_the_image_itself():
    gallery = torch.cat([torch.tensor([[1.0, 0]]).repeat(6, 1), torch.tensor([[0.0, 1]])])
    got = database_augmentation(gallery, k=2)
    assert torch.allclose(got[:6], gallery[:6])
    assert torch.allclose(got[6], torch.tensor([2.0, 1]) / 5**0.5)


def test_zero_vectors_stay_zero_and_add_nothing():
    query, gallery = torch.tensor([[0.0, 0], [0, 3]]), torch.tensor([[0.0, 0], [0, 1]])
    assert torch.equal(average_query_expansion(query, gallery), torch.tensor([[0.0, 0], [0, 1]]))
    assert torch.equal(database_augmentation(gallery), gallery)


def test_inputs_stay_untouched():
    query, gallery = sets(dtype=torch.float32)
    copies = query.clone(), gallery.clone()
    average_query_expansion(query, gallery, alpha=1)
    database_augmentation(gallery, alpha=1)
    assert torch.equal(query, copies[0]) and torch.equal(gallery, copies[1])


@pytest.mark.parametrize(
    "query, gallery, options, words",
    [
        (torch.ones(2, 3), torch.ones(2, 4), {}, "3 dimensions"),
        (torch.ones(3), torch.ones(2, 3), {}, "query has shape"),
        (torch.ones(2, 3), torch.ones(0, 3), {}, "gallery is empty"),
        (torch.ones(2, 3), torch.ones(2, 3), {"k": -1}, "k is -1"),
        (torch.ones(2, 3), torch.ones(2, 3), {"alpha": -0.5}, "alpha is -0.5"),
        (torch.ones(2, 3), torch.ones(2, 3), {"k": 0, "include_self": False}, "nothing to average"),
        (torch.full((1, 3), torch.nan), torch.ones(9, 3), {}, "NaN"),
    ],
)
def test_mistakes(query, gallery, options, words):
    with pytest.raises(UserError, match=words):
        average_query_expansion(query, gallery, **options)


@pytest.mark.parametrize("k, alpha", [(0, 0.0), (1, 0.0), (3, 1.0), (12, 3.0), (40, 2.0)])
def test_expansions_by_one_search_equal_each_alone(k, alpha):
    query, gallery = sets()
    gallery[7] = gallery[3]  # a tie
    got = Expansions(query, gallery, k=40)(k, alpha)
    torch.testing.assert_close(got[0], average_query_expansion(query, gallery, k=k, alpha=alpha), atol=1e-9, rtol=0)
    torch.testing.assert_close(got[1], database_augmentation(gallery, k=k, alpha=alpha), atol=1e-9, rtol=0)
