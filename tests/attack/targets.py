"""Existing files, links, directories and FIFOs where a command wants to write. All must stay unchanged."""

import hashlib
import itertools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import sklearn.datasets  # noqa: F401  here, so that no child has to import it

import small_models
from attack.case import Case
from attack.child import command
from nplora.formats import safetensors
from small_llama import save_small_llama

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
RUN = ("log.jsonl", "lock", "checkpoint-0.safetensors", "checkpoint-1.safetensors", *ADAPTER)
STRANGE = b"the only copy of somebody's thesis\n"


# ---- things that may exist at a target's path ----


def _file(target: Path, elsewhere: Path) -> None:
    target.write_bytes(STRANGE)


def _link(target: Path, elsewhere: Path) -> None:
    elsewhere.write_bytes(STRANGE)
    target.symlink_to(elsewhere)


def _link_to_nothing(target: Path, elsewhere: Path) -> None:
    target.symlink_to(elsewhere)


def _directory(target: Path, elsewhere: Path) -> None:
    target.mkdir()
    (target / "thesis").write_bytes(STRANGE)


def _fifo(target: Path, elsewhere: Path) -> None:
    os.mkfifo(target)


OBSTACLES = (_file, _link, _link_to_nothing, _directory, _fifo)


# ---- the commands ----


