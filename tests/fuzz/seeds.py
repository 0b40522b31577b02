"""Writes the seed corpus of a reader: python tests/fuzz/seeds.py READER DIRECTORY.

Without arguments, it prints the readers' names.
"""

import base64
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nplora.formats import gguf, peft_config, safetensors
from nplora.formats.gguf import Tensor, Typed
from nplora.formats.gguf.ggml_types import GGML_TYPES, VALUE_LETTERS
from nplora.formats.peft_config import Patterns, PeftConfig
from nplora.models.families import FAMILIES
from nplora.tokenizer.gguf_vocabulary import SPLITS

Seeds = dict[str, bytes]
# SentencePiece's table of characters, with a search tree that finds nothing and two replacements
CHARACTER_TABLE = (1024).to_bytes(4, "little") + bytes(1024) + b"b\0aaa\0"


def dumps(*values: object) -> bytes:
    """Values as JSON texts, separated by zero bytes."""
    return b"\0".join(json.dumps(value).encode() for value in values)


# ---- containers ----


def gguf_seeds() -> Seeds:
    """Small files with every type of value and of tensor, and with the shapes of models and adapters."""
    numbers = {kind.lower(): Typed(1, kind) for kind in VALUE_LETTERS if kind != "BOOL"}
    arrays = {kind.lower(): Typed([1, 0], kind) for kind in VALUE_LETTERS if kind != "BOOL"}
    words = {"words": ["a", "naïve", ""], "truths": [True, False], "none": Typed([], "STRING"), "yes": True}
    tensors = {
        name: Tensor(name, name, (2, kind.block), np.zeros(2 * kind.block_nbytes, np.uint8))
        for name, kind in GGML_TYPES.items()
    }
    floats = {name: tensors[name] for name in ("F32", "F16", "BF16", "F64")}
    return {
        "nothing": gguf.dumps({}),
        "numbers": gguf.dumps({}, numbers),
        "arrays": gguf.dumps({}, arrays),
        "words": gguf.dumps({}, words),
        "tensors": gguf.dumps(tensors),
        "floats": gguf.dumps(floats | {"scalar": np.int8(1), "empty": np.zeros((0, 2, 1, 3))}),
        "aligned": gguf.dumps(
            {"a": np.int8([1]), "b": np.int16([2])}, {"general.alignment": Typed(8, "UINT32")}
        ),
        **{f"adapter {name}": data for name, data in gguf_adapter_seeds().items()},
    }


def safetensors_seeds() -> Seeds:
    names = ["float64", "float32", "float16", "int8", "int64", "uint8", "uint32", "bool"]
    arrays = {name: np.ones((2, 3), name) for name in names}
    bits = safetensors.Tensor("b", "bfloat16", np.ones(2, np.uint16))
    state = {"shape": [2, 3], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.5}
    nf4: dict[str, Any] = {
        "w": np.zeros((3, 1), np.uint8),
        "w.absmax": np.ones(1, np.float32),
        "w.quant_map": np.zeros(16, np.float32),
        "w.quant_state.bitsandbytes__nf4": np.frombuffer(dumps(state), np.uint8),
    }
    nested = {
        "w.absmax": np.zeros(1, np.uint8),
        "w.nested_absmax": np.ones(1, np.float32),
        "w.nested_quant_map": np.zeros(256, np.float32),
    }
    return {
        "nothing": safetensors.dumps({}),
        "metadata": safetensors.dumps({}, {"format": "pt", "naïve": 'é"\\\n'}),
        "every type": safetensors.dumps(arrays | {"bfloat16": bits}),
        "shapes": safetensors.dumps(
            {"scalar": np.array(1.0), "empty": np.zeros((0, 2)), "four": np.ones((1, 2, 1, 2))}
        ),
        "nf4": safetensors.dumps(nf4),
        "nested nf4": safetensors.dumps(nf4 | nested),
    }


def shard_index_seeds() -> Seeds:
    metadata = {"total_size": 8}
    return {
        "one": dumps({"weight_map": {"a": "a.safetensors"}}),
        "metadata": dumps({"metadata": metadata, "weight_map": {"a": "a.safetensors"}}),
        "others": dumps({"weight_map": {"a": "a.safetensors", "b": "../b", "c": "c"}}),
    }


