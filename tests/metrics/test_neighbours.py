"""Neighbour search against the float64 oracle of its definition, in every precision and by every way through it."""

from __future__ import annotations

import pytest
import torch

from relreid_plugin.errors import UserError
from relreid_plugin.metrics import candidates, neighbours
from relreid_plugin.metrics.neighbours import SearchConfig, normalise, recall, topk_neighbours
from relreid_plugin.metrics.reciprocal import reciprocal_graph

PRECISIONS = ("full", "bfloat16", "int8")


def defined(queries, gallery, k):
    """(Q, k) sets by the definition: products in float64, rounded to float32, ties by the lower index."""
    scores = (queries.double() @ gallery.double().t()).float()
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def people(size, dim=32, *, each=5, spread=0.5, seed=0):
    """Unit rows, ``each`` near-duplicates per identity, scattered over the set."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(-(-size // each), dim, generator=generator)
    return normalise(centres[torch.arange(size) % len(centres)] + spread * torch.randn(size, dim, generator=generator))


def of_many_norms():
    generator = torch.Generator().manual_seed(1)
    return people(900) * 10.0 ** (4 * torch.rand(900, 1, generator=generator) - 2)


def with_duplicates():
    x = people(900)
    x[100:400] = x[100].clone()  # more than a row has room for
    x[500:503] = x[7].clone()
    x[600:640] = 0.0
    return x


def in_a_cone():
    """Rows that all but coincide: bfloat16 cannot tell them apart, float32 hardly."""
    generator = torch.Generator().manual_seed(2)
    return normalise(torch.ones(700, 24) + 3e-4 * torch.randn(700, 24, generator=generator))


SETS = {
    "people": lambda: people(1100),
    "ties": lambda: torch.randint(-1, 2, (800, 6), generator=torch.Generator().manual_seed(3)).float(),
    "duplicates": with_duplicates,
    "cone": in_a_cone,
    "norms": of_many_norms,
    "tiny": lambda: people(500) * 1e-22,
    "huge": lambda: people(500) * 1e25,
    "negative": lambda: -people(400, spread=0.1).abs(),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 to 128 columns, so that small sets have many."""
    monkeypatch.setattr(candidates, "_TILE_BYTES", 256)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SETS)
def test_self_search_is_the_defined_set(name, precision, small_tiles):
    x = SETS[name]()
    config = SearchConfig(precision=precision)
    expected = defined(x, x, 7)
    assert torch.equal(topk_neighbours(x, x, 7, config=config), expected)
    assert torch.equal(topk_neighbours(x, x.clone(), 7, config=config), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [1, 3, 60])
@pytest.mark.parametrize("tile", [64, 8192])
def test_queries_and_gallery_may_differ(precision, k, tile, monkeypatch):
    monkeypatch.setattr(candidates, "_TILE_BYTES", tile)
    x = people(1003)
    x[3] = 2 * x[40]
    queries, gallery = torch.cat([x[990:], -x[:7], torch.zeros(2, 32)]), x[:990]
    found = topk_neighbours(queries, gallery, k, config=SearchConfig(precision=precision))
    assert torch.equal(found, defined(queries, gallery, k))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size,k", [(1, 1), (2, 1), (17, 16), (130, 129), (130, 500), (150, 40), (300, 20)])
def test_small_sets(size, k, precision):
    x = people(size, 8, each=3)
    found = topk_neighbours(x, x, k, config=SearchConfig(precision=precision))
    assert torch.equal(found, defined(x, x, min(k, size)))


@pytest.mark.parametrize("name", ["people", "ties", "cone"])
def test_float64(name, small_tiles):
    x = SETS[name]().double()
    assert torch.equal(topk_neighbours(x, x, 7), defined(x, x, 7))
    assert torch.equal(topk_neighbours(x[:50], x, 7), defined(x[:50], x, 7))


def test_no_rows():
    x = people(30)
    assert topk_neighbours(x[:0], x, 4).shape == (0, 4)
    assert topk_neighbours(x, x[:0], 4).shape == (30, 0)


