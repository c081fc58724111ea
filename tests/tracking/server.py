"""A real MLflow server that a test starts, kills and starts again, and a real proxy before it that misbehaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` on loopback, over any backend store; artifacts go through it, as in a team."""

    def __init__(self, folder: Path, backend: str | None = None, port: int | None = None) -> None:
        self.folder, self.port = folder, port or free_port()
        self.backend = backend or f"sqlite:///{folder / 'server.db'}"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120) -> Server:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.backend, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "files"), "--host", "127.0.0.1"]
        log = (self.folder / "server.log").open("ab")
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stdout=log, stderr=log,
                                        start_new_session=True, env=os.environ | quiet)  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urlopen(f"{self.uri}/health", timeout=5).read()
                return self
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """End it without a word to anybody."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None


class Proxy:
    """Passes requests on to a server, or does what `mode` says.

    `pass`; `fail`: answers 500; `hang`: answers nothing; `lose`: passes on, and answers 500 all the same.
    """

    def __init__(self, port: int) -> None:
        self.mode, self.seen, self.target = "pass", 0, port
        self.quiet = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                proxy.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.seen += 1
        if self.mode == "hang":
            self.quiet.wait(60)
            request.close_connection = True
            return
        status, payload, kind = 500, b"out of order", "text/plain"
        if self.mode in ("pass", "lose"):
            connection = HTTPConnection("127.0.0.1", self.target, timeout=60)
            headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "connection")}
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            got = response.read()
            if self.mode == "pass":
                status, payload, kind = response.status, got, response.headers.get("Content-Type", "text/plain")
            connection.close()
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(payload)))
        request.end_headers()
        request.wfile.write(payload)

    def close(self) -> None:
        self.quiet.set()
        self.server.shutdown()
        self.server.server_close()
