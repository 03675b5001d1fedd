"""The relation encoder beside dense forms: time, peak memory, equality.

Run ``python benchmarks/relation.py`` from the root of the repository (``--list`` names the rows). It is judged beside the
best plain dense form (:mod:`plain`), and must keep what it has reached beside the released form: :class:`DenseEncoder`
takes the steps of the code released with NFormer, in its order: one projection to queries, keys and values, the landmark
affinities of all N x N pairs per head, the N x N mask scattered from the neighbour lists anew in every layer and head and
multiplied by its transpose; in testing a sparse tensor made of the masked affinities, in training a softmax over all N x N
entries; GELU and layer norm in elementwise operations. MagFormer has two maps per head, landmark norms and magnitudes, the
difference of the maps and RMSNorm, dense throughout. It is written from that description and from the formulas.

All forms get the same neighbour lists (the search is not timed; what they make of the lists is) and the same landmarks.
Features are synthetic: ten near-duplicates per identity, unit length, 512 dimensions; 4 layers, 2 heads, 5 landmarks, k =
20, dropout off, so that all compute the same.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    DIM,
    IMAGES_PER_IDENTITY,
    Peak,
    alternate,
    available_memory,
    features,
    held_bytes,
    largest,
    lowest_cosine,
    matrix_rates,
)
from harness import Gate, Line, Row, Settings, main, memory, ratio
from plain import WAYS, PlainEncoder, need
from torch import Tensor, nn

from relreid_plugin.magformer.encoder import RelationEncoder
from relreid_plugin.metrics.neighbours import normalise, topk_neighbours
from relreid_plugin.metrics.reciprocal import ReciprocalGraph, reciprocal_graph

K = 20
CLASSES = 751
TITLES = {"nformer": "NFormer", "magformer": "MagFormer"}
LIMIT, LIMIT64, LIMIT_COSINE = 1e-5, 1e-9, 0.999
LARGE, TRIED = 5_000, 4096
"""Images from which on the released form is timed once; images at which the plain form's ways are tried."""
FUSED = tuple(f"attn.{name}.weight" for name in ("query", "key", "value"))


