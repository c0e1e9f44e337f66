//! GGUF files: read as their bytes say, and every kind of broken one is refused with a message that
//! says where.

use std::path::Path;

use sterna::Checkpoint;
use sterna::convert::write_gguf;
use sterna::format::ggml::GgmlType;
use sterna::format::gguf::{Array, Strings, TensorPlan, Value, Writer};
use sterna::format::{ModelFiles, TensorInfo};
use sterna::weights::WeightSource;

/// A GGUF file, spelled out; written as bytes by hand, not by the writer under test.
#[derive(Clone)]
struct Gguf {
    version: u32,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    alignment: usize,
    data: Vec<u8>,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

impl Gguf {
    fn new() -> Self {
        let mut file =
            Self { version: 3, keys: vec![], tensors: vec![], alignment: 32, data: vec![] };
        file.key("general.architecture", 8, &string(b"llama"));
        file
    }

    /// A key with its value's type and bytes.
    fn key(&mut self, key: &str, value_type: u32, value: &[u8]) -> &mut Self {
        self.keys.push([&string(key.as_bytes()), &value_type.to_le_bytes()[..], value].concat());
        self
    }

    fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.key(key, 4, &value.to_le_bytes())
    }

    /// An array: element type, count, elements.
    fn array(&mut self, key: &str, element_type: u32, count: u64, elements: &[u8]) -> &mut Self {
        let value = [&element_type.to_le_bytes()[..], &count.to_le_bytes(), elements].concat();
        self.key(key, 9, &value)
    }

    /// A tensor's description: dimensions as in the file, the fastest first.
    fn info(&mut self, name: &str, dims: &[u64], type_id: u32, offset: u64) -> &mut Self {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.tensors.push(
            [
                &string(name.as_bytes()),
                &(dims.len() as u32).to_le_bytes()[..],
                &dims_bytes,
                &type_id.to_le_bytes(),
                &offset.to_le_bytes(),
            ]
            .concat(),
        );
        self
    }

    /// A tensor of `len` zero bytes behind the ones before it.
    fn tensor(&mut self, name: &str, dims: &[u64], type_id: u32, len: usize) -> &mut Self {
        let offset = self.data.len().next_multiple_of(self.alignment);
        self.data.resize(offset + len, 0);
        self.info(name, dims, type_id, offset as u64)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [
            b"GGUF",
            &self.version.to_le_bytes()[..],
            &(self.tensors.len() as u64).to_le_bytes(),
            &(self.keys.len() as u64).to_le_bytes(),
            &self.keys.concat(),
            &self.tensors.concat(),
        ]
        .concat();
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend(&self.data);
        bytes
    }

    fn open(&self) -> sterna::Result<ModelFiles> {
        open(self.bytes())
    }

    /// The message of the error, after the file's name; or "fine".
    fn verdict(&self) -> String {
        verdict(self.bytes())
    }
}

fn open(bytes: Vec<u8>) -> sterna::Result<ModelFiles> {
    ModelFiles::in_memory("set", [("m.gguf".to_owned(), bytes)])
}

fn verdict(bytes: Vec<u8>) -> String {
    let Err(error) = open(bytes) else {
        return "fine".to_owned();
    };
    let message = error.to_string();
    assert!(!message.contains('\n') && message.len() < 500, "{message}");
    let file = Path::new("set").join("m.gguf").display().to_string();
    message.strip_prefix(&format!("{file}: ")).expect(&message).to_owned()
}

fn invalid(problem: &str) -> String {
    format!("not a valid GGUF file: {problem}")
}

