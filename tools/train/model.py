"""BitNet b1.58 with the quantisers in the forward pass: what transformers calls BitNetForCausalLM.

Latent weights are f32. A forward pass sees what a file will hold: ternary matrices with one bf16 scale each, int8
activations with one scale a token, and bf16 embeddings and norms. The matrix products take ternary and int8 codes as
bf16, which holds both exactly; `exact=True` also keeps everything between them in f32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int = 3072
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def ternarize(w: Tensor) -> tuple[Tensor, Tensor]:
    """absmean: trits in {-1, 0, 1} and the weight_scale that multiplies them, rounded to bf16 as it is stored."""
    mean = w.abs().mean().clamp(min=1e-5)
    return (w * (1.0 / mean)).round().clamp(-1, 1), mean.bfloat16().float()


def quantize_absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (as f32) and inv_act_scale = 127 / absmax, per token."""
    inv_act_scale = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * inv_act_scale).round().clamp(-128, 127), inv_act_scale


class BitMatMul(torch.autograd.Function):
    """y = (codes . trits^T) * weight_scale / inv_act_scale; the gradients pass both quantisers unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, trits: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
        codes, inv_act_scale = quantize_absmax(x.float())
        codes = codes.to(dtype)
        ctx.save_for_backward(codes, inv_act_scale, trits, weight_scale)
        return ((codes @ trits.t()).float() * (weight_scale / inv_act_scale)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        codes, inv_act_scale, trits, weight_scale = ctx.saved_tensors
        dy = dy.float()
        dx = (dy * weight_scale).to(trits.dtype) @ trits
        dw = (dy / inv_act_scale).to(codes.dtype).t() @ codes
        return dx, dw.float(), None, None, None


# The sub-norms fix the size of what a layer adds, so the embedding must not be small beside it: else a token's identity is
# lost after one layer and no later layer can copy a name.
EMBEDDING_STD = 0.3
RESIDUAL_STD = 0.007


class BitLinear(nn.Module):
    def __init__(self, k: int, n: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, k) * std)


def bit_linear(x: Tensor, linears: list[BitLinear], dtype: torch.dtype) -> Tensor:
    """Several BitLinears of one input as one product; each matrix keeps its own scale."""
    with torch.no_grad():
        pairs = [ternarize(linear.weight) for linear in linears]
        trits = torch.cat([t for t, _ in pairs]).to(dtype)
        weight_scale = torch.cat([s.expand(t.shape[0]) for t, s in pairs])
    w = torch.cat([linear.weight for linear in linears])
    return BitMatMul.apply(x, w, trits, weight_scale, dtype)


class RMSNorm(nn.Module):
    def __init__(self, n: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        f = x.float()
        return (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + self.eps) * self.weight.bfloat16().float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        n_kv = c.num_key_value_heads * c.head_dim
        self.q_proj, self.k_proj, self.v_proj = (BitLinear(c.hidden_size, n, 0.06) for n in (c.hidden_size, n_kv, n_kv))
        self.o_proj = BitLinear(c.hidden_size, c.hidden_size, RESIDUAL_STD)
        self.attn_sub_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.c = c

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        c, (b, t), d = self.c, shape, self.c.head_dim
        qkv = bit_linear(x, [self.q_proj, self.k_proj, self.v_proj], dtype).view(b, t, -1, d).transpose(1, 2)
        q, k, v = qkv.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], 1)
        groups = c.num_attention_heads // c.num_key_value_heads
        k, v = rotate(k, *rope).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(rotate(q, *rope), k, v, is_causal=True)
        y = self.attn_sub_norm(y.transpose(1, 2).reshape(b * t, -1))
        return bit_linear(y, [self.o_proj], dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half split: dimension i turns with dimension i + D/2."""
    x1, x2 = x.float().chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj, self.up_proj = (BitLinear(c.hidden_size, c.intermediate_size, 0.02) for _ in range(2))
        self.ffn_sub_norm = RMSNorm(c.intermediate_size, c.rms_norm_eps)
        self.down_proj = BitLinear(c.intermediate_size, c.hidden_size, RESIDUAL_STD)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        gate, up = bit_linear(x, [self.gate_proj, self.up_proj], dtype).chunk(2, -1)
        return bit_linear(self.ffn_sub_norm(gate.relu().square() * up), [self.down_proj], dtype)


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)


class BitNet(nn.Module):
    """Parameter names are those of the exported file, less the prefix `model.`."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=EMBEDDING_STD)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        nn.init.constant_(self.norm.weight, 1 / (EMBEDDING_STD * c.hidden_size**0.5))  # logits of size 1
        inv_freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
        angle = torch.outer(torch.arange(c.max_position_embeddings, dtype=torch.float64), inv_freq)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, ids: Tensor, exact: bool = False) -> Tensor:
        """ids [B, T] -> logits [B * T, V] in f32 (exact) or bf16."""
        b, t = ids.shape
        dtype = torch.float32 if exact else torch.bfloat16
        e = self.embed_tokens.weight.bfloat16().to(dtype)
        rope = self.cos[:t], self.sin[:t]
        h = F.embedding(ids.reshape(-1), e).float()
        for layer in self.layers:
            h = h + layer.self_attn(layer.input_layernorm(h).to(dtype), rope, (b, t), dtype)
            h = h + layer.mlp(layer.post_attention_layernorm(h).to(dtype), dtype)
        return self.norm(h).to(dtype) @ e.t()