class DenseBlock(nn.Module):
    """One layer of the released form; weights are (inputs, outputs), and every projection has a bias, as released.

    Args:
        block: A layer of :class:`RelationEncoder`, whose weights are copied.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        attn = block.attn
        self.num_maps, self.num_heads = attn.num_maps, attn.num_heads
        self.magnitude, self.differential = attn.magnitude, attn.differential
        self.eps = block.norm1.eps
        if self.differential:
            self.lambda_init, self.rms_eps = attn.lambda_init, attn.norm.eps
        own: dict[str, Tensor] = {name: value.detach() for name, value in block.named_parameters()}
        layout = {"qkv": torch.cat([own.pop(name) for name in FUSED]).t()}
        self.names = {self._key(name): name for name in own}
        for name, value in own.items():
            layout[self._key(name)] = value.t() if self._turned(name) else value
        layout["qkv_bias"], layout["proj_bias"] = layout["qkv"][0] * 0, layout["proj_weight"][0] * 0
        self.w: Any = nn.ParameterDict({key: value.clone().contiguous() for key, value in layout.items()})

    @staticmethod
    def _key(name: str) -> str:
        return name.removeprefix("attn.").replace(".", "_")

    @staticmethod
    def _turned(name: str) -> bool:
        return name.split(".")[-2] in ("proj", "fc1", "fc2") and name.endswith("weight")

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients under the names and in the layout of the copied layer."""
        out = {name: self.w[key].grad for key, name in self.names.items()}
        found = {name: grad.t() if self._turned(name) else grad for name, grad in out.items() if grad is not None}
        fused = self.w["qkv"].grad
        return {**dict(zip(FUSED, fused.t().chunk(3))), **found} if fused is not None else found

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.w[f"{name}_weight"] * ((x - mean) / torch.sqrt(variance + self.eps)) + self.w[f"{name}_bias"]

    def _mlp(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.w["fc1_bias"], x, self.w["fc1_weight"])
        inner = math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))
        return torch.addmm(self.w["fc2_bias"], 0.5 * h * (1 + torch.tanh(inner)), self.w["fc2_weight"])

    def _affinities(self, queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        """(G, N, e) queries, (G, e, N) keys -> (G, N, N)."""
        query_agents, key_agents = queries[:, rows].contiguous(), keys[:, :, rows].contiguous()
        if self.magnitude:
            query_agents = query_agents / query_agents.norm(dim=2, keepdim=True) * self.w["key_magnitude"].unsqueeze(2)
            key_agents = key_agents / key_agents.norm(dim=1, keepdim=True) * self.w["query_magnitude"].unsqueeze(1)
        return ((queries @ key_agents) @ (query_agents @ keys)) / math.sqrt(queries.shape[2])

    @staticmethod
    def _mask(scores: Tensor, lists: Tensor) -> Tensor:
        """Neighbour lists (N, k) -> reciprocal mask of every map (G, N, N), the diagonal always kept."""
        index = lists.unsqueeze(0).repeat(scores.shape[0], 1, 1)
        mask = torch.zeros_like(scores).scatter_(2, index, torch.ones_like(index, dtype=scores.dtype))
        mask.diagonal(dim1=1, dim2=2).fill_(1)
        return mask * mask.transpose(1, 2)

    def _attend(self, x: Tensor, lists: Tensor, rows: Tensor) -> Tensor:
        size, dim = x.shape
        queries, keys, values = torch.addmm(self.w["qkv_bias"], x, self.w["qkv"]).split(dim, dim=1)
        queries = queries.view(size, self.num_maps, -1).permute(1, 0, 2)
        keys = keys.view(size, self.num_maps, -1).permute(1, 2, 0)
        values = values.view(size, self.num_heads, -1).permute(1, 0, 2)
        scores = self._affinities(queries, keys, rows)
        mask = self._mask(scores, lists)
        if self.training or self.differential:
            scores = scores * mask + -1e9 * (1 - mask)
            scores = scores.softmax(dim=2)
            if self.differential:
                scores = scores[0::2] - self._lambda() * scores[1::2]
            heads = scores @ values
        else:  # an affinity of exactly zero would be lost here: the comparison of the results would show it
            heads = torch.bmm(torch.sparse.softmax((scores * mask).to_sparse(), 2), values)
        if self.differential:
            mean_square = heads.pow(2).mean(-1, keepdim=True)
            heads = self.w["norm_weight"] * (heads / torch.sqrt(mean_square + self.rms_eps)) * (1 - self.lambda_init)
        merged = heads.permute(1, 0, 2).contiguous().view(size, dim)
        return torch.addmm(self.w["proj_bias"], merged, self.w["proj_weight"])

    def _lambda(self) -> Tensor:
        first = (self.w["lambda_q1"] * self.w["lambda_k1"]).sum().exp()
        return first - (self.w["lambda_q2"] * self.w["lambda_k2"]).sum().exp() + self.lambda_init

    def forward(self, x: Tensor, lists: Tensor, rows: Tensor) -> Tensor:
        """Refine images (N, d) by their neighbour lists (N, k) with the landmarks ``rows`` (p,)."""
        x = self._layer_norm(x + self._attend(x, lists, rows), "norm1")
        return self._layer_norm(x + self._mlp(x), "norm2")


class DenseEncoder(nn.Module):
    """All layers of the released form, with the weights of an encoder."""

    def __init__(self, encoder: RelationEncoder) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DenseBlock(block) for block in encoder.blocks)

    def forward(self, x: Tensor, lists: Tensor, rows: list[Tensor]) -> Tensor:
        """Refine images (N, d) by their neighbour lists (N, k) with every layer's landmarks."""
        for block, layer_rows in zip(self.blocks, rows):
            x = block(x, lists, layer_rows)
        return x

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients under the encoder's names."""
        blocks: list[Any] = list(self.blocks)
        pairs = ((number, block.gradients()) for number, block in enumerate(blocks))
        return {f"blocks.{number}.{name}": grad for number, found in pairs for name, grad in found.items()}


