"""Fuzzes the safetensors reader: python tests/fuzz/fuzz_safetensors.py [--planted-bug] [OPTIONS] CORPUS...

OPTIONS are libFuzzer's. Any exception but a FormatError is a finding, and so is an accepted file that
cannot be written and read again.
"""

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["nplora.formats"]):
    from nplora.formats import safetensors
    from nplora.formats.errors import FormatError


def read_also_with_the_header_length_made_right(data: bytes) -> None:
    """Most mutations change the length of the JSON, and would be refused for that alone."""
    read(data)
    length = max(0, data.rfind(b"}") + 1 - 8)
    read(length.to_bytes(8, "little") + data[8:])


def read(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        file = safetensors.loads(data)
        for name, entry in file.entries.items():
            assert file[name].numpy().shape == entry.shape
        written = safetensors.dumps(file, file.metadata)
        again = safetensors.loads(written)
        assert safetensors.dumps(again, again.metadata) == written


if __name__ == "__main__":
    if "--planted-bug" in sys.argv:
        sys.argv.remove("--planted-bug")
        safetensors._check_layout = lambda *_: None  # tensors may lie anywhere
    atheris.Setup(sys.argv, read_also_with_the_header_length_made_right)
    atheris.Fuzz()
