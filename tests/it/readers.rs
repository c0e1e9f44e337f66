//! Models that are read piece by piece: the same weights as of mapped files, and hostile readers refused.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use sterna::convert::compare;
use sterna::format::ggml::GgmlType;
use sterna::format::gguf::{Array, TensorPlan, Value, Writer};
use sterna::format::{ModelFiles, ReadAt};
use sterna::weights::{Checkpoint, TableData, WeightSource};

use crate::golden::{BONSAI, GGUF, MODELS, checkpoint};

/// A file, with the longest piece that was asked for.
struct OnDisk {
    file: Mutex<File>,
    longest: Arc<AtomicUsize>,
}

impl ReadAt for OnDisk {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.file.lock().unwrap().metadata()?.len())
    }

    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.longest.fetch_max(buffer.len(), SeqCst);
        let mut file = self.file.lock().unwrap();
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buffer)
    }
}

/// A file by name.
type NamedReader = (String, Arc<dyn ReadAt>);

/// Readers of a file, or of the files of a directory.
fn readers(path: &Path, longest: &Arc<AtomicUsize>) -> Vec<NamedReader> {
    let paths = match path.is_dir() {
        true => std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect(),
        false => vec![path.to_owned()],
    };
    let reader = |path: &Path| -> NamedReader {
        let file = Mutex::new(File::open(path).unwrap());
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, Arc::new(OnDisk { file, longest: longest.clone() }))
    };
    paths.iter().map(|path| reader(path)).collect()
}

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[test]
fn weights_are_those_of_the_mapped_files() {
    for name in MODELS.iter().chain(&GGUF).chain([&BONSAI]) {
        let path = golden(name);
        let longest = Arc::default();
        let files = ModelFiles::from_readers("set", readers(&path, &longest)).unwrap();
        let read = Checkpoint::new(files).unwrap();
        let mapped = checkpoint(name);
        let found = compare(&mapped, &read, &mut |_, _| {}).unwrap();
        assert!(found.trits > 0 && found.floats > 0 && found.other_scales == 0, "{name}");
        assert_eq!(mapped.identity().unwrap(), read.identity().unwrap(), "{name}");
        assert_eq!(read.stamp().unwrap(), None);
        // Rows that stay in their file are the rows of the table.
        let tables = [
            (mapped.embedding().unwrap(), Some(read.stored_embedding().unwrap())),
            (mapped.embedding().unwrap(), Some(mapped.stored_embedding().unwrap())),
        ];
        let heads = mapped.lm_head().unwrap().map(|head| (head, read.stored_lm_head().unwrap()));
        for (expected, found) in tables.into_iter().chain(heads) {
            let found = found.unwrap();
            let (mut a, mut b) = (vec![0.0; expected.shape().k()], vec![0.0; found.shape().k()]);
            for n in [0, 1, 7, 998, 999] {
                expected.row(n, &mut a).unwrap();
                found.rows(n / 2..n + 1).unwrap().row(n, &mut b).unwrap();
                assert!(a == b, "{name}, row {n}");
            }
        }
        // Trits take little memory.
        let is_packed = matches!(mapped.embedding().unwrap().data(), TableData::Groups(_));
        let is_stored = |checkpoint: &Checkpoint| {
            matches!(checkpoint.stored_embedding().unwrap().data(), TableData::Stored(_))
        };
        assert_eq!((is_stored(&read), is_stored(&mapped)), (!is_packed, false), "{name}");
    }
}

#[test]
fn a_header_is_read_in_growing_pieces() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("long.gguf");
    // As many names as a vocabulary has: far more than the first piece holds.
    let names = (0..100_000u32).collect::<Vec<_>>();
    let keys = [
        ("test.numbers", Value::Array(Array::U32(names))),
        ("test.last", Value::String("end".to_owned())),
    ];
    let plan = TensorPlan { name: "t".to_owned(), ty: GgmlType::F32, shape: vec![500_000] };
    let mut writer = Writer::new(File::create(&path).unwrap(), &keys, &[plan]).unwrap();
    writer.write(&[7; 2_000_000]).unwrap();
    writer.finish().unwrap();
    let longest = Arc::default();
    let files = ModelFiles::from_readers("set", readers(&path, &longest)).unwrap();
    assert_eq!(files.metadata().unwrap().require::<&str>("test.last").unwrap(), "end");
    // The second piece is four times the first; the tensor is none of the header's business.
    assert_eq!(longest.load(SeqCst), 1 << 20);
    let tensor = files.stored(files.info("t").unwrap());
    assert_eq!(tensor.slice(1_999_999..2_000_000).unwrap()[..], [7]);
    assert!(!tensor.is_in_place());
}