/// The worked example without its data: two keys, one TQ2_0 tensor of 256 × 1.
#[rustfmt::skip]
const MINIMAL: [u8; 160] = [
    0x47, 0x47, 0x55, 0x46, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    2, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0, 0,
    0x67, 0x65, 0x6e, 0x65, 0x72, 0x61, 0x6c, 0x2e, 0x61, 0x72, 0x63, 0x68, 0x69, 0x74, 0x65, 0x63,
    0x74, 0x75, 0x72, 0x65, 8, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0,
    0x6c, 0x6c, 0x61, 0x6d, 0x61, 0x11, 0, 0, 0, 0, 0, 0, 0, 0x6c, 0x6c, 0x61,
    0x6d, 0x61, 0x2e, 0x62, 0x6c, 0x6f, 0x63, 0x6b, 0x5f, 0x63, 0x6f, 0x75, 0x6e, 0x74, 4, 0,
    0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0x74, 0x2e,
    0x77, 0x65, 0x69, 0x67, 0x68, 0x74, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0,
    0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x23, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

#[test]
fn the_minimal_file_is_read() {
    let mut bytes = MINIMAL.to_vec();
    let data: Vec<u8> = (0..66).collect();
    bytes.extend(&data);
    assert_eq!(bytes.len(), 226);
    for version in [3, 2] {
        bytes[4] = version;
        let files = open(bytes.clone()).unwrap();
        let metadata = files.metadata().unwrap();
        assert_eq!(metadata.require::<&str>("general.architecture").unwrap(), "llama");
        assert_eq!(metadata.require::<u32>("llama.block_count").unwrap(), 1);
        assert_eq!(metadata.iter().len(), 2);
        let info = files.info("t.weight").unwrap();
        assert_eq!((info.shape.as_slice(), info.dtype.as_str()), (&[1, 256][..], "TQ2_0"));
        assert_eq!(files.ggml_type(info).unwrap(), GgmlType::Tq2_0);
        assert_eq!(*files.slice(info, 0..66).unwrap(), data);
        assert_eq!(*files.slice(info, 64..66).unwrap(), [64, 65]);
    }
    // Cut anywhere, it is refused.
    for len in 0..bytes.len() {
        assert!(open(bytes[..len].to_vec()).is_err(), "cut at {len}");
    }
}

#[test]
fn every_value_type_is_read() {
    let mut file = Gguf::new();
    file.key("u8", 0, &[200])
        .key("i8", 1, &[0xff])
        .key("u16", 2, &[1, 2])
        .key("i16", 3, &[0xfe, 0xff])
        .key("u32", 4, &[1, 0, 0, 0x80])
        .key("i32", 5, &[0, 0, 0, 0x80])
        .key("f32", 6, &1.5f32.to_le_bytes())
        .key("bool", 7, &[1])
        .key("string", 8, &string("é".as_bytes()))
        .key("u64", 10, &u64::MAX.to_le_bytes())
        .key("i64", 11, &(-5i64).to_le_bytes())
        .key("f64", 12, &0.1f64.to_le_bytes())
        .array("bytes", 0, 2, &[1, 2])
        .array("shorts", 3, 2, &[1, 0, 0xff, 0xff])
        .array("floats", 6, 1, &2.5f32.to_le_bytes())
        .array("doubles", 12, 1, &2.5f64.to_le_bytes())
        .array("bools", 7, 2, &[0, 1])
        .array("strings", 8, 3, &[string(b"a"), string(b""), string(b"bc")].concat())
        .array("empty", 8, 0, &[]);
    let files = file.open().unwrap();
    let metadata = files.metadata().unwrap();
    let value = |key: &str| metadata.iter().find(|(name, _)| *name == key).unwrap().1.clone();
    assert_eq!(value("u8"), Value::U8(200));
    assert_eq!(value("i8"), Value::I8(-1));
    assert_eq!(value("u16"), Value::U16(0x201));
    assert_eq!(value("i16"), Value::I16(-2));
    assert_eq!(value("u32"), Value::U32(0x8000_0001));
    assert_eq!(value("i32"), Value::I32(i32::MIN));
    assert_eq!(value("f32"), Value::F32(1.5));
    assert_eq!(value("bool"), Value::Bool(true));
    assert_eq!(value("string"), Value::String("é".to_owned()));
    assert_eq!(value("u64"), Value::U64(u64::MAX));
    assert_eq!(value("i64"), Value::I64(-5));
    assert_eq!(value("f64"), Value::F64(0.1));
    assert_eq!(value("bytes"), Value::Array(Array::U8(vec![1, 2])));
    assert_eq!(value("bools"), Value::Array(Array::Bool(vec![false, true])));
    assert_eq!(value("empty"), Value::Array(Array::String(Strings::default())));

    // Integers of any type, floats of either, if they fit.
    assert_eq!(metadata.get::<u32>("u8").unwrap(), Some(200));
    assert_eq!(metadata.get::<usize>("u16").unwrap(), Some(0x201));
    assert_eq!(metadata.get::<i32>("i64").unwrap(), Some(-5));
    assert_eq!(metadata.get::<u64>("u64").unwrap(), Some(u64::MAX));
    assert_eq!(metadata.get::<f64>("f32").unwrap(), Some(1.5));
    assert_eq!(metadata.get::<f32>("f64").unwrap(), Some(0.1));
    assert_eq!(metadata.get::<bool>("bool").unwrap(), Some(true));
    assert_eq!(metadata.get::<Vec<u32>>("bytes").unwrap(), Some(vec![1, 2]));
    assert_eq!(metadata.get::<Vec<i32>>("shorts").unwrap(), Some(vec![1, -1]));
    assert_eq!(metadata.get::<Vec<f32>>("floats").unwrap(), Some(vec![2.5]));
    assert_eq!(metadata.get::<Vec<f32>>("doubles").unwrap(), Some(vec![2.5]));
    let strings = metadata.require::<&Strings>("strings").unwrap();
    assert_eq!(strings.iter().collect::<Vec<_>>(), ["a", "", "bc"]);
    assert_eq!((strings.len(), strings.get(2), strings.get(3)), (3, Some("bc"), None));
    assert_eq!(metadata.get::<u32>("no such key").unwrap(), None);
    assert!(metadata.contains("u8") && !metadata.contains("no such key"));

    let message = |result: sterna::Result<()>| {
        let message = result.unwrap_err().to_string();
        message.split_once("m.gguf: ").unwrap().1.to_owned()
    };
    let u32_of = |key| message(metadata.require::<u32>(key).map(drop));
    let expected = "expected an integer from 0 to 4294967295";
    assert_eq!(u32_of("i8"), format!("i8: {expected}, found -1"));
    assert_eq!(u32_of("u64"), format!("u64: {expected}, found 18446744073709551615"));
    assert_eq!(u32_of("f32"), format!("f32: {expected}, found the float 1.5"));
    assert_eq!(u32_of("string"), format!("string: {expected}, found the string \"é\""));
    assert_eq!(u32_of("bool"), format!("bool: {expected}, found true"));
    assert_eq!(u32_of("none"), format!("none: {expected}, found nothing"));
    assert_eq!(u32_of("a\nb"), format!("a\\nb: {expected}, found nothing"));
    assert_eq!(
        message(metadata.require::<&str>("strings").map(drop)),
        "strings: expected a string, found an array of 3 strings"
    );
    assert_eq!(
        message(metadata.require::<Vec<u32>>("shorts").map(drop)),
        "shorts: expected an array of integers from 0 to 4294967295, found an array of 2 integers"
    );
    assert_eq!(
        message(metadata.require::<&Strings>("floats").map(drop)),
        "floats: expected an array of strings, found an array of 1 floats"
    );
}

#[test]
fn tensors_have_row_major_shapes_and_types_by_name() {
    let mut file = Gguf::new();
    file.tensor("f16", &[3, 2], 1, 12)
        .tensor("scalar", &[], 0, 4)
        .tensor("i2_s", &[128, 2], 36, 96)
        .tensor("q6_k", &[256], 14, 210)
        .tensor("four", &[1, 2, 3, 4], 30, 48);
    let files = file.open().unwrap();
    let shape_of = |name: &str| {
        let info = files.info(name).unwrap();
        (info.shape.clone(), info.dtype.clone(), info.len_bytes)
    };
    assert_eq!(shape_of("f16"), (vec![2, 3], "F16".to_owned(), 12));
    assert_eq!(shape_of("scalar"), (vec![], "F32".to_owned(), 4));
    assert_eq!(shape_of("i2_s"), (vec![2, 128], "I2_S".to_owned(), 96));
    assert_eq!(shape_of("q6_k"), (vec![256], "Q6_K".to_owned(), 210));
    assert_eq!(shape_of("four"), (vec![4, 3, 2, 1], "BF16".to_owned(), 48));
    // The float types are those of safetensors.
    assert_eq!(files.tensor("f16").unwrap().unwrap().bytes.len(), 12);
}

/// Other alignments, a gap between tensors, padding after the last and no tensors are all fine.
#[test]
fn legal_oddities_are_accepted() {
    let mut file = Gguf::new();
    file.alignment = 8;
    file.key("general.alignment", 2, &[8, 0]);
    file.tensor("a", &[1], 0, 4).tensor("b", &[2], 0, 8);
    assert_eq!(file.verdict(), "fine");
    file.data.extend([0; 100]);
    assert_eq!(file.verdict(), "fine");
    file.info("c", &[1], 0, 104);
    assert_eq!(file.verdict(), "fine");
    assert_eq!(Gguf::new().verdict(), "fine");
    // Without the padding that would lead to a data section.
    let mut empty = Gguf::new();
    empty.alignment = 1;
    assert_eq!(empty.verdict(), "fine");
}

/// A tensor of a type that nobody here reads leaves the others readable.
#[test]
fn unknown_types_are_refused_when_they_are_needed() {
    let mut file = Gguf::new();
    file.tensor("tl1", &[128, 2], 38, 96)
        .tensor("tl2", &[128, 2], 39, 96)
        .tensor("nvfp4", &[128, 2], 40, 96)
        .tensor("q5_k", &[256], 13, 176)
        .tensor("new", &[256], 77, 32)
        .tensor("f32", &[1], 0, 4);
    let files = file.open().unwrap();
    assert_eq!(files.info("tl1").unwrap().len_bytes, 96);
    let message = |name: &str| {
        let error = files.ggml_type(files.info(name).unwrap()).unwrap_err().to_string();
        error.split_once("this version does not read ").unwrap().1.to_owned()
    };
    let layout = "a lookup-table layout that only its bitnet.cpp build can read; use the I2_S file, \
                  or the Hugging Face checkpoint";
    assert_eq!(message("tl1"), format!("TL1: {layout}"));
    assert_eq!(message("tl2"), format!("TL2 or MXFP4: {layout}"));
    assert_eq!(
        message("nvfp4"),
        "NVFP4 or an early Q1_0: the number has two meanings; use a file with Q1_0 as type 41"
    );
    assert!(message("q5_k").starts_with("Q5_K: convert the model to one of the types it reads"));
    assert!(message("new").starts_with("type 77: convert the model"));
    assert_eq!(files.ggml_type(files.info("f32").unwrap()).unwrap(), GgmlType::F32);
}

/// Type 42 is told apart by the bytes that each tensor takes.
#[test]
fn the_two_meanings_of_type_42() {
    let dtype = |file: &Gguf, name: &str| {
        let files = file.open().unwrap();
        let info = files.info(name).unwrap();
        (info.dtype.clone(), info.len_bytes)
    };
    let upstream = ("Q2_0".to_owned(), 576);
    let prism = ("Q2_0_G128".to_owned(), 544);
    let mut file = Gguf::new();
    file.tensor("w", &[256, 8], 42, 576).tensor("n", &[1], 0, 4);
    assert_eq!(dtype(&file, "w"), upstream);
    let mut file = Gguf::new();
    file.tensor("n", &[1], 0, 4).tensor("w", &[256, 8], 42, 544);
    assert_eq!(dtype(&file, "w"), prism);

    // 36 or 34 bytes, padded to 64: unclear alone, clear beside a larger one.
    let mut file = Gguf::new();
    file.tensor("small", &[128], 42, 34).tensor("n", &[1], 0, 4);
    assert_eq!(dtype(&file, "small"), ("Q2_0 of unknown group".to_owned(), 64));
    let message = {
        let files = file.open().unwrap();
        files.ggml_type(files.info("small").unwrap()).unwrap_err().to_string()
    };
    assert!(message.contains("64 and of 128 alike, or neither; use a PQ2_0"), "{message}");
    file.tensor("w", &[256, 8], 42, 544);
    assert_eq!(dtype(&file, "small"), ("Q2_0_G128".to_owned(), 34));
    // Larger ones that do not agree say nothing about it.
    file.tensor("v", &[256, 8], 42, 576);
    assert_eq!(dtype(&file, "small"), ("Q2_0 of unknown group".to_owned(), 64));
    assert_eq!(dtype(&file, "v"), upstream);
    assert_eq!(dtype(&file, "w"), prism);

    // A row of 64 cannot be in blocks of 128; and a length that neither has.
    let mut file = Gguf::new();
    file.tensor("w", &[64, 1], 42, 18);
    assert_eq!(dtype(&file, "w"), ("Q2_0".to_owned(), 18));
    let mut file = Gguf::new();
    file.tensor("w", &[256, 8], 42, 700);
    assert_eq!(dtype(&file, "w"), ("Q2_0 of unknown group".to_owned(), 700));
}

#[test]
fn versions_and_byte_orders_are_refused_by_name() {
    let version = |version: u32| {
        let mut file = Gguf::new();
        file.version = version;
        let verdict = file.verdict();
        let found =
            verdict.strip_prefix("expected GGUF version 2 or 3 in little-endian order, found ");
        found.unwrap().strip_suffix("; convert the model again").unwrap().to_owned()
    };
    assert_eq!(version(1), "version 1");
    assert_eq!(version(4), "version 4");
    assert_eq!(version(0), "version 0");
    assert_eq!(version(0x0300_0000), "version 3 in big-endian order");
    assert_eq!(verdict(b"ggjt\x03\0\0\0".to_vec()), invalid("expected the bytes GGUF, found ggjt"));
    assert_eq!(
        verdict(vec![]),
        invalid("the magic number at byte 0 takes 4 bytes in a file of 0 bytes")
    );
    assert_eq!(
        verdict(b"GGUF\x03\0\0\0\x01".to_vec()),
        invalid("the number of tensors at byte 8 takes 8 bytes in a file of 9 bytes")
    );
}

#[test]
fn counts_are_held_against_the_file() {
    let header = |tensors: u64, keys: u64, rest: usize| {
        let counts = [tensors.to_le_bytes(), keys.to_le_bytes()].concat();
        [b"GGUF\x03\0\0\0", &counts[..], &vec![0; rest]].concat()
    };
    assert_eq!(verdict(header(5, 0, 100)), invalid("5 tensors in a file of 124 bytes"));
    assert_eq!(
        verdict(header(u64::MAX, 0, 100)),
        invalid("18446744073709551615 tensors in a file of 124 bytes")
    );
    assert_eq!(verdict(header(0, 8, 100)), invalid("8 keys in a file of 124 bytes"));
    assert_eq!(verdict(header(0, 65_537, 1 << 20)), invalid("65537 keys; at most 65536 are read"));
    assert_eq!(
        verdict(header(65_537, 0, 2 << 20)),
        invalid("65537 tensors; at most 65536 are read")
    );
}

#[test]
fn lengths_are_held_against_the_file() {
    // A key of 2^64 − 1 bytes, and one that ends past the file.
    for len in [u64::MAX, 25] {
        let mut file = Gguf::new();
        file.alignment = 1;
        file.keys = vec![[&len.to_le_bytes()[..], &[b'k'; 24]].concat()];
        let problem = format!("a key at byte 32 takes {len} bytes in a file of 56 bytes");
        assert_eq!(file.verdict(), invalid(&problem));
    }
    let huge = |value_type: u32, value: &[u8]| {
        let mut file = Gguf::new();
        file.alignment = 1;
        file.keys.clear();
        file.key("k", value_type, value);
        file.verdict()
    };
    let many = |element_type: u32, count: u64| {
        huge(9, &[&element_type.to_le_bytes()[..], &count.to_le_bytes(), &[0; 12]].concat())
    };
    assert_eq!(
        huge(8, &[&u64::MAX.to_le_bytes()[..], b"text"].concat()),
        invalid(
            "the value of \"k\" at byte 45 takes 18446744073709551615 bytes in a file of 49 bytes"
        )
    );
    assert_eq!(
        huge(4, &[1, 0]),
        invalid("the value of \"k\" at byte 37 takes 4 bytes in a file of 39 bytes")
    );
    assert_eq!(
        many(0, 13),
        invalid("the array of \"k\" at byte 49 takes 13 bytes in a file of 61 bytes")
    );
    // A product past 64 bits.
    assert_eq!(
        many(12, 1 << 61),
        invalid(
            "the array of \"k\" at byte 49 takes 18446744073709551615 bytes in a file of 61 bytes"
        )
    );
    assert_eq!(many(8, 2), invalid("the array of \"k\" has 2 strings in a file of 61 bytes"));
    assert_eq!(
        many(8, 1 << 61),
        invalid("the array of \"k\" has 2305843009213693952 strings in a file of 61 bytes")
    );
    let cut = [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &9u64.to_le_bytes(), b"text"].concat();
    assert_eq!(
        huge(9, &cut),
        invalid("the array of \"k\" at byte 57 takes 9 bytes in a file of 61 bytes")
    );
}

#[test]
fn values_are_checked() {
    let with = |value_type: u32, value: &[u8]| {
        let mut file = Gguf::new();
        file.key("k", value_type, value);
        file.verdict()
    };
    assert_eq!(with(13, &[]), invalid("key \"k\": expected a value type from 0 to 12, found 13"));
    assert_eq!(
        with(7, &[2]),
        invalid("key \"k\": expected the byte 0 or 1 for a boolean, found 2")
    );
    assert_eq!(with(8, &string(b"ab\xff")), invalid("the value of \"k\" is not UTF-8 at byte 92"));
    let array = |element_type: u32, elements: &[u8]| {
        with(9, &[&element_type.to_le_bytes()[..], &1u64.to_le_bytes(), elements].concat())
    };
    assert_eq!(array(9, &[0; 12]), invalid("key \"k\" is an array of arrays, which no model has"));
    assert_eq!(array(99, &[0]), invalid("key \"k\": expected a value type from 0 to 12, found 99"));
    assert_eq!(
        array(7, &[3]),
        invalid("key \"k\": expected the byte 0 or 1 for a boolean, found 3")
    );
    assert_eq!(array(8, &string(b"\xc3")), invalid("the array of \"k\" is not UTF-8 at byte 102"));
    let mut file = Gguf::new();
    file.u32("k", 1).u32("k", 1);
    assert_eq!(file.verdict(), invalid("key \"k\" appears twice"));
    let mut file = Gguf::new();
    file.keys.push([string(b"\xff"), vec![0; 5]].concat());
    assert_eq!(file.verdict(), invalid("a key is not UTF-8 at byte 77"));
}

#[test]
fn alignment_is_a_power_of_two() {
    let alignment = |value_type: u32, value: &[u8]| {
        let mut file = Gguf::new();
        file.key("general.alignment", value_type, value);
        file.verdict()
    };
    for (n, found) in [(0u32, "0"), (24, "24")] {
        let expected = format!("general.alignment: expected a power of two, found {found}");
        assert_eq!(alignment(4, &n.to_le_bytes()), expected);
    }
    assert_eq!(
        alignment(5, &(-32i32).to_le_bytes()),
        "general.alignment: expected an integer from 0 to 4294967295, found -32"
    );
    assert_eq!(
        alignment(8, &string(b"32")),
        "general.alignment: expected an integer from 0 to 4294967295, found the string \"32\""
    );
}

#[test]
fn tensors_are_checked() {
    let file = |add: &dyn Fn(&mut Gguf)| {
        let mut file = Gguf::new();
        add(&mut file);
        file.verdict()
    };
    assert_eq!(
        file(&|file| {
            file.info("t", &[1; 5], 0, 0);
        }),
        invalid("tensor \"t\": 5 axes; at most 4")
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[4, 0], 0, 4);
        }),
        invalid("tensor \"t\": a dimension of 0")
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[1], 0, 4).tensor("t", &[1], 0, 4);
        }),
        invalid("tensor \"t\" appears twice")
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[1], 0, 4).info("u", &[1], 0, 2);
        }),
        invalid("tensor \"u\": expected an offset that is a multiple of 32, found 2")
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[8], 0, 32).info("u", &[1], 0, 32);
        }),
        invalid("tensor \"u\": offset 32 in a file with 32 bytes of elements")
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[8], 0, 32).info("u", &[1], 0, u64::MAX - 31);
        }),
        invalid("tensor \"u\": offset 18446744073709551584 in a file with 32 bytes of elements")
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[9], 0, 32);
        }),
        invalid(
            "tensor \"t\": shape [9] of F32 takes 36 bytes, but the end of the file is 32 bytes after its beginning"
        )
    );
    // Overlap: by length, and by offset.
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[9], 0, 32).tensor("u", &[1], 0, 4);
        }),
        invalid(
            "tensor \"t\": shape [9] of F32 takes 36 bytes, but the next tensor is 32 bytes after its beginning"
        )
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[1], 0, 4).info("u", &[1], 0, 0);
        }),
        invalid("tensors \"t\" and \"u\" both begin at 0")
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[255, 2], 35, 200);
        }),
        invalid("tensor \"t\": rows of shape [2, 255] are not whole blocks of TQ2_0")
    );
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[30, 2], 36, 200);
        }),
        invalid("tensor \"t\": rows of shape [2, 30] are not whole blocks of I2_S")
    );
    // I2_S without its scale.
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[128], 36, 32);
        }),
        invalid(
            "tensor \"t\": shape [128] of I2_S takes 64 bytes, but the end of the file is 32 bytes after its beginning"
        )
    );
    // A product past 64 bits.
    let huge = 1u64 << 40;
    assert_eq!(
        file(&|file| {
            file.tensor("t", &[huge, huge], 0, 32);
        }),
        invalid(
            "tensor \"t\": rows of shape [1099511627776, 1099511627776] are not whole blocks of F32"
        )
    );
}

