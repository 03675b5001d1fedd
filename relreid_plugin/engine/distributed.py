"""One run by several processes: how they meet, read, train and write together, and how they end.

Started by ``torchrun``, every process runs the same commands on the same run. All of them read its folder, which must lie
on a file system that all machines see, and the first one (rank 0) writes it. Samplers draw alike in all of them, and every
process takes its rows of each batch (:mod:`relreid_plugin.collective`); the gradients are averaged by torch's
DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import hashlib
import inspect
import io
import os
import random
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

from ..backbones.shared import share_batch
from ..collective import Cut, cutting, gather, rank, world
from ..errors import UserError
from ..options import Launch

T = TypeVar("T")
TIMEOUT = datetime.timedelta(days=1)
"""How long a process waits for the others, who may be scoring a large test set."""
_LOST = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe|NCCL|socket|timed out", re.IGNORECASE)


def main() -> bool:
    """Whether this process writes: the only one, or the first of several."""
    return rank() == 0


# --- meeting and ending -----------------------------------------------------------------------------------------------
class _Quiet(io.TextIOBase):
    """Standard output, or the terminal's progress bars, of a process that does not speak."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def joined(launch: Launch, *, use_gpu: bool, go_on: str = "go on with --resume") -> Iterator[None]:
    """Work together with the other processes of a launch in the block; alone, nothing is done.

    Each process takes the GPU of its number on its machine, where GPUs are used. Only the first one prints. A process that
    fails says why, once for all that fail alike; where one has gone without a word, the others say so.

    Args:
        launch: Which process this is.
        use_gpu: Train on GPUs, where there are any.
        go_on: What to do when another process has gone.

    Raises:
        UserError: More processes than GPUs on a machine, a rendezvous that fails, or another process that has gone.
    """
    if launch.world == 1:
        yield
        return
    backend = "gloo"
    if use_gpu and torch.cuda.is_available():
        _take_gpu(launch.local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {launch.rank} of {launch.world} does not find the others ({' '.join(str(error).split())[:160]}); "
            "start all of them by 'torchrun --nproc-per-node N -m relreid_plugin train …', which tells them where."
        ) from None
    board = _Board(launch, go_on)
    with contextlib.ExitStack() as stack:
        if launch.rank:
            stack.enter_context(contextlib.redirect_stdout(_Quiet()))
            stack.enter_context(contextlib.redirect_stderr(_Quiet()))
        try:
            yield
            dist.barrier()
        except KeyboardInterrupt as error:
            gone = board.gone()
            if gone:
                raise UserError(gone) from error
            raise
        except Exception as error:
            raise board.explained(error) from None
        dist.destroy_process_group()


def _take_gpu(local: int) -> None:
    """Show this process its own GPU only, so that it is device 0 to everything in it."""
    if torch.cuda.is_initialized():
        torch.cuda.set_device(local)
        return
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    if local >= len(devices):
        raise UserError(
            f"this machine has {len(devices)} GPU{'' if len(devices) == 1 else 's'}, but process {local + 1} of it was "
            f"started; lower --nproc-per-node to {len(devices)}, or train on the processor by 'use_gpu False'."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]