/// A reader that does not do what it should.
struct Hostile {
    bytes: Vec<u8>,
    /// What it says its length is.
    len: io::Result<u64>,
    /// Reads that succeed.
    good: AtomicUsize,
    problem: &'static str,
}

impl ReadAt for Hostile {
    fn len_bytes(&self) -> io::Result<u64> {
        match &self.len {
            Ok(len) => Ok(*len),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        }
    }

    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let is_good = self.good.fetch_update(SeqCst, SeqCst, |good| good.checked_sub(1)).is_ok();
        let start = usize::try_from(offset).unwrap();
        match self.bytes.get(start..start + buffer.len()) {
            Some(bytes) if is_good => buffer.copy_from_slice(bytes),
            Some(_) => return Err(io::Error::other(self.problem)),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }
}

/// The message of the first error of a GGUF model of that reader.
fn message(reader: Hostile) -> String {
    message_of([("m.gguf", reader)])
}

/// Opens a model and reads every weight; returns the message of the first error.
fn message_of<const N: usize>(files: [(&str, Hostile); N]) -> String {
    let opened = || {
        let reader = |reader| Arc::new(reader) as Arc<dyn ReadAt>;
        let files = files.map(|(name, file)| (name.to_owned(), reader(file)));
        let checkpoint = Checkpoint::new(ModelFiles::from_readers("set", files)?)?;
        let table = checkpoint.stored_embedding()?;
        table.rows(0..table.shape().n())?;
        checkpoint.embedding()?;
        checkpoint.final_norm()?;
        (0..checkpoint.config().num_hidden_layers)
            .try_for_each(|layer| checkpoint.layer(layer).map(drop))
    };
    opened().unwrap_err().to_string()
}

#[test]
fn hostile_readers_give_errors_of_one_line() {
    let bytes = std::fs::read(golden("gguf/bitnet-a-i2_s.gguf")).unwrap();
    let len = bytes.len() as u64;
    let hostile = |len, good, problem| Hostile {
        bytes: bytes.clone(),
        len,
        good: AtomicUsize::new(good),
        problem,
    };
    // Any read may be the one that fails.
    for good in [0, 1, 2, 5, 10, 20] {
        let found = message(hostile(Ok(len), good, "the connection\nwas\tcut"));
        assert_eq!(found, "set/m.gguf: the connection was cut", "after {good} reads");
    }
    let long: &'static str = "x".repeat(1000).leak();
    assert!(message(hostile(Ok(len), 0, long)).len() < 300);
    // It ends before the length that it says.
    let mut reader = hostile(Ok(len), usize::MAX, "");
    reader.bytes.truncate(bytes.len() - 1000);
    assert_eq!(message(reader), "set/m.gguf: unexpected end of file");
    // Lengths that nothing can have: nothing of that size is allocated.
    let file = |name, len| Hostile {
        bytes: std::fs::read(golden("bitnet-a-packed").join(name)).unwrap(),
        len: Ok(len),
        good: AtomicUsize::new(usize::MAX),
        problem: "",
    };
    let model = || ("model.safetensors", file("model.safetensors", u64::MAX));
    let found = message_of([("config.json", file("config.json", u64::MAX)), model()]);
    assert!(found.starts_with("set/model.safetensors: not a valid safetensors file"), "{found}");
    let found = message_of([("config.json", file("config.json", u64::MAX))]);
    assert!(found.starts_with("set: no model.safetensors"), "{found}");
    let index = ("model.safetensors.index.json", file("config.json", u64::MAX));
    assert_eq!(message_of([index]), "set/model.safetensors.index.json: file too large");
    // Shorter: the header does not describe it.
    let found = message(hostile(Ok(len / 2), usize::MAX, ""));
    assert!(found.starts_with("set/m.gguf: not a valid GGUF file"), "{found}");
    let found = message(hostile(Err(io::Error::other("gone\n")), usize::MAX, ""));
    assert_eq!(found, "set/m.gguf: gone");
    // Other bytes than NaN would be read as they are; NaN is refused wherever it is read.
    let header = Checkpoint::open(&golden("gguf/bitnet-a-i2_s.gguf")).unwrap();
    let info = header.files().info("token_embd.weight").unwrap();
    assert!(info.len_bytes > 0);
    let mut reader = hostile(Ok(len), usize::MAX, "");
    let row = header.files().slice(info, 0..64).unwrap();
    let at = reader.bytes.windows(64).position(|bytes| bytes == &row[..]).unwrap();
    reader.bytes[at + 2..at + 4].copy_from_slice(&[0xff, 0x7f]);
    let found = message(reader);
    assert_eq!(
        found,
        "set/m.gguf: tensor token_embd.weight: expected finite elements, found NaN or infinity at row 0, \
         column 1"
    );
}