def near_ties():
    """40 rows with 60 neighbours each whose scores are a few float32 roundings apart, in 1,000 others."""
    generator = torch.Generator().manual_seed(4)
    x = people(1000, 64, seed=5)
    for row in range(40):
        others = torch.randperm(900, generator=generator)[:60] + 100
        x[others] = normalise(x[row] + 1e-3 * torch.randn(60, 64, generator=generator))
    return x


@pytest.mark.parametrize("precision", PRECISIONS)
def test_near_ties(precision):
    x = near_ties()
    for k in (5, 20):
        assert torch.equal(topk_neighbours(x, x, k, config=SearchConfig(precision=precision)), defined(x, x, k))


def test_rows_within_the_rounding_of_the_quick_scores():
    x = torch.zeros(400, 16)
    x[:, 0], x[:, 1] = 1.0, torch.linspace(0, 1e-3, 400)
    x[:, 2] = torch.rand(400, generator=torch.Generator().manual_seed(6)) * 1e-3
    assert torch.equal(topk_neighbours(x, x, 9, config=SearchConfig(precision="full")), defined(x, x, 9))


def test_a_search_finds_out_what_it_could_not_hold(monkeypatch):
    decided = []
    original = candidates._decide
    monkeypatch.setattr(neighbours, "_decide", lambda rows, *args: decided.append(len(rows)) or original(rows, *args))
    topk_neighbours(people(1100), people(1100), 7)
    assert decided == []
    x = with_duplicates()
    topk_neighbours(x, x, 7)
    scores = x.double() @ x.double().t()
    level = scores.topk(7, dim=1).values[:, -1:]
    crowded = (scores > level - 1e-6).sum(dim=1) > candidates._room(7)
    assert sum(decided) == int(crowded.sum()) >= 340  # the 300 equal rows, the 40 empty ones, and those next to the 300


def test_bars_keep_most_products_out():
    x = people(3000, 64)
    best = candidates._candidates(x, x, 20, torch.bfloat16, certain=True)
    assert int(best.count.max()) <= candidates._room(20)
    _, doubtful = candidates._choose(x, x, 20, best)
    assert not bool(doubtful.any())
    assert 20 <= float(best.count.float().mean()) < 60


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
def test_the_error_bound_holds(kind):
    for x in (people(400, 48), of_many_norms(), in_a_cone()):
        packed = candidates._pack(x, kind)
        difference = (packed.data.double() * packed.unit).norm(dim=1) - x.double().norm(dim=1)
        assert bool((difference.abs() <= packed.error + 1e-6 * packed.norm).all())
        products = (packed.data.double() @ packed.data.double().t()) * packed.unit**2
        reach, blur = packed.norm.max(), packed.error.max()
        bound = packed.error * (reach + blur) + packed.norm * blur + 1e-6 * packed.norm * reach
        assert bool(((products - x.double() @ x.double().t()).abs() <= bound.unsqueeze(1)).all())


