//! What the benches measure: the shapes of real models, and how to make inputs for them.

#![allow(dead_code, reason = "each bench uses its part")]

use sterna::layout::{Layout, Packed, PackedBase3};
use sterna::random::Random;
use sterna::shape::MatShape;

/// The ternary matrices `(N, K)` of BitNet b1.58 2B4T: Q, K and V together; output; gate and up
/// together; down.
const BITNET_2B4T: [(usize, usize); 4] = [(3840, 2560), (2560, 2560), (13_824, 2560), (2560, 6912)];

/// Ternary and binary matrices `(N, K)` of Bonsai 8B (output, gate, down) and 1.7B.
const BONSAI: [(usize, usize); 4] = [(4096, 4096), (12_288, 4096), (4096, 12_288), (2048, 6144)];

/// A quarter of the head `(V, K)` of BitNet b1.58 2B4T.
const HEADS: [(usize, usize); 1] = [(32_064, 2560)];

/// Token counts of a matrix product: decode, few sequences or guesses at once, prompts.
const TOKENS: [usize; 7] = [1, 2, 4, 8, 32, 128, 512];
/// A prompt chunk: what is longer takes proportionally long.
pub const CHUNK_TOKENS: usize = 32;

/// Whether each bench is only to run once, to see that it works: `cargo bench -- --test` and
/// `cargo test --benches`.
pub fn is_test() -> bool {
    let has = |flag| std::env::args().any(|argument| argument == flag);
    has("--test") || !has("--bench")
}

/// The shapes to measure; small ones in a test.
pub fn matrices() -> Vec<(usize, usize)> {
    if is_test() { vec![(70, 200)] } else { BITNET_2B4T.to_vec() }
}

/// The shapes of matrices with scales of groups to measure; a small one in a test.
pub fn group_matrices() -> Vec<(usize, usize)> {
    if is_test() { vec![(70, 256)] } else { BONSAI.to_vec() }
}

/// The heads to measure; a small one in a test.
pub fn heads() -> Vec<(usize, usize)> {
    if is_test() { vec![(70, 200)] } else { HEADS.to_vec() }
}

/// The token counts to measure; small ones in a test.
pub fn token_counts() -> Vec<usize> {
    if is_test() { vec![1, 5] } else { TOKENS.to_vec() }
}

/// A matrix packed as I2, tokens to multiply it with, and the right answer.
pub struct Product {
    pub packed: Packed,
    /// `[M, K]`.
    pub x: Vec<i8>,
    /// `[M, N]`.
    pub y: Vec<i32>,
}

impl Product {
    pub fn new(n: usize, k: usize, n_tokens: usize) -> Self {
        Self::of(n, k, n_tokens, |trit| trit)
    }

    /// Weights −1 and +1 only.
    pub fn binary(n: usize, k: usize, n_tokens: usize) -> Self {
        Self::of(n, k, n_tokens, |trit| if trit < 0 { -1 } else { 1 })
    }

    fn of(n: usize, k: usize, n_tokens: usize, weight: fn(i8) -> i8) -> Self {
        let mut random = Random::new((n * 31 + k) as u64);
        let (mut w, x) = (random.trits(n * k), random.codes(n_tokens * k));
        w.iter_mut().for_each(|trit| *trit = weight(*trit));
        let shape = MatShape::new(n, k).expect("a real shape");
        let packed = Packed::pack(Layout::I2, shape, &w);
        // The first and the last token tell enough.
        let mut y = vec![0; n_tokens * n];
        for m in [0, n_tokens - 1] {
            y[m * n..][..n].copy_from_slice(&cpu_ref::gemv::gemv(&w, &x[m * k..][..k]));
        }
        Self { packed, x, y }
    }

    pub fn len_bytes(&self) -> usize {
        size_of_val(self.packed.words())
    }

    /// The same weights, five a byte.
    pub fn base3(&self) -> PackedBase3 {
        PackedBase3::of(&self.packed)
    }
}

/// The CPU kernels' way to call a product.
pub mod cpu {
    use cpu_ref::layout::{CHUNK_K, TILE_ROWS, k_chunks};
    use sterna::backend::simd::{Activations, Kernels, TokenScale};

    use super::{Product, is_test};

