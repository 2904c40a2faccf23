"""Wherever the plugin lies, and from wherever it is named, it is the same plugin."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata

import pytest
import support
from packaging.requirements import Requirement
from support import distil, kd_arguments, script

SHORT = ("--max-update", 3, "--disable-validation")


@pytest.fixture(scope="module")
def expected(distilled):
    return distilled.run.series("train_inner", "loss")[:3]


def with_user_dir(user_dir, *arguments):
    arguments = list(arguments)
    arguments[arguments.index("--user-dir") + 1] = user_dir
    return arguments


def test_user_dir_from_another_working_directory(data, teacher, expected, tmp_path):
    """Relative to it, absolute, and with a slash at its end."""
    where = tmp_path / "elsewhere"
    where.mkdir()
    relative = os.path.relpath(str(support.PLUGIN), str(where))
    for i, user_dir in enumerate((relative, str(support.PLUGIN))):
        arguments = kd_arguments(data, teacher, tmp_path / str(i), *SHORT)
        run = support.fairseq("fairseq-train", *with_user_dir(user_dir, *arguments), cwd=where)
        assert run.ok().series("train_inner", "loss") == expected, user_dir


def test_user_dir_from_the_checkout(data, teacher, expected, tmp_path):
    """As in the README: `--user-dir kd_plugin`, teacher and student by relative paths too."""
    shutil.copy(str(teacher), str(tmp_path / "teacher.pt"))
    root = support.CHECKOUT
    arguments = kd_arguments(
        data, os.path.relpath(str(tmp_path / "teacher.pt"), str(root)), tmp_path / "student", *SHORT
    )
    run = support.fairseq("fairseq-train", *with_user_dir("kd_plugin", *arguments), cwd=root)
    assert run.ok().series("train_inner", "loss") == expected


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("kd_plugin", "tests", "recipes"):
        shutil.copytree(
            str(support.CHECKOUT / name),
            str(source / name),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for file in support.CHECKOUT.iterdir():
        if file.is_file():
            shutil.copy(str(file), str(source / file.name))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source]
    if can_build():
        command.insert(4, "--no-build-isolation")
    subprocess.run([str(c) for c in command], check=True, timeout=300, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("*.whl")
    return built


def can_build():
    """Whether this environment has what pyproject.toml asks for; else pip has to fetch it."""
    import setuptools

    try:
        import wheel  # noqa: F401
    except ImportError:
        return False
    return int(setuptools.__version__.split(".")[0]) >= 61


def test_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(str(wheel)) as archive:
        names = archive.namelist()
    package = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    ours = {
        str(p.relative_to(support.CHECKOUT))
        for p in support.PLUGIN.rglob("*.py")
        if "__pycache__" not in p.parts
    }
    assert package == ours


def test_dependencies_have_ranges_and_are_what_the_tests_run_with(wheel):
    with zipfile.ZipFile(str(wheel)) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(archive.read(name).decode())
    requirements = [Requirement(text) for text in about.get_all("Requires-Dist")]
    assert len(requirements) > 10
    extras = ("", "fairseq", "recipes", "test")
    for requirement in requirements:
        bounds = {one.operator for one in requirement.specifier}
        assert bounds == {">=", "<"} or bounds == {"=="}, requirement
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": e}) for e in extras
        ):
            here = metadata.version(requirement.name)
            assert requirement.specifier.contains(here, prereleases=True), (requirement, here)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder of installed packages, far from the checkout."""
    target = tmp_path_factory.mktemp("site-packages")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--target", str(target), str(wheel)),
        ],
        check=True,
        timeout=300,
    )
    return target


def test_installed_package(installed, data, teacher, expected, tmp_path):
    """Found by its name, as the README tells users to, and used from there."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    where = subprocess.run(
        [sys.executable, "-c", "import kd_plugin; print(kd_plugin.__path__[0])"],
        cwd=str(tmp_path),
        env=env,
        stdout=subprocess.PIPE,
        universal_newlines=True,
        check=True,
        timeout=120,
    ).stdout.splitlines()[-1]
    assert where == str(installed / "kd_plugin")
    arguments = with_user_dir(where, *kd_arguments(data, teacher, tmp_path / "student", *SHORT))
    run = script("fairseq-train", *arguments, cwd=tmp_path, env={"PYTHONPATH": str(installed)}).ok()
    assert run.series("train_inner", "loss") == expected


def test_installed_elsewhere_and_named_by_path(installed, data, teacher, expected, tmp_path):
    """On no module path at all: the folder's path is enough."""
    arguments = kd_arguments(data, teacher, tmp_path, *SHORT)
    run = support.fairseq(
        "fairseq-train", *with_user_dir(installed / "kd_plugin", *arguments), cwd=tmp_path
    ).ok()
    assert run.series("train_inner", "loss") == expected


def test_linked_user_dir(data, teacher, expected, tmp_path):
    """Clusters keep code behind symbolic links."""
    (tmp_path / "link").mkdir()
    link = tmp_path / "link" / "kd_plugin"
    link.symlink_to(support.PLUGIN, target_is_directory=True)
    run = distil(data, teacher, tmp_path / "student", *SHORT, "--user-dir", link).ok()
    assert run.series("train_inner", "loss") == expected
