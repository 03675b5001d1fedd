"""The command ``relreid``: fast answers, one sentence for a mistake, help with examples, completion, doors and aliases."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relreid_plugin.cli.main import COMMANDS, full_parser, main
from relreid_plugin.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "torchreid", "numpy", "cv2", "faiss", "matplotlib", "PIL", "scipy", "timm")
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def fresh(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, timeout=120
    )


def loaded_by(*arguments: str) -> tuple[int, str, str, set[str]]:
    """Exit code, outputs, and the heavy modules that a command line has imported."""
    done = fresh(
        "import sys\nfrom relreid_plugin.cli.main import main\ntry: code = main(sys.argv[1:])\n"
        f"except SystemExit as end: code = end.code or 0\nprint('@', code, *[n for n in {HEAVY!r} if n in sys.modules])",
        *arguments,
    )
    out, _, last = done.stdout.rpartition("@ ")
    words = last.split()
    return int(words[0]), out, done.stderr, set(words[1:])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 2),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["help", "tables", "rib"], 0),
        (["data", "--help"], 0),
        (["trian"], 2),
        (["train", "data.rot", "x"], 2),
        (["train", "--config-file", "magformer_embeded.yml"], 2),
        (["train", "--config-file", "magformer_embedded", "relation.k", "0"], 2),
        (["train", "--confg-file", "x"], 2),
        (["configs"], 0),
        (["config", "magformer_embedded", "--explain"], 0),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else str(value),
)
def test_answers_without_torch(arguments, code):
    found, out, err, heavy = loaded_by(*arguments)
    assert (found, heavy) == (code, set())
    if code == 0:
        assert out and not err
    elif arguments:
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_no_commands_help_imports_torch():
    done = fresh(
        "import sys\nfrom relreid_plugin.cli.main import COMMANDS\n"
        "for name, entry in COMMANDS.items(): print(entry.load().parser(f'relreid {name}').format_help())\n"
        f"print('@', *[n for n in {HEAVY!r} if n in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rpartition("@")[2].split() == []


def test_starting_imports_little():
    """Start-up is what is imported: the list of commands needs neither the configuration nor a command's module."""
    done = fresh(
        "import sys\nbefore = set(sys.modules)\nfrom relreid_plugin.cli.main import main\nmain(['--help'])\n"
        "print('@', *sorted(set(sys.modules) - before))"
    )
    names = done.stdout.rpartition("@")[2].split()
    own = {name for name in names if name.startswith("relreid_plugin")}
    assert own == {"relreid_plugin", "relreid_plugin.moved", "relreid_plugin.cli", "relreid_plugin.cli.main"}
    assert len(names) < 30 and not {"argparse", "yaml", "dataclasses", "inspect"} & set(names)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name, capsys):
    command = COMMANDS[name].load()
    assert command.name == name and command.examples
    text = command.parser(f"relreid {name}").format_help()
    assert f"usage: relreid {name} " in text and "examples:\n" in text
    for line in command.examples:
        words = line.split("   ")[0].split(" > ")[0].split()
        if words[0] == "torchrun":
            words = ["relreid", *words[words.index("relreid_plugin") + 1 :]]
        assert words[0] == "relreid" and line in text
        other = COMMANDS.get(" ".join(words[1:3])) or COMMANDS[words[1]]
        skip = 3 if " ".join(words[1:3]) in COMMANDS else 2
        other.load().parser("x").parse_args(words[skip:])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["tables", "grafd"], "there is no command 'tables grafd'; did you mean 'tables graft'?"),
        (["data", "conver"], "did you mean 'data convert'?"),
        (["--config-file", "x"], "the command goes first"),
        (["--print-completion", "fish"], "--print-completion takes a shell"),
        (["--print-completion"], "--print-completion takes a shell"),
        (["search", "RUN"], "STORE"),
        (["test", "--stage", "1"], "--stage"),
        (["extract", "RUN", "", "photos"], "OUT is empty"),
        (["evaluate", "a.npz", ""], "FEATURES is empty"),
        (["report", "RUN", "--out", ""], "--out is empty"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_the_list_has_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and entry.summary in text for name, entry in COMMANDS.items())
    assert max(map(len, text.splitlines())) <= 100


def test_a_closed_pipe_is_no_error():
    script = f"{sys.executable} -m relreid_plugin --help | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() in ("0", "141") and done.stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="closes by numbers")
@pytest.mark.parametrize("numbers", [(1,), (0, 1, 2)])
def test_closed_streams_lead_nowhere(numbers, tmp_path):
    """A file that is opened does not get the number of a stream, into which libraries print."""
    code = (
        f"import os, sys\nfor number in {numbers}:\n"
        "    os.close(number)\n    setattr(sys, ('stdin', 'stdout', 'stderr')[number], None)\n"
        "from relreid_plugin.cli.main import main\nfrom relreid_plugin.cli.running import run_command\n"
        "def work():\n    file = open(sys.argv[1], 'w')\n    os.write(1, b'noise')\n    print('said')\n"
        "    print(file.fileno(), file=file)\n"
        "assert main(['--help']) == 0\nsys.exit(run_command(work))"
    )
    done = fresh(code, str(tmp_path / "file"))
    assert (done.returncode, done.stderr) == (0, "") and int((tmp_path / "file").read_text()) > 2


def test_names_of_no_text_can_be_printed():
    code = (
        "import sys\nfrom relreid_plugin.cli.running import run_command\n"
        "sys.exit(run_command(lambda: print('a\\udcff', chr(233))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"},
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, r"a\udcff \xe9", "")


