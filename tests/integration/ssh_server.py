"""An SSH server that forwards ports for those with a key: `ssh_server.py HOST_KEY USERS`."""

from __future__ import annotations

import asyncio
import sys

import asyncssh


class Forwarder(asyncssh.SSHServer):
    """Lets those in that the file of keys names; they may forward any port."""

    def connection_requested(self, *_: object) -> bool:
        return True

    def server_requested(self, *_: object) -> bool:
        return True


async def serve(host_key: str, users: str) -> None:
    """Until the process is killed."""
    await asyncssh.listen(
        port=22, server_host_keys=[host_key], authorized_client_keys=users, server_factory=Forwarder
    )
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:3]))
