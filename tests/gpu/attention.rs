//! Attention over the KV cache, and what writes it, against their twins in `cpu-ref`: every format,
//! shape of heads and context edge, with the blocks of a sequence in any order.

use std::collections::BTreeSet;

use cpu_ref::attention::{Cached, Heads};
use cpu_ref::kv::{f16_bits, f16_value, store_head};
use cpu_ref::quantize_absmax::quantize_absmax;
use libtest_mimic::Failed;
use sterna::backend::gpu::kernels::{self, KvLayout, KvShard, TileFor};
use sterna::backend::gpu::self_test::{Attend, TestCache, attend, check_attention, run};
use sterna::backend::gpu::shader::{KERNELS, UNCHECKED};
use sterna::backend::gpu::{Capabilities, Gpu, PassParams, WeightsRead};
use sterna::kv_cache::{BLOCK, KvFormat};
use sterna::random::Random;

use crate::util::{as_f32, close, run_guarded, same};
use crate::{Body, Case};

const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::F16, KvFormat::Int8];

pub fn cases(capabilities: Capabilities) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    if capabilities == Capabilities::Adapter {
        // The same kernels with the same constants.
        return cases;
    }
    let mut add = |name: &str, case: Body| cases.push((name.to_owned(), case));
    for format in FORMATS {
        add(&format!("attention::{format:?}"), Box::new(move |gpu| shapes(gpu, format)));
        add(&format!("attention::{format:?}::tiles"), Box::new(move |gpu| tiles(gpu, format)));
        add(&format!("attention::{format:?}::parts"), Box::new(move |gpu| parts(gpu, format)));
        let checked = move |gpu: &Gpu| {
            for (query, kv, dim) in [(20, 5, 128), (3, 1, 100), (2, 1, 6)] {
                check_attention(gpu, KvLayout { heads: Heads { query, kv, dim }, format })?;
            }
            Ok(())
        };
        add(&format!("self_test::attention::{format:?}"), Box::new(checked));
        add(&format!("kv_store::{format:?}"), Box::new(move |gpu| store(gpu, format)));
    }
    add("attention::what_is_not_seen_does_not_matter", Box::new(unseen));
    add("attention::a_corrupted_key_is_caught", Box::new(corrupted));
    add("attention::shards_are_left_alone", Box::new(other_shards));
    add("attention::no_pass_leaves_the_buffers", Box::new(untrue_pass));
    add("unchecked::attention", Box::new(move |gpu| unchecked(gpu, capabilities)));
    add("kv_store::halves", Box::new(halves));
    cases
}

/// A sequence of positions with random keys and values, in blocks in a random order.
struct Sequence {
    layout: KvLayout,
    /// `[S, G, D]`, as they come.
    rows: [Vec<f32>; 2],
    /// As the cache gives them back.
    stored: [Vec<f32>; 2],
    /// `[S, G]`.
    scales: [Vec<f32>; 2],
    table: Vec<u32>,
    blocks: usize,
}

impl Sequence {
    fn random(random: &mut Random, layout: KvLayout, positions: usize) -> Self {
        let KvLayout { heads, format } = layout;
        let len = positions * heads.kv * heads.dim;
        let rows = [random.floats(len, 2.0), random.floats(len, 5.0)];
        let (mut stored, mut scales) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for (part, rows) in rows.iter().enumerate() {
            for head in rows.chunks_exact(heads.dim) {
                let head = store_head(head, format);
                stored[part].extend(head.values);
                scales[part].push(head.scale);
            }
        }
        // One block of another sequence between.
        let blocks = positions.div_ceil(BLOCK) + 1;
        let mut table: Vec<u32> = (0..blocks as u32).collect();
        for at in (1..blocks).rev() {
            table.swap(at, random.below(at + 1));
        }
        table.pop();
        Self { layout, rows, stored, scales, table, blocks }
    }

    fn upload(&self, gpu: &Gpu) -> Result<TestCache, Failed> {
        let [keys, values] = &self.rows;
        Ok(TestCache::upload(gpu, self.layout, [keys, values], &self.table, self.blocks)?)
    }

