"""Whether the Hugging Face hub can be reached, found out in seconds instead of by its client's retries."""

import os
import socket
import threading
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from learnkv.errors import UserError

CONNECT_SECONDS = 4.0


def hub_fault() -> str | None:
    """Why the hub cannot be used: it cannot be reached, or HF_HUB_OFFLINE is set. None where it can."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"

    from huggingface_hub import constants

    return _connection_fault(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)


def check_hub(argument: str) -> None:
    """Raise UserError, naming the argument, where the hub cannot be reached and is not switched off.

    Data sets have no switch of their own that reads earlier downloads alone.
    """
    fault = hub_fault()
    if fault and "HF_HUB_OFFLINE" not in fault:
        raise UserError(f"{argument}: no such file, and {fault}; HF_HUB_OFFLINE=1 uses earlier downloads")


@lru_cache(maxsize=4)
def _connection_fault(endpoint: str) -> str | None:
    """Why no connection to the endpoint, or to the proxy in front of it, is made within `CONNECT_SECONDS`."""
    url = urlsplit(endpoint)
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
    fault = ["no answer"]

    def connect() -> None:
        try:
            socket.create_connection(address, CONNECT_SECONDS).close()
            fault.clear()
        except OSError as error:
            fault[:] = [error.strerror or str(error)]

    attempt = threading.Thread(target=connect, daemon=True)  # name resolution has no timeout of its own
    attempt.start()
    attempt.join(CONNECT_SECONDS + 1)
    return f"{address[0]} cannot be reached ({fault[0]})" if fault else None
