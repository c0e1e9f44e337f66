//! A decode step on the CPU allocates nothing but blocks of the KV cache, nothing else grows with the context,
//! and a model that is read in pieces never stands in memory.
//!
//! A binary of its own, because the allocator counts for the whole process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use sterna::backend::simd::{Level, SimdBackend};
use sterna::backend::{LoadOptions, Output, Want};
use sterna::config::ModelConfig;
use sterna::convert::write_hf;
use sterna::format::{ModelFiles, ReadAt};
use sterna::kv_cache::{KvFormat, KvShape};
use sterna::model::Transformer;
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_bonsai, tiny_llama, tiny_normed};
use sterna::weights::{Checkpoint, Int8Rows, WeightSource};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// Bytes allocated and not freed.
static LIVE: AtomicUsize = AtomicUsize::new(0);

/// The most that these have been.
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// One test at a time: they count for the whole process.
static COUNTS: Mutex<()> = Mutex::new(());

#[expect(unsafe_code, reason = "an allocator is unsafe by its interface")]
// SAFETY: forwards to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        let live = LIVE.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(live, SeqCst);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_decode_step_allocates_nothing() {
    let _alone = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    let bonsai = [tiny_bonsai(1, 128), tiny_bonsai(2, 64)];
    let cases = [(tiny_bitnet(), false), (tiny_llama(), false), (tiny_normed(), false)]
        .into_iter()
        .chain(bonsai.into_iter().flat_map(|config| [(config.clone(), false), (config, true)]));
    for (config, int8_activations) in cases {
        let model = SyntheticModel::new(config, 5);
        for level in Level::available() {
            for threads in [1, 3] {
                let options = LoadOptions {
                    context: Some(100),
                    max_batch: 8,
                    threads: Some(threads),
                    int8_activations,
                    ..LoadOptions::default()
                };
                let backend =
                    SimdBackend::load_on(level, &model, &options, &mut |_| {}).expect("loads");
                let mut transformer = Transformer::new(model.config().clone(), Box::new(backend));
                // Other threads (of the harness, of the loader) may allocate meanwhile, but not in
                // every attempt, as a decode that allocates would.
                let fewest = (0..5).map(|_| allocations_of_decode(&mut transformer)).min();
                assert_eq!(fewest, Some(0), "{level:?}, {threads} threads");
            }
        }
    }
}

#[test]
fn only_the_kv_cache_grows_with_the_context() {
    /// Token ids, tables of blocks, and what the harness does meanwhile.
    const SLACK: usize = 64 << 10;
    let _alone = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    let config = ModelConfig { max_position_embeddings: 4096, ..tiny_bitnet() };
    let model = SyntheticModel::new(config.clone(), 5);
    for kv in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        let options = LoadOptions { kv: Some(kv), threads: Some(2), ..LoadOptions::default() };
        let backend =
            SimdBackend::load_on(Level::Scalar, &model, &options, &mut |_| {}).expect("loads");
        let mut transformer = Transformer::new(config.clone(), Box::new(backend));
        let before = LIVE.load(SeqCst);
        assert_eq!(transformer.kv_bytes(), 0);
        for context in [500, 1000, 2000] {
            let more = context - transformer.position();
            transformer.feed(&vec![7; more], Want::Nothing).expect("runs");
            let block = KvShape::new(&config, kv).block_bytes();
            let expected = context.div_ceil(64) * block;
            assert_eq!(transformer.kv_bytes(), expected as u64);
            let grown = LIVE.load(SeqCst) - before;
            assert!(
                (expected..expected + SLACK).contains(&grown),
                "{kv:?}, {context}: expected {expected} bytes, found {grown}"
            );
        }
    }
}

/// A file that is read in pieces.
struct OnDisk(Mutex<File>);

impl ReadAt for OnDisk {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("no test panics in it").metadata()?.len())
    }

    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut file = self.0.lock().expect("no test panics in it");
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buffer)
    }
}

#[test]
fn a_model_that_is_read_in_pieces_never_stands_in_memory() {
    /// A row of the table, and how many are asked for at a time.
    const ROW_BYTES: usize = 2 * 512;
    const ROWS: usize = 1024;
    let _alone = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    let config = ModelConfig {
        vocab_size: 40_000,
        hidden_size: 512,
        intermediate_size: 1024,
        num_attention_heads: 8,
        head_dim: 64,
        ..tiny_bitnet()
    };
    let directory = tempfile::tempdir().expect("a directory");
    let model = SyntheticModel::new(config, 5);
    write_hf(&model, directory.path(), &mut |_, _| {}).expect("writes");
    let reader = |name: &str| -> (String, Arc<dyn ReadAt>) {
        let file = File::open(directory.path().join(name)).expect("written");
        (name.to_owned(), Arc::new(OnDisk(Mutex::new(file))))
    };
    let before = LIVE.load(SeqCst);
    let peak = || PEAK.swap(LIVE.load(SeqCst), SeqCst) - before;
    peak();
    let names = ["config.json", "model.safetensors"];
    let files = ModelFiles::from_readers("set", names.map(reader)).expect("opens");
    let checkpoint = Checkpoint::new(files).expect("opens");
    assert!(peak() < 1 << 20, "to open it");
    let table = checkpoint.stored_embedding().expect("is there");
    let mut row = vec![0.0; 512];
    for first in (0..40_000).step_by(ROWS) {
        let last = (first + ROWS).min(40_000);
        let rows = table.rows(first..last).expect("reads");
        (first..last).for_each(|n| rows.row(n, &mut row).expect("is there"));
    }
    // The elements beside the bytes that they are read from.
    let found = peak();
    assert!(
        (2 * ROWS * ROW_BYTES..3 * ROWS * ROW_BYTES).contains(&found),
        "{found} bytes for rows"
    );
    let int8 = Int8Rows::of(&table).expect("plain floats");
    for first in (0..int8.tiles()).step_by(32) {
        int8.pack(first..(first + 32).min(int8.tiles())).expect("packs");
    }
    // The same, the codes, and f32 rows of each thread.
    let found = peak();
    assert!(found < 5 * ROWS * ROW_BYTES, "{found} bytes for int8 rows");
    for layer in 0..3 {
        checkpoint.layer(layer).expect("reads");
    }
    let found = peak();
    assert!(found < 2 << 20, "{found} bytes for a layer");
    // All at once is another matter.
    drop(checkpoint.embedding().expect("reads"));
    let found = peak();
    assert!(found > 40_000 * ROW_BYTES, "{found} bytes for the table");
}

/// Allocations while 50 tokens are decoded.
fn allocations_of_decode(transformer: &mut Transformer) -> usize {
    transformer.reset();
    transformer.feed(&[1, 2, 3], Want::Nothing).expect("runs");
    let mut token = 4;
    let before = ALLOCATIONS.load(SeqCst);
    for _ in 0..50 {
        match transformer.feed(&[token], Want::Token) {
            Ok(Output::Token(next)) => token = next,
            other => panic!("{other:?}"),
        }
    }
    ALLOCATIONS.load(SeqCst) - before
}