    /// One thread, and as many as the machine runs.
    pub fn pools() -> Vec<rayon::ThreadPool> {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let mut counts = vec![1, if is_test() { 2 } else { all }];
        counts.dedup();
        let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads");
        counts.into_iter().map(pool).collect()
    }

    /// Reads what a GEMV reads, and does no more with it than a compiler must.
    pub fn read(pool: &rayon::ThreadPool, words: &[u32]) {
        let sum = |words: &[u32]| {
            std::hint::black_box(words.iter().fold(0, |sum: u32, &w| sum.wrapping_add(w)));
        };
        let threads = pool.current_num_threads();
        if threads == 1 {
            return sum(words);
        }
        pool.scope(|scope| {
            for words in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(move |_| sum(words));
            }
        });
    }

    /// A product's inputs as the kernels take them.
    pub struct Call {
        codes: Vec<i8>,
        scales: Vec<TokenScale>,
        chunks: usize,
        base3: bool,
        pub acc: Vec<i32>,
    }

    impl Call {
        pub fn new(product: &Product) -> Self {
            let (n, k) = (product.packed.shape().n(), product.packed.shape().k());
            let chunks = k_chunks(k);
            let mut codes = Vec::new();
            let mut scales = Vec::new();
            for token in product.x.chunks_exact(k) {
                codes.extend_from_slice(token);
                codes.resize(codes.len().next_multiple_of(CHUNK_K), 0);
                let code_sum = token.iter().map(|&code| i32::from(code)).sum();
                scales.push(TokenScale { act_scale: 1.0, code_sum });
            }
            let acc = vec![0; n.next_multiple_of(TILE_ROWS) * scales.len()];
            Self { codes, scales, chunks, base3: false, acc }
        }

        /// The same for words of five weights a byte.
        pub fn base3(product: &Product) -> Self {
            Self { base3: true, ..Self::new(product) }
        }

        /// M.
        pub fn n_tokens(&self) -> usize {
            self.scales.len()
        }

        pub fn run(&mut self, kernels: &dyn Kernels, words: &[u32]) {
            let x = Activations::new(&self.codes, &self.scales, self.chunks);
            match self.base3 {
                true => kernels.gemm_base3(words, x, &mut self.acc),
                false => kernels.gemm(words, x, &mut self.acc),
            }
        }

        /// [`Call::run`], the tiles shared out among the threads.
        pub fn run_on(&mut self, pool: &rayon::ThreadPool, kernels: &dyn Kernels, words: &[u32]) {
            let x = Activations::new(&self.codes, &self.scales, self.chunks);
            let tile_len = self.scales.len() * TILE_ROWS;
            let tiles = self.acc.len() / tile_len;
            let part = tiles.div_ceil(pool.current_num_threads());
            let tile_words = words.len() / tiles;
            if part == tiles {
                return self.run(kernels, words);
            }
            let base3 = self.base3;
            pool.scope(|scope| {
                let parts = words.chunks(part * tile_words);
                for (words, acc) in parts.zip(self.acc.chunks_mut(part * tile_len)) {
                    scope.spawn(move |_| match base3 {
                        true => kernels.gemm_base3(words, x, acc),
                        false => kernels.gemm(words, x, acc),
                    });
                }
            });
        }

        /// The same after [`Call::check`].
        pub fn checked(mut self, kernels: &dyn Kernels, product: &Product) -> Self {
            self.check(kernels, product);
            self
        }

        /// Runs once and compares with the reference's first and last token.
        pub fn check(&mut self, kernels: &dyn Kernels, product: &Product) {
            match self.base3 {
                true => self.run(kernels, product.base3().words()),
                false => self.run(kernels, product.packed.words()),
            }
            let (n, n_tokens) = (product.packed.shape().n(), self.scales.len());
            for m in [0, n_tokens - 1] {
                for row in 0..n {
                    let at = (row / TILE_ROWS * n_tokens + m) * TILE_ROWS + row % TILE_ROWS;
                    assert_eq!(self.acc[at], product.y[m * n + row], "token {m}, row {row}");
                }
            }
        }
    }
}