# ---- adapters ----


def peft_adapter_seeds() -> Seeds:
    stem, embedding = "base_model.model.q", "base_model.model.emb"
    linear = {
        f"{stem}.lora_A.weight": np.ones((2, 3), np.float32),
        f"{stem}.lora_B.weight": np.ones((4, 2), np.float16),
    }
    embedded = {
        f"{embedding}.lora_embedding_A": np.ones((1, 5)),
        f"{embedding}.lora_embedding_B": safetensors.Tensor("b", "bfloat16", np.ones((3, 1), np.uint16)),
    }
    magnitude = {f"{stem}.lora_magnitude_vector": np.ones(4, np.float32)}

    def adapter(config: bytes, tensors: dict[str, Any]) -> bytes:
        return config + b"\0" + safetensors.dumps(tensors, {"format": "pt"})

    exact = PeftConfig(r=2, lora_alpha=2.5, rank_pattern=Patterns.exact({"emb": 1}), use_rslora=True)
    others = {
        "peft_type": "LORA",
        "r": 1,
        "rank_pattern": {r"(^q|k\d+_[a-c])$": 2, ".*?x": 3},
        "alpha_pattern": {"q": 1e1},
        "auto_mapping": {"base_model_class": "Net", "parent_library": "net"},
        "megatron_core": "megatron.core",
        "target_modules": "q.*",
        "exclude_modules": ["k"],
        "init_lora_weights": "gaussian",
        "bias": "none",
        "colour": None,
    }
    return {
        "linear": adapter(peft_config.dumps(PeftConfig(r=2)), linear),
        "embedding": adapter(peft_config.dumps(exact), linear | embedded),
        "patterns": adapter(dumps(others), linear),
        "dora": adapter(peft_config.dumps(PeftConfig(r=2, use_dora=True)), linear | magnitude),
        "small": adapter(dumps({"peft_type": "LORA", "r": 2}), linear),
    }


def gguf_adapter_seeds() -> Seeds:
    metadata = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(16),
    }
    linear = {
        "blk.0.attn_q.weight.lora_a": np.ones((1, 4), np.float32),
        "blk.0.attn_q.weight.lora_b": np.ones((4, 1), np.float32),
    }
    others = {
        "token_embd.weight.lora_a": np.ones((9, 2), np.float16),
        "token_embd.weight.lora_b": Tensor("b", "BF16", (4, 2), np.zeros(16, np.uint8)),
        "blk.0.attn_norm.weight": np.ones(4),
    }
    return {"linear": gguf.dumps(linear, metadata), "embedding": gguf.dumps(linear | others, metadata)}


# ---- models ----


def gguf_config_seeds() -> Seeds:
    metadata: dict[str, Any] = {
        "llama.block_count": Typed(1, "UINT32"),
        "llama.context_length": Typed(8, "UINT32"),
        "llama.embedding_length": Typed(4, "UINT32"),
        "llama.feed_forward_length": Typed(6, "UINT32"),
        "llama.attention.head_count": Typed(2, "UINT32"),
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
    }
    more = {
        "llama.vocab_size": Typed(9, "INT64"),
        "llama.attention.head_count_kv": Typed(1, "UINT8"),
        "llama.attention.key_length": Typed(2, "UINT32"),
        "llama.attention.sliding_window": Typed(4, "UINT32"),
        "llama.rope.dimension_count": Typed(2, "UINT32"),
        "llama.rope.freq_base": np.float32(1e4),
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": np.float32(2),
    }
    embedding = {"token_embd.weight": np.ones((9, 4), np.float32)}
    factors = {"rope_freqs.weight": np.ones(1, np.float32), "output.weight": np.ones((9, 4), np.float32)}

    def model(architecture: str, metadata: dict[str, Any], tensors: dict[str, Any]) -> bytes:
        own = {key.replace("llama", architecture): value for key, value in metadata.items()}
        return gguf.dumps(tensors, {"general.architecture": architecture} | own)

    return {
        "small": model("llama", metadata, embedding),
        "large": model("llama", metadata | more, embedding | factors),
        "qwen2": model("qwen2", metadata | more, embedding),
        "qwen3": model("qwen3", metadata, embedding),
    }


