"""Seeded children's stories: `story(seed)` is always the same text, and no file but words.txt and plots.txt is read.

Template language (both files):
  [a|b|c]   one of the alternatives, which may nest       {A} {he} {his} ...   the characters, see `cast`
  <list>    an item of a list in words.txt                <list:x> draws and remembers, <=x> repeats
Within one story an item of a list is not drawn twice while others are left.
"""

import argparse
import hashlib
import random
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
HELD_OUT = 20  # one seed in HELD_OUT is never trained on


def is_held_out(seed: int) -> bool:
    return seed % HELD_OUT == 0


def read_words() -> dict[str, list[str]]:
    lists = {}
    for line in (HERE / "words.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, items = line.split(":", 1)
            lists[name] = [item.strip() for item in items.split(" | ")]
    return lists


def read_plots() -> list[tuple[str, str, str, str]]:
    """(name, who, theme, body), the body's paragraphs joined by a blank line."""
    plots = []
    for block in re.split(r"^## ", (HERE / "plots.txt").read_text(), flags=re.M)[1:]:
        head, body = block.split("\n", 1)
        name, who, theme = head.split()
        plots.append((name, who, theme, "\n\n".join(line.strip() for line in body.strip().splitlines())))
    return plots


def parse(text: str, at: int = 0, inner: bool = False):
    """Template -> list of parts: str, ("slot", name), ("draw", list, variable), ("recall", variable), ("alt", [parts])."""
    parts, plain, alternatives = [], "", []

    def flush():
        nonlocal plain
        if plain:
            parts.append(plain)
        plain = ""

    while at < len(text):
        c = text[at]
        if c == "[":
            flush()
            alt, at = parse(text, at + 1, True)
            parts.append(("alt", alt))
        elif inner and c in "|]":
            flush()
            alternatives.append(parts)
            parts = []
            if c == "]":
                return alternatives, at + 1
            at += 1
        elif c in "{<":
            flush()
            end = text.index("}" if c == "{" else ">", at)
            name = text[at + 1 : end]
            if c == "{":
                parts.append(("slot", name))
            elif name[0] == "=":
                parts.append(("recall", name[1:]))
            else:
                parts.append(("draw", *name.split(":")) if ":" in name else ("draw", name, None))
            at = end + 1
        else:
            plain += c
            at += 1
    assert not inner, f"unclosed [ in {text!r}"
    flush()
    return parts, at


WORDS = {name: [parse(item)[0] for item in items] for name, items in read_words().items()}
PLOTS = [(name, who, theme, parse(body)[0]) for name, who, theme, body in read_plots()]

HE = {"he": "he", "him": "him", "his": "his", "himself": "himself"}
SHE = {"he": "she", "him": "her", "his": "her", "himself": "herself"}


def pronouns(prefix: str, words: dict[str, str]) -> dict[str, str]:
    """{he}, {him}, ... and the capital {He}; for prefix b: {bhe} and {bHe}."""
    both = {prefix + key: word for key, word in words.items()}
    return both | {prefix + key.capitalize(): word.capitalize() for key, word in words.items()}


class Teller:
    """The state of one story: the random source, the cast, what was drawn and what was remembered."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.used: set[tuple[str, int]] = set()
        self.memory: dict[str, str] = {}
        self.slots: dict[str, str] = {}

    def draw(self, name: str) -> str:
        items = WORDS[name]
        fresh = [i for i in range(len(items)) if (name, i) not in self.used] or range(len(items))
        i = self.random.choice(fresh)
        self.used.add((name, i))
        return self.tell(items[i])

    def tell(self, parts) -> str:
        out = []
        for part in parts:
            if isinstance(part, str):
                out.append(part)
                continue
            kind = part[0]
            if kind == "alt":
                out.append(self.tell(self.random.choice(part[1])))
            elif kind == "recall":
                out.append(self.memory[part[1]])
            elif kind == "draw":
                word = self.draw(part[1])
                if part[2]:
                    self.memory[part[2]] = word
                out.append(word)
            elif part[1] in self.slots:
                out.append(self.slots[part[1]])
            else:
                out.append(self.draw(part[1]))  # {Day}, {side}, ...: sentences that are lists
        return "".join(out)

    def name(self) -> tuple[str, dict[str, str], str]:
        girl = self.random.random() < 0.5
        return self.draw("girl" if girl else "boy"), SHE if girl else HE, "girl" if girl else "boy"

    def cast(self, who: str):
        """The main character A, the friend B, the parent P, the grandparent gp and the adviser C."""
        if who == "any":
            who = "animal" if self.random.random() < 0.6 else "child"
        a, a_words, a_kind = self.name()
        b, b_words, b_kind = self.name()
        if who == "animal":
            a_kind, b_kind = self.draw("animal"), self.draw("animal")
        elif who.startswith("worker"):
            a_kind = who.split(":")[1]
        s = self.slots
        s |= {"A": a, "fox": a_kind, "B": b, "bfox": b_kind, "bgirl": b_kind}
        s |= pronouns("", a_words) | pronouns("b", b_words)
        size = self.draw("size") if not who.startswith("worker") else self.random.choice(["old", "young", "poor", "busy"])
        s["adesc"] = f"a {size} {a_kind}"
        if self.random.random() < 0.2 and not who.startswith("worker"):
            s["adesc"] = f"a {self.draw('trait')} little {a_kind}"
        with_kind = f", {b} the {b_kind}" if who == "animal" else f", {b}"
        s["bintro"] = f"{s['his']} {self.draw('bref')}{with_kind}"
        s["bIntro"] = s["bintro"].capitalize()[0] + s["bintro"][1:]
        s["B:an"] = f"a {b_kind} named {b}"
        s["banew"] = f"a {self.draw('size')} {b_kind}"
        parent = self.random.choice(["mother", "father", "mother", "father", "grandmother", "grandfather", "aunt", "uncle"])
        s["P"] = parent
        s |= pronouns("p", SHE if parent in ("mother", "grandmother", "aunt") else HE)
        grand = self.random.choice([g for g in ("grandmother", "grandfather") if g != parent])
        s |= {"gp": grand, "gP:p": grand, "gp0": f"{s['his']} {grand}"}
        s |= {"gphe": "she", "gphim": "her", "gPhe": "She"} if grand == "grandmother" else {"gphe": "he", "gphim": "him", "gPhe": "He"}
        s["gphis"] = "her" if grand == "grandmother" else "his"
        wise = self.random.choice([w for w in (self.tell(i) for i in WORDS["wise"]) if w not in (a_kind, b_kind)])
        s |= {"aC": f"a {self.draw('oldadj')} {wise}", "C": f"the {wise}", "Cc": f"The {wise}"}
        s["aCc"] = s["aC"].capitalize()
        c_girl = self.random.random() < 0.5
        s |= pronouns("c", SHE if c_girl else HE)
        self.who = who


def articles(text: str) -> str:
    """a/an by the sound that follows; no word of ours starts with a silent h but hour, honest and honor."""

    def fix(match):
        article, gap, word = match.groups()
        w = word.lower()
        vowel = w[0] in "aeiou" and not w.startswith(("uni", "use", "one", "once", "eu")) or w.startswith(("hour", "honest", "honor"))
        return article[0] + ("n" if vowel else "") + gap + word

    return re.sub(r"\b([Aa]n?)( )(\w+)", fix, text)


def story(seed: int) -> str:
    teller = Teller(seed)
    name, who, theme, body = teller.random.choice(PLOTS)
    teller.cast(who)
    worker = teller.who.startswith("worker")
    if worker:
        opening = f"{teller.random.choice(['Once upon a time, there was', 'There was once', 'Long ago, there lived'])} {teller.slots['adesc']} named {teller.slots['A']}. {teller.draw('aboutw')}"
    elif body[0] == ("slot", "Day") and teller.random.random() < 0.35:
        opening = teller.draw("openday")
        teller.slots["Day"] = teller.draw("Dayafter")
    else:
        opening = teller.draw("open")
    ending = teller.draw(f"end_{theme}")
    if teller.random.random() < 0.35:
        ending += " " + teller.draw("close")
    body = teller.tell(body)
    text = f"{opening}\n\n{body} {ending}" if teller.random.random() < 0.5 else f"{opening}\n\n{body}\n\n{ending}"
    return articles(TWICE.sub(r"\1", text))


# An adjective before a thing that has it in its name: a silver silver spoon.
TWICE = re.compile(r"\b(?!had |that )(\w+) \1\b")


def stories(first_seed: int, held_out: bool):
    """Endless stories of one side of the split, without duplicates."""
    seen = set()
    seed = first_seed
    while True:
        if is_held_out(seed) == held_out:
            text = story(seed)
            digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
            if digest not in seen:
                seen.add(digest)
                yield text
        seed += 1


def check(n: int):
    assert len(PLOTS) >= 60, len(PLOTS)
    words, lengths, seen = Counter(), [], set()
    plain = re.compile(r"[\[\]{}<>|=_]|  | [,.!?]|\.\.|,,|\b(\w+) \1\b")
    for seed in range(n):
        text = story(seed)
        if seed < 1000:
            assert text == story(seed), "a seed is not enough to know a story"
        tokens = re.findall(r"[a-z]+", text.lower())
        words.update(tokens)
        lengths.append(len(tokens))
        digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
        assert digest not in seen, f"seed {seed} repeats a story"
        seen.add(digest)
        bad = plain.search(text)
        assert not bad or bad.group(0) in ("had had", "that that"), f"seed {seed}: {bad.group(0)!r} in {text}"
        wrong = re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouh]", text)
        assert not wrong or "one" in text[wrong.start() : wrong.start() + 6], f"seed {seed}: {text[wrong.start() - 20 : wrong.end() + 20]}"
        assert text.count('"') % 2 == 0, f"seed {seed}: an open quotation in {text}"
        for sentence in re.findall(r"(?:^|[.!?] |\n\n)([a-z].{20})", text):
            raise AssertionError(f"seed {seed}: a sentence starts small: {sentence!r}")
    assert len(words) >= 2000, f"only {len(words)} distinct words"
    lengths.sort()
    print(f"{len(PLOTS)} plots, {len(words)} distinct words in {n} stories, no duplicates")
    print(f"words a story: 5% {lengths[n // 20]}, median {lengths[n // 2]}, 95% {lengths[n * 19 // 20]}")


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--check", action="store_true", help="check 100,000 stories")
    args.add_argument("--count", type=int, default=3)
    args.add_argument("--seed", type=int, default=1)
    args = args.parse_args()
    if args.check:
        check(100_000)
    else:
        for seed in range(args.seed, args.seed + args.count):
            print(story(seed), end="\n\n----\n\n")
