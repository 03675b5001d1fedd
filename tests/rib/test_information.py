"""The information bottleneck bound: assignments, both terms, Q, centroids, the estimate, over epochs and processes."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from relreid_plugin.rib.bound import InformationBottleneckBound
from relreid_plugin.rib.information import (
    entropy,
    ib_bound,
    ib_bound_terms,
    input_descriptor,
    mutual_information,
    soft_assignment,
)


# --- naive forms ------------------------------------------------------------------------------------------------------
def naive_phi(vector, centroids, beta):
    """softmax_a(-beta ||v/||v|| - c_a||^2) of one vector, by loops."""
    unit = vector / vector.square().sum().sqrt()
    powers = [(-beta * (unit - centroid).square().sum()).exp() for centroid in centroids]
    return torch.stack(powers) / sum(powers)


def naive_ibb(phi_f, phi_x, q, labels):
    """IBB as printed, every sum a loop: 1/n sum_i [sum_a sum_b phi_F phi_X log phi_X - sum_a phi_F log Q(a | y_i)]."""
    total = torch.zeros((), dtype=torch.float64)
    n, classes = phi_f.shape
    for i in range(n):
        for a in range(classes):
            for b in range(classes):
                total = total + phi_f[i, a] * phi_x[i, b] * phi_x[i, b].log()
            total = total - phi_f[i, a] * q[labels[i], a].log()
    return total / n


def naive_information(joint):
    """sum_ab p(a, b) log(p(a, b) / (p(a) p(b)))."""
    rows, columns, total = joint.sum(dim=1), joint.sum(dim=0), 0.0
    for a in range(joint.shape[0]):
        for b in range(joint.shape[1]):
            if joint[a, b] > 0:
                total += float(joint[a, b] * (joint[a, b] / (rows[a] * columns[b])).log())
    return total


def problem(n=9, classes=4, d=5, x=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.arange(n) % classes
    return draw(n, d), draw(n, x), labels, 0.5 * draw(classes, d), 0.5 * draw(classes, x)


# --- pure functions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_assignment_against_loops_with_gradients(beta):
    features, _, _, centroids, _ = problem()
    features.requires_grad_(True)
    found = soft_assignment(features, centroids, beta=beta).exp()
    wanted = torch.stack([naive_phi(vector, centroids, beta) for vector in features])
    assert torch.allclose(found, wanted, atol=1e-13)
    upstream = torch.randn_like(found)
    left = torch.autograd.grad(found, features, upstream)[0]
    assert torch.allclose(left, torch.autograd.grad(wanted, features, upstream)[0], atol=1e-12)


def test_clusters_without_a_centroid_get_nothing():
    features, _, _, centroids, _ = problem()
    seen = torch.tensor([True, False, True, True])
    found = soft_assignment(features, centroids, seen=seen).exp()
    assert torch.equal(found[:, 1], torch.zeros(len(features), dtype=torch.float64))
    assert torch.allclose(found[:, seen], soft_assignment(features, centroids[seen]).exp(), atol=1e-14)


def test_bound_against_loops_with_gradients():
    features, inputs, labels, centroids_f, centroids_x = problem()
    features.requires_grad_(True)
    q = torch.rand(4, 4, dtype=torch.float64)
    q = q / q.sum(dim=1, keepdim=True)
    log_f, log_x = soft_assignment(features, centroids_f), soft_assignment(inputs, centroids_x)
    found = ib_bound(log_f, log_x, q.log()[labels])
    phi_f = torch.stack([naive_phi(vector, centroids_f, 1.0) for vector in features])
    phi_x = torch.stack([naive_phi(vector, centroids_x, 1.0) for vector in inputs])
    wanted = naive_ibb(phi_f, phi_x, q, labels)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), abs=1e-12)
    left = torch.autograd.grad(found, features, retain_graph=True)[0]
    assert torch.allclose(left, torch.autograd.grad(wanted, features)[0], atol=1e-12)
    assert float(left.abs().max()) > 1e-4


def test_the_first_term_has_no_gradient_and_takes_no_training_time():
    features, inputs, labels, centroids_f, centroids_x = problem()
    features.requires_grad_(True)
    inputs.requires_grad_(True)
    log_f, log_x = soft_assignment(features, centroids_f), soft_assignment(inputs, centroids_x)
    first, second = ib_bound_terms(log_f, log_x, torch.zeros(9, 4, dtype=torch.float64))
    assert not first.requires_grad and second.requires_grad
    phi_f = torch.stack([naive_phi(vector, centroids_f, 1.0) for vector in features])
    phi_x = torch.stack([naive_phi(vector, centroids_x, 1.0) for vector in inputs.detach()])
    full = (phi_f.sum(dim=1) * (phi_x * phi_x.log()).sum(dim=1)).sum()
    assert torch.allclose(torch.autograd.grad(full, features)[0], torch.zeros_like(features), atol=1e-14)


@pytest.mark.parametrize("classes,d", [(40, 16), (751, 768)])
def test_equals_the_n_by_c_by_c_form(classes, d):
    features, inputs, labels, centroids_f, centroids_x = problem(12, classes, d, 384, dtype=torch.float32)
    q = torch.rand(classes, classes)
    q = q / q.sum(dim=1, keepdim=True)
    results = []
    for cubic in (False, True):
        leaf = features.clone().requires_grad_(True)
        log_f, log_x = soft_assignment(leaf, centroids_f), soft_assignment(inputs, centroids_x)
        if cubic:
            cube = log_f.exp().unsqueeze(2) * (log_x.exp() * log_x).unsqueeze(1)  # (n, C, C)
            value = (cube.sum(dim=(1, 2)) - (log_f.exp() * q.log()[labels]).sum(dim=1)).mean()
        else:
            value = ib_bound(log_f, log_x, q.log()[labels])
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert abs(float(results[0][0] - results[1][0])) <= 1e-6 * max(1.0, abs(float(results[1][0])))
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_entropy_and_information_of_known_distributions():
    assert float(entropy(torch.tensor([0.5, 0.5, 0.0]))) == pytest.approx(math.log(2))
    assert float(mutual_information(torch.eye(4) / 4)) == pytest.approx(math.log(4), rel=1e-6)
    assert float(mutual_information(torch.ones(3, 4) / 12)) == pytest.approx(0.0, abs=1e-6)
    joint = torch.rand(4, 5, dtype=torch.float64)
    joint[1, 2] = 0.0
    joint /= joint.sum()
    assert float(mutual_information(joint)) == pytest.approx(naive_information(joint), abs=1e-12)


def test_descriptor_is_the_mean_of_every_cell():
    images = torch.rand(2, 3, 32, 24, requires_grad=True)
    found = input_descriptor(images, (16, 8))
    assert found.shape == (2, 384) and not found.requires_grad
    value = images[1, 2, 2 * 5 : 2 * 6, 3 * 7 : 3 * 8].mean()
    assert float(found[1, (2 * 16 + 5) * 8 + 7]) == pytest.approx(float(value.detach()), abs=1e-6)
    assert input_descriptor(torch.rand(1, 3, 20, 9)).shape == (1, 384)


# --- over epochs ------------------------------------------------------------------------------------------------------
def epochs_of(count, *, n=26, classes=5, d=6, x=8, seed=0, missing=()):
    """Batches of ``count`` epochs; ``missing``: (epoch, identity) that does not occur."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(classes, d, generator=generator)
    scenes = torch.randn(classes, x, generator=generator)
    for epoch in range(count):
        labels = torch.randint(classes, (n,), generator=generator)
        labels[:classes] = torch.arange(classes)
        for when, identity in missing:
            if when == epoch:
                labels = labels[labels != identity]
        features = anchors[labels] + 0.7 * torch.randn(len(labels), d, generator=generator)
        inputs = scenes[labels] + 0.7 * torch.randn(len(labels), x, generator=generator)
        yield list(zip(features.split(4), labels.split(4), inputs.split(4)))


