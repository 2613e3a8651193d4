"""`serve`: rewards over HTTP from a checkpoint, for machines without vLLM, SGLang or LMDeploy.

One process, one model, one rank. Here: the address, the token, the process; endpoints are in application.py.
"""

import functools
import ipaddress
import math
import os
import signal
import socket
from collections.abc import Callable

import uvicorn

from megatron_polar import log
from megatron_polar.errors import UserError
from megatron_polar.score.scorer import Scorer
from megatron_polar.serve.application import Application, ServeOptions
from megatron_polar.serve.connection import Connection
from megatron_polar.serve.token import TOKEN_VARIABLE


def serve(load: Callable[[], Scorer], options: ServeOptions) -> None:
    """Listen, load the model, answer until SIGTERM or Ctrl-C; what is in flight then is still answered.

    Raises UserError for an address that cannot be had, and what `load` raises.
    """
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    if world_size > 1:
        raise UserError(
            f"serve was started on {world_size} ranks and works on one; start it without torchrun or srun (for a model "
            f"that needs several GPUs: export it with megatron-polar convert to-hf and serve it with vLLM or SGLang)"
        )
    is_open = options.token is None and not _is_loopback(options.host)
    if is_open and not os.environ.get(TOKEN_VARIABLE, "unset").strip():  # somebody meant to have one
        raise UserError(
            f"--host {options.host}: the environment variable {TOKEN_VARIABLE} is empty, and the server would be open "
            "to every machine that reaches it; put a token into it, or unset it"
        )
    listener = _listen(options.host, options.port)
    address = f"http://{options.host}:{listener.getsockname()[1]}"
    if is_open:
        log.warn(f"{address} is open to every machine that reaches it: give --token-file, or keep to 127.0.0.1")
    application = Application(load, options)
    config = uvicorn.Config(
        application.asgi,
        http=functools.partial(Connection, limits=options.limits),
        loop="asyncio",
        ws="none",
        log_level="critical",  # our own lines say what matters, and never what a client wrote
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=options.limits.keep_alive_seconds,
        timeout_graceful_shutdown=math.ceil(options.limits.request_seconds),
    )
    server = uvicorn.Server(config)
    application.on_failure = functools.partial(setattr, server, "should_exit", True)
    # uvicorn catches SIGTERM and raises it again when it has stopped; by then all is done that was asked for.
    signal.signal(signal.SIGTERM, lambda *_: None)
    log.info(f"{address}: loading {options.settings.model} (GET /ready tells when it can be asked)")
    server.run(sockets=[listener])
    if application.failure is not None:
        raise application.failure
    log.info(f"{address}: stopped")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and (error.errno or 0) > 0 else str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another one") from None
    # Without this, replies of two writes (head, body) wait 40 ms for a delayed ACK. Connections inherit it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
