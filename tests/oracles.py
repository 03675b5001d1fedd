"""Naive forms of the formulas: dense matrices, Python loops, float64. Slow on purpose."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def topk_set(scores, k):
    """Indices of the k largest scores, ties by the lower index."""
    order = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))
    return set(order[:k])


def reciprocal_mask(scores, k):
    """Dense M: M_ij = 1 iff j in topk(i) and i in topk(j); the diagonal is kept."""
    size = scores.shape[0]
    nearest = [topk_set(scores[i].tolist(), k) for i in range(size)]
    mask = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        for j in range(size):
            mask[i, j] = i == j or (j in nearest[i] and i in nearest[j])
    return mask


def masked_softmax(scores, mask):
    """Softmax of every row over its kept entries, by loops."""
    size, width = scores.shape
    rows = []
    for i in range(size):
        kept = [j for j in range(width) if mask[i, j]]
        weights = torch.stack([scores[i, j].exp() for j in kept])
        weights = weights / weights.sum()
        row = [torch.zeros((), dtype=scores.dtype)] * width
        for j, weight in zip(kept, weights):
            row[j] = weight
        rows.append(torch.stack(row))
    return torch.stack(rows)


def affinity(x, attn, landmarks, g):
    """Dense affinity of one query/key map, landmark by landmark (paper eq. 1)."""
    e = attn.map_dim
    part = slice(g * e, (g + 1) * e)
    queries, keys = x @ attn.query.weight[part].t(), x @ attn.key.weight[part].t()
    total = torch.zeros(x.shape[0], x.shape[0], dtype=x.dtype)
    for slot, row in enumerate(landmarks):
        key_agent, query_agent = keys[row], queries[row]
        left, right = queries @ key_agent, keys @ query_agent
        if attn.magnitude:
            left = left / key_agent.norm() * attn.query_magnitude[g, slot]
            right = right / query_agent.norm() * attn.key_magnitude[g, slot]
        total = total + left[:, None] * right[None, :]
    return total / math.sqrt(e)


def attention(x, attn, landmarks, feature_mask):
    """Dense relation attention; ``feature_mask`` is None for affinity neighbours."""
    size, width = x.shape[0], attn.head_dim
    values = (x @ attn.value.weight.t()).view(size, attn.num_heads, width)
    maps = []
    for g in range(attn.num_maps):
        scores = affinity(x, attn, landmarks, g)
        mask = feature_mask if feature_mask is not None else reciprocal_mask(scores.detach(), attn.k)
        maps.append(masked_softmax(scores, mask))
    heads = []
    for head in range(attn.num_heads):
        if attn.differential:
            first = torch.exp((attn.lambda_q1 * attn.lambda_k1).sum())
            second = torch.exp((attn.lambda_q2 * attn.lambda_k2).sum())
            scale = first - second + attn.lambda_init
            out = (maps[2 * head] - scale * maps[2 * head + 1]) @ values[:, head]
            out = out / (out.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * attn.norm.weight
            out = out * (1 - attn.lambda_init)
        else:
            out = maps[head] @ values[:, head]
        heads.append(out)
    return torch.cat(heads, dim=1) @ attn.proj.weight.t()


def layer_norm(x, norm):
    mean = x.mean(dim=1, keepdim=True)
    variance = (x - mean).square().mean(dim=1, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def feed_forward(x, attended, block):
    x = layer_norm(x + attended, block.norm1)
    hidden = x @ block.fc1.weight.t() + block.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return layer_norm(x + hidden @ block.fc2.weight.t() + block.fc2.bias, block.norm2)


def encode(features, encoder, landmarks):
    """Dense encoder without dropout; ``landmarks`` holds one list of rows per layer."""
    x = torch.stack([row / max(float(row.norm()), 1e-12) for row in features])
    mask = None
    if encoder.neighbours == "feature":
        mask = reciprocal_mask((x @ x.t()).detach().float(), encoder.k)
    for layer, block in enumerate(encoder.blocks):
        x = feed_forward(x, attention(x, block.attn, landmarks[layer], mask), block)
    return x


def alone_with_gallery(gallery, query, encoder, landmarks):
    """Refine one query against gallery states that never see it, layer by layer, densely.

    The gallery's states are those of the gallery refined alone; at every layer the query is put behind them, the reciprocal
    mask of the joint set is computed, and only the query's row is used.
    """
    unit = lambda rows: F.normalize(rows, dim=1)  # noqa: E731
    states, x = unit(gallery), unit(query[None])
    joint_input = torch.cat([states, x])
    gallery_mask = joint_mask = None
    if encoder.neighbours == "feature":
        gallery_mask = reciprocal_mask((states @ states.t()).float(), encoder.k)
        joint_mask = reciprocal_mask((joint_input @ joint_input.t()).float(), encoder.k)
    for layer, block in enumerate(encoder.blocks):
        joint = torch.cat([states, x])
        row = attention(joint, block.attn, landmarks[layer], joint_mask)[-1:]
        attended = attention(states, block.attn, landmarks[layer], gallery_mask)
        x, states = feed_forward(x, row, block), feed_forward(states, attended, block)
    return x[0]


def embed(x, neck):
    """BNNeck with running statistics, then unit length."""
    out = (x - neck.bn.running_mean) / (neck.bn.running_var + neck.bn.eps).sqrt() * neck.bn.weight
    return F.normalize(out, dim=-1)