class _Board:
    """What the processes leave for each other when they end: a store that lives as long as the launcher."""

    def __init__(self, launch: Launch, go_on: str) -> None:
        self.launch, self.go_on = launch, f"{SAID}; {go_on}"
        self.store: Any = dist.distributed_c10d._get_default_store()
        self.host = socket.gethostname()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"relreid/process/{launch.rank}", f"{self.host}|{os.getpid()}")

    def _read(self, key: str) -> str:
        try:
            return self.store.get(key).decode() if self.store.check([key]) else ""
        except (RuntimeError, ValueError):
            return ""

    def gone(self) -> str:
        """The sentence for a process that has ended, by what it left, or on this machine without a word; empty for none."""
        for number in range(self.launch.world):
            said = self._read(f"relreid/failed/{number}")
            if number == self.launch.rank:
                continue
            if said:
                return f"process {number} of {self.launch.world} has ended: {said}"
            host, _, pid = self._read(f"relreid/process/{number}").partition("|")
            if host == self.host and pid and not _alive(int(pid)):
                return f"process {number} of {self.launch.world} was ended from outside; {self.go_on}."
        return ""

    def explained(self, error: Exception) -> BaseException:
        """What this process shall raise for an error: the error itself, a sentence about another one, or just its exit."""
        if not isinstance(error, UserError) and isinstance(error, RuntimeError) and _LOST.search(str(error)):
            gone = (
                self.gone() or f"another of the {self.launch.world} processes has ended, or cannot be reached; {self.go_on}."
            )
            return UserError(gone)
        said = " ".join(str(error).split())
        key = hashlib.sha256(said.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        try:
            self.store.set(f"relreid/failed/{self.launch.rank}", said[:400])
            first = int(self.store.add(f"relreid/said/{key}", 1)) == 1
        except (RuntimeError, ValueError):
            first = True
        return error if first or not isinstance(error, UserError) else SystemExit(2)


SAID = "its own output says why, where it could"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"  # not yet waited for by the launcher
    return True


# --- agreeing ---------------------------------------------------------------------------------------------------------
def from_main(function: Callable[[], T]) -> T:
    """Call ``function`` in the first process and return its value, or raise its :class:`UserError`, in all of them."""
    if world() == 1:
        return function()
    found: list[Any] = [None, None]
    failed: UserError | None = None
    if main():
        try:
            found[0] = function()
        except UserError as error:
            failed, found[1] = error, str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise failed or UserError(found[1])
    return found[0]


@contextlib.contextmanager
def main_holds(manager: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter a context in the first process only; where it refuses, all of them raise its sentence."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(manager())

        from_main(enter)
        yield


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the first process, then in the others: what it makes, the others find."""
    if world() == 1:
        yield
        return
    if main():
        failed: UserError | None = None
        try:
            yield
        except UserError as error:
            failed = error

        def raise_again() -> None:
            if failed is not None:
                raise failed

        from_main(raise_again)
        return
    from_main(lambda: None)
    yield


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if world() > 1:
        dist.barrier()


def check_shared(folder: Any) -> None:
    """Raise where a process does not see the folder that the first one has made.

    Raises:
        UserError: It is on another file system.
    """
    if world() == 1:
        return
    wait_for_all()
    seen: list[Any] = [None] * world()
    dist.all_gather_object(seen, folder.is_dir())
    if not all(seen):
        raise UserError(
            f"'{folder}' is not there for process {seen.index(False)} of {world()}; 'data.save_dir' must be a folder that "
            "all machines see."
        )


# --- reading ----------------------------------------------------------------------------------------------------------
class SeededSamples(Dataset):
    """A data set whose sample, asked for by (index, seed), draws its augmentation from that seed, whoever reads it.

    Python's, numpy's and torch's generators are left as they were.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 (the host draws from the global generator)
        torch.default_generator.manual_seed(seed)
        try:
            return self.dataset[index]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])


class BatchParts(Sampler[list[Any]]):
    """The batches of a sampler, this process's rows of each as (index, seed); seeds go by the place in the epoch.

    Args:
        batches: Batches of ``total`` indices, the same ones in every process.
        cut: How they are cut.
    """

    def __init__(self, batches: Any, cut: Cut) -> None:
        self.batches, self.cut = batches, cut

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        start = int(torch.empty((), dtype=torch.int64).random_())
        for number, batch in enumerate(self.batches):
            if len(batch) != self.cut.total and self.cut.world > 1:
                raise UserError(f"the sampler gave a batch of {len(batch)} where {self.cut.total} are cut across processes.")
            rows = self.cut.rows() if self.cut.world > 1 else range(len(batch))
            place = number * self.cut.total
            yield [(batch[row], (start + (place + row) * 1_000_003) % 2**63) for row in rows]


def share_loader(loader: DataLoader, *, groups: int = 1) -> tuple[DataLoader, Cut]:
    """Return a training loader over this process's rows of every batch, each sample with a seed of its own, and the cut.

    Args:
        loader: Of batches of one size, drawn alike in all processes.
        groups: See :class:`~relreid_plugin.collective.Cut`.

    Raises:
        UserError: A batch has fewer rows than there are processes.
    """
    items, size = len(loader.sampler), int(loader.batch_size or 1)  # type: ignore[arg-type]
    cut = Cut(min(items, size), groups, world(), rank())
    if cut.total // groups < cut.world:
        raise UserError(
            f"a batch of {cut.total} images cannot be cut across {cut.world} processes; raise 'train.batch_size', which is "
            f"that of all processes together, to at least {groups * cut.world}, or start fewer."
        )
    return _over(loader, SeededSamples(loader.dataset), BatchParts(loader.batch_sampler, cut)), cut


