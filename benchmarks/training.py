"""Training epochs: beside the host's own loop, and by two processes beside one.

Run ``python benchmarks/training.py`` from the root of the repository (torchreid must be installed). Pictures are JPEGs of
smooth noise in the layouts of Market-1501 and RGBNT100. ``epoch``: torchreid's OSNet x0.25 with its softmax loss, its
optimiser and its augmentations, by this package and by torchreid's own ``engine.run``, in turns; both read by as many
processes as the machine has cores, log to TensorBoard and write a checkpoint, and neither tests. ``processes-*``: the same
configuration trained by one process on all threads and, under ``torchrun``, by two processes that share them, with the same
batches; losses of every epoch must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import alternate, largest
from harness import Gate, LacksPackage, Line, Row, Settings, main
from images import write_images
from torch import Tensor

SIZE, SMALL, VIEW = (256, 128), (64, 32), (64, 128)
SCRIPT = Path(__file__)
LIMIT = 1e-5
CAMERAS = 4
BATCH = 32
MARKET = {"model": {"name": "osnet_x0_25", "pretrained": False}, "loss": {"name": "softmax"}}
PLAIN = {"optim": "sgd", "lr": 0.01, "lr_scheduler": "none"}
"""Training that is compared number by number: Adam makes the rounding of a gradient near zero a step of its full length."""
GRAFT = {
    "model": {"name": "graft", "pretrained": False},
    "backbone": {"name": "timm:vit_tiny_r_s16_p8_224"},
    "vit": {"depth": 3, "drop_path": 0.0},
    "multimodal": {"modalities": ["R", "N", "T"], "mean": [[0.5]], "std": [[0.25]]},
    "graft": {
        **{"heads": 4, "feedforward": 512, "sampling": "pk", "dropout": 0.0, "warmup_steps": 4},
        "finetune": {"lr": 1e-5},
    },
    "loss": {"name": "composite", "softmax": {"label_smooth": False}, "composite": {"ce": 0.5, "triplet": 0.5}},
    "sampler": {"train_sampler": "RandomIdentitySampler", "num_instances": 4},
}


def write_market(root: Path, identities: int, shots: int) -> None:
    """Pictures as Market-1501 has them: ``shots`` of every identity and camera for training, a few for a test."""
    base = root / "market1501" / "Market-1501-v15.09.15"
    names = [
        base / "bounding_box_train" / f"{pid:04d}_c{camera}s1_{shot:06d}_00.jpg"
        for pid in range(1, identities + 1)
        for camera in range(1, CAMERAS + 1)
        for shot in range(shots)
    ]
    for part, camera in (("query", 1), ("bounding_box_test", 2)):
        names += [base / part / f"{pid:04d}_c{camera}s1_000000_00.jpg" for pid in (1401, 1402)]
    write_images(names, size=SIZE)


def write_vehicles(root: Path, identities: int, shots: int) -> None:
    """Strips of three views as RGBNT100 has them, 64 x 128 pixels each."""
    base = root / "RGBNT100" / "rgbir"
    parts = [("bounding_box_train", range(1, identities + 1), CAMERAS, shots)]
    parts += [("query", range(101, 103), 1, 1), ("bounding_box_test", range(101, 103), 2, 1)]
    names = [
        base / part / f"{pid:04d}_c{camera}_{shot:06d}.jpg"
        for part, pids, cameras, count in parts
        for pid in pids
        for camera in range(1, cameras + 1)
        for shot in range(count)
    ]
    write_images(names, size=(64, 384))


def configuration(
    root: Path, folder: Path, source: str, method: dict[str, Any], size: tuple[int, int], **train: Any
) -> Path:
    """Write a run's configuration and return its path."""
    content = {
        **method,
        "use_gpu": False,
        "data": {
            **{"root": str(root), "sources": [source], "targets": [source], "save_dir": str(folder), "workers": 2},
            **{"height": size[0], "width": size[1], "transforms": ["random_flip"]},
        },
        "train": {"stages": [1], "batch_size": BATCH, "max_epoch": 1, **train},
        "test": {"rivals": []},
    }
    path = folder.with_suffix(".yml")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def require_host() -> Any:
    """Return torchreid, or say that it is missing."""
    try:
        import torchreid
        import torchreid.reid
    except ImportError as error:
        raise LacksPackage(f"torchreid is not installed ({error})") from None
    import relreid_plugin

    relreid_plugin.register()
    return torchreid


