"""A gallery that two processes over gloo refine is that of one process, whichever block they are killed at."""

from __future__ import annotations

import ast
import os
import socket
import subprocess

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from conftest import ROOT
from test_search import BLOCK, clusters, make_encoder, make_store, refined
from test_search_recipe import RULE, recipe_encoder, store_of

from relreid_plugin.cli.main import main
from relreid_plugin.errors import UserError
from relreid_plugin.features.arrays import ChunkedArray, Piece, write_rows
from relreid_plugin.features.deleted import delete_rows
from relreid_plugin.search import GallerySearcher
from relreid_plugin.search.exchange import neighbours
from relreid_plugin.search.sharded import ShardedPass

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORKER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
sys.path.insert(0, {str(ROOT / "tests" / "search")!r})
import torch
torch.set_num_threads(1)
from test_sharded import CASES, encoder_of
from relreid_plugin.engine.distributed import joined
from relreid_plugin.cli.main import main
from relreid_plugin.errors import UserError
from relreid_plugin.options import read_launch
from relreid_plugin.search import FeatureStore, exchange, layers, sharded
exchange._BLOCK, exchange._QUERIES, sharded._STEP = 32, 24, 16
folder, call = sys.argv[1], int(sys.argv[2])
put, calls = layers._Journal._write, []
def write(self, name, start, value):
    calls.append(name)
    if call and len(calls) == call and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, start, value)
layers._Journal._write = write
written = {{}}
with joined(read_launch(), use_gpu=False):
    for name in CASES if not call else list(CASES)[:1]:
        calls.clear()
        sharded.ShardedPass(FeatureStore(folder + name), encoder_of(name), block_rows={BLOCK}).run()
        written[name] = len(calls)
os.write(1, repr(written).encode() + b"\\n")
"""
CASES = {
    "plain": ({}, clusters(9, seed=1)[:133]),
    "ties": ({"num_layers": 1, "k": 9}, clusters(2, seed=1).repeat(4, 1)),
    "deleted": ({"num_layers": 2, "head": True}, clusters(8, seed=1)),
    "cameras": ({}, clusters(8, seed=1)),
    "cameras, deleted": ({"rule": {**RULE, "reciprocity": 2, "same": 0}, "anchor": 0.7}, clusters(4, seed=1).repeat(2, 1)),
    "cameras, alone": ({"rule": {**RULE, "support": 2.0, "least": 0.5}, "residual": 0.0}, clusters(2, seed=1)),
}
GONE = [0, 40, 77, 119]


def encoder_of(name):
    return (recipe_encoder if name.startswith("cameras") else make_encoder)(**CASES[name][0])


def cameras_of(rows):
    """Cameras of a case's images: some have none, one has few images."""
    return np.where(np.arange(len(rows)) % 31 == 0, 9, np.arange(len(rows)) * 7 % 5 - 1)


def run(folder, call=0):
    return pair(["-c", WORKER, str(folder), str(call)])


