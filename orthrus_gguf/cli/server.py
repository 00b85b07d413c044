"""orthrus-server: the model behind HTTP, for the clients that people already use."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes time to import
    from orthrus_gguf.entry import start

    start("server")

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from orthrus_gguf.auto.choice import policy_for
from orthrus_gguf.auto.costs import SharedCosts
from orthrus_gguf.cli import options
from orthrus_gguf.cli.answering import (
    add_answering_options,
    add_limit_options,
    add_thinking_options,
)
from orthrus_gguf.cli.loaded import Loaded, load, say
from orthrus_gguf.command import Parser, base_parser, run_command
from orthrus_gguf.drafting.plan import Plan
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.belong import fingerprint
from orthrus_gguf.runtime.cache_layout import cache_layout
from orthrus_gguf.runtime.load import RuntimeName

if TYPE_CHECKING:
    from orthrus_gguf.server.app import Settings
    from orthrus_gguf.server.service import Service

EXAMPLES = ("orthrus-server model.gguf [--port 8080] [-np 4]",)
DESCRIPTION = """\
Serve a GGUF model over HTTP: OpenAI's chat/completions, completions, responses and models,
Anthropic's messages, and llama-server's own endpoints (/openapi.json describes them all). Several
conversations run in one pass; the text of each is what orthrus-run gives with the same seed. Flags
are llama-server's. Ctrl-C lets the answers under way end, a second one does not."""


#: Conversations whose caches are kept, however small they are: a new one is compared with all.
MOST_KEPT = 64


def main(argv: Sequence[str] | None = None) -> int:
    """The `orthrus-server` command; returns the exit code."""
    return run_command(parser(), _run, argv)


def parser() -> Parser:
    """Reads the command line."""
    parser = base_parser("orthrus-server", EXAMPLES, DESCRIPTION)
    add_answering_options(parser, _add_server_options)
    parser.set_defaults(raw=False, system_prompt=None, special_in_prompt=False, stop=[])
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen at, or a path that ends in .sock (default: 127.0.0.1, which other"
        " machines cannot reach)",
    )
    group.add_argument(
        "--port", type=options.natural, default=8080, metavar="N", help="port (default: 8080)"
    )
    add_limit_options(
        group,
        context="context of each conversation in tokens",
        predict="most tokens of an answer, where a request does not say",
    )
    group.add_argument(
        "-np",
        "--parallel",
        type=options.positive,
        default=4,
        metavar="N",
        help="conversations in one pass, at most (default: 4)",
    )
    group.add_argument(
        "-cram",
        "--cache-ram",
        type=options.natural,
        default=8192,
        metavar="MIB",
        help="memory for the caches of conversations, idle ones included; -np of them are kept in"
        " any case, and on a GPU no more (default: 8192)",
    )
    group.add_argument(
        "--queue",
        type=options.natural,
        default=64,
        metavar="N",
        help="requests that may wait; more hear 429 (default: 64)",
    )
    group.add_argument("-a", "--alias", metavar="NAME[,NAME…]", help="names of the model")
    group.add_argument(
        "--api-key", metavar="KEY[,KEY…]", help="keys, one of which a request must bring"
    )
    group.add_argument("--api-key-file", metavar="FILE", help="the same, one a line")
    group.add_argument(
        "--cors",
        metavar="ORIGIN[,ORIGIN…]",
        help="pages from elsewhere that may use the server, * for all (default: none)",
    )
    group.add_argument("--api-prefix", default="", metavar="PATH", help="stands before all paths")
    group.add_argument("--ssl-cert-file", metavar="FILE", help="certificate for HTTPS")
    group.add_argument("--ssl-key-file", metavar="FILE", help="its private key")
    group.add_argument(
        "--slot-save-path", metavar="FOLDER", help="lets slots be saved to files in FOLDER"
    )
    group.add_argument("--metrics", action="store_true", help="counters for Prometheus at /metrics")
    for name in ("props", "slots"):
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=True,
            help=f"/{name} tells about the server (default: on)",
        )
    group.add_argument(
        "--webui",
        "--ui",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a page to chat with the model at / (default: on)",
    )
    group.add_argument(
        "--reasoning-budget",
        type=options.integer,
        default=-1,
        metavar="N",
        help="tokens that a thought may have where a request does not say; 0: no thought, -1: any"
        " number (default: -1)",
    )
    group.add_argument(
        "--reasoning-budget-message",
        default="",
        metavar="TEXT",
        help="what a thought that may have no more says before it ends",
    )
    add_thinking_options(group, unless=" and the request does not say")