class Problem:
    """Features, neighbour lists, an encoder and its dense form.

    Args:
        attention: ``nformer`` or ``magformer``.
        size: Images N.
        training: Compute a training step instead of refined features.
        dtype: Of everything.
        dim: Width d.
    """

    def __init__(
        self, attention: str, size: int, *, training: bool, dtype: torch.dtype = torch.float32, dim: int = DIM
    ) -> None:
        torch.manual_seed(0)
        self.training = training
        self.x = normalise(features(size, dim=dim).to(dtype))
        self.lists = topk_neighbours(self.x, self.x, K)
        self.encoder = RelationEncoder(dim, CLASSES, attention=attention, k=K, dropout=0.0).to(dtype).eval()
        rows = [self.encoder.landmark_rows(self.x, layer) for layer in range(len(self.encoder.blocks))]
        self.rows = rows
        self.half = RelationEncoder(dim, CLASSES, attention=attention, k=K, dropout=0.0, precision="bfloat16").to(dtype)
        self.half.load_state_dict(self.encoder.state_dict())
        self.dense = DenseEncoder(self.encoder)
        self.plains = {way: PlainEncoder(self.encoder, way) for way in WAYS}
        for module in (self.encoder, self.half, self.dense, *self.plains.values()):
            module.train(training)
        for encoder in (self.encoder, self.half):
            encoder.landmark_rows = lambda x, layer, size=None: rows[layer]  # type: ignore[method-assign]
        self.weights = torch.randn(size, dim, generator=torch.Generator().manual_seed(1)).to(dtype)

    def graph(self) -> ReciprocalGraph:
        """The lists as a graph; only gradients need the opposite edges."""
        return reciprocal_graph(self.lists, reverse=self.training)

    def ours(self) -> dict[str, Tensor]:
        """Ours in full precision."""
        return self._run(self.encoder, lambda: self.encoder.encode(self.x, graph=self.graph()))

    def in_bfloat16(self) -> dict[str, Tensor]:
        """Ours in bfloat16."""
        return self._run(self.half, lambda: self.half.encode(self.x, graph=self.graph()))

    def plain(self, way: str) -> dict[str, Tensor]:
        """The plain dense form, in one of :data:`plain.WAYS`."""
        return self._run(self.plains[way], lambda: self.plains[way](self.x, self.lists, self.rows))

    def reference(self) -> dict[str, Tensor]:
        """The released form."""
        return self._run(self.dense, lambda: self.dense(self.x, self.lists, self.rows))

    def _run(self, module: RelationEncoder | DenseEncoder | PlainEncoder, form: Callable[[], Tensor]) -> dict[str, Tensor]:
        if not self.training:
            with torch.no_grad():
                return {"features": form()}
        module.zero_grad(set_to_none=True)
        output = form()
        (output * self.weights).sum().backward()
        if isinstance(module, DenseEncoder):
            found = module.gradients()
        else:
            found = {name: value.grad for name, value in module.named_parameters() if value.grad is not None}
        return {"features": output.detach(), **found}


def gap(ours: dict[str, Tensor], reference: dict[str, Tensor], *, each: bool = False) -> float:
    """Largest difference of features, and of gradients as a share of the largest one (of each parameter with ``each``)."""
    names = sorted(reference)
    if names != sorted(ours):
        return float("inf")
    tops = {name: float(reference[name].abs().max()) for name in names if name != "features"}
    top = max(tops.values(), default=1.0)
    scales = {"features": 1.0, **(tops if each else dict.fromkeys(tops, top))}
    return max(largest(ours[name], reference[name]) / scales[name] for name in names)


def gap64(attention: str, *, training: bool, size: int = 200, dim: int = DIM) -> float:
    """:func:`gap` to every dense form in float64 at a small size, gradients of every parameter by their own scale."""
    small = Problem(attention, size, training=training, dtype=torch.float64, dim=dim)
    ours, others = small.ours(), [small.reference(), *(small.plain(way) for way in WAYS)]
    return max(gap(ours, other, each=True) for other in others)


def fastest_way(attention: str, size: int, *, training: bool, repeats: int) -> str:
    """Name in :data:`plain.WAYS` of the fastest at a size, among those that fit into the memory."""
    problem = Problem(attention, size, training=training)
    tried = alternate({way: lambda way=way: problem.plain(way) for way in WAYS}, repeats)
    return min(WAYS, key=lambda way: tried[way].seconds)


