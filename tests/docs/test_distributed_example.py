"""The programs of distributed.md, on one rank and without MPI."""

import contextlib
import json
from pathlib import Path

import pytest

import nplora
from pages import ROOT, blocks_of
from small_encoder import save_small_encoder


@pytest.mark.parametrize("trains", ["trainer.fit", "nplora.embedding.train"])
def test_the_programs_of_ranks_save_an_adapter(
    trains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [b for b in blocks_of(ROOT / "docs" / "distributed.md") if "MPICommunicator" in b.text]
    (block,) = (b for b in blocks if trains in b.text)
    assert len(blocks) == 2
    if trains == "nplora.embedding.train":
        pytest.importorskip("tokenizers")
        save_small_encoder(tmp_path / "encoder-model")
        pair = json.dumps({"anchor": "a cat", "positive": "the cat"})
        (tmp_path / "pairs.jsonl").write_text(f"{pair}\n{pair}\n")
    alone = contextlib.nullcontext(nplora.distributed.Alone())
    monkeypatch.setattr(nplora.distributed, "MPICommunicator", lambda: alone)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.where, "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