def _run(args: argparse.Namespace) -> int:
    try:
        from orthrus_gguf.server.app import App
        from orthrus_gguf.server.serve import Address, serve
        from orthrus_gguf.server.slot_files import SlotFiles
    except ModuleNotFoundError as error:
        raise OrthrusError(
            f"the package {error.name} is missing: pip install 'orthrus-gguf[server]'"
        ) from error
    if (args.ssl_cert_file is None) != (args.ssl_key_file is None):
        raise OrthrusError("--ssl-cert-file and --ssl-key-file belong together; give both")
    address = Address(args.host, args.port, args.ssl_cert_file, args.ssl_key_file)
    settings = make_settings(args)
    path = options.model_path(args)
    if args.slot_save_path is not None:
        SlotFiles(
            Path(args.slot_save_path), ""
        )  # complains now, not when the model has been loaded
    drained = False
    with ExitStack() as resources:

        def ready() -> Service:
            service = start_service(path, args, settings, resources)
            url = f"{address.url}{settings.prefix}"
            say(f"{service.description}: {url}, {args.parallel} at once")
            return service

        drained = serve(App(settings), address, ready, say)
    if not drained:
        raise KeyboardInterrupt
    return 0


def make_settings(args: argparse.Namespace) -> Settings:
    """Of the application, as the flags say."""
    from orthrus_gguf.server.app import Settings

    return Settings(
        keys=_keys(args),
        cors=_listed(args.cors),
        prefix=_prefix(args.api_prefix),
        metrics=args.metrics,
        props=args.props,
        slots=args.slots,
        page=args.webui,
    )


def start_service(
    path: str, args: argparse.Namespace, settings: Settings, resources: ExitStack
) -> Service:
    """Load the model; what answers requests, and does so from now on."""
    from orthrus_gguf.server.slot_files import SlotFiles

    loaded = load(path, args, resources, conversations=args.parallel)
    if args.slot_save_path is not None:
        folder = Path(args.slot_save_path)
        settings.slot_files = SlotFiles(folder, _cache_identity(loaded, args))
    if loaded.compressor is not None:
        say(loaded.compressor.words)
    service = make_service(loaded, args)
    service.scheduler.start()
    return service


def make_service(loaded: Loaded, args: argparse.Namespace) -> Service:
    """What answers requests, as the flags say. Its scheduler is not started."""
    from orthrus_gguf.server.scheduler import Scheduler
    from orthrus_gguf.server.service import Service
    from orthrus_gguf.server.slots import Pool

    loaded.tokenizer.prepare()
    model, n_ctx = loaded.model, loaded.session.n_ctx
    first = [loaded.session]

    def session() -> Session:
        return first.pop() if first else Session(model, loaded.tokenizer, n_ctx)

    def policy(plan: Plan, sequences: Callable[[], int]) -> Policy:
        return policy_for(plan, model.config, lambda: SharedCosts(loaded.costs, sequences))

    scheduler = Scheduler(
        model,
        Pool(session, _kept(loaded, args)),
        policy,
        parallel=args.parallel,
        queue=args.queue,
        batch=args.batch_size,
    )
    names = _listed(args.alias) or [loaded.file.paths[0].stem]
    return Service(
        name=names[0],
        aliases=tuple(names[1:]),
        config=model.config,
        description=loaded.banner,
        tokenizer=loaded.tokenizer,
        template=loaded.template,
        scheduler=scheduler,
        plan=loaded.plan,
        sampling=loaded.sampling,
        random_seed=args.seed < 0,
        max_tokens=loaded.max_tokens,
        stop=loaded.stop,
        thinking=loaded.thinking,
        n_ctx=n_ctx,
        thought_tokens=max(args.reasoning_budget, -1),
        thought_end=args.reasoning_budget_message,
        compressor=loaded.compressor,
        say=say,
    )


def _kept(loaded: Loaded, args: argparse.Namespace) -> int:
    """Conversations whose caches are kept: as many as the memory for them holds. On a GPU it was
    planned for -np of them."""
    if loaded.settings.name is RuntimeName.CUDA:
        return int(args.parallel)
    types = args.cache_type_k or "f16", args.cache_type_v or "f16"
    configs = [loaded.file.config, *([loaded.drafter.config] if loaded.drafter else [])]
    row = sum(cache_layout(config, *types).row_bytes() for config in configs)
    size = row * loaded.session.n_ctx
    return max(int(args.parallel), min(int(args.cache_ram * 2**20 // size), MOST_KEPT))


def _cache_identity(loaded: Loaded, args: argparse.Namespace) -> str:
    """Caches that may be exchanged have the same: those of one file, whatever its name."""
    files = [file for file in (loaded.file, loaded.drafter) if file is not None]
    weights = " ".join(fingerprint(file.tensors, file.data) for file in files)
    return f"{weights} {type(loaded.model).__name__} {args.cache_type_k} {args.cache_type_v}"


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _keys(args: argparse.Namespace) -> list[str]:
    keys = _listed(args.api_key)
    if args.api_key_file is not None:
        try:
            lines = Path(args.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OrthrusError(f"--api-key-file {args.api_key_file}: {error}") from error
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise OrthrusError(f"--api-key-file {args.api_key_file}: holds no key")
    return keys


def _prefix(text: str) -> str:
    if text and not text.startswith("/"):
        raise OrthrusError(f"--api-prefix {text}: must begin with /")
    return text.rstrip("/")