/// Whatever bit of a file is wrong, opening it ends in tensors or in a message of one line, and the
/// bytes of the tensors can be read.
#[test]
fn corrupt_files_do_not_panic() {
    let mut file = Gguf::new();
    file.u32("llama.block_count", 1)
        .array("tokenizer.ggml.tokens", 8, 3, &[string(b"a"), string(b""), string(b"bc")].concat())
        .array("tokenizer.ggml.token_type", 5, 2, &[1, 0, 0, 0, 3, 0, 0, 0])
        .tensor("a", &[256, 2], 35, 132)
        .tensor("b", &[256, 8], 42, 544)
        .tensor("c", &[3], 0, 12);
    let whole = file.bytes();
    let mut opened = 0;
    for at in 0..whole.len() - file.data.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            match open(bytes.clone()) {
                Err(_) => drop(verdict(bytes)),
                Ok(files) => {
                    opened += 1;
                    for info in files.infos() {
                        files.slice(info, 0..info.len_bytes as usize).unwrap();
                    }
                }
            }
        }
    }
    // Letters of names and low bits of values.
    assert!(opened > 500, "{opened}");
}

/// Part `no` (from 0) of a model in `count` parts with one tensor each.
fn part(no: u16, count: u16, tensors: i32) -> Gguf {
    let mut file = Gguf::new();
    if no > 0 {
        file.keys.clear();
    }
    file.key("split.no", 2, &no.to_le_bytes()).key("split.count", 2, &count.to_le_bytes()).key(
        "split.tensors.count",
        5,
        &tensors.to_le_bytes(),
    );
    file.tensor(&format!("t{no}"), &[2], 0, 8);
    file.data = vec![no as u8; 8];
    file
}

