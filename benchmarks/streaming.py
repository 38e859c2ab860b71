"""Rows a second of a dataset that is read where it is, against one on this machine's disk.

    python benchmarks/streaming.py --workdir=runs/streaming

The dataset is that of loader.py. A small server on another core answers as S3 does, each request
after `--answer_ms`. `data.pipeline.latents` reads batches of 32, shuffled, as a training does: of a
dataset on this machine; streamed from the server, without a cache, with an empty one and with a
full one; and streamed from the folder, as from a mounted bucket. All of it in one process that may
use one core.
"""

import argparse
import http.server
import itertools
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from benchmarks import loader  # noqa: E402
from opensora_jax.data import pipeline  # noqa: E402
from opensora_jax.data.dataset import open_dataset  # noqa: E402
from opensora_jax.data.streaming import Streaming, readings  # noqa: E402


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers HEAD and GET, of a range or of all, of /bucket/NAME with a file below `folder`."""

    protocol_version = "HTTP/1.1"
    folder, seconds = Path("."), 0.0

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        time.sleep(self.seconds)
        path = self.folder / self.path.split("?")[0].removeprefix("/bucket/")
        if not path.is_file():
            self.send_response_only(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        first, last = 0, size - 1
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2]), last)
            self.send_response_only(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response_only(200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.flush()
            with path.open("rb") as file:
                self.connection.sendfile(file, first, last + 1 - first)


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().server_bind()


def serve(folder: Path, seconds: float) -> None:
    Handler.folder, Handler.seconds = folder, seconds
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


def read(address: str | Path, streaming: Streaming | None, n: int) -> tuple[float, dict]:
    """(seconds for n rows, what the log would say)."""
    dataset = open_dataset(address, streaming)
    bucket = pipeline.Bucket(dataset, np.arange(len(dataset)), loader.LATENT[0], loader.BATCH)
    batches = pipeline.latents([bucket], text_length=loader.TEXT_SHAPE[0], seed=0)
    start = time.perf_counter()
    for _ in itertools.islice(batches, n // loader.BATCH):
        pass
    seconds = time.perf_counter() - start
    if not dataset.streamed:
        return seconds, {}
    dataset.streamed.close()
    return seconds, readings([dataset.streamed], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer_ms", type=float, default=30.0)
    parser.add_argument("--serve", action="store_true", help="used by the script itself")
    args = parser.parse_args()
    folder, cache = args.workdir.absolute(), args.workdir / "cache"
    if args.serve:
        serve(folder, args.answer_ms / 1000)
        return
    loader.make_dataset(folder / "dataset", args.rows)
    cores = sorted(os.sched_getaffinity(0))
    words = [sys.executable, __file__, "--serve", f"--workdir={folder}"]
    server = subprocess.Popen(
        [*words, f"--answer_ms={args.answer_ms}"], stdout=subprocess.PIPE, text=True
    )
    try:
        os.sched_setaffinity(server.pid, {cores[-1]})
        os.sched_setaffinity(0, {cores[0]})
        os.environ |= {
            **{"AWS_ACCESS_KEY_ID": "-", "AWS_SECRET_ACCESS_KEY": "-"},
            **{"AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(folder / "fetched")},
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
        }
        local, remote = folder / "dataset", "s3://bucket/dataset"
        kept, none = Streaming(cache, 10**12), Streaming(cache, 0)
        ways = {
            "on this machine": (local, None),
            "streamed, no cache": (remote, none),
            "streamed, empty cache": (remote, kept),
            "streamed, full cache": (remote, kept),
            "streamed from a folder, no cache": (local, none),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        said = {}
        for round_ in range(args.rounds + 1):
            for name, (address, streaming) in ways.items():
                if name == "streamed, empty cache":
                    shutil.rmtree(cache, ignore_errors=True)
                found, said[name] = read(address, streaming, args.rows)
                if round_:  # in the first one the files are read, and checked
                    seconds[name].append(found)
    finally:
        server.kill()
    first = statistics.median(seconds["on this machine"])
    n_bytes = 2 * (np.prod(loader.LATENT) + np.prod(loader.TEXT_SHAPE))
    print("| way | rows a second | MB a second | times the first | rows_read_per_second |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, values in seconds.items():
        median = statistics.median(values)
        rate, logged = args.rows / median, said[name].get("rows_read_per_second")
        print(
            f"| {name} | {rate:,.0f} | {rate * n_bytes / 1e6:,.0f} | {first / median:.2f} | "
            f"{f'{logged:,.0f}' if logged else '-'} |"
        )


if __name__ == "__main__":
    main()
