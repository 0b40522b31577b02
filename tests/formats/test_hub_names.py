"""Names of models on the Hugging Face Hub, given where a path is expected."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nplora
from nplora import adapters, cli, finetuning
from nplora.finetuning.data import find_evaluated, find_splits
from nplora.formats.model_directory import require_no_hub_name
from small_llama import save_small_llama

NAME = "HuggingFaceTB/SmolLM2-135M"
DOWNLOAD = (
    f"hf download {NAME} --local-dir SmolLM2-135M (pip install huggingface_hub), "
    "then use the path SmolLM2-135M"
)


@pytest.mark.parametrize(
    "given", [NAME, f"{NAME}/", f"https://huggingface.co/{NAME}", f"hf.co/{NAME}:Q4_K_M", f"hf://{NAME}"]
)
def test_a_name_on_the_hub_is_refused_with_the_command_that_downloads_it(given: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        require_no_hub_name(given)
    assert DOWNLOAD in str(caught.value)
    assert caught.value.filename == given


@pytest.mark.parametrize(
    ("address", "command", "then"),
    [
        (f"https://huggingface.co/{NAME}/tree/main", f"{NAME} --local-dir SmolLM2-135M", "SmolLM2-135M"),
        ("https://huggingface.co/a/b/tree/v1.0/sub", "a/b --revision v1.0 --local-dir b", "b/sub"),
        ("https://huggingface.co/a/b/blob/main/config.json", "a/b --local-dir b", "b"),
        ("https://huggingface.co/a/b/resolve/main/x.gguf", "a/b x.gguf --local-dir b", "b/x.gguf"),
        ("hf.co/a/b/blob/main/q/x.gguf?download=true", "a/b q/x.gguf --local-dir b", "b/q/x.gguf"),
        ("https://huggingface.co/a/b/resolve/d/x.gguf", "a/b x.gguf --revision d --local-dir b", "b/x.gguf"),
    ],
)
def test_the_address_of_a_page_on_the_hub_is_recognised(address: str, command: str, then: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        require_no_hub_name(address)
    assert str(caught.value.strerror).endswith(
        f"hf download {command} (pip install huggingface_hub), then use the path {then}"
    )


def test_one_file_of_a_hub_model_in_gguf_is_downloaded() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"hf download a/B-GGUF FILE\.gguf .*then use the path B-GGUF/FILE\.gguf"
    ):
        require_no_hub_name("a/B-GGUF")


@pytest.mark.parametrize("given", ["SmolLM2-135M-Instruct", "Qwen2.5-0.5B", "gemma-3-1b-it"])
def test_the_name_of_a_model_without_its_owner_is_recognised(given: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"hf download OWNER/{given} --local-dir {given} "):
        require_no_hub_name(given)


def test_the_name_of_a_data_set_on_the_hub_is_recognised() -> None:
    name = "HuggingFaceH4/ultrachat_200k"
    words = f"a data set on .* hf download --repo-type dataset {name} .* the path of a file in ultrachat_200k"
    for find in (find_splits, find_evaluated):
        with pytest.raises(FileNotFoundError, match=words):
            find(name)
        with pytest.raises(FileNotFoundError, match=r"No such file|WinError"):
            find("data/train.parquet")


@pytest.mark.parametrize(
    "path",
    [
        "model-1", "b-2b.gguf", "my-v2b", "model", "/a/b", "./a/b", "../a", "a/b/c", "models/m.gguf",
        "m/model.safetensors", "", "data/a.jsonl", "data/a.csv", "data/a.txt", "out/model.bin",
        "a/tree/main", "a/b/tree/main", "datasets/squad", "https://huggingface.co/datasets/squad",
        "https://example.com/a/b",
    ],
)  # fmt: skip
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
    Path("data.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
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
    Path("d/train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    Path("a/adapter_config.json").write_text("{}", encoding="utf-8")
    assert cli.main(line.replace("@", NAME).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nplora: error: {NAME}: no such file or directory; ")
    assert DOWNLOAD in error


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


ADAPTER = "owner/my-lora"
DOWNLOAD_ADAPTER = (
    f"if it is an adapter on the Hugging Face Hub, download it with hf download {ADAPTER} --local-dir my-lora"
)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: nplora.read_adapter(ADAPTER),
        lambda model: nplora.load_adapter(nplora.Sequential(nplora.LoRALinear(np.eye(2), rank=1)), ADAPTER),
        lambda model: adapters.combine([(ADAPTER, 0.5)]),
        lambda model: finetuning.load_with_adapter(model, ADAPTER),
        lambda model: nplora.load_model(model).load_adapter(ADAPTER, "first"),
        lambda model: nplora.load_model(model).load_adapter(ADAPTER, "my-lora"),
        lambda model: nplora.adapter_from_gguf(ADAPTER, "out"),
        lambda model: nplora.adapter_to_gguf(ADAPTER, "a.gguf", model),
        lambda model: nplora.merge_adapter(model, ADAPTER, "m.gguf"),
    ],
)
def test_python_recognises_the_name_of_an_adapter(
    call: Callable[[Path], object], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-lora").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(DOWNLOAD_ADAPTER)):
        call(small)


@pytest.mark.parametrize(
    "line",
    [
        "finetune M --data d --output o --adapter @", "plan M --data d --adapter @",
        "eval M --data d --adapter @", "generate M x --adapter @:0.5", "merge M @ --output m.gguf",
        "combine @ --output o", "chat M --adapter @", "chat M --adapter my-lora=@",
        "generate M x --adapter https://huggingface.co/@", "eval M --data d --adapter hf.co/@/tree/main",
    ],
)  # fmt: skip
def test_commands_recognise_the_name_of_an_adapter(
    line: str,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("d"), Path("my-lora")):
        path.mkdir()
    Path("d/train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    words = [str(small) if word == "M" else word.replace("@", ADAPTER) for word in line.split()]
    assert cli.main(words) == 2
    assert DOWNLOAD_ADAPTER in capsys.readouterr().err