class NaiveBound:
    """The state of InformationBottleneckBound by dictionaries and loops, float64."""

    def __init__(self, classes, epsilon=1e-8, beta=1.0):
        self.classes, self.epsilon, self.beta = classes, epsilon, beta
        self.centroids_f, self.centroids_x, self.q = {}, {}, {}

    def phi(self, vector, centroids):
        keys = sorted(centroids)
        values = naive_phi(vector.double(), [centroids[key] for key in keys], self.beta)
        out = torch.zeros(self.classes, dtype=torch.float64)
        out[keys] = values
        return out

    def epoch(self, batches):
        samples = [(f.double(), int(y), x.double()) for batch in batches for f, y, x in zip(*batch)]
        found = None
        if self.centroids_f:
            phi_f = [self.phi(f, self.centroids_f) for f, _, _ in samples]
            phi_x = [self.phi(x, self.centroids_x) for _, _, x in samples]
            if self.q:
                n = len(samples)
                first = second = 0.0
                joint = torch.zeros(self.classes, self.classes, dtype=torch.float64)
                joint_y = torch.zeros(self.classes, self.classes, dtype=torch.float64)
                for f, x, (_, y, _) in zip(phi_f, phi_x, samples):
                    uniform = torch.full((self.classes,), 1 / self.classes, dtype=torch.float64)
                    q = self.q.get(y, uniform)
                    first += sum(float(value * value.log()) for value in x if value > 0)
                    second -= float((f * q.log()).sum())
                    joint += torch.outer(f, x) / n
                    joint_y[:, y] += f / n
                input_entropy = -sum(float(p * p.log()) for p in joint.sum(dim=0) if p > 0)
                i_fx, i_fy = naive_information(joint), naive_information(joint_y)
                ibb = (first + second) / n
                found = {
                    "ibb": ibb,
                    "input_entropy": input_entropy,
                    "ib_bound": ibb + input_entropy,
                    "i_fx": i_fx,
                    "i_fy": i_fy,
                    "ib_estimate": i_fx - i_fy,
                    "ib_holds": 1.0,
                }
            for y in {y for _, y, _ in samples}:
                own = [f for f, (_, label, _) in zip(phi_f, samples) if label == y]
                self.q[y] = (sum(own) / len(own)).clamp_min(self.epsilon)
        for y in {y for _, y, _ in samples}:
            own = [(f / f.norm(), x / x.norm()) for f, label, x in samples if label == y]
            self.centroids_f[y] = sum(f for f, _ in own) / len(own)
            self.centroids_x[y] = sum(x for _, x in own) / len(own)
        return found


