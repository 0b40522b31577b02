"""`nplora embed`."""

from pathlib import Path

import numpy as np
import pytest

import nplora
from nplora.cli.entry import main
from small_encoder import save_small_encoder

pytest.importorskip("tokenizers")


def test_the_command_embeds_with_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = nplora.load_encoder(save_small_encoder(tmp_path / "model"))
    encoder.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(encoder, "adapter")
    Path("texts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    words = ["embed", "model", "texts.txt", "--output", "v.npy", "--adapter", "adapter", "--no-normalize"]
    assert main(words) == 0
    assert "v.npy: 2 embeddings of 32 values" in capsys.readouterr().out
    wanted = encoder.embed(["a cat", "a dog"], normalize=False)
    np.testing.assert_allclose(np.load("v.npy"), wanted, rtol=0, atol=1e-5)
