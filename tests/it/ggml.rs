//! Block types: literal bytes, the `gguf` package's answers, and encoding against decoding.

use sterna::format::ggml::{
    BadCode, FloatType, GgmlType, I2S_TAIL_BYTES, TernaryType, i2s_scale, i2s_tail,
};
use sterna::random::Random;

/// A row's trits and scales.
fn decode(ty: TernaryType, k: usize, bytes: &[u8]) -> Result<(Vec<i8>, Vec<u16>), BadCode> {
    let (mut trits, mut scales) = (vec![9; k], vec![9; ty.row_scales(k)]);
    ty.decode_row(bytes, &mut trits, &mut scales).map(|()| (trits, scales))
}

fn encode(ty: TernaryType, trits: &[i8], scales: &[u16]) -> Vec<u8> {
    let mut bytes = vec![0xaa; ty.row_bytes(trits.len()).unwrap()];
    ty.encode_row(trits, scales, &mut bytes);
    bytes
}

/// Both ways.
fn assert_row(ty: TernaryType, trits: &[i8], scales: &[u16], bytes: &[u8]) {
    assert_eq!(
        decode(ty, trits.len(), bytes).unwrap(),
        (trits.to_vec(), scales.to_vec()),
        "{ty:?}"
    );
    assert_eq!(encode(ty, trits, scales), bytes, "{ty:?}");
}

/// Zeros but for some elements.
fn trits(k: usize, nonzero: &[(usize, i8)]) -> Vec<i8> {
    let mut trits = vec![0; k];
    nonzero.iter().for_each(|&(i, trit)| trits[i] = trit);
    trits
}

/// (i mod 3) − 1.
fn ramp(k: usize) -> Vec<i8> {
    (0..k).map(|i| (i % 3) as i8 - 1).collect()
}

/// `pattern` over and over, `len` bytes of it.
fn cycle(pattern: &[u8], len: usize) -> Vec<u8> {
    pattern.iter().copied().cycle().take(len).collect()
}

#[test]
fn i2_s() {
    let ty = TernaryType::I2S;
    let first = [&[0x90, 0x15][..], &[0x55; 30]].concat();
    assert_row(ty, &trits(128, &[(0, 1), (1, -1), (64, -1), (96, -1)]), &[], &first);
    assert_row(ty, &ramp(128), &[], &cycle(&[0x24, 0x49, 0x92], 32));

    assert_eq!(i2s_tail(1.25)[..4], [0x00, 0x00, 0xa0, 0x3f]);
    assert_eq!(i2s_tail(1.25)[4..], [0; 28]);
    assert_eq!(I2S_TAIL_BYTES, 32);
    assert_eq!(i2s_scale([0x00, 0x00, 0xa0, 0x3f]), Some(1.25));
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert_eq!(i2s_scale(scale.to_le_bytes()), None);
    }
}

#[test]
fn i2_s_on_arm() {
    let ty = TernaryType::I2SArm;
    let first = [&[0x90][..], &[0x55; 15]].concat();
    assert_row(ty, &trits(64, &[(0, 1), (32, -1), (48, -1)]), &[], &first);
    assert_row(ty, &ramp(64), &[], &cycle(&[0x18, 0x61, 0x86], 16));
    // The same bytes mean other rows in the other layout.
    assert_ne!(encode(ty, &ramp(128), &[]), encode(TernaryType::I2S, &ramp(128), &[]));
}

#[test]
fn tq2_0() {
    let ty = TernaryType::Tq2_0;
    let first = [&[0x06][..], &[0x55; 63], &[0x00, 0x3c]].concat();
    assert_row(ty, &trits(256, &[(0, 1), (64, -1), (96, -1)]), &[0x3c00], &first);
    let ramp_bytes = [cycle(&[0x18, 0x61, 0x86], 64), vec![0x00, 0x38]].concat();
    assert_row(ty, &ramp(256), &[0x3800], &ramp_bytes);
}

#[test]
fn tq1_0() {
    let ty = TernaryType::Tq1_0;
    let mut bytes = [&[0x80; 51][..], &[0x00, 0x00, 0x00]].concat();
    // Four digits of 1 are 120, and the last byte of the four too.
    bytes[48..52].fill(127);
    bytes[0] = 202;
    let five = trits(256, &[(0, 1), (64, -1), (96, -1), (128, 1)]);
    assert_row(ty, &five, &[0], &bytes);
    assert_row(ty, &[-1; 256], &[0x3c00], &[&[0; 52][..], &[0x00, 0x3c]].concat());
    let ones = [&[255; 48][..], &[253; 4], &[0x00, 0x3c]].concat();
    assert_row(ty, &[1; 256], &[0x3c00], &ones);
    let ramp_bytes = [
        cycle(&[0x45, 0x6c, 0xcf], 32),
        cycle(&[0x94, 0xbb, 0x31], 16),
        vec![0x30, 0x92, 0xbb, 0x30, 0x00, 0x38],
    ]
    .concat();
    assert_row(ty, &ramp(256), &[0x3800], &ramp_bytes);
}