@pytest.mark.parametrize(
    "missing", [(), ((2, 1), (3, 1), (3, 4)), ((0, 2), (1, 2), (2, 2)), ((0, 3), (1, 3), (2, 3), (3, 3), (4, 3))]
)
def test_epochs_against_loops_with_absent_and_unseen_identities(missing):
    bound, naive = InformationBottleneckBound(5, 6, input_dim=8), NaiveBound(5)
    measured = 0
    for epoch, batches in enumerate(epochs_of(5, missing=missing)):
        for features, labels, inputs in batches:  # batches of 4 and fewer, C is 5
            value = bound(features, labels, inputs)
            assert (value is None) == (epoch < 2)
            if value is not None:
                assert torch.isfinite(value)
        found, wanted = bound.end_epoch(), naive.epoch(batches)
        assert (found is None) == (wanted is None)
        if wanted is not None:
            measured += 1
            assert found == pytest.approx(wanted, abs=2e-6)
        assert bound.seen.tolist() == [key in naive.centroids_f for key in range(5)]
        for key, centroid in naive.centroids_f.items():
            assert torch.allclose(bound.centroids_f[key].double(), centroid, atol=1e-6)
            assert torch.allclose(bound.centroids_x[key].double(), naive.centroids_x[key], atol=1e-6)
        for key, row in naive.q.items():
            assert torch.allclose(bound.log_q[key].exp().double(), row, atol=1e-6)
    assert measured == 3