/// Matrices with scales of groups of 128 inputs, on the CPU kernels.
pub mod group {
    use cpu_ref::group_gemv::{bound, group_dot, group_dot_int8, quantize_absmax_groups};
    use cpu_ref::layout::{CHUNK_K, TILE_ROWS};
    use sterna::backend::simd::{Activations, GroupLayout, GroupWeights, Kernels, TokenScale};
    use sterna::format::float::f16_to_f32;
    use sterna::layout::{Layout, Packed, Signs, group_scales};
    use sterna::random::Random;
    use sterna::shape::MatShape;

    /// Inputs a scale.
    const GROUP: usize = 128;

    /// A matrix, its packed forms, and tokens to multiply it with.
    pub struct Product {
        pub layout: GroupLayout,
        n: usize,
        k: usize,
        w: Vec<i8>,
        halves: Vec<u16>,
        pub words: Vec<u32>,
        pub scales: Vec<u32>,
        /// `[M, K]`.
        x: Vec<f32>,
    }

    impl Product {
        pub fn new(layout: GroupLayout, n: usize, k: usize, n_tokens: usize) -> Self {
            let mut random = Random::new((n * 31 + k) as u64);
            let mut w = random.trits(n * k);
            let shape = MatShape::new(n, k).expect("a real shape");
            let words = match layout {
                GroupLayout::I2 => Packed::pack(Layout::I2, shape, &w).words().to_vec(),
                GroupLayout::Signs => {
                    w.iter_mut().for_each(|w| *w = if *w < 0 { -1 } else { 1 });
                    Packed::pack(Signs, shape, &w).words().to_vec()
                }
            };
            let halves: Vec<u16> =
                (0..n * k / GROUP).map(|_| 0x2400 | random.bits() as u16 & 0x3ff).collect();
            let scales = group_scales::pack(n, k / GROUP, &halves);
            let x = random.floats(n_tokens * k, 2.0);
            Self { layout, n, k, w, halves, words, scales, x }
        }

        /// Weights and scales.
        pub fn len_bytes(&self) -> usize {
            size_of_val(&self.words[..]) + size_of_val(&self.scales[..])
        }

        pub fn weights<'a>(&self, words: &'a [u32], scales: &'a [u32]) -> GroupWeights<'a> {
            GroupWeights::new(self.layout, (words, scales), self.k, GROUP)
        }
    }

    /// A product's inputs as the kernels take them.
    pub struct Call {
        x: Vec<f32>,
        codes: Vec<i8>,
        scales: Vec<TokenScale>,
        groups: usize,
        int8: bool,
        y: Vec<f32>,
    }

    impl Call {
        pub fn new(kernels: &dyn Kernels, product: &Product, int8: bool) -> Self {
            let (k, groups) = (product.k, product.k / GROUP);
            let n_tokens = product.x.len() / k;
            let mut codes = vec![0; product.x.len()];
            let mut scales = vec![TokenScale::default(); n_tokens * groups];
            let tokens = codes.chunks_exact_mut(k).zip(scales.chunks_exact_mut(groups));
            for (x, (codes, scales)) in product.x.chunks_exact(k).zip(tokens) {
                kernels.quantize_absmax_groups(x, product.layout, codes, scales);
            }
            let y = vec![0.0; product.n.next_multiple_of(TILE_ROWS) * n_tokens];
            Self { x: product.x.clone(), codes, scales, groups, int8, y }
        }

        pub fn run(&mut self, kernels: &dyn Kernels, weights: GroupWeights<'_>) {
            if self.int8 {
                let chunks = self.codes.len() / (self.scales.len() / self.groups) / CHUNK_K;
                let x = Activations::of_groups(&self.codes, &self.scales, chunks, self.groups);
                kernels.group_gemm_int8(weights, x, &mut self.y);
            } else {
                kernels.group_gemm(weights, &self.x, &mut self.y);
            }
        }