def test_reduced_float32_products_do_not_change_the_result():
    x = people(1100)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = topk_neighbours(x, x, 7, config=SearchConfig(precision="full"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, defined(x, x, 7))


# --- scan ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", *PRECISIONS])
def test_scan_finds_nearly_all(precision, small_tiles):
    x = people(2000, 64)
    config = SearchConfig(index="scan", precision=precision)
    expected = defined(x, x, 20)
    found = topk_neighbours(x, x, 20, config=config)
    assert recall(found, expected) > 0.995
    assert torch.equal(found, found.sort(dim=1).values)
    assert recall(topk_neighbours(x[:300], x, 20, config=config), expected[:300]) > 0.995
    doubles = with_duplicates()
    assert topk_neighbours(doubles, doubles, 7, config=config).shape == (900, 7)


def test_scan_of_coordinates_that_differ_in_size():
    x = people(2000, 64)
    x[:, 0] += 1.0
    x = normalise(x)
    assert recall(topk_neighbours(x, x, 20, config=SearchConfig(index="scan", precision="int8")), defined(x, x, 20)) > 0.99


def test_scan_does_not_depend_on_the_tiles(monkeypatch):
    x = people(1500)
    found = []
    for size in (256, 8192):
        monkeypatch.setattr(candidates, "_TILE_BYTES", size)
        found.append(topk_neighbours(x, x, 10, config=SearchConfig(index="scan", precision="int8")))
    assert torch.equal(*found)


# --- choices ------------------------------------------------------------------------------------------------------------


def test_backends():
    pytest.importorskip("faiss")
    assert SearchConfig().resolve() == SearchConfig(index="scan").resolve() == "torch"
    assert SearchConfig(index="ivf").resolve() == SearchConfig(backend="faiss").resolve() == "faiss"
    with pytest.raises(UserError, match="backend auto"):
        SearchConfig(index="scan", backend="faiss").resolve()
    for x in (people(1100), with_duplicates()):
        assert torch.equal(topk_neighbours(x, x, 7, config=SearchConfig(backend="faiss")), defined(x, x, 7))
    assert neighbours.search_index(x, SearchConfig()) is None
    assert neighbours.search_index(x.double(), SearchConfig(backend="faiss")) is None
    assert neighbours.search_index(x, SearchConfig(backend="faiss")).ntotal == 900


def test_precision_follows_the_processor(monkeypatch):
    x = torch.zeros(300, 4)
    able = {"avx512_bf16": True, "avx512_vnni": True, "cpu_name": "x", "num_sockets": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    scan = SearchConfig(index="scan")
    assert neighbours._kind(x, SearchConfig()) == torch.bfloat16
    assert neighbours._kind(x, scan) == torch.int8
    assert neighbours._kind(x[:5], SearchConfig()) == neighbours._kind(x[:5], scan) == torch.float32
    assert neighbours._kind(x.double(), scan) == torch.float64
    able["avx512_vnni"] = False
    assert neighbours._kind(x, scan) == torch.bfloat16
    able["avx512_bf16"] = False
    assert neighbours._kind(x, SearchConfig()) == neighbours._kind(x, scan) == torch.float32
    assert neighbours._kind(x, SearchConfig(precision="bfloat16")) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert neighbours._kind(x, SearchConfig()) == torch.float32


# --- recall and graph ---------------------------------------------------------------------------------------------------


def test_recall():
    truth = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert recall(truth, truth) == 1.0
    assert recall(torch.tensor([[2, 2, 9], [7, 3, 4]]), truth) == pytest.approx(0.5)
    assert recall(torch.tensor([[9, 8, 0, 2, 1], [1, 1, 1, 1, 1]]), truth) == pytest.approx(0.5)


def edges(graph):
    return {(i, int(j)) for i in range(len(graph.index)) for j in graph.index[i][graph.mask[i]]}


@pytest.mark.parametrize("k", [1, 2, 5, 31, 32, 33])
def test_reciprocal_graph(k, monkeypatch):
    x = people(90, 6, each=9)
    x[30:45], x[50] = x[30].clone(), 0.0
    lists = topk_neighbours(x, x, k)
    rows = [set(row.tolist()) for row in lists]
    expected = {(i, j) for i in range(90) for j in rows[i] if i in rows[j]} | {(i, i) for i in range(90)}
    graph = reciprocal_graph(lists)
    assert edges(graph) == expected
    assert int(graph.mask.sum()) == len(expected)
    slots = graph.index.shape[1]
    assert slots == k + any(i not in rows[i] for i in range(90))
    own = torch.arange(90).unsqueeze(1)
    place = torch.arange(90 * slots).view(90, slots)
    opposite = graph.index.flatten()[graph.reverse]
    assert torch.equal(torch.where(graph.mask, opposite, own), own.expand_as(opposite))
    assert torch.equal(torch.where(graph.mask, graph.reverse // slots, graph.index), graph.index)
    assert torch.equal(graph.reverse[~graph.mask], place[~graph.mask])
    assert torch.equal(graph.mask.flatten()[graph.reverse], graph.mask)
    lean = reciprocal_graph(lists, reverse=False)
    assert lean.reverse is None and lean.to("cpu").reverse is None
    assert torch.equal(lean.index, graph.index) and torch.equal(lean.mask, graph.mask)


def test_reciprocal_graph_of_lists_with_repeated_numbers():
    lists = torch.tensor([[0, 1, 1], [0, 0, 0], [2, 2, 2], [0, 1, 2]])
    graph = reciprocal_graph(lists)
    assert edges(graph) == {(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (1, 0)}
    assert int(graph.mask.sum()) == 6
    assert torch.equal(graph.index[~graph.mask], torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 1, 2]))
