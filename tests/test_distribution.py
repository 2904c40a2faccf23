"""What leaves the checkout: the source distribution, and what recipes/Dockerfile copies."""

import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest
from support import CHECKOUT

pytest.importorskip("setuptools")
DOCKERFILE = CHECKOUT / "recipes" / "Dockerfile"


def tracked():
    if shutil.which("git") is None:
        pytest.skip("no git")
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, stdout=subprocess.PIPE)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    return listed.stdout.decode().splitlines()


def setup(folder, *arguments):
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=folder, check=True)


def copy(name, folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(CHECKOUT / name), str(folder / name))


def test_the_source_distribution_is_the_checkout(tmp_path):
    names = tracked()
    for name in names:
        if (CHECKOUT / name).is_file():
            copy(name, tmp_path / "checkout")
    setup(tmp_path / "checkout", "sdist", "-d", str(tmp_path / "dist"))
    (path,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(str(path)) as archive:
        packed = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    assert set(names) - packed == {".gitignore"}
    assert {n for n in packed - set(names) if "egg-info" not in n} == {"PKG-INFO", "setup.cfg"}


def copies():
    for line in DOCKERFILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY "):
            yield from shlex.split(line)[1:-1]


def test_the_image_gets_what_an_installation_needs(tmp_path):
    for name in tracked():
        if name.split("/")[0] in copies():
            copy(name, tmp_path)
    setup(tmp_path, "build", "--build-lib", "built", "egg_info")
    modules = {str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "kd_plugin").rglob("*.py")}
    assert {
        str(p.relative_to(tmp_path / "built")) for p in tmp_path.glob("built/**/*.py")
    } == modules
    assert "fairseq-kd-report" in next(tmp_path.glob("*.egg-info/entry_points.txt")).read_text()


def test_the_image_is_sent_what_it_copies():
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8")
    sent = {line[1:] for line in ignored.splitlines() if line.startswith("!")}
    assert sent == set(copies())