        /// Runs once and compares with the reference's first and last row of the last token.
        pub fn check(&mut self, kernels: &dyn Kernels, product: &Product) {
            self.run(kernels, product.weights(&product.words, &product.scales));
            let (n, k) = (product.n, product.k);
            let n_tokens = self.x.len() / k;
            let x = &self.x[(n_tokens - 1) * k..];
            for row in [0, n - 1] {
                let w = &product.w[row * k..][..k];
                let halves = &product.halves[row * self.groups..][..self.groups];
                let d: Vec<f32> = halves.iter().map(|&bits| f16_to_f32(bits)).collect();
                let at = (row / TILE_ROWS * n_tokens + n_tokens - 1) * TILE_ROWS + row % TILE_ROWS;
                if self.int8 {
                    let (codes, act_scales) = quantize_absmax_groups(x, GROUP);
                    assert_eq!(self.y[at], group_dot_int8(w, &d, &codes, &act_scales));
                } else {
                    let expected = group_dot(w, &d, x);
                    assert!((self.y[at] - expected).abs() <= bound(w, &d, x), "row {row}");
                }
            }
        }
    }

    /// The four kernels by name: alphabet and activations.
    pub const KERNELS: [(&str, GroupLayout, bool); 4] = [
        ("i2", GroupLayout::I2, false),
        ("signs", GroupLayout::Signs, false),
        ("i2_int8", GroupLayout::I2, true),
        ("signs_int8", GroupLayout::Signs, true),
    ];
}

/// The GPU kernels' way to call a product.
pub mod gpu {
    use std::time::{Duration, Instant};

    use sterna::backend::gpu::kernels::{Gemm, GroupMatrix, RowsOut, SumInputs, TokensPerLane};
    use sterna::backend::gpu::{
        Capabilities, Encoding, GemmPlan, Gpu, Op, PassParams, Slice, Variant, kernels,
        row_offsets, self_test,
    };
    use sterna::layout::{Layout, Signs, group_scales};

    use super::Product;

    /// The best adapter, or `None` with a line that says why there is none.
    #[expect(clippy::print_stdout, reason = "a number without its machine is a rumour")]
    pub fn open() -> Option<Gpu> {
        match Gpu::open(None, Capabilities::Adapter) {
            Ok(gpu) => {
                println!("adapter: {}", gpu.adapter);
                Some(gpu)
            }
            Err(error) => {
                println!("no GPU rows: {error}");
                None
            }
        }
    }