#[test]
fn split_models_are_opened_from_any_part() {
    let directory = tempfile::tempdir().unwrap();
    let path = |no: u16| directory.path().join(format!("big-{no:05}-of-00003.gguf"));
    for no in 0..3 {
        std::fs::write(path(no + 1), part(no, 3, 3).bytes()).unwrap();
    }
    for opened in [path(1), path(2), path(3), directory.path().to_owned()] {
        let files = ModelFiles::open(&opened).unwrap();
        assert_eq!(files.tensor_names().collect::<Vec<_>>(), ["t0", "t1", "t2"]);
        for no in 0..3u8 {
            let info = files.info(&format!("t{no}")).unwrap();
            assert_eq!(*files.slice(info, 0..8).unwrap(), [no; 8]);
            assert_eq!(files.file_of(info), path(u16::from(no) + 1).display().to_string());
        }
        let architecture = files.metadata().unwrap().require::<&str>("general.architecture");
        assert_eq!(architecture.unwrap(), "llama");
    }
    std::fs::remove_file(path(2)).unwrap();
    let message = ModelFiles::open(&path(3)).unwrap_err().to_string();
    assert!(message.starts_with(&path(2).display().to_string()), "{message}");
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let verdict = |parts: &[(&str, Gguf)]| {
        let files = parts.iter().map(|(name, file)| ((*name).to_owned(), file.bytes()));
        let message = ModelFiles::in_memory("set", files).unwrap_err().to_string();
        message.replace(&Path::new("set").join("x").display().to_string(), "x")
    };
    let (first, second) = ("x-00001-of-00002.gguf", "x-00002-of-00002.gguf");
    assert_eq!(
        verdict(&[(first, part(0, 2, 2)), (second, part(0, 2, 2))]),
        "x-00002-of-00002.gguf: expected split.no 1, split.count 2, split.tensors.count 2, found \
         split.no 0, split.count 2, split.tensors.count 2"
    );
    assert_eq!(
        verdict(&[(first, part(0, 2, 2)), (second, part(1, 3, 2))]),
        "x-00002-of-00002.gguf: expected split.no 1, split.count 2, split.tensors.count 2, found \
         split.no 1, split.count 3, split.tensors.count 2"
    );
    assert_eq!(
        verdict(&[(first, part(0, 2, 3)), (second, part(1, 2, 3))]),
        "set: expected 3 tensors (split.tensors.count), found 2 in its 2 parts"
    );
    let mut same = part(1, 2, 2);
    same.tensors.clear();
    same.info("t0", &[2], 0, 0);
    assert_eq!(
        verdict(&[(first, part(0, 2, 2)), (second, same)]),
        "x-00002-of-00002.gguf: tensor \"t0\" is also in x-00001-of-00002.gguf"
    );
    // Names that do not go with the keys.
    let name = "expected a name that ends in -0000N-of-0000M.gguf with M as split.count";
    assert_eq!(
        verdict(&[("x.gguf", part(0, 2, 2))]),
        format!("x.gguf: {name}, found split.count 2")
    );
    assert_eq!(verdict(&[(first, Gguf::new())]), format!("{first}: {name}, found split.count 0"));
    let mut lacking = Gguf::new();
    lacking.u32("split.count", 2);
    assert_eq!(
        verdict(&[(first, lacking)]),
        format!("{first}: split.no: expected an integer from 0, found nothing")
    );
}

