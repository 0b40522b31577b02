"""Directories for Ollama: the model, and a Modelfile as Ollama's parser reads it."""

import errno
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest

import nplora
import systems
from nplora import adapters, cli
from nplora.adapters import OllamaExport, export_ollama
from nplora.formats import files
from nplora.formats.errors import FormatError, TruncatedError
from nplora.formats.gguf import Typed
from small_llama import save_small_llama

TEMPLATE = (
    "{% for m in messages %}<|end|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant\n{% endif %}"
)


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Modelfile, by the rules of Ollama's parser (parser/parser.go)."""
    text, found = path.read_text(encoding="utf-8"), []
    while text.strip():
        text = text.lstrip()
        name, text = re.split(r"[ \t]", text, maxsplit=1)
        if name == "PARAMETER":
            key, text = re.split(r"[ \t]", text, maxsplit=1)
            name = f"PARAMETER {key}"
        if text.startswith('"""'):
            value, _, text = text[3:].partition('"""')
        else:
            value, _, text = text.partition("\n")
        found.append((name, value))
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    pytest.importorskip("tokenizers")
    changes = {"tokenizer.chat_template": TEMPLATE, "llama.context_length": Typed(9000, "UINT32")}
    return save_small_llama(tmp_path / "model.gguf", changes=changes)


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, targets="all-linear")
    rng = np.random.default_rng(3)
    for layer in lm.adapter_layers().values():
        layer.A[...] = rng.standard_normal(layer.A.shape) / 4
    adapters.Adapter.from_model(lm).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with a model, beside a directory with its adapter."""
    pytest.importorskip("tokenizers")
    from docs.starting_directory import make

    make(tmp_path)
    lm = nplora.load_model(tmp_path / "hf-model")
    lm.add_lora(rank=2, targets="all-linear")
    adapters.Adapter.from_model(lm).save(tmp_path / "adapter")
    return tmp_path / "hf-model"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_directory_holds_the_merged_model_and_its_modelfile(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    report = export_ollama(
        model, tmp_path / "out", adapter, system='Say "yes".\nOr no.', parameters=[("temperature", "0.7")]
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    found = instructions(tmp_path / "out" / "Modelfile")
    template = '{{ range .Messages }}{{ if eq .Role "user" }}'
    assert found[0] == ("FROM", "./model.gguf")
    assert found[1][0] == "TEMPLATE"
    assert template in found[1][1]
    assert found[2:] == [
        ("SYSTEM", 'Say "yes".\nOr no.'),
        ("PARAMETER num_ctx", "4096"),
        ("PARAMETER stop", "<|end|>"),
        ("PARAMETER temperature", "0.7"),
    ]
    assert report.template
    nplora.merge_adapter(model, adapter, tmp_path / "merged.gguf", "q8_0")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "merged.gguf").read_bytes()


def test_the_model_of_a_directory_gets_one_type_after_an_exact_merge(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from docs.starting_directory import make

    (tmp_path / "start").mkdir()
    make(tmp_path / "start")
    source = tmp_path / "start" / "hf-model"
    lm = nplora.load_model(source)
    lm.add_lora(rank=2, targets="all-linear")
    for layer in lm.adapter_layers().values():
        layer.A[...] = 0.1
    adapters.Adapter.from_model(lm).save(tmp_path / "adapter")
    export_ollama(source, tmp_path / "out", tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    tensors = oracle.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    assert {t.tensor_type.name for t in tensors if len(t.shape) > 1} == {"Q8_0"}
    name = "blk.0.ffn_up.weight"
    merged = lm.model.layers[0].mlp.up_proj.merged_weight()
    stored = next(t for t in tensors if t.name == name)
    expected = oracle.quants.quantize(np.asarray(merged, np.float32), oracle.GGMLQuantizationType.Q8_0)
    assert (stored.data == expected).mean() > 0.999  # the sums of the merge may differ in their last bit


def test_without_an_adapter_the_modelfile_names_the_file(model: Path, tmp_path: Path) -> None:
    export_ollama(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Modelfile"]
    assert instructions(tmp_path / "out" / "Modelfile")[0] == ("FROM", str(model))


@pytest.mark.parametrize("keep_adapter", [False, True])
def test_a_type_for_a_file_that_is_not_copied_is_refused(
    model: Path, adapter: Path, tmp_path: Path, keep_adapter: bool
) -> None:
    merged = adapter if keep_adapter else None
    with pytest.raises(ValueError, match=r"dtype='q4_0' has no effect"):
        export_ollama(model, tmp_path / "out", merged, "q4_0", keep_adapter=keep_adapter)
    assert not (tmp_path / "out").exists()


def test_the_error_names_the_missing_parent(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        export_ollama(model, tmp_path / "missing" / "out")
    assert error.value.filename == str(tmp_path / "missing")


def test_an_adapter_is_kept_beside_the_model(model: Path, adapter: Path, tmp_path: Path) -> None:
    export_ollama(model, tmp_path / "out", adapter, keep_adapter=True)
    found = dict(instructions(tmp_path / "out" / "Modelfile"))
    assert (found["FROM"], found["ADAPTER"]) == (str(model), "./adapter.gguf")
    nplora.adapter_to_gguf(adapter, tmp_path / "a.gguf", model)
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_an_unusable_adapter_leaves_no_model(source: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(TruncatedError, match=r"adapter_model\.safetensors: the file is empty"):
        export_ollama(source, tmp_path / "out", tmp_path / "adapter", keep_adapter=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_template", [True, False])
def test_a_model_with_an_unknown_tokenizer_changes_nothing(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_template: bool
) -> None:
    monkeypatch.setattr(adapters.ollama, "trained_with_template", lambda path: with_template)
    export_ollama(model, tmp_path / "out", adapter)
    before = contents(tmp_path / "out")
    bare = save_small_llama(tmp_path / "bare.gguf", changes={"tokenizer.ggml.model": "unknown"})
    with pytest.raises(ValueError, match="the tokenizer is 'unknown'"):
        export_ollama(bare, tmp_path / "out", adapter, any_base=True, overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("cause", "error"),
    [
        ("dtype", "dtype='q8_O' is not available"),
        ("tokenizer", "Ollama needs the tokenizer"),
        ("name", "model has control characters"),
    ],
)
def test_an_export_that_cannot_succeed_changes_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cause: str,
    error: str,
    overwrite: bool,
) -> None:
    model, out, dtype = source, tmp_path / "out", None
    if overwrite:
        export_ollama(source, out, tmp_path / "adapter", keep_adapter=True)
        (out / "adapter.gguf").write_bytes((out / "adapter.gguf").read_bytes() + b" ")  # another adapter
    if cause == "dtype":
        dtype = "q8_O"
    elif cause == "tokenizer":
        (source / "tokenizer.json").unlink()
    else:
        model = tmp_path / "a\x7fb.gguf"
        nplora.model_to_gguf(source, model)
    before = contents(out) if overwrite else {}
    monkeypatch.setattr(adapters.ollama, "merge_adapter", None)  # too slow for a check
    for keep_adapter in (True, False)[: 1 if cause == "name" else 2]:
        with pytest.raises(ValueError, match=error):
            export_ollama(
                model, out, tmp_path / "adapter", dtype, keep_adapter=keep_adapter, overwrite=overwrite
            )
        assert (contents(out) if out.exists() else {}) == before
        assert out.exists() == overwrite


def test_the_same_dtype_keeps_the_types_of_a_directory(source: Path, tmp_path: Path) -> None:
    nplora.merge_adapter(source, tmp_path / "adapter", tmp_path / "half", "bfloat16")
    export_ollama(tmp_path / "half", tmp_path / "out", tmp_path / "adapter", "same", any_base=True)
    tensors = oracle.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    assert {t.tensor_type.name for t in tensors if "attn_q.weight" in t.name} == {"BF16"}


@pytest.mark.parametrize("base_has_them", [False, True])
def test_new_tokens_of_the_adapter_are_exported(source: Path, tmp_path: Path, base_has_them: bool) -> None:
    """The base's tokenizer may already list tokens whose rows only the adapter adds."""
    new = [f"<new {i}>" for i in range(600)]  # more than the embedding has rows without a token
    lm = nplora.load_model(source)
    old = lm.config.vocab_size
    lm.add_lora(rank=2, add_tokens=new)
    adapters.Adapter.from_model(lm).save(tmp_path / "with tokens")
    if base_has_them:
        shutil.copy(tmp_path / "with tokens" / "tokenizer.json", source)
        with pytest.raises(FormatError, match=re.escape(f"{source / 'tokenizer.json'}: token '<new ")):
            export_ollama(source, tmp_path / "out")
        with pytest.raises(FormatError, match=re.escape(f"{source / 'tokenizer.json'}: token '<new ")):
            export_ollama(source, tmp_path / "out", tmp_path / "adapter")
        assert not (tmp_path / "out").exists()
    export_ollama(source, tmp_path / "out", tmp_path / "with tokens", "float32")
    file = oracle.GGUFReader(tmp_path / "out" / "model.gguf")
    tokens = file.fields["tokenizer.ggml.tokens"].contents()
    assert new == [token for token in tokens if token.startswith("<new ")]
    embedding = next(t for t in file.tensors if t.name == "token_embd.weight").data
    assert len(embedding) == len(tokens) > old
    ids = [tokens.index(token) for token in new]
    np.testing.assert_allclose(embedding[ids], lm.model.embed_tokens(ids), atol=1e-6)


