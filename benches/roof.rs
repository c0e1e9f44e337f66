//! How near the CPU kernels come to what the machine can do, as Markdown tables.
//!
//! `gemv`: bytes of packed weights per second beside a plain sum of the same words; from memory
//! (copies that no cache holds together take turns) and from the cache (one copy), for one token and
//! a few. `gemm`: multiplications per second for more and more tokens. An argument chooses one of them.
//!
//! Unlike criterion's, these numbers mean something on a busy machine: calls are short, all
//! contestants take turns call by call, and each is judged by the fastest fiftieth of its calls.

#![expect(clippy::print_stdout, reason = "prints tables")]

mod shapes;

use std::time::{Duration, Instant};

use sterna::backend::simd::{Kernels, Level};

use shapes::{Product, cpu, is_test, matrices, token_counts};

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

/// Copies of packed words, each from the start of a cache line on.
struct Copies {
    lines: Vec<Line>,
    copies: usize,
}

/// A cache line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

impl Copies {
    fn new(words: &[u32], copies: usize) -> Self {
        let one: &[Line] = bytemuck::cast_slice(words);
        Self { lines: one.repeat(copies), copies }
    }

    fn copy(&self, turn: usize) -> &[u32] {
        let len = self.lines.len() / self.copies;
        bytemuck::cast_slice(&self.lines[turn % self.copies * len..][..len])
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
