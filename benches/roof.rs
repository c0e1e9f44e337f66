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

/// A contestant's name and its call with one copy of the weights.
type Contestant<'a> = (String, Box<dyn FnMut(&[u32]) + 'a>);

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
                let len = products[0].packed.words().len();
                let copies = match cold {
                    true if !is_test() => COLD_BYTES.div_ceil(products[0].len_bytes()),
                    _ => 1,
                };
                let all = products[0].packed.words().repeat(copies);
                let all_kernels = kernels();
                let mut contestants: Vec<Contestant<'_>> = Vec::new();
                contestants.push(("read".to_owned(), Box::new(|words| cpu::read(&pool, words))));
                for (kernels, product) in
                    all_kernels.iter().flat_map(|k| products.iter().map(move |p| (k, p)))
                {
                    let mut call = cpu::Call::new(product);
                    call.check(kernels.as_ref(), product);
                    let name = format!("{} M={}", kernels.level().name(), call.n_tokens());
                    let pool = &pool;
                    let run = move |words: &[u32]| call.run_on(pool, kernels.as_ref(), words);
                    contestants.push((name, Box::new(run)));
                }
                let times = race(&mut contestants, |i| &all[i % copies * len..][..len]);
                if !std::mem::replace(&mut head, true) {
                    header("shape", contestants.iter().map(|(name, _)| name.as_str()));
                }
                let speed = |time: &Duration| (len * 4) as f64 / time.as_secs_f64() / 1e9;
                row(&format!("{n}x{k}"), times.iter().map(speed));
            }
        }
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
            header("M", all_kernels.iter().map(|kernels| kernels.level().name()));
            for m in token_counts() {
                let rows = (GEMM_LEN / (k * m)).clamp(32, 8192).next_multiple_of(32);
                let n = if is_test() { 70 } else { rows };
                let product = Product::new(n, k, m);
                let mut contestants: Vec<Contestant<'_>> = Vec::new();
                for kernels in &all_kernels {
                    let mut call = cpu::Call::new(&product);
                    call.check(kernels.as_ref(), &product);
                    let pool = &pool;
                    let run = move |words: &[u32]| call.run_on(pool, kernels.as_ref(), words);
                    contestants.push((String::new(), Box::new(run)));
                }
                let times = race(&mut contestants, |_| product.packed.words());
                let speed = |time: &Duration| (n * k * m) as f64 / time.as_secs_f64() / 1e9;
                row(&m.to_string(), times.iter().map(speed));
            }
        }
    }
}

/// The time that a fiftieth of each contestant's calls keep to.
fn race<'a>(
    contestants: &mut [Contestant<'_>],
    copy: impl Fn(usize) -> &'a [u32],
) -> Vec<Duration> {
    let (budget, least) = match is_test() {
        true => (Duration::ZERO, 1),
        false => (Duration::from_millis(300) * contestants.len() as u32, 100),
    };
    let mut times = vec![Vec::new(); contestants.len()];
    let start = Instant::now();
    let mut turn = 0;
    while start.elapsed() < budget || times[0].len() < least {
        for ((_, call), times) in contestants.iter_mut().zip(&mut times) {
            // The first call brings the kernel's own inputs back into the cache.
            for counts in [false, true] {
                turn += 1;
                let words = copy(turn);
                let start = Instant::now();
                call(words);
                if counts {
                    times.push(start.elapsed());
                }
            }
        }
    }
    let fast = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 50]
    };
    times.iter_mut().map(fast).collect()
}

fn header<'a>(first: &str, names: impl Iterator<Item = &'a str>) {
    let names: Vec<_> = names.collect();
    println!("| {first} | {} |", names.join(" | "));
    println!("| --- |{}", " ---: |".repeat(names.len()));
}

fn row(first: &str, values: impl Iterator<Item = f64>) {
    let values: Vec<_> = values.map(|value| format!("{value:.1}")).collect();
    println!("| {first} | {} |", values.join(" | "));
}