@pytest.mark.parametrize("name", ["other.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_a_file_that_is_not_the_whole_model_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).touch()
    with pytest.raises(ValueError, match=f"{name}', expected a GGUF file or a directory"):
        export_ollama(source / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_the_model_stands_for_its_directory(source: Path, tmp_path: Path, name: str) -> None:
    export_ollama(source, tmp_path / "out")
    export_ollama(source / name, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


@pytest.mark.parametrize("name", ["missing", "missing.safetensors", "missing.gguf", "model.safetensors"])
def test_the_error_names_the_missing_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")  # beside it, there is no config.json
    with pytest.raises(FileNotFoundError) as error:
        export_ollama(tmp_path / name, tmp_path / "out")
    assert error.value.filename == str(tmp_path / name if "missing" in name else tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.gguf", "Modelfile", "adapter.gguf"])
def test_an_export_replaces_no_file(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"a file")
    with pytest.raises(FileExistsError, match=re.escape(name)):
        export_ollama(source, out, tmp_path / "adapter", keep_adapter=True)
    assert contents(out) == {name: b"a file"}


@pytest.mark.parametrize("name", ["model.gguf", "Modelfile"])
def test_a_failed_export_keeps_the_file_that_another_program_wrote(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out, convert = tmp_path / "out", adapters.ollama.adapter_to_gguf

    def convert_slowly(*args: Any, **keywords: Any) -> Any:
        (out / name).write_bytes(b"of another program")
        return convert(*args, **keywords)

    monkeypatch.setattr(adapters.ollama, "adapter_to_gguf", convert_slowly)
    with pytest.raises(FileExistsError, match=re.escape(name)):
        export_ollama(source, out, tmp_path / "adapter", keep_adapter=True)
    assert contents(out) == {name: b"of another program"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_in_place", [False, True])
def test_after_an_error_the_files_of_the_modelfile_are_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, is_in_place: bool
) -> None:
    """The Modelfile is the last file. The disk fails before or after its rename."""
    out, replaced = tmp_path / "out", files.replace
    if overwrite:
        export_ollama(source, out, tmp_path / "adapter")

    def replace(new: list[files.NewFile], **keywords: Any) -> None:
        is_last = Path(new[0].path).name == "Modelfile"
        if is_in_place or not is_last:
            replaced(new, **keywords)
        if is_last:
            raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(files, "replace", replace)
    with pytest.raises(OSError, match="the disk fails"):
        export_ollama(source, out, tmp_path / "adapter", keep_adapter=True, overwrite=overwrite)
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if is_in_place:
        assert found == ["Modelfile", "adapter.gguf", "model.gguf"]
    else:
        assert found == (["Modelfile", "model.gguf"] if overwrite else [])


def test_an_adapter_of_plain_texts_gets_a_plain_template(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.ollama, "trained_with_template", lambda path: False)
    export_ollama(model, tmp_path / "out", adapter)
    found = instructions(tmp_path / "out" / "Modelfile")
    assert ("TEMPLATE", "{{ .Prompt }}") in found
    assert not any(name == "PARAMETER stop" for name, _ in found)


def test_a_template_that_go_cannot_write_is_left_out(tmp_path: Path) -> None:
    changes = {"tokenizer.chat_template": "{% for m in messages %}{{ m.content | upper }}{% endfor %}"}
    model = save_small_llama(tmp_path / "model.gguf", changes=changes)
    report = export_ollama(model, tmp_path / "out")
    assert not report.template
    assert "the Modelfile has no TEMPLATE" in str(report)
    assert [name for name, _ in instructions(tmp_path / "out" / "Modelfile")] == ["FROM", "PARAMETER num_ctx"]


def test_tools_and_spaces_that_the_template_lacks_are_reported(tmp_path: Path) -> None:
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    changes = {"tokenizer.chat_template": tools + TEMPLATE.replace("m.content", "m.content | trim")}
    report = export_ollama(save_small_llama(tmp_path / "model.gguf", changes=changes), tmp_path / "out")
    assert report.template
    assert report.lines == (
        "TEMPLATE does not write the definitions of tools: Ollama refuses requests with tools",
        "TEMPLATE keeps spaces at the ends of messages; the model's template removes them "
        "(system, user, assistant)",
    )


def test_a_template_that_lacks_nothing_is_not_commented(model: Path, tmp_path: Path) -> None:
    assert export_ollama(model, tmp_path / "out").lines == ()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"parameters": [("Bad name", "1")]}, "Ollama has no parameter 'Bad name'"),
        ({"parameters": [("temprature", "1")]}, "no parameter 'temprature'; did you mean temperature"),
        ({"parameters": [("stop", "")]}, "parameter stop='', expected one line of text"),
        ({"parameters": [("stop", "a\nFROM x")]}, "expected one line of text"),
        ({"parameters": [("seed", "1\nFROM x")]}, "expected a whole number"),
        ({"parameters": [("num_ctx", "4k")]}, "parameter num_ctx='4k', expected a whole number"),
        ({"parameters": [("top_k", "1.5")]}, "expected a whole number"),
        ({"parameters": [("temperature", "warm")]}, "expected a number"),
        ({"parameters": [("temperature", "nan")]}, "expected a number"),
        ({"parameters": [("use_mmap", "maybe")]}, "expected true or false"),
        ({"system": 'x """ y'}, "system has control characters"),
        ({"system": "\x1b[2J"}, "system has control characters"),
        ({"keep_adapter": True}, "keep_adapter needs an adapter"),
    ],
)
def test_what_a_modelfile_cannot_hold_is_refused(
    more: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        export_ollama(model, tmp_path / "out", **more)
    assert not (tmp_path / "out" / "Modelfile").exists()


def test_parameters_of_each_type_are_written_as_they_are(model: Path, tmp_path: Path) -> None:
    given = [("seed", "-1"), ("min_p", "5e-2"), ("use_mmap", "false"), ("stop", "a b"), ("stop", "<b>")]
    export_ollama(model, tmp_path / "out", parameters=given)
    found = instructions(tmp_path / "out" / "Modelfile")
    assert found[-len(given) :] == [(f"PARAMETER {name}", value) for name, value in given]


def test_an_empty_system_message_writes_no_line(model: Path, tmp_path: Path) -> None:
    export_ollama(model, tmp_path / "out", system="")
    assert "SYSTEM" not in dict(instructions(tmp_path / "out" / "Modelfile"))


@systems.needs_bash
def test_the_commands_of_the_report_quote_their_paths() -> None:
    report = OllamaExport("for ollama", (), True, "my model.gguf", adapter="the adapter")
    check, create = (line.split(":", 1)[1] for line in str(report).splitlines())
    assert shlex.split(check)[:6] == ["nplora", "eval", "my model.gguf", "--adapter", "the adapter", "--data"]
    assert shlex.split(create) == ["ollama", "create", "NAME", "-f", "for ollama/Modelfile"]


def test_the_command_writes_it_and_replaces_only_with_overwrite(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["export", str(model), "--adapter", str(adapter), "--ollama", str(tmp_path / "out")]
    assert cli.main([*line, "--parameter", "num_ctx=2048", "--dtype", "same"]) == 0
    (path,) = re.findall(r"^import it: ollama create NAME -f (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert path.strip("\"'") == str(tmp_path / "out" / "Modelfile")  # a path with spaces has quotation marks
    found = instructions(tmp_path / "out" / "Modelfile")
    assert [value for name, value in found if name == "PARAMETER num_ctx"] == ["2048"]
    assert cli.main(line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*line, "--overwrite"]) == 0
    with pytest.raises(SystemExit):
        cli.main([*line, "--parameter", "num_ctx"])


def test_a_path_of_two_lines_brings_no_instruction(model: Path, tmp_path: Path) -> None:
    if systems.IS_WINDOWS:
        pytest.skip("this system's names hold no control characters")
    (tmp_path / "a\nSYSTEM x").mkdir()
    model = model.rename(tmp_path / "a\nSYSTEM x" / "model.gguf")
    with pytest.raises(ValueError, match="model has control characters"):
        export_ollama(model, tmp_path / "out")
    assert not (tmp_path / "out" / "Modelfile").exists()
