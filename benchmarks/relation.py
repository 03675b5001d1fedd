"""The sparse relation encoder beside the dense form of the same formulas: time, peak memory, equality.

Run ``OMP_NUM_THREADS=2 python benchmarks/relation.py`` from the root of the repository. The dense form holds the N x N
affinities and the N x N mask of every layer, head and map, as the code released with NFormer and MagFormer does; it is
written here from the formulas. Both are given the same neighbour lists. Features are synthetic: ten near-duplicates per
identity, unit length, 512 dimensions; 4 layers, 2 heads, 5 landmarks, k = 20.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranking import measure

from relreid_plugin.functional.neighbours import ReciprocalGraph, normalise
from relreid_plugin.models.relation import RelationEncoder


def features(size: int, dim: int = 512) -> torch.Tensor:
    """(N, d) unit features, ten near-duplicates per identity."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(max(1, size // 10), dim, generator=generator)
    return normalise(centers[torch.arange(size) % len(centers)] + 0.5 * torch.randn(size, dim, generator=generator))


def dense_mask(graph: ReciprocalGraph) -> torch.Tensor:
    """The (N, N) mask of a graph."""
    size = graph.index.shape[0]
    mask = torch.zeros(size, size)
    rows = torch.arange(size).unsqueeze(1).expand_as(graph.index)
    mask[rows[graph.mask], graph.index[graph.mask]] = 1.0
    return mask


def dense_attention(x: torch.Tensor, attn: Any, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One attention layer over N x N affinities."""
    size = x.shape[0]
    queries = attn.query(x).view(size, attn.num_maps, attn.map_dim).transpose(0, 1)
    keys = attn.key(x).view(size, attn.num_maps, attn.map_dim).transpose(0, 1)
    values = attn.value(x).view(size, attn.num_heads, attn.head_dim).transpose(0, 1)
    key_agents, query_agents = keys[:, rows], queries[:, rows]
    if attn.magnitude:
        key_agents = normalise(key_agents) * attn.query_magnitude.unsqueeze(2)
        query_agents = normalise(query_agents) * attn.key_magnitude.unsqueeze(2)
    scores = (queries @ key_agents.transpose(1, 2)) @ (keys @ query_agents.transpose(1, 2)).transpose(1, 2)
    maps = (scores / math.sqrt(attn.map_dim) * mask + -1e9 * (1 - mask)).softmax(dim=2)
    if not attn.differential:
        return attn.proj((maps @ values).transpose(0, 1).reshape(size, -1))
    heads = ((maps[0::2] - attn.lambda_value() * maps[1::2]) @ values).transpose(0, 1)
    return attn.proj((attn.norm(heads) * (1 - attn.lambda_init)).reshape(size, -1))


def dense_encode(
    encoder: RelationEncoder, x: torch.Tensor, graph: ReciprocalGraph, rows: list[torch.Tensor]
) -> torch.Tensor:
    """The encoder in its dense form, without dropout."""
    mask = dense_mask(graph)
    for block, layer_rows in zip(encoder.blocks, rows):
        x = block.feed_forward(x, dense_attention(x, block.attn, layer_rows, mask))
    return x


def compare(attention: str, size: int, *, training: bool, repeats: int) -> dict[str, Any]:
    """Time one forward pass, or one training step with its backward pass."""
    torch.manual_seed(0)
    x = features(size)
    encoder = RelationEncoder(512, 751, attention=attention, dropout=0.0).eval()
    graph = encoder.graph(x)
    assert graph is not None
    rows = [encoder._landmark_rows(x, layer) for layer in range(len(encoder.blocks))]
    weights = torch.randn(size, 512, generator=torch.Generator().manual_seed(1))

    def run(form: Callable[[], torch.Tensor]) -> torch.Tensor:
        if not training:
            with torch.no_grad():
                return form()
        encoder.zero_grad(set_to_none=True)
        (form() * weights).sum().backward()
        return torch.cat([value.grad.flatten() for value in encoder.parameters() if value.grad is not None])

    sparse, sparse_seconds, sparse_peak = measure(lambda: run(lambda: encoder.encode(x, graph=graph)), repeats)
    dense, dense_seconds, dense_peak = measure(lambda: run(lambda: dense_encode(encoder, x, graph, rows)), repeats)
    scale = dense.abs().max() if training else 1.0
    return {
        "work": f"{'training step' if training else 'testing'}, {attention}, N = {size:,}",
        "dense_seconds": dense_seconds,
        "seconds": sparse_seconds,
        "ratio": dense_seconds / sparse_seconds,
        "dense_peak_mib": dense_peak,
        "peak_mib": sparse_peak,
        "difference": float((sparse - dense).abs().max() / scale),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=7000, help="images in testing")
    parser.add_argument("--step", type=int, default=2048, help="features of a training step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; dense form against the sparse encoder; peak MiB above the inputs")
    print(f"{'work':<40}{'dense s':>10}{'s':>9}{'ratio':>8}{'dense MiB':>11}{'MiB':>8}{'difference':>12}")
    records = []
    for training, size in ((False, args.size), (True, args.step)):
        for attention in ("nformer", "magformer"):
            record = compare(attention, size, training=training, repeats=args.repeats)
            records.append(record)
            print(
                f"{record['work']:<40}{record['dense_seconds']:>10.2f}{record['seconds']:>9.2f}{record['ratio']:>7.1f}x"
                f"{record['dense_peak_mib']:>11.0f}{record['peak_mib']:>8.0f}{record['difference']:>12.1e}",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