    /// Attention of a token `[H, D]` that sees so many positions.
    fn attention(&self, query: &[f32], positions: usize) -> Vec<f32> {
        let heads = self.layout.heads;
        let len = positions * heads.kv * heads.dim;
        let [keys, values] = self.stored.each_ref().map(|rows| &rows[..len]);
        let [key_scale, value_scale] =
            self.scales.each_ref().map(|scales| &scales[..positions * heads.kv]);
        let has_scales = self.layout.format == KvFormat::Int8;
        let scales = has_scales.then_some((key_scale, value_scale));
        cpu_ref::attention::attention(query, Cached { keys, values, scales }, heads)
    }
}

/// Equal bits where the device rounds as the reference does, else within the bound of the sums.
fn judge(
    gpu: &Gpu,
    what: &str,
    heads: Heads,
    found: &[f32],
    expected: &[f32],
) -> Result<(), Failed> {
    if gpu.adapter.name.starts_with("llvmpipe") {
        return same(what, found, expected);
    }
    // Scores up to 6·√D with f32 sums over D: their error, about √D·D ULP at most and far less on
    // average, is the relative error of a weight; values are up to 5.
    let bound = 5.0 * (32.0 + heads.dim as f32) * f32::EPSILON;
    close(what, found, expected, |_| bound)
}

/// Heads, of which every test takes some: they are constants of the kernels, which are compiled for each of
/// them and each format. Dimensions below, at and past whole steps and units, in every format; then as many
/// queries a key as make several sets of rows, or several workgroups, which no format has a part in.
const HEADS: [(usize, usize, usize); 10] = [
    (1, 1, 2),
    (2, 1, 6),
    (3, 1, 100),
    (20, 5, 128),
    (4, 2, 32),
    (2, 1, 256),
    (5, 1, 64),
    (4, 4, 96),
    (20, 1, 32),
    (9, 1, 256),
];

/// The first of [`HEADS`], which every format has.
const OF_ALL_FORMATS: usize = 6;

/// The heads that a format is tested with: the other ones of [`HEADS`] take turns.
fn heads_of(format: KvFormat) -> Vec<(usize, usize, usize)> {
    let turn = FORMATS.iter().position(|other| *other == format).expect("all formats");
    let (all, others) = HEADS.split_at(OF_ALL_FORMATS);
    let mine = others.iter().skip(turn).step_by(FORMATS.len());
    all.iter().chain(mine).copied().collect()
}

/// One token over contexts around the edges of blocks, by every kernel.
fn shapes(gpu: &Gpu, format: KvFormat) -> Result<(), Failed> {
    let mut random = Random::new(17);
    for (query, kv, dim) in heads_of(format) {
        let layout = KvLayout { heads: Heads { query, kv, dim }, format };
        let contexts: &[usize] = match (query, kv, dim) {
            (20, 5, 128) => &[1, 63, 64, 200, 1000],
            (_, _, 2 | 32) => &[1, 63, 64, 65, 128],
            (_, _, 256) => &[1, 65, 200],
            _ => &[1, 129, 200],
        };
        for &positions in contexts {
            let sequence = Sequence::random(&mut random, layout, positions);
            let cache = sequence.upload(gpu)?;
            let q = random.floats(query * dim, 3.0);
            let expected = sequence.attention(&q, positions);
            for how in [Attend::Whole, Attend::Tile(TileFor::adapter(&gpu.adapter)), Attend::Blocks]
            {
                let found = attend(gpu, &cache, how, &q, positions - 1)?;
                let what = format!("{how:?} {layout:?} of {positions}");
                judge(gpu, &what, layout.heads, &found, &expected)?;
            }
        }
    }
    Ok(())
}

