"""The shape of the house, held by tests: who imports whom, and what installs."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("orchestrator", "workers", "kernels", "artifacts", "cluster")
MAY_IMPORT = {
    "kernels": set(),
    "artifacts": {"kernels"},
    "workers": {"artifacts", "kernels"},
    "cluster": {"artifacts"},
    "orchestrator": set(FOLDERS) - {"kernels"},
}
# The only files of artifacts/ that know the kernels: those of loaded models.
KNOW_KERNELS = {"elastic.py", "loading.py", "precision.py", "warming.py"}
# What all may import, wherever it lies: it imports next to nothing itself.
FOR_ALL = "mbq.kernels.widths"


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        names = {name for name in _imports(path) if not f"{name}.".startswith(f"{FOR_ALL}.")}
        ours = {name.split(".")[1] for name in names if name.startswith("mbq.")}
        allowed = MAY_IMPORT[folder] | {folder}
        if folder == "artifacts" and path.name not in KNOW_KERNELS:
            allowed = {folder}
        assert ours <= allowed, f"{folder}/{path.name} imports {sorted(ours - allowed)}"


def test_what_all_may_import_imports_next_to_nothing() -> None:
    path = ROOT.joinpath(*FOR_ALL.split(".")[1:]).with_suffix(".py")
    assert _imports(path) == {"itertools.pairwise"}


def test_ray_only_in_cluster() -> None:
    for path in ROOT.glob("*/*.py"):
        if path.parent.name in FOLDERS and path.parent.name != "cluster":
            roots = {name.split(".")[0] for name in _imports(path)}
            assert "ray" not in roots, f"{path} imports ray"


def test_boto3_only_in_the_client_of_s3() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            roots = {name.split(".")[0] for name in _imports(path)}
            assert not {"boto3", "botocore"} & roots or path.name == "s3_client.py", (
                f"{path} knows boto3"
            )


def test_every_module_begins_with_a_header() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_roots_are_no_packages() -> None:
    # A regular package `kernels` on the path would shadow Hugging Face's.
    assert not [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()]


def test_a_run_is_submitted_without_torch() -> None:
    """It takes seconds to import, and the machine that submits may have none."""
    script = (
        "import sys, mbq.orchestrator.submit, mbq.orchestrator.status\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'boto3'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Setuptools would put modules that are gone in the wheel.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        f"mbq/{folder}/{path.name}"
        for folder in FOLDERS
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".html", ".json") or path.name == "py.typed"
    }
    assert names == expected


def test_installed_beside_hugging_face_kernels_both_work(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # Hugging Face's package as it lies in site-packages: a regular package named `kernels`.
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("WHOSE = 'hugging face'\n")
    script = "import kernels, mbq.kernels.quantize as q; print(kernels.WHOSE, q.__file__)"
    # Started in the checkout, whose folder `kernels` comes first on the path.
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(site)!r}); {script}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("hugging face ")
