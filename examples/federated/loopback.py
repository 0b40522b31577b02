"""Run the federation on this machine: a SuperLink and three SuperNodes on 127.0.0.1, each with its own data.

    python loopback.py model.gguf                            # all strategies, and training on the pooled data
    python loopback.py model.gguf frozen-b rounds=3 lr=1e-3  # one strategy, with other options

The data are words of The Devil's Dictionary: each client has another part of the alphabet. The losses are
means over the held-out words of all clients.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nplora
from nplora.cli.demo.dictionary import DATA

HERE = Path(__file__).parent
DEFAULTS = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
RATES = {"frozen-b": 1e-2, "combine": 4e-3, "average": 4e-3}  # unless lr=... is given
POOLED_RATE = 4e-3


def main() -> None:
    arguments = read_arguments(__doc__)
    model, changes = str(arguments.model), arguments.options
    config = DEFAULTS | {"lr": POOLED_RATE} | changes
    with tempfile.TemporaryDirectory() as place, ExitStack() as processes:
        clients = write_data(Path(place), config["clients"])
        pooled = pooled_loss(model, clients, config)
        print(f"pooled data: loss {pooled:.4f}", flush=True)
        environment = start(Path(place), model, clients, processes)
        for name in arguments.strategies or RATES:
            output = Path(place, name)
            options = {"wait-seconds": 60, "lr": RATES[name]} | changes
            options |= {"strategy": name, "output": str(output)}
            run = " ".join(f"{option}={json.dumps(value)}" for option, value in options.items())
            command = ["flwr", "run", str(HERE), "loopback", "--stream"]
            subprocess.run([*command, "--run-config", run], env=environment, check=True, stdout=sys.stderr)
            report = json.loads((output / "report.json").read_text())
            loss, size = report["losses"][str(config["rounds"])], report["megabytes"]
            found = f"loss {loss:.4f} ({loss / pooled - 1:+.1%})"
            if report["errors"]:  # there are none with differential privacy
                found += f", error of the aggregates up to {max(report['errors'].values()):.2g}"
            print(f"{name}: {found}, {size:.2f} MB a message", flush=True)


def read_arguments(description: str | None, strategies: Sequence[str] = tuple(RATES)) -> argparse.Namespace:
    """The command line: `model` (a path), `strategies` (names) and `options` (a dict of those given)."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = [option for option in DEFAULTS if option not in ("strategy", "output")]
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument(
        "words", nargs="*", metavar="STRATEGY|OPTION=VALUE",
        help=f"strategies: {', '.join(strategies)}; options: those of pyproject.toml, such as rounds=3",
    )  # fmt: skip
    arguments = parser.parse_args()
    if not arguments.model.is_file():
        parser.error(f"{arguments.model}: there is no such file")
    arguments.model = arguments.model.absolute()
    arguments.strategies, arguments.options = [], {}
    for word in arguments.words:
        name, is_option, value = word.partition("=")
        if not is_option and name in strategies:
            arguments.strategies.append(name)
        elif is_option and name in options:
            arguments.options[name] = toml_value(value)
        else:
            known = [*strategies, *(f"{option}=" for option in options)]
            parser.error(f"{word} is not one of {', '.join(known)}")
    return arguments


def toml_value(text: str) -> Any:
    """A value of TOML. A text needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def write_data(place: Path, clients: int) -> list[dict[str, Path]]:
    """Each client gets another part of the alphabet, and holds out every tenth word."""
    both = [(DATA / f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid")]
    lines = sorted(line for part in both for line in part)
    files = []
    for client in range(clients):
        own = lines[client * len(lines) // clients : (client + 1) * len(lines) // clients]
        parts = {"data": [line for i, line in enumerate(own) if i % 10], "valid": own[::10]}
        files.append({name: place / f"{name}{client}.jsonl" for name in parts})
        for name, part in parts.items():
            files[-1][name].write_text("\n".join(part) + "\n")
    return files


def pooled_loss(model: str, clients: list[dict[str, Path]], config: dict[str, Any]) -> float:
    """The loss after as many steps on the pooled data. A batch has as many rows as those of all clients."""
    with tempfile.TemporaryDirectory() as directory:
        report = nplora.finetune(
            model, [client["data"] for client in clients], Path(directory, "run"),
            valid=[client["valid"] for client in clients], steps=config["rounds"] * config["local-steps"],
            batch_examples=config["batch-examples"] * len(clients), lr=config["lr"], rank=config["rank"],
            alpha=config["alpha"], targets=config["targets"], layers=config["layers"] or None,
            schedule="constant", seed=config["seed"], keep="last", progress=False,
        )  # fmt: skip
    print(f"no training: loss {report.loss_before:.4f}")
    return report.loss_after


def start(place: Path, model: str, clients: list[dict[str, Path]], processes: ExitStack) -> dict[str, str]:
    """Start the SuperLink and the SuperNodes, and return the environment for `flwr run`."""
    home = place / "flower"
    home.mkdir()
    link, *others = free_ports(1 + len(clients))
    address = f"127.0.0.1:{link}"
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "{address}"\ninsecure = true\n')
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": programs, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    commands = [
        ["flower-superlink", "--insecure", "--port", str(link), "--disable-runtime-dependency-installation"]
    ]
    for own, files in zip(others, clients, strict=True):
        node = " ".join(f'{name}="{value}"' for name, value in {"model": model, **files}.items())
        options = ["--insecure", "--superlink", address, "--port", str(own), "--node-config", node]
        commands.append(["flower-supernode", *options])
    for number, command in enumerate(commands):
        log = processes.enter_context((place / f"{command[0]}-{number}.log").open("w"))
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        processes.callback(running.wait)
        processes.callback(running.terminate)
        if number == 0:  # the SuperLink; SuperNodes would give up without it
            wait_for(link, running, Path(log.name))
    return environment


def wait_for(port: int, superlink: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the SuperLink accepts connections.

    Raises:
        RuntimeError: it ended, or did not start within two minutes. The message has its output.
    """
    end = time.monotonic() + 120
    while superlink.poll() is None and time.monotonic() < end:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the SuperLink did not start:\n{log.read_text()}")


def free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        found = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in found]


if __name__ == "__main__":
    main()