class Pair:
    """The same model, data and settings as a run of this package and as a script of the host's users.

    Args:
        root: Where the pictures are.
        folder: Where both write.
        size: Height and width that pictures are read in.
        workers: Reading processes of each.
        batch: Images per batch.
        optim: Optimiser of both.
        more: Further keys of ours, ``KEY VALUE …``.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        size: tuple[int, int],
        *,
        workers: int,
        batch: int,
        optim: str = "amsgrad",
        more: tuple[str, ...] = (),
    ) -> None:
        torchreid = require_host()
        from relreid_plugin.config.defaults import load_config
        from relreid_plugin.engine.runner import Run

        self.folder = folder
        path = configuration(root, folder / "ours", "market1501", MARKET, size, optim=optim)
        pairs = ["data.workers", str(workers), "train.batch_size", str(batch), *more]
        cfg = load_config(path, pairs)
        self.run = Run(cfg)
        manager = torchreid.data.ImageDataManager(
            root=str(root),
            sources="market1501",
            height=cfg.data.height,
            width=cfg.data.width,
            transforms=list(cfg.data.transforms),
            use_gpu=False,
            batch_size_train=batch,
            workers=workers,
        )
        manager.train_loader.dataset.data.sort()  # the host takes files as the folder lists them, ours in order
        self.host_model = torchreid.models.build_model(
            cfg.model.name, manager.num_train_pids, loss="softmax", pretrained=False, use_gpu=False
        )
        optimizer = torchreid.optim.build_optimizer(
            self.host_model, optim=cfg.train.optim, lr=cfg.train.lr, weight_decay=cfg.train.weight_decay
        )
        scheduler = torchreid.optim.build_lr_scheduler(
            optimizer, lr_scheduler=cfg.train.lr_scheduler, stepsize=list(cfg.train.stepsize)
        )
        self.host = torchreid.engine.ImageSoftmaxEngine(
            manager, self.host_model, optimizer, scheduler=scheduler, use_gpu=False, label_smooth=True
        )
        self.host.test = lambda **_: 0.0
        self.run.first.build(self.run)
        self.run.bare.load_state_dict(self.host_model.state_dict())
        self.images = len(manager.train_loader) * batch

    def ours(self) -> dict[str, Tensor]:
        """An epoch of this package; the weights."""
        from relreid_plugin.engine.logs import set_seed

        set_seed(0)
        self.run.engine.fit(print_freq=self.run.cfg.train.print_freq)
        return self.run.bare.state_dict()

    def theirs(self) -> dict[str, Tensor]:
        """An epoch of the host; the weights."""
        from relreid_plugin.engine.logs import set_seed

        set_seed(0)
        self.host.run(save_dir=str(self.folder / "host"), max_epoch=1, print_freq=self.run.cfg.train.print_freq)
        return self.host_model.state_dict()


def epoch(settings: Settings) -> list[Line]:
    """One epoch of stage 1, ours beside the host's."""
    require_host()
    identities, batch = settings.pick((64, BATCH), (2, 8))
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        folders = [Path(place, name) for name in ("pictures", "few", "small", "timed", "last")]
        for folder in folders[2:]:
            folder.mkdir()
        write_market(folders[0], identities, 2)
        write_market(folders[1], 4, 1)
        small = Pair(folders[1], folders[2], SMALL, workers=0, batch=8, optim="sgd")  # one reader: the same augmentations
        wanted = {name: value.clone() for name, value in small.theirs().items()}
        found = small.ours()
        difference = max(largest(found[name].reshape(1, -1), value.reshape(1, -1)) for name, value in wanted.items())
        size, workers = settings.pick(SIZE, SMALL), settings.pick(2, 0)
        pair = Pair(folders[0], folders[3], size, workers=workers, batch=batch)
        last = Pair(folders[0], folders[4], size, workers=workers, batch=batch, more=("train.channels_last", "True"))
        timed = alternate({"ours": pair.ours, "host": pair.theirs, "last": last.ours}, settings.repeats)
    ours, host = timed["ours"], timed["host"]
    work = f"training epoch of stage 1, {pair.images} images, OSNet x0.25"
    line = Line(work, "torchreid's engine.run", host.seconds, ours.seconds, host.mib, ours.mib)
    line.difference, line.equal = difference, difference <= LIMIT
    line.notes = [
        f"{pair.images / ours.seconds:.0f} images/s, torchreid {pair.images / host.seconds:.0f}; difference: of the weights "
        "after a small epoch that both read alike"
    ]
    other = Line(f"{work}, train.channels_last", line.reference, host.seconds, timed["last"].seconds, host.mib)
    other.mib, other.variant = timed["last"].mib, True
    return [line, other]


def work(path: Path) -> None:
    """One of the processes that train a configuration; the first one leaves losses and seconds of every epoch beside it."""
    import relreid_plugin
    from relreid_plugin.config.defaults import load_config
    from relreid_plugin.engine.checkpoint import write_json
    from relreid_plugin.engine.distributed import joined
    from relreid_plugin.engine.distributed import main as first
    from relreid_plugin.engine.runner import Run
    from relreid_plugin.options import read_launch

    relreid_plugin.register()
    ends: dict[str, list[float]] = {}
    with joined(read_launch(), use_gpu=False):
        run = Run(load_config(path, ["data.sample_seeds", "True"]))
        history = run.learn(lambda stage, _: ends.setdefault(stage, []).append(time.perf_counter()))
        if first():
            times = {stage: [b - a for a, b in zip(stamps, stamps[1:])] for stage, stamps in ends.items()}
            write_json(path.with_suffix(".json"), {"history": history, "seconds": times})