/// Many tokens: around the edges of tiles of rows, across blocks, each as if it were alone.
fn tiles(gpu: &Gpu, format: KvFormat) -> Result<(), Failed> {
    let mut random = Random::new(18);
    for (query, kv, dim) in heads_of(format) {
        // Where they start, and how many.
        let (start, m) = match (query, kv, dim) {
            (1, 1, 2) => (0, 17),
            (2, 1, 6) => (0, 1),
            (3, 1, 100) => (40, 30),
            (20, 5, 128) => (60, 9),
            (4, 2, 32) => (0, 70),
            (2, 1, 256) => (130, 5),
            (5, 1, 64) => (62, 40),
            (4, 4, 96) => (255, 2),
            _ => (126, 4),
        };
        let layout = KvLayout { heads: Heads { query, kv, dim }, format };
        let sequence = Sequence::random(&mut random, layout, start + m);
        let cache = sequence.upload(gpu)?;
        let row = query * dim;
        let q = random.floats(m * row, 3.0);
        let seen = start + 1..;
        let tokens = q.chunks_exact(row).zip(seen);
        let expected: Vec<f32> = tokens.flat_map(|(q, seen)| sequence.attention(q, seen)).collect();
        for tile_for in BTreeSet::from([TileFor::Gpu, TileFor::adapter(&gpu.adapter)]) {
            let found = attend(gpu, &cache, Attend::Tile(tile_for), &q, start)?;
            let what = format!("{layout:?} {tile_for:?} of {m} tokens from {start}");
            judge(gpu, &what, layout.heads, &found, &expected)?;
        }
    }
    Ok(())
}

/// Blocks in shards, taken in parts: the same bits as all at once.
fn parts(gpu: &Gpu, format: KvFormat) -> Result<(), Failed> {
    let mut random = Random::new(19);
    // Each block is a shard, and compiled for: few of them.
    for (query, kv, dim, start, m) in [(4, 2, 32, 120, 20), (3, 1, 100, 62, 3), (2, 1, 6, 0, 130)] {
        let layout = KvLayout { heads: Heads { query, kv, dim }, format };
        let sequence = Sequence::random(&mut random, layout, start + m);
        let cache = sequence.upload(gpu)?;
        let q = random.floats(m * query * dim, 3.0);
        let expected =
            attend(gpu, &cache, Attend::Tile(TileFor::adapter(&gpu.adapter)), &q, start)?;
        let words = kernels::partial_words(layout.heads);
        let states = [gpu.storage("state", m * words)?, gpu.storage("state", m * words)?];
        let (query_in, out) = (gpu.upload("q", &q)?, gpu.storage("out", q.len())?);
        // Shards of a block each.
        for (index, &block) in sequence.table.iter().enumerate() {
            let shard = KvShard { layout, base: block as usize, blocks: 1 };
            let [keys, values, scales] = layout.block_words();
            let part = |slice: &sterna::backend::gpu::Slice, len: usize| match len {
                0 => slice.clone(),
                len => slice.words(block as usize * len, len),
            };
            let parts = [
                part(&cache.parts[0], keys),
                part(&cache.parts[1], values),
                part(&cache.parts[2], scales),
            ];
            let (from, to) = (&states[index % 2], &states[(index + 1) % 2]);
            let buffers =
                [&query_in, &parts[0], &parts[1], &parts[2], &cache.table, from, &out, to];
            let params = PassParams {
                n_tokens: m as u32,
                start: start as u32,
                first_block: index as u32,
                end_block: index as u32 + 1,
                ..PassParams::default()
            };
            run(gpu, &kernels::attention_tile(shard, TileFor::Gpu, true), params, &buffers)?;
        }
        let found: Vec<f32> = as_f32(&gpu.read(&out, q.len())?);
        same(&format!("parts of {layout:?}"), &found, &expected)?;
    }
    Ok(())
}

