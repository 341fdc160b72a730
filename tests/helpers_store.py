"""An S3 API served here, and a gate before it that refuses or delays as it is told."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from threading import Lock, Thread
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

SECRETS = {"AWS_ACCESS_KEY_ID": "AKIAPLANTED0KEY", "AWS_SECRET_ACCESS_KEY": "planted-secret-of-the-store"}


@dataclass
class Weather:
    """How the store behaves: share of requests answered with 503, seconds before each answer."""

    refuse: float = 0.0
    delay: float = 0.0
    next_reads: int = 0
    """Reads to refuse, those that come next."""
    refused: int = 0
    served: int = 0
    rng: Random = field(default_factory=lambda: Random(0))
    lock: Lock = field(default_factory=Lock)

    def refuses(self, method: str) -> bool:
        """Whether this request is answered with 503."""
        with self.lock:
            due = method == "GET" and self.next_reads > 0
            self.next_reads -= due
            out = due or self.rng.random() < self.refuse
            self.refused, self.served = self.refused + out, self.served + (not out)
            return out


def environment(endpoint: str) -> dict[str, str]:
    """What finds the store, with keys that must not be written anywhere."""
    fixed = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    return SECRETS | fixed | {"AWS_ENDPOINT_URL": endpoint}


def client(endpoint: str) -> Any:
    """Of a test itself, past every gate."""
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="k",
                        aws_secret_access_key="s")  # fmt: skip


@contextmanager
def store(bucket: str) -> Iterator[str]:
    """A store with an empty bucket for the block; yields its endpoint."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client(endpoint).create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        server.stop()


@contextmanager
def gate(endpoint: str, weather: Weather) -> Iterator[str]:
    """A proxy on loopback before a store; yields its own endpoint."""
    target = endpoint.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.body()
            time.sleep(weather.delay)
            if weather.refuses(self.command):
                return self.answer(503, [], b"<Error><Code>SlowDown</Code><Message>Slow down</Message></Error>")
            connection = http.client.HTTPConnection(target, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
            connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            reply = connection.getresponse()
            content = reply.read()
            connection.close()
            return self.answer(reply.status, reply.getheaders(), content)

        def body(self) -> bytes:
            """All of it: pyarrow uploads in chunks, whose length comes before each."""
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return b"".join(parts)

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = next((v for n, v in headers if n.lower() == "content-length"), str(len(content)))
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield "http://{}:{}".format(*server.server_address)
    finally:
        server.shutdown()
        server.server_close()
