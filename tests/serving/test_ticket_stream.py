"""Chunks come from the engine's thread into the loop of the server."""

import asyncio
import threading

import pytest

pytest.importorskip("starlette")

from nplora.serving.api.ticket_stream import TicketStream
from nplora.serving.ticket import Chunk, Ticket, Usage


def test_the_chunks_of_a_round_wake_the_loop_once() -> None:
    tickets = [Ticket(1, lambda: False, lambda ticket: None) for _ in range(8)]

    def rounds(before: threading.Event) -> None:
        before.wait()
        for text in "abc":
            for ticket in tickets:
                ticket.put(Chunk(text), Usage(1))
        for ticket in tickets:
            ticket.end("stop", Usage(1, 0, 3))

    async def follow() -> tuple[list[str], int]:
        loop, wakes, texts = asyncio.get_running_loop(), 0, [""] * len(tickets)
        wake = loop.call_soon_threadsafe

        def counted(*arguments: object) -> asyncio.Handle:
            nonlocal wakes
            wakes += 1
            return wake(*arguments)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        stream, ready = TicketStream(tickets, 10), threading.Event()
        engine = threading.Thread(target=rounds, args=(ready,))
        engine.start()
        ready.set()
        engine.join()  # the loop is busy, so all rounds come at once
        async for found in stream.follow():
            assert found is not None
            index, chunk = found
            texts[index] += "" if chunk is None else chunk.text
        return texts, wakes

    assert asyncio.run(follow()) == (["abc"] * len(tickets), 1)
