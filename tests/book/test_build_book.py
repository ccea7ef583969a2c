"""The notebooks' form, and the tool that builds the book from them."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import samlib
from samlib.store import keys
from samlib.store.files import write_json
from tools import build_book, check_offline

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [p for p in (ROOT / "book").rglob("*.md") if "vendor" not in p.parts]
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]


def parameter_cell(source='preset: str = "laptop"  # size\nrho: float | None = 0.05  # radius\nseeds = [0]'):
    return new_code_cell(source, metadata={"tags": ["parameters"]})


def executed(notebook):
    """The notebook as if papermill had run it."""
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = number + 1
        cell.metadata["papermill"] = {"exception": False, "status": "completed"}
    return notebook


# The notebooks


def text_of(path: Path, kind: str) -> str:
    return "\n\n".join(c.source for c in build_book.read_notebook(path).cells if c.cell_type == kind)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_is_stored_clean(self, path):
        notebook = build_book.read_notebook(path)
        nbformat.validate(notebook)
        for cell in build_book.code_cells(notebook):
            assert cell.outputs == [] and cell.execution_count is None
        assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
        assert not any("injected-parameters" in build_book.tags(c) for c in notebook.cells)

    def test_begins_with_title_badge_and_goals(self, path):
        first = build_book.read_notebook(path).cells[0]
        assert first.cell_type == "markdown" and first.source.startswith("# ")
        text = text_of(path, "markdown")
        assert re.findall(r"^# ", text, re.M) == ["# "], "one title, sections below it"
        colab = REPOSITORY.replace("https://github.com/", "https://colab.research.google.com/github/")
        assert f"{colab}/blob/main/notebooks/{path.name}" in text
        assert re.search(r"^## Learning goals$", text, re.M)

    def test_has_one_parameters_cell_with_single_typed_lines(self, path):
        cells = [c for c in build_book.read_notebook(path).cells if "parameters" in build_book.tags(c)]
        assert len(cells) == 1
        assert build_book.parameters(build_book.read_notebook(path))["preset"] == {"str"}
        for line in cells[0].source.splitlines():
            if line.strip() and not line.startswith("#"):
                assert re.fullmatch(r"\w+: [\w\[\], |]+ = [^=]+  # [^=]+", line), line

    def test_badge_opens_this_notebook_in_colab(self, path):
        colab = REPOSITORY.replace("https://github.com/", "https://colab.research.google.com/github/")
        badge = f"[![Open in Colab]({build_book.COLAB_BADGE})]({colab}/blob/main/notebooks/{path.name})"
        text = text_of(path, "markdown")
        assert badge in text and text.count("colab.research.google.com") == badge.count("colab.research.google.com")

    def test_first_cell_installs_samlib_only_where_it_is_missing(self, path):
        """The same cell everywhere: it runs on any machine, and does something in Colab alone."""
        install, *others = build_book.code_cells(build_book.read_notebook(path))
        assert build_book.tags(install) == ["remove-cell"]
        assert install.source == (
            "import importlib.util\n\n"
            'if importlib.util.find_spec("samlib") is None:  # in Colab; PyTorch stays\n'
            f'    %pip install --quiet "samlib @ git+{REPOSITORY}@v{samlib.__version__}"'
        )
        assert build_book.tags(others[0]) == ["parameters", "hide-input"]
        assert others[1].source.startswith("from samlib import begin  #") and "import" not in others[1].source[25:]

    def test_has_no_widget_that_can_block_papermill(self, path):
        assert not re.search(r"\binteract(ive|ive_output)?\b", text_of(path, "code")), "use plot.slide"

    def test_never_installs_torch(self, path):
        code = text_of(path, "code")
        for line in re.findall(r"pip install.*", code):
            assert "torch" not in line and "--upgrade" not in line and " -U" not in line

    def test_ends_with_exercises_comparison_stamp_and_references(self, path):
        text, code = text_of(path, "markdown"), text_of(path, "code")
        headings = re.findall(r"^## (.+)$", text, re.M)
        assert headings[-4:] == [
            "Exercises",
            "Your run against the published one",
            "Where these numbers come from",
            "References",
        ]
        assert re.search(r"^\s*assert ", code, re.M) and ".stamp(" in code
        assert "{cite" not in text and "{bibliography}" not in text, "citations are footnotes of their page"
        assert ("{footcite" in text) == ("{footbibliography}" in text)

    def test_glue_names_are_unique_in_the_book(self, path):
        names = re.findall(r"\{glue:\w*\}`([^`:]+)", text_of(path, "markdown"))
        assert all(name.startswith(f"nb{path.stem[:2]}_") or "/" in name for name in names), names

    def test_figures_have_text_for_those_who_do_not_see_them(self, path):
        for cell in build_book.code_cells(build_book.read_notebook(path)):
            figure = cell.metadata.get("mystnb", {})
            if "figure" in figure:
                assert len(figure.get("image", {}).get("alt", "")) >= 20, cell.source
                assert figure["figure"].get("name", "").startswith("fig-"), cell.source
                assert cell.source.rstrip().endswith(";"), f"ends with ';': {cell.source}"


def test_toc_lists_every_notebook_and_only_files_that_exist():
    toc = (ROOT / "_toc.yml").read_text()
    files = re.findall(r"(?:file|root):\s*(\S+)", toc)
    assert [f for f in files if not list(ROOT.glob(f + ".*"))] == []
    assert build_book.notebooks_in_toc(ROOT) == [p.stem for p in NOTEBOOKS]
    pages = {p.relative_to(ROOT).with_suffix("").as_posix() for p in PAGES}
    assert pages == {f for f in files if f.startswith("book/")}


def test_every_citation_is_in_the_bibliography():
    keys = re.findall(r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(), re.M)
    assert len(keys) == len(set(keys))
    texts = [p.read_text() for p in PAGES]
    texts += [text_of(p, "markdown") for p in NOTEBOOKS]
    cited = re.findall(r"\{(?:foot)?cite(?::\w+)?\}`([^`]+)`", "\n".join(texts))
    assert {key.strip() for keys in cited for key in keys.split(",")} <= set(keys)


def test_library_pages_list_every_module_of_their_package():
    listed = {
        (page.stem, module)
        for page in (ROOT / "book" / "api").glob("*.md")
        for module in re.findall(r"automodule:: samlib\.([\w.]+)", page.read_text())
    }
    files = [p.relative_to(ROOT / "samlib").with_suffix("") for p in (ROOT / "samlib").rglob("*.py")]
    modules = [".".join(p.parts).removesuffix(".__init__") for p in files if p.parts != ("__init__",)]
    assert listed == {(module.split(".")[0], module) for module in modules}


# Parameters


def test_parameters_and_their_types():
    assert build_book.parameters(new_notebook(cells=[parameter_cell()])) == {
        "preset": {"str"},
        "rho": {"float", "NoneType"},
        "seeds": set(),
    }


def test_parameter_values_are_literals_or_strings():
    assert build_book.parse_parameter("rho=1e-4") == (None, "rho", 1e-4)
    assert build_book.parse_parameter("05_merging:seeds=[0, 1]") == ("05_merging", "seeds", [0, 1])
    assert build_book.parse_parameter("preset=smoke") == (None, "preset", "smoke")
    with pytest.raises(build_book.BuildError, match="NAME=VALUE"):
        build_book.parse_parameter("rho 0.1")


def test_parameters_are_assigned():
    notebooks = {"a": new_notebook(cells=[parameter_cell()]), "b": new_notebook(cells=[parameter_cell()])}
    given = [(None, "preset", "smoke"), ("b", "rho", 1), ("b", "rho", None)]
    assert build_book.assign_parameters(notebooks, given) == {
        "a": {"preset": "smoke"},
        "b": {"preset": "smoke", "rho": None},
    }


def test_wrong_parameters_are_reported_all_at_once():
    notebooks = {"a": new_notebook(cells=[parameter_cell()])}
    given = [(None, "roh", 0.1), ("a", "rho", "x"), ("c", "rho", 0.1)]
    with pytest.raises(build_book.BuildError) as error:
        build_book.assign_parameters(notebooks, given)
    assert str(error.value) == (
        "a has no parameter 'roh', only preset, rho, seeds; "
        "a: rho must be NoneType or float, not 'x'; "
        "there is no notebook 'c', only a"
    )


# What makes a notebook run again


def test_docstrings_comments_and_layout_do_not_count_as_code():
    code = 'def f(x):\n    """Twice x."""\n    return 2 * x\n'
    text = '"""A module."""\n# comment\ndef f(x):\n    """Two times x."""\n    return 2*x\n'
    assert keys.without_prose(code) == keys.without_prose(text)
    assert keys.without_prose(code) != keys.without_prose(code.replace("2", "3"))


def test_run_key_depends_on_code_and_parameters_but_not_on_text():
    def key(text="words", code="x = 1", shared="s", **chosen):
        cells = [new_markdown_cell(text), parameter_cell(), new_code_cell(code)]
        return build_book.run_key(new_notebook(cells=cells), chosen, shared)

    assert key() == key(text="other words")
    assert len({key(), key(code="x = 2"), key(shared="t"), key(preset="smoke")}) == 4


def test_shared_digest_sees_library_data_and_published_values(tmp_path):
    seen = [build_book.shared_digest(tmp_path)]
    for name, text in [
        ("samlib/rules.py", "x = 1"),
        ("samlib/merge/linear.py", "x = 1"),
        ("samlib/model/models.json", "{}"),
        ("samlib/testbed/digits/train.parquet", "data"),
        ("book/published/05_merging.laptop.json", "{}"),
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.append(build_book.shared_digest(tmp_path))
    assert len(set(seen)) == 6
    (tmp_path / "samlib/testbed/README.md").write_text("sources")
    (tmp_path / "samlib/merge/linear.py").write_text('"""Words."""\nx = 1  # more words')
    (tmp_path / "samlib/merge/__pycache__").mkdir()
    (tmp_path / "samlib/merge/__pycache__/linear.cpython-311.pyc").write_text("compiled")
    assert build_book.shared_digest(tmp_path) == seen[-1]
    (tmp_path / "samlib/merge/linear.py").write_text("x = 2")
    assert build_book.shared_digest(tmp_path) not in seen


def test_state_is_read_back(tmp_path):
    path = tmp_path / "state.json"
    assert build_book.read_state(path) == {}
    write_json(path, {"a": {"key": "k", "seconds": 1.5}})
    assert build_book.read_state(path) == {"a": {"key": "k", "seconds": 1.5}}
    assert list(tmp_path.iterdir()) == [path]


# Running and staging


def test_a_run_that_fails_names_the_cell_and_the_error(tmp_path):
    cells = [parameter_cell(), new_code_cell("# comes first\nx = 1 / 0"), new_markdown_cell("text")]
    nbformat.write(new_notebook(cells=[new_markdown_cell("text"), *cells]), tmp_path / "a.ipynb")
    with pytest.raises(build_book.BuildError) as error:
        build_book.run_notebook(tmp_path / "a.ipynb", tmp_path / "executed" / "a.ipynb", {"preset": "smoke"}, 60, "a")
    assert str(error.value) == (
        "a failed in code cell 2, '# comes first':\nZeroDivisionError: division by zero\n"
        f"The run so far: {tmp_path / 'executed' / 'a.failed.ipynb'}"
    )


def test_progress_is_a_line_a_minute(capsys):
    progress = build_book.Progress("[1/8] a", 30)
    for seconds in (1, 59, 61, 100, 125):
        progress(7, seconds)
    assert capsys.readouterr().out == "[1/8] a: cell 7 of 30, 1:01\n[1/8] a: cell 7 of 30, 2:05\n"


@pytest.fixture
def small_book(tmp_path):
    """A repository with a page and a notebook that was executed."""
    (tmp_path / "_config.yml").write_text("title: A book\nexecute:\n  execute_notebooks: 'off'\n")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/a\n")
    for folder in ("book/published", "notebooks", "build/smoke/executed"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "book" / "intro.md").write_text("# A page\n\nWords.\n")
    notebook = new_notebook(cells=[new_markdown_cell("# A chapter\n\nOld."), new_code_cell("x = 1")])
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    nbformat.write(notebook, tmp_path / "notebooks" / "a.ipynb")
    nbformat.write(executed(notebook), tmp_path / "build" / "smoke" / "executed" / "a.ipynb")
    return build_book.Paths(tmp_path, tmp_path / "build" / "smoke")


def test_the_stage_holds_what_is_there_and_leaves_alone_what_stays_the_same(small_book):
    (small_book.root / "book" / "old.md").touch()
    build_book.stage(small_book, ["a"])
    before = {path: path.stat().st_mtime_ns for path in small_book.stage.rglob("*") if path.is_file()}
    (small_book.root / "book" / "old.md").unlink()
    (small_book.root / "book" / "intro.md").write_text("# A page\n\nOther words.\n")
    build_book.stage(small_book, ["a"])
    after = {path: path.stat().st_mtime_ns for path in small_book.stage.rglob("*") if path.is_file()}
    assert [path.name for path in set(before) - set(after)] == ["old.md"] and set(after) < set(before)
    assert [path.name for path in after if after[path] != before[path]] == ["intro.md"]


def test_after_an_edit_of_text_only_its_page_is_rendered_again(small_book):
    source = small_book.root / "notebooks" / "a.ipynb"

    def render():
        build_book.stage(small_book, ["a"])
        build_book.render(small_book, build_book.render_key(small_book, ["a"]))
        doctrees = (small_book.build / "render" / "_build" / ".doctrees").rglob("*.doctree")
        return {path.stem: path.stat().st_mtime_ns for path in doctrees}

    first = render()
    source.write_text(source.read_text().replace("Old.", "New."))
    second = render()
    assert second["intro"] == first["intro"] and second["a"] != first["a"]
    page = small_book.html / "notebooks" / "a.html"
    assert "New." in page.read_text()
    words = source.read_text()
    source.write_text(words.replace("New.", "New, see {ref}`nowhere`."))
    for _ in range(2):  # a warning is told as long as it is there
        with pytest.raises(build_book.BuildError, match="undefined label: 'nowhere'"):
            render()
    assert "nowhere" not in page.read_text(), "the last complete pages stay"
    source.write_text(words)
    third = render()
    ran = small_book.executed / "a.ipynb"
    ran.write_text(ran.read_text().replace('"execution_count": 1', '"execution_count": 2'))
    assert render()["intro"] != third["intro"], "another page may show a number of the notebook that ran"


def test_check_executed_refuses_what_was_not_run():
    notebook = executed(new_notebook(cells=[new_code_cell(source) for source in ("x = 1", "y = 2", "")]))
    notebook.cells[2].execution_count = None  # empty cells are never run
    build_book.check_executed(notebook, "a")
    notebook.cells[1].execution_count = None
    with pytest.raises(build_book.BuildError, match="a, code cell 2 was not executed"):
        build_book.check_executed(notebook, "a")


def test_check_executed_refuses_errors():
    by_papermill = executed(new_notebook(cells=[new_code_cell("x")]))
    by_papermill.cells[0].metadata["papermill"]["exception"] = True
    by_output = executed(new_notebook(cells=[new_code_cell("x")]))
    by_output.cells[0].outputs = [new_output("error", ename="NameError", evalue="x", traceback=[])]
    for notebook in (by_papermill, by_output):
        with pytest.raises(build_book.BuildError, match="a, code cell 1 ended with an error"):
            build_book.check_executed(notebook, "a")
    whole = executed(new_notebook(cells=[]))
    whole.metadata["papermill"] = {"exception": True}
    with pytest.raises(build_book.BuildError, match="a ended with an error"):
        build_book.check_executed(whole, "a")


def test_check_executed_wants_a_text_for_every_image():
    notebook = executed(new_notebook(cells=[new_code_cell("plot();")]))
    notebook.cells[0].outputs = [new_output("display_data", {"image/png": "", "text/plain": "<Figure>"})]
    with pytest.raises(build_book.BuildError, match="no mystnb.image.alt"):
        build_book.check_executed(notebook, "a")
    notebook.cells[0].metadata["mystnb"] = {"image": {"alt": "A falling curve."}}
    build_book.check_executed(notebook, "a")


def test_new_text_is_combined_with_old_outputs():
    old = [new_markdown_cell("old"), parameter_cell(), new_code_cell("print(1)")]
    run = executed(new_notebook(cells=old))
    run.cells.insert(2, new_code_cell("preset = 'smoke'", metadata={"tags": ["injected-parameters"]}))
    run.cells[3].outputs = [new_output("stream", name="stdout", text="1\n")]
    run.metadata["papermill"] = {"exception": None}
    new = [new_markdown_cell("new"), parameter_cell(), new_markdown_cell("more"), new_code_cell("print(1)")]
    new[3].metadata["mystnb"] = {"image": {"alt": "none"}}
    result = build_book.combine(new_notebook(cells=new), run)
    assert [c.source for c in result.cells] == [
        "new",
        new[1].source,
        "preset = 'smoke'",
        "more",
        "print(1)",
    ]
    assert result.cells[4].outputs[0].text == "1\n" and result.cells[4].execution_count == 2
    assert result.cells[4].metadata["mystnb"] == {"image": {"alt": "none"}}
    assert "papermill" in result.metadata
    assert new[3].outputs == [], "the source is left alone"


def test_widgets_are_removed():
    cell = new_code_cell("slider")
    cell.outputs = [
        new_output("display_data", {build_book.WIDGET_TYPES[0]: {}, "text/plain": "IntSlider()"}),
        new_output("display_data", {"text/plain": "kept"}),
    ]
    notebook = new_notebook(cells=[cell], metadata={"widgets": {}})
    build_book.without_widgets(notebook)
    assert [o.data["text/plain"] for o in cell.outputs] == ["kept"] and "widgets" not in notebook.metadata


# Pages without a network


def test_pages_that_need_a_network_are_found(tmp_path):
    (tmp_path / "here.js").write_text("")
    page = """
        <link rel="stylesheet" href="here.css?v=1"><link rel="canonical" href="https://a.example/">
        <script src="here.js"></script><script src="https://b.example/x.js"></script>
        <style>@font-face { src: url("//c.example/f.woff") }</style>
        <a href="https://d.example/">links are no problem</a>
        <img src="data:image/png;base64,AA"><img srcset="here.js 1x, https://e.example/i.png 2x">
    """
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "style.css").write_text('@import "https://f.example/s.css"; a { background: url(here.js) }')
    assert check_offline.problems(tmp_path) == [
        "index.html does not find here.css?v=1",
        "index.html loads //c.example/f.woff",
        "index.html loads https://b.example/x.js",
        "index.html loads https://e.example/i.png",
        "style.css loads https://f.example/s.css",
    ]
    assert check_offline.problems(tmp_path / "nothing") != []
