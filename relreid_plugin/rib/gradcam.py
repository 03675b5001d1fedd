"""Grad-CAM of trained image models on covered queries, one beside the other (RIB; METHODS 2).

Grad-CAM itself (Selvaraju et al., ICCV 2017) is that of the ``grad-cam`` package; here are the layer, the target and the
pictures. Shape letters: B images, h x w pixels, d feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.overlays import overlay
from ..data.samefile import file_numbers
from ..engine.checkpoint import write_figure, write_json, write_text
from ..engine.runner import Run, open_run
from ..errors import UserError, needed
from ..features.sets import Features
from ..metrics.neighbours import normalise
from .occlusion import choose_target, chosen_queries, load_queries, occlude, occluder_mask, pixels

Reshape = Callable[[Tensor], Tensor]


class _Embedding(nn.Module):
    """The model as a function of the images alone; their cameras, where it reads them, are set beside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cameras: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, d) unit features."""
        features = self.model(images) if self.cameras is None else self.model(images, self.cameras)
        return normalise(features)


def target_layer(model: nn.Module, image_size: tuple[int, int]) -> tuple[nn.Module, Reshape | None]:
    """Return the layer whose activations Grad-CAM weighs, and what makes feature maps of them.

    A plug-in vision transformer: the first normalisation of its last block, patch tokens put back on their grid (the last
    place where the tokens still reach the class token). Any other network: its last layer that gives a feature map.

    Args:
        model: An image model of the plug-in or of the host, in evaluation mode.
        image_size: (h, w).

    Raises:
        UserError: No layer gives a feature map.
    """
    vit, grid = getattr(model, "vit", None), getattr(model, "grid", None)
    if vit is not None and grid is not None:
        prefix = int(vit.num_prefix_tokens)

        def reshape(tokens: Tensor) -> Tensor:
            return tokens[:, prefix:].reshape(len(tokens), *grid, -1).permute(0, 3, 1, 2)

        return vit.blocks[-1].norm1, reshape
    found: list[nn.Module] = []

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            found.append(module)

    hooks = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, *image_size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserError(f"a {type(model).__name__} has no layer that gives a feature map, so there is no Grad-CAM of it.")
    return found[-1], None


def cams(run: Run, images: Tensor, cameras: np.ndarray, wanted: Tensor) -> np.ndarray:
    """Return Grad-CAM of images by a trained model: what speaks for their likeness to given features.

    Args:
        run: An opened run.
        images: (B, 3, h, w) normalised.
        cameras: (B,) rows of the camera embedding of models that have one, -1 for unknown cameras.
        wanted: (B, d) unit features; the score that is explained is the cosine similarity to them.

    Returns:
        (B, h, w) in [0, 1], every image scaled to its largest value.

    Raises:
        UserError: The package ``grad-cam`` is not installed.
    """
    cam_class = needed("pytorch_grad_cam", "Grad-CAM").GradCAM
    model = run.bare
    device = next(model.parameters()).device
    layer, reshape = target_layer(model, (images.shape[2], images.shape[3]))
    embedding = _Embedding(model).eval()
    maps = []
    batch = int(run.cfg.test.batch_size)
    with cam_class(model=embedding, target_layers=[layer], reshape_transform=reshape) as method:
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            if getattr(model, "uses_cameras", False):
                embedding.cameras = torch.from_numpy(np.asarray(cameras[part])).to(device)
            targets = [(lambda feature, row=row: (feature * row).sum()) for row in wanted[part].to(device)]
            maps.append(method(input_tensor=images[part].to(device).clone(), targets=targets))
    return np.concatenate(maps)


@torch.no_grad()
def identity_features(
    run: Run, gallery: Features, images: Tensor, pids: np.ndarray, cameras: np.ndarray, paths: Sequence[str] = ()
) -> Tensor:
    """Return what every image is compared with: the unit mean of its identity's gallery features, or its own feature where
    the gallery does not hold the identity. A gallery image that is the query's own file is left out.

    Args:
        run: An opened run.
        gallery: Its features of a gallery.
        images: (B, 3, h, w) normalised.
        pids: (B,) numbered as the gallery's.
        cameras: (B,) rows of the camera embedding, see :func:`cams`.
        paths: Their files; empty: none of them is in the gallery.

    Returns:
        (B, d) unit features.
    """
    embedding = _Embedding(run.bare).eval()
    device = next(run.bare.parameters()).device
    if getattr(run.bare, "uses_cameras", False):
        embedding.cameras = torch.from_numpy(np.asarray(cameras)).to(device)
    own = embedding(images.to(device)).cpu()
    unit, known = normalise(gallery.features), torch.from_numpy(np.asarray(gallery.pids))
    same = (torch.from_numpy(np.asarray(pids)).unsqueeze(1) == known.unsqueeze(0)).to(unit.dtype)  # (B, N)
    numbers = file_numbers(paths, gallery.paths)
    if numbers is not None:
        same *= torch.from_numpy(numbers[0][:, None] != numbers[1][None])
    means = same @ unit
    return normalise(torch.where(same.sum(dim=1, keepdim=True) > 0, means, own))


def mass_on_occluder(maps: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the share of every map that lies on the occluder.

    Args:
        maps: (B, h, w), not negative.
        mask: (B, h, w) bool.

    Returns:
        (B,); not a number where a map is zero everywhere.
    """
    total = maps.sum(axis=(1, 2))
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, (maps * mask).sum(axis=(1, 2)) / np.maximum(total, 1e-30), np.nan)


