"""Train the byte-level BPE on stories and write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""

import itertools
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from stories import stories

VOCAB_SIZE = 3072
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
N_STORIES = 40_000
# Llama 3's pre-tokeniser: contractions, words with their leading space, digits by three, punctuation, white space
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(stories(1, held_out=False), N_STORIES), trainer)
    # A text that repeats few words runs out of merges: unused entries keep the vocabulary at its declared size.
    unused = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(unused)])
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    config = {
        "added_tokens_decoder": {str(i): {"content": content, **special, "special": True} for i, content in sorted(added.items())},
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1024,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokens = {"bos_token": {"content": BOS, **special}, "eos_token": {"content": EOS, **special}}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=1) + "\n")


if __name__ == "__main__":
    tokenizer = build()
    write(tokenizer, Path(sys.argv[1]))
    texts = list(itertools.islice(stories(0, held_out=True), 500))
    encoded = [tokenizer.encode(text) for text in texts]
    assert all(tokenizer.decode(e.ids) == text for e, text in zip(encoded, texts)), "decoding does not give the text back"
    lengths = sorted(len(e.ids) for e in encoded)
    n_words = sum(len(text.split()) for text in texts)
    print(f"{tokenizer.get_vocab_size()} entries, {sum(lengths) / n_words:.2f} tokens a word")
    print(f"tokens a story: 5% {lengths[25]}, median {lengths[250]}, 95% {lengths[475]}, most {lengths[-1]}")
