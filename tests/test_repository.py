"""What the repository promises of itself: pins, rooms, commands, sizes, a start without weight."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 20 * 2**20
HEAVY = ("faiss", "hydra", "matplotlib", "omegaconf", "sam2", "transformers")


def pins(name: str) -> dict[str, str]:
    """Package -> version of a requirements file, with the files that it names."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            found |= pins(text[3:].strip())
        elif text:
            requirement = Requirement(text)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{name}: {text} is not a pin"
            found[requirement.name.lower()] = specifier.version
    return found


def tracked() -> list[Path]:
    """Files of the repository; all but the environment and build outputs where there is no git."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
            encoding="utf-8",
        ).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    skipped = {".venv", "build", "runs", ".git"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not skipped & set(path.relative_to(ROOT).parts)
    ]


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda p: p.name)
def test_every_requirement_is_pinned(path: Path) -> None:
    assert pins(path.name)


def test_the_gpu_set_differs_only_in_the_build_of_faiss() -> None:
    cpu, gpu = pins("requirements.txt"), pins("requirements-gpu.txt")
    assert cpu.pop("faiss-cpu") == gpu.pop("faiss-gpu")
    assert cpu == gpu


def test_the_pins_known_to_keep_the_server_starting_are_kept() -> None:
    runtime = pins("requirements.txt")
    assert runtime["pydicom"].startswith("2."), "pydicom-seg imports a module that pydicom 3 lacks"
    assert runtime["numpy"].startswith("1."), "pydicom-seg declares numpy < 2"
    assert runtime["dicomweb-client"].startswith("0.59."), "newer ones require pydicom 3"
    assert "setuptools" in runtime, "MONAI Label imports distutils"
    assert not {"monailabel", "sam2", "torchvision"} & runtime.keys()


def test_the_installed_packages_are_the_pinned_ones() -> None:
    from importlib.metadata import version

    wanted = pins("requirements-base.txt") | pins("requirements-no-deps.txt")
    wanted |= pins("requirements-dev.txt")
    found = {name: version(name).split("+")[0] for name in wanted}
    assert found == wanted


def test_imports_go_down_only() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_the_environment_is_read_by_settings_alone() -> None:
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lib").rglob("*.py")
        if re.search(r"os\.environ|getenv\(", path.read_text(encoding="utf-8"))
    }
    assert readers <= {"lib/settings.py"}


def test_readme_names_the_commands_that_exist() -> None:
    readme, makefile = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        (ROOT / "Makefile").read_text(),
    )
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", readme))
    assert {"demo", "test", "serve"} <= named <= targets
    assert "monailabel start_server --app apps/refseg --studies" in readme
    assert "python -m monailabel.main start_server --app apps/refseg --studies" in readme
    assert readme.index("make serve STUDIES=") < readme.index("monailabel start_server")


def test_make_serve_starts_the_server_that_protects() -> None:
    """What make would run; --host of other machines is refused there without a token."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    asked = ["STUDIES=my images", "HOST=0.0.0.0", "PORT=8123", "TOKEN_FILE=a token"]
    done = subprocess.run(
        ["make", "--dry-run", "serve", *asked],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()  # make in make tells of folders, too
    command = shlex.split(next(line for line in lines if "main.py" in line))
    start = command.index("serve")
    assert command[start - 1] == "apps/refseg/main.py"
    assert command[start + 1 :] == [
        "--studies", "my images", "--host", "0.0.0.0", "--port", "8123", "--token-file", "a token",
    ]  # fmt: skip


def test_readme_lists_the_options_that_exist() -> None:
    from lib.settings import RefSegSettings

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `([a-z0-9_]+)` \|", readme, flags=re.MULTILINE))
    assert table == set(RefSegSettings.model_fields)


def test_links_in_the_papers_of_the_repository_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_ci_runs_the_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert "make test" in script.read_text(encoding="utf-8")


def test_citation_can_be_read() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"]
    assert citation["authors"]
    assert citation["license"] == "Apache-2.0"


def test_no_file_is_too_large_or_secret() -> None:
    for path in tracked():
        assert path.stat().st_size <= LARGEST, f"{path} has {path.stat().st_size} bytes"
        head = path.read_bytes()[:4096]
        assert b"PRIVATE KEY-----" not in head or path == Path(__file__), path


def test_no_path_of_a_machine_is_in_the_tree() -> None:
    home = re.compile(rb"(?<![\w.])/(?:work|root|home|Users)/\w")
    named = [
        path.relative_to(ROOT).as_posix()
        for path in tracked()
        if path.suffix not in {".png", ".safetensors"} and home.search(path.read_bytes())
    ]
    assert not named


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport sys\nprint(*(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_settings_and_nouns_load_nothing_heavy() -> None:
    assert loaded_after("import lib.settings, lib.types, lib.errors") == set()


def test_the_app_loads_nothing_heavy_before_it_is_needed() -> None:
    # loaded as MONAI Label loads it: a module named main, out of the app's folder
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('main', 'apps/refseg/main.py')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['main'] = module\n"
        "spec.loader.exec_module(module)\n"
    )
    platform = loaded_after("import monailabel.interfaces.app")  # MONAI imports what it finds
    assert loaded_after(code) <= platform
    assert not platform & {"sam2", "hydra", "faiss"}, "then this test would prove nothing"