def draw_gradcam(
    runs: Mapping[str, str | Path],
    out: Path,
    *,
    target: str | None = None,
    shown: int = 6,
    count: int = 64,
    fraction: float = 0.4,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> str:
    """Draw Grad-CAM of several runs on the same covered queries, and measure how much of it lies on the occluder.

    Writes ``gradcam.png`` (columns: queries; rows: query, covered query, one map per run), ``gradcam.md`` and
    ``gradcam.json``.

    Args:
        runs: Label to run folder.
        out: Where the files go.
        target: Test set; ``None``: the first one of the first run.
        shown: Queries in the picture.
        count: Queries in the table.
        fraction: Share of every query that is covered.
        seed: Seed of the occluders.
        overrides: ``KEY VALUE …`` over the runs' configurations.

    Returns:
        The table.

    Raises:
        UserError: A folder holds no run, or the package ``grad-cam`` is missing.
    """
    from matplotlib.figure import Figure

    if not 0.0 < fraction < 1.0 or min(shown, count) < 1:
        raise UserError("command line: --fraction must lie between 0 and 1, --shown and --count must be at least 1.")
    overlays: list[tuple[str, np.ndarray]] = []
    rows = []
    name = target
    queries: list[str] = []
    pictures: list[tuple[str, np.ndarray]] = []
    for label, folder in runs.items():
        run = open_run(folder, overrides)
        run.network.require_pictures(run)
        name = choose_target({str(folder): run}, name)
        images, files, pids, cameras = load_queries(run, name, max(shown, count))
        if queries and files != queries:
            raise UserError(
                f"run '{folder}' has other queries of '{name}' than the first run; compare runs of one data set."
            )
        queries = files
        paths = [str(item[0]) for item in chosen_queries(run, name, max(shown, count))]
        cameras = run.test_cameras(name)(torch.from_numpy(cameras)).numpy()
        covered = occlude(images, fraction, files, seed=seed)
        size = (images.shape[2], images.shape[3])
        mask = occluder_mask(fraction, files, size, seed=seed).numpy()
        gallery = run.target_features(name).gallery
        maps = cams(run, covered, cameras, identity_features(run, gallery, images, pids, cameras, paths))
        share = mass_on_occluder(maps, mask)
        spread = np.nanstd(share, ddof=1) / np.sqrt(max(1, np.isfinite(share).sum())) if len(share) > 1 else 0.0
        rows.append(
            {
                "label": label,
                "run": str(folder),
                "on_occluder": float(np.nanmean(share)),
                "standard_error": float(spread),
                "area": float(mask.mean()),
                "queries": int(np.isfinite(share).sum()),
            }
        )
        cfg = run.cfg
        index = np.linspace(0, len(images) - 1, min(shown, len(images))).round().astype(int)
        plain, hidden = (pixels(value[index], cfg.data.norm_mean, cfg.data.norm_std) for value in (images, covered))
        if not pictures:
            pictures = [("query", plain), (f"{fraction:.0%} covered", hidden)]
        overlays.append((label, overlay(hidden, maps[index])))
    panels = [*pictures, *overlays]
    width = len(panels[0][1])
    figure = Figure(figsize=(1.2 * width + 0.4, 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), width, squeeze=False)
    for row, (title, values) in enumerate(panels):
        for column, value in enumerate(values):
            axis = axes[row][column]
            axis.imshow(value)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[row][0].set_ylabel(title, fontsize=9)
    write_figure(out / "gradcam.png", figure, dpi=130)
    table = gradcam_table(str(name), fraction, rows)
    write_json(out / "gradcam.json", {"target": name, "fraction": fraction, "seed": seed, "runs": rows})
    write_text(out / "gradcam.md", table + "\n")
    return table


def gradcam_table(target: str, fraction: float, rows: Sequence[dict[str, Any]]) -> str:
    """Return how much of the maps lies on the occluder, as Markdown."""
    lines = [
        f"**{target}**, {fraction:.0%} of every query covered, Grad-CAM of the similarity to the query's identity",
        "",
        "| run | on the occluder | its share of the image | queries |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['label']} | {100 * row['on_occluder']:.1f} % ± {100 * row['standard_error']:.1f} "
        f"| {100 * row['area']:.1f} % | {row['queries']} |"
        for row in rows
    ]
    return "\n".join(lines)