def dense_need(attention: str, size: int) -> float:
    """Memory that the released form needs to refine N images, MiB.

    At its worst moment it holds three N x N arrays of every map (affinities, mask, its product with the transpose), and five
    in the softmax over all entries (affinities, mask, its complement, and the two products that are added up).
    """
    maps, arrays = {"nformer": (2, 3), "magformer": (4, 5)}[attention]
    return (4.0 * maps * arrays * size**2 + 25e3 * size) / 2**20


def compare(attention: str, size: int, quick_size: int, *, training: bool, settings: Settings) -> list[Line]:
    """Lines of one comparison: beside the plain form, beside the released one, and bfloat16 as a variant."""
    size = settings.pick(size, quick_size)
    kind = "training step" if training else "eval"
    work = f"{TITLES[attention]} {kind}, N={size:,}"
    small = settings.pick(200, 60)
    difference64 = gap64(attention, training=training, size=small)
    way = fastest_way(attention, min(size, settings.pick(TRIED, 60)), training=training, repeats=1 if settings.quick else 2)
    problem = Problem(attention, size, training=training)
    maps = problem.encoder.blocks[0].attn.num_maps
    needs = {"plain": need(way, size, maps), "released": dense_need(attention, size)}
    free = available_memory()
    dense = {"plain": lambda: problem.plain(way), "released": problem.reference}
    runs = {name: form for name, form in dense.items() if needs[name] + 1024 < free}
    forms = {"ours": problem.ours, "bfloat16": problem.in_bfloat16, **runs}
    timed = alternate(forms, settings.repeats, once={"released"} if size > LARGE else ())
    ours, half = timed["ours"], timed["bfloat16"]
    kept = float(problem.graph().mask.sum()) / size
    lines = []
    for name, reference in (("plain", f"best plain dense form ({way})"), ("released", "dense released form")):
        other = timed.get(name)
        line = Line(work, reference, other and other.seconds, ours.seconds, other and other.mib, ours.mib)
        line.difference = gap(ours.result, other.result) if other else None
        line.equal = difference64 <= LIMIT64 and (line.difference is None or line.difference <= LIMIT)
        line.values, line.kept = {"difference64": difference64}, name == "released"
        if other is None:
            line.reference = f"{reference}: needs {needs[name] / 1024:.0f} GiB"
            line.notes = [
                f"the reference needs {needs[name] / 1024:.1f} GiB (computed), {free / 1024:.1f} GiB are available"
            ]
            line.variant = line.kept  # arithmetic is no measurement: nothing to judge
        lines.append(line)
    lines[0].notes.append(
        f"{kept:.1f} reciprocal neighbours per image; float64 at N={small}: largest difference {difference64:.0e}"
    )
    cosine = lowest_cosine(half.result["features"], ours.result["features"])
    last = Line(f"{work}, bfloat16", lines[0].reference, lines[0].reference_s, half.seconds, variant=True)
    last.reference_mib, last.mib = lines[0].reference_mib, half.mib
    last.difference = largest(half.result["features"], ours.result["features"])
    last.equal = cosine >= LIMIT_COSINE
    last.values = {"cosine": cosine}
    last.notes = [f"lowest cosine similarity of a row to that in float32 {cosine:.5f} (gate: {LIMIT_COSINE})"]
    return [*lines, last]


