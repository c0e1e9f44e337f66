"""Writes expected/pre_tokenizers.json and expected/sentencepiece.json.

    pip install tokenizers==0.23.3 sentencepiece==0.2.3 protobuf
    python make_tokenizers.py

The first holds how the Hugging Face tokenizers library (with Oniguruma) cuts texts by the regular
expressions of GGUF's pre-tokenizers; the second, vocabularies trained by Google's SentencePiece and
what it encodes with them.
"""

import io
import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, pre_tokenizers

HERE = Path(__file__).parent

TEXTS = [
    "", " ", "  ", "a", " a", "a ", "a  ", "  a", "   a   b", "Hello, world!",
    "I'M they'VE don't WE'LL it's He'D 'S 'sx x'sy ''s", "'ſ 'K \u212a'll", "1 12 123 1234 12345 3.14 1,000,000",
    "x1y22z333", "²³ ½ Ⅷ ٣٤٥٦ 一二三 1２３4", "a\nb", "a\n\nb", "a\r\nb\r\n\r\nc", "a \n b", "a\n \nb", "  \n  \n  x",
    "\n", "\r", "\r\n", "\n\n\n", "\t", "\ta\t\tb", " \t \n", "tail \n", "tail\n ", "!\n\n?", "...\r\n!",
    "東京 is 日本の首都です。", "한국어 텍스트", "Привет, мир!", "नमस्ते दुनिया", "สวัสดีชาวโลก", "שָׁלוֹם", "مرحبا بالعالم",
    "é vs e\u0301 vs \u0301", "a\u0301b\u0302 \u0301x \u0301", "n\u0303o Z\u0335\u0336\u0337",
    "🙂", "🙂👩\u200d👩\u200d👧\u200d👦🚀 x", "🇩🇪 ☕️ ❤️", "a🙂b", " 🙂", "\u00a0nbsp\u00a0\u00a0x", "\u3000ideographic\u3000 x",
    "a\u2028b\u2029c\u0085d", "\u200bzero\u200bwidth\ufeff", "a\u0000b", "fn main() { println!(\"{}\", 1u8); }\n",
    "#include <stdio.h>\n\tint x=10;\n", "a_b-c.d/e\\f", "$100 €5 £3 +1 <=> a|b ~x `y` ^z", "((a)) [b] {c}", "“q” ‘r’ — – … ¿x? ¡y!",
    "user@example.com https://x.y/z?a=1&b=2", "x" * 40, " " * 20 + "x", "ab" * 3 + " " * 7 + "\n" + " " * 4 + "c", "ǅ ǆ ª º ﬁ İ ı",
    "\U00010400\U0001d7d9 \U00020000", "12:34:56 2024-01-02", "50%", "C++ & C#", "o'clock rock'n'roll 'tis", "'", "''", " '", "'\n's",
]

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EXPRESSIONS = {
    "llama-bpe": [CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES],
    "qwen2": [CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES],
    "qwen35": [CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES],
    "gpt-2": [GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
}


def pieces(expressions, text):
    steps = [pre_tokenizers.Split(Regex(e), behavior="isolated") for e in expressions]
    return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


def write(name, value):
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    (HERE / "expected" / name).write_text(text + "\n")


def pre_tokenized():
    cases = {name: [pieces(e, text) for text in TEXTS] for name, e in EXPRESSIONS.items()}
    write("pre_tokenizers.json", {"generator": "make_tokenizers.py", "texts": TEXTS, "pieces": cases})


def train(byte_fallback):
    # Repetitive on purpose: runs of spaces and letters make pieces that overlap themselves.
    corpus = (HERE / "../../LICENSE-APACHE").read_text().splitlines()
    corpus += ["aaaa aaaaaa aaaaaaaa abab ababab banana bananas", "Straße über Äpfel", "the the then them theme"] * 40
    corpus += [" " * n + "indented" + " " * n + "x" for n in range(1, 9)] * 10
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=600, byte_fallback=byte_fallback,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_digits=True, character_coverage=1.0, num_threads=1, minloglevel=2,
    )
    return sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())


def encoded(model, texts):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return {
        "tokens": [p.piece for p in model.pieces],
        "scores": [p.score for p in model.pieces],
        "types": [p.type for p in model.pieces],
        "ids": [processor.encode(text) for text in texts],
        "decoded": [processor.decode(processor.encode(text)) for text in texts],
    }


def scored():
    texts = [t for t in TEXTS if "\0" not in t] + [
        "a" * n for n in range(1, 14)] + ["banana bananas ab ababa", "aaa  aaaaa   aaaaaaa", "the theme of the License",
        "the copyright owner or entity authorized by", " leading", "trailing  ", "\u2581already\u2581there", "Über Äpfel über"]
    bytes_model, unknown_model, unused_model = train(True), train(False), train(True)
    normal = [p for p in unused_model.pieces if p.type == 1 and len(p.piece) > 1]
    for piece in normal[::3]:
        piece.type = 5
    # Equal scores: the place in the text decides.
    tied_model = train(True)
    for piece in tied_model.pieces:
        if piece.type == 1:
            piece.score = -float(len(piece.piece) % 2)
    models = {"bytes": bytes_model, "unknown": unknown_model, "unused": unused_model, "tied": tied_model}
    vocabularies = {name: encoded(model, texts) for name, model in models.items()}
    write("sentencepiece.json", {"generator": "make_tokenizers.py", "texts": texts, "vocabularies": vocabularies})


pre_tokenized()
scored()