/// Positions after a token's own may hold anything.
fn unseen(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(20);
    let layout = KvLayout { heads: Heads { query: 4, kv: 2, dim: 32 }, format: KvFormat::F32 };
    let (start, m) = (60, 9);
    let mut sequence = Sequence::random(&mut random, layout, 128);
    let q = random.floats(m * 128, 3.0);
    for rows in sequence.rows.iter_mut().chain(&mut sequence.stored) {
        rows[(start + m) * 64..].fill(f32::NAN);
        // The last of the tokens has infinite values of its own.
        rows[(start + m - 1) * 64..(start + m) * 64].fill(f32::INFINITY);
    }
    let cache = sequence.upload(gpu)?;
    let found = attend(gpu, &cache, Attend::Tile(TileFor::adapter(&gpu.adapter)), &q, start)?;
    for token in 0..m - 1 {
        let expected = sequence.attention(&q[token * 128..][..128], start + token + 1);
        judge(gpu, "unseen", layout.heads, &found[token * 128..][..128], &expected)?;
    }
    for how in [Attend::Whole, Attend::Blocks] {
        let found = attend(gpu, &cache, how, &q[..128], start)?;
        let expected = sequence.attention(&q[..128], start + 1);
        judge(gpu, "unseen by one", layout.heads, &found, &expected)?;
    }
    Ok(())
}

fn corrupted(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(21);
    let layout = KvLayout { heads: Heads { query: 4, kv: 2, dim: 32 }, format: KvFormat::F16 };
    let mut sequence = Sequence::random(&mut random, layout, 70);
    let q = random.floats(128, 3.0);
    let expected = sequence.attention(&q, 70);
    for (part, at) in [(0, 64 * 65), (1, 64 * 66 + 3)] {
        let kept = sequence.rows[part][at];
        sequence.rows[part][at] += 50.0;
        let cache = sequence.upload(gpu)?;
        let found = attend(gpu, &cache, Attend::Blocks, &q, 69)?;
        if judge(gpu, "corrupted", layout.heads, &found, &expected).is_ok() {
            return Err(format!("a wrong number in part {part} goes unnoticed").into());
        }
        sequence.rows[part][at] = kept;
    }
    Ok(())
}

/// Blocks that are not the shard's: neither written by `kv_store` nor given partials.
fn other_shards(gpu: &Gpu) -> Result<(), Failed> {
    let layout = KvLayout { heads: Heads { query: 2, kv: 1, dim: 32 }, format: KvFormat::F32 };
    let [keys, values, _] = layout.block_words();
    let shard = KvShard { layout, base: 3, blocks: 2 };
    let rows = gpu.upload("rows", &vec![1.0f32; 130 * 32])?;
    // Positions 0..63 in block 2, 64..127 in block 4, 128.. in block 5.
    let table = gpu.upload("table", &[2u32, 4, 5])?;
    let mut call = kernels::kv_store(shard);
    call.weights = WeightsRead::RowOf(1);
    let params = PassParams { n_tokens: 130, ..PassParams::default() };
    let out = run_guarded(gpu, &call, params, &[&rows, &rows, &table], &[2 * keys, 2 * values, 1])?;
    let guard = 0xDEAD_BEEFu32;
    let one = 1.0f32.to_bits();
    same("keys", &out[0], &[vec![guard; keys], vec![one; keys]].concat())?;
    same("values", &out[1], &[vec![guard; values], vec![one; values]].concat())?;
    let buffers = [gpu.upload("keys", &out[0])?, gpu.upload("values", &out[1])?];
    let mut call = kernels::attention_blocks(shard);
    call.weights = WeightsRead::RowOf(1);
    let params = PassParams { n_tokens: 1, start: 129, ..PassParams::default() };
    let inputs = [&rows, &buffers[0], &buffers[1], &rows, &table];
    let words = kernels::partial_words(layout.heads);
    let out = run_guarded(gpu, &call, params, &inputs, &[3 * words])?;
    let is_written: Vec<bool> = out[0].iter().map(|&word| word != guard).collect();
    let expected = [vec![false; words], vec![true; words], vec![false; words]].concat();
    same("partials", &is_written, &expected)
}

