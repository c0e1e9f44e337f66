//! How near the CPU kernels come to what the machine can do, as Markdown tables.
//!
//! `gemv`: bytes of packed weights per second beside a plain sum of the same words; from memory
//! (copies that no cache holds together take turns) and from the cache (one copy), for one token and
//! a few. `head`: the same of a decode step's LM head, by six bits of its codes (`head_coarse`) and by all
//! (`head_int8`). `gemm`: multiplications per second for more and more tokens. An argument chooses one of them.
//!
//! Unlike criterion's, these numbers mean something on a busy machine: calls are short, all
//! contestants take turns call by call, and each is judged by the fastest fiftieth of its calls.

#![expect(clippy::print_stdout, reason = "prints tables")]

mod shapes;

use std::time::{Duration, Instant};

use cpu_ref::head_int8::Input;
use cpu_ref::layout::{TILE_ROWS, split_rows};
use rayon::prelude::*;
use sterna::backend::simd::{Kernels, Level};
use sterna::layout::Line;
use sterna::random::Random;
use sterna::shape::MatShape;
use sterna::weights::{Int8Rows, Table, TableData};

use shapes::{Product, cpu, heads, is_test, matrices, token_counts};

/// More than any cache of the machines in scope.
const COLD_BYTES: usize = 256 << 20;

/// Tokens of the GEMV tables' columns.
const FEW: [usize; 4] = [1, 2, 4, 8];

/// Multiplications of a call in the GEMM table, as far as 32 to 8192 rows allow: a millisecond or two.
const GEMM_LEN: usize = 300_000_000;

/// A contestant's name, its call in its n-th turn, and what the call is worth: bytes or multiplications.
struct Contestant<'a> {
    name: String,
    call: Box<dyn FnMut(usize) + 'a>,
    worth: usize,
}

fn main() {
    let names: Vec<_> = std::env::args().skip(1).filter(|name| !name.starts_with('-')).collect();
    let wanted = |name: &str| names.is_empty() || names.iter().any(|other| other == name);
    if wanted("gemv") {
        gemv();
    }
    if wanted("head") {
        head();
    }
    if wanted("gemm") {
        gemm();
    }
}

/// The levels that use what the machine has; the scalar one is a class of its own.
fn kernels() -> Vec<Box<dyn Kernels>> {
    let levels = Level::available().filter(|&level| level != Level::Scalar);
    levels.filter_map(Level::kernels).collect()
}

fn gemv() {
    for (source, cold) in [("memory", true), ("cache", false)] {
        for pool in cpu::pools() {
            let threads = pool.current_num_threads();
            println!("\ngemv from {source}, threads: {threads}; GB/s of packed weights\n");
            let mut head = false;
            for (n, k) in matrices() {
                let products = FEW.map(|m| Product::new(n, k, m));
                let copies = match cold {
                    true if !is_test() => COLD_BYTES.div_ceil(products[0].len_bytes()),
                    _ => 1,
                };
                let i2 = Copies::new(products[0].packed.words(), copies);
                let base3 = Copies::new(products[0].base3().words(), copies);
                let all_kernels = kernels();
                let mut contestants: Vec<Contestant<'_>> = Vec::new();
                contestants.push(Contestant {
                    name: "read".to_owned(),
                    call: Box::new(|turn| cpu::read(&pool, i2.copy(turn))),
                    worth: i2.len_bytes(),
                });
                for (kernels, product) in all_kernels
                    .iter()
                    .flat_map(|kernels| products.iter().map(move |p| (kernels, p)))
                {
                    let (kernels, worth) = (kernels.as_ref(), (i2.len_bytes(), base3.len_bytes()));
                    let m = product.x.len() / k;
                    let name = format!("{} M={m}", kernels.level().name());
                    let call = cpu::Call::new(product).checked(kernels, product);
                    let of_i2 = |turn| i2.copy(turn);
                    contestants.push(contestant(&pool, kernels, call, (name, worth.0), of_i2));
                    if kernels.level().has_base3() {
                        let name = format!("{} base3 M={m}", kernels.level().name());
                        let call = cpu::Call::base3(product).checked(kernels, product);
                        let of_base3 = |turn| base3.copy(turn);
                        let one = contestant(&pool, kernels, call, (name, worth.1), of_base3);
                        contestants.push(one);
                    }
                }
                let speeds = race(&mut contestants);
                if !std::mem::replace(&mut head, true) {
                    header("shape", contestants.iter().map(|one| one.name.as_str()));
                }
                row(&format!("{n}x{k}"), speeds);
            }
        }
    }
}

