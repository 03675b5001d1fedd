"""README and documentation: snippets and commands run or parse, tables are those of the JSON, and what is named exists."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import MARKET, ROOT, copy_data

from relreid_plugin.config.defaults import _flat, get_default_config
from relreid_plugin.report.rankings import read_ranking

sys.path.insert(0, str(ROOT / "docs"))

import keys as key_reference
import links
import reference_pages
import tables
from commands import all_commands
from docs_commands import parse_command, run_command_line
from pages import Block, blocks, code_words, written_pages
from released import write_models

PAGES = written_pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.reason]
SHELL = [block for block in BLOCKS if block.language == "bash" and not block.reason]
COMMANDS = [(block.page, words) for block in SHELL for words in block.commands()]
WHOLE = {  # pages whose commands are run from the first to the last on tiny data, then their Python
    "README.md",
    "docs/howto/deep-pictures.md",
    "docs/howto/export.md",
    "docs/howto/figures.md",
    "docs/howto/models.md",
    "docs/howto/names-and-labels.md",
    "docs/howto/report.md",
    "docs/howto/rerank.md",
    "docs/howto/resume.md",
    "docs/howto/verify.md",
    "docs/howto/weights.md",
    "docs/tutorials/first-run.md",
    "docs/tutorials/search.md",
}
FRESH = {"docs/tutorials/first-run.md"}  # begin without a run
SMALL = "train.max_epoch 1 data.workers 0 data.height 64 data.width 32".split()
QUICK = "train.max_epoch 1 relation.train.max_epoch 1 relation.train.steps_per_epoch 1".split()
"""For runs in folders of their own; the page's run in the default folder is longer, and is resumed and tested."""


def tiny(words: list[str], config: Path) -> list[str]:
    """A command of the pages on the tiny data sets: the words of a quick one."""
    swap = {"embedded_persons": "embedded_persons_tiny", "embedded_vehicles": "embedded_vehicles_tiny"}
    words = [swap.get(word, word) for word in words]
    if words[1] == "export":
        words += ["--most", "16"]
    if "--config-file" not in words:
        return words
    place = words.index("--config-file") + 1
    if words[place] != "magformer_embedded.yml":
        names = "--root reid-data -s embedded_persons_tiny -t embedded_persons_tiny".split()
        return [*words[: place + 1], *names, *words[place + 1 :], *SMALL]
    more = QUICK if "data.save_dir" in words else ["data.save_dir", "runs/magformer_embedded"]
    return [*words[:place], str(config), *words[place + 1 :], *more]


@pytest.fixture
def workplace(tmp_path, tiny_root, tiny_run, monkeypatch):
    """A folder with what the pages speak of: a run, a data folder, its table, photos and a query."""
    run = shutil.copytree(tiny_run, tmp_path / "runs" / "magformer_embedded")
    text = (run / "config.yml").read_text(encoding="utf-8")
    assert str(tiny_run) in text  # a test by this file would go on in the run that all tests share
    (run / "config.yml").write_text(text.replace(str(tiny_run), str(run)), encoding="utf-8")
    (tmp_path / "reid-data").symlink_to(tiny_root)
    products = copy_data(tiny_root, tmp_path / "data" / "products")
    shutil.copytree(tiny_root / "embedded_persons_tiny" / MARKET / "query", tmp_path / "photos")
    shutil.copy(sorted((tmp_path / "photos").glob("*.jpg"))[0], tmp_path / "query.jpg")
    with (tmp_path / "data" / "products.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "pid", "camid", "split"])
        for folder, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
            for path in sorted((products / folder).glob("[0-9]*.jpg")):
                pid, camera = re.match(r"(\d+)_c(\d)", path.name).groups()
                if int(pid) > 0:
                    writer.writerow([path.relative_to(tmp_path / "data"), pid, camera, split])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(WHOLE))
def test_a_page_runs_from_top_to_bottom(page, workplace, tiny_config, capsys):
    if page in FRESH:
        shutil.rmtree("runs")
    if page == "docs/howto/models.md":
        write_models(workplace)
    own = [block for block in blocks(ROOT / page) if not block.reason and block.language in ("bash", "python")]
    assert own
    for block in own:
        if block.language == "python":
            exec(compile(block.text, page, "exec"), {})
            continue
        for words in block.commands():
            if words[0] != "relreid":
                continue  # parsed below
            code = run_command_line(tiny(words, tiny_config))
            said = capsys.readouterr()
            assert code == 0, f"{page}: {' '.join(words)}\n{said.out[-2000:]}\n{said.err}"


