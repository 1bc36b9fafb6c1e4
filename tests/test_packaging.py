"""Package metadata: one list of dependencies, and the versions of files that repeat it."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from realcustom.assets import EXAMPLE_IMAGES, MINI_MODEL

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def flat(requirements: list[str]) -> dict[str, Requirement]:
    """Name -> requirement, with the project's own extras replaced by what they contain."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                found |= flat(PROJECT["optional-dependencies"][extra])
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def listed(file: str) -> dict[str, Requirement]:
    """Name -> requirement of a requirements file, with the files it includes."""
    found: dict[str, Requirement] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("-r "):
            found |= listed(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            found[canonicalize_name(requirement.name)] = requirement
    return found


RUNTIME = flat([*PROJECT["dependencies"], f"{PROJECT['name']}[serve,demo,train]"])
DEV = flat([*PROJECT["dependencies"], f"{PROJECT['name']}[dev]"])


@pytest.mark.parametrize(("file", "expected"), [("requirements.txt", RUNTIME), ("requirements-dev.txt", DEV)])
def test_requirements_files_repeat_pyproject(file, expected):
    """pyproject.toml is the source; the files exist for Hugging Face Spaces and for `pip install -r`."""
    assert listed(file) == expected


def test_extra_dev_contains_all_others():
    extras = PROJECT["optional-dependencies"]
    for name in extras:
        assert flat(extras[name]).items() <= DEV.items()


def test_constraints_satisfy_the_requirements():
    """The tested versions lie within the declared ranges, and no runtime dependency lacks a tested version."""
    tested = listed("constraints.txt")
    assert set(RUNTIME) <= set(tested)
    for name, requirement in DEV.items():
        if name in tested:
            (pin,) = tested[name].specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version), (name, str(requirement))


def test_readme_names_the_tested_gradio():
    """Hugging Face Spaces takes Gradio's version from README's front matter."""
    (version,) = re.findall(r"^sdk_version: (\S+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    (pin,) = listed("constraints.txt")["gradio"].specifier
    assert pin.version == version


@pytest.mark.parametrize("file", ["CHANGELOG.md", "CITATION.cff"])
def test_files_state_the_current_version(file):
    assert PROJECT["version"] in (ROOT / file).read_text()


def test_pre_commit_uses_the_tested_versions():
    tested = listed("constraints.txt")
    hooks = re.findall(r"repo: \S+/(\S+)\n\s+rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {repository.removesuffix("-pre-commit") for repository, _ in hooks} == {"ruff", "codespell"}
    for repository, version in hooks:
        (pin,) = tested[repository.removesuffix("-pre-commit")].specifier
        assert pin.version == version


def test_shipped_files_are_found_in_a_checkout():
    assert (MINI_MODEL / "model_index.json").is_file() and (EXAMPLE_IMAGES / "dog.png").is_file()