# --- completion ---------------------------------------------------------------------------------------------------------
def completions(line: str, script: Path) -> set[str]:
    """What bash offers at the end of a line."""
    words = line.split(" ")
    ask = (
        f"source {script}; COMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)}); COMP_CWORD={len(words) - 1};"
        f"COMP_LINE='{line}'; COMP_POINT={len(line)}; f=$(complete -p relreid | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
        f"$f relreid '{words[-1]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_configurations(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    script = tmp_path / "relreid.bash"
    script.write_text(capsys.readouterr().out)
    assert {"train", "tables", "doctor"} <= completions("relreid ", script)
    assert completions("relreid tables ", script) >= {"rib", "graft"}
    assert completions("relreid train --conf", script) == {"--config-file"}
    assert completions("relreid train --config-file magformer_emb", script) == {"magformer_embedded.yml"}
    assert completions("relreid data convert ", script) >= {"grocery", "folders"}


def test_other_shells(capsys):
    pytest.importorskip("shtab")
    for shell in ("zsh", "tcsh"):
        assert main([f"--print-completion={shell}"]) == 0
        assert "relreid" in capsys.readouterr().out


def test_the_full_parser_has_every_command():
    known = full_parser().format_help()
    assert all(name.split()[0] in known for name in COMMANDS)


# --- doors and old names ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_tools_are_doors(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    code = [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    imported, guarded = code
    assert isinstance(imported, ast.ImportFrom) and imported.module.startswith("relreid_plugin.cli.")
    assert isinstance(guarded, ast.If) and len(guarded.body) == 1
    name = ast.get_docstring(tree).rpartition("``relreid ")[2].split("``")[0]
    entry = COMMANDS[name]
    assert imported.module.rpartition(".")[2] == entry.module
    done = fresh(
        "import runpy, sys; from relreid_plugin.cli.main import COMMANDS\n"
        "same = runpy.run_path(sys.argv[1])['main'].__self__ is COMMANDS[sys.argv[2]].load()\nprint(same)"
        if imported.names[0].name != "main" or entry.module != "train"
        else "print(True)",
        str(path),
        name,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_every_tool_of_before_is_there():
    assert {path.stem for path in TOOLS} >= {
        *("eta", "extract", "figures", "gradcam", "graft", "information", "ladder", "make_embedded", "modality_stats"),
        *("occlusion", "prune", "rib", "search", "splits", "train_net"),
    }


@pytest.mark.parametrize(("alias", "name"), [("train_alias", "train"), ("ladder_alias", "ladder")])
def test_old_commands_say_so_once(alias, name):
    done = fresh(f"import sys; from relreid_plugin.cli.main import {alias}; sys.exit({alias}())", "--help")
    assert done.returncode == 0 and f"usage: relreid-{name} " in done.stdout
    assert done.stderr == f"note: relreid-{name} is now 'relreid {name}'; the old name will be taken away.\n"


def test_ladder_knows_its_rungs():
    from relreid_plugin.cli.ladder import RUNGS as named
    from relreid_plugin.magformer.ladder import RUNGS as real

    assert tuple(real) == named


def test_ladder_knows_its_rivals():
    from relreid_plugin.cli.ladder import RIVALS as named
    from relreid_plugin.metrics.rivals import RIVALS as real

    assert tuple(real) == named


def test_embedded_names_in_the_help():
    from relreid_plugin.data.embedded import SPECS, VEHICLE_SPECS

    assert set(SPECS) | set(VEHICLE_SPECS) == {
        f"embedded_{kind}{size}" for kind in ("persons", "vehicles") for size in ("", "_tiny")
    }


def test_a_loader_process_error_is_cleaned_only_when_there_was_one():
    from relreid_plugin.cli.running import _sentence

    assert _sentence(UserError("a sentence\nwith a break")) == "a sentence with a break"


def test_stages_are_those_of_the_configuration():
    from relreid_plugin.cli.train import TRAIN, configuration

    def stage(*words):
        return configuration(TRAIN.parser("x").parse_args(["--config-file", *words]))[1].stage

    assert stage("graft_magformer_embedded", "--stage", "3") == 3 and stage("osnet_embedded") is None
    for words, sentence in (
        (["graft_magformer_embedded", "--stage", "4"], r"--stage 4: this configuration has the stages \[1, 2, 3\]"),
        (["magformer_embedded", "--stage", "3"], r"--stage 3: this configuration has the stages \[1, 2\]"),
        (["magformer_embedded", "--stage", "2", "train.stages", "[1]"], r"has the stages \[1\]"),
        (["magformer_embedded", "--stage", "0"], "--stage 0: this configuration has the stages"),
        (["magformer_embedded", "--stage", "x"], "argument --stage: invalid int value: 'x'"),
        (["magformer_embedded", "--eval-only", "--stage", "1"], "--eval-only tests all stages .* leave out --stage 1"),
        (["magformer_embedded", "--stage", "2", "--eval-only"], "--eval-only tests all stages .* leave out --stage 2"),
        (["magformer_embedded", "--stage", "2", "test.evaluate", "True"], "'test.evaluate True' tests all stages"),
    ):
        with pytest.raises(UserError, match=sentence):
            stage(*words)


def test_test_is_train_eval_only():
    from relreid_plugin.cli.train import TEST, TRAIN, configuration

    given = ["--config-file", "magformer_embedded", "-t", "embedded_persons", "test.rerank", "True"]
    one, args = configuration(TEST.parser("x").parse_args(given))
    two, _ = configuration(TRAIN.parser("x").parse_args(["--eval-only", *given]))
    assert one == two and args.eval_only and not args.resume and args.stage is None
