"""Fuzzes the GGUF reader: python tests/fuzz/fuzz_gguf.py [--planted-bug] [OPTIONS] CORPUS...

OPTIONS are libFuzzer's. Any exception but a FormatError is a finding, and so is an accepted file that
cannot be written and read again.
"""

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["nplora.formats"]):
    from nplora.formats import gguf
    from nplora.formats.errors import FormatError, UnsupportedError
    from nplora.formats.gguf import header
    from nplora.formats.gguf.writer import MAX_NAME


def read(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        file = gguf.loads(data)
        for key in file.metadata:
            value = file.metadata[key]
            assert isinstance(value, str | int | float) or len(list(value)) == len(value)
        for tensor in file.values():
            with contextlib.suppress(UnsupportedError):
                assert tensor.numpy().shape == tensor.shape
        if all(len(name.encode()) <= MAX_NAME for name in file):
            written = gguf.dumps(file, file.metadata.typed())
            again = gguf.loads(written)
            assert gguf.dumps(again, again.metadata.typed()) == written


if __name__ == "__main__":
    if "--planted-bug" in sys.argv:
        sys.argv.remove("--planted-bug")
        header._check_layout = lambda *_: None  # tensors may lie anywhere
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
