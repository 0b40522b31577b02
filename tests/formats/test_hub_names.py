"""Names of models on the Hugging Face Hub, given where a path is expected."""

from collections.abc import Callable
from pathlib import Path

import pytest

import nplora
from nplora import adapters, cli, finetuning
from nplora.formats.model_directory import require_no_hub_name

NAME = "HuggingFaceTB/SmolLM2-135M"
DOWNLOAD = (
    f"hf download {NAME} --local-dir SmolLM2-135M (pip install huggingface_hub), then give SmolLM2-135M"
)


@pytest.mark.parametrize(
    "given", [NAME, f"{NAME}/", f"https://huggingface.co/{NAME}", f"hf.co/{NAME}:Q4_K_M", f"hf://{NAME}"]
)
def test_a_name_on_the_hub_is_refused_with_the_command_that_downloads_it(given: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        require_no_hub_name(given)
    assert DOWNLOAD in str(caught.value)
    assert caught.value.filename == given


def test_one_file_of_a_hub_model_in_gguf_is_downloaded() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"hf download a/B-GGUF FILE\.gguf .*then give B-GGUF/FILE\.gguf"
    ):
        require_no_hub_name("a/B-GGUF")


@pytest.mark.parametrize(
    "path", ["model", "/a/b", "./a/b", "../a", "a/b/c", "models/m.gguf", "m/model.safetensors", ""]
)
def test_other_paths_are_taken_as_paths(path: str) -> None:
    require_no_hub_name(path)


def test_a_path_that_exists_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    require_no_hub_name(NAME)


@pytest.mark.parametrize(
    "call",
    [
        lambda: nplora.load_model(NAME),
        lambda: finetuning.load_with_adapter(NAME),
        lambda: nplora.evaluate(NAME, "data.jsonl"),
        lambda: nplora.plan(NAME, "data.jsonl"),
        lambda: nplora.finetune(NAME, "data.jsonl", "out"),
        lambda: nplora.model_to_gguf(NAME, "m.gguf"),
        lambda: nplora.merge_adapter(NAME, "a", "m.gguf"),
        lambda: nplora.adapter_to_gguf("a", "a.gguf", NAME),
        lambda: adapters.combine([("a", 1.0)], base=NAME),
    ],
)
def test_python_recognises_such_a_name_wherever_it_takes_a_model(
    call: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(FileNotFoundError, match=r"hf download HuggingFaceTB/SmolLM2-135M "):
        call()


@pytest.mark.parametrize(
    "line",
    [
        "finetune @ --data d --output o", "plan @ --data d", "eval @ --data d", "generate @ x", "info @",
        "convert @ m.gguf", "convert a a.gguf --base @", "merge @ a --output m.gguf",
        "combine a --output o --base @",
    ],
)  # fmt: skip
def test_commands_recognise_such_a_name_wherever_they_take_a_model(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("d"), Path("a")):
        path.mkdir()
    Path("d/train.jsonl").write_text('{"text": "a"}\n')
    Path("a/adapter_config.json").write_text("{}")
    assert cli.main(line.replace("@", NAME).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nplora: error: {NAME}: no such file or directory; ")
    assert DOWNLOAD in error
