"""The host's data manager, with its loaders rebuilt: held-out identities, safe batches, checked images."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Sampler

from ..data.audit import TestSet, audit_splits, check_matches, shared_identities_note
from ..data.cameras import CameraTable
from ..data.checks import check_images
from ..data.ranges import check_range
from ..data.split import hold_out_identities
from ..data.transforms import add_plugin_transforms, split_transform_names
from ..errors import UserError, did_you_mean
from ..methods import several_models, takes_several
from ..processes import usable_cores
from .datasets import dataset_place, resolve_dataset
from .layout import HOST
from .multimodal import PUBLISHED, MultimodalDataset, Published, Strip, use_modalities
from .opening import open_dataset
from .patches import apply_patches, worker_init

Item = tuple[Any, ...]
"""``(path(s), pid, camid, dsetid)``."""


def build_datamanager(cfg: Any, cache_dir: str | Path) -> Any:
    """Build the host's data manager from a configuration.

    The host reads the data sets and prints its summary. Then, on the same object, loaders are built anew: loader processes
    are no more than processors, a training set smaller than a batch is one batch, items come in sorted order, and with
    ``train.val_fraction`` whole identities are held out of training. Attributes beside the host's:

    - ``label_map``: ``dict[int, str]``, training label to the identity's name (``source/name`` with several sources).
    - ``train_identities``: the names of ``label_map`` in the order of the labels.
    - ``cameras``: the :class:`~relreid_plugin.data.cameras.CameraTable` of the training set, held-out identities left out.
    - ``num_cameras``: how many there are; 0 without camera labels.
    - ``camera_names``, ``identity_names``: by target, what is written for camera numbers, and for the identities that are
      not numbers themselves.
    - ``notes``: what a user should know of the data sets.
    - ``val_query``, ``val_gallery``: lists of ``(path(s), pid, camid, dsetid)``; empty without held-out identities.
    - ``val_loader``: ``{"query": loader, "gallery": loader}`` over them with the test transform, or None.
    - ``notes``: sentences about the data that a user should see.
    - ``sources``, ``targets``, ``train_loader``, ``test_loader``, ``transform_tr``, …: as in the host.

    Args:
        cfg: Configuration of :func:`relreid_plugin.config.defaults.get_default_config`.
        cache_dir: Folder of the run for what must not be written beside the data.

    Returns:
        The host's ``ImageDataManager``, or ``VideoDataManager`` with ``data.type video``.

    Raises:
        UserError: A data set, image, transform, sampler or batch size that cannot be used; see the modules of
            :mod:`relreid_plugin.data`.
    """
    apply_patches()
    multimodal = takes_several(cfg)
    host_transforms, plugin_transforms = ([], []) if multimodal else split_transform_names(list(cfg.data.transforms))
    sources, targets = list(cfg.data.sources), list(cfg.data.targets)
    for name in dict.fromkeys(sources + targets):
        resolve_dataset(
            name,
            cfg.data.root,
            data_type=cfg.data.type,
            download=cfg.data.download,
            multimodal=multimodal,
            name_pattern=cfg.data.name_pattern,
            split_rule=cfg.data.split_rule,
        )
    samplers = HOST.data.sampler.AVAI_SAMPLERS
    for key in ("train_sampler", "train_sampler_t"):
        if cfg.sampler[key] not in samplers:
            raise UserError(
                f"key 'sampler.{key}' is '{cfg.sampler[key]}', which is no sampler{did_you_mean(cfg.sampler[key], samplers)}"
            )
    _refuse_twice(cfg)
    shared = sorted(set(sources) & set(targets))
    if cfg.data.load_train_targets and shared:
        raise UserError(f"'data.load_train_targets True' needs sources and targets apart, but both hold '{shared[0]}'.")

    opened: list[Any] = []
    named: dict[str, Any] = {}
    with _opening(cfg, cache_dir, opened, named):
        manager = _construct(cfg, sources, targets, host_transforms)
    manager.camera_names = {name: dict(getattr(dataset, "camera_names", {})) for name, dataset in named.items()}
    manager.identity_names = {name: dict(getattr(dataset, "identity_names", {})) for name, dataset in named.items()}
    if multimodal:
        use_modalities(cfg, manager)
    else:
        add_plugin_transforms(manager.transform_tr, plugin_transforms)
        _use_range(cfg, manager)
        manager.notes = [f"{name}: {note}" for name, dataset in named.items() for note in getattr(dataset, "notes", [])]

    trainset = manager.train_loader.dataset
    identities = _source_identities(sources, opened)
    labelled = all(getattr(dataset, "has_cameras", True) for dataset in opened[: len(sources)])
    _number_cameras_on(trainset, opened[: len(sources)])
    if not multimodal:
        _check_files(cfg, manager)
    _audit(cfg, manager, trainset, identities, opened[: len(sources)])
    _hold_out(cfg, manager, trainset, identities)
    manager.cameras = CameraTable.of(_training_cameras(trainset, sources, opened) if labelled else (), sources)
    manager.num_cameras = manager.cameras.size
    _rebuild_loaders(cfg, manager, trainset)
    return manager


def complete_manager(cfg: Any, manager: Any, trainset: Any, identities: list[str]) -> None:
    """Hold out identities and make the loaders of a data manager that something else has read.

    Args:
        cfg: Configuration.
        manager: With ``sources``, ``use_gpu``, ``test_loader``, ``transform_te`` and ``notes``.
        trainset: With ``train``, ``data`` and ``num_train_pids``, as the host's data sets.
        identities: The name of every training label.
    """
    apply_patches()
    if cfg.sampler.train_sampler not in HOST.data.sampler.AVAI_SAMPLERS:
        near = did_you_mean(cfg.sampler.train_sampler, HOST.data.sampler.AVAI_SAMPLERS)
        raise UserError(f"key 'sampler.train_sampler' is '{cfg.sampler.train_sampler}', which is no sampler{near}")
    manager.train_loader = DataLoader(trainset)
    _hold_out(cfg, manager, trainset, identities)
    _rebuild_loaders(cfg, manager, trainset)


def make_loader(
    datamanager: Any, data: Sequence[Item], transform: Callable[..., Any], batch_size: int, workers: int
) -> DataLoader:
    """Return a loader over ``data`` in the given order.

    Args:
        datamanager: A data manager of :func:`build_datamanager`; its training set's class reads the samples.
        data: Tuples ``(path(s), pid, camid, dsetid)``.
        transform: PIL image to tensor.
        batch_size: Images per batch; the last one may be smaller.
        workers: Loader processes, capped at the number of processors.

    Returns:
        A loader of the host's batches: dicts with ``img``, ``pid``, ``camid``, ``impath`` (images only), ``dsetid``.
    """
    dataset = copy.copy(datamanager.train_loader.dataset)
    dataset.data = list(data)
    dataset.transform = transform
    dataset.k_tfm = 1
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=False,
        num_workers=cap_workers(workers),
        pin_memory=datamanager.use_gpu,
        worker_init_fn=worker_init,
    )


def cap_workers(workers: int) -> int:
    """Return ``workers``, but no more than the processors that this process may use."""
    return max(0, min(workers, usable_cores()))


@contextmanager
def _opening(cfg: Any, cache_dir: str | Path, opened: list[Any], named: dict[str, Any]) -> Iterator[None]:
    """Let the data manager's module open data sets by :func:`open_dataset`, and collect those opened for training, and one
    of every name.

    Every one must be of the kind that the model takes.
    """
    module = HOST.data.datamanager
    name_in_module = f"init_{cfg.data.type}_dataset"
    original = getattr(module, name_in_module)

    def init_dataset(name: str, **kwargs: Any) -> Any:
        root = kwargs.pop("root")
        dataset = open_dataset(name, root=root, cache_dir=cache_dir, data_type=cfg.data.type, **kwargs)
        _require_kind(cfg, name, dataset)
        if kwargs.get("mode") == "train":
            opened.append(dataset)
        named.setdefault(name, dataset)
        return dataset

    setattr(module, name_in_module, init_dataset)
    try:
        yield
    finally:
        setattr(module, name_in_module, original)


def _construct(cfg: Any, sources: list[str], targets: list[str], transforms: list[str]) -> Any:
    common: dict[str, Any] = {
        "root": cfg.data.root,
        "sources": sources,
        "targets": targets,
        "height": cfg.data.height,
        "width": cfg.data.width,
        "transforms": transforms,
        "norm_mean": list(cfg.data.norm_mean),
        "norm_std": list(cfg.data.norm_std),
        "use_gpu": cfg.use_gpu,
        "split_id": cfg.data.split_id,
        "combineall": cfg.data.combineall,
        "batch_size_train": cfg.train.batch_size,
        "batch_size_test": cfg.test.batch_size,
        "workers": cap_workers(cfg.data.workers),
        # the real sampler is made after identities were held out
        "train_sampler": "SequentialSampler",
    }
    if cfg.data.type == "video":
        return HOST.data.VideoDataManager(seq_len=cfg.video.seq_len, sample_method=cfg.video.sample_method, **common)
    return HOST.data.ImageDataManager(
        k_tfm=cfg.data.k_tfm,
        load_train_targets=cfg.data.load_train_targets,
        train_sampler_t="SequentialSampler",
        cuhk03_labeled=cfg.cuhk03.labeled_images,
        cuhk03_classic_split=cfg.cuhk03.classic_split,
        market1501_500k=cfg.market1501.use_500k_distractors,
        **common,
    )


def _number_cameras_on(trainset: Any, opened: Sequence[Any]) -> None:
    """Give the cameras of several sources numbers of their own.

    The host adds the number of cameras of the sources before, so that cameras whose numbers leave gaps meet others'.
    """
    if len(opened) < 2:
        return
    cameras, offset = [], 0
    for dataset in opened:
        own = [item[2] for item in dataset.train]
        cameras += [offset + camera for camera in own]
        offset += 1 + max(own, default=-1)
    trainset.train = [(*item[:2], camera, *item[3:]) for item, camera in zip(trainset.train, cameras, strict=True)]
    trainset.data, trainset.num_train_cams = trainset.train, len(set(cameras))


def _training_cameras(trainset: Any, sources: list[str], opened: Sequence[Any]) -> list[tuple[int, str, str]]:
    """Return (number in the training set, source, as written) of every camera that trains."""
    trained, offset, cameras = {item[2] for item in trainset.train}, 0, []
    for name, dataset in zip(sources, opened):
        own = {item[2] for item in dataset.train}
        names = getattr(dataset, "camera_names", {})
        cameras += [(offset + n, name, names.get(n, str(n))) for n in sorted(own) if offset + n in trained]
        offset += 1 + max(own, default=-1)
    return cameras


def _source_identities(sources: list[str], opened: list[Any]) -> list[str]:
    """Return the identity of every label of the sum of the sources; the host opens the sources first, in order."""
    trainsets = opened[: len(sources)]
    if len(sources) == 1:
        return list(trainsets[0].train_identities)
    return [f"{name}/{identity}" for name, dataset in zip(sources, trainsets) for identity in dataset.train_identities]


def _require_kind(cfg: Any, name: str, dataset: Any) -> None:
    """Raise when a data set has one image per sample and the model takes several, or the other way round."""
    several, fuses = isinstance(dataset, MultimodalDataset), takes_several(cfg)
    if several and not fuses:
        raise UserError(
            f"data set '{name}' has several images per sample, but 'model.name {cfg.model.name}' takes one; choose "
            f"'model.name {several_models()[0]}'."
        )
    if fuses and not several:
        raise UserError(
            f"data set '{name}' has one image per sample, but 'model.name {cfg.model.name}' fuses several; choose "
            f"{', '.join(cls.key for cls in PUBLISHED)}, embedded_vehicles, or a folder or CSV file with several modalities."
        )


def _use_range(cfg: Any, manager: Any) -> None:
    """Let the data sets read files of more than 8 bits by ``data.pixel_range``."""
    loaders = [manager.train_loader, getattr(manager, "train_loader_t", None)]
    loaders += [loader for pair in manager.test_loader.values() for loader in pair.values()]
    for loader in loaders:
        if loader is not None:
            loader.dataset.pixel_range = check_range("data.pixel_range", cfg.data.pixel_range)


def _check_files(cfg: Any, manager: Any) -> None:
    data = list(manager.train_loader.dataset.train)
    for splits in manager.test_dataset.values():
        data += splits["query"] + splits["gallery"]
    if getattr(manager, "train_loader_t", None) is not None:
        data += manager.train_loader_t.dataset.train
    paths = [path for item in data for path in ([item[0]] if isinstance(item[0], str) else item[0])]
    pixel_range = check_range("data.pixel_range", cfg.data.pixel_range)
    check_images(paths, cfg.data.check_images, pixel_range=pixel_range)


def _refuse_twice(cfg: Any) -> None:
    """Raise when one of the lists of data sets names the same one twice, also under two names."""
    for key in ("sources", "targets"):
        first: dict[str, str] = {}
        for name in cfg.data[key]:
            other = first.setdefault(dataset_place(name, cfg.data.root, data_type=cfg.data.type), name)
            if list(cfg.data[key]).count(name) > 1 or other != name:
                pair = f"'{name}' twice" if other == name else f"'{other}' and '{name}', which are one data set"
                raise UserError(f"key 'data.{key}' names {pair}; name it once.")


def _audit(cfg: Any, manager: Any, trainset: Any, identities: list[str], opened: list[Any]) -> None:
    """Say what training and test data share, and which queries cannot be scored, before anything is trained."""
    notes = list(getattr(manager, "notes", []))
    tests = {name: TestSet(splits["query"], splits["gallery"]) for name, splits in manager.test_dataset.items()}
    several = isinstance(trainset, MultimodalDataset)
    files = (lambda source: [str(source)] if isinstance(source, Strip) else list(source)) if several else None
    known = set(notes)
    notes += audit_splits(trainset.train, identities, tests, check=cfg.data.check_leakage, files=files)
    places = [dataset_place(name, cfg.data.root, data_type=cfg.data.type) for name in cfg.data.sources]
    for name, test in tests.items():
        place = dataset_place(name, cfg.data.root, data_type=cfg.data.type)
        if cfg.data.check_leakage != "none" and place in places and not cfg.data.combineall:
            source = opened[places.index(place)]
            # in a published data set the protocol keeps them apart, whatever numbers its files bear
            if not isinstance(source, Published):
                notes += shared_identities_note(name, getattr(source, "shared_identities", []))
        group = getattr(manager.test_loader[name]["query"].dataset, "group", "camera")
        notes += check_matches(name, test, group=group)
    for note in notes:
        if note not in known:
            print(f"note: {note}")
    manager.notes = notes


def _hold_out(cfg: Any, manager: Any, trainset: Any, identities: list[str]) -> None:
    manager.val_query, manager.val_gallery, manager.val_loader = [], [], None
    if cfg.train.val_fraction > 0:
        split = hold_out_identities(trainset.train, cfg.train.val_fraction, cfg.train.seed, fold=cfg.train.val_fold)
        trainset.train = trainset.data = split.train
        trainset.num_train_pids = len(split.kept_labels)
        manager._num_train_pids = len(split.kept_labels)
        manager.val_query, manager.val_gallery = split.query, split.gallery
        print(
            f"=> Held out {len(identities) - len(split.kept_labels)} of {len(identities)} training identities "
            f"({len(split.query)} queries, {len(split.gallery)} gallery items); "
            f"{len(split.kept_labels)} identities with {len(split.train)} items train"
        )
        way_out = "change 'train.val_fraction' or 'train.seed', or set the fraction to 0"
        for note in check_matches("held-out identities", TestSet(split.query, split.gallery), way_out=way_out):
            print(f"note: {note}")
            manager.notes.append(note)
        identities = [identities[label] for label in split.kept_labels]
    manager.train_identities = identities
    manager.label_map = dict(enumerate(identities))


def _rebuild_loaders(cfg: Any, manager: Any, trainset: Any) -> None:
    workers = cap_workers(cfg.data.workers)
    if workers < cfg.data.workers:
        print(f"data.workers {cfg.data.workers} is more than this machine's processors; {workers} are used")
    manager.train_loader = _train_loader(cfg, manager, trainset, cfg.sampler.train_sampler)
    if getattr(manager, "train_loader_t", None) is not None:
        dataset = manager.train_loader_t.dataset
        manager.train_loader_t = _train_loader(cfg, manager, dataset, cfg.sampler.train_sampler_t)
    for loaders in manager.test_loader.values():
        for loader in loaders.values():
            loader.worker_init_fn = worker_init
    if manager.val_query:
        manager.val_loader = {
            split: make_loader(manager, data, manager.transform_te, cfg.test.batch_size, workers)
            for split, data in (("query", manager.val_query), ("gallery", manager.val_gallery))
        }


def _train_loader(cfg: Any, manager: Any, dataset: Any, sampler_name: str) -> DataLoader:
    batch_size = cfg.train.batch_size
    if len(dataset.train) < 2:
        raise UserError(f"data sets {', '.join(manager.sources)} have {len(dataset.train)} training images; 2 are needed.")
    if sampler_name == "RandomIdentitySampler" and batch_size > cfg.sampler.num_instances > 0:
        whole = batch_size - batch_size % cfg.sampler.num_instances
        if whole != batch_size:
            print(
                f"train.batch_size {batch_size} is no multiple of sampler.num_instances {cfg.sampler.num_instances}; "
                f"batches have {whole} items"
            )
        batch_size = whole
    sampler = build_sampler(
        dataset.train,
        sampler_name,
        batch_size=batch_size,
        num_instances=cfg.sampler.num_instances,
        num_cams=cfg.sampler.num_cams,
        num_datasets=cfg.sampler.num_datasets,
    )
    drop_last = len(sampler) >= batch_size  # type: ignore[arg-type]
    if not drop_last:
        print(
            f"the training set has {len(dataset.train)} items, less than train.batch_size {batch_size}: one batch per epoch"
        )
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=cap_workers(cfg.data.workers),
        pin_memory=manager.use_gpu,
        drop_last=drop_last,
        worker_init_fn=worker_init,
    )


def build_sampler(
    data: Sequence[Item], name: str, *, batch_size: int, num_instances: int, num_cams: int, num_datasets: int
) -> Sampler[int]:
    """Build one of the host's training samplers, with the host's bare assertions turned into sentences.

    Args:
        data: Tuples ``(path(s), pid, camid, dsetid)``.
        name: One of the host's samplers.
        batch_size: Items per batch.
        num_instances: Items per identity (``RandomIdentitySampler``).
        num_cams: Cameras per batch (``RandomDomainSampler``).
        num_datasets: Data sets per batch (``RandomDatasetSampler``).

    Raises:
        UserError: The data cannot fill a batch of that kind; the keys to change are named.
    """
    if name == "RandomIdentitySampler":
        identities = len({item[1] for item in data})
        if not 1 <= num_instances <= batch_size:
            raise UserError(f"'sampler.num_instances {num_instances}' must lie in 1 … 'train.batch_size' ({batch_size}).")
        if identities < batch_size // num_instances:
            raise UserError(
                f"a batch needs {batch_size // num_instances} identities ('train.batch_size {batch_size}' / "
                f"'sampler.num_instances {num_instances}'), but only {identities} train; lower 'train.batch_size' to at "
                f"most {identities * num_instances} or raise 'sampler.num_instances'."
            )
    elif name == "RandomDomainSampler":
        _check_domains(Counter(item[2] for item in data), "sampler.num_cams", num_cams, batch_size, "camera")
    elif name == "RandomDatasetSampler":
        _check_domains(Counter(item[3] for item in data), "sampler.num_datasets", num_datasets, batch_size, "data set")
    return HOST.data.sampler.build_train_sampler(
        list(data),
        name,
        batch_size=batch_size,
        num_instances=num_instances,
        num_cams=num_cams,
        num_datasets=num_datasets,
    )


def _check_domains(sizes: Counter[int], key: str, number: int, batch_size: int, what: str) -> None:
    used = number if number > 0 else len(sizes)
    if used > len(sizes):
        raise UserError(f"'{key} {number}' is more than the training data's {len(sizes)} ({what}s).")
    if batch_size % used:
        raise UserError(f"'train.batch_size {batch_size}' must be a multiple of '{key}' ({used}).")
    smallest = min(sizes.values())
    if smallest < batch_size // used:
        raise UserError(
            f"a batch needs {batch_size // used} images of one {what} ('train.batch_size {batch_size}' / '{key}' {used}), "
            f"but one {what} has only {smallest}; lower 'train.batch_size' to at most {smallest * used}."
        )