def known_graph(size: int) -> ReciprocalGraph:
    """Graph of N images without a search: ten near-duplicates known by construction, five partners that look back (random
    pairs), five random images that as a rule do not."""
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(size).unsqueeze(1)
    start = own // IMAGES_PER_IDENTITY * IMAGES_PER_IDENTITY
    mates = (start + torch.arange(IMAGES_PER_IDENTITY)).clamp_max(size - 1)
    partners = torch.empty(size, 5, dtype=torch.long)
    for column in range(5):
        order = torch.randperm(size, generator=generator)
        pairs = order[: size // 2 * 2].view(-1, 2)
        partners[order[-1], column] = order[-1]
        partners[pairs[:, 0], column], partners[pairs[:, 1], column] = pairs[:, 1], pairs[:, 0]
    strangers = torch.randint(size, (size, 5), generator=generator)
    return reciprocal_graph(torch.cat([mates, partners, strangers], dim=1).sort(dim=1).values)


def encoder_operations(encoder: RelationEncoder, size: int) -> float:
    """Operations of the matrix products that refine N images: values, output, MLP, landmark similarities."""
    dim = encoder.dim
    total = 0
    for block in encoder.blocks:
        landmarks = 2 * block.attn.num_maps * encoder.num_landmarks
        total += 2 * dim * (2 * dim + 2 * block.fc1.out_features + landmarks)
    return float(total) * size


def million(settings: Settings) -> list[Line]:
    """MagFormer's encoder alone on a million images, as a share of the measured matrix-product rate."""
    size = settings.pick(1_000_000, 1_000)
    graph = known_graph(size)
    before = matrix_rates(quick=settings.quick)
    lines = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        encoder = RelationEncoder(DIM, CLASSES, attention="magformer", k=K, precision=precision).eval()
        x = features(size)
        with torch.no_grad(), Peak() as peak:
            begin = time.perf_counter()
            encoder.encode(x, graph=graph, inplace=True)
            seconds = time.perf_counter() - begin
        line = Line(f"MagFormer encoder alone, N={size:,}", "none can", seconds=seconds)
        line.mib = peak.mib + held_bytes(graph) / 2**20
        line.equal = bool(torch.isfinite(x.sum()))
        line.values["gflops"] = encoder_operations(encoder, size) / seconds / 1e9
        if precision == "bfloat16":
            line.work, line.variant = f"{line.work}, bfloat16", True
        lines.append(line)
        del x
    after = matrix_rates(quick=settings.quick)
    rates = {name: max(before[name], after[name]) for name in before}
    rates["float32"] = max(rates["float32"], rates.pop("float32_numpy"))
    for line, precision in zip(lines, ("float32", "bfloat16")):
        line.values.update({"rate": rates[precision], "share": line.values["gflops"] / rates[precision]})
        line.notes = [
            f"{line.values['gflops']:.0f} GFLOP/s = {line.values['share']:.0%} of the {rates[precision]:.0f} GFLOP/s of "
            f"this machine's matrix products in {precision}; MiB: above the features, with the graph "
            f"({held_bytes(graph) / 2**20:.0f} MiB); equal: the result is finite"
        ]
    return lines


def _row(attention: str, size: int, quick_size: int, *, training: bool, **gates) -> Row:
    kind = "step" if training else "eval"
    shown = "training step" if training else "eval"
    target = {
        7000: "NFormer / MagFormer eval, N=7,000",
        19281: "NFormer / MagFormer eval, N=19,281",
        2048: "NFormer / MagFormer training step, N=2,048",
    }[size]
    return Row(
        f"{attention}-{kind}-{size}",
        target,
        f"{TITLES[attention]} {shown}, N={size:,}",
        lambda settings: compare(attention, size, quick_size, training=training, settings=settings),
        **gates,
    )


SMALL, LOW, HALF = memory(256), memory(410), memory(512)  # 0.25, 0.4 and 0.5 GiB
NF7, NF19 = (ratio(4), SMALL), (ratio(8), LOW)
ROWS = [
    _row(
        "nformer", 7000, 200, training=False, must=(ratio(4), SMALL), aim=(ratio(8),), kept=(ratio(4), SMALL), needs=3500.0
    ),
    _row("magformer", 7000, 200, training=False, must=(ratio(4.5),), aim=(ratio(8),), kept=(ratio(10),), needs=6000.0),
    _row("nformer", 19281, 200, training=False, must=NF19, aim=(ratio(15),), kept=NF19, needs=2500.0),
    _row("magformer", 19281, 200, training=False, must=(ratio(8), LOW), aim=(ratio(15),), kept=(LOW,), needs=3500.0),
    _row("nformer", 2048, 128, training=True, must=(ratio(1.5), HALF), aim=(ratio(3),), kept=(ratio(1.8),), needs=3000.0),
    _row("magformer", 2048, 128, training=True, must=(ratio(2), HALF), aim=(ratio(3),), kept=(ratio(3),), needs=3500.0),
    Row(
        "encoder-million",
        "encoder alone, N=1,000,000",
        "MagFormer encoder alone, N=1,000,000",
        million,
        must=(memory(3072),),
        aim=(Gate("share", 0.8, text="80 % of the matrix rate"),),
        needs=6144.0,
    ),
]


if __name__ == "__main__":
    sys.exit(main(ROWS, __doc__))