/// The kernels run unchecked: a pass of more tokens and positions than there is room for, and a table
/// of blocks that do not exist, touch nothing else.
fn untrue_pass(gpu: &Gpu) -> Result<(), Failed> {
    for format in FORMATS {
        let heads = Heads { query: 4, kv: 2, dim: 32 };
        let layout = KvLayout { heads, format };
        let sequence = Sequence::random(&mut Random::new(23), layout, 60);
        let mut cache = sequence.upload(gpu)?;
        cache.table = gpu.upload("table", &[7_000_000u32])?;
        let query = gpu.upload("query", &Random::new(24).floats(2 * 128, 3.0))?;
        let params = PassParams { n_tokens: 90, start: 7000, ..PassParams::default() };
        let (shard, words) = (KvShard::whole(layout), kernels::partial_words(heads));
        let inputs = cache.inputs(&query);
        let state = gpu.storage("state", 2 * words)?;
        let with_state = [&inputs[..], &[&state]].concat();
        let parts = PassParams { first_block: 1, end_block: 9000, ..params };
        for (mut call, params, inputs, lens) in [
            (kernels::attention(shard), params, &inputs[..], vec![128]),
            (
                kernels::attention_tile(shard, TileFor::adapter(&gpu.adapter), false),
                params,
                &with_state,
                vec![2 * 128, 1],
            ),
            (
                kernels::attention_tile(shard, TileFor::Gpu, true),
                parts,
                &with_state,
                vec![2 * 128, 2 * words],
            ),
            (kernels::attention_blocks(shard), params, &inputs, vec![words]),
            (kernels::attention_merge(heads), params, &[&state], vec![128]),
        ] {
            // Fewer words than it says.
            call.weights = WeightsRead::RowOf(1);
            run_guarded(gpu, &call, params, inputs, &lens)?;
        }
    }
    Ok(())
}

/// The same bits with every check.
fn unchecked(gpu: &Gpu, capabilities: Capabilities) -> Result<(), Failed> {
    let checked = Gpu::open(None, capabilities)?.with_runtime_checks();
    for kernel in KERNELS.iter().filter(|kernel| kernel.name.starts_with("attention")) {
        same(kernel.name, &[UNCHECKED.contains(kernel)], &[true])?;
    }
    for (format, (query, kv, dim)) in
        [(KvFormat::F32, (4, 2, 32)), (KvFormat::F16, (3, 1, 100)), (KvFormat::Int8, (2, 1, 6))]
    {
        let layout = KvLayout { heads: Heads { query, kv, dim }, format };
        let sequence = Sequence::random(&mut Random::new(25), layout, 150);
        let q = Random::new(26).floats(20 * query * dim, 3.0);
        for (how, n_tokens) in [
            (Attend::Whole, 1),
            (Attend::Tile(TileFor::adapter(&gpu.adapter)), 20),
            (Attend::Blocks, 1),
        ] {
            let found = |gpu| {
                let cache = sequence.upload(gpu)?;
                Ok::<_, Failed>(attend(gpu, &cache, how, &q[..n_tokens * query * dim], 130)?)
            };
            same(&format!("{how:?} {layout:?} unchecked"), &found(gpu)?, &found(&checked)?)?;
        }
    }
    Ok(())
}