#[test]
fn q1_0() {
    let mut trits = vec![-1; 128];
    for i in [0, 2, 3, 7] {
        trits[i] = 1;
    }
    let bytes = [&[0x00, 0x2c, 0x8d][..], &[0; 15]].concat();
    assert_row(TernaryType::Q1_0, &trits, &[0x2c00], &bytes);
}

#[test]
fn q2_0_and_pq2_0() {
    for (ty, k) in [(TernaryType::Q2_0, 64), (TernaryType::Pq2_0, 128)] {
        let bytes = [&[0x00, 0x2c, 0x06][..], &vec![0x55; k / 4 - 1]].concat();
        assert_row(ty, &trits(k, &[(0, 1), (2, -1), (3, -1)]), &[0x2c00], &bytes);
    }
    assert_eq!(GgmlType::Q2_0G128.ternary(), Some(TernaryType::Pq2_0));
    assert_eq!(GgmlType::Pq2_0.ternary(), Some(TernaryType::Pq2_0));
}

#[test]
fn ptq1_0() {
    let bytes = [
        cycle(&[0x31, 0x94, 0xbb], 16),
        cycle(&[0xcf, 0x45, 0x6c], 8),
        vec![0x43, 0x6c, 0x00, 0x3c],
    ]
    .concat();
    assert_row(TernaryType::Ptq1_0, &ramp(128), &[0x3c00], &bytes);
}

/// A negative scale, an infinite one: bits are kept for the caller to judge.
#[test]
fn scales_are_kept_as_they_are() {
    for ty in TernaryType::ALL.into_iter().filter(|ty| ty.group().is_some()) {
        let k = 2 * ty.group().unwrap();
        let trits = vec![1; k];
        assert_row(ty, &trits, &[0xbc01, 0x7c00], &encode(ty, &trits, &[0xbc01, 0x7c00]));
    }
}

#[test]
fn rows_come_back_from_their_bytes() {
    let mut random = Random::new(1);
    for ty in TernaryType::ALL {
        for k in [64, 128, 192, 256, 512, 768, 2560, 6912] {
            let Some(len) = ty.row_bytes(k) else { continue };
            let mut trits = random.trits(k);
            if ty.is_binary() {
                trits.iter_mut().for_each(|trit| *trit |= 1);
            }
            let scales: Vec<u16> = (0..ty.row_scales(k)).map(|_| random.bits() as u16).collect();
            let bytes = encode(ty, &trits, &scales);
            assert_eq!(bytes.len(), len);
            assert_eq!(decode(ty, k, &bytes).unwrap(), (trits, scales), "{ty:?} {k}");
        }
    }
}

#[test]
fn rows_of_parts_of_blocks_have_no_length() {
    for ty in TernaryType::ALL {
        let block = ty.group().unwrap_or(if ty == TernaryType::I2S { 128 } else { 64 });
        for k in [1, block - 1, block + 1, 3 * block / 2] {
            assert_eq!(ty.row_bytes(k), None, "{ty:?} {k}");
        }
        assert!(ty.row_bytes(block).is_some());
    }
    for ty in FloatType::ALL {
        let k = ty.group().map_or(1, |_| 256);
        assert!(ty.row_bytes(k).is_some());
        assert_eq!(ty.row_bytes(k + 1).is_some(), ty.plain().is_some(), "{ty:?}");
    }
}

/// The first code 3 of a row is reported by its column.
#[test]
fn code_3_is_an_error() {
    // Byte 1 of the second block, its codes in the order of their bits.
    let places: [(TernaryType, usize, [usize; 4]); 5] = [
        (TernaryType::I2S, 32 + 1, [225, 193, 161, 129]),
        (TernaryType::I2SArm, 16 + 1, [113, 97, 81, 65]),
        (TernaryType::Tq2_0, 66 + 33, [385, 417, 449, 481]),
        (TernaryType::Q2_0, 18 + 3, [68, 69, 70, 71]),
        (TernaryType::Pq2_0, 34 + 3, [132, 133, 134, 135]),
    ];
    for (ty, at, columns) in places {
        let k = 512;
        let good = encode(ty, &ramp(k), &vec![0x3c00; ty.row_scales(k)]);
        for (i, column) in columns.into_iter().enumerate() {
            let mut bytes = good.clone();
            bytes[at] |= 3 << (2 * i);
            assert_eq!(decode(ty, k, &bytes), Err(BadCode { column }), "{ty:?}");
            // A later one does not hide it.
            *bytes.last_mut().unwrap() |= if ty.group().is_none() { 0xff } else { 0 };
            assert_eq!(decode(ty, k, &bytes), Err(BadCode { column }), "{ty:?}");
        }
    }
}

/// Every byte is three-valued digits, also those that no encoder writes.
#[test]
fn base_3_bytes_are_always_trits() {
    for ty in [TernaryType::Tq1_0, TernaryType::Ptq1_0] {
        let k = 256;
        for byte in 0..=255 {
            let (trits, _) = decode(ty, k, &vec![byte; ty.row_bytes(k).unwrap()]).unwrap();
            assert!(trits.iter().all(|trit| (-1..=1).contains(trit)), "{ty:?} {byte}");
        }
    }
}