fn head() {
    for pool in cpu::pools() {
        let threads = pool.current_num_threads();
        println!("\nhead from memory, threads: {threads}; GB/s of packed codes\n");
        for (at, (v, k)) in heads().into_iter().enumerate() {
            let mut random = Random::new(v as u64);
            let shape = MatShape::new(v, k).expect("a real shape");
            let table = Table::new(shape, TableData::F32(random.floats(v * k, 1.0).into()));
            let int8 = Int8Rows::of(&table).expect("floats");
            let lines = int8.pack_split().expect("is in memory");
            let (coarse, rest) = Line::words(&lines).split_at(int8.split_len()[0]);
            let copies = if is_test() { 1 } else { COLD_BYTES.div_ceil(size_of_val(&*lines)) };
            let (coarse, rest) = (Copies::new(coarse, copies), Copies::new(rest, copies));
            let lens = [split_rows::coarse_tile_words(k), split_rows::rest_tile_words(k)];
            let codes = split_rows::groups(k) * split_rows::GROUP_K;
            let (hi, lo) = (vec![0; codes], vec![0; codes]);
            let mut input = [Input { hi, lo, scale: 0.0, bound: 0.0, rest: 0.0, sums: [0; 2] }];
            let all_kernels = kernels();
            all_kernels[0].head_input(&random.floats(k, 1.0), &mut input[0]);
            let tiles = v.div_ceil(TILE_ROWS);
            // As many tiles a piece as make 64 pieces.
            let piece = tiles.div_ceil(64);

            let mut contestants: Vec<Contestant<'_>> = Vec::new();
            contestants.push(Contestant {
                name: "read".to_owned(),
                call: Box::new(|turn| cpu::read(&pool, coarse.copy(turn))),
                worth: coarse.len_bytes(),
            });
            let (input, coarse, rest, pool) = (&input, &coarse, &rest, &pool);
            let scalar = Level::Scalar.kernels().expect("runs everywhere");
            for kernels in &all_kernels {
                let name = kernels.level().name();
                let screen = move |kernels: &dyn Kernels, turn, out: &mut [f32]| {
                    let words = coarse.copy(turn).par_chunks(piece * lens[0]);
                    let outs = out.par_chunks_mut(piece * 2 * TILE_ROWS);
                    pool.install(|| {
                        words
                            .zip(outs)
                            .for_each(|(words, out)| kernels.head_coarse(words, input, out));
                    });
                };
                let logits = move |kernels: &dyn Kernels, turn, out: &mut [f32]| {
                    let words = coarse.copy(turn).par_chunks(piece * lens[0]);
                    let words = words.zip(rest.copy(turn).par_chunks(piece * lens[1]));
                    let outs = out.par_chunks_mut(piece * TILE_ROWS);
                    pool.install(|| {
                        words.zip(outs).for_each(|((coarse, rest), out)| {
                            kernels.head_int8([coarse, rest], input, out);
                        });
                    });
                };
                let [mut out, mut expected] = [0.0, 1.0].map(|v| vec![v; tiles * 2 * TILE_ROWS]);
                screen(kernels.as_ref(), 0, &mut out);
                screen(scalar.as_ref(), 0, &mut expected);
                assert_eq!(out, expected, "{name}");
                logits(kernels.as_ref(), 0, &mut out[..tiles * TILE_ROWS]);
                logits(scalar.as_ref(), 0, &mut expected[..tiles * TILE_ROWS]);
                assert_eq!(out, expected, "{name}");

                let mut more = out.clone();
                contestants.push(Contestant {
                    name: format!("{name} head_coarse"),
                    call: Box::new(move |turn| screen(kernels.as_ref(), turn, &mut out)),
                    worth: coarse.len_bytes(),
                });
                contestants.push(Contestant {
                    name: format!("{name} head_int8"),
                    call: Box::new(move |turn| {
                        logits(kernels.as_ref(), turn, &mut more[..tiles * TILE_ROWS]);
                    }),
                    worth: coarse.len_bytes() + rest.len_bytes(),
                });
            }
            let speeds = race(&mut contestants);
            if at == 0 {
                header("shape", contestants.iter().map(|one| one.name.as_str()));
            }
            row(&format!("{v}x{k}"), speeds);
        }
    }
}