@pytest.mark.parametrize("block", [block for block in PYTHON if block.page not in WHOLE], ids=lambda block: block.page)
def test_python_blocks_run(block):
    exec(compile(block.text, block.page, "exec"), {})


@pytest.mark.parametrize("page, words", COMMANDS, ids=[f"{page}-{' '.join(words[:4])}" for page, words in COMMANDS])
def test_commands_parse(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_command(words)


@pytest.mark.parametrize("command", all_commands(), ids=lambda command: command.name)
def test_the_examples_of_a_command_parse(command, monkeypatch):
    assert command.examples and command.description
    for line in command.examples:
        parse_command(Block("", "bash", line, "").commands()[0])


def test_the_reference_of_commands_names_every_option():
    text = reference_pages.pages()["reference/commands.md"]
    for command in all_commands():
        section = re.split(r"\n##+ ", text.split(f"### relreid {command.name}\n")[1])[0]
        options = {option for action in command.parser()._actions for option in action.option_strings} - {"-h", "--help"}
        assert all(f"`{option}" in section or f", {option}" in section for option in options), command.name


def test_named_commands_exist():
    names = {command.name for command in all_commands()}
    groups = {name.split()[0] for name in names}
    named = {tuple(words.split()[1:3]) for page in PAGES for words in code_words(page) if re.match(r"relreid [a-z]", words)}
    assert len(named) > 5 and [words for words in sorted(named) if words[0] not in groups] == []


@pytest.mark.parametrize("name", sorted(path.stem for path in tables.RESULTS.glob("*.json")))
def test_the_command_of_a_result_parses(name, monkeypatch):
    result = tables.load(name)
    assert result["command"] or result["about"]
    assert {"command", "json"} <= result.keys()
    if result["command"].startswith(("relreid ", "python ", "OMP_NUM_THREADS")):
        monkeypatch.chdir(ROOT)
        words = Block(name, "bash", result["command"], "").commands()[0]
        parse_command(["magformer_embedded.yml" if word == "CONFIGURATION" else word for word in words])


def test_rankings_on_pages_are_read(tmp_path):
    blocks = [block for block in BLOCKS if block.language == "json"]
    assert blocks
    for block in blocks:
        (tmp_path / "ranking.json").write_text(block.text)
        assert read_ranking(tmp_path / "ranking.json")["rankings"]


def test_every_block_says_what_it_is():
    assert len(PYTHON) >= 6 and len(COMMANDS) >= 30
    languages = {
        "bash",
        "json",
        "python",
        "text",
        "{toctree}",
        "{include} ../reference/fourth-method.inc",
        "{include} ../CHANGELOG.md",
    }
    assert [(block.page, block.language) for block in BLOCKS if block.language not in languages] == []
    assert [block.page for block in BLOCKS if block.reason and block.language not in ("bash", "python")] == []
    assert [block for block in BLOCKS if block.reason and len(block.reason.split()) < 2] == []
    marks = sum(len(re.findall("^<!-- not run", page.read_text(encoding="utf-8"), flags=re.M)) for page in PAGES)
    assert marks == sum(bool(block.reason) for block in BLOCKS) > 5


def test_tables_are_those_of_the_json():
    assert [str(path) for path in tables.stale()] == [], "run: python docs/tables.py"
    assert set(tables.used()) == {path.stem for path in tables.RESULTS.glob("*.json")}
    for path in tables.RESULTS.glob("*.json"):
        assert tables.dump(json.loads(path.read_text(encoding="utf-8"))) == path.read_text(encoding="utf-8")


def test_a_table_is_read_as_a_command_wrote_it(tmp_path, monkeypatch, capsys):
    written = "| method | mAP | epochs |\n|---|---:|---:|\n| a | 28.0 | 3, 4 |\n| b | 7.5 ± 0.1 | - |\n"
    (tmp_path / "x.md").write_text("**first**\n\n| a |\n|---|\n| b |\n\n**second**\n\n" + written)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [])
    (tmp_path / "x.json").write_text('{"command": "c", "json": "j", "lines": ["old"]}')
    assert tables.main(["take", "x", str(tmp_path / "x.md"), "--table", "2"]) == 0
    result = tables.load("x")
    assert (result["command"], result["json"]) == ("c", "j") and "lines" not in result
    assert result["rows"] == [["a", 28.0, "3, 4"], ["b", {"mean": 7.5, "std": 0.1}, "-"]]
    assert tables.render(result) + "\n" == written
    page = tmp_path / "page.md"
    page.write_text("<!-- table: x -->\nold\n<!-- end of table -->\nrest\n")
    monkeypatch.setattr(tables, "pages", lambda: [page])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1 and tables.main([]) == 0 and tables.main(["--check"]) == 0
    assert page.read_text() == f"<!-- table: x -->\n\n{written}\n<!-- end of table -->\nrest\n"
    (tmp_path / "y.txt").write_text("printed\n  lines\n")
    tables.main(["take", "y", str(tmp_path / "y.txt")])
    assert tables.render(tables.load("y")) == "```text\nprinted\n  lines\n```"
    with pytest.raises(ValueError, match="there are 2 tables"):
        tables.read_table((tmp_path / "x.md").read_text(), 3)