/// What a merge of parts leaves behind.
#[test]
fn a_model_in_one_part_is_not_split() {
    for (name, count) in [("x.gguf", 0), ("x.gguf", 1), ("x-00001-of-00001.gguf", 1)] {
        let files = [(name.to_owned(), part(0, count, 1).bytes())];
        assert_eq!(ModelFiles::in_memory("set", files).unwrap().infos().count(), 1);
    }
}

#[test]
fn what_a_path_may_be() {
    let directory = tempfile::tempdir().unwrap();
    let message = |path: &Path| {
        let message = ModelFiles::open(path).unwrap_err().to_string();
        message.replace(&directory.path().display().to_string(), "DIR")
    };
    let nothing = "DIR: no model.safetensors, model.safetensors.index.json or GGUF file in this \
                   directory";
    assert_eq!(message(directory.path()), nothing);

    let mut file = Gguf::new();
    file.tensor("t", &[1], 0, 4);
    let path = directory.path().join("a.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    std::fs::write(directory.path().join("config.json"), "{}").unwrap();
    // A file comes alone, a directory with what is in it.
    let alone = ModelFiles::open(&path).unwrap();
    assert_eq!(alone.label(), path.display().to_string());
    assert!(alone.file("config.json").unwrap().is_none());
    let beside = ModelFiles::open(directory.path()).unwrap();
    assert!(beside.file("config.json").unwrap().is_some());
    for files in [alone, beside] {
        assert_eq!(files.file_of(files.info("t").unwrap()), path.display().to_string());
    }

    let other = directory.path().join("b.GGUF");
    std::fs::write(&other, file.bytes()).unwrap();
    assert_eq!(
        message(directory.path()),
        "DIR: expected one model, found 2 GGUF models (a.gguf, b.GGUF); name one of the files"
    );
    // By what it begins with, whatever its name.
    let blob = directory.path().join("sha256-00");
    std::fs::rename(&other, &blob).unwrap();
    assert_eq!(ModelFiles::open(&blob).unwrap().infos().count(), 1);
    for bytes in [&b"GGML"[..], b"GG", b""] {
        std::fs::write(&blob, bytes).unwrap();
        assert!(message(&blob).ends_with("sha256-00: not a directory and not a GGUF file"));
    }
    // Safetensors come first.
    let header = br#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header, &[7]].concat();
    std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
    let files = ModelFiles::open(directory.path()).unwrap();
    assert!(files.metadata().is_none());
    assert_eq!(files.tensor_names().collect::<Vec<_>>(), ["w"]);
}

fn plan(name: &str, ty: GgmlType, shape: &[usize]) -> TensorPlan {
    TensorPlan { name: name.to_owned(), ty, shape: shape.to_vec() }
}

#[test]
fn the_minimal_file_is_written() {
    let keys = [
        ("general.architecture", Value::String("llama".to_owned())),
        ("llama.block_count", Value::U32(1)),
    ];
    let plans = [plan("t.weight", GgmlType::Tq2_0, &[1, 256])];
    let mut writer = Writer::new(Vec::new(), &keys, &plans).unwrap();
    let data: Vec<u8> = (0..66).collect();
    for piece in [&data[..1], &[], &data[1..60], &data[60..]] {
        writer.write(piece).unwrap();
    }
    // The last tensor is padded like the others.
    let expected = [&MINIMAL[..], &data, &[0; 30]].concat();
    assert_eq!(writer.finish().unwrap(), expected);
}

#[test]
fn what_is_written_is_read() {
    let keys = [
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-1)),
        ("u16", Value::U16(65535)),
        ("i16", Value::I16(-2)),
        ("u32", Value::U32(u32::MAX)),
        ("i32", Value::I32(i32::MIN)),
        ("u64", Value::U64(u64::MAX)),
        ("i64", Value::I64(i64::MIN)),
        ("f32", Value::F32(1.5)),
        ("f64", Value::F64(0.1)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("ü".to_owned())),
        ("u8s", Value::Array(Array::U8(vec![1, 2]))),
        ("i8s", Value::Array(Array::I8(vec![-1, 2]))),
        ("u16s", Value::Array(Array::U16(vec![1, 2]))),
        ("i16s", Value::Array(Array::I16(vec![-1, 2]))),
        ("u32s", Value::Array(Array::U32(vec![1, 2]))),
        ("i32s", Value::Array(Array::I32(vec![-1, 2]))),
        ("u64s", Value::Array(Array::U64(vec![1, 2]))),
        ("i64s", Value::Array(Array::I64(vec![-1, 2]))),
        ("f32s", Value::Array(Array::F32(vec![0.5]))),
        ("f64s", Value::Array(Array::F64(vec![0.5]))),
        ("bools", Value::Array(Array::Bool(vec![true, false]))),
        ("strings", Value::Array(Array::String(["a", "", "bc"].into_iter().collect()))),
        ("none", Value::Array(Array::U32(vec![]))),
    ];
    // Every type that the lengths tell.
    let plans: Vec<TensorPlan> =
        GgmlType::ALL.iter().map(|&ty| plan(ty.name(), ty, &[8, 256])).collect();
    let bytes_of =
        |i: usize| vec![i as u8; plans[i].ty.len_bytes(&plans[i].shape).unwrap() as usize];
    let mut writer = Writer::new(Vec::new(), &keys, &plans).unwrap();
    for i in 0..plans.len() {
        bytes_of(i).chunks(1000).for_each(|piece| writer.write(piece).unwrap());
    }
    let files = open(writer.finish().unwrap()).unwrap();
    let metadata = files.metadata().unwrap();
    assert_eq!(metadata.iter().len(), keys.len());
    for (key, value) in metadata.iter() {
        assert_eq!(keys.iter().find(|(name, _)| *name == key).unwrap().1, *value);
    }
    assert_eq!(files.infos().count(), plans.len());
    for (i, plan) in plans.iter().enumerate() {
        let info = files.info(&plan.name).unwrap();
        assert_eq!((&info.shape, files.ggml_type(info).unwrap()), (&plan.shape, plan.ty));
        assert_eq!(*files.slice(info, 0..info.len_bytes as usize).unwrap(), bytes_of(i));
    }
}

