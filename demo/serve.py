"""Serve the page on this machine only: python demo/serve.py

`python -m http.server` in this folder works, too, without the headers that let the page use threads.
"""

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
POLICY = ("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
          "style-src 'self'; img-src data:; media-src blob:; base-uri 'none'; form-action 'none'")
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
           "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
           "Cache-Control": "no-cache"}
NEEDED = {"student.onnx": "python export.py demo/student.onnx",
          "node_modules/onnxruntime-web": "npm --prefix demo install"}


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, with HEADERS."""
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}

    def end_headers(self):
        for header in HEADERS.items():
            self.send_header(*header)
        super().end_headers()

    def log_message(self, *_):
        pass


def server(folder=FOLDER, port=0):
    """A server of `folder` on the loopback interface; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    args = parser.parse_args()
    for name, command in NEEDED.items():
        if not (FOLDER / name).exists():
            print(f"demo/{name} is missing: run {command}", flush=True)
    try:
        with server(port=args.port) as serving:
            print(f"http://localhost:{serving.server_port}/ (Ctrl-C ends it)", flush=True)
            serving.serve_forever()
    except (OSError, OverflowError) as error:
        print(f"error: port {args.port} cannot be used ({error}): name another one", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
