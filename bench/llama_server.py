"""llama.cpp's server as a peer. `python -m bench.llama_server DIR` builds it there, from the sources on PyPI.

The package llama-cpp-python holds the sources. The build needs cmake, ninja and a C++ compiler, and takes
about ten minutes on two cores. The benchmark takes the program from NPLORA_LLAMA_SERVER or from PATH.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

PACKAGE = "llama-cpp-python"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_NUMBER=1", "-DLLAMA_BUILD_COMMIT=sdist",
)  # fmt: skip
START = 60.0  # seconds that the server gets to load its model


def binary() -> str | None:
    """The server's program, or None if there is none."""
    return os.environ.get("NPLORA_LLAMA_SERVER") or shutil.which("llama-server")


def build(directory: Path) -> Path:
    """Download the sources, build the server, and return its program."""
    directory.mkdir(parents=True, exist_ok=True)
    download = ["download", "--no-deps", "--no-binary", PACKAGE, "-d", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", *download, PACKAGE], check=True)
    archive = max(directory.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(directory, filter="data")
    source = directory / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    made = directory / "build"
    subprocess.run(["cmake", "-S", str(source), "-B", str(made), "-G", "Ninja", *OPTIONS], check=True)
    subprocess.run(["cmake", "--build", str(made), "--target", "llama-server"], check=True)
    return made / "bin" / "llama-server"


class Server:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def stream(self, prompt: Sequence[int], count: int, **options: Any) -> Iterator[int]:
        """Generate `count` tokens after a prompt, and yield the number of tokens of each event."""
        connection = HTTPConnection("127.0.0.1", self.port)
        body = {
            "prompt": list(prompt), "n_predict": count, "temperature": 0, "ignore_eos": True, "stream": True,
            "cache_prompt": True, "return_tokens": True, **options,
        }  # fmt: skip
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            if response.status != 200:
                raise RuntimeError(f"llama-server: {response.status}: {response.read().decode()}")
            for line in response:
                if line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    yield len(event.get("tokens", ()))
        connection.close()


@contextmanager
def running(
    path: Path, slots: int, context: int, threads: int, adapters: Sequence[Path] = ()
) -> Iterator[Server]:
    """Run the server for a model. `context` is the number of tokens of each slot."""
    program = binary()
    assert program is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        program, "-m", str(path), "--port", str(port), "-np", str(slots), "-c", str(slots * context),
        "-t", str(threads), "-tb", str(threads), "--no-webui", "-ngl", "0",
    ]  # fmt: skip
    if adapters:
        command += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(process, port)
        yield Server(port)
    finally:
        process.terminate()
        process.wait()


def _await(process: "subprocess.Popen[bytes]", port: int) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with status {process.returncode}")
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=1)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"llama-server did not answer within {START:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.llama_server", description=__doc__)
    parser.add_argument("directory", type=Path)
    print(build(parser.parse_args().directory))