#[test]
fn what_cannot_be_written_says_so() {
    let header = |keys: &[(&str, Value)], plans: &[TensorPlan]| {
        let error = Writer::new(Vec::new(), keys, plans).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        error.to_string()
    };
    let key = ("k", Value::U8(1));
    assert_eq!(header(&[key.clone(), key], &[]), "key \"k\" cannot be written again");
    assert_eq!(
        header(&[("general.alignment", Value::U32(32))], &[]),
        "key \"general.alignment\" cannot be written again"
    );
    let f32 = |shape: &[usize]| plan("t", GgmlType::F32, shape);
    assert_eq!(header(&[], &[f32(&[1]), f32(&[2])]), "tensor \"t\" appears twice");
    for shape in [&[1; 5][..], &[2, 0], &[usize::MAX, 2]] {
        let expected = format!("tensor \"t\": no F32 of shape {shape:?}");
        assert_eq!(header(&[], &[f32(shape)]), expected);
    }
    assert_eq!(
        header(&[], &[plan("t", GgmlType::Tq2_0, &[2, 128])]),
        "tensor \"t\": no TQ2_0 of shape [2, 128]"
    );

    let mut writer = Writer::new(Vec::new(), &[], &[f32(&[2])]).unwrap();
    writer.write(&[0; 5]).unwrap();
    let problem = |result: std::io::Result<()>| result.unwrap_err().to_string();
    assert_eq!(problem(writer.write(&[0; 4])), "tensor \"t\": 4 bytes where 3 are left");
    writer.write(&[0; 3]).unwrap();
    assert_eq!(problem(writer.write(&[0])), "1 bytes after the last tensor");
    writer.finish().unwrap();
    let writer = Writer::new(Vec::new(), &[], &[f32(&[2])]).unwrap();
    assert_eq!(problem(writer.finish().map(drop)), "tensor \"t\": 8 bytes are missing");
}

