"""How the network of a run is trained in stage 1 and tested: one image or tracklet per sample, by the host's engines."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..backbones.files import WeightFile
from ..data.cameras import CameraTable
from ..data.images import read_image
from ..data.ranges import check_range
from ..data.samefile import first_path
from ..errors import UserError
from ..host import build_datamanager, build_model, build_optimizer, build_scheduler
from ..methods import method_of, methods, takes_several
from . import checkpoint as ckpt
from .base import EngineMixin
from .image import build_image_engine
from .inference import cameras_of_checkpoint, data_of_checkpoint

if TYPE_CHECKING:
    from .runner import Run


@dataclass(frozen=True)
class View:
    """One way to look at the samples of a test set: a row of the table.

    Attributes:
        label: Name of the row.
        part: What its feature banks have behind the test set's name; empty for the whole sample.
        subset: Images of a sample that are looked at; empty: all.
        note: What a user should know of it.
    """

    label: str = "image model"
    part: str = ""
    subset: tuple[str, ...] = ()
    note: str = ""


class Network:
    """What a run asks of its network. Methods derive from it where theirs is trained or tested in another way.

    Args:
        cfg: Configuration of the run.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    # --- data ---------------------------------------------------------------------------------------------------------
    def open_data(self, run: Run) -> Any:
        """Return the host's data manager; for inference on images, without the training data."""
        cfg, path = self.cfg, run.first.tested_path(run)
        if run.inference and path.is_file() and cfg.data.type == "image" and not takes_several(cfg):
            return data_of_checkpoint(cfg, ckpt.load(path, kind="image"), run.folder / "cache")
        return build_datamanager(cfg, cache_dir=run.folder / "cache")

    def camera_table(self, run: Run) -> CameraTable:
        """Return the cameras of the model: the checkpoint's where one is tested or gone on from, else the training set's.

        Raises:
            UserError: A checkpoint would go on with other cameras than it was trained with.
        """
        cfg, own = self.cfg, run.datamanager.cameras
        restores = run.first.will_restore(run)
        path = run.stage_folder(1) / "last.pth.tar" if restores else Path(cfg.model.resume or ".")
        if not self.embeds_cameras or not path.is_file():
            return own
        try:
            state = ckpt.load(path, kind="image")
        except UserError:  # whoever loads the weights says so, or takes a file of another kind
            return own
        table = cameras_of_checkpoint(cfg, state)
        trains_on = 1 in run.stages and state["epoch"] < cfg.train.max_epoch
        same = table.size == own.size if table.cameras is None else table.cameras == own.cameras
        if trains_on and not same and (table.cameras is not None or 1 + own.largest > table.size):
            raise UserError(
                f"checkpoint '{path}' was trained with {table.size} cameras, and the training set's {own.size} are not the "
                "same ones; go on with the data that it was trained with, or train anew in another 'data.save_dir'."
            )
        return table

    @property
    def embeds_cameras(self) -> bool:
        """Whether the model may have an embedding of the training cameras."""
        return any(method.embeds_cameras(self.cfg) for method in methods())

    def data_notes(self, run: Run) -> list[str]:
        """Return what the network misses in the data."""
        if self.embeds_cameras and run.cameras.size == 0:
            return ["the training data has no camera labels; the camera embedding is off."]
        return []

    # --- the model ----------------------------------------------------------------------------------------------------
    @property
    def trains(self) -> bool:
        """Whether stage 1 has anything to train; else no weights are looked for."""
        return True

    def build_model(self, run: Run, cfg: Any, *, pretrained: bool) -> nn.Module:
        """Return the network, not yet moved to a device.

        Args:
            run: The run; its data is open.
            cfg: Its configuration, without weights that a checkpoint will replace.
            pretrained: Start from the weights that the model comes with.
        """
        loss = "softmax" if cfg.loss.name == "softmax" else "triplet"
        options: dict[str, Any] = {"cfg": cfg, "num_cameras": run.cameras.size}
        return build_model(cfg.model.name, run.datamanager.num_train_pids, loss, pretrained, cfg.use_gpu, **options)

    def static(self, run: Run) -> dict[str, Any]:
        """Return what its checkpoints hold beside what every checkpoint does."""
        return {}

    # --- weights ------------------------------------------------------------------------------------------------------
    def stands_alone(self, run: Run) -> bool:
        """Whether the run's folder holds a later stage that is tested without the first one."""
        return False

    def prepare_weights(self, model: nn.Module, file: WeightFile) -> None:
        """Make a model ready for a weight file, before both are compared."""

    # --- training -----------------------------------------------------------------------------------------------------
    def build_engine(self, run: Run) -> tuple[EngineMixin, dict[str, Any]]:
        """Return the engine of stage 1, and the further states that its checkpoints must hold."""
        optimizer = build_optimizer(run.model, self.cfg)
        scheduler = build_scheduler(optimizer, self.cfg)
        dim = getattr(run.bare, "feature_dim", None)
        return build_image_engine(self.cfg, run.datamanager, run.model, optimizer, scheduler, feature_dim=dim)

    def classified(self, items: int) -> int:
        """Return how many of a training batch's items are classified."""
        return items

    # --- tests --------------------------------------------------------------------------------------------------------
    def views(self) -> list[View]:
        """Return the ways to test, one row of the table each; the first one is the headline, which stages refine."""
        return [View()]

    @contextlib.contextmanager
    def seeing(self, run: Run, view: View) -> Iterator[None]:
        """Extract features under a view in the block."""
        yield

    def describe_input(self, run: Run) -> str:
        """Return what decides how samples are read, in words; features with another description are extracted anew."""
        data = self.cfg.data
        return f"{data.norm_mean}|{data.norm_std}" + (f"|range {data.pixel_range}" if data.pixel_range else "")

    def require_pictures(self, run: Run) -> None:
        """Raise where the samples of a run are no pictures."""

    def read_picture(self, run: Run, source: Any) -> Any:
        """Return the picture of a data set's item, as the data set reads it; of a tracklet, its first one."""
        if self.cfg.data.type == "video":
            return read_image(first_path(source), check_range("data.pixel_range", self.cfg.data.pixel_range))
        dataset = copy.copy(run.datamanager.train_loader.dataset)
        dataset.data, dataset.transform, dataset.k_tfm = [(source, 0, 0, 0)], None, 1
        return dataset[0]["img"]

    def read_pictures(self, run: Run, source: Any) -> dict[str, Any]:
        """Return the pictures of a data set's item by what they show; one without a name where a sample is one image."""
        return {"": self.read_picture(run, source)}


def build_network(cfg: Any) -> Network:
    """Return the network of a configuration, as the method of its model gives it, else the plain one."""
    if cfg.data.type == "features":
        from .given import FeatureNetwork

        return FeatureNetwork(cfg)
    method = method_of(cfg.model.name)
    return (method and method.network(cfg)) or Network(cfg)
