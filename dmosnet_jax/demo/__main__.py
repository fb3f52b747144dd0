"""Serves the page: `python -m dmosnet_jax.demo --index=GALLERY --checkpoint=...` (`pip install 'dmosnet_jax[demo]'`).

Either may be left out: without a gallery two photos can be compared, and a gallery names the weights that made it. The
page is for this machine alone unless `--host` says otherwise; it asks nobody who they are.
"""

import argparse
import socket

from dmosnet_jax.core import command
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.evaluation.gallery import Gallery
from dmosnet_jax.export import serve


def main(argv: list[str] | None = None) -> int:
    """Serves until it is interrupted; returns the exit status."""
    parser = command.parser("dmosnet_jax.demo", __doc__)
    parser.add_argument("--index", default="", help="gallery, made by configs/index.py")
    parser.add_argument("--checkpoint", default="", help="weights; default those that the gallery names")
    parser.add_argument("--threshold", type=float, help="similarity of one person; default that of the weights' card")
    parser.add_argument("--top_k", type=int, default=12, help="images of the gallery that are shown")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 is every one")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    return command.guarded(lambda: _serve(args))


def _serve(args: argparse.Namespace) -> None:
    try:
        import uvicorn

        from dmosnet_jax.demo import app
    except ImportError as error:
        raise ConfigError(f"the page needs another package ({error.name}): pip install 'dmosnet_jax[demo]'") from error
    gallery = Gallery.open(args.index) if args.index else None
    checkpoint = args.checkpoint or (gallery.checkpoint if gallery else "")
    if not checkpoint:
        raise ConfigError("--checkpoint is not set, and no gallery names weights: give --checkpoint=PATH")
    # A gallery's own size and filter may differ from the weights' defaults, which its fingerprint tells.
    extractor = serve.load(checkpoint)
    if gallery is not None:
        gallery.check(extractor.fingerprint, checkpoint)
    if args.threshold is not None:
        extractor.threshold = args.threshold
    page = app.create(extractor, gallery, top_k=args.top_k, host=args.host)
    with _listen(args.host, args.port) as listening:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{listening.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(page, log_level="warning")).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 is any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(f"--host={host} --port={port}: can't be served on ({error}): give others") from error
    return listening


if __name__ == "__main__":
    # The server has handlers of its own.
    command.run_program(main, watch=False)
