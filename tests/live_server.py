"""A server in a thread for tests: a tiny random model with the shipped tokenizer, or scripted tokens."""

import contextlib
import socket
import threading
import time

import torch
import uvicorn

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.serve import batch as serve_batch
from minimind_fast.serve.app import Service, make_app
from minimind_fast.serve.batch import Batcher

TOKENIZER = mm.Tokenizer.load(samples.path("tokenizer"))
SCRIPTS: dict[int, list[int]] = {}  # seed -> the tokens that a request with it gets
honest_pick = serve_batch.pick


def scripted_pick(jobs, logits):
    """The model's own choice, save for the seeds of SCRIPTS."""
    own = honest_pick(jobs, logits)
    return [SCRIPTS[j.seed][j.count] if j.seed in SCRIPTS else t for j, t in zip(jobs, own, strict=True)]


def tiny_model():
    """Untied, since a random model with a tied head says its last token again and again; and as sure as a trained one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape["tie_word_embeddings"] = False
    model = mm.MiniMind(mm.ModelConfig.preset("tiny", **shape)).eval()
    model.lm_head.weight.data *= 25
    return model


@contextlib.contextmanager
def serving(rows=8, context=512, queue=64, chunk=48, model=None, **service):
    """(url, Service) of a running server."""
    batcher = Batcher(model or tiny_model(), rows, context, queue, chunk)
    made = Service(TOKENIZER, batcher, "tiny", **{"max_output_tokens": 200, "default_output_tokens": 100, **service})
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(made), log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", made
        finally:
            server.should_exit = True
            thread.join()


def wait_for(condition, seconds=10.0):
    """Wait until something is so; fail if it is not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