def config_json_seeds() -> Seeds:
    small = {
        "model_type": "llama",
        "vocab_size": 9,
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    long = {"type": "longrope", "short_factor": [1.5], "long_factor": [2]}
    windows = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    switches = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "hidden_act": "silu"}
    sizes = {"num_key_value_heads": 1, "head_dim": 2, "rms_norm_eps": 1e-5}
    nf4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    seeds = {
        "small": dumps(small),
        "llama 3": dumps(small | switches | {"rope_parameters": {"rope_theta": 5e4, **llama3}}),
        "linear": dumps(small | sizes | {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2}}),
        "mistral": dumps(small | nf4 | {"model_type": "mistral", "sliding_window": None}),
        "qwen2": dumps(small | windows | {"model_type": "qwen2"}),
        "qwen3": dumps(small | {"model_type": "qwen3", "layer_types": ["sliding_attention"], **windows}),
        "gemma3": dumps(
            small | {"model_type": "gemma3_text", "sliding_window": 4, "rope_local_base_freq": 5.0}
        ),
        "smollm3": dumps(small | {"model_type": "smollm3", "no_rope_layers": [0]}),
        "granite": dumps(small | {"model_type": "granite", "logits_scaling": 2.0, "attention_bias": True}),
        "olmo2": dumps(small | {"model_type": "olmo2"}),
        "phi3": dumps(
            small | {"model_type": "phi3", "rope_scaling": long, "original_max_position_embeddings": 4}
        ),
    }
    named = {json.loads(seed)["model_type"] for seed in seeds.values()}
    others = [family.model_type for family in FAMILIES if family.model_type not in named]
    return seeds | {name: dumps(small | {"model_type": name}) for name in others}


# ---- tokenizers ----


def gguf_tokenizer_seeds() -> Seeds:
    tokens = ["<s>", "<|end|>", "a", "b", "Ġ", "ab", "Ċ", "Ã", "©"]
    merges = ["a b"]
    pieces = ["<unk>", "<s>", "</s>", "<0x61>", "▁", "a", "b", "ab", "▁a"]

    def vocabulary(model: str, values: dict[str, Any], **more: Any) -> bytes:
        entries = {"model": model, "bos_token_id": Typed(0, "UINT32"), **values, **more}
        return gguf.dumps({}, {f"tokenizer.ggml.{key}": value for key, value in entries.items()})

    bytes_ = {
        "tokens": tokens,
        "token_type": Typed([3, 3, 1, 1, 1, 1, 4, 1, 1], "INT32"),
        "merges": merges,
        "eos_token_id": Typed(1, "UINT32"),
    }
    piece = {
        "tokens": pieces,
        "scores": Typed([0, 0, 0, 0, -1, -2, -3, -1.5, -1], "FLOAT32"),
        "token_type": Typed([2, 3, 3, 6, 1, 1, 1, 1, 1], "INT32"),
        "unknown_token_id": Typed(0, "UINT32"),
    }
    return {
        "byte level": vocabulary("gpt2", bytes_, pre="gpt-2"),
        **{f"pre {pre}": vocabulary("gpt2", bytes_, pre=pre, add_bos_token=True) for pre in SPLITS},
        "pieces": vocabulary("llama", piece),
        "plain pieces": vocabulary("llama", piece, add_space_prefix=False, add_eos_token=True),
        "unigram": vocabulary("t5", piece, precompiled_charsmap=Typed(list(CHARACTER_TABLE), "UINT8")),
    }