/// Copies of packed words, each from the start of a cache line on.
struct Copies {
    lines: Vec<Line>,
    copies: usize,
}

impl Copies {
    fn new(words: &[u32], copies: usize) -> Self {
        let one: &[Line] = bytemuck::cast_slice(words);
        Self { lines: one.repeat(copies), copies }
    }

    fn copy(&self, turn: usize) -> &[u32] {
        let len = self.lines.len() / self.copies;
        Line::words(&self.lines[turn % self.copies * len..][..len])
    }

    fn len_bytes(&self) -> usize {
        size_of_val(self.copy(0))
    }
}

fn gemm() {
    let mut widths: Vec<usize> = matrices().iter().map(|&(_, k)| k).collect();
    widths.sort_unstable();
    widths.dedup();
    for k in widths {
        for pool in cpu::pools() {
            let threads = pool.current_num_threads();
            println!("\ngemm, K = {k}, threads: {threads}; 10⁹ multiplications a second\n");
            let all_kernels = kernels();
            let mut head = false;
            for m in token_counts() {
                let rows = (GEMM_LEN / (k * m)).clamp(32, 8192).next_multiple_of(32);
                let n = if is_test() { 70 } else { rows };
                let product = Product::new(n, k, m);
                let base3 = product.base3();
                let mut contestants: Vec<Contestant<'_>> = Vec::new();
                for kernels in &all_kernels {
                    let kernels = kernels.as_ref();
                    let (name, worth) = (kernels.level().name(), n * k * m);
                    let call = cpu::Call::new(&product).checked(kernels, &product);
                    let of_i2 = |_| product.packed.words();
                    let named = (name.to_owned(), worth);
                    contestants.push(contestant(&pool, kernels, call, named, of_i2));
                    if kernels.level().has_base3() {
                        let call = cpu::Call::base3(&product).checked(kernels, &product);
                        let named = (format!("{name} base3"), worth);
                        let of_base3 = |_| base3.words();
                        contestants.push(contestant(&pool, kernels, call, named, of_base3));
                    }
                }
                let speeds = race(&mut contestants);
                if !std::mem::replace(&mut head, true) {
                    header("M", contestants.iter().map(|one| one.name.as_str()));
                }
                row(&m.to_string(), speeds);
            }
        }
    }
}

/// A kernel on the words that it gets in each turn.
fn contestant<'a>(
    pool: &'a rayon::ThreadPool,
    kernels: &'a dyn Kernels,
    mut call: cpu::Call,
    (name, worth): (String, usize),
    words: impl Fn(usize) -> &'a [u32] + 'a,
) -> Contestant<'a> {
    let call = Box::new(move |turn| call.run_on(pool, kernels, words(turn)));
    Contestant { name, call, worth }
}

/// What each contestant is worth in a nanosecond, by the time that a fiftieth of its calls keep to.
fn race(contestants: &mut [Contestant<'_>]) -> Vec<f64> {
    let (budget, least) = match is_test() {
        true => (Duration::ZERO, 1),
        false => (Duration::from_millis(300) * contestants.len() as u32, 100),
    };
    let mut times = vec![Vec::new(); contestants.len()];
    let start = Instant::now();
    let mut turn = 0;
    while start.elapsed() < budget || times[0].len() < least {
        for (contestant, times) in contestants.iter_mut().zip(&mut times) {
            // The first call brings the kernel's own inputs back into the cache.
            for counts in [false, true] {
                turn += 1;
                let start = Instant::now();
                (contestant.call)(turn);
                if counts {
                    times.push(start.elapsed());
                }
            }
        }
    }
    let speed = |(times, contestant): (&mut Vec<Duration>, &Contestant<'_>)| {
        times.sort_unstable();
        contestant.worth as f64 / times[times.len() / 50].as_secs_f64() / 1e9
    };
    times.iter_mut().zip(contestants.iter()).map(speed).collect()
}

fn header<'a>(first: &str, names: impl Iterator<Item = &'a str>) {
    let names: Vec<_> = names.collect();
    println!("| {first} | {} |", names.join(" | "));
    println!("| --- |{}", " ---: |".repeat(names.len()));
}

fn row(first: &str, values: Vec<f64>) {
    let values: Vec<_> = values.iter().map(|value| format!("{value:.1}")).collect();
    println!("| {first} | {} |", values.join(" | "));
}
