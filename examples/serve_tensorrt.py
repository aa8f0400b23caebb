"""A small server of one VAE over TensorRT: load once, warm up, several threads, stop cleanly.

    python examples/serve_tensorrt.py BUNDLE --port 8000
    curl --data-binary @latents.npy http://127.0.0.1:8000/decode --output image.png

Latents are float32 [B, C, h, w] as .npy, scaled as a diffusion model has them; the first image comes back as PNG. Any
bundle can be served: of ONNX it is the ONNX Runtime unless --backend says tensorrt, which builds its plans first.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from runtimes import OutOfMemoryError, ShapeError, VaeError, VaeRuntime, open_vae

LARGEST_REQUEST = 64 << 20  # bytes


def warm_up(vae: VaeRuntime, side: int) -> None:
    """The first call of a shape takes longer than all others: have it before anyone waits."""
    vae.latents_to_images(np.zeros((1, vae.config.latent_channels, side, side), np.float32))


def handler_of(vae: VaeRuntime) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            ready = self.path == "/health"
            self.answer(200 if ready else 404, f"{vae}\n".encode() if ready else b"POST latents to /decode\n")

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if self.path != "/decode" or not 0 < size <= LARGEST_REQUEST:
                self.close_connection = True  # the body was not read
                return self.answer(
                    404 if self.path != "/decode" else 413, b"POST latents, at most 64 MiB, to /decode\n"
                )
            try:
                latents = np.load(io.BytesIO(self.rfile.read(size)), allow_pickle=False)
                image = Image.fromarray(vae.latents_to_images(latents)[0])
            except (ValueError, EOFError, ShapeError) as error:
                return self.answer(400, f"{error}\n".encode())
            except OutOfMemoryError as error:
                return self.answer(503, f"{error}\n".encode())
            except VaeError as error:
                return self.answer(500, f"{error}\n".encode())
            body = io.BytesIO()
            image.save(body, "PNG")
            return self.answer(200, body.getvalue(), "image/png")

        def answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = False  # a request that is at work is finished before the engine goes


def serve(arguments: argparse.Namespace) -> None:
    options: dict[str, Any] = {"contexts": arguments.contexts} if arguments.contexts else {}
    with open_vae(arguments.bundle, backend=arguments.backend, **options) as vae:
        warm_up(vae, arguments.warm_up // vae.config.downscale)
        server = Server(("127.0.0.1", arguments.port), handler_of(vae))
        for number in (signal.SIGINT, signal.SIGTERM):
            # In a thread: shutdown waits for the loop that this handler interrupts.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"ready on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever(poll_interval=0.1)
        server.server_close()  # waits for requests at work
    print("stopped", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--backend", help="tensorrt or tensorrt-rtx for ONNX bundles")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--contexts", type=int, help="calls that run at once on the GPU")
    parser.add_argument("--warm-up", type=int, default=512, help="pixels a side of the first call")
    try:
        serve(parser.parse_args())
    except VaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