def trained(path: Path, processes: int, threads: int) -> dict[str, Any]:
    """Train a configuration by some processes of some threads each; what :func:`work` leaves.

    Raises:
        RuntimeError: It failed; the last line that was said.
    """
    own = [str(SCRIPT), "--worker", str(path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *own]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no result"])[-1])
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return found


def loss_gap(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest difference of a loss in the histories of two runs, as a share where it is above 1."""
    gaps = [0.0]
    for stage, records in wanted["history"].items():
        for here, there in zip(found["history"][stage], records, strict=True):
            keys = [key for key in there if key not in ("epoch", "acc")]  # one image in a batch may tip over by rounding
            gaps += [abs(here[key] - there[key]) / max(1.0, abs(there[key])) for key in keys]
    return max(gaps)


def processes(title: str, method: dict[str, Any], source: str, settings: Settings) -> list[Line]:
    """Two processes beside one that has all threads, and beside one that has as many as each of the two."""
    require_host()
    epochs = settings.pick(4, 2)
    graft = source == "rgbnt100"
    train: dict[str, Any] = {"max_epoch": epochs, **PLAIN}
    if graft:
        train = {"max_epoch": 1, "stages": [1, 2], "optim": "adamw", "lr": 0.001, "lr_scheduler": "sqrt"}
        method = {**method, "graft": {**method["graft"], "finetune": {"lr": 1e-5, "max_epoch": epochs}}}
    size = VIEW if graft else settings.pick(SIZE, SMALL)
    if settings.quick:
        train["batch_size"] = 8
    half = max(1, settings.threads // 2)
    forms = {"one": (1, settings.threads), "two": (2, half), "half": (1, half)}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "pictures")
        (write_vehicles if graft else write_market)(root, settings.pick(16, 4), settings.pick(4, 1))
        for name, (count, threads) in forms.items():
            if name == "half" and (settings.quick or half == settings.threads):
                continue
            found[name] = trained(configuration(root, Path(place, name), source, method, size, **train), count, threads)
        train["precision"] = "float64"
        one, two = (
            trained(configuration(root, Path(place, f"{name}-float64"), source, method, size, **train), *forms[name])
            for name in ("one", "two")
        )
    stage = "stage2" if graft else "stage1"
    seconds = {name: statistics.median(each["seconds"][stage]) for name, each in found.items()}
    difference = loss_gap(two, one)
    single = {name: loss_gap(each, found["one"]) for name, each in found.items()}
    lines = []
    for name in ("one", "half"):
        if name in found:
            threads = forms[name][1]
            line = Line(title, f"one process, {threads} thread{'s'[: threads > 1]}", seconds[name], seconds["two"])
            line.difference, line.equal, line.variant = difference, difference <= LIMIT, name == "half"
            lines.append(line)
    last = two["history"][stage][-1]["loss"]
    lines[0].notes = [
        f"epochs of {stage} after the first, global batch {train.get('batch_size', BATCH)}; two gloo processes of {half} "
        f"thread{'s'[: half > 1]}; difference: of the losses of every epoch in 'train.precision float64' (the last one is "
        f"{last:.4f}); in float32 rounding grows to {single['two']:.0e}"
        + (f", by one process with other threads to {single['half']:.0e}" if "half" in single else "")
    ]
    return lines


SAME = Gate("difference", LIMIT, at_most=True, text="losses to 1e-5 in float64")
TWICE = Gate("ratio", 1.6)
ROWS = [
    Row(
        "epoch",
        "training epoch of stage 1",
        "training epoch of stage 1, OSNet x0.25",
        epoch,
        must=(Gate("ratio", 1.0, text="not slower"),),
        aim=(Gate("ratio", 1.5),),
    ),
    Row(
        "processes-osnet",
        "two processes against one",
        "stage 1 by two processes, OSNet x0.25",
        lambda settings: processes("stage 1 by two processes, OSNet x0.25", MARKET, "market1501", settings),
        must=(SAME,),
        aim=(TWICE,),
    ),
    Row(
        "processes-graft",
        "two processes against one",
        "GraFT by two processes, ViT-Ti hybrid, M=3",
        lambda settings: processes("GraFT by two processes, ViT-Ti hybrid, M=3", GRAFT, "rgbnt100", settings),
        must=(SAME,),
        aim=(TWICE,),
    ),
]


def command(argv: list[str]) -> int:
    """Run the rows, or be one of the processes of a row."""
    if argv[:1] == ["--worker"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--worker", type=Path)
        work(parser.parse_args(argv).worker)
        return 0
    return main(ROWS, __doc__)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
