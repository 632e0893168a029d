"""Whether the names that a page's code uses of a foreign package are in that package's source, which is not installed.

    python tests/integrations/pages/names.py [FOLDER]

downloads the source of every page's package into a folder and prints a line a page. What is there already is taken as
it is: where GitHub is not reachable, `git archive --prefix=NAME/ -o FOLDER/NAME-COMMIT/sources.tar.gz COMMIT` puts it
there from a checkout. Each test module here says what its page needs:

    PACKAGE = ("skyrl", "0.4.0")                  of PyPI; or ("git+https://github.com/OWNER/NAME", "COMMIT")
    NAMES = [("skyrl/a/file.py", "Class.method", ("self", "batch")), ...]

a file of the package, a qualified name in it, and the names of its leading parameters, or None where it is not called
or taken over. A class attribute counts where the class declares it, or a method of it sets it on `self`; a name that
a module imports counts as its own. Inherited names are listed with the class that has them, so that what moved is
noticed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Name = tuple[str, str, Sequence[str] | None]


def missing(names: Iterable[Name], read: Callable[[str], str | None]) -> list[str]:
    """What of these names does not hold, a sentence each.

    Args:
        read: the text of a file of the package; None where there is no such file.
    """
    found = []
    for file, name, parameters in names:
        text = read(file)
        if text is None:
            found.append(f"{file} is not in the package ({name} was)")
            continue
        places = [ast.parse(text)]
        for part in name.split("."):
            places = [child for place in places for child in _named(place, part)]
        if not places:
            found.append(f"{file} has no {name}")
        elif parameters is not None and not any(_takes(place, parameters) for place in places):
            has = " or ".join(f"({', '.join(_parameters(place))})" for place in places)
            found.append(f"{name} in {file} must begin with parameters ({', '.join(parameters)}), got {has}")
    return found


def unlisted(code: str, names: Iterable[Name]) -> list[str]:
    """What a page's code imports of the package of these names and they do not list."""
    listed = {(file.rpartition("src/")[2], name.split(".")[0]) for file, name, _ in names}
    packages = {file.split("/")[0] for file, _ in listed}
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in packages:
            module = (node.module or "").replace(".", "/")
            for name in (alias.name for alias in node.names):
                files = {f"{module}.py", f"{module}/__init__.py"}
                is_module = any(file in (f"{module}/{name}.py", f"{module}/{name}/__init__.py") for file, _ in listed)
                if not is_module and not any((file, name) in listed for file in files):
                    found.append(f"{node.module}.{name}")
        elif isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names):
                path = name.replace(".", "/")
                if name.split(".")[0] in packages and not {f"{path}.py", f"{path}/__init__.py"} & {
                    f for f, _ in listed
                }:
                    found.append(name)
    return found


def _named(place: ast.AST, name: str) -> list[ast.AST]:
    """The definitions of a name directly in a module or class; conditions and `try` around them do not count."""
    found: list[ast.AST] = []
    todo = list(getattr(place, "body", [])) if isinstance(place, ast.Module | ast.ClassDef) else []
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name:
                found.append(node)
            if isinstance(place, ast.ClassDef) and not isinstance(node, ast.ClassDef):
                found += [inner for inner in ast.walk(node) if _sets(inner, f"self.{name}")]
        elif _sets(node, name) or (isinstance(node, ast.ImportFrom) and name in _imported(node)):
            found.append(node)
        else:
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]
    return found


def _imported(node: ast.ImportFrom) -> list[str]:
    """The names that an import makes."""
    return [alias.asname or alias.name for alias in node.names]


