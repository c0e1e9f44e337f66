"""Judge the exported files alone: NumPy in f32, nothing shared with the trainer.

Prints held-out perplexity, then stories at temperature 0.7 for ten seeds and one greedy story for each prompt.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from stories import stories


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    out = {}
    for name, info in json.loads(data[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + n + offset for offset in info["data_offsets"])
        if info["dtype"] == "U8":
            tensor = np.frombuffer(data[begin:end], np.uint8)
        else:
            assert info["dtype"] == "BF16", info["dtype"]
            tensor = (np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
        out[name] = tensor.reshape(info["shape"])
    return out


def unpack(packed: np.ndarray) -> np.ndarray:
    codes = np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    assert codes.max() <= 2, "code 3 is not a trit"
    return codes.astype(np.float32) - 1


class Model:
    def __init__(self, folder: Path):
        self.c = json.loads((folder / "config.json").read_text())
        self.t = read_safetensors(folder / "model.safetensors")
        self.trits = {name: unpack(t) for name, t in self.t.items() if t.dtype == np.uint8}
        self.e = self.t["model.embed_tokens.weight"]
        assert self.e.shape == (self.c["vocab_size"], self.c["hidden_size"])

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean = np.mean(x * x, -1, keepdims=True)
        return x / np.sqrt(mean + np.float32(self.c["rms_norm_eps"])) * self.t[f"model.{name}.weight"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        s = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
        codes = np.clip(np.rint(x * s), -128, 127)  # rint is half to even; the sums below stay exact in f32
        return codes @ self.trits[f"model.{name}.weight"].T * (self.t[f"model.{name}.weight_scale"] / s)

    def rope(self, x: np.ndarray, start: int) -> np.ndarray:
        half = x.shape[-1] // 2
        inv_freq = self.c["rope_theta"] ** (-np.arange(half) / half)
        angle = np.arange(start, start + x.shape[1])[:, None] * inv_freq
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, ids: list[int], cache: list) -> np.ndarray:
        """Logits [M, V] of the tokens `ids` that follow those in `cache` (one (k, v) a layer, extended here)."""
        c, m = self.c, len(ids)
        n_heads, n_kv = c["num_attention_heads"], c["num_key_value_heads"]
        d = c["hidden_size"] // n_heads
        start = cache[0][0].shape[1] if cache else 0
        h = self.e[ids]
        for i in range(c["num_hidden_layers"]):
            p = f"layers.{i}."
            a = self.norm(h, p + "input_layernorm")
            q, k, v = (
                self.linear(a, f"{p}self_attn.{part}_proj").reshape(m, -1, d).transpose(1, 0, 2) for part in "qkv"
            )
            q, k = self.rope(q, start), self.rope(k, start)
            if start:
                k, v = np.concatenate([cache[i][0], k], 1), np.concatenate([cache[i][1], v], 1)
                cache[i] = (k, v)
            else:
                cache.append((k, v))
            group = n_heads // n_kv
            scores = q @ k.repeat(group, 0).transpose(0, 2, 1) / np.float32(math.sqrt(d))
            scores[:, np.arange(start + m) > np.arange(start, start + m)[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y = (weights @ v.repeat(group, 0)).transpose(1, 0, 2).reshape(m, -1)
            h = h + self.linear(self.norm(y, p + "self_attn.attn_sub_norm"), p + "self_attn.o_proj")
            a = self.norm(h, p + "post_attention_layernorm")
            z = np.maximum(self.linear(a, p + "mlp.gate_proj"), 0) ** 2 * self.linear(a, p + "mlp.up_proj")
            h = h + self.linear(self.norm(z, p + "mlp.ffn_sub_norm"), p + "mlp.down_proj")
        return self.norm(h, "norm") @ self.e.T


def perplexity(model: Model, tokenizer: Tokenizer, n_stories: int) -> float:
    total, n_tokens = 0.0, 0
    for text in itertools.islice(stories(0, held_out=True), n_stories):
        ids = tokenizer.encode(text).ids + [model.c["eos_token_id"]]
        logits = model.forward(ids[:-1], []).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
        n_tokens += len(ids) - 1
    return math.exp(total / n_tokens)


def generate(model: Model, tokenizer: Tokenizer, prompt: str, temperature: float, seed: int, n_tokens: int = 400) -> str:
    random = np.random.default_rng(seed)
    ids, cache = tokenizer.encode(prompt).ids, []
    new = ids
    for _ in range(n_tokens):
        logits = model.forward(new, cache)[-1].astype(np.float64)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p = np.exp((logits - logits.max()) / temperature)
            token = int(random.choice(len(p), p=p / p.sum()))
        if token == model.c["eos_token_id"]:
            return tokenizer.decode(ids) + " [end]"
        ids, new = ids + [token], [token]
    return tokenizer.decode(ids)


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("folder", type=Path)
    args.add_argument("--held-out", type=int, default=200, help="stories of the held-out side to measure; 0 for none")
    args.add_argument("--seeds", type=int, default=10)
    args = args.parse_args()
    model = Model(args.folder)
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    if args.held_out:
        print(f"held-out perplexity of {args.held_out} stories: {perplexity(model, tokenizer, args.held_out):.4f}\n")
    prompts = ["Once upon a time", "One day, a little fox"]
    for seed in range(args.seeds):
        print(f"--- seed {seed}\n{generate(model, tokenizer, prompts[0], 0.7, seed)}\n")
    for prompt in prompts:
        print(f"--- greedy\n{generate(model, tokenizer, prompt, 0, 0)}\n")
