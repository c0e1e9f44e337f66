"""Writes format-vectors.json: the test vectors of formats.md.

Encoders and decoders after the text of formats.md, in plain Python (3.10 or newer, no packages)
and independent of the crate, which tests/it/format_vectors.rs holds against them. Run it in this
directory: python3 make_format_vectors.py
"""

import json
import math
import struct


def f16(value):
    """The two bytes; struct rounds to nearest, ties to even."""
    return struct.pack("<e", value)


def f32(value):
    """value rounded to f32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def text(trits):
    """One character a weight."""
    return "".join("-0+"[t + 1] for t in trits)


def ramp(k):
    return [i % 3 - 1 for i in range(k)]


def sparse(k, nonzero, rest=0):
    return [nonzero.get(i, rest) for i in range(k)]


# Ternary and binary rows.


def strided(trits, width, shifts):
    """Byte p: elements p, p + width, p + 2 width, p + 3 width at these shifts."""
    return bytes(
        sum((trits[p + i * width] + 1) << shift for i, shift in enumerate(shifts))
        for p in range(width)
    )


def digits(trits, width):
    """Byte m: elements m, m + width, ... as base-3 digits, the first in the highest of five places."""
    out = []
    for m in range(width):
        q = sum((t + 1) * 3 ** (4 - k) for k, t in enumerate(trits[m::width]))
        out.append((q * 256 + 242) // 243)
    return bytes(out)


def consecutive(trits):
    return bytes(sum((t + 1) << (2 * j) for j, t in enumerate(trits[i : i + 4])) for i in range(0, len(trits), 4))


def signs(trits):
    return bytes(sum((t > 0) << j for j, t in enumerate(trits[i : i + 8])) for i in range(0, len(trits), 8))


BLOCKS = {
    "I2_S": (128, lambda t, _: strided(t, 32, (6, 4, 2, 0))),
    "I2_S (Arm)": (64, lambda t, _: strided(t, 16, (6, 4, 2, 0))),
    "TQ1_0": (256, lambda t, d: digits(t[:160], 32) + digits(t[160:240], 16) + digits(t[240:], 4) + d),
    "TQ2_0": (256, lambda t, d: strided(t[:128], 32, (0, 2, 4, 6)) + strided(t[128:], 32, (0, 2, 4, 6)) + d),
    "Q1_0": (128, lambda t, d: d + signs(t)),
    "Q2_0": (64, lambda t, d: d + consecutive(t)),
    "PQ2_0": (128, lambda t, d: d + consecutive(t)),
    "PTQ1_0": (128, lambda t, d: digits(t[:80], 16) + digits(t[80:120], 8) + digits(t[120:], 2) + d),
}


def row(kind, what, trits, scales):
    k, encode = BLOCKS[kind]
    blocks = [trits[i : i + k] for i in range(0, len(trits), k)]
    of_block = scales or [0.0] * len(blocks)
    data = b"".join(encode(block, f16(d)) for block, d in zip(blocks, of_block, strict=True))
    bits = [struct.unpack("<H", f16(d))[0] for d in scales]
    return {"type": kind, "what": what, "weights": text(trits), "scales": bits, "bytes": data.hex()}


def rows():
    pairs = {0: 1, 1: -1, 64: -1, 96: -1}
    yield row("I2_S", "elements 0, 64, 96 of byte 0; element 1 of byte 1", sparse(128, pairs), [])
    yield row("I2_S", "(i mod 3) - 1", ramp(128), [])
    yield row("I2_S", "two blocks", sparse(256, {128: 1, 255: -1}), [])
    yield row("I2_S (Arm)", "elements 0, 32, 48 of byte 0", sparse(64, {0: 1, 32: -1, 48: -1}), [])
    yield row("I2_S (Arm)", "(i mod 3) - 1", ramp(64), [])
    yield row("I2_S (Arm)", "the row whose I2_S bytes are another", ramp(128), [])
    yield row("TQ1_0", "byte 0 is 202", sparse(256, {0: 1, 64: -1, 96: -1, 128: 1}), [1.0])
    yield row("TQ1_0", "(i mod 3) - 1", ramp(256), [0.5])
    yield row("TQ1_0", "all -1", [-1] * 256, [1.0])
    yield row("TQ1_0", "all +1", [1] * 256, [1.0])
    yield row("TQ2_0", "elements 0, 64, 96 of byte 0", sparse(256, {0: 1, 64: -1, 96: -1}), [1.0])
    yield row("TQ2_0", "(i mod 3) - 1", ramp(256), [0.5])
    yield row("TQ2_0", "two blocks, the second half of the second", sparse(512, {384: 1}), [1.0, 0.5])
    yield row("Q1_0", "eight signs: - would be 0", sparse(128, {i: 1 for i in (0, 2, 3, 7)}, -1), [0.0625])
    yield row("Q1_0", "two blocks", [1 if i % 5 else -1 for i in range(256)], [0.125, 0.5])
    yield row("Q2_0", "elements 0 to 3", sparse(64, {0: 1, 2: -1, 3: -1}), [0.0625])
    yield row("Q2_0", "(i mod 3) - 1, two blocks", ramp(128), [0.5, 0.5])
    yield row("PQ2_0", "elements 0 to 3", sparse(128, {0: 1, 2: -1, 3: -1}), [0.0625])
    yield row("PQ2_0", "(i mod 3) - 1", ramp(128), [0.5])
    yield row("PTQ1_0", "(i mod 3) - 1", ramp(128), [1.0])
    yield row("PTQ1_0", "the last element of each part", sparse(128, {79: 1, 119: -1, 127: 1}), [0.5])


# Floats in blocks.


def q8_0(data):
    (d,) = struct.unpack("<e", data[:2])
    return [d * q for q in struct.unpack("<32b", data[2:])]


def q4_0(data):
    (d,) = struct.unpack("<e", data[:2])
    return [d * ((b & 15) - 8) for b in data[2:]] + [d * ((b >> 4) - 8) for b in data[2:]]


def q4_k(data):
    d, dmin = struct.unpack("<2e", data[:4])
    s, q = data[4:16], data[16:]
    scale = [s[j] & 63 for j in range(4)] + [(s[8 + j] & 15) | (s[j] >> 6) << 4 for j in range(4)]
    least = [s[4 + j] & 63 for j in range(4)] + [(s[8 + j] >> 4) | (s[4 + j] >> 6) << 4 for j in range(4)]
    out = []
    for i in range(256):
        g = i // 32
        byte = q[32 * (g // 2) + i % 32]
        nibble = byte >> 4 if g % 2 else byte & 15
        out.append(d * scale[g] * nibble - dmin * least[g])
    return out


def q6_k(data):
    ql, qh, sc = data[:128], data[128:192], struct.unpack("<16b", data[192:208])
    (d,) = struct.unpack("<e", data[208:])
    out = []
    for i in range(256):
        h, r, l = i // 128, i % 128 // 32, i % 32
        low = ql[64 * h + 32 * (r % 2) + l] >> 4 * (r // 2) & 15
        high = qh[32 * h + l] >> 2 * r & 3
        out.append(d * sc[i // 16] * ((low | high << 4) - 32))
    return out


def floats():
    def entry(kind, what, data, decode):
        return {"type": kind, "what": what, "bytes": data.hex(), "values": decode(data)}

    yield entry("F32", "1, -2.5", struct.pack("<2f", 1, -2.5), lambda d: list(struct.unpack("<2f", d)))
    yield entry("F16", "1, -2.5", struct.pack("<2e", 1, -2.5), lambda d: list(struct.unpack("<2e", d)))
    yield entry("BF16", "1, -2.5", bytes([0x80, 0x3F, 0x20, 0xC0]), lambda d: [1.0, -2.5])
    yield entry("Q8_0", "codes -127, -119, ... +121", f16(0.0625) + struct.pack("<32b", *range(-127, 128, 8)), q8_0)
    yield entry("Q4_0", "element j low, j + 16 high", f16(0.125) + bytes(j | (15 - j) << 4 for j in range(16)), q4_0)
    packed = bytes([0xC1, 0x82, 0x43, 0x04, 0x45, 0x86, 0xC7, 0x08, 0x59, 0x6A, 0x7B, 0x8C])
    nibbles = bytes((3 * i + i // 32) % 256 for i in range(128))
    yield entry("Q4_K", "every scale and minimum another", f16(0.5) + f16(0.25) + packed + nibbles, q4_k)
    low, high = bytes((7 * i) % 256 for i in range(128)), bytes((11 * i + 5) % 256 for i in range(64))
    yield entry("Q6_K", "every scale another", low + high + struct.pack("<16b", *range(-8, 8)) + f16(0.0625), q6_k)


# Hugging Face, MLX.


def hugging_face():
    def entry(what, matrix):
        n, k = len(matrix), len(matrix[0])
        quarter = -(-n // 4)
        packed = [
            [sum((matrix[q * quarter + r][c] + 1) << 2 * q for q in range(4) if q * quarter + r < n) for c in range(k)]
            for r in range(quarter)
        ]
        return {"what": what, "rows": [text(r) for r in matrix], "packed": [bytes(r).hex() for r in packed]}

    yield entry("one quarter a row", [[1, 1, 1, 1], [0, 0, 0, 0], [-1] * 4, [-1] * 4])
    two = [[1, 0], [-1, 1], [0, 0], [1, -1], [-1, -1], [0, 1], [1, 1], [-1, 0]]
    yield entry("eight rows: quarters of two", [r + [0, 0] for r in two])
    yield entry("six rows: the last quarter is short", [ramp(6)[i % 3 : i % 3 + 4] for i in range(6)])


def mlx():
    def entry(bits, trits, d):
        codes = [(t + 1) // 2 if bits == 1 else t + 1 for t in trits]
        number = sum(code << bits * i for i, code in enumerate(codes))
        scale = 2 * d if bits == 1 else d
        return {
            "bits": bits,
            "weights": text(trits),
            "codes": number.to_bytes(len(trits) * bits // 8, "little").hex(),
            "scale": f16(scale).hex(),
            "bias": f16(-d).hex(),
            "value": d,
        }

    yield entry(1, [1 if i % 3 else -1 for i in range(64)], 0.0625)
    yield entry(2, ramp(64), 0.125)


# Containers.


def string(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf():
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    header += string("general.architecture") + struct.pack("<I", 8) + string("llama")
    header += string("llama.block_count") + struct.pack("<II", 4, 1)
    header += string("t.weight") + struct.pack("<IQQIQ", 2, 256, 1, 35, 0)
    header += bytes(-len(header) % 32)
    return (header + strided(ramp(128), 32, (0, 2, 4, 6)) * 2 + f16(1.0)).hex()


def safetensors():
    header = b'{"w":{"dtype":"U8","shape":[1,2],"data_offsets":[0,2]}}'
    header += b" " * (-len(header) % 8)
    return (struct.pack("<Q", len(header)) + header + bytes([0x86, 0x18])).hex()


# Arithmetic.


def rope():
    x, theta, position, half = [1.0, 2.0, 3.0, 4.0], 10000.0, 1, 2
    angles = [position * theta ** (-i / half) for i in range(half)]

    def turned(pairs):
        out = [0.0] * 4
        for angle, (a, b) in zip(angles, pairs):
            out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
        return [round(v, 6) for v in out]

    return {
        "x": x,
        "theta": theta,
        "position": position,
        "half_split": turned([(0, 2), (1, 3)]),
        "interleaved": turned([(0, 1), (2, 3)]),
    }


def yarn(theta, dim, factor, context, places):
    def dimension(turns):
        return dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), dim - 1)
    found = []
    for i in places:
        plain = theta ** (-2 * i / dim)
        share = min(max((i - low) / (high - low), 0), 1)
        found.append([i, float(f"{plain / factor * share + plain * (1 - share):.7e}")])
    return {
        "theta": theta,
        "head_dim": dim,
        "factor": factor,
        "original_context": context,
        "attention_factor": round(0.1 * math.log(factor) + 1, 7),
        "frequencies": found,
    }


def absmax():
    def entry(what, x):
        largest = max(max(abs(f32(v)) for v in x), f32(1e-5))
        factor = f32(127.0 / largest)
        # Python's round is half to even.
        codes = [max(-128, min(127, round(f32(f32(v) * factor)))) for v in x]
        return {"what": what, "x": x, "codes": codes, "act_scale": f32(largest / 127)}

    yield entry("plain", [0.5, -1.0, 0.25, 2.0])
    yield entry("ties go to even", [127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5])
    yield entry("zeros", [0.0, 0.0])
    yield entry("below the floor", [1e-6, -1e-6])


def absmean():
    def entry(what, w):
        mean = max(f32(sum(abs(f32(v)) for v in w) / len(w)), f32(1e-5))
        factor = f32(1.0 / mean)
        trits = [max(-1, min(1, round(f32(f32(v) * factor)))) for v in w]
        return {"what": what, "w": w, "weights": text(trits), "scale": mean}

    yield entry("plain", [0.9, -0.1, 0.4, -1.2, 0.05, 0.61])
    yield entry("ties go to zero", [0.5, -0.5, 1.5, -1.5])
    yield entry("zeros", [0.0, 0.0])


def bitlinear():
    weights, x = [[1, 0, -1, 1], [-1, -1, 0, 0], [0, 1, 1, -1]], [32, -64, 16, 127]
    sums = [sum(w * v for w, v in zip(r, x)) for r in weights]
    act_scale, scale = f32(2 / 127), 1.25
    y = [f32(s * f32(scale * act_scale)) for s in sums]
    return {"weights": [text(r) for r in weights], "codes": x, "sums": sums, "scale": scale, "act_scale": act_scale, "y": y}


def groups():
    weights, scales, x = [1, -1, 0, 1], [0.5, 2.0], [1.0, 2.0, 3.0, 4.0]
    y = sum(d * sum(w * v for w, v in zip(weights[2 * g : 2 * g + 2], x[2 * g :])) for g, d in enumerate(scales))
    return {"weights": text(weights), "scales": scales, "x": x, "y": y}


def hadamard():
    def entry(x, flips, block):
        y = [v * s for v, s in zip(x, flips)]
        out = []
        for start in range(0, len(y), block):
            part = y[start : start + block]
            for i in range(block):
                sign = [(-1) ** bin(i & j).count("1") for j in range(block)]
                out.append(sum(s * v for s, v in zip(sign, part)) / math.sqrt(block))
        return {"x": x, "signs": flips, "block": block, "rotated": out}

    yield entry([1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1], 4)
    yield entry([1.0, 2.0, 3.0, 4.0, -5.0, 6.0, 7.0, 8.0], [1, -1, -1, 1, 1, 1, -1, -1], 4)


# The crate's own layouts: one weight in a matrix of the layout's padding.


def layouts():
    def entry(layout, shape, at, weight, words):
        (n, k), (row, column) = shape, at
        return {"layout": layout, "shape": [n, k], "at": [row, column], "weight": weight, "words": words}

    def piece(row, k, columns, chunks):
        return ((row // 32 * chunks + k // columns) * 32 + row % 32) * 4

    n, k, row, column = 40, 200, 33, 165
    at, within = piece(row, column, 64, 4), column % 64
    word, shift = at + within % 16 // 4, 8 * (within % 4) + 2 * (within // 16)
    yield entry("I2", (n, k), (row, column), 1, [[word, 0x55555555 ^ 3 << shift]])
    half, bit = within // 32, within % 32
    yield entry("planes", (n, k), (row, column), -1, [[at + half, 1 << bit], [at + 2 + half, 1 << bit]])
    at, within = piece(row, column, 128, 2), column % 128
    yield entry("signs", (n, k), (row, column), -1, [[at + within // 32, 1 << within % 32]])


VECTORS = {
    "about": "Test vectors of formats.md, written by make_format_vectors.py. Weights are one character each: "
    "- for -1, 0, + for +1. Bytes are hexadecimal, in the order of the file. Scales are IEEE half bits.",
    "rows": list(rows()),
    "i2_s_tail": {"scale": 1.25, "bytes": (struct.pack("<f", 1.25) + bytes(28)).hex()},
    "floats": list(floats()),
    "hugging_face": list(hugging_face()),
    "mlx": list(mlx()),
    "gguf": gguf(),
    "safetensors": safetensors(),
    "interleaved_head": {"head_dim": 8, "file_rows": [i // 2 + (i % 2) * 4 for i in range(8)]},
    "rope": rope(),
    "yarn": [yarn(1e6, 128, 4.0, 8192.0, [17, 20, 30, 34, 63]), yarn(1e6, 128, 4.0, 16384.0, [20, 30, 40, 63])],
    "absmax": list(absmax()),
    "absmean": list(absmean()),
    "bitlinear": bitlinear(),
    "groups": groups(),
    "hadamard": list(hadamard()),
    "layouts": list(layouts()),
}


def dump(value):
    """JSON with a line an entry, so that a difference shows which one."""
    lines = []
    for key, entry in value.items():
        if isinstance(entry, list):
            inner = ",\n  ".join(json.dumps(item) for item in entry)
            lines.append(f"{json.dumps(key)}: [\n  {inner}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(entry)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


with open("format-vectors.json", "w", encoding="ascii") as out:
    out.write(dump(VECTORS))