/// `tests/golden/ggml.json`.
struct Golden(serde_json::Value);

impl Golden {
    fn read() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/ggml.json");
        Self(serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
    }

    fn bytes(&self, entry: &str, field: &str) -> Vec<u8> {
        let hex = self.0[entry][field].as_str().unwrap();
        let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
        hex.as_bytes().chunks(2).map(byte).collect()
    }

    fn values(&self, entry: &str) -> Vec<f32> {
        let bytes = self.bytes(entry, "values");
        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn numbers(&self, entry: &str, field: &str) -> Vec<i64> {
        let numbers = self.0[entry][field].as_array().unwrap();
        numbers.iter().map(|number| number.as_i64().unwrap()).collect()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn floats_are_those_of_the_gguf_package() {
    let golden = Golden::read();
    for ty in [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::Q4K, GgmlType::Q6K] {
        let (bytes, expected) = (golden.bytes(ty.name(), "bytes"), golden.values(ty.name()));
        let float = ty.float().unwrap();
        let mut found = vec![0.0; expected.len()];
        float.decode_row(&bytes, &mut found);
        assert_eq!(bits(&found), bits(&expected), "{ty:?}");
    }
}

#[test]
fn trits_are_those_of_the_gguf_package() {
    let golden = Golden::read();
    for ty in [TernaryType::Tq1_0, TernaryType::Tq2_0] {
        let name = if ty == TernaryType::Tq1_0 { "TQ1_0" } else { "TQ2_0" };
        let (bytes, expected) = (golden.bytes(name, "bytes"), golden.values(name));
        let (trits, scales) = decode(ty, expected.len(), &bytes).unwrap();
        let scale = |i: usize| sterna::format::float::f16_to_f32(scales[i / 256]);
        let found: Vec<f32> =
            trits.iter().enumerate().map(|(i, &trit)| scale(i) * f32::from(trit)).collect();
        assert_eq!(bits(&found), bits(&expected), "{name}");

        let entry = format!("{name} encoded");
        let trits: Vec<i8> = golden.numbers(&entry, "trits").iter().map(|&t| t as i8).collect();
        let scales: Vec<u16> = golden.numbers(&entry, "scales").iter().map(|&s| s as u16).collect();
        assert_row(ty, &trits, &scales, &golden.bytes(&entry, "bytes"));
    }
}

/// 32 values evenly from −1 to 1.
#[test]
fn worked_examples_of_quantised_floats() {
    let mut out = [0.0; 32];
    let q8_0 = [&[0x08, 0x20, 0x81, 0x89, 0x91][..], &[0; 29]].concat();
    FloatType::Q8_0.decode_row(&q8_0, &mut out);
    let d = 0.007_873_535_f32;
    assert_eq!(out[..4], [-127.0 * d, -119.0 * d, -111.0 * d, 0.0]);

    let q4_0 = [&[0x00, 0x30, 0x80, 0x91, 0x91, 0xa2][..], &[0x88; 12]].concat();
    FloatType::Q4_0.decode_row(&q4_0, &mut out);
    assert_eq!(out[..4], [-1.0, -0.875, -0.875, -0.75]);
    assert_eq!(out[16..20], [0.0, 0.125, 0.125, 0.25]);
}

#[test]
fn plain_floats_are_exact() {
    let mut out = [0.0; 2];
    FloatType::F32.decode_row(&[0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0], &mut out);
    assert_eq!(out, [1.0, -2.5]);
    FloatType::F16.decode_row(&[0, 0x3c, 0, 0xc1], &mut out);
    assert_eq!(out, [1.0, -2.5]);
    FloatType::Bf16.decode_row(&[0x80, 0x3f, 0x20, 0xc0], &mut out);
    assert_eq!(out, [1.0, -2.5]);
}

/// scale · code + min is the value: rounded once, with or without a fused multiply-add. Over random
/// bytes, so over f16 scales of every size.
#[test]
fn codes_give_the_values() {
    let mut random = Random::new(2);
    for ty in FloatType::ALL {
        let Some(group) = ty.group() else { continue };
        let k = 512;
        for _ in 0..200 {
            let len = ty.row_bytes(k).unwrap();
            let bytes: Vec<u8> = (0..len).map(|_| random.bits() as u8).collect();
            let mut values = vec![0.0; k];
            ty.decode_row(&bytes, &mut values);
            let (mut codes, mut scale) = (vec![0; k], vec![0.0; k / group]);
            let mut min = scale.clone();
            ty.decode_codes(&bytes, &mut codes, &mut scale, &mut min);
            for (i, &value) in values.iter().enumerate() {
                let (code, scale, min) = (f32::from(codes[i]), scale[i / group], min[i / group]);
                for found in [scale * code + min, scale.mul_add(code, min)] {
                    let both_nan = found.is_nan() && value.is_nan();
                    assert!(found == value || both_nan, "{ty:?} [{i}]: {found} {value}");
                }
                assert!(ty == FloatType::Q4K || min == 0.0);
            }
        }
    }
}
