"""Write a checkpoint as the packed form that transformers reads (AutoBitLinear, offline): config.json,
generation_config.json and model.safetensors beside the tokenizer files."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model import BitLinear, BitNet, Config, ternarize
from tokenizer import BOS, EOS


def pack(trits: torch.Tensor) -> torch.Tensor:
    """[N, K] trits -> U8 [N/4, K]: bits 2i..2i+1 of byte [r, k] hold row i*N/4 + r as trit + 1."""
    quarters = (trits + 1).to(torch.uint8).chunk(4)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def tensors(model: BitNet) -> dict[str, torch.Tensor]:
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            trits, weight_scale = ternarize(module.weight.detach())
            out[f"model.{name}.weight"] = pack(trits).contiguous()
            out[f"model.{name}.weight_scale"] = weight_scale.bfloat16().reshape(1)
        elif hasattr(module, "weight"):
            out[f"model.{name}.weight"] = module.weight.detach().bfloat16().contiguous()
    return out


def config(c: Config, tokenizer: Tokenizer) -> dict:
    return {
        "architectures": ["BitNetForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "hidden_act": "relu2",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "model_type": "bitnet",
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": c.vocab_size,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }


if __name__ == "__main__":
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved = torch.load(checkpoint)
    model = BitNet(Config())
    model.load_state_dict(saved["model"])
    save_file(tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    settings = config(model.c, tokenizer)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"step {saved['step']}, {saved['n_tokens']} tokens seen; {folder} holds {size / 1e6:.2f} MB")
