"""Two network namespaces of this machine, with a link of a limited rate between them; needs root."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

INTERFACE = "nplora0"  # in both namespaces
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_MEGABYTES = 64
# Sends zeros to a process that counts the seconds, and acknowledges the end.
_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5077)) as peer:
    peer.sendall(bytes(int(sys.argv[2])))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
"""
_RECEIVE = """
import json, socket, sys, time
with socket.create_server((sys.argv[1], 5077)) as server:
    print("ready", flush=True)
    peer, _ = server.accept()
    start, size, buffer = time.perf_counter(), 0, bytearray(1 << 20)
    while n := peer.recv_into(buffer):
        size += n
    print(json.dumps(8 * size / (time.perf_counter() - start)))
    peer.sendall(b".")
"""


@contextmanager
def linked(rate: str = "1gbit") -> Iterator[list[list[str]]]:
    """Make the namespaces. Yields, for each namespace, the words before a command that runs in it.

    Args:
        rate: the rate of the link in each direction, in the words of tc.
    """
    names = [f"nplora{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        first, second = names
        peer = ["peer", "name", INTERFACE, "netns", second]
        _run("ip", "link", "add", INTERFACE, "netns", first, "type", "veth", *peer)
        for name, address in zip(names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", device, "up")
            shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "20ms"]
            _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *shape)
        for name in names:
            _wait_until_up(name)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def measured_rate(prefixes: list[list[str]]) -> float:
    """Bits per second that a TCP connection carries from the first namespace to the second."""
    words = [*prefixes[1], sys.executable, "-c", _RECEIVE, ADDRESSES[1]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        _run(*prefixes[0], sys.executable, "-c", _SEND, ADDRESSES[1], str(_MEGABYTES << 20))
        return float(json.loads(receiver.stdout.readline()))


def _wait_until_up(name: str) -> None:
    """Wait until the kernel has set the new interface to "up". MPI does not use it before."""
    words = ["ip", "netns", "exec", name, "cat", f"/sys/class/net/{INTERFACE}/operstate"]
    for _ in range(100):
        if subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "up":
            return
        time.sleep(0.05)
    raise TimeoutError(f"{INTERFACE} in {name} is not up after 5 seconds")


def sent(prefix: list[str]) -> int:
    """The bytes that a namespace has sent over the link."""
    words = [*prefix, "cat", f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def _run(*words: str) -> None:
    subprocess.run(words, check=True)