def _over(loader: DataLoader, dataset: Any, batches: Any) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


def seeded_loader(loader: DataLoader) -> DataLoader:
    """Return a loader in order whose samples draw from seeds of their own."""
    start = int(torch.empty((), dtype=torch.int64).random_())
    size, count = int(loader.batch_size or 1), len(loader.dataset)  # type: ignore[arg-type]
    keys = [(row, (start + row * 1_000_003) % 2**63) for row in range(count)]
    return _over(loader, SeededSamples(loader.dataset), [keys[low : low + size] for low in range(0, count, size)])


def share_batches(loader: Any) -> Any:
    """Return a loader over this process's share of a test loader's batches: whole ones in a row, the same in any number."""
    if world() == 1:
        return loader
    batches = list(loader.batch_sampler)
    low, high = Cut(len(batches), 1, world(), rank()).bounds(rank())
    return _over(loader, loader.dataset, batches[low:high])


def collect(parts: Sequence[Any]) -> list[Sequence[Any]]:
    """Return what every process has, in their order."""
    if world() == 1:
        return [parts]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, parts)
    return found


# --- training ---------------------------------------------------------------------------------------------------------
class GatheredCriterion(nn.Module):
    """A loss of the host's on outputs and labels of the whole batch."""

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs: Any, labels: Any) -> Any:
        """Compute it."""
        return self.criterion(gather(outputs), gather(labels))


class Trainer:
    """How a model trains across processes: layers that see the whole batch, and averaged gradients.

    Args:
        model: The model; its layers are shared in place.
        cut: How batches are cut.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self.model, self.cut = model, cut
        self._wrapped: nn.Module | None = None
        self._trains: list[int] = []
        left = share_batch(model)
        if left:
            print(
                f"note: {len(left)} layers of the model see a process's own part of the batch only (first: '{left[0]}'); "
                "the numbers are not those of one process."
            )

    def wrapped(self) -> nn.Module:
        """Return the model in its DistributedDataParallel, made anew when other parameters train than before."""
        trains = [id(value) for value in self.model.parameters() if value.requires_grad]
        if self._wrapped is None or trains != self._trains:
            self.release()
            name = "forward_sync_buffers"
            if name not in inspect.signature(DistributedDataParallel.__init__).parameters:
                name = "broadcast_buffers"
            # static: parameters that the loss does not reach are found in the first step
            self._wrapped = DistributedDataParallel(self.model, static_graph=True, **{name: False})  # type: ignore[arg-type]
            self._trains = trains
        return self._wrapped

    def release(self) -> None:
        """Take DistributedDataParallel's hooks off the parameters."""
        self._wrapped = None
        gc.collect()

    @contextlib.contextmanager
    def step(self, engine: Any) -> Iterator[None]:
        """Let an engine's step in the block train this process's rows."""
        engine.model = self.wrapped()
        try:
            with cutting(self.cut):
                yield
        finally:
            engine.model = self.model


def average(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over the processes."""
    if world() == 1:
        return
    for value in parameters:
        if value.grad is not None:
            dist.all_reduce(value.grad)
            value.grad.div_(world())


def mean_over_rows(value: float, cut: Cut) -> float:
    """Return the mean over all rows of a batch of what is a mean over each process's rows."""
    summed = torch.tensor([value * cut.size()], dtype=torch.float64)
    dist.all_reduce(summed)
    return float(summed) / cut.total


__all__ = [
    "BatchParts",
    "GatheredCriterion",
    "SeededSamples",
    "Trainer",
    "average",
    "check_shared",
    "collect",
    "from_main",
    "joined",
    "main",
    "main_first",
    "main_holds",
    "mean_over_rows",
    "seeded_loader",
    "share_batches",
    "share_loader",
    "wait_for_all",
]
