"""What serve.py does once its arguments are right: the model loaded, rank 0 listening, the others following."""

import argparse
import signal
import socket
import time
from dataclasses import replace

from megatron_deepseek import __version__
from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.inference.loading import checked_length, join_ranks, load_model
from megatron_deepseek.inference.model_files import ModelFiles
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.serving import server
from megatron_deepseek.serving.access import Access, is_loopback, read_keys
from megatron_deepseek.serving.app import make_app
from megatron_deepseek.serving.chat import AUTO, ChatFormat
from megatron_deepseek.serving.limits import Limits
from megatron_deepseek.serving.sampling_fields import Defaults
from megatron_deepseek.serving.service import ServedModel, Service

USUAL_LENGTH = 8192  # tokens of a text, for models that can see more
_IDLE_MINUTES = 7 * 24 * 60  # for which other ranks wait for a request


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal; return the exit status."""
    bound = server.bind(args.host, args.port) if options.leads() else None
    files = options.open_files(args)
    length = checked_length(files.config, args.seq_length, "--max-model-len")
    length = length if args.seq_length else min(length, USUAL_LENGTH)
    chat, about_chats = chat_of(args, files)
    model = load_model(files, join_ranks(options.layout_of(args), _IDLE_MINUTES), options.load_settings(args, length))
    replicas = Replicas(model, options.engine_settings(args, length), stream=True)
    replicas.engine.prepare_grammars()
    options.warm_up(args, replicas)
    if not replicas.leads:
        for each in (signal.SIGINT, signal.SIGTERM):  # rank 0 ends in order, and then says so
            signal.signal(each, signal.SIG_IGN)
        replicas.follow()
        return 0
    limits = limits_of(args, replicas.layout.dp)
    service = Service(replicas, served_model(args, files, length), limits, chat, args.verbose)
    app = make_app(service, access_of(args, bound), __version__, args.verbose, args.log_requests)
    return server.serve(app, service, bound, limits,
                        lambda: say_ready(service.model.name, server.url_of(bound), about_chats))


def limits_of(args: argparse.Namespace, num_replicas: int) -> Limits:
    return Limits(running=args.max_running * num_replicas, queue=args.max_queue, body_bytes=args.max_body,
                  body_seconds=args.body_seconds, request_seconds=args.request_seconds,
                  drain_seconds=args.drain_seconds, idle_seconds=args.idle_seconds, connections=args.max_connections)


def access_of(args: argparse.Namespace, bound: socket.socket) -> Access:
    """Return who may ask the server that will listen there."""
    keys = read_keys(args.api_key_file) if args.api_key_file else ()
    return Access(keys, tuple(args.allowed_origins), local=is_loopback(bound.getsockname()[0]))


def chat_of(args: argparse.Namespace, files: ModelFiles) -> tuple[ChatFormat | None, str]:
    """Return the form of the model's chats, and what is said of it.

    Where the tokenizer tells of none, and none was asked for, it is None: the model still completes texts.
    """
    try:
        chat = options.chat_format(args, files, args.thinking)
        return chat, f"chats as {chat.name}"
    except ValueError as error:
        if args.template != AUTO:
            raise
        return None, f"no chats: {error}"


def served_model(args: argparse.Namespace, files: ModelFiles, length: int) -> ServedModel:
    """Return the model's names, and its own sampling as far as a request may have it."""
    names = tuple(args.served_model_name or [args.load.resolve().name])
    usual = files.defaults.max_tokens if files.defaults.max_tokens != args.usual.max_tokens else None
    sampling = replace(files.defaults, max_tokens=length, n=1, logprobs=None, prompt_logprobs=None)
    return ServedModel(names, Defaults(sampling, length), usual, int(time.time()))


def say_ready(name: str, url: str, about_chats: str) -> None:
    """Say where the server is, in a line of its own, which is the first one of its output."""
    print(f"serving {name} at {url}\nAPI at {url}/v1, {about_chats}", flush=True)
