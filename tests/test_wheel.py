"""What is installed is what is here: a wheel, unpacked elsewhere, does the jobs of both commands
without this checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="needs setuptools to build"
)

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--backbone",
    "test_efficientnet",
    "--weights",
    "random",
    "--engine",
    "torch",
    "--precision",
    "float32",
)

# Commands in one process, since the imports cost most; then the files that modules of ours came
# from.
SCRIPT = """
import json, sys
from finetune.cli import main as finetune
from retrieval.cli import main as retrieve
codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = list(words)
    try:
        {"finetune": finetune, "retrieve": retrieve}[words[0]]()
    except SystemExit as end:
        codes.append(end.code)
loaded = list(sys.modules.items())
ours = [module for name, module in loaded if name.split(".")[0] in ("finetune", "retrieval")]
files = [module.__file__ or module.__path__[0] for module in ours]
print(json.dumps({"codes": codes, "files": files}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building leaves files beside the sources."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    for name in ("finetune", "retrieval", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = (
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
        "--wheel-dir",
        str(base),
    )
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return next(base.glob("regraft-*.whl"))


def test_a_wheel_holds_every_module_page_and_recipe(wheel: Path) -> None:
    """Sources, templates, styles, scripts, recipes and the licence are inside; tests and benchmarks
    are not."""
    with zipfile.ZipFile(wheel) as opened:
        inside = {name for name in opened.namelist() if ".dist-info/" not in name}
        about = {name.rpartition("/")[2] for name in opened.namelist() if ".dist-info/" in name}
    kinds = (".py", ".html", ".css", ".js", ".yaml")
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in (
            ("finetune", "finetune"),
            ("retrieval", "retrieval"),
            ("recipes", "finetune/recipes"),
        )
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    }

    assert expected == inside
    assert {
        "finetune/report/report.html",
        "retrieval/web/page.html",
        "retrieval/web/page.css",
        "retrieval/web/page.js",
    } <= inside
    assert {"LICENSE", "entry_points.txt", "METADATA"} <= about


def test_the_wheel_alone_does_the_jobs_of_both_commands(
    wheel: Path, shapes: Path, tmp_path: Path
) -> None:
    """Help, recipes, backbones, fit, predict, and a gallery, from a folder without this checkout on
    the path."""
    target, work, photos = tmp_path / "target", tmp_path / "work", tmp_path / "photos"
    work.mkdir()
    with zipfile.ZipFile(wheel) as opened:  # a wheel of pure Python is installed by unpacking it
        opened.extractall(target)
    for kind in ("circle", "square"):
        (photos / kind).mkdir(parents=True)
        for path in sorted((shapes / kind).iterdir())[:10]:
            shutil.copy(path, photos / kind)
    picture = str(photos / "circle" / "00.png")
    commands = [
        ("finetune", "--help"),
        ("finetune", "recipes", "ls"),
        ("finetune", "backbones"),
        ("finetune", "fit", str(photos), "--out", "run", *TINY),
        ("finetune", "predict", "run", picture),
        ("retrieve", "build", str(photos), "--out", "index", "--run", "run"),
        ("retrieve", "query", "index", picture, "--html", "answer.html"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(
        words, cwd=work, env=environment, capture_output=True, text=True, check=False
    )

    assert 0 == done.returncode, done.stderr
    *printed, last = done.stdout.splitlines()
    told = json.loads(last)
    assert [0] * len(commands) == told["codes"], done.stdout + done.stderr
    assert [] == [file for file in told["files"] if not Path(file).is_relative_to(target)]
    assert len(told["files"]) > 30
    assert any("smoke-digits" in line for line in printed)
    assert (work / "run" / "report.html").stat().st_size > 10_000
    assert "data:image" in (work / "answer.html").read_text(encoding="utf-8")


def test_metadata_names_both_commands_and_every_dependency(wheel: Path) -> None:
    """`pip install` makes `finetune` and `retrieve`, and brings what is imported."""
    with zipfile.ZipFile(wheel) as opened:
        read = {
            name.rpartition("/")[2]: opened.read(name).decode()
            for name in opened.namelist()
            if ".dist-info/" in name
        }

    assert "finetune = finetune.cli:main" in read["entry_points.txt"]
    assert "retrieve = retrieval.cli:main" in read["entry_points.txt"]
    for package in (
        "timm",
        "torch",
        "faiss-cpu",
        "scikit-learn",
        "click",
        "pydantic",
        "openvino",
        "safetensors",
    ):
        assert f"Requires-Dist: {package}" in read["METADATA"]
