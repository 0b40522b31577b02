"""Small files that could take much memory or time. Each is refused, or read within the limits."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import small_models
from attack.case import Case
from attack.child import call
from small_llama import save_small_llama

MOST_SECONDS = 4.0  # of CPU time: each takes less than 2, but other processes share the core
MOST_BYTES = 300 << 20
TRIES = 4  # other processes on the same core make some tries slow

# Runs a command of nplora, then prints its CPU seconds and its peak memory in KiB to stderr. The peak that
# the system reports for a child would include the memory of the process that it was forked from.
PROGRAM = """
import re, sys, time
from pathlib import Path
from nplora.cli import main
begin = time.process_time()
status = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
print(time.process_time() - begin, peak, file=sys.stderr)
sys.exit(status)
"""


def measured(arguments: list[str], status: int) -> tuple[float, int]:
    """The CPU seconds and the peak memory of a command that must end with this exit status."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *lines, figures = done.stderr.splitlines()
    assert done.returncode == status, f"exit status {done.returncode}: {lines}"
    assert sum(line.startswith("nplora: error: ") for line in lines) == (status != 0), lines
    seconds, kib = figures.split()
    return float(seconds), int(kib) << 10


def hold(make: Callable[[Path], list[str]], status: int, place: Path) -> str:
    """Make a file and run a command on it. Returns the result of the fastest of a few tries."""
    place.mkdir()
    made = call(lambda: print(json.dumps(make(place))) or 0)  # in a child, whose memory is freed when it ends
    assert made.status == 0, made.stderr
    tries: list[tuple[float, int]] = []
    while len(tries) < TRIES and not (tries and min(tries)[0] <= MOST_SECONDS):
        tries.append(measured(json.loads(made.stdout), status))
    seconds, peak = min(tries)
    words = f"{seconds:.1f} s, {peak / 1e6:.0f} MB, exit status {status}"
    assert seconds <= MOST_SECONDS, words
    assert peak <= MOST_BYTES, words
    return words


# ---- the files ----


def safetensors_file(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def metadata_entries(place: Path) -> list[str]:
    """Six million metadata entries."""
    entries = ",".join(f'"{n}":""' for n in range(6_000_000))
    safetensors_file(place / "many.safetensors", b'{"__metadata__":{' + entries.encode() + b"}}")
    return ["info", str(place / "many.safetensors")]


def empty_lists(place: Path) -> list[str]:
    """A tensor whose shape is thirty million empty lists."""
    header = b'{"t":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"[]," * 30_000_000 + b"[]]}}"
    safetensors_file(place / "lists.safetensors", header)
    return ["info", str(place / "lists.safetensors")]


def lists_in_index(place: Path) -> list[str]:
    """An index of shards whose map is a list of ten million lists."""
    (place / "config.json").write_text(json.dumps(small_models.config()))
    index = b'{"weight_map":{"t":[' + b"[]," * 10_000_000 + b"[]]}}"
    (place / "model.safetensors.index.json").write_bytes(index)
    return ["info", str(place)]


def patterns(place: Path) -> list[str]:
    """An adapter of 60,000 layers, with a rank pattern for each."""
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(60_000)]
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": names}
    config["rank_pattern"] = {f".*{n}.mlp.up_proj": 1 for n in range(60_000)}
    (place / "adapter_config.json").write_text(json.dumps(config))
    header = {}
    for n, (name, half) in enumerate((name, half) for name in names for half in "AB"):
        tensor = f"base_model.model.{name}.lora_{half}.weight"
        header[tensor] = {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * n, 4 * n + 4]}
    text = json.dumps(header).encode()
    weights = len(text).to_bytes(8, "little") + text + bytes(8 * len(names))
    (place / "adapter_model.safetensors").write_bytes(weights)
    return ["info", str(place)]


def special_tokens(place: Path) -> list[str]:
    """A model whose tokenizer has 300,000 special tokens."""
    (place / "config.json").write_text(json.dumps(small_models.config()))
    small_models.write_tensors(place / "model.safetensors", small_models.hf_tensors())
    added = [{"id": n, "content": f"<|{n}|>", "special": True} for n in range(300_000)]
    tokenizer = {"added_tokens": added, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    return ["generate", str(place), "hello"]


def long_row(place: Path) -> list[str]:
    """A row of 16 MB, of which 64 tokens are used."""
    model = save_small_llama(place / "model.gguf")
    (place / "data.jsonl").write_text(json.dumps({"text": "hello " * 2_600_000}))
    return ["eval", str(model), "--data", str(place / "data.jsonl")]


def cases(room: Path) -> Iterator[Case]:
    refused = (metadata_entries, empty_lists, lists_in_index, patterns, special_tokens)
    for make, status in (*((make, 2) for make in refused), (long_row, 0)):
        attack = partial(hold, make, status, room / make.__name__)
        yield Case("small files, large memory", make.__name__.replace("_", " "), attack)
