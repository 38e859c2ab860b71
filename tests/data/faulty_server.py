"""A real S3 server, behind a proxy that does to answers what networks and busy stores do."""

import contextlib
import http.client
import http.server
import socket
import struct
import threading
import time

from moto import server


class FaultyProxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server, and its answers back.

    Attributes:
      faults: what happens to the next requests for parts of files, in turn: a status such as 503,
        "reset", "short" (the connection ends in the middle of the answer), "slow", or None.
      is_down: everything is reset.
      ranges: (path, bytes) of what was asked for.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.faults, self.is_down, self.ranges = address, [], False, []
        self.slow = 1.0  # seconds
        self.lock = threading.Lock()

    def next_fault(self):
        with self.lock:
            return self.faults.pop(0) if self.faults else None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(OSError):
            super().handle()

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.is_down:
            return self.reset()
        fault = None
        if self.command == "GET" and "Range" in self.headers:
            fault = self.server.next_fault()
        if isinstance(fault, int):
            return self.answer(fault, {}, b"<Error><Code>SlowDown</Code></Error>")
        if fault == "reset":
            return self.reset()
        if fault == "slow":
            time.sleep(self.server.slow)
        target = http.client.HTTPConnection(*self.server.target)
        target.request(self.command, self.path, body, dict(self.headers))
        found = target.getresponse()
        data, headers = found.read(), dict(found.getheaders())
        if "Range" in self.headers:
            self.server.ranges.append((self.path, len(data)))
        if fault == "short":
            self.answer(found.status, headers, data[: len(data) // 2], len(data))
            return self.reset()
        return self.answer(found.status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def answer(self, status, headers, data, length=None):
        self.send_response_only(status)
        length = headers.get("Content-Length", length or len(data))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def reset(self):
        """Ends the connection at once, without goodbye."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


@contextlib.contextmanager
def run():
    """The proxy, in front of an S3 server."""
    store = server.ThreadedMotoServer(port=0)
    store.start()
    proxy = FaultyProxy(store.get_host_and_port())
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        store.stop()
