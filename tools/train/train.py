"""Train the model from scratch on generated stories; every batch is new text. See README.md for the recipe."""

import argparse
import itertools
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import BitLinear, BitNet, Config
from stories import stories
from tokenizer import EOS

POOL_BATCHES = 32  # stories are sorted by length within a pool of this many batches, so rows need little padding
PAD = -100  # a target that does not count


def batches(tokenizer: Tokenizer, batch: int, skip: int):
    """Rows of one story each, BOS first: (ids [B, T], targets [B, T]), T a multiple of 16."""
    eos = tokenizer.token_to_id(EOS)
    source = itertools.islice(stories(1, held_out=False), skip * batch, None)
    order = random.Random(0)
    while True:
        pool = [tokenizer.encode(text).ids + [eos] for text in itertools.islice(source, POOL_BATCHES * batch)]
        pool.sort(key=len)
        rows = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        order.shuffle(rows)
        yield from map(pad, rows)


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    t = math.ceil((max(map(len, rows)) - 1) / 16) * 16
    ids = torch.zeros(len(rows), t, dtype=torch.long)
    targets = torch.full((len(rows), t), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    return ids, targets


def loss_of(model: BitNet, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).float(), targets.reshape(-1), ignore_index=PAD)


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


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("model", type=Path, help="folder that holds tokenizer.json")
    args.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="written often; resumed if it exists")
    args.add_argument("--steps", type=int, required=True)
    args.add_argument("--batch", type=int, default=8, help="stories a step")
    args.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    args.add_argument("--warmup", type=int, default=60)
    args.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    args.add_argument("--stop", type=int, help="leave after this many steps of the schedule")
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--compile", action="store_true")
    args = args.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = BitNet(Config())
    ternary = {m.weight for m in model.modules() if isinstance(m, BitLinear)}
    groups = [
        {"params": [p for p in model.parameters() if p in ternary]},
        {"params": [p for p in model.parameters() if p not in ternary], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    step, n_tokens = 0, 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, n_tokens = saved["step"], saved["n_tokens"]
    run = torch.compile(loss_of, dynamic=True) if args.compile else loss_of

    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters} parameters, {sum(p.numel() for p in ternary)} of them ternary", flush=True)
    began, tokens_before, running = time.time(), n_tokens, None
    for ids, targets in batches(tokenizer, args.batch, step):
        lr, decay = schedule(step, args.steps, args.peak, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = decay
        loss = run(model, ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        n_tokens += (targets != PAD).sum().item()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        done = step == args.steps or step == args.stop
        if step % 20 == 0 or done:
            rate = (n_tokens - tokens_before) / (time.time() - began)
            print(f"step {step}/{args.steps} tokens {n_tokens} lr {lr:.2e} loss {running:.4f} {rate:.0f} tokens/s", flush=True)
        if step % args.every == 0 or done:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "n_tokens": n_tokens}
            torch.save(saved, args.checkpoint.with_suffix(".new"))
            args.checkpoint.with_suffix(".new").replace(args.checkpoint)
            held_out = held_out_loss(model, tokenizer, 64)
            print(f"step {step} held-out loss {held_out:.4f} perplexity {math.exp(held_out):.3f}", flush=True)
        if done:
            break


if __name__ == "__main__":
    main()
