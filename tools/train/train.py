"""Train the model from scratch on generated stories; every batch is new text. See README.md for the recipe."""

import argparse
import itertools
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import BitLinear, BitNet, Config
from stories import stories
from tokenizer import EOS

POOL_BATCHES = 32  # stories are sorted by length within a pool of this many batches, so rows need little padding
PAD = -100  # a target that does not count


def batches(tokenizer: Tokenizer, batch: int, skip: int, worker: int, n_workers: int):
    """Rows of one story each, BOS first: (ids [B, T], targets [B, T]), T a multiple of 16.

    All workers draw the same stories and each keeps its own rows of a batch.
    """
    eos = tokenizer.token_to_id(EOS)
    source = itertools.islice(stories(1, held_out=False), skip * batch, None)
    order = random.Random(0)
    while True:
        pool = [tokenizer.encode(text).ids + [eos] for text in itertools.islice(source, POOL_BATCHES * batch)]
        pool.sort(key=len)
        rows = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        order.shuffle(rows)
        for row in rows:
            yield pad(row[worker::n_workers])


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    t = math.ceil((max(map(len, rows)) - 1) / 16) * 16
    ids = torch.zeros(len(rows), t, dtype=torch.long)
    targets = torch.full((len(rows), t), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    return ids, targets


@torch.no_grad()
def held_out_loss(model: BitNet, tokenizer: Tokenizer, n_stories: int) -> float:
    """Mean loss a token on stories that are never trained on, all in f32."""
    eos = tokenizer.token_to_id(EOS)
    texts = itertools.islice(stories(0, held_out=True), n_stories)
    rows = sorted((tokenizer.encode(text).ids + [eos] for text in texts), key=len)
    total, n_tokens = 0.0, 0
    for i in range(0, len(rows), 16):
        ids, targets = pad(rows[i : i + 16])
        total += F.cross_entropy(model(ids, exact=True), targets.reshape(-1), ignore_index=PAD, reduction="sum").item()
        n_tokens += (targets != PAD).sum().item()
    return total / n_tokens


def schedule(step: int, n_steps: int, peak: float, warmup: int) -> tuple[float, float]:
    """(learning rate, weight decay): a linear decay that drops by a third at half time, when weight decay ends."""
    first = step < n_steps // 2
    p = peak if first else peak * 2 / 3
    end = 0.02 * peak
    if step < warmup:
        return p * (step + 1) / warmup, 0.1
    return p - (p - end) * (step - warmup) / (n_steps - warmup), 0.1 if first else 0.0


def average_gradients(parameters: list[torch.nn.Parameter], n_workers: int):
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= n_workers
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def train(worker: int, args: argparse.Namespace):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=worker, world_size=args.workers)
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = BitNet(Config())
    parameters = list(model.parameters())
    ternary = [m.weight for m in model.modules() if isinstance(m, BitLinear)]
    others = [p for p in parameters if all(p is not w for w in ternary)]
    groups = [{"params": ternary}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    step, n_tokens = 0, 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, n_tokens = saved["step"], saved["n_tokens"]
    dist.barrier()

    def say(line: str):
        if worker == 0:
            print(line, flush=True)

    say(f"{sum(p.numel() for p in parameters)} parameters, {sum(w.numel() for w in ternary)} of them ternary")
    began, tokens_before, running = time.time(), n_tokens, None
    for ids, targets in batches(tokenizer, args.batch, step, worker, args.workers):
        lr, decay = schedule(step, args.steps, args.peak, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = decay
        loss = F.cross_entropy(model(ids).float(), targets.reshape(-1), ignore_index=PAD)
        loss.backward()
        average_gradients(parameters, args.workers)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        step += 1
        counts = torch.tensor([(targets != PAD).sum(), loss.item()], dtype=torch.float64)
        dist.all_reduce(counts)
        n_tokens += int(counts[0])
        mean = counts[1].item() / args.workers
        running = mean if running is None else 0.98 * running + 0.02 * mean
        done = step == args.steps or step == args.stop
        if step % 20 == 0 or done:
            rate = (n_tokens - tokens_before) / (time.time() - began)
            say(f"step {step}/{args.steps} tokens {n_tokens} lr {lr:.2e} loss {running:.4f} {rate:.0f} tokens/s")
        if worker == 0 and (step % args.every == 0 or done):
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "n_tokens": n_tokens}
            torch.save(saved, args.checkpoint.with_suffix(".new"))
            args.checkpoint.with_suffix(".new").replace(args.checkpoint)
            held_out = held_out_loss(model, tokenizer, args.held_out)
            say(f"step {step} held-out loss {held_out:.4f} perplexity {math.exp(held_out):.3f}")
        if done:
            break
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder that holds tokenizer.json")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="written often; resumed if it exists")
    parser.add_argument("--steps", type=int, required=True, help="length of the schedule")
    parser.add_argument("--stop", type=int, help="leave after this step of the schedule")
    parser.add_argument("--batch", type=int, default=12, help="stories a step")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--held-out", type=int, default=48, help="held-out stories to measure at a checkpoint")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread that share a batch")
    args = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    mp.spawn(train, (args,), nprocs=args.workers)
