"""A training command in a process of its own that is killed by SIGKILL at a chosen call."""

from __future__ import annotations

import os
import subprocess

import warm
from conftest import ROOT

DRIVER = """
import os, signal, sys
target, call = sys.argv[1], int(sys.argv[2])
import relreid_plugin
relreid_plugin.register()
from relreid_plugin.engine import checkpoint, image
from relreid_plugin.graft import stage as multimodal
from relreid_plugin.magformer import stage as relation
calls = 0
def die_at(owner, name):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == call:
            if name == "save":
                with open(str(args[0]) + ".half", "wb") as file:
                    file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)
if target == "image":
    die_at(image.CompositeEngine, "forward_backward")
elif target == "relation":
    die_at(relation.RelationEngine, "forward_backward")
elif target == "multimodal":
    die_at(multimodal.MultimodalEngine, "forward_backward")
elif target == "replace":
    die_at(os, "replace")
from relreid_plugin.cli.train import main
sys.exit(main(sys.argv[3:]))
"""


def spawn(tmp_path, *args):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [warm.python(), str(driver), *map(str, args)], env=environment, capture_output=True, text=True, timeout=300
    )
