"""examples/make_corpus.py: a corpus that parquet() reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from raypipe.data import Cursor, parquet


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_corpus(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = script.make_corpus(tmp_path / "corpus", block=64, limit_mb=2)
    assert capsys.readouterr().out.startswith("wrote ")
    sources = [parquet(folder / part, ["tokens", "targets"], 256, shuffle=False) for part in ("train", "valid")]
    assert 0 < sources[1].rows < sources[0].rows / 10
    assert len(list((folder / "train").iterdir())) > 1
    text = script.read_parts(2 << 20)["train"]
    offset = 0
    for batch, _ in sources[0].epoch(Cursor()):
        assert batch["tokens"].dtype == torch.uint8
        assert torch.equal(batch["tokens"].flatten()[1:], batch["targets"].flatten()[:-1])
        assert bytes(batch["targets"].flatten().tolist()) == text[offset + 1 : offset + 1 + batch["targets"].numel()]
        offset += batch["tokens"].numel()
    assert offset == sources[0].rows * 64

    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    script.make_corpus(folder, block=64, limit_mb=2)
    assert "is there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == written
    script.make_corpus(folder, block=32, limit_mb=1)
    ((batch, _), *_) = parquet(folder / "train", ["tokens"], 4).epoch(Cursor())
    assert batch["tokens"].shape == (4, 32)
    assert list(tmp_path.iterdir()) == [folder]


def test_what_it_refuses(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block is 0"):
        script.make_corpus(tmp_path / "corpus", block=0)
    with pytest.raises(ValueError, match="less than one row"):
        script.make_corpus(tmp_path / "corpus", block=128, limit_mb=0.001)
    (tmp_path / "thesis.txt").write_text("do not delete")
    with pytest.raises(ValueError, match="holds something that is no corpus"):
        script.make_corpus(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
