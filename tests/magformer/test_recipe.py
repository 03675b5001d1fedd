"""The relation recipe: head, neighbours by camera, averaging blocks, and the choice by held-out identities."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, comparable

from relreid_plugin.config.defaults import get_default_config, merge_from_list
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.errors import UserError
from relreid_plugin.features.sets import Features
from relreid_plugin.magformer.benches import Bench, RelationChoice, Score, attend, scored
from relreid_plugin.magformer.cameras import CameraIndex, CameraRule
from relreid_plugin.magformer.company import choose_company
from relreid_plugin.magformer.discriminant import Discriminant, discriminant_projection
from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.magformer.episodes import Episode, fold_episodes, thinned
from relreid_plugin.magformer.recipe import HELD, choose_recipe, choose_relations, with_recipe
from relreid_plugin.magformer.stage import build_encoder, chosen_recipe, encoder_of_state, fit_head
from relreid_plugin.metrics.neighbours import SearchConfig, normalise

DIM = 24


def scene(identities: int = 12, images: int = 6, *, noise: float = 0.5, strip: float = 1.0, seed: int = 0) -> Features:
    """Features with one direction per identity, and one per camera that hides it (``strip``)."""
    rng = np.random.default_rng(seed)
    centers, cameras = rng.standard_normal((identities, DIM)), rng.standard_normal((3, DIM))
    pids = np.repeat(np.arange(identities), images)
    camids = np.tile(np.arange(images) % 3, identities)
    values = centers[pids] + strip * cameras[camids] + noise * rng.standard_normal((len(pids), DIM))
    return Features(torch.from_numpy(values).float(), pids, camids, [f"{row}.jpg" for row in range(len(pids))])


def settings(*overrides):
    cfg = get_default_config()
    merge_from_list(cfg, [str(word) for word in ("relation.attention", "magformer", *overrides)])
    return cfg


# --- head ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shrinkage", "dims", "keep"), [(2.0, 0, 0.0), (0.5, 4, 0.0), (2.0, 4, 0.3), (1.0, 0, 1.0)])
def test_the_head_is_the_regularised_discriminant(shrinkage, dims, keep):
    data = scene()
    x = data.features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    mean = x.mean(axis=0)
    within, centers = np.zeros((DIM, DIM)), []
    for pid in range(12):
        own = x[data.pids == pid]
        centers.append(own.mean(axis=0) - mean)
        within += (own - own.mean(axis=0)).T @ (own - own.mean(axis=0))
    within /= len(x) - 12
    values, vectors = np.linalg.eigh(within + shrinkage * np.trace(within) / DIM * np.eye(DIM))
    weight = vectors @ np.diag(values**-0.5) @ vectors.T
    if dims:
        basis = np.linalg.svd(np.stack(centers) @ weight)[2][:dims]
        weight = weight @ basis.T @ basis
    # similarities: the head's and the features' own, each over its mean square
    total = (x - mean).T @ (x - mean) / len(x)
    head = (1 - keep) * weight @ weight.T / np.trace(weight.T @ total @ weight) + keep * np.eye(DIM) / np.trace(total)
    wanted = (x - mean) @ head @ (x - mean).T
    wanted = wanted / np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    fit = discriminant_projection(data.features, torch.from_numpy(data.pids), shrinkage=shrinkage, dims=dims, keep=keep)
    found = fit(data.features).double().numpy()
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert np.allclose(found @ found.T, wanted, atol=2e-4)


def test_what_makes_no_head_is_said():
    data = scene(identities=4, images=2)
    labels = torch.from_numpy(data.pids)
    for features, own, message in (
        (data.features, labels[:-1], "do not fit 7 labels"),
        (data.features, torch.arange(8), "do not fit a head"),
        (data.features, torch.zeros(8), "do not fit a head"),
        (data.features * torch.nan, labels, "NaN or infinity"),
    ):
        with pytest.raises(UserError, match=message):
            Discriminant(features, own)
    for wrong in ({"shrinkage": 0.0}, {"dims": -1}, {"keep": 1.5}):
        with pytest.raises(UserError, match="a head takes"):
            discriminant_projection(data.features, labels, **wrong)


# --- neighbours by camera -----------------------------------------------------------------------------------------------


def naive_neighbours(similarity, cameras, gallery_cameras, row, other, same, *, itself=None):
    """(rows of other cameras, rows of the own one), best first, ties in gallery order."""
    order = sorted(range(similarity.shape[1]), key=lambda j: (-similarity[row, j], j))
    order = [j for j in order if j != itself]
    foreign = [j for j in order if gallery_cameras[j] != cameras[row]][:other]
    return foreign, [j for j in order if gallery_cameras[j] == cameras[row]][:same]


@pytest.mark.parametrize(("other", "same", "reciprocity"), [(3, 2, 1), (2, 0, 1), (0, 3, 2), (4, 3, 0), (3, 3, 2)])
def test_neighbours_are_counted_by_camera(other, same, reciprocity):
    data = scene(identities=8, images=5)
    x = normalise(data.features)
    similarity = (x @ x.t()).double().numpy()
    rule = CameraRule(other, same, reciprocity, temperature=0.2, offset=0.4)
    index = CameraIndex(x, data.camids, config=SearchConfig(backend="torch"))
    graph, thresholds = rule.graph(index)
    rows = range(len(x))
    reach = [
        naive_neighbours(similarity, data.camids, data.camids, j, other * reciprocity, same * reciprocity, itself=j)
        for j in rows
    ]
    for i in rows:
        foreign, own = naive_neighbours(similarity, data.camids, data.camids, i, other, same, itself=i)
        kept = {j for j in foreign if reciprocity == 0 or i in reach[j][0]}
        kept |= {j for j in own if reciprocity == 0 or i in reach[j][1]}
        found = {int(j): float(b) for j, m, b in zip(graph.index[i], graph.mask[i], graph.bias[i]) if m and int(j) != i}
        assert found.keys() == kept
        assert all(bias == pytest.approx((similarity[i, j] - 0.4) / 0.2, abs=1e-4) for j, bias in found.items())
        assert bool(graph.mask[i, -1]) and int(graph.index[i, -1]) == i and float(graph.bias[i, -1]) == 0
    assert thresholds.shape == (len(x), 2)


def test_queries_without_a_camera_take_all_images_for_those_of_others():
    data = scene(identities=6, images=4)
    x = normalise(data.features)
    index = CameraIndex(x, data.camids, config=SearchConfig(backend="torch"))
    lists = index.search(x[:5], None, other=4, same=3)
    wanted = (x[:5] @ x.t()).topk(4, dim=1).indices
    assert torch.equal(lists.index[:, :4], wanted) and bool((lists.scores[:, 4:] == -torch.inf).all())
    with pytest.raises(UserError, match="3 camera numbers do not fit 5 images"):
        index.search(x[:5], [0, 1, 2], other=1, same=1)


# --- encoder ------------------------------------------------------------------------------------------------------------


def make_encoder(**changes) -> RelationEncoder:
    torch.manual_seed(3)
    options = {
        "attention": "magformer",
        "num_layers": 2,
        "num_landmarks": 3,
        "neighbours": "camera",
        "init": "identity",
        "block": "average",
        "rule": CameraRule(3, 2, 1, 0.3, 0.5),
        "search": SearchConfig(backend="torch"),
        **changes,
    }
    return RelationEncoder(DIM, 5, **options).eval()


def test_the_untrained_encoder_is_the_weighted_mean_that_was_chosen():
    gallery, query = scene(seed=1), scene(identities=5, seed=2)
    encoder = make_encoder()
    states = encoder.refine_gallery(gallery.features, gallery.camids)
    refined = encoder.refine_queries(query.features, states, query.camids)
    z, x = normalise(gallery.features), normalise(query.features)
    index, rule = CameraIndex(z, gallery.camids), CameraRule(3, 2, 1, 0.3, 0.5)
    among = index.search(z, gallery.camids, other=3, same=2, rows=torch.arange(len(z)))
    thresholds = rule.thresholds(among)
    own, asked = rule.edges(among, thresholds), rule.edges(index.search(x, query.camids, other=3, same=2), thresholds)
    for _ in range(2):
        x, z = attend(x, z, *asked), attend(z, z, *own)
    assert torch.allclose(states.refined @ states.refined.t(), z @ z.t(), atol=2e-3)
    assert torch.allclose(refined @ states.refined.t(), x @ z.t(), atol=2e-3)


def test_a_query_does_not_depend_on_the_others():
    gallery, query = scene(seed=1), scene(identities=5, seed=2)
    encoder = make_encoder()
    with torch.no_grad():
        for value in encoder.parameters():  # as if trained
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(4)))
    states = encoder.refine_gallery(gallery.features, gallery.camids)
    together = encoder.refine_queries(query.features, states, query.camids)
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(5))
    shuffled = encoder.refine_queries(query.features[order], states, query.camids[order.numpy()], chunk=4)
    assert torch.allclose(together[order], shuffled, atol=1e-6)
    alone = encoder.refine_queries(query.features[:1], states, query.camids[:1])
    assert torch.allclose(alone, together[:1], atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": CameraRule(3, 2, 1, 0.0, 0.5)},
        {"rule": CameraRule(2, 2, 1, 0.3, 0.5)},
        {"rule": CameraRule(3, 1, 1, 0.3, 0.5)},
        {"rule": CameraRule(3, 2, 0, 0.3, 0.5)},
        {"rule": CameraRule(3, 2, 1, 0.3, 0.2)},
        {"residual": 0.5},
        {"block": "transformer"},
        {"init": "paper"},
        {"neighbours": "feature", "rule": None},
        {"num_layers": 1},
    ],
)
def test_every_switch_does_something(change):
    gallery = scene(seed=1)
    plain = make_encoder().refine_gallery(gallery.features, gallery.camids).refined
    assert not torch.allclose(
        plain, make_encoder(**change).refine_gallery(gallery.features, gallery.camids).refined, atol=1e-4
    )


def test_an_anchor_is_the_nearest_image_of_another_camera():
    gallery, query = scene(seed=1), scene(identities=5, seed=2)
    cameras = np.where(np.arange(len(query)) % 4 == 0, -1, query.camids)
    encoder = make_encoder(residual=0.5)
    states = encoder.refine_gallery(gallery.features, gallery.camids)
    plain = encoder.refine_queries(query.features, states, cameras)
    encoder.anchor = 0.7
    anchored = encoder.refine_queries(query.features, states, cameras)
    assert torch.equal(encoder.refine_gallery(gallery.features, gallery.camids).refined, states.refined)
    scores = normalise(query.features) @ normalise(gallery.features).t()
    for row, camera in enumerate(cameras):
        there = [(float(scores[row, column]), column) for column in range(len(gallery)) if gallery.camids[column] != camera]
        wanted = plain[row] + 0.7 * states.refined[max(there)[1]]
        assert torch.allclose(anchored[row], wanted / wanted.norm(), atol=1e-6)
    own = make_encoder(rule=CameraRule(0, 2), anchor=0.7)
    states = own.refine_gallery(gallery.features, gallery.camids)
    first = own.refine_queries(query.features, states, cameras)
    own.anchor = 0.0
    assert torch.equal(first, own.refine_queries(query.features, states, cameras))


def test_in_a_gallery_without_company_every_image_stays_alone():
    gallery, query = scene(seed=1), scene(identities=5, seed=2)
    z = normalise(gallery.features)
    rule = CameraRule(3, 2, 1, 0.3, 0.5)
    nearest = (z @ z.t()).fill_diagonal_(-2).amax(dim=1)
    support = float(nearest.sort().values[len(z) // 4])  # three quarters have company
    for least, alone in ((0.5, False), (0.74, False), (0.77, True), (1.0, True)):
        encoder = make_encoder(rule=CameraRule(3, 2, 1, 0.3, 0.5, support, least), residual=0.5, anchor=0.7)
        states = encoder.refine_gallery(gallery.features, gallery.camids)
        refined = encoder.refine_queries(query.features, states, query.camids)
        free = make_encoder(rule=CameraRule(0, 0) if alone else rule, residual=0.5, anchor=0.7)
        wanted = free.refine_gallery(gallery.features, gallery.camids)
        assert states.alone == alone and torch.allclose(states.refined, wanted.refined, atol=1e-6)
        assert torch.allclose(refined, free.refine_queries(query.features, wanted, query.camids), atol=1e-6)


def test_gradients_reach_neighbours_through_one_sided_edges():
    gallery = scene(identities=4, images=4, seed=1)
    encoder = make_encoder(rule=CameraRule(2, 2, 0, 0.3, 0.5)).double().train()
    encoder.dropout_rate = 0.0
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    x = normalise(gallery.features).double()
    encoder.eval()
    graph = encoder.graph(encoder.inputs(x), gallery.camids)
    block = encoder.blocks[0]
    rows = torch.tensor([0, 3, 5])

    def total(values):
        return (
            block.feed_forward(values, block.attn(values, rows, graph=graph)).square().sum(dim=1).mul(torch.arange(16)).sum()
        )

    values = x.clone().requires_grad_()
    total(values).backward()
    for row, column in itertools.product((0, 7), (1, 11)):
        step = torch.zeros_like(x)
        step[row, column] = 1e-6
        with torch.no_grad():
            numeric = (total(x + step) - total(x - step)) / 2e-6
        assert float(values.grad[row, column]) == pytest.approx(float(numeric), abs=1e-5)


# --- the choice ---------------------------------------------------------------------------------------------------------


def test_episodes_hold_out_whole_identities():
    data = scene(identities=10)
    episodes = fold_episodes(data, folds=2, identities=15, seed=3)
    assert len(episodes) == 4  # two draws of two parts
    for episode in episodes:
        tested = {*episode.query.pids, *episode.gallery.pids}
        assert not tested & set(episode.train.pids) and len(tested) == 5
        assert not set(episode.query.paths) & set(episode.gallery.paths)
    again = fold_episodes(data, folds=2, identities=15, seed=3)
    assert all(one.query.paths == two.query.paths for one, two in zip(episodes, again))
    assert not fold_episodes(scene(identities=3), folds=2)


def test_relations_are_chosen_where_neighbours_help_and_left_where_they_do_not():
    select = settings()
    rich = choose_recipe(fold_episodes(scene(identities=24, images=9, noise=1.6, strip=0.3), identities=24), select)
    assert not rich.relations.nothing and rich.scores["relations"][0] > rich.scores["head"][0]
    lone = scene(identities=24, images=2, noise=2.5, strip=0.3)  # one match per query, mostly strangers nearby
    poor = choose_recipe(fold_episodes(lone, identities=24), select)
    assert poor.scores["relations"][0] >= poor.scores["head"][0] >= poor.scores["image model"][0]
    assert poor.scores["relations"][1] >= poor.scores["image model"][1]
    nothing = choose_recipe([], select)
    assert nothing.head is None and nothing.relations.nothing and "nothing is chosen" in nothing.sentence()
    alone = choose_recipe(fold_episodes(scene(identities=24), identities=24), select, alone=True)
    assert alone.relations.nothing and "relations" not in alone.scores


def held_out_benches(data):
    return [Bench(episode, None) for episode in fold_episodes(data, identities=24)]


def test_first_places_are_kept_by_all_or_gained_by_far():
    def score(hits):
        values = np.array(hits, float)
        return Score(0.5, float(values.mean()), values, values, np.arange(len(values)))

    before = score([1, 1, 0, 0, 0, 0, 0, 0])
    assert score([1, 1, 0, 0, 0, 0, 0, 0]).keeps_first(before, 100) and score([1, 1, 1, 0, 0, 0, 0, 0]).keeps_first(
        before, 100
    )
    lost = score([1, 0, 1, 1, 1, 0, 0, 0])
    assert lost.keeps_first(before, 0.9) and not lost.keeps_first(before, 1.1)  # 2 of 8 more; error 0.25
    assert not score([0, 1, 1, 0, 0, 0, 0, 0]).keeps_first(before, 0.1)
    assert lost.gains_first(before, 0.9) and not before.gains_first(before, 0.0)


def test_loose_settings_must_gain_first_places():
    """Features so good that no first place can be gained: relations hold on to the nearest image."""
    benches = held_out_benches(scene(identities=24, images=9, noise=0.7, strip=0.3))
    chosen, best, _ = choose_relations(benches, neighbours=(0, 2), rounds=(1,), reciprocity=(0,), temperature=(0.0,))
    alone = scored(RelationChoice(), benches)
    assert alone.R1 == 1 and best.mAP > alone.mAP and (chosen.residual, chosen.anchor) == (0.5, 1.0)


def test_what_keeps_first_places_is_tried_in_turns():
    data = scene(identities=24, images=9, noise=2.2, strip=0.3)
    benches = held_out_benches(data)
    tried = {"neighbours": (0, 2), "rounds": (2,), "reciprocity": (0,), "temperature": (0.0,)}
    strict, best, _ = choose_relations(benches, kept=1e6, gain=0.0, **tried)
    alone = scored(RelationChoice(), benches)
    assert (strict.residual, strict.anchor) in HELD and (strict.residual or strict.anchor)
    assert (best.hits >= alone.hits).all() and best.mAP > alone.mAP
    assert np.array_equal(scored(strict, benches).ap, best.ap)
    for residual, anchor in HELD[: HELD.index((strict.residual, strict.anchor))]:
        weaker = scored(RelationChoice(strict.rule, strict.rounds, residual, anchor), benches)
        loose = (residual, anchor) in HELD[:2]  # no first place is gained by a million standard errors
        assert loose or (weaker.hits < alone.hits).any() or weaker.mAP < best.mAP


def test_galleries_are_thinned():
    (episode, *_), rng = fold_episodes(scene(identities=10, images=9), folds=2, identities=10), np.random.default_rng(0)
    once, half, pairs = thinned(episode, rng)
    whole = dict(zip(*np.unique(episode.gallery.pids, return_counts=True)))
    assert np.unique(once.gallery.pids, return_counts=True)[1].tolist() == [1] * len(whole)
    count = dict(zip(*np.unique(half.gallery.pids, return_counts=True)))
    assert sorted(number == whole[pid] for pid, number in count.items()) == [False] * 2 + [True] * 3
    cameras = list(zip(pairs.gallery.pids, pairs.gallery.camids))
    assert set(cameras) == set(zip(episode.gallery.pids, episode.gallery.camids)) and len(set(cameras)) == len(cameras)
    for part in (once, half, pairs):
        assert {*part.gallery.paths} <= {*episode.gallery.paths} and len(part.query)
        for pid, camera in zip(part.query.pids, part.query.camids):
            assert ((part.gallery.pids == pid) & (part.gallery.camids != camera)).any()


def test_relations_stay_away_from_galleries_thinner_than_those_in_which_they_gain():
    data = scene(identities=24, images=9, noise=1.2, strip=0.3)
    benches = held_out_benches(data)
    choice = RelationChoice(CameraRule(3, 3), rounds=2)
    chosen = choose_company(benches, choice, seed=0)
    rule = chosen.rule
    assert 0 < rule.least < 1 and chosen == RelationChoice(
        CameraRule(3, 3, support=rule.support, least=rule.least), rounds=2
    )
    for bench in benches:
        lone = Bench(thinned(bench.episode, np.random.default_rng(5))[0], None)
        assert torch.allclose(lone.refine(chosen)[1], lone.gallery, atol=1e-6)
        assert not torch.allclose(lone.refine(choice)[1], lone.gallery, atol=1e-2)
        assert torch.equal(bench.refine(chosen)[1], bench.refine(choice)[1])
    few = [Bench(thinned(bench.episode, np.random.default_rng(5))[0], None) for bench in benches]
    assert choose_company(few, choice, seed=0) == choice  # nothing to tell apart


@pytest.mark.slow
def test_the_recipe_becomes_keys_and_the_keys_an_encoder(tmp_path):
    data = scene(identities=24, images=9, noise=1.6, strip=0.3)
    cfg = settings("relation.recipe", "held-out", "train.stages", [2], "relation.train.seed", 2)
    overrides = chosen_recipe(cfg, data, None)
    assert chosen_recipe(cfg, data, None) == overrides and chosen_recipe(settings(), data, None) == []
    chosen = with_recipe(cfg, overrides)
    assert chosen.relation.neighbours == "camera" and cfg.relation.neighbours == "feature"
    encoder = build_encoder(chosen, dim=DIM, num_classes=24)
    fit_head(chosen, encoder, data)
    state = {"state_dict": encoder.state_dict(), "dim": DIM, "num_classes": 24, "recipe": overrides}
    back = encoder_of_state(cfg, state, path=tmp_path)
    one, two = (model.eval().refine_gallery(data.features, data.camids).refined for model in (encoder, back))
    assert torch.equal(one, two)


def test_held_out_identities_choose_where_stage_1_is_trained(capsys):
    data, held = scene(identities=12), scene(identities=12, seed=9)
    cfg = settings("relation.recipe", "held-out", "train.stages", [1, 2])
    from relreid_plugin.features.sets import TestFeatures

    first = np.tile(np.arange(6) == 0, 12)
    parts = [
        Features(held.features[torch.from_numpy(rows)], held.pids[rows], held.camids[rows], []) for rows in (first, ~first)
    ]
    found = chosen_recipe(cfg, data, TestFeatures(*parts))
    assert found == choose_recipe([Episode(data, *parts)], cfg).overrides()
    capsys.readouterr()
    chosen_recipe(cfg, data, None)
    assert "hold some out by 'train.val_fraction'" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_the_recipe_trains_tests_and_resumes(tmp_path, tiny_root, command):
    config = {**TINY, "data": {**TINY["data"], "root": str(tiny_root)}}
    config["relation"] = {
        **TINY["relation"],
        "recipe": "held-out",
        "select": {"shrinkage": [2.0], "dims": [0], "keep": [0.0]},
    }
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    code, out, err = command("--config-file", path, "data.save_dir", tmp_path / "straight")
    assert code == 0 and "recipe: " in out, err
    code, _, err = command("--config-file", path, "data.save_dir", tmp_path / "half", "relation.train.max_epoch", 1)
    assert code == 0, err
    code, out, err = command("--config-file", path, "data.save_dir", tmp_path / "half", "--resume")
    assert code == 0 and "recipe: " not in out, err
    assert comparable(tmp_path / "half")["rows"] == comparable(tmp_path / "straight")["rows"]
    state = ckpt.load(Path(tmp_path / "half" / "stage2" / "last.pth.tar"), kind="relation")
    assert "relation.camera.other" in state["recipe"]
    code, out, err = command("--config-file", path, "data.save_dir", tmp_path / "half", "--eval-only", "test.rivals", "[]")
    assert code == 0 and "+ MagFormer" in out, err