def _sets(node: ast.AST, name: str) -> bool:
    """Whether a statement assigns to, or declares, a name."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else targets
    flat = [leaf for target in targets for leaf in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return any(ast.unparse(leaf) == name for leaf in flat)


def _parameters(place: ast.AST) -> list[str]:
    """Of a function; of a class those of its `__init__`, or its fields where it has none."""
    if isinstance(place, ast.ClassDef):
        made = [inner for inner in place.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
        if not made:
            return [ast.unparse(field.target) for field in place.body if isinstance(field, ast.AnnAssign)]
        place = made[0]
    arguments = getattr(place, "args", None)
    return [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]] if arguments else []


def _takes(place: ast.AST, parameters: Sequence[str]) -> bool:
    callable_ = isinstance(place, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    return callable_ and _parameters(place)[: len(parameters)] == list(parameters)


def in_folder(folder: Path) -> Callable[[str], str | None]:
    """Files below a folder."""

    def read(file: str) -> str | None:
        path = folder / file
        return path.read_text(encoding="utf-8") if path.is_file() else None

    return read


def in_archive(archive: Path) -> Callable[[str], str | None]:
    """Files of a wheel, or of an archive of sources, all of which lie in one folder there.

    Raises OSError for one that is not whole.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                texts = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(".py")}
        else:
            with tarfile.open(archive) as sources:
                members = [member for member in sources if member.isfile() and member.name.endswith(".py")]
                texts = {member.name.partition("/")[2]: sources.extractfile(member).read() for member in members}
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise OSError(f"{archive} is not whole ({error}): delete it") from error

    def read(file: str) -> str | None:
        source = texts.get(file, texts.get(f"src/{file}"))
        return None if source is None else source.decode("utf-8")

    return read


def source_of(package: str, version: str, folder: Path) -> Callable[[str], str | None]:
    """A package's source, downloaded unless it is there. Raises OSError, saying why, where it cannot be had."""
    place = folder / f"{package.rpartition('/')[2]}-{version}"
    place.mkdir(parents=True, exist_ok=True)
    archives = [path for path in place.iterdir() if path.suffix != ".part"]
    if not archives and package.startswith("git+https://github.com/"):
        archives = [_of_github(package.removeprefix("git+https://github.com/"), version, place)]
    elif not archives:
        archives = [_of_pypi(package, version, place)]
    return in_archive(archives[0])


def _of_github(repository: str, commit: str, place: Path) -> Path:
    part, whole = place / "sources.part", place / "sources.tar.gz"
    address = f"https://codeload.github.com/{repository}/tar.gz/{commit}"
    try:
        with urllib.request.urlopen(address, timeout=120) as answer:
            part.write_bytes(answer.read())
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise OSError(f"{address}: {error}") from error
    return part.rename(whole)


def _of_pypi(package: str, version: str, place: Path) -> Path:
    """The wheel, for a Python that it is for; where there is none, the sources."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    wheel = ["--only-binary", ":all:", "--python-version", "3.12"]
    sources = ["--no-binary", ":all:", "--no-build-isolation"]
    said = ""
    for kind in (wheel, sources):
        run = subprocess.run(
            [*pip, *kind, "--dest", str(place), f"{package}=={version}"], capture_output=True, text=True
        )
        archives = [path for path in place.iterdir() if path.suffix in (".whl", ".gz", ".zip")]
        if archives:  # pip may have failed to build what it has downloaded
            return archives[0]
        said += run.stderr[-500:]
    raise OSError(f"pip download {package}=={version}: {said.strip()}")


def pages() -> dict[str, tuple[tuple[str, str], list[Name]]]:
    """By page, what its test module says. It is not imported, so that this needs nothing but Python and pip."""
    found = {}
    for module in sorted(Path(__file__).parent.glob("test_*.py")):
        says: dict[str, Any] = {}
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and "NAMES" not in says:
                try:
                    exec(compile(ast.Module([node], []), str(module), "exec"), says)
                except NameError:  # of what the module imports: another constant
                    continue
        if "NAMES" in says:
            found[module.stem.removeprefix("test_")] = (says["PACKAGE"], says["NAMES"])
    return found


def main(folder: Path) -> int:
    """Print a line a page; 1 where a name does not hold or a source is not reachable, else 0."""
    failed = 0
    for page, ((package, version), names) in pages().items():
        try:
            read = source_of(package, version, folder)
        except OSError as error:
            print(f"{page}: {package} {version} not reachable: {error}")
            failed = 1
            continue
        wrong = missing(names, read)
        print(f"{page}: {package} {version}: {len(names) - len(wrong)} of {len(names)} names held")
        for sentence in wrong:
            print(f"  {sentence}")
        failed |= bool(wrong)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-sources/sources")))
