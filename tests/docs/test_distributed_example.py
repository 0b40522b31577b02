"""The program of distributed.md for a network of your own, on one rank and without MPI."""

import contextlib
from pathlib import Path

import pytest

import nplora
from pages import ROOT, blocks_of


def test_the_program_for_a_network_of_your_own_saves_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (b for b in blocks_of(ROOT / "docs" / "distributed.md") if "MPICommunicator" in b.text)
    alone = contextlib.nullcontext(nplora.distributed.Alone())
    monkeypatch.setattr(nplora.distributed, "MPICommunicator", lambda: alone)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.where, "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