class Targets:
    """Inputs of every command that writes."""

    def __init__(self, room: Path) -> None:
        self.room = room
        inputs = self.inputs = room / "inputs"
        inputs.mkdir()
        self.model = save_small_llama(inputs / "model.gguf")
        self.data = inputs / "train.jsonl"
        self.data.write_text("".join(json.dumps({"text": f"{n}+{n}={2 * n}"}) + "\n" for n in range(8)))
        self.run = inputs / "run"
        line = [str(self.model), "--data", str(self.data), "--output", str(self.run), "--steps", "2"]
        assert command(["finetune", *line, "--rank", "2"]).status == 0
        self.adapter = inputs / "adapter"
        self.adapter.mkdir()
        for name in ADAPTER:
            shutil.copy(self.run / name, self.adapter)
        self.gguf_adapter = inputs / "adapter.gguf"
        line = [str(self.adapter), str(self.gguf_adapter), "--base", str(self.model)]
        ended = command(["convert", *line])
        assert ended.status == 0, ended.stderr
        self.directory = inputs / "hf"
        self.directory.mkdir()
        (self.directory / "config.json").write_text(json.dumps(small_models.config()))
        safetensors.save(self.directory / "model.safetensors", small_models.hf_tensors())

    def lines(self) -> dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]]:
        """For each command: its arguments for an output, and the names that it writes under this output."""
        model, data, run, adapter = map(str, (self.model, self.data, self.run, self.adapter))
        gguf, directory = str(self.gguf_adapter), str(self.directory)
        base, merge = ["--base", model], ["merge", model, adapter, "--output"]
        train = ["finetune", model, "--data", data, "--steps", "1", "--output"]
        return {
            "finetune": (lambda out: [*train, str(out)], RUN),
            "demo digits": (lambda out: ["demo", "digits", "--output", str(out)], RUN),
            "convert to GGUF": (lambda out: ["convert", adapter, f"{out}.gguf", *base], ()),
            "convert from GGUF": (lambda out: ["convert", gguf, str(out), *base], ADAPTER),
            "convert a model": (lambda out: ["convert", directory, f"{out}.gguf"], ()),
            "merge": (lambda out: [*merge, f"{out}.gguf"], ()),
            "combine": (lambda out: ["combine", adapter, gguf, *base, "--output", str(out)], ADAPTER),
            "plot": (lambda out: ["plot", run, "--output", f"{out}.png"], ()),
        }

    def obstruct(
        self, line: Callable[[Path], list[str]], name: str, obstacle: Callable[[Path, Path], None]
    ) -> None:
        """The command must refuse and must change nothing."""
        room = Path(tempfile.mkdtemp(dir=self.room))
        output = room / "out"
        target = output / name if name else next(Path(a) for a in line(output) if a.startswith(str(output)))
        target.parent.mkdir(exist_ok=True)
        obstacle(target, room / "elsewhere")
        before = snapshot(room), snapshot(self.inputs)
        ended = command(line(output))
        assert ended.status == 2, f"exit status {ended.status}: {ended.stdout}{ended.stderr}"
        assert len(ended.errors) == 1, ended.stderr
        named = target.name in ended.errors[0] or f"{output}: " in ended.errors[0]
        assert named, f"refused for another reason: {ended.errors[0]}"
        for now, then in zip((snapshot(room), snapshot(self.inputs)), before, strict=True):
            assert now == then, f"changed: {[path for path, _ in now.items() ^ then.items()]}"

    def onto_inputs(self) -> dict[str, list[str]]:
        """Commands whose output is one of their inputs."""
        model, adapter, data = str(self.model), str(self.adapter), str(self.data)
        gguf, directory, log = str(self.gguf_adapter), str(self.directory), str(self.run / "log.jsonl")
        weights, base = str(self.directory / "model.safetensors"), ["--base", model]
        return {
            "merge onto the model": ["merge", model, adapter, "--output", model],
            "merge into the model": ["merge", directory, adapter, "--output", directory],
            "merge onto the adapter": ["merge", model, gguf, "--output", gguf],
            "convert an adapter onto itself": ["convert", gguf, gguf, *base],
            "convert an adapter onto its model": ["convert", adapter, model, *base],
            "convert a model onto itself": ["convert", directory, weights],
            "combine onto an adapter": ["combine", adapter, adapter, "--output", adapter],
            "plot onto the log": ["plot", str(self.run), "--output", log],
            "finetune onto the data": ["finetune", model, "--data", data, "--output", data],
        }

    def keep_input(self, line: list[str], more: list[str]) -> None:
        before = snapshot(self.inputs)
        ended = command([*line, *more])
        assert ended.status == 2, f"exit status {ended.status}: {ended.stdout}{ended.stderr}"
        assert snapshot(self.inputs) == before, "an input was changed"

    def log_as_data(self, overwrite: list[str]) -> None:
        """The training data are log.jsonl in the output directory."""
        output = self.room / f"log{len(overwrite)}"
        output.mkdir()
        shutil.copy(self.data, output / "log.jsonl")
        line = ["finetune", str(self.model), "--data", str(output / "log.jsonl"), "--output", str(output)]
        ended = command([*line, "--steps", "1", *overwrite])
        assert ended.status == 2, f"exit status {ended.status}: {ended.stderr}"
        assert (output / "log.jsonl").read_bytes() == self.data.read_bytes()
        assert [file.name for file in output.iterdir()] == ["log.jsonl"]


def snapshot(room: Path) -> dict[str, tuple[int, bytes, int]]:
    """The kind, content and time of everything below a directory."""
    found = {}
    for path in sorted(room.rglob("*")):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = b""
        if kind == stat.S_IFREG:
            content = hashlib.sha256(path.read_bytes()).digest()
        elif kind == stat.S_IFLNK:
            content = os.fsencode(os.readlink(path))
        found[str(path)] = (kind, content, status.st_mtime_ns if kind != stat.S_IFDIR else 0)
    return found


def cases(room: Path) -> Iterator[Case]:
    targets = Targets(room)
    for command_name, (line, files) in targets.lines().items():
        row = f"nplora {command_name}: foreign targets"
        for file, obstacle in itertools.product(files or ("",), OBSTACLES):
            name = f"{obstacle.__name__.strip('_').replace('_', ' ')} as {file or 'the output'}"
            yield Case(row, name, partial(targets.obstruct, line, file, obstacle))
    row = "an input as output"
    for more in ([], ["--overwrite"]):
        for name, arguments in targets.onto_inputs().items():
            yield Case(row, " ".join([name, *more]), partial(targets.keep_input, arguments, more))
        yield Case(row, " ".join(["data as log.jsonl", *more]), partial(targets.log_as_data, more))
