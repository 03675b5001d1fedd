"""Models, losses, encoders, metrics and searches on a card that is only pretended (``pretended.py``): equal to the CPU.

What makes a tensor on the CPU and lets it meet one of the card fails here as it would there. ``pytest -m cuda`` runs the
same cases on a real card, and whole runs (``test_cuda.py``).
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from pretended import MixedDevices, PretendedGenerator, Pretending, on_card, values, waits
from torch.utils._pytree import tree_flatten, tree_map
from wiring import settings

from relreid_plugin.backbones.losses import CompositeLoss
from relreid_plugin.engine.image import _CompositeStep
from relreid_plugin.graft.ffd import DISTANCES, SCHEMES, TOKENS, GraFTLoss
from relreid_plugin.magformer.cameras import CameraRule
from relreid_plugin.magformer.discriminant import Discriminant, Projection
from relreid_plugin.magformer.encoder import RUNGS, RelationEncoder
from relreid_plugin.methods import BASELINE, builders, own_models
from relreid_plugin.metrics import distance, expansion, neighbours, ranking, reciprocal, reranking, verification
from relreid_plugin.metrics.cameras import CameraIndex
from relreid_plugin.metrics.candidates import exact_scores
from relreid_plugin.metrics.rivals import RIVALS
from relreid_plugin.rib.bound import InformationBottleneckBound
from relreid_plugin.rib.dcs import GateNoise
from relreid_plugin.rib.information import input_descriptor
from relreid_plugin.rib.occlusion import occlude

DIM, CLASSES, SIZE = 16, 5, (32, 16)
pytestmark = pytest.mark.usefixtures("one_thread")
NEEDS = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@pytest.fixture(autouse=True)
def _noise_of_the_card(monkeypatch):
    """Noise of gates is drawn on the CPU for every device, and torch has no generator of a card that is not there."""
    draw = GateNoise.sample

    def generator(self, device):
        kind = torch.Generator if device == "cpu" else PretendedGenerator
        return self._generators.setdefault(device, kind().manual_seed(self.seed))

    if torch.cuda.is_available():
        monkeypatch.setattr(GateNoise, "sample", lambda self, *shape: draw(self, shape[0], torch.device("cpu")).to(shape[1]))
    else:
        monkeypatch.setattr(GateNoise, "_generator", generator)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # a view made in it cannot be wrapped


def features(count, *, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, DIM, generator=draw)
    return (centers[torch.arange(count) % CLASSES] + 0.5 * torch.randn(count, DIM, generator=draw)).to(dtype)


def labels(count):
    return torch.arange(count) % CLASSES


def cameras(count):
    return torch.arange(count) // CLASSES % 3


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS])])
def same(request):
    """Run a case on the CPU and on a card, which is pretended, or a real one; compare all that it returns."""
    return functools.partial(compare, pretended=request.param == "pretended")


def to_card(value):
    """Tensors, in containers too, and modules on the real card."""
    if isinstance(value, torch.nn.Module):
        return value.cuda()
    return tree_map(lambda each: each.cuda() if isinstance(each, torch.Tensor) else each, value)


def compare(case, *, pretended, on=True, atol=None):
    """Run a case on the CPU and on a card.

    Args:
        case: Takes what moves tensors and modules to the device, returns tensors, arrays and numbers.
        pretended: Whether the card is pretended.
        on: Whether all tensors that are returned must be on the device.
        atol: Largest difference; ``None``: 1e-5, on a real card 1e-3.
    """
    torch.manual_seed(0)
    want = case(lambda value: value)
    torch.manual_seed(0)
    if pretended:
        with Pretending():
            got = case(on_card)
    else:
        got = case(to_card)
    atol = atol or (1e-5 if pretended else 1e-3)
    if on:
        assert all(each.is_cuda for each in tree_flatten(got)[0] if isinstance(each, torch.Tensor))
    got = tree_map(lambda each: each.cpu() if isinstance(each, torch.Tensor) and not pretended else each, got)
    got = tree_map(lambda each: each.detach().numpy() if isinstance(each, torch.Tensor) else each, values(got))
    want = tree_map(lambda each: each.detach().numpy() if isinstance(each, torch.Tensor) else each, want)
    first, second = tree_flatten(got)[0], tree_flatten(want)[0]
    assert len(first) == len(second) > 0
    for mine, theirs in zip(first, second):
        np.testing.assert_allclose(np.asarray(mine, dtype=np.float64), np.asarray(theirs, dtype=np.float64), atol=atol)


def gradients(module):
    return [value.grad for value in module.parameters() if value.grad is not None]


# --- the pretended card itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + torch.arange(DIM),
        lambda x: torch.cat([x, torch.zeros(1, DIM)]),
        lambda x: x.gather(1, torch.zeros(6, 1, dtype=torch.long)),
        lambda x: torch.zeros(6, DIM).add_(x),
        lambda x: torch.zeros(6)[x[:, 0].long() * 0],
        lambda x: torch.zeros(6, DIM).index_copy_(0, torch.arange(6), x),
        lambda x: torch.nn.Linear(DIM, 2)(x),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
    ],
)
def test_a_planted_fault_is_found(fault):
    with Pretending(), pytest.raises((MixedDevices, TypeError)):
        fault(on_card(features(6)))


def test_what_a_card_allows(same):
    x = features(6)

    def case(to):
        y = to(x)
        out = torch.zeros(6, DIM, device=y.device)
        out[1:3] = x[:2]
        out[torch.arange(2)] = y[:2]
        return y[torch.arange(3)], y * torch.tensor(2.0), out, y.to(torch.float64), torch.empty_like(y).copy_(x), y.nonzero()

    same(case)
    with Pretending():
        card = on_card(x)
        assert card.device.type == "cuda" and card.is_cuda and torch.equal(card.cpu(), x)
        assert torch.arange(3, device=card.device).is_cuda and x.to(card).is_cuda and not card.to("cpu").is_cuda


# --- models -------------------------------------------------------------------------------------------------------------

SMALL = ["data.height", SIZE[0], "data.width", SIZE[1], "model.pretrained", False, "loss.name", "composite"]
VIT = [*SMALL, "backbone.name", "timm:vit_tiny_patch16_224", "vit.patch_size", 8, "vit.depth", 2, "vit.drop_path", 0.0]
CNN = [*SMALL, "backbone.name", "torchvision:shufflenet_v2_x0_5", "backbone.output_stride", 0, "head.feature_dim", DIM]
MODELS = {
    BASELINE: [CNN, *([*CNN, "backbone.name", "host:osnet_x0_25", "rib.attention", kind] for kind in ("se", "cbam", "dcs"))],
    "vit_baseline": [VIT, [*VIT, "rib.attention", "dcs"]],
    "transreid": [[*VIT, "rib.attention", "dcs", "vit.parts", 2, "vit.stride", 6]],
    "graft": [[*VIT, "multimodal.modalities", "['R','N']", "graft.heads", 3, "graft.dropout", 0.0, "train.batch_size", 6]],
}


def builder_of(name):
    from relreid_plugin.engine.models import bnneck_baseline

    return bnneck_baseline if name == BASELINE else builders()[name]


@pytest.mark.parametrize("name", [BASELINE, *own_models()])
def test_models(name, same):
    pytest.importorskip("torchreid")
    assert name in MODELS, "a new model needs a small configuration here"
    for keys in MODELS[name]:
        cfg = settings("model.name", name, *keys)
        shape = (4, 2, 3, *SIZE) if name == "graft" else (4, 3, *SIZE)

        def case(to, cfg=cfg, shape=shape):
            torch.manual_seed(1)
            model = to(builder_of(name)(CLASSES, "triplet", False, True, cfg=cfg, num_cameras=3))
            images, more = to(torch.randn(*shape)), []
            if getattr(model, "uses_cameras", False):
                more = [to(torch.tensor([0, 2, -1, 1]))]
            with torch.no_grad():
                tested = model.eval()(images, *more)
            trained = tree_flatten(model.train()(images, *more))[0]
            sum(each.float().square().mean() for each in trained).backward()
            return tested, trained, [each.norm() for each in gradients(model)]

        same(case)


# --- losses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.3, 0.0])
def test_composite_loss(margin, same):
    def case(to):
        loss = to(CompositeLoss(CLASSES, DIM, ce=1.0, triplet=1.0, center=0.1, margin=margin, label_smoothing=0.1))
        x = to(features(12)).requires_grad_()
        logits = to(torch.randn(12, CLASSES)).requires_grad_()
        total, parts = loss(logits, x, to(labels(12)))
        total.backward()
        return total, dict(parts), x.grad, logits.grad, gradients(loss)

    same(case)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mined", [False, True])
def test_fusion_loss(scheme, mined, same):
    def case(to):
        found = []
        for distance_name, tokens in zip(DISTANCES, (*TOKENS, *TOKENS)):
            weights = {"ce": 1.0, "triplet": 1.0, "center": 0.1}
            loss = to(GraFTLoss(CLASSES, DIM, mined=mined, scheme=scheme, distance=distance_name, tokens=tokens, **weights))
            fused, data = (to(features(12, seed=seed)).requires_grad_() for seed in (1, 2))
            total, parts = loss.fused_loss(to(torch.randn(12 if mined else 4, CLASSES)), fused, data, to(labels(12)))
            total.backward()
            found.append((total, dict(parts), fused.grad, data.grad, loss.gaps.summary()))
        return found

    same(case)


def test_information_bound(same):
    def case(to):
        bound, found = to(InformationBottleneckBound(CLASSES, DIM, input_dim=384)).train(), []
        images = to(torch.randn(12, 3, *SIZE))
        for _ in range(3):
            x = to(features(12)).requires_grad_()
            value = bound(x, to(labels(12)), input_descriptor(images))
            if value is not None:
                value.backward()
                found += [value, x.grad]
            found.append(bound.end_epoch() or {})
        return found, bound.log_q

    same(case)
    same(lambda to: occlude(to(torch.randn(4, 3, *SIZE)), 0.4, list("abcd"), fill="noise"))


# --- relations ----------------------------------------------------------------------------------------------------------

ENCODERS = {
    **{name: {"attention": name} for name in RUNGS},
    "affinity": {"neighbours": "affinity"},
    "farthest": {"landmarks": "farthest", "residual": 0.5},
    "cameras": {"neighbours": "camera", "rule": CameraRule(4, 3), "block": "average", "init": "identity", "head": True},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_relation_encoders(name, same):
    def case(to):
        torch.manual_seed(2)
        encoder = RelationEncoder(DIM, CLASSES, num_layers=2, k=4, num_landmarks=3, dropout=0.0, **ENCODERS[name])
        encoder, x, seen = to(encoder), to(features(20)), cameras(20)
        loss = to(CompositeLoss(CLASSES, DIM, ce=1.0, triplet=1.0, center=0.1))
        logits, refined = encoder.train()(x, cameras=seen)
        loss(logits, refined, to(labels(20)))[0].backward()
        encoder.eval()
        with torch.no_grad():
            whole = encoder(x, cameras=seen)
            states = encoder.refine_gallery(x, cameras=seen)
            queries = encoder.refine_queries(to(features(6, seed=3)), states, cameras=cameras(6))
            inplace = encoder.encode(x.clone(), cameras=seen, inplace=True)
        maps = [] if name == "affinity" else [each.output for each in encoder.attention_maps(x, cameras=seen)]
        return whole, states.refined, queries, inplace, maps, [each.norm() for each in gradients(encoder)]

    same(case)


def test_a_step_has_the_host_wait_for_the_card_four_times_at_most():
    """Are the features finite, is every image in its own list, is the loss finite, and what the log says."""
    torch.manual_seed(2)
    encoder = RelationEncoder(DIM, CLASSES, num_layers=2, k=4, num_landmarks=3, dropout=0.1)
    with Pretending():
        encoder, loss = on_card(encoder), on_card(CompositeLoss(CLASSES, DIM, ce=1.0, triplet=1.0, center=0.1))
        x, pids = on_card(features(40)), on_card(labels(40))
        engine = object.__new__(_CompositeStep)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01)
        vars(engine).update(loss=loss, terms=[], center_optimizer=None, optimizer=optimizer)
        waits.clear()
        said = engine.step(*encoder.train()(x, cameras=cameras(40)), pids)
    assert set(said) == {"loss", "ce", "triplet", "center", "acc"} and 1 <= len(waits) <= 4, waits


def test_the_head_of_a_recipe(same):
    def case(to):
        fit = Discriminant(to(features(20)), to(labels(20)))
        found: Projection = fit.projection(shrinkage=1.0, dims=4, soft=0.0, keep=0.5)
        return [value for value in vars(found).values() if isinstance(value, torch.Tensor)]

    same(case, on=False)


# --- metrics and searches -----------------------------------------------------------------------------------------------

QUERY, GALLERY = features(10, seed=4), features(40, seed=5)
PIDS = labels(10).numpy(), labels(40).numpy()
CAMERAS = cameras(10).numpy() + 5, cameras(40).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_searches(dtype, same):
    config = neighbours.SearchConfig(backend="torch")

    def case(to):
        query, gallery = (to(neighbours.normalise(each.to(dtype))) for each in (QUERY, GALLERY))
        lists = neighbours.topk_neighbours(gallery, gallery, 6, config=config)
        graph = reciprocal.reciprocal_graph(lists)
        index = neighbours.topk_neighbours(query, gallery, 6, config=config)
        forward, limits = exact_scores(query, gallery, index), reciprocal.kth_scores(gallery, gallery, lists)
        own = query.double().square().sum(dim=1).float()
        mask = reciprocal.inductive_mask(forward, own, forward, limits[index], k=6, size=40)
        seen = CameraIndex(gallery, cameras(40), config=config)
        by_camera = seen.search(query, to(cameras(10)), other=3, same=2)
        found = [each for each in vars(by_camera).values() if isinstance(each, torch.Tensor)]
        return lists, graph.index, graph.mask, graph.reverse, index, forward, mask, found

    same(case, on=False)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rankings(metric, same):
    def case(to):
        query, gallery = to(QUERY), to(GALLERY)
        distances = distance.pairwise_distance(query, gallery, metric=metric)
        both = [
            ranking.evaluate_ranking(distances, *PIDS, *CAMERAS),
            ranking.evaluate_features(query, gallery, *PIDS, *CAMERAS, metric=metric, chunk=4),
            ranking.evaluate_cuhk03(distances, *PIDS, *CAMERAS, num_repeats=2),
        ]
        near = [distance.distance_to(gallery, metric=metric)(query), distances]
        return near, [(result.mAP, result.mINP, result.cmc, result.ap) for result in both]

    same(case, on=False)


def test_verification(same):
    def case(to):
        unit = [to(neighbours.normalise(each)) for each in (QUERY, GALLERY)]
        found = verification.verify(verification.cosine_scores(*unit), *PIDS)
        return [value for value in vars(found).values() if isinstance(value, (float, np.ndarray))]

    same(case, on=False)


def test_expansion_and_reranking(same):
    def case(to):
        query, gallery = to(QUERY), to(GALLERY)
        found = [
            expansion.average_query_expansion(query, gallery, k=4, alpha=2.0),
            expansion.database_augmentation(gallery, k=4, alpha=2.0),
        ]
        return found, reranking.k_reciprocal_rerank_features(query, gallery, k1=8, k2=3)

    same(case, on=False)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals(name, same):
    rival = RIVALS[name]

    def case(to):
        found = []
        for protocol in rival.protocols:
            given = {} if rival.cameras == "none" else {"query_cameras": to(cameras(10)), "gallery_cameras": to(cameras(40))}
            found.append(rival.distances(to(QUERY), to(GALLERY), protocol=protocol, **given))
        return found

    same(case, on=False)