    /// A product on the device: one operation for each copy of the weights.
    pub struct Call<'a> {
        gpu: &'a Gpu,
        uniform: wgpu::Buffer,
        params: PassParams,
        ops: Vec<Op>,
        acc: Slice,
        /// Whether the result is f32.
        float: bool,
    }

    /// Inputs a scale in the benches, if K has room for it.
    const GROUP: usize = 128;

    impl<'a> Call<'a> {
        /// One token: the variant's GEMV. Many: the kernel of its layout that the tiles have for so many.
        pub fn new(
            gpu: &'a Gpu,
            variant: Variant,
            tiles: GemmPlan,
            product: &Product,
            copies: usize,
        ) -> Self {
            let packed = product.packed.repack(variant.layout());
            let shape = packed.shape();
            let n_tokens = product.x.len() / shape.k();
            let n_pad = kernels::padded_rows(shape.n());
            let upload = |what, words: &[u32]| gpu.upload(what, words).expect("device memory");
            let encoding = match n_tokens {
                1 => variant.gemv_encoding(),
                _ => kernels::gemm_encoding(variant.layout()),
            };
            let x = upload("x", &self_test::encode_codes(encoding, &product.x, shape.k()));
            let offset = upload("offset", bytemuck::cast_slice(&row_offsets(&packed)));
            let tokens = product.x.chunks_exact(shape.k());
            let sums: Vec<u32> =
                tokens.map(|token| self_test::code_sum(encoding, token) as u32).collect();
            let code_sum = upload("code_sum", &sums);
            let acc = gpu.storage("acc", n_tokens * n_pad).expect("device memory");
            let call = match n_tokens {
                1 => kernels::gemv(variant.into(), shape, 0, n_pad / 32),
                _ => {
                    let (layout, tile_base, n_tiles) = (variant.layout(), 0, n_pad / 32);
                    let gemm =
                        Gemm { layout, shape, tile_base, tiles: n_tiles, max_tokens: n_tokens };
                    gemm.call_for(tiles, n_tokens)
                }
            };
            let (pipelines, uniform) = (gpu.pipelines(), gpu.params_buffer());
            let ops = (0..copies).map(|_| {
                let w = upload("w", packed.words());
                let inputs =
                    SumInputs { words: &w, codes: &x, offset: &offset, code_sum: &code_sum };
                let mut buffers = match n_tokens {
                    1 => variant.gemv_inputs(inputs),
                    _ => kernels::gemm_inputs(call.kernel, inputs),
                };
                buffers.push(&acc);
                gpu.op(&pipelines, &call, &uniform, &buffers).expect("a pipeline")
            });
            let ops = ops.collect();
            let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
            Self { gpu, uniform, params, ops, acc, float: false }
        }

        /// The same product with scales of groups, all 1, so that the answer stays the same: f32 or
        /// int8 activations.
        pub fn groups(
            gpu: &'a Gpu,
            product: &Product,
            binary: bool,
            int8: bool,
            copies: usize,
        ) -> Self {
            let shape = product.packed.shape();
            let (n, k) = (shape.n(), shape.k());
            let group = if k.is_multiple_of(GROUP) { GROUP } else { 64 };
            let matrix = GroupMatrix { shape, group, binary };
            let n_tokens = product.x.len() / k;
            let upload = |what, words: &[u32]| gpu.upload(what, words).expect("device memory");
            let w: Vec<u32> = match binary {
                true => product.packed.repack(Signs).words().to_vec(),
                false => product.packed.repack(Layout::Planes).words().to_vec(),
            };
            let ones = vec![0x3c00; n * k / group];
            let scales = upload("scales", &group_scales::pack(n, k / group, &ones));
            let codes = self_test::encode_codes(Encoding::Planes, &product.x, k);
            let x: Vec<u32> = product.x.iter().map(|&code| f32::from(code).to_bits()).collect();
            let x = if int8 { upload("x", &codes) } else { upload("x", &x) };
            let act_scale = upload("act_scale", &vec![1f32.to_bits(); n_tokens * k / group]);
            let stride = kernels::padded_rows(n);
            let acc = gpu.storage("acc", n_tokens * stride).expect("device memory");
            let tokens = if n_tokens == 1 { TokensPerLane::One } else { TokensPerLane::Four };
            let out = RowsOut { base: 0, rows: n, stride };
            let call = match int8 {
                true => kernels::group_gemv_int8(matrix, out, tokens),
                false => kernels::group_gemv(matrix, out, tokens, false),
            };
            let (pipelines, uniform) = (gpu.pipelines(), gpu.params_buffer());
            let ops = (0..copies).map(|_| {
                let w = upload("w", &w);
                let mut buffers = vec![&w, &scales, &x];
                if int8 {
                    buffers.push(&act_scale);
                }
                buffers.push(&acc);
                gpu.op(&pipelines, &call, &uniform, &buffers).expect("a pipeline")
            });
            let ops = ops.collect();
            let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
            Self { gpu, uniform, params, ops, acc, float: true }
        }

        /// Runs once and compares with the reference's first and last token.
        pub fn check(&self, product: &Product) {
            self.gpu.run_all(&self.uniform, self.params, &self.ops[..1]).expect("the device runs");
            let (n, n_tokens) = (product.packed.shape().n(), self.params.n_tokens as usize);
            let n_pad = kernels::padded_rows(n);
            let found = self.gpu.read(&self.acc, n_tokens * n_pad).expect("the device answers");
            for m in [0, n_tokens - 1] {
                let found: Vec<i32> = found[m * n_pad..][..n]
                    .iter()
                    .map(|&word| if self.float { f32::from_bits(word) as i32 } else { word as i32 })
                    .collect();
                assert_eq!(found, &product.y[m * n..][..n], "token {m}");
            }
        }

        /// The time of `count` dispatches, going round the copies, many in a submit.
        pub fn time(&self, count: u64) -> Duration {
            const IN_A_SUBMIT: usize = 32;
            let mut ops = self.ops.iter().cycle().take(count as usize).peekable();
            let start = Instant::now();
            while ops.peek().is_some() {
                let some: Vec<_> = ops.by_ref().take(IN_A_SUBMIT).collect();
                self.gpu.run_all(&self.uniform, self.params, some).expect("the device runs");
            }
            start.elapsed()
        }
    }
}