/// What tokens leave in the cache is what the reference stores.
fn store(gpu: &Gpu, format: KvFormat) -> Result<(), Failed> {
    let mut random = Random::new(22);
    for (kv, dim, start, m) in [
        (1, 2, 0, 1),
        (2, 20, 60, 9),
        (1, 100, 63, 2),
        (5, 128, 127, 1),
        (2, 256, 10, 60),
        (3, 6, 0, 3),
    ] {
        let layout = KvLayout { heads: Heads { query: kv, kv, dim }, format };
        let sequence = Sequence::random(&mut random, layout, start + m);
        let new = sequence.rows.each_ref().map(|rows| &rows[start * kv * dim..]);
        let inputs = [
            &gpu.upload("keys", new[0])?,
            &gpu.upload("values", new[1])?,
            &gpu.upload("table", &sequence.table)?,
        ];
        let params =
            PassParams { n_tokens: m as u32, start: start as u32, ..PassParams::default() };
        let lens = layout.block_words().map(|words| (words * sequence.blocks).max(1));
        let call = kernels::kv_store(KvShard::whole(layout));
        let out = run_guarded(gpu, &call, params, &inputs, &lens)?;
        let what = format!("kv_store {layout:?} {m} from {start}");
        // What was packed on the host, where this wrote.
        let packed = sequence.upload(gpu)?;
        for (part, words) in out.iter().enumerate().filter(|(part, _)| lens[*part] > 1) {
            let expected = gpu.read(&packed.parts[part], lens[part])?;
            for (at, (&found, &expected)) in words.iter().zip(&expected).enumerate() {
                let is_close = match (format, part) {
                    (KvFormat::Int8, 0 | 1) => bytes_close(found, expected),
                    (KvFormat::Int8, _) => {
                        let [a, b] = [found, expected].map(f32::from_bits);
                        (a - b).abs() <= 4.0 * f32::EPSILON * b.abs()
                    }
                    _ => found == expected,
                };
                if found != 0xDEAD_BEEF && !is_close {
                    return Err(
                        format!("{what}: part {part} [{at}]: {found:x} {expected:x}").into()
                    );
                }
            }
        }
    }
    Ok(())
}

/// Whether codes differ by a step at most, as a division that is not exact allows.
fn bytes_close(a: u32, b: u32) -> bool {
    let bytes = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
    bytes.map(|(a, b)| i32::from(a as i8) - i32::from(b as i8)).all(|off| off.abs() <= 1)
}

/// Every kind of number, as a half and as codes.
fn halves(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(23);
    let mut numbers: Vec<f32> = (0..2000).map(|_| f32::from_bits(random.bits() as u32)).collect();
    numbers.extend((0..65_536u32).step_by(7).map(|bits| {
        // Ties and their neighbours.
        let value = f16_value(bits as u16);
        f32::from_bits(
            (value.to_bits() + 0x1000).wrapping_add(random.below(3) as u32).wrapping_sub(1),
        )
    }));
    numbers.extend([0.0, -0.0, 65_519.0, 65_520.0, f32::INFINITY, f32::NAN, 6.0e-5, 1e-40]);
    numbers.resize(numbers.len().next_multiple_of(64), 1.0);
    let dim = 64;
    let m = numbers.len() / dim;
    let table: Vec<u32> = (0..m.div_ceil(BLOCK) as u32).collect();
    let rows = gpu.upload("rows", &numbers)?;
    let table_in = gpu.upload("table", &table)?;
    let layout = |format| KvLayout { heads: Heads { query: 1, kv: 1, dim }, format };
    let params = PassParams { n_tokens: m as u32, ..PassParams::default() };
    let call = kernels::kv_store(KvShard::whole(layout(KvFormat::F16)));
    let [keys, values, _] = layout(KvFormat::F16).block_words().map(|words| words * table.len());
    let out = run_guarded(gpu, &call, params, &[&rows, &rows, &table_in], &[keys, values, 1])?;
    let found: Vec<u16> = out[1][..numbers.len() / 2]
        .iter()
        .flat_map(|&word| [word as u16, (word >> 16) as u16])
        .collect();
    let expected: Vec<u16> = numbers.iter().map(|&number| f16_bits(number)).collect();
    same("halves", &found, &expected)?;
    // Ties of the codes: a scale of one.
    let mut row: Vec<f32> = (0..64).map(|i| i as f32 - 31.5).collect();
    row[63] = 127.0;
    let expected = quantize_absmax(&row).codes;
    let call = kernels::kv_store(KvShard::whole(layout(KvFormat::Int8)));
    let [keys, values, scales] = layout(KvFormat::Int8).block_words();
    let rows = gpu.upload("rows", &row)?;
    let params = PassParams { n_tokens: 1, ..PassParams::default() };
    let lens = [keys, values, scales];
    let out = run_guarded(gpu, &call, params, &[&rows, &rows, &table_in], &lens)?;
    let found: Vec<i8> =
        out[1][..16].iter().flat_map(|word| word.to_le_bytes().map(|byte| byte as i8)).collect();
    same("codes", &found, &expected)
}
