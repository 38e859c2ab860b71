"""A web server of this machine's, and one that nobody likes to meet."""

import contextlib
import functools
import http.server
import threading


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A folder; what has one of these words in its name fares otherwise."""

    def send_head(self):
        if "never" in self.path:
            self.server.ended.wait(600)
            return None
        for word in ("403", "500"):
            if word in self.path:
                self.send_error(int(word))
                return None
        if "cut" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(folder):
    """The address of a folder."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.ended, server.daemon_threads = threading.Event(), True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.ended.set()
            server.shutdown()