def test_the_reference_has_every_key_with_its_default():
    text = reference_pages.pages()["reference/keys.md"]
    found = dict(re.findall(r"^```\{confval\} (\S+)\n:default: `(.*)`$", text, flags=re.M))
    assert {name: eval(default) for name, default in found.items()} == _flat(get_default_config())
    section = text.split("{confval} relation.k\n")[1].split("```")[0]
    assert section.strip().endswith("neighbours per image")


def test_comments_become_markdown():
    assert key_reference.prose("a | b_c *d* `e|f_g` <h> [i]") == "a \\| b\\_c \\*d\\* `e|f_g` \\<h> \\[i\\]"


def test_named_keys_exist():
    keys = set(_flat(get_default_config()))
    groups = {name.split(".")[0] for name in keys if "." in name}
    shape = re.compile(rf"({'|'.join(sorted(groups))})(\.[a-z_0-9]+)+")
    words = {(page.name, word) for page in PAGES for words in code_words(page) for word in words.split()}
    words |= {(page, word) for page, line in COMMANDS for word in line}  # -t NAME takes a key that is misspelt for a name
    endings = (".yml", ".log", ".json", ".md", ".safetensors", ".onnx", ".xml", ".bin", ".pt", ".data", ".npz", ".png")
    named = {each for each in words if shape.fullmatch(each[1]) and not each[1].endswith(endings)}
    assert len(named) > 60 and [each for each in sorted(named) if each[1] not in keys] == []


def test_named_files_exist():
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    names = {(page, name) for page, text in texts.items() for name in re.findall(r"\b[a-z0-9_]+\.yml\b", text)}
    packaged = {path.name for path in (ROOT / "configs").glob("*.yml")} | {"config.yml", "best.yml"}
    assert len(names) > 30 and [each for each in sorted(names) if each[1] not in packaged] == []
    path = r"(?:configs|tools|docs|benchmarks|tests)/[\w./]+\.(?:yml|py|png)"
    paths = {name for text in texts.values() for name in re.findall(path, text)}
    assert len(paths) > 5 and [name for name in sorted(paths) if not (ROOT / name).is_file()] == []


def test_links_of_pages_read_without_the_site_exist():
    """The site's own links, with their anchors, are checked by ``make docs``."""
    made = {str(ROOT / "docs" / name) for name in reference_pages.pages()}
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            goal = (page.parent / name).resolve() if name else page
            if "://" in target or str(goal) in made:
                continue
            if not goal.is_file() or (anchor and anchor not in anchors(goal)):
                missing.append((page.name, target))
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as renderers of Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_broken_links_of_the_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">x</a><a href="b.html#gone">x</a><img src="no.png"><a href="https://x/y">x</a>'
    )
    (tmp_path / "b.html").write_text('<p id="here"><a href="#here">x</a><a href="a.html">x</a>')
    assert links.broken_links(tmp_path) == ["a.html: b.html#gone: no such anchor", "a.html: no.png: no such file"]
    assert links.main([str(tmp_path)]) == 1
    (tmp_path / "a.html").unlink()
    (tmp_path / "b.html").write_text("<p>")
    assert links.main([str(tmp_path)]) == 0


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200 and "{{" not in text
    assert "make demo" in text and "make test" in text and "![" in text


def test_nothing_is_needed_from_beside_the_repository():
    files = [*PAGES, *(ROOT / "configs").glob("*.yml"), ROOT / "Makefile", *(ROOT / "tests").rglob("*.py")]
    others = [path for path in files if path != Path(__file__).resolve()]
    assert [path.name for path in others if "../shared" in path.read_text(encoding="utf-8")] == []