def pair(arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [warm.python(), *arguments]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(number), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [process.communicate(timeout=60) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in ended], [err for _, err in ended]


def test_two_processes_are_one_killed_or_not(tmp_path):
    for name, (_, rows) in CASES.items():
        for place in ("one", "two"):
            store_of(tmp_path / f"{place}-{name}", (rows, cameras_of(rows)))
            if name.endswith("deleted"):
                delete_rows(tmp_path / f"{place}-{name}", GONE)
    codes, _, errors = run(tmp_path / "two-", call=13)  # in the second layer
    assert codes[1] == -9 and codes[0] == 1 and "process 1 of 2 was ended from outside" in errors[0]
    folder = GallerySearcher(tmp_path / "two-plain", encoder=encoder_of("plain")).relation_folder
    assert not (folder / "states.json").exists() and list(folder.glob("pass-0001/journal-*"))
    codes, said, errors = run(tmp_path / "two-")
    assert codes == [0, 0], errors
    queries = clusters(1, seed=2)
    for name in CASES:
        encoder = encoder_of(name)
        one = GallerySearcher(tmp_path / f"one-{name}", encoder=encoder)
        one.refine(block_rows=BLOCK)
        two = GallerySearcher(tmp_path / f"two-{name}", encoder=encoder, automatic=False, verify=True)
        assert (refined(one) - refined(two)).abs().max() < 1e-6
        seen = cameras_of(queries)
        assert (one.refine_queries(queries, seen) - two.refine_queries(queries, seen)).abs().max() < 1e-6
        assert one.search(queries, 9, camids=seen).rows.tolist() == two.search(queries, 9, camids=seen).rows.tolist()
        assert not [
            path.name for path in two.states.pass_folder.iterdir() if path.name.startswith(("x", "journal", "lists"))
        ]
    whole = 2 + 2 * 5 + 3 * 3 * 2  # lists, thresholds; index, mask in five steps; keys, values, output in two blocks a layer
    assert ast.literal_eval(said[1])["plain"] == whole - 12
    grown = GallerySearcher(make_store(tmp_path / "two-plain", queries), encoder=encoder_of("plain"))
    alone = GallerySearcher(make_store(tmp_path / "one-plain", queries), encoder=encoder_of("plain"))
    assert (refined(grown) - refined(alone)).abs().max() < 1e-6 and grown.states.base_rows == 133


def test_the_command_by_two_processes(tmp_path, tiny_run, capsys):
    store = str(tmp_path / "s")
    assert main(["extract", str(tiny_run), store, "--target", "embedded_persons_tiny"]) == 0
    codes, said, errors = pair(["-m", "relreid_plugin", "refine", str(tiny_run), store])
    assert codes == [0, 0], errors
    assert "89 images, refined by 2 processes, up to date" in said[0] and not said[1]
    codes, _, errors = pair(["-m", "relreid_plugin", "refine", str(tiny_run), "milvus:g.db"])
    assert codes[0] == 2 and "let the processes refine the store on disk" in "".join(errors)


def test_neighbours_of_one_process_are_those_of_the_definition():
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        rows = torch.nn.functional.normalize(clusters(4, seed=1).repeat(8, 1), dim=1)  # eight rows of every kind tie
        alive = torch.arange(len(rows)) % 7 != 0
        found, scored = neighbours(len(rows), rows.shape[1], 5, rows.__getitem__, alive=alive)
        scores = (rows.double() @ rows.double().t()).float().masked_fill(~alive, -torch.inf)
        value, order = scores.sort(dim=1, descending=True, stable=True)
        assert (found == order[:, :5]).all() and (scored == value[:, :5]).all()
    finally:
        dist.destroy_process_group()


def test_what_one_process_refines_is_said(tmp_path):
    store = make_store(tmp_path / "s", clusters(2, seed=1))
    with pytest.raises(UserError, match="farthest landmarks is refined by one process"):
        ShardedPass(store, make_encoder(landmarks="farthest"))


def test_rows_in_the_middle_of_a_file_are_read(tmp_path):
    rows = torch.arange(60.0).view(20, 3)
    digest = write_rows(tmp_path / "x.bin", 0, rows)
    other = write_rows(tmp_path / "y.bin", 4, rows[:2])
    x, y = tmp_path / "x.bin", tmp_path / "y.bin"
    pieces = [Piece(x, 5, digest, 7), Piece(x, 2, digest, 12), Piece(y, 2, other, 4)]
    array = ChunkedArray(pieces, (3,), "float32", growing=True)
    assert len(array) == 9 and (array.read(1, 9) == torch.cat([rows[8:14], rows[:2]])).all()
    assert (array.take(torch.tensor([8, 0, 6])) == rows[[1, 7, 13]]).all()
    array.prefetch(torch.tensor([0, 8]))
    array.verify(2)