def tokenizer_json_seeds() -> Seeds:
    """Every kind of model and of step in the package `tokenizers`."""
    vocabulary = {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<s>": 4}
    bpe = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]}
    models = {
        "bpe": bpe,
        "old bpe": bpe | {"merges": ["a b"], "dropout": None, "byte_fallback": True, "unk_token": "<s>"},
        "word piece": {"type": "WordPiece", "vocab": vocabulary, "unk_token": "<s>",
                       "continuing_subword_prefix": "##", "max_input_chars_per_word": 9},
        "word level": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"},
        "unigram": {"type": "Unigram", "vocab": [["<s>", 0.0], ["a", -1.0], ["ab", -1.5]], "unk_id": 0},
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\s+(?!\S)|\p{L}+"},
        "behavior": "Isolated",
        "invert": False,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [
        *({"type": kind} for kind in ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")),
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
         "lowercase": True},
        replace,
        replace | {"pattern": {"Regex": " {2,}"}},
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARACTER_TABLE).decode()},
    ]  # fmt: skip
    cuts = [
        *({"type": kind} for kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts")),
        {"type": "CharDelimiterSplit", "delimiter": "x"},
        {"type": "Digits", "individual_digits": True},
        {"type": "FixedLength", "length": 5},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Punctuation", "behavior": "MergedWithNext"},
        split,
        byte_level,
    ]
    backs = [
        *({"type": kind} for kind in ("ByteFallback", "Fuse", "ByteLevel")),
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        replace,
    ]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
    }
    ends = [
        template,
        {"type": "BertProcessing", "sep": ["<s>", 4], "cls": ["<s>", 4]},
        {"type": "RobertaProcessing", "sep": ["<s>", 4], "cls": ["<s>", 4], "trim_offsets": True,
         "add_prefix_space": False},
        byte_level,
    ]  # fmt: skip
    token = {"id": 4, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip

    def file(model: dict[str, Any], **parts: Any) -> bytes:
        fields = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
        return dumps({"version": "1.0", "added_tokens": [token], "model": model} | fields | parts)

    plain = {"pre_tokenizer": byte_level, "decoder": byte_level}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<s>"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    config = {"bos_token": "<s>", "eos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}"}
    sequences = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers[:3]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]},
        "decoder": {"type": "Sequence", "decoders": backs[:3]},
        "post_processor": {"type": "Sequence", "processors": [byte_level, template]},
    }
    steps = {"normalizer": normalizers, "pre_tokenizer": cuts, "decoder": backs, "post_processor": ends}
    return {
        **{name: file(model) for name, model in models.items()},
        **{
            f"{part} {number}": file(bpe, **{part: step})
            for part, some in steps.items()
            for number, step in enumerate(some)
        },
        "for gguf": file(bpe, **plain) + b"\0" + dumps(config, {"eos_token_id": [4, 0]}),
        "smollm": file(
            bpe, **plain | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [cuts[5], byte_level]}}
        ),
        "sequences": file(bpe, **sequences),
        "padded": file(bpe, padding=padding, truncation=truncation),
    }


def split_pattern_seeds() -> Seeds:
    patterns = {name: pattern.encode() for name, pattern in SPLITS.items() if pattern is not None}
    return patterns | {
        "plain": rb"'s|\d{1,3}(?=(?:\d{3})*\b)|[^\s\p{L}]+|[a-z]{2,}?",
        "repeated": b"(a+)+$",
        "meeting": b"a*a*b",
        "choices": b"(?:a|ab)(?:c|bc)",
        "around": rb"(?!a)(?<=b)(?<!c)\x41\u0041 ?+x++",
    }


def chat_template_seeds() -> Seeds:
    return {
        "chatml": b"{% for m in messages %}{{ m.role + ':' + m['content'] + '\n' }}{% endfor %}",
        "names": b"{% set n = namespace(x=1) %}{% if messages[-1].role is string %}{{ n.x }}{% endif %}",
        "filters": b"{{ messages | map(attribute='role') | join(', ') | upper }}{{ [1] | tojson(indent=2) }}",
        "macro": b"{% macro m(a, b=1) %}{{ a * b }}{% endmacro %}{{ m('x', 3) }}{{ '%s' % 'a' }}",
        "loop": b"{%- for i in range(9) -%}{% if i > 2 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}",
        "sandbox": b"{{ ''.__class__ }}{{ messages | attr('append') }}{{ raise_exception('no') }}",
    }


# ---- runs ----


