"""The checker of names is right: on sources of our own, in every form in which a package comes."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile

import pytest

from . import names
from .page import PAGES, page_code

FILE = """
from elsewhere import Handed as Taken

if True:
    from other import sometimes

LEVEL, KEPT = 1, 2
declared: int = 3

try:
    def tried(first, /, second, *, third): ...
except ImportError:
    tried = None

class Worker(Base):
    field: str
    other = 1

    def __init__(self, cfg, *args):
        self.cfg, self.model = cfg, None

    @property
    def size(self): ...

    async def run(self, data, loss=None): ...

    class Inner:
        def deep(self, x): ...

class Record:
    tokens: list
    mask: list = None

def outer(a):
    hidden = 1
    def inner(b): ...
"""
HELD = [
    ("pack/file.py", "Taken", None),
    ("pack/file.py", "sometimes", None),
    ("pack/file.py", "LEVEL", None),
    ("pack/file.py", "KEPT", None),
    ("pack/file.py", "declared", None),
    ("pack/file.py", "tried", ("first", "second", "third")),
    ("pack/file.py", "Worker", ("self", "cfg")),
    ("pack/file.py", "Worker.field", None),
    ("pack/file.py", "Worker.other", None),
    ("pack/file.py", "Worker.cfg", None),
    ("pack/file.py", "Worker.model", None),
    ("pack/file.py", "Worker.size", None),
    ("pack/file.py", "Worker.run", ("self", "data")),
    ("pack/file.py", "Worker.Inner.deep", ("self", "x")),
    ("pack/file.py", "Record", ("tokens", "mask")),
    ("pack/file.py", "outer", ("a",)),
]


def read(file):
    return FILE if file == "pack/file.py" else None


def test_what_is_there_holds():
    assert names.missing(HELD, read) == []


@pytest.mark.parametrize("name", ["Handed", "Worker.missing", "Worker.Inner.cfg", "hidden", "inner", "Base", "run"])
def test_a_name_that_is_missing_is_found(name):
    assert names.missing([("pack/file.py", name, None)], read) == [f"pack/file.py has no {name}"]


@pytest.mark.parametrize(
    ("name", "parameters", "got"),
    [
        ("Worker.run", ("self", "batch"), "(self, data, loss)"),  # renamed
        ("Worker.run", ("self", "data", "loss", "more"), "(self, data, loss)"),  # one left
        ("outer", ("b", "a"), "(a)"),  # one came before
        ("Worker", ("self", "config"), "(self, cfg)"),
        ("LEVEL", ("a",), "()"),  # a function became a value
    ],
)
def test_a_parameter_that_changed_is_found(name, parameters, got):
    (said,) = names.missing([("pack/file.py", name, parameters)], read)
    assert said.endswith(f"must begin with parameters ({', '.join(parameters)}), got {got}")


def test_a_file_that_moved_is_found():
    assert names.missing([("pack/old.py", "Worker", None)], read) == ["pack/old.py is not in the package (Worker was)"]


def archive_of(kind, path, inside):
    if kind == "wheel":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{inside}pack/file.py", FILE)
        return
    with tarfile.open(path, "w:gz") as sources:
        member = tarfile.TarInfo(f"pack-1.0/{inside}pack/file.py")
        member.size = len(FILE)
        sources.addfile(member, io.BytesIO(FILE.encode()))


@pytest.mark.parametrize(("kind", "inside"), [("wheel", ""), ("sources", ""), ("sources", "src/")])
def test_every_form_of_a_package_is_read(tmp_path, kind, inside):
    archive = tmp_path / "pack"
    archive_of(kind, archive, inside)
    assert names.missing(HELD, names.in_archive(archive)) == []
    assert names.missing([("pack/old.py", "Worker", None)], names.in_archive(archive))


def one_page(monkeypatch, package, wanted):
    monkeypatch.setattr(names, "pages", lambda: {"pack": (package, wanted)})


def test_the_row_says_how_many_names_held_and_fails_where_one_does_not(tmp_path, monkeypatch, capsys):
    (tmp_path / "pack-1.0").mkdir()
    archive_of("wheel", tmp_path / "pack-1.0" / "pack.whl", "")
    one_page(monkeypatch, ("pack", "1.0"), HELD)
    assert names.main(tmp_path) == 0
    assert capsys.readouterr().out == f"pack: pack 1.0: {len(HELD)} of {len(HELD)} names held\n"
    one_page(monkeypatch, ("pack", "1.0"), [*HELD, ("pack/file.py", "gone", None)])
    assert names.main(tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"pack: pack 1.0: {len(HELD)} of {len(HELD) + 1} names held",
        "  pack/file.py has no gone",
    ]


@pytest.mark.parametrize("package", ["pack", "git+https://github.com/nobody/pack"])
def test_what_cannot_be_reached_fails_and_says_so(tmp_path, monkeypatch, capsys, package):
    refuse = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for pack==1.0")
    monkeypatch.setattr(names.subprocess, "run", lambda *args, **kwargs: refuse)
    monkeypatch.setattr(names.urllib.request, "urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(TimeoutError()))
    one_page(monkeypatch, (package, "1.0"), HELD)
    assert names.main(tmp_path) == 1
    assert f"pack: {package} 1.0 not reachable: " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["wheel", "sources"])
def test_an_archive_that_is_not_whole_fails_and_says_so(tmp_path, monkeypatch, capsys, kind):
    archive = tmp_path / "pack-1.0" / "pack.tar.gz"
    archive.parent.mkdir()
    archive_of(kind, archive, "")
    whole = archive.read_bytes()
    one_page(monkeypatch, ("pack", "1.0"), HELD)
    for part in (whole[: len(whole) // 2], whole[:40], b""):
        archive.write_bytes(part)
        assert names.main(tmp_path) == 1
        said = capsys.readouterr().out
        assert "pack: pack 1.0 not reachable: " in said
        assert f"{archive} is not whole" in said


def test_what_code_imports_and_nobody_listed_is_found():
    code = "import pack.new, torch\nfrom pack.file import Worker, gone\nfrom pack import file\nfrom pack import left\n"
    assert names.unlisted(code, HELD) == ["pack.new", "pack.file.gone", "pack.left"]
    assert names.unlisted(code, [("some/src/pack/file.py", "Worker", None)])[0] == "pack.new"


@pytest.mark.parametrize("page", sorted(names.pages()))
def test_pages_list_what_their_code_imports(page):
    code = page_code(f"{page}.md")
    assert code, f"{PAGES / page}.md has no code"
    assert names.unlisted("\n".join(code), names.pages()[page][1]) == []


def test_what_pages_need_is_read_without_importing_their_tests(tmp_path, monkeypatch):
    (tmp_path / "test_one.py").write_text(
        "import nowhere\n_AT = 'pack/file.py'\nMODEL = nowhere.build()\nPACKAGE = ('pack', '1.0')\n"
        "NAMES = [(_AT, 'outer', ('a',))]\nraise RuntimeError\n"
    )
    (tmp_path / "test_other.py").write_text("PACKAGE = ('pack', '1.0')\n")
    monkeypatch.setattr(names, "__file__", str(tmp_path / "names.py"))
    assert names.pages() == {"one": (("pack", "1.0"), [("pack/file.py", "outer", ("a",))])}