/// A golden file with one more tensor of floats.
fn golden_with(name: &str, tensor: &str, values: &[f32]) -> Checkpoint {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf").join(name);
    let files = ModelFiles::open(&path).unwrap();
    let keys: Vec<_> = files.metadata().unwrap().iter().map(|(k, v)| (k, v.clone())).collect();
    let infos: Vec<_> = files.infos().collect();
    let ty = |info: &&TensorInfo| GgmlType::from_name(&info.dtype).unwrap();
    let plans = infos.iter().map(|info| plan(&info.name, ty(info), &info.shape));
    let mut plans: Vec<_> = plans.collect();
    plans.push(plan(tensor, GgmlType::F32, &[values.len()]));
    let mut writer = Writer::new(Vec::new(), &keys, &plans).unwrap();
    for info in infos {
        writer.write(&files.slice(info, 0..info.len_bytes as usize).unwrap()).unwrap();
    }
    writer.write(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    Checkpoint::new(open(writer.finish().unwrap()).unwrap()).unwrap()
}

/// The file's own factors of the rotary frequencies are carried over.
#[test]
fn converting_keeps_rope_factors() {
    let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32).collect();
    let original = golden_with("llama-a-i2_s.gguf", "rope_freqs.weight", &factors);
    let mut out = Vec::new();
    let target = (Path::new("out.gguf"), &mut out);
    write_gguf(&original, "m", None, GgmlType::I2S, target, &mut |_, _| {}).unwrap();
    let converted = Checkpoint::new(open(out).unwrap()).unwrap();
    let (expected, found) = (original.frequencies().unwrap(), converted.frequencies().unwrap());
    for (i, (a, b)) in expected.inv_freq.iter().zip(&found.inv_freq).enumerate() {
        assert!((a / b - 1.0).abs() < 1e-6, "{i}: expected {a}, found {b}");
    }
}
