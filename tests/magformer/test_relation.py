"""Relation attention, encoder and protocols against naive float64 loops (METHODS 1)."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
import torch.nn.functional as F

from relreid_plugin.errors import UserError
from relreid_plugin.magformer import operations
from relreid_plugin.magformer.encoder import RUNGS, RelationEncoder
from relreid_plugin.magformer.operations import farthest_points, feed_forward, gather_dot, gather_sum, reciprocal_softmax
from relreid_plugin.metrics.candidates import exact_scores
from relreid_plugin.metrics.neighbours import SearchConfig, build_faiss_index, normalise, topk_neighbours
from relreid_plugin.metrics.reciprocal import inductive_mask, kth_scores, reciprocal_graph

TORCH = SearchConfig(backend="torch")
CASES = [(rung, neighbours) for rung in RUNGS for neighbours in ("feature", "affinity")]


def clustered(size, dim, identities, *, seed=0, spread=0.6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(identities, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, dim, generator=generator, dtype=torch.float64)
    return normalise(centers[torch.arange(size) % identities] + spread * noise).to(dtype)


def make_encoder(rung, neighbours="feature", *, dim=16, k=4, dtype=torch.float64, seed=1, **options):
    torch.manual_seed(seed)
    encoder = RelationEncoder(
        dim,
        5,
        attention=rung,
        neighbours=neighbours,
        k=k,
        num_layers=2,
        num_heads=2,
        num_landmarks=3,
        search=TORCH,
        **options,
    )
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if "magnitude" in name or "norm" in name:
                value.mul_(torch.rand_like(value) + 0.5)
            elif value.dim() > 1:
                value.mul_(8.0)
    return encoder.to(dtype).eval()


def landmarks_of(encoder, size):
    """The rows that a random draw of the tests uses: the seeded draw of the evaluation."""
    return [encoder.landmark_rows(torch.zeros(size, encoder.dim), layer).tolist() for layer in range(len(encoder.blocks))]


# --- neighbours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 5, 30, 99])
def test_topk_is_the_defined_set(backend, k):
    if backend == "faiss":
        pytest.importorskip("faiss")
    x = clustered(30, 12, 4, dtype=torch.float32)
    x[7] = x[3]
    x[11] = x[3]
    x[20] = 0.0
    found = topk_neighbours(x, x, k, config=SearchConfig(backend=backend))
    scores = (x.double() @ x.double().t()).float()
    for i in range(30):
        assert set(found[i].tolist()) == oracles.topk_set(scores[i].tolist(), min(k, 30))
        assert found[i].tolist() == sorted(found[i].tolist())


def test_topk_of_heavy_ties_takes_the_lower_index():
    x = normalise(torch.ones(80, 6))
    x[40:] = normalise(torch.tensor([[1.0, 1, 1, -1, -1, 1]]))
    found = topk_neighbours(x, x, 20, config=TORCH)
    assert found[0].tolist() == list(range(20))
    assert found[79].tolist() == list(range(40, 60))


def test_topk_does_not_depend_on_the_other_queries():
    x = clustered(400, 32, 5, spread=1e-4, dtype=torch.float32)
    gallery, queries = x[:350], x[350:]
    together = topk_neighbours(queries, gallery, 7, config=TORCH)
    alone = torch.cat([topk_neighbours(q[None], gallery, 7, config=TORCH) for q in queries])
    assert torch.equal(together, alone)


def test_approximate_search_finds_most_neighbours():
    pytest.importorskip("faiss")
    x = clustered(3000, 24, 150, dtype=torch.float32)
    exact = topk_neighbours(x, x, 10, config=TORCH)
    for config in (SearchConfig(index="ivf", nprobe=16), SearchConfig(index="hnsw")):
        index = build_faiss_index(x, config)
        found = topk_neighbours(x, x, 10, config=config, index=index)
        recall = (found.unsqueeze(2) == exact.unsqueeze(1)).any(dim=2).float().mean()
        assert recall > 0.9
        reciprocal_graph(found)


def test_the_gallery_is_indexed_once(monkeypatch):
    pytest.importorskip("faiss")
    from relreid_plugin.metrics import neighbours

    built = []
    original = neighbours.build_faiss_index
    monkeypatch.setattr(neighbours, "build_faiss_index", lambda *args: built.append(1) or original(*args))
    x = clustered(300, 16, 20, dtype=torch.float32)
    encoder = make_encoder("magformer", dtype=torch.float32)
    encoder.search = SearchConfig(backend="faiss")
    states = encoder.refine_gallery(x[:250])
    refined = encoder.refine_queries(x[250:], states, chunk=10)
    assert len(built) == 1
    encoder.search = TORCH
    assert torch.allclose(refined, encoder.refine_queries(x[250:], encoder.refine_gallery(x[:250])), atol=1e-6)


def test_faiss_absent_is_a_fallback_or_one_sentence(monkeypatch):
    monkeypatch.setattr("relreid_plugin.metrics.neighbours.faiss_available", lambda: False)
    assert SearchConfig().resolve() == "torch"
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        SearchConfig(backend="faiss").resolve()
    with pytest.raises(UserError, match=r"relation\.search\.index flat"):
        SearchConfig(index="ivf").resolve()


def test_non_finite_features_are_refused():
    x = torch.zeros(4, 3)
    x[1, 1] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        topk_neighbours(x, x, 2)


@pytest.mark.parametrize("k", [1, 3, 6, 40])
def test_reciprocal_graph_equals_the_dense_mask(k):
    x = clustered(24, 8, 4, dtype=torch.float32)
    x[9] = x[2]
    x[17] = 0.0
    graph = reciprocal_graph(topk_neighbours(x, x, k, config=TORCH))
    dense = torch.zeros(24, 24, dtype=torch.bool)
    rows = torch.arange(24).unsqueeze(1).expand_as(graph.index)
    dense[rows[graph.mask], graph.index[graph.mask]] = True
    assert torch.equal(dense, oracles.reciprocal_mask((x.double() @ x.double().t()).float(), k))
    slots = graph.index.shape[1]
    for i in range(24):
        for s in range(slots):
            if graph.mask[i, s]:
                j, t = divmod(int(graph.reverse[i, s]), slots)
                assert j == graph.index[i, s] and graph.index[j, t] == i and graph.mask[j, t]
    assert int(graph.mask.sum()) == int(dense.sum())


def test_thirty_duplicates_keep_the_diagonal():
    x = normalise(torch.ones(30, 4))
    graph = reciprocal_graph(topk_neighbours(x, x, 20, config=TORCH))
    own = graph.index == torch.arange(30).unsqueeze(1)
    assert bool((own & graph.mask).any(dim=1).all())
    assert int(graph.mask[25].sum()) == 1
    assert graph.mask.sum(dim=1)[:20].tolist() == [20] * 20


@pytest.mark.parametrize("k,size", [(3, 12), (12, 12), (13, 12), (30, 12), (1, 1)])
def test_inductive_mask_is_the_query_row_of_the_joint_mask(k, size):
    x = clustered(size, 6, 3, dtype=torch.float32)
    lists = topk_neighbours(x, x, k, config=TORCH)
    thresholds = kth_scores(x, x, lists)
    queries = torch.cat([clustered(5, 6, 3, seed=3, dtype=torch.float32), x[:1], torch.zeros(1, 6)])
    index = topk_neighbours(queries, x, k, config=TORCH)
    forward = exact_scores(queries, x, index)
    own = queries.double().square().sum(dim=1).float()
    kept = inductive_mask(forward, own, forward, thresholds[index], k=k, size=size)
    for q in range(len(queries)):
        joint = torch.cat([x, queries[q : q + 1]]).double()
        row = oracles.reciprocal_mask((joint @ joint.t()).float(), k)[-1]
        assert set(index[q][kept[q]].tolist()) == set(row[:-1].nonzero().flatten().tolist())


# --- attention ----------------------------------------------------------------------------------------------------------


def test_gather_primitives_have_the_dense_gradients():
    x = clustered(14, 8, 3)
    graph = reciprocal_graph(topk_neighbours(x, x, 5, config=TORCH))
    for groups, width in ((3, 4), (2, 40)):
        a = torch.randn(14, groups, width, dtype=torch.float64, requires_grad=True)
        b = torch.randn(14, groups, width, dtype=torch.float64, requires_grad=True)

        def chain(a, b):
            scores = gather_dot(a, b, graph.index, graph.mask, graph.reverse)
            return gather_sum(reciprocal_softmax(scores, graph.mask), b, graph.index, graph.mask, graph.reverse)

        assert torch.autograd.gradcheck(chain, (a, b))


@pytest.mark.parametrize("rung,neighbours", CASES)
def test_encoder_equals_dense_loops_with_gradients(rung, neighbours):
    x = clustered(18, 16, 4)
    x[5] = x[1]
    x[9] = 0.0
    encoder = make_encoder(rung, neighbours)
    landmarks = landmarks_of(encoder, len(x))
    weights = torch.randn(18, 16, dtype=torch.float64)

    inputs = x.clone().requires_grad_()
    sparse = encoder.encode(inputs)
    (sparse * weights).sum().backward()
    sparse_grads = {name: value.grad.clone() for name, value in encoder.named_parameters() if value.grad is not None}
    encoder.zero_grad(set_to_none=True)

    dense = oracles.encode(x, encoder, landmarks)
    (dense * weights).sum().backward()
    assert torch.allclose(sparse, dense, atol=1e-9, rtol=0)
    names = {name for name, value in encoder.named_parameters() if value.grad is not None}
    assert names == set(sparse_grads) and len(names) > 10
    for name, value in encoder.named_parameters():
        if value.grad is not None:
            assert torch.allclose(sparse_grads[name], value.grad, atol=1e-8, rtol=1e-8), name


def test_feed_forward_has_the_value_and_gradients_of_its_formula():
    torch.manual_seed(3)
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((23, 6), (10, 6), (10,), (6, 10), (6,))]
    weights = torch.randn(23, 6, dtype=torch.float64)

    def formula(x, weight1, bias1, weight2, bias2):
        h = x @ weight1.t() + bias1
        act = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return act @ weight2.t() + bias2

    results = []
    for form in (formula, lambda *args: feed_forward(*args, chunk=7), lambda *args: feed_forward(*args)):
        leaves = [one.clone().requires_grad_(True) for one in tensors]
        out = form(*leaves)
        (out * weights).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    with torch.no_grad():
        results.append([feed_forward(*tensors, chunk=5), *results[0][1:]])
    for result in results[1:]:
        for want, got in zip(results[0], result):
            assert torch.allclose(want, got, atol=1e-12)


@pytest.mark.parametrize("dtype,near", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.0)])
def test_gelu_some_rows_at_a_time_is_torchs(dtype, near, monkeypatch):
    monkeypatch.setattr(operations, "_GELU_ELEMENTS", 30)
    x = torch.linspace(-8, 8, 230, dtype=dtype).view(23, 10).requires_grad_(True)
    wanted = F.gelu(x, approximate="tanh")
    (gradient,) = torch.autograd.grad(wanted, x, torch.full_like(x, 2.0))
    grad, value, place = torch.full_like(x, 2.0), torch.empty_like(x), x.detach().clone()
    operations._gelu_backward(x.detach(), grad, value)
    assert operations._gelu(place, place) is place
    for found, want in ((grad, gradient), (value, wanted), (place, wanted)):
        assert torch.allclose(found, want, atol=near, rtol=0)


@pytest.mark.parametrize("rung,neighbours", CASES)
def test_refining_rows_at_a_time_equals_the_differentiable_form(rung, neighbours):
    x = clustered(37, 16, 6)
    encoder = make_encoder(rung, neighbours)
    want = encoder.encode(x).detach()
    with torch.no_grad():
        assert torch.allclose(encoder.encode(x), want, atol=1e-12)
        states, y = [], x.clone()
        for layer, block in enumerate(encoder.blocks):
            states.append(block.refine_(y, encoder.landmark_rows(y, layer), graph=encoder.graph(x), search=TORCH, chunk=5))
        assert torch.allclose(y, want, atol=1e-12)
        kept = encoder.refine_gallery(x).layers
        for mine, theirs in zip(states, kept):
            assert torch.allclose(mine.keys, theirs.keys) and torch.allclose(mine.values, theirs.values)


def test_encoding_in_place_writes_over_the_features():
    x = 3.0 * clustered(30, 16, 6, dtype=torch.float32)
    encoder = make_encoder("magformer", dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no_grad"):
        encoder.encode(x, inplace=True)
    with torch.no_grad():
        want = encoder.encode(x)
        assert not torch.equal(want, x)
        got = encoder.encode(x, inplace=True)
    assert torch.equal(got, want) and got.data_ptr() == x.data_ptr()
    encoder.train()
    with torch.no_grad(), pytest.raises(RuntimeError, match="eval"):
        encoder.encode(x, inplace=True)


@pytest.mark.parametrize("rung", RUNGS)
def test_float32_is_within_1e5_of_float64(rung):
    x = clustered(60, 32, 8)
    encoder = RelationEncoder(32, 5, attention=rung, k=8, search=TORCH).eval()
    small = encoder(x.float())
    assert torch.allclose(small.double(), encoder.double()(x), atol=1e-5, rtol=0)


def test_magnitudes_start_at_one_and_without_them_malaa_is_not_nformer():
    x = clustered(20, 16, 4)
    encoder = make_encoder("malaa")
    fresh = RelationEncoder(16, 5, attention="malaa")
    for block in fresh.blocks:
        assert torch.equal(block.attn.query_magnitude, torch.ones(2, 5))
    nformer = make_encoder("nformer")
    nformer.load_state_dict({name: value for name, value in encoder.state_dict().items() if "magnitude" not in name})
    assert not torch.allclose(encoder(x), nformer(x), atol=1e-3)


def test_lambda_follows_its_formula():
    encoder = RelationEncoder(16, 5, num_layers=3)
    for number, block in enumerate(encoder.blocks, start=1):
        attn = block.attn
        assert attn.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-0.3 * (number - 1)))
        expected = math.exp((attn.lambda_q1 @ attn.lambda_k1).item()) - math.exp((attn.lambda_q2 @ attn.lambda_k2).item())
        assert attn.lambda_value().item() == pytest.approx(expected + attn.lambda_init, abs=1e-6)


def test_attention_maps_are_the_softmax_of_kept_edges():
    x = clustered(20, 16, 4)
    encoder = make_encoder("magformer")
    outputs = encoder.attention_maps(x)
    assert len(outputs) == 2
    for output in outputs:
        assert torch.allclose(output.maps.sum(dim=2), torch.ones(20, 4, dtype=torch.float64))
        assert float(output.maps.masked_select(~output.mask.unsqueeze(1)).abs().sum()) == 0.0
    lambdas = encoder.blocks[0].attn.lambda_value()
    assert torch.allclose(outputs[0].weights, outputs[0].maps[:, 0::2] - lambdas * outputs[0].maps[:, 1::2])


def test_bfloat16_stays_near_float32_and_trains():
    x = clustered(64, 32, 8, dtype=torch.float32)
    torch.manual_seed(0)
    encoder = RelationEncoder(32, 8, precision="bfloat16", k=8, search=TORCH)
    reference = RelationEncoder(32, 8, k=8, search=TORCH)
    reference.load_state_dict(encoder.state_dict())
    assert (encoder.eval()(x) - reference.eval()(x)).abs().max() < 0.05
    logits, features = encoder.train()(x)
    (logits.float().square().sum() + features.square().sum()).backward()
    assert all(torch.isfinite(value.grad).all() for value in encoder.parameters() if value.grad is not None)


# --- protocols ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung,neighbours", CASES)
def test_inductive_query_is_alone_with_the_gallery(rung, neighbours):
    x = clustered(20, 16, 4)
    encoder = make_encoder(rung, neighbours)
    gallery, queries = x[:16], x[16:]
    landmarks = landmarks_of(encoder, len(gallery))
    states = encoder.refine_gallery(gallery)
    refined = encoder.refine_queries(queries, states)
    assert torch.allclose(states.refined, encoder(gallery), atol=1e-12)
    for q in range(len(queries)):
        expected = oracles.embed(oracles.alone_with_gallery(gallery, queries[q], encoder, landmarks), encoder.neck)
        assert torch.allclose(refined[q], expected, atol=1e-9), q


@pytest.mark.parametrize("neighbours", ["feature", "affinity"])
def test_inductive_scores_do_not_depend_on_the_call(neighbours):
    x = clustered(300, 32, 12, dtype=torch.float32, spread=1.0)
    encoder = make_encoder("magformer", neighbours, dim=32, k=10, dtype=torch.float32)
    states = encoder.refine_gallery(x[:240])
    before = states.refined.clone()
    queries = x[240:]
    reference = encoder.refine_queries(queries, states) @ states.refined.t()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = encoder.refine_queries(queries[order], states) @ states.refined.t()
    alone = torch.cat([encoder.refine_queries(q[None], states) for q in queries]) @ states.refined.t()
    chunked = encoder.refine_queries(queries, states, chunk=7) @ states.refined.t()
    assert (shuffled - reference[order]).abs().max() < 1e-6
    assert (alone - reference).abs().max() < 1e-6
    assert (chunked - reference).abs().max() < 1e-6
    assert torch.equal(states.refined, before)


@pytest.mark.parametrize("landmarks", ["random", "farthest"])
def test_testing_twice_gives_the_same_bytes(landmarks):
    x = clustered(120, 32, 12, dtype=torch.float32)
    encoder = make_encoder("magformer", dim=32, dtype=torch.float32, landmarks=landmarks)
    first = encoder(x)
    torch.manual_seed(99)
    assert torch.equal(first, encoder(x))
    assert torch.equal(encoder.refine_gallery(x).refined, encoder.refine_gallery(x).refined)


def test_training_draws_other_landmarks_every_step():
    encoder = make_encoder("malaa").train()
    draws = {tuple(encoder.landmark_rows(torch.zeros(50, 16), 0).tolist()) for _ in range(8)}
    assert len(draws) > 1


def test_farthest_points_do_not_depend_on_the_order_of_rows():
    x = clustered(40, 8, 5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    chosen, permuted = farthest_points(x, 5), farthest_points(x[order], 5)
    assert order[permuted].tolist() == chosen.tolist()
    assert len(farthest_points(x[:3], 5)) == 3


@pytest.mark.parametrize("rung,neighbours", CASES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_sets_and_k_above_n(rung, neighbours, size):
    encoder = make_encoder(rung, neighbours, k=50)
    x = clustered(size, 16, 2)
    assert torch.isfinite(encoder(x)).all()
    states = encoder.refine_gallery(x)
    queries = torch.cat([x, torch.zeros(1, 16, dtype=x.dtype)])
    assert torch.isfinite(encoder.refine_queries(queries, states)).all()
    assert encoder.refine_queries(x[:0], states).shape == (0, 16)


def test_refining_in_training_mode_is_refused():
    encoder = make_encoder("malaa").train()
    with pytest.raises(RuntimeError, match="eval"):
        encoder.refine_gallery(torch.zeros(3, 16, dtype=torch.float64))


def test_no_tensor_grows_with_n_squared():
    """The encoder's largest allocation on CPU stays linear in N: doubling N does not quadruple it."""
    from torch.profiler import ProfilerActivity, profile

    encoder = make_encoder("magformer", dim=16, dtype=torch.float32)
    peaks = []
    for size in (1500, 3000):
        x = clustered(size, 16, size // 5, dtype=torch.float32)
        graph = encoder.graph(normalise(x))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run, torch.no_grad():
            encoder(x, graph=graph)
        peaks.append(max(event.self_cpu_memory_usage for event in run.events()))
    assert peaks[1] < 2.5 * peaks[0]
    assert peaks[1] < 3000 * 3000 * 4 / 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rung", RUNGS)
def test_cuda_equals_cpu(rung):
    x = clustered(200, 32, 20, dtype=torch.float32)
    encoder = make_encoder(rung, dim=32, dtype=torch.float32)
    expected = encoder(x)
    moved = encoder.cuda()(x.cuda())
    assert torch.allclose(moved.cpu(), expected, atol=1e-4)
