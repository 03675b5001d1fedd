"""Faults that the suite once missed, planted one at a time in a copy of the package (``make mutants``; docs/development.md).

``python tests/planted.py`` prints which test notices which fault, as rows of the table there, and exits with 1 where one is
missed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Fault:
    """A fault: what is wrong, the file of the package, its line and what becomes of it, and the test that must notice."""

    what: str
    file: str
    line: str
    becomes: str
    test: str


RELATION = "magformer/test_wiring_relation.py::test_the_engine_of_the_relation_stage"
FAULTS = (
    Fault(
        "stage 1: AdamW without its betas and weight decay",
        "host/optimizer.py",
        "torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay, betas=betas)",
        "torch.optim.AdamW(groups, lr=train.lr)",
        "host/test_wiring_optim.py::test_every_key_of_an_optimiser_arrives_in_every_group",
    ),
    Fault(
        "relation stage: AdamW without its betas and weight decay",
        "magformer/stage.py",
        "encoder.parameters(), lr=train.lr, betas=tuple(train.betas), weight_decay=train.weight_decay",
        "encoder.parameters(), lr=train.lr",
        RELATION,
    ),
    Fault(
        "stage 1: margin 7",
        "engine/image.py",
        "margin=cfg.loss.triplet.margin,",
        "margin=7,",
        "engine/test_wiring_image.py::test_keys_of_the_composite_loss",
    ),
    Fault("relation stage: margin 7", "magformer/stage.py", "margin=weights.margin,", "margin=7,", RELATION),
    Fault(
        "stage 1: triplet weight times 3",
        "engine/image.py",
        "triplet=weights.triplet,",
        "triplet=3 * weights.triplet,",
        "engine/test_wiring_image.py::test_keys_of_the_composite_loss",
    ),
    Fault(
        "relation stage: triplet weight times 3",
        "magformer/stage.py",
        "triplet=weights.triplet,",
        "triplet=3 * weights.triplet,",
        RELATION,
    ),
    Fault(
        "GraFT: triplet weight times 3",
        "graft/network.py",
        "triplet=weights.triplet,",
        "triplet=3 * weights.triplet,",
        "graft/test_wiring_graft.py::test_the_optimiser_of_stage_1",
    ),
    Fault(
        "GraFT, stage 2: AdamW without weight decay",
        "graft/stage.py",
        "lr=finetune.lr, weight_decay=finetune.weight_decay)",
        "lr=finetune.lr)",
        "graft/test_wiring_graft.py::test_the_optimiser_of_stage_2",
    ),
    Fault(
        "bank: no augmentation",
        "engine/features.py",
        "transform = manager.transform_te if augment is None else manager.transform_tr",
        "transform = manager.transform_te",
        "engine/test_wiring_network.py::test_how_features_are_extracted",
    ),
    Fault(
        "relation stage: the refreshed bank without augmentation",
        "magformer/stage.py",
        'return run.features.bank("train", records, augment=first)',
        'return run.features.bank("train", records)',
        "magformer/test_wiring_relation.py::test_a_bank_that_is_refreshed",
    ),
    Fault(
        "row of the query expansion on raw features",
        "engine/evaluator.py",
        "expanded = average_query_expansion(query, gallery, **settings)",
        "expanded = query",
        "engine/test_wiring_rows.py::test_the_query_expansions_row",
    ),
    Fault(
        "transductive row on raw features",
        "engine/evaluator.py",
        "both = encoder(torch.cat([query, gallery]), cameras=cameras)",
        "both = torch.cat([query, gallery])",
        "engine/test_wiring_rows.py::test_the_relation_encoders_rows",
    ),
)


def noticed(fault: Fault, copy: Path) -> tuple[bool, str]:
    """Run a fault's test over a copy of the package that has it: whether it fails, and pytest's last line."""
    path = copy / "relreid_plugin" / fault.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(fault.line) != 1:
        raise SystemExit(f"'{fault.line}' is not there once in '{fault.file}'; name the line as it is now.")
    path.write_text(sound.replace(fault.line, fault.becomes), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"tests/{fault.test}"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    path.write_text(sound, encoding="utf-8")
    last = done.stdout.strip().split("\n")[-1]
    return done.returncode == 1 and bool(re.search(r"\bfailed\b", last)), last


def main() -> int:
    """Plant every fault, print a row for each, and return 1 where one is missed."""
    missed = 0
    print("| fault | noticed by |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("relreid_plugin", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy2(ROOT / name, copy / name)
        for fault in FAULTS:
            found, last = noticed(fault, copy)
            missed += not found
            print(f"| {fault.what} | " + (f"`{fault.test}`" if found else f"nothing: {last}") + " |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