def checkpoint_seeds() -> Seeds:
    epoch = {"epoch": 1, "step": 2, "loss": 0.5, "val_loss": None, "val_accuracy": 0.5, "seconds": 1.0}
    step = {"step": 1, "epoch": 1, "loss": 0.5, "count": 2, "lr": 0.1, "grad_norm": None, "seconds": 1.0}
    state = {
        "step": 2,
        "epoch": 1,
        "batch": 0,
        "total_steps": None,
        "random_state": {"0": [1, 2]},
        "settings": {"fixed": {}, "free": {}},
        "base": "0",
        "best": None,
        "epochs": [epoch],
        "evaluations": [],
        "log_bytes": 0,
        "isa": "avx2",
        "version": "0",
        "serial": 1,
    }
    log = b"\n".join([dumps({"event": "step", **step}), dumps({"event": "epoch", **epoch}), b""])
    best = {"loss": 0.5, "epoch": 1, "step": 2, "since": 0}
    evaluation = {"step": 2, "epoch": 1, "val_loss": 0.5, "val_accuracy": None, "seconds": 1.0}
    older = {name: value for name, value in state.items() if name != "evaluations"}
    return {
        "first": dumps(state | {"epochs": []}) + b"\0",
        "logged": dumps(state) + b"\0" + log,
        "best": dumps(state | {"best": best, "total_steps": 9}) + b"\0" + log,
        "evaluated": dumps(state | {"evaluations": [evaluation]}) + b"\0" + log,
        "older": dumps(older | {"best": {"loss": 0.5, "epoch": 1, "since": 0}}) + b"\0" + log,
    }


def rows_seeds() -> Seeds:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab"}]
    rows = [{"prompt": "a", "completion": "ab"}, {"text": "a b"}, {"messages": chat}, {}]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    called = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}
    return {
        "jsonl": b"j" + b"\n".join(map(dumps, rows)),
        "csv": b'cprompt,completion\r\na,"b ""\n"\r\nb,\r\n',
        "text csv": b"c\xef\xbb\xbftext,more\nab,1\n",
        "plain": "ta b\né\n\nab".encode(),
        "array": b"a[" + b" , ".join(map(dumps, rows)) + b"]\n",
        "object": b'a{"version": "1", "a": [{}], "data": [' + dumps(rows[0]) + b'], "more": []}',
        "tsv": b"stext\tmore\nab\t1\n",
        "gzip": b"z" + gzip.compress(dumps(rows[0])) + gzip.compress(b"\n" + dumps(rows[0])),
        "array gzip": b"y" + gzip.compress(dumps(rows[:1])),
        "sharegpt": b"j" + dumps({"conversations": turns, "tools": "[]"}),
        "alpaca": b"j" + dumps({"instruction": "a", "input": "b", "output": "ab", "history": [["a", "b"]]}),
        "calls": b"j" + dumps({"messages": [*chat, called], "tools": [{"name": "f"}]}),
        "columns": b"j" + dumps({"prompt": chat[:1], "completion": chat[1:], "label": True}),
    } | _tables(rows[:1])


def _tables(rows: list[dict[str, str]]) -> Seeds:
    """The rows as Parquet and Arrow, if pyarrow is installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        return {}
    table = pyarrow.Table.from_pylist(rows)
    parquet, arrow, stream = (pyarrow.BufferOutputStream() for _ in range(3))
    pyarrow.parquet.write_table(table, parquet)
    for sink, new in ((arrow, pyarrow.ipc.new_file), (stream, pyarrow.ipc.new_stream)):
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    named = {"parquet": b"p", "arrow": b"w", "arrow stream": b"w"}
    sinks = zip(named.items(), (parquet, arrow, stream), strict=True)
    return {name: letter + sink.getvalue().to_pybytes() for (name, letter), sink in sinks}


SEEDS: dict[str, Callable[[], Seeds]] = {
    name.removesuffix("_seeds"): value for name, value in list(globals().items()) if name.endswith("_seeds")
}


def write(reader: str, directory: Path) -> Path:
    """Write the seeds of a reader as files. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS[reader]().items():
        (directory / name.replace(" ", "_")).write_bytes(data)
    return directory


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(*SEEDS)
    else:
        write(sys.argv[1], Path(sys.argv[2]))
