"""A TCP proxy before a server, which can refuse, stall, slow down or cut connections."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from benchmarks.campaign.process import FORK
from benchmarks.campaign.servers import free_port

MODES = ("pass", "refuse", "stall", "slow", "cut")  # cut: the request arrives, the answer is lost


class Proxy:
    """The proxy in a process of its own; connect to `port`, and set `mode`."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_port()
        self._mode = FORK.Value("i", 0)
        self._process = FORK.Process(target=self._run)
        self._process.start()

    @property
    def mode(self) -> str:
        """One of MODES."""
        return MODES[self._mode.value]

    @mode.setter
    def mode(self, mode: str) -> None:
        self._mode.value = MODES.index(mode)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.chdir(Path("/"))
        with contextlib.suppress(OSError):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
        await server.serve_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "refuse":
            writer.transport.abort()
            return
        try:
            answers, requests = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(self._copy(reader, requests, False), self._copy(answers, writer, True))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while content := await source.read(1 << 14):
                while self.mode == "stall":
                    await asyncio.sleep(0.05)
                if self.mode == "refuse" or (self.mode == "cut" and is_answer):
                    target.transport.abort()
                    return
                if self.mode == "slow":
                    await asyncio.sleep(0.2)
                target.write(content)
                await target.drain()
        target.close()