def test_batch_value_and_gradient_use_the_previous_epochs_state():
    bound = InformationBottleneckBound(5, 6, input_dim=8, beta=2.0)
    naive = NaiveBound(5, beta=2.0)
    *earlier, last = list(epochs_of(4))
    for batches in earlier:
        for batch in batches:
            bound(*batch)
        bound.end_epoch()
        naive.epoch(batches)
    for features, labels, inputs in last:
        features = features.clone().requires_grad_(True)
        value = bound(features, labels, inputs)
        (gradient,) = torch.autograd.grad(value, features)
        leaf = features.detach().double().requires_grad_(True)
        keys = [naive.centroids_f[key] for key in range(5)]
        phi_f = torch.stack([naive_phi(vector, keys, 2.0) for vector in leaf])
        phi_x = torch.stack([naive.phi(vector, naive.centroids_x) for vector in inputs])
        q = torch.stack([naive.q[key] for key in range(5)])
        wanted = naive_ibb(phi_f, phi_x, q, labels)
        assert float(value.detach()) == pytest.approx(float(wanted.detach()), abs=2e-6)
        assert torch.allclose(gradient.double(), torch.autograd.grad(wanted, leaf)[0], atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_always_holds(seed):
    """Any features, sharp or flat assignments, any Q, classes that are missing."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(torch.randint(2, 30, (1,), generator=generator))
    bound = InformationBottleneckBound(
        classes, 7, input_dim=9, beta=float(10 ** torch.empty(1).uniform_(-1, 2.3, generator=generator))
    )
    held = []
    for batches in epochs_of(5, n=60, classes=classes, d=7, x=9, seed=seed, missing=((2, 0), (4, 1))):
        for features, labels, inputs in batches:
            bound(features, labels, inputs)
        if len(held) == 1:  # a Q that has nothing to do with the data
            bound.log_q.copy_(torch.rand(classes, classes, generator=generator).add(1e-3).log().log_softmax(dim=1))
        found = bound.end_epoch()
        if found is not None:
            held.append(found["ib_holds"])
            assert found["ib_bound"] >= found["ib_estimate"] - 1e-6 - classes * 1e-8
    assert held == [1.0, 1.0, 1.0]


def test_a_bound_that_is_broken_is_reported():
    bound = InformationBottleneckBound(5, 6, input_dim=8)
    for epoch, batches in enumerate(epochs_of(3)):
        for batch in batches:
            bound(*batch)
        if epoch == 2:
            bound.sum_terms -= 100.0 * float(bound.count.sum())
        found = bound.end_epoch()
    assert found["ib_holds"] == 0.0


def test_better_features_lower_the_bound():
    values = []
    for spread in (2.0, 0.5, 0.05):
        bound = InformationBottleneckBound(5, 6, input_dim=8)
        for batches in epochs_of(3):
            for features, labels, inputs in batches:
                anchor = torch.nn.functional.one_hot(labels, 6).float()
                bound(anchor + spread * 0.3 * features, labels, inputs)
            found = bound.end_epoch()
        values.append(found["ibb"])
    assert values[0] > values[1] > values[2]


def test_evaluation_mode_collects_nothing():
    bound = InformationBottleneckBound(5, 6, input_dim=8)
    batches = next(iter(epochs_of(1)))
    bound.eval()
    assert bound(*batches[0]) is None
    assert bound.end_epoch() is None and not bound.seen.any() and not bound.ready


def test_mixed_precision_is_computed_in_float32():
    bound = InformationBottleneckBound(5, 6, input_dim=8)
    for batches in epochs_of(3):
        for features, labels, inputs in batches:
            half = features.bfloat16()
            plain = copy.deepcopy(bound)(half.float(), labels, inputs.bfloat16().float())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                leaf = half.clone().requires_grad_(True)
                value = bound(leaf, labels, inputs.bfloat16())
            if value is not None:
                assert value.dtype == torch.float32
                assert torch.equal(value, plain)
                value.backward()
                assert leaf.grad.dtype == torch.bfloat16
        bound.end_epoch()
    assert {bound.centroids_f.dtype, bound.centroids_x.dtype, bound.log_q.dtype} == {torch.float32}


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_checkpoint_goes_on_to_the_last_digit(stop):
    bound = InformationBottleneckBound(5, 6, input_dim=8)
    wanted, found = [], []
    for epoch, batches in enumerate(epochs_of(4)):
        if epoch == stop:
            file = io.BytesIO()
            torch.save(bound.state_dict(), file)
        for batch in batches:
            value = bound(*batch)
            wanted += [] if epoch < stop or value is None else [float(value)]
        result = bound.end_epoch()
        wanted += [] if epoch < stop else [result]
    file.seek(0)
    other = InformationBottleneckBound(5, 6, input_dim=8)
    other.load_state_dict(torch.load(file, weights_only=True))
    for epoch, batches in enumerate(epochs_of(4)):
        if epoch < stop:
            continue
        for batch in batches:
            value = other(*batch)
            found += [] if value is None else [float(value)]
        found.append(other.end_epoch())
    assert found == wanted


def test_memory_does_not_hold_a_cube():
    """With n C^2 floats (64 * 1041^2 * 4 bytes = 277 MB) left out, a step needs a few n x C arrays."""
    classes = 1041
    bound = InformationBottleneckBound(classes, 32, estimate=False)
    bound.epochs += 2
    bound._epochs = 2
    bound.seen.fill_(True)
    features = torch.randn(64, 32, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: sizes.append(value.numel()) or value, lambda value: value):
        bound(features, torch.randint(classes, (64,)), torch.rand(64, 384)).backward()
    assert max(sizes) <= 64 * classes


def _work(rank, world, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    bound = InformationBottleneckBound(5, 6, input_dim=8)
    for batches in epochs_of(4):
        for index, batch in enumerate(batches):
            if index % world == rank:
                bound(*batch)
        found = bound.end_epoch()
    torch.save({"found": found, "state": bound.state_dict()}, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(_work, args=(2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    bound = InformationBottleneckBound(5, 6, input_dim=8)
    for batches in epochs_of(4):
        for batch in batches:
            bound(*batch)
        wanted = bound.end_epoch()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result["found"] == pytest.approx(wanted, abs=1e-7)
        for name, value in bound.state_dict().items():
            assert torch.allclose(result["state"][name].double(), value.double(), atol=1e-6), name
