//! Every kernel against its twin in `cpu-ref`: random shapes and edges.

use cpu_ref::attention::Heads;
use cpu_ref::group_gemv::{bound, group_dot, group_dot_int8, quantize_absmax_groups};
use cpu_ref::mlp::Activation;
use libtest_mimic::Failed;
use sterna::Error;
use sterna::backend::gpu::kernels::{
    self, DenseFormat, DenseShard, Encoding, Fused, Gemm, GemmPlan, GemvPlan, GroupMatrix,
    KvLayout, KvShard, LinearRows, LogitTile, Rotate, RowOrder, RowsOut, SumInputs, TokensPerLane,
    Variant, gemm_encoding, gemm_inputs, padded_rows,
};
use sterna::backend::gpu::self_test::GroupInput;
use sterna::backend::gpu::shader::UNCHECKED;
use sterna::backend::gpu::{
    Call, Capabilities, Cooperative, Gpu, PassParams, Slice, WeightsRead, row_offsets, self_test,
};
use sterna::format::float::f16_to_f32;
use sterna::kv_cache::KvFormat;
use sterna::layout::{Layout, Packed, Signs, group_scales};
use sterna::random::Random;
use sterna::shape::MatShape;
use sterna::weights::{Alphabet, Codes, Table, TableData, TernaryMatrix};

use crate::util::{as_f32, as_i32, close, open, run_guarded, same};
use crate::{Body, Case};

/// f32 machine epsilon: the relative error of one correctly rounded operation is half of it.
const EPS: f32 = f32::EPSILON;

pub fn cases(capabilities: Capabilities) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut add = |name: String, case: Body| {
        cases.push((name, case));
    };
    for variant in Variant::ALL {
        let gemv = variant.gemv().name;
        add(format!("{gemv}::shapes"), Box::new(move |gpu| gemv_shapes(gpu, variant)));
        add(format!("{gemv}::extremes"), Box::new(move |gpu| gemv_extremes(gpu, variant)));
        add(format!("self_test::{gemv}"), Box::new(move |gpu| self_tests(gpu, variant)));
        add(format!("fused_residual::{gemv}"), Box::new(move |gpu| fused_residual(gpu, variant)));
        add(format!("fused_gated::{gemv}"), Box::new(move |gpu| fused_gated(gpu, variant)));
        add(format!("fused_qkv::{gemv}"), Box::new(move |gpu| fused_qkv(gpu, variant)));
        add(
            format!("unchecked::{gemv}"),
            Box::new(move |gpu| unchecked(gpu, capabilities, variant)),
        );
    }
    if capabilities == Capabilities::Adapter {
        // The rest are the same kernels with the same constants on every device.
        return cases;
    }
    cases.extend(Gemms::Planes.cases());
    cases.extend(Gemms::I2.cases());
    let mut add = |name: String, case: Body| {
        cases.push((name, case));
    };
    for variant in Variant::ALL {
        let gemv = variant.gemv().name;
        add(format!("{gemv}::longest"), Box::new(move |gpu| gemv_longest(gpu, variant)));
        add(
            format!("{gemv}::a_corrupted_weight_is_caught"),
            Box::new(move |gpu| corrupted_weight(gpu, variant)),
        );
        add(format!("{gemv}::shards_and_guards"), Box::new(move |gpu| gemv_shards(gpu, variant)));
    }
    for encoding in Encoding::ALL {
        add(format!("quantize_absmax::{encoding:?}"), Box::new(move |gpu| quantize(gpu, encoding)));
    }
    add("a_short_buffer_is_refused".into(), Box::new(short_buffer));
    add("plans_are_checked".into(), Box::new(plans_are_checked));
    add("rmsnorm".into(), Box::new(rmsnorm));
    add("rope".into(), Box::new(rope));
    add("gated_activation".into(), Box::new(gated_activation));
    add("residual_add".into(), Box::new(residual_add));
    add("embedding_and_lm_head".into(), Box::new(embedding_and_lm_head));
    add("lm_head::many_rows".into(), Box::new(lm_head_many_rows));
    add("argmax".into(), Box::new(argmax));
    add("codes_embedding_and_lm_head".into(), Box::new(codes_embedding_and_lm_head));
    for int8 in [false, true] {
        let name = if int8 { "group_gemv_int8" } else { "group_gemv" };
        add(format!("{name}::shapes"), Box::new(move |gpu| group_shapes(gpu, int8)));
        add(format!("{name}::extremes"), Box::new(move |gpu| group_extremes(gpu, int8)));
        add(format!("{name}::shards_and_guards"), Box::new(move |gpu| group_shards(gpu, int8)));
        add(
            format!("self_test::{name}"),
            Box::new(move |gpu| self_test::check_groups(gpu, int8).map_err(Failed::from)),
        );
    }
    add("group_gemv::non_finite".into(), Box::new(group_non_finite));
    add("group_gemv::a_corrupted_weight_is_caught".into(), Box::new(group_corrupted));
    add("group_embedding".into(), Box::new(group_embedding));
    add("quantize_absmax_groups".into(), Box::new(quantize_groups));
    add("head_norm".into(), Box::new(head_norm));
    add("runs_of_rows".into(), Box::new(runs_of_rows));
    add("hadamard".into(), Box::new(hadamard));
    cases
}

/// The kernels that need cooperative matrices.
pub fn cooperative_cases() -> Vec<Case> {
    let mut cases = Gemms::Cooperative.cases();
    let mut add = |name: &str, case: fn(&Gpu) -> Result<(), Failed>| {
        cases.push((format!("{}::{name}", Gemms::Cooperative.name()), Box::new(case)));
    };
    add("random_shapes", cooperative_shapes);
    add("plans_are_checked", cooperative_plans);
    add("short_buffers_are_refused", cooperative_buffers);
    add("unchecked", cooperative_unchecked);
    cases
}

fn tokens(n: usize) -> PassParams {
    PassParams { n_tokens: n as u32, ..PassParams::default() }
}

/// Invocations of a workgroup within WebGPU's defaults.
const DEFAULT_LANES: usize = 256;

/// Every plan of a variant that this device can run; of an adapter with larger workgroups than WebGPU's
/// defaults have, those plans that need them: the others are tested within the defaults, as the same kernels.
fn plans(gpu: &Gpu, variant: Variant) -> Vec<GemvPlan> {
    let mut plans = Vec::new();
    for slices in GemvPlan::SLICES {
        for rows in GemvPlan::ROWS {
            for unroll in GemvPlan::UNROLL {
                plans.push(GemvPlan { slices, rows, unroll, ..variant.into() });
            }
        }
    }
    plans.retain(|plan| plan.validate(gpu, 1).is_ok());
    let is_large = |plan: &GemvPlan| plan.lanes() > DEFAULT_LANES;
    if plans.iter().any(is_large) {
        plans.retain(is_large);
    }
    plans
}

/// How a plan is named in a message.
fn label(plan: GemvPlan) -> String {
    let GemvPlan { variant, slices, rows, unroll, .. } = plan;
    format!("{} S {slices} ROWS {rows} UNROLL {unroll}", variant.gemv().name)
}

/// Plans pass the check that each has to pass before it runs a model.
fn self_tests(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    for plan in plans(gpu, variant).into_iter().step_by(4) {
        self_test::check(gpu, plan)?;
    }
    Ok(self_test::check(gpu, GemvPlan { fused: false, ..variant.into() })?)
}

fn plans_are_checked(gpu: &Gpu) -> Result<(), Failed> {
    for variant in Variant::ALL {
        let good = GemvPlan::from(variant);
        good.validate(gpu, 14_000)?;
        for bad in [
            GemvPlan { slices: 0, ..good },
            GemvPlan { slices: 5, ..good },
            GemvPlan { rows: 8, ..good },
            GemvPlan { unroll: 3, ..good },
        ] {
            match bad.validate(gpu, 64) {
                Err(Error::Plan { .. }) => {}
                other => return Err(format!("{bad:?}: {other:?}").into()),
            }
        }
        for slices in GemvPlan::SLICES {
            let plan = GemvPlan { slices, rows: 16, ..good };
            let max = variant.max_k(slices);
            plan.validate(gpu, max)?;
            match plan.validate(gpu, max + 1) {
                Err(Error::Dimension { max: found, .. }) if found == max => {}
                other => return Err(format!("K {}: {other:?}", max + 1).into()),
            }
        }
    }
    Ok(())
}

/// One block, partial tiles and chunks, K below and above a workgroup's slices, 2B4T's and the
/// longest K in scope.
const SHAPES: &[(usize, usize)] = &[
    (1, 1),
    (1, 64),
    (31, 63),
    (32, 64),
    (33, 65),
    (100, 100),
    (96, 512),
    (7, 577),
    (640, 2560),
    (64, 6912),
    (3, 23040),
];

fn gemv_shapes(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let plans = plans(gpu, variant);
    let mut seen = vec![0; plans.len()];
    for (seed, &(n, k)) in SHAPES.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let shape = MatShape::new(n, k)?;
        let (w, x) = (random.trits(n * k), random.codes(k));
        let packed = Packed::pack(variant.layout(), shape, &w);
        let expected = cpu_ref::gemv::gemv(&w, &x);
        for (at, &plan) in plans.iter().enumerate() {
            // The plans take turns: each driver compiles each of them for each K.
            let turns = if shape.len() > 70_000 { 5 } else { 3 };
            if at % turns != seed % turns {
                continue;
            }
            seen[at] += 1;
            let found = self_test::multiply(gpu, plan.into(), &packed, &x, 1)?;
            same(&format!("{} {shape} seed {seed}", label(plan)), &found, &expected)?;
        }
    }
    // Chunks from none to many a slice, and every rest of an unrolled loop, of the plans with fewest slices.
    let mut random = Random::new(500);
    let fewest = plans.iter().map(|plan| plan.slices).min().expect("there are plans");
    for chunks in 1..=21 {
        let shape = MatShape::new(33, 64 * chunks - random.below(64))?;
        let (w, x) = (random.trits(shape.len()), random.codes(shape.k()));
        let packed = Packed::pack(variant.layout(), shape, &w);
        let expected = cpu_ref::gemv::gemv(&w, &x);
        // Slices of a workgroup have one chunk more or less: in four turns a plan meets every rest.
        let mut plans = plans.iter().filter(|plan| plan.slices == fewest).cycle();
        let &plan = plans.nth(chunks % 6).expect("a cycle");
        let found = self_test::multiply(gpu, plan.into(), &packed, &x, 1)?;
        same(&format!("{} {shape}", label(plan)), &found, &expected)?;
    }
    same("every plan has had its turns", &[seen.iter().all(|&n| n >= 2)], &[true])
}

/// The longest rows that a plan takes, at the largest sums.
fn gemv_longest(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    for slices in GemvPlan::SLICES {
        let plan = GemvPlan { slices, rows: 16, unroll: 2, ..variant.into() };
        let shape = MatShape::new(3, variant.max_k(slices))?;
        let mut w = vec![1i8; shape.len()];
        w[shape.k()..2 * shape.k()].fill(-1);
        w[2 * shape.k()..].iter_mut().step_by(2).for_each(|trit| *trit = -1);
        for code in [-128i8, 127] {
            let x = vec![code; shape.k()];
            let packed = Packed::pack(variant.layout(), shape, &w);
            let found = self_test::multiply(gpu, plan.into(), &packed, &x, 1)?;
            same(&format!("{} {shape}", label(plan)), &found, &cpu_ref::gemv::gemv(&w, &x))?;
        }
    }
    Ok(())
}

fn gemv_extremes(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let plans = plans(gpu, variant);
    let all: Vec<_> = plans.iter().collect();
    // Of long rows a plan of each number of slices, which is what a lane's sums depend on.
    let long: Vec<_> = all.chunk_by(|a, b| a.slices == b.slices).map(|same| same[0]).collect();
    for (k, plans) in [(2550, &all), (14_000, &long), (23_000, &long)] {
        let mut turn = plans.iter().cycle();
        let shape = MatShape::new(33, k)?;
        for weight in [-1i8, 0, 1] {
            for code in [-128i8, -1, 0, 127] {
                let (w, x) = (vec![weight; shape.len()], vec![code; shape.k()]);
                let packed = Packed::pack(variant.layout(), shape, &w);
                let expected = cpu_ref::gemv::gemv(&w, &x);
                for &&plan in turn.by_ref().take(plans.len().min(4)) {
                    let found = self_test::multiply(gpu, plan.into(), &packed, &x, 1)?;
                    let what = format!("{} K {k}, all {weight} × all {code}", label(plan));
                    same(&what, &found, &expected)?;
                }
            }
        }
    }
    Ok(())
}

/// The judge must object when a single trit is wrong.
fn corrupted_weight(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let mut random = Random::new(99);
    let shape = MatShape::new(70, 300)?;
    let mut w = random.trits(shape.len());
    let x: Vec<i8> = (0..shape.k()).map(|_| random.below(100) as i8 + 1).collect();
    let expected = cpu_ref::gemv::gemv(&w, &x);
    let at = 41 * shape.k() + 222;
    w[at] = if w[at] == 1 { 0 } else { w[at] + 1 };
    let packed = Packed::pack(variant.layout(), shape, &w);
    let found = self_test::multiply(gpu, variant.into(), &packed, &x, 1)?;
    match same("corrupted", &found, &expected) {
        Ok(()) => Err("a wrong weight went unnoticed".into()),
        Err(_) => Ok(()),
    }
}

/// Kernels of many tokens that a test is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gemms {
    Planes,
    I2,
    /// The adapter's cooperative matrices.
    Cooperative,
}

impl Gemms {
    fn layout(self) -> Layout {
        match self {
            Self::Planes => Layout::Planes,
            Self::I2 | Self::Cooperative => Layout::I2,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Planes | Self::I2 => GemmPlan::default().kernel(self.layout()).name,
            Self::Cooperative => "gemm_i2_coop",
        }
    }

    fn cases(self) -> Vec<Case> {
        type Test = fn(&Gpu, Gemms) -> Result<(), Failed>;
        let mut cases: Vec<Case> = Vec::new();
        let mut add = |name: String, test: Test| {
            cases.push((name, Box::new(move |gpu| test(gpu, self))));
        };
        let kernel = self.name();
        add(format!("{kernel}::shapes"), gemm_shapes);
        add(format!("{kernel}::token_edges"), gemm_tokens);
        add(format!("{kernel}::extremes"), gemm_extremes);
        add(format!("{kernel}::shards_and_guards"), gemm_shards);
        add(format!("{kernel}::a_corrupted_weight_is_caught"), gemm_corrupted);
        add(format!("self_test::{kernel}"), gemm_self_tests);
        cases
    }

    /// The plans that this adapter can run.
    fn plans(self, gpu: &Gpu) -> Vec<GemmPlan> {
        match self {
            Self::Planes | Self::I2 => {
                let can_run = |plan: &GemmPlan| plan.validate(gpu, self.layout(), 1).is_ok();
                GemmPlan::all().into_iter().filter(can_run).collect()
            }
            Self::Cooperative => cooperative(gpu),
        }
    }

    /// Every kernel and tile that this adapter can run.
    fn all(self, gpu: &Gpu) -> Vec<ManyTokens> {
        let tiled = self.plans(gpu).into_iter().filter(|&plan| plan != GemmPlan::FEW);
        let few = [ManyTokens::Few(4), ManyTokens::Few(8)].into_iter();
        let few = few.filter(|_| self != Self::Cooperative);
        few.chain(tiled.map(ManyTokens::Tiled)).collect()
    }
}

/// The plans with the adapter's cooperative matrices whose workgroups are not too large for it.
pub fn cooperative(gpu: &Gpu) -> Vec<GemmPlan> {
    let matrices = gpu.cooperative().expect("the tests are for adapters that have them");
    let fits = |plan: &GemmPlan| match plan.validate(gpu, Layout::I2, 1) {
        Ok(()) => true,
        Err(Error::GpuLimit { .. }) => false,
        Err(error) => panic!("{plan:?}: {error}"),
    };
    let plans: Vec<_> = GemmPlan::all_of(matrices).into_iter().filter(fits).collect();
    assert!(!plans.is_empty(), "{matrices:?}");
    plans
}

/// A kernel of many tokens.
#[derive(Debug, Clone, Copy)]
enum ManyTokens {
    /// So many tokens a lane.
    Few(usize),
    Tiled(GemmPlan),
}

impl ManyTokens {
    fn call(self, gemm: Gemm) -> Call {
        match self {
            Self::Few(tokens) => gemm.few(tokens),
            Self::Tiled(plan) => gemm.tiled(plan),
        }
    }
}

fn gemm_self_tests(gpu: &Gpu, gemms: Gemms) -> Result<(), Failed> {
    for plan in gemms.plans(gpu) {
        self_test::check_gemm(gpu, gemms.layout(), plan)?;
    }
    Ok(())
}

/// Random shapes, none of them of whole tiles: the sums of the reference, and for a token those of the
/// GEMV.
fn cooperative_shapes(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(1200);
    for turn in 0..16 {
        let (n, m, k) = (1 + random.below(200), 2 + random.below(140), 1 + random.below(900));
        let shape = MatShape::new(n, k)?;
        let (w, x) = (random.trits(n * k), random.codes(m * k));
        let packed = Packed::pack(Layout::I2, shape, &w);
        let expected = cpu_ref::gemm::gemm(&w, &x, k);
        let gemv = Variant::PackedDot.into();
        let one = self_test::multiply(gpu, gemv, &packed, &x[(m - 1) * k..], 1)?;
        for plan in cooperative(gpu) {
            let (name, found) = self_test::multiply_many(gpu, &packed, &x, |g| g.tiled(plan))?;
            let what = format!("{name} {plan} {shape} M {m}, turn {turn}");
            same(&what, &found, &expected)?;
            same(&format!("{what}: the last token alone"), &found[(m - 1) * n..], &one)?;
        }
    }
    Ok(())
}

/// What cooperative matrices cannot do is refused.
fn cooperative_plans(gpu: &Gpu) -> Result<(), Failed> {
    let good = cooperative(gpu)[0];
    let matrices = gpu.cooperative().ok_or("there are none")?;
    let max = kernels::MAX_K;
    good.validate(gpu, Layout::I2, max)?;
    match good.validate(gpu, Layout::I2, max + 1) {
        Err(Error::Dimension { max: found, .. }) if found == max => {}
        other => return Err(format!("K {}: {other:?}", max + 1).into()),
    }
    let tile = |rows, tokens| GemmPlan { rows, tokens, ..good };
    for (plan, layout) in
        [(tile(128, 64), Layout::I2), (tile(64, 8), Layout::I2), (good, Layout::Planes)]
    {
        match plan.validate(gpu, layout, 64) {
            Err(Error::Plan { .. }) => {}
            other => return Err(format!("{plan:?} for {layout:?}: {other:?}").into()),
        }
    }
    for other in [
        Cooperative { size: 24 - matrices.size, ..matrices },
        Cooperative { subgroup: matrices.subgroup / 2, ..matrices },
    ] {
        match (GemmPlan { cooperative: Some(other), ..good }).validate(gpu, Layout::I2, 64) {
            Err(Error::Cooperative { .. }) => {}
            found => return Err(format!("{other:?}: {found:?}").into()),
        }
    }
    // A device that was asked for nothing has none.
    let baseline = open(Capabilities::WebGpuDefault)?;
    match good.validate(&baseline, Layout::I2, 64) {
        Err(Error::Cooperative { found, .. }) if found == "none" => Ok(()),
        found => Err(format!("within WebGPU's defaults: {found:?}").into()),
    }
}

/// Each buffer one word short of what the kernel could touch.
fn cooperative_buffers(gpu: &Gpu) -> Result<(), Failed> {
    let shape = MatShape::new(256, 128)?;
    let gemm = Gemm { layout: Layout::I2, shape, tile_base: 3, tiles: 2, max_tokens: 3 };
    let calls: Vec<_> = cooperative(gpu).into_iter().map(|plan| gemm.tiled(plan)).collect();
    short_buffers(gpu, &calls)
}

/// The same bits with every check at run time.
fn cooperative_unchecked(gpu: &Gpu) -> Result<(), Failed> {
    let checked = open(Capabilities::Adapter)?.with_runtime_checks();
    let mut random = Random::new(92);
    let (shape, m) = (MatShape::new(70, 1001)?, 71);
    let packed = Packed::pack(Layout::I2, shape, &random.trits(shape.len()));
    let x = random.codes(m * shape.k());
    for plan in cooperative(gpu) {
        let (name, found) = self_test::multiply_many(gpu, &packed, &x, |g| g.tiled(plan))?;
        let (_, expected) = self_test::multiply_many(&checked, &packed, &x, |g| g.tiled(plan))?;
        same(&format!("{name} {plan} unchecked"), &found, &expected)?;
    }
    Ok(())
}

fn gemm_shapes(gpu: &Gpu, gemms: Gemms) -> Result<(), Failed> {
    let (kernels, layout) = (gemms.all(gpu), gemms.layout());
    for (seed, &(n, k)) in SHAPES.iter().enumerate() {
        let m = [2, 3, 40, 65, 8, 67, 17, 2, 33, 70, 2][seed];
        let mut random = Random::new(1000 + seed as u64);
        let shape = MatShape::new(n, k)?;
        let (w, x) = (random.trits(n * k), random.codes(m * k));
        let packed = Packed::pack(layout, shape, &w);
        let expected = cpu_ref::gemm::gemm(&w, &x, k);
        // The kernels take turns: each driver compiles each of them for each K.
        for kernel in kernels.iter().skip(seed % 3).step_by(3) {
            let (name, found) = self_test::multiply_many(gpu, &packed, &x, |g| kernel.call(g))?;
            same(&format!("{name} {kernel:?} {shape} M {m} seed {seed}"), &found, &expected)?;
        }
    }
    Ok(())
}

/// What the kernels of many tokens read, for as many tokens as there are activations.
struct GemmCase {
    gemm: Gemm,
    words: Slice,
    codes: Slice,
    offset: Slice,
    code_sum: Slice,
}

impl GemmCase {
    /// Of a shard of tiles.
    fn new(gpu: &Gpu, packed: &Packed, x: &[i8], tiles: (usize, usize)) -> Result<Self, Failed> {
        let (layout, shape) = (packed.layout(), packed.shape());
        let ((tile_base, tiles), encoding) = (tiles, gemm_encoding(layout));
        let tile_words = packed.words().len() / (padded_rows(shape.n()) / 32);
        let words = &packed.words()[tile_base * tile_words..][..tiles * tile_words];
        let offsets = row_offsets(packed);
        let sums = x.chunks_exact(shape.k()).map(|token| self_test::code_sum(encoding, token));
        let max_tokens = x.len() / shape.k();
        Ok(Self {
            gemm: Gemm { layout, shape, tile_base, tiles, max_tokens },
            words: gpu.upload("w", words)?,
            codes: gpu.upload("x", &self_test::encode_codes(encoding, x, shape.k()))?,
            offset: gpu.upload("offset", &offsets[tile_base * 32..][..tiles * 32])?,
            code_sum: gpu.upload("code_sum", &sums.collect::<Vec<_>>())?,
        })
    }

    /// In the order of the call's bindings.
    fn inputs(&self, call: &Call) -> Vec<&Slice> {
        let Self { words, codes, offset, code_sum, .. } = self;
        gemm_inputs(call.kernel, SumInputs { words, codes, offset, code_sum })
    }
}

/// The matrix, and the tokens that there is room for, of the tests whose point is neither: both are
/// constants of the kernels, which are compiled once for all of these tests.
const GEMM_SHAPE: (usize, usize) = (150, 130);
const GEMM_MOST: usize = 130;

/// Every number of tokens around the edges of lanes and tiles, in buffers with room for more; what is
/// past the last token stays as it is.
fn gemm_tokens(gpu: &Gpu, gemms: Gemms) -> Result<(), Failed> {
    const MOST: usize = GEMM_MOST;
    let mut random = Random::new(77);
    let shape = MatShape::new(GEMM_SHAPE.0, GEMM_SHAPE.1)?;
    let (w, x) = (random.trits(shape.len()), random.codes(MOST * shape.k()));
    let packed = Packed::pack(gemms.layout(), shape, &w);
    let expected = cpu_ref::gemm::gemm(&w, &x, shape.k());
    let n_pad = padded_rows(shape.n());
    let case = GemmCase::new(gpu, &packed, &x, (0, n_pad / 32))?;
    let (pipelines, uniform) = (gpu.pipelines(), gpu.params_buffer());
    let untouched = 0x0BAD_F00D_u32;
    for kernel in gemms.all(gpu) {
        let call = kernel.call(case.gemm);
        let most = if let ManyTokens::Few(_) = kernel { 18 } else { MOST };
        let edges = (1..=17).chain(31..=33).chain(63..=65).chain(127..=129);
        for m in edges.filter(|&m| m < most) {
            let acc = gpu.upload("acc", &vec![untouched; MOST * n_pad])?;
            let buffers = [case.inputs(&call), vec![&acc]].concat();
            let op = gpu.op(&pipelines, &call, &uniform, &buffers)?;
            gpu.run_all(&uniform, tokens(m), [&op])?;
            let found = gpu.read(&acc, MOST * n_pad)?;
            let what = format!("{} {kernel:?} M {m}", call.kernel.name);
            for (token, expected) in expected.chunks_exact(shape.n()).take(m).enumerate() {
                let found = as_i32(&found[token * n_pad..][..shape.n()]);
                same(&format!("{what} token {token}"), &found, expected)?;
            }
            if found[m * n_pad..].iter().any(|&word| word != untouched) {
                return Err(format!("{what}: wrote past the last token").into());
            }
        }
    }
    Ok(())
}

/// The largest sums, and the longest rows.
fn gemm_extremes(gpu: &Gpu, gemms: Gemms) -> Result<(), Failed> {
    let (pipelines, uniform) = (gpu.pipelines(), gpu.params_buffer());
    let (all, layout) = (gemms.all(gpu), gemms.layout());
    for (n, k, m, turns) in [(32, 2600, 9, 1), (64, 6912, 5, 2), (32, 131_072, 2, 3)] {
        let shape = MatShape::new(n, k)?;
        for (weight, code) in [(-1i8, -128i8), (-1, 127), (0, -1), (1, -128), (1, 127)] {
            let (w, x) = (vec![weight; shape.len()], vec![code; m * k]);
            let case = GemmCase::new(gpu, &Packed::pack(layout, shape, &w), &x, (0, n / 32))?;
            let expected = vec![i32::from(weight) * i32::from(code) * k as i32; m * n];
            for kernel in all.iter().step_by(turns) {
                let call = kernel.call(case.gemm);
                let acc = gpu.storage("acc", m * n)?;
                let buffers = [case.inputs(&call), vec![&acc]].concat();
                let op = gpu.op(&pipelines, &call, &uniform, &buffers)?;
                gpu.run_all(&uniform, tokens(m), [&op])?;
                let found = as_i32(&gpu.read(&acc, m * n)?);
                let name = call.kernel.name;
                let what = format!("{name} {kernel:?} K {k}, all {weight} × all {code}");
                same(&what, &found, &expected)?;
            }
        }
    }
    Ok(())
}

/// The judge must object when a single trit is wrong.
fn gemm_corrupted(gpu: &Gpu, gemms: Gemms) -> Result<(), Failed> {
    let mut random = Random::new(98);
    let (shape, m) = (MatShape::new(GEMM_SHAPE.0, GEMM_SHAPE.1)?, GEMM_MOST);
    let mut w = random.trits(shape.len());
    let x: Vec<i8> = (0..m * shape.k()).map(|_| random.below(100) as i8 + 1).collect();
    let expected = cpu_ref::gemm::gemm(&w, &x, shape.k());
    let at = 41 * shape.k() + 122;
    w[at] = if w[at] == 1 { 0 } else { w[at] + 1 };
    let packed = Packed::pack(gemms.layout(), shape, &w);
    for kernel in gemms.all(gpu) {
        let (name, found) = self_test::multiply_many(gpu, &packed, &x, |g| kernel.call(g))?;
        if same("corrupted", &found, &expected).is_ok() {
            return Err(format!("{name} {kernel:?}: a wrong weight went unnoticed").into());
        }
    }
    Ok(())
}

/// Shards of tiles of 150 rows: first, and how many. One is of no whole tiles of 64 or 128 rows, and the
/// other's last has padding.
const SHARDS: [(usize, usize); 2] = [(0, 3), (3, 2)];

/// A matrix in two shards of tiles, the accumulator between guard words.
fn gemm_shards(gpu: &Gpu, gemms: Gemms) -> Result<(), Failed> {
    let mut random = Random::new(7);
    let (shape, m) = (MatShape::new(GEMM_SHAPE.0, GEMM_SHAPE.1)?, 37);
    let (w, x) = (random.trits(shape.len()), random.codes(m * shape.k()));
    let packed = Packed::pack(gemms.layout(), shape, &w);
    let n_pad = padded_rows(shape.n());
    let expected = cpu_ref::gemm::gemm(&w, &x, shape.k());
    for (base, count) in SHARDS {
        let case = GemmCase::new(gpu, &packed, &x, (base, count))?;
        let rows = base * 32..((base + count) * 32).min(shape.n());
        for kernel in gemms.all(gpu) {
            let call = kernel.call(case.gemm);
            let acc =
                run_guarded(gpu, &call, tokens(m), &case.inputs(&call), &[m * n_pad])?.remove(0);
            for token in 0..m {
                let found = as_i32(&acc[token * n_pad..][rows.clone()]);
                let expected = &expected[token * shape.n()..][rows.clone()];
                let name = call.kernel.name;
                same(&format!("{name} {kernel:?} shard {base} token {token}"), &found, expected)?;
            }
        }
    }
    Ok(())
}

/// The same for one token.
fn gemv_shards(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let mut random = Random::new(8);
    let shape = MatShape::new(150, 130)?;
    let (w, x) = (random.trits(shape.len()), random.codes(shape.k()));
    let packed = Packed::pack(variant.layout(), shape, &w);
    let (n_pad, encoding) = (padded_rows(shape.n()), variant.gemv_encoding());
    let codes = gpu.upload("x", &self_test::encode_codes(encoding, &x, shape.k()))?;
    let code_sum = gpu.upload("code_sum", &[self_test::code_sum(encoding, &x)])?;
    let expected = cpu_ref::gemv::gemv(&w, &x);
    for (base, count) in SHARDS {
        let GemmCase { words, offset, .. } = GemmCase::new(gpu, &packed, &x, (base, count))?;
        let (words, codes, offset, code_sum) = (&words, &codes, &offset, &code_sum);
        let inputs = variant.gemv_inputs(SumInputs { words, codes, offset, code_sum });
        let call = kernels::gemv(variant.into(), shape, base, count);
        let acc = run_guarded(gpu, &call, tokens(1), &inputs, &[n_pad])?.remove(0);
        let rows = base * 32..((base + count) * 32).min(shape.n());
        let found = as_i32(&acc[rows.clone()]);
        same(&format!("{} shard {base}", call.kernel.name), &found, &expected[rows])?;
    }
    Ok(())
}

fn quantize(gpu: &Gpu, encoding: Encoding) -> Result<(), Failed> {
    let mut random = Random::new(3);
    for k in [1, 63, 64, 65, 256, 2560, 6913] {
        let m = 3;
        let mut x = random.floats(m * k, 3.0);
        // The second token is all zero, the third below the floor.
        x[k..2 * k].fill(0.0);
        x[2 * k..].iter_mut().for_each(|value| *value *= 1e-7);
        let found = self_test::quantize(gpu, encoding, &x, m)?;
        for (token, values) in x.chunks_exact(k).enumerate() {
            let expected = cpu_ref::quantize_absmax::quantize_absmax(values);
            let what = format!("quantize_absmax K {k} token {token}");
            close(&what, &[found.act_scale[token]], &[expected.act_scale], |_| {
                2.5 * EPS * expected.act_scale
            })?;
            let codes = self_test::decode_codes(encoding, found.token(token), k);
            let inv_act_scale = 1.0 / expected.act_scale;
            for (at, (&code, &reference)) in codes.iter().zip(&expected.codes).enumerate() {
                // 127/absmax may be 2.5 ULP off: a value that close to a tie may go either way.
                let scaled = values[at] * inv_act_scale;
                let from_tie = (scaled - scaled.floor() - 0.5).abs();
                let at_tie = from_tie <= 4.0 * EPS * scaled.abs();
                let off = (i32::from(code) - i32::from(reference)).abs();
                if off > 1 || (off == 1 && !at_tie) {
                    return Err(format!("{what}: [{at}]: {code}, expected {reference}").into());
                }
            }
            let sum = self_test::code_sum(encoding, &codes);
            same(&format!("{what}: sum"), &[found.code_sum[token]], &[sum])?;
        }
    }
    let (k, m) = (100, 2);
    let call = kernels::quantize_absmax(k, encoding);
    let x = gpu.upload("x", &random.floats(m * k, 3.0))?;
    run_guarded(gpu, &call, tokens(m), &[&x], &[2 * m * encoding.chunk_words(), m, m])?;
    // Exact ties and a NaN.
    let ties = [127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 126.5, -126.5];
    let found = self_test::quantize(gpu, encoding, &ties, 1)?;
    let expected = cpu_ref::quantize_absmax::quantize_absmax(&ties).codes;
    same("ties", &self_test::decode_codes(encoding, found.token(0), ties.len()), &expected)?;
    let found = self_test::quantize(gpu, encoding, &[1.0, f32::NAN, 2.0], 1)?;
    if !found.act_scale[0].is_nan() {
        return Err(format!("NaN was hidden: act_scale {}", found.act_scale[0]).into());
    }
    Ok(())
}

fn rmsnorm(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(11);
    for (k, m) in [(1, 1), (64, 3), (255, 2), (2560, 2), (6912, 1)] {
        let (x, w) = (random.floats(m * k, 4.0), random.floats(k, 2.0));
        let (x_buffer, w_buffer) = (gpu.upload("x", &x)?, gpu.upload("w", &w)?);
        let call = kernels::rmsnorm(k, 1e-5, false);
        let out = run_guarded(gpu, &call, tokens(m), &[&x_buffer, &w_buffer], &[m * k])?;
        let expected: Vec<f32> =
            x.chunks_exact(k).flat_map(|x| cpu_ref::rmsnorm::rmsnorm(x, &w, 1e-5)).collect();
        // The f32 sum of K squares: each lane adds K/256, the tree 8 more; 2 ULP from inverseSqrt.
        let relative = (k as f32 / 256.0 + 8.0 + 6.0) * EPS;
        let what = format!("rmsnorm K {k} M {m}");
        close(&what, &as_f32(&out[0]), &expected, |at| relative * expected[at].abs())?;
        // Only the last token's row, for the head.
        let call = kernels::rmsnorm(k, 1e-5, true);
        let first_logit_row = m as u32 - 1;
        let params = PassParams { first_logit_row, n_logit_rows: 1, ..tokens(m) };
        let out = run_guarded(gpu, &call, params, &[&x_buffer, &w_buffer], &[k])?;
        let expected = &expected[(m - 1) * k..];
        close(&what, &as_f32(&out[0]), expected, |at| relative * expected[at].abs())?;
    }
    Ok(())
}

/// Accumulators and scales of a matrix result.
struct Sums {
    acc: Vec<i32>,
    weight_scale: Vec<f32>,
    act_scale: Vec<f32>,
    n: usize,
}

impl Sums {
    fn random(random: &mut Random, m: usize, n: usize) -> Self {
        let acc = (0..m * padded_rows(n)).map(|_| random.below(200_001) as i32 - 100_000);
        Self {
            acc: acc.collect(),
            weight_scale: (0..n).map(|_| 0.5 + random.unit().abs()).collect(),
            act_scale: (0..m).map(|_| 0.01 + 0.01 * random.unit().abs()).collect(),
            n,
        }
    }

    /// The scaled result of token `m`.
    fn row(&self, m: usize) -> Vec<f32> {
        let acc = &self.acc[m * padded_rows(self.n)..][..self.n];
        cpu_ref::gemv::dequantize(acc, &self.weight_scale, self.act_scale[m])
    }
}

fn rope(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(13);
    for heads in [
        Heads { query: 4, kv: 2, dim: 32 },
        Heads { query: 3, kv: 1, dim: 100 },
        Heads { query: 2, kv: 2, dim: 256 },
        Heads { query: 1, kv: 1, dim: 2 },
    ] {
        let (m, start, capacity) = (3, 5, 9);
        let (query_size, kv_size) = (heads.query * heads.dim, heads.kv * heads.dim);
        let sums = Sums::random(&mut random, m, query_size + 2 * kv_size);
        let inv_freq =
            cpu_ref::rope::frequencies(10_000.0, heads.dim, cpu_ref::rope::Scaling::None);
        let angles: Vec<[f32; 2]> = (0..capacity)
            .flat_map(|position| {
                let (cos, sin) = cpu_ref::rope::angles(position, &inv_freq);
                cos.into_iter().zip(sin).map(|(cos, sin)| [cos, sin]).collect::<Vec<_>>()
            })
            .collect();
        let inputs = [
            gpu.upload("acc", &sums.acc)?,
            gpu.upload("weight_scale", &sums.weight_scale)?,
            gpu.upload("act_scale", &sums.act_scale)?,
            gpu.upload("angles", &angles)?,
        ];
        let params = PassParams { start: start as u32, ..tokens(m) };
        let rows = LinearRows::sums(sums.n);
        let lens = [m * query_size, m * kv_size, m * kv_size];
        let out =
            run_guarded(gpu, &kernels::rope(heads, &rows), params, &inputs.each_ref(), &lens)?;
        let [query, keys, values] = [0, 1, 2].map(|i| as_f32(&out[i]));
        for token in 0..m {
            let mut row = sums.row(token);
            let largest = row.iter().fold(0.0f32, |max, value| max.max(value.abs()));
            // Two products and a sum of values up to `largest`, each scaled by two products.
            let bound = |_| 8.0 * EPS * largest;
            let (cos, sin) = cpu_ref::rope::angles(start + token, &inv_freq);
            for head in row[..query_size + kv_size].chunks_exact_mut(heads.dim) {
                cpu_ref::rope::rotate(head, &cos, &sin);
            }
            let (expected_query, rest) = row.split_at(query_size);
            let (expected_keys, expected_values) = rest.split_at(kv_size);
            let what = format!("rope {heads:?} token {token}");
            let slot = token * kv_size..(token + 1) * kv_size;
            close(&what, &query[token * query_size..][..query_size], expected_query, bound)?;
            close(&what, &keys[slot.clone()], expected_keys, bound)?;
            close(&what, &values[slot], expected_values, bound)?;
        }
    }
    Ok(())
}

fn gated_activation(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(19);
    for activation in [Activation::Relu2, Activation::Silu] {
        for (intermediate, m) in [(1, 1), (33, 2), (768, 3)] {
            let mut sums = Sums::random(&mut random, m, 2 * intermediate);
            if activation == Activation::Silu {
                // Gates between −20 and 20, where SiLU is neither 0 nor the identity.
                sums.acc.iter_mut().for_each(|acc| *acc /= 100);
            }
            let inputs = [
                gpu.upload("acc", &sums.acc)?,
                gpu.upload("weight_scale", &sums.weight_scale)?,
                gpu.upload("act_scale", &sums.act_scale)?,
            ];
            let rows = LinearRows::sums(2 * intermediate);
            let call = kernels::gated_activation(intermediate, activation, &rows);
            let inputs = inputs.each_ref();
            let out = run_guarded(gpu, &call, tokens(m), &inputs, &[m * intermediate])?;
            let expected: Vec<f32> = (0..m)
                .flat_map(|token| {
                    let row = sums.row(token);
                    let (gate, up) = row.split_at(intermediate);
                    cpu_ref::mlp::gated_activation(gate, up, activation)
                })
                .collect();
            // exp(x) to 3 + 2|x| ULP with |x| up to 20, and a few roundings.
            let relative = match activation {
                Activation::Relu2 => 8.0 * EPS,
                Activation::Silu => 64.0 * EPS,
            };
            let what = format!("gated_activation {activation:?} F {intermediate} M {m}");
            close(&what, &as_f32(&out[0]), &expected, |at| {
                relative * expected[at].abs() + f32::MIN_POSITIVE
            })?;
        }
    }
    Ok(())
}

fn residual_add(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(23);
    for (n, m) in [(1, 1), (64, 2), (70, 3), (2560, 2)] {
        let sums = Sums::random(&mut random, m, n);
        let hidden = random.floats(m * n, 100.0);
        let inputs = [
            gpu.upload("hidden", &hidden)?,
            gpu.upload("acc", &sums.acc)?,
            gpu.upload("weight_scale", &sums.weight_scale)?,
            gpu.upload("act_scale", &sums.act_scale)?,
        ];
        let call = kernels::residual_add(n, &LinearRows::sums(n));
        let out = run_guarded(gpu, &call, tokens(m), &inputs.each_ref(), &[m * n])?;
        let rows: Vec<f32> = (0..m).flat_map(|token| sums.row(token)).collect();
        let expected = cpu_ref::residual::residual_add(&hidden, &rows);
        close(&format!("residual_add N {n} M {m}"), &as_f32(&out[0]), &expected, |at| {
            2.0 * EPS * (hidden[at].abs() + rows[at].abs())
        })?;
    }
    Ok(())
}

/// A dense table as the device stores it, and the values it stands for.
fn table(format: DenseFormat, random: &mut Random, n: usize, k: usize) -> (Vec<u32>, Vec<f32>) {
    let mut words = Vec::new();
    let mut values = Vec::new();
    for _ in 0..n {
        let mut row: Vec<u16> = Vec::new();
        for _ in 0..k {
            let value = random.unit();
            match format {
                DenseFormat::Bf16 => {
                    let bits = (value.to_bits() >> 16) as u16;
                    values.push(f32::from_bits(u32::from(bits) << 16));
                    row.push(bits);
                }
                DenseFormat::F16 => {
                    // A multiple of 1/512 below 1 is an f16: 10 bits of fraction.
                    let steps = (value * 512.0).round_ties_even();
                    values.push(steps / 512.0);
                    row.push(f16_bits(steps / 512.0));
                }
                DenseFormat::F32 => {
                    values.push(value);
                    row.extend([value.to_bits() as u16, (value.to_bits() >> 16) as u16]);
                }
                DenseFormat::Codes { .. } => unreachable!("made by `codes`"),
            }
        }
        row.resize(format.units(k) * 8, 0);
        words.extend(row.chunks_exact(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16));
    }
    (words, values)
}

/// The f16 bits of a value that is exactly representable and normal or zero.
fn f16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    if value == 0.0 {
        return sign;
    }
    let exponent = (bits >> 23 & 0xff) as i32 - 127 + 15;
    sign | (exponent as u16) << 10 | (bits >> 13 & 0x3ff) as u16
}

fn embedding_and_lm_head(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(29);
    let none = gpu.upload("none", &[0u32])?;
    for format in [DenseFormat::Bf16, DenseFormat::F16, DenseFormat::F32] {
        for (at, (n, k)) in
            [(1, 1), (9, 8), (50, 37), (300, 256), (17, 2560)].into_iter().enumerate()
        {
            let tile = LogitTile::ALL[1 + at % 2];
            let (words, values) = table(format, &mut random, n, k);
            let ids: Vec<u32> = (0..4).map(|_| random.below(n) as u32).collect();
            let x = random.floats(2 * k, 2.0);
            let row_words = format.units(k) * 4;
            // The first row of a shard is a constant of the kernels: the others are whole.
            let split = if [50, 300].contains(&n) { n / 2 } else { 0 };
            let shards: Vec<_> = [(0, split), (split, n - split)]
                .into_iter()
                .filter(|&(_, rows)| rows > 0)
                .map(|(base, rows)| DenseShard { format, k, base, rows })
                .collect();
            let what = format!("{format:?} {n}×{k}");
            let tokens_buffer = gpu.upload("tokens", &ids)?;
            let x_buffer = gpu.upload("x", &x)?;
            for shard in shards {
                let rows = &words[shard.base * row_words..][..shard.rows * row_words];
                let rows = gpu.upload("table", rows)?;
                let call = kernels::embedding(shard);
                let lens = [ids.len() * k];
                let inputs = [&tokens_buffer, &rows, &none, &none];
                let out = run_guarded(gpu, &call, tokens(ids.len()), &inputs, &lens)?.remove(0);
                let mine = shard.base..shard.base + shard.rows;
                for (m, &id) in
                    ids.iter().enumerate().filter(|(_, id)| mine.contains(&(**id as usize)))
                {
                    let expected = cpu_ref::embedding::embedding(&values, k, id as usize);
                    same(&format!("embedding {what}"), &as_f32(&out[m * k..][..k]), &expected)?;
                }

                let inputs = [&x_buffer, &rows, &none, &none];
                let out = lm_head_rows(gpu, shard, n, &inputs, 2, tile)?;
                for (m, x) in x.chunks_exact(k).enumerate() {
                    let expected = cpu_ref::lm_head::lm_head(&values, x);
                    let found = as_f32(&out[m * n..][mine.clone()]);
                    // Σ|table·x| ≤ 2K; each lane adds K/32 terms in f32, the tree 5.
                    let bound = 2.0 * k as f32 * (k as f32 / 32.0 + 8.0) * EPS;
                    close(&format!("lm_head {what}"), &found, &expected[mine.clone()], |_| bound)?;
                }
            }
        }
    }
    Ok(())
}

/// `logits[M, V]` of `lm_head`, one row a lane, which are the same bits if it computes as many as `tile`
/// says.
fn lm_head_rows(
    gpu: &Gpu,
    shard: DenseShard,
    v: usize,
    inputs: &[&Slice],
    rows: usize,
    tile: LogitTile,
) -> Result<Vec<u32>, Failed> {
    let params = PassParams { n_logit_rows: rows as u32, ..tokens(rows) };
    let of = |tile| {
        let call = kernels::lm_head(shard, v, tile);
        Ok::<_, Failed>(run_guarded(gpu, &call, params, inputs, &[rows * v])?.remove(0))
    };
    let one = of(LogitTile::One)?;
    same(&format!("lm_head of {} rows a lane", tile.count()), &of(tile)?, &one)?;
    Ok(one)
}

/// 1 to 19 rows of logits at once against the reference, by every number a lane.
fn lm_head_many_rows(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(36);
    for rows in (1..=9).chain([16, 19]) {
        // One shape for each: every check compiles its kernels.
        let (n, k) = [(1, 1), (9, 33), (70, 129), (33, 640)][rows % 4];
        let table = random.floats(n * k, 1.0);
        let unit_words = DenseFormat::F32.units(k) * 4;
        let mut words = vec![0.0; n * unit_words];
        for (row, out) in table.chunks_exact(k).zip(words.chunks_exact_mut(unit_words)) {
            out[..k].copy_from_slice(row);
        }
        let (units, none) = (gpu.upload("table", &words)?, gpu.upload("none", &[0u32])?);
        let shard = DenseShard { format: DenseFormat::F32, k, base: 0, rows: n };
        let x = random.floats(rows * k, 2.0);
        let inputs = [&gpu.upload("x", &x)?, &units, &none, &none];
        for tile in [LogitTile::Four, LogitTile::Eight] {
            let out = lm_head_rows(gpu, shard, n, &inputs, rows, tile)?;
            for (m, x) in x.chunks_exact(k).enumerate() {
                let expected = cpu_ref::lm_head::lm_head(&table, x);
                let bound = 2.0 * k as f32 * (k as f32 / 32.0 + 8.0) * EPS;
                let what = format!("lm_head {n}×{k}, row {m} of {rows}");
                close(&what, &as_f32(&out[m * n..][..n]), &expected, |_| bound)?;
            }
        }
    }
    Ok(())
}

fn argmax(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(31);
    let check = |what: &str, logits: &[f32], rows: usize| -> Result<(), Failed> {
        let v = logits.len() / rows;
        let buffer = gpu.upload("logits", logits)?;
        let params = PassParams { n_logit_rows: rows as u32, ..tokens(rows) };
        let out = run_guarded(gpu, &kernels::argmax(v), params, &[&buffer], &[rows])?;
        let expected = logits.chunks_exact(v).map(cpu_ref::argmax::argmax);
        let expected = expected.map(|token| token.map_or(u32::MAX, |token| token as u32));
        same(what, &out[0], &expected.collect::<Vec<_>>())
    };
    for v in [1, 2, 255, 256, 257, 1000, 32_002] {
        check(&format!("argmax V {v}"), &random.floats(v, 10.0), 1)?;
    }
    check("argmax of each row", &[9.0, 1.0, 2.0, 3.0, 8.0, 1.0], 2)?;
    check("argmax of 8 rows", &random.floats(8 * 700, 10.0), 8)?;
    check("argmax, first of equals", &[1.0, 5.0, 5.0, 5.0], 1)?;
    check(
        "argmax, equals far apart",
        &{
            let mut logits = vec![0.0; 1000];
            logits[300] = 2.0;
            logits[812] = 2.0;
            logits
        },
        1,
    )?;
    check("argmax of negatives", &[-3.0, -2.0, -7.0], 1)?;
    check("argmax of both zeros", &[-1.0, -0.0, 0.0], 1)?;
    check("argmax of infinities", &[f32::NEG_INFINITY, f32::NEG_INFINITY], 1)?;
    check("argmax of NaN", &[1.0, f32::NAN, 2.0], 1)?;
    check("argmax of −NaN", &[1.0, -f32::NAN], 1)
}

/// A matrix with scales of groups, unpacked.
struct Groups {
    shape: MatShape,
    group: usize,
    binary: bool,
    trits: Vec<i8>,
    /// f16 bits.
    scales: Vec<u16>,
}

impl Groups {
    /// Scales of both signs, some subnormal, some 0.
    fn random(random: &mut Random, (n, k): (usize, usize), group: usize, binary: bool) -> Self {
        let trits = if binary { signs(random, n * k) } else { random.trits(n * k) };
        let scale = |random: &mut Random| match random.below(8) {
            0 => random.below(0x400) as u16 | 0x8000,
            1 => random.below(0x400) as u16,
            _ => (0x2000 + random.below(0x2000) as u16) | ((random.below(2) as u16) << 15),
        };
        let scales = (0..n * k / group).map(|_| scale(random)).collect();
        let shape = MatShape::new(n, k).expect("a small shape");
        Self { shape, group, binary, trits, scales }
    }

    fn matrix(&self) -> TernaryMatrix {
        let alphabet = if self.binary { Alphabet::Binary } else { Alphabet::Ternary };
        let (trits, scales) = (self.trits.clone(), self.scales.clone());
        TernaryMatrix::from_groups(self.shape, trits, scales, self.group, alphabet)
    }

    fn for_kernel(&self) -> GroupMatrix {
        GroupMatrix { shape: self.shape, group: self.group, binary: self.binary }
    }

    /// Packed weights and scales.
    fn words(&self) -> [Vec<u32>; 2] {
        let scales = group_scales::pack(self.shape.n(), self.groups(), &self.scales);
        let words = if self.binary {
            Packed::pack(Signs, self.shape, &self.trits).words().to_vec()
        } else {
            Packed::pack(Layout::Planes, self.shape, &self.trits).words().to_vec()
        };
        [words, scales]
    }

    fn groups(&self) -> usize {
        self.shape.k() / self.group
    }

    /// Each row's trits and scales.
    fn rows(&self) -> impl Iterator<Item = (&[i8], Vec<f32>)> {
        let scales = self.scales.chunks_exact(self.groups());
        let scales = scales.map(|row| row.iter().map(|&bits| f16_to_f32(bits)).collect());
        self.trits.chunks_exact(self.shape.k()).zip(scales)
    }

    /// Fails if `found[M, N]` is not what the twin makes of `x[M, K]`.
    fn judge_float(&self, what: &str, found: &[f32], x: &[f32]) -> Result<(), Failed> {
        let n = self.shape.n();
        for (m, x) in x.chunks_exact(self.shape.k()).enumerate() {
            let rows = self.rows();
            let (expected, bounds): (Vec<f32>, Vec<f32>) = rows
                .map(|(row, scales)| (group_dot(row, &scales, x), bound(row, &scales, x)))
                .unzip();
            close(&format!("{what} token {m}"), &found[m * n..][..n], &expected, |at| bounds[at])?;
        }
        Ok(())
    }

    /// What the twin makes of quantised activations.
    fn int8(&self, codes: &[i8], act_scales: &[f32]) -> Vec<f32> {
        let tokens = codes.chunks_exact(self.shape.k()).zip(act_scales.chunks_exact(self.groups()));
        let rows = |(codes, act_scales)| {
            let rows = self.rows();
            rows.map(|(row, d)| group_dot_int8(row, &d, codes, act_scales)).collect::<Vec<_>>()
        };
        tokens.flat_map(rows).collect()
    }

    /// The same bits where products and sums are rounded apart, as the reference does; elsewhere a
    /// few roundings of the sum of magnitudes.
    fn judge_int8(
        &self,
        gpu: &Gpu,
        what: &str,
        found: &[f32],
        (codes, act_scales): (&[i8], &[f32]),
    ) -> Result<(), Failed> {
        let expected = self.int8(codes, act_scales);
        if rounds_like_the_reference(gpu) {
            return same(what, found, &expected);
        }
        let magnitude = |codes: &[i8], act_scales: &[f32]| {
            let largest = act_scales.iter().fold(0.0f32, |max, scale| max.max(scale.abs()));
            let scales = self.scales.iter().map(|&bits| f16_to_f32(bits).abs());
            let sum: f32 = codes.iter().map(|&code| f32::from(code).abs()).sum();
            largest * sum * scales.fold(0.0, f32::max)
        };
        let bound = 16.0 * EPS * magnitude(codes, act_scales);
        close(what, found, &expected, |_| bound)
    }
}

/// Lavapipe keeps products and sums apart and divides exactly.
fn rounds_like_the_reference(gpu: &Gpu) -> bool {
    gpu.adapter.name.starts_with("llvmpipe")
}

fn signs(random: &mut Random, len: usize) -> Vec<i8> {
    (0..len).map(|_| 2 * random.below(2) as i8 - 1).collect()
}

/// N, K and group: one group, partial tiles, halves of chunks, real shapes.
const GROUP_SHAPES: &[((usize, usize), usize)] = &[
    ((1, 64), 64),
    ((33, 192), 64),
    ((7, 128), 128),
    ((32, 256), 256),
    ((70, 384), 192),
    ((100, 1152), 128),
    ((31, 1344), 64),
    ((40, 4096), 128),
    ((64, 6912), 256),
];

fn group_shapes(gpu: &Gpu, int8: bool) -> Result<(), Failed> {
    for binary in [false, true] {
        for (seed, &(size, group)) in GROUP_SHAPES.iter().enumerate() {
            let mut random = Random::new(300 + seed as u64);
            let groups = Groups::random(&mut random, size, group, binary);
            // One token and many take turns: each is compiled for every K and group.
            let m = if (seed % 2 == 0) == binary { 1 } else { seed + 2 };
            let what = format!("{size:?} group {group} binary {binary} M {m} seed {seed}");
            multiply_groups(gpu, &groups, &mut random, m, int8, &what)?;
        }
    }
    Ok(())
}

fn multiply_groups(
    gpu: &Gpu,
    groups: &Groups,
    random: &mut Random,
    m: usize,
    int8: bool,
    what: &str,
) -> Result<(), Failed> {
    let k = groups.shape.k();
    if int8 {
        let codes = random.codes(m * k);
        let act_scales = random.floats(m * groups.groups(), 0.1);
        let input = GroupInput::Int8 { codes: &codes, act_scales: &act_scales };
        let found = self_test::multiply_groups(gpu, &groups.matrix(), input, m)?;
        groups.judge_int8(gpu, &format!("group_gemv_int8 {what}"), &found, (&codes, &act_scales))
    } else {
        let x = random.floats(m * k, 3.0);
        let input = GroupInput::Float(&x);
        let found = self_test::multiply_groups(gpu, &groups.matrix(), input, m)?;
        groups.judge_float(&format!("group_gemv {what}"), &found, &x)
    }
}

fn group_extremes(gpu: &Gpu, int8: bool) -> Result<(), Failed> {
    let mut random = Random::new(41);
    for binary in [false, true] {
        for weight in [-1i8, 0, 1] {
            if binary && weight == 0 {
                continue;
            }
            let mut groups = Groups::random(&mut random, (33, 640), 128, binary);
            groups.trits.fill(weight);
            for value in [-128i8, 0, 127] {
                let codes = vec![value; 640];
                let x: Vec<f32> = codes.iter().map(|&code| f32::from(code)).collect();
                let act_scales = [1e-5, 0.5, 1.0, 2.0, 0.25];
                let what = format!("all {weight} × all {value}, binary {binary}");
                if int8 {
                    let input = GroupInput::Int8 { codes: &codes, act_scales: &act_scales };
                    let found = self_test::multiply_groups(gpu, &groups.matrix(), input, 1)?;
                    groups.judge_int8(gpu, &what, &found, (&codes, &act_scales))?;
                } else {
                    let input = GroupInput::Float(&x);
                    let found = self_test::multiply_groups(gpu, &groups.matrix(), input, 1)?;
                    groups.judge_float(&what, &found, &x)?;
                }
            }
        }
    }
    Ok(())
}

/// NaN and infinity reach the rows whose weight there is not 0, and only those.
fn group_non_finite(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(43);
    for (binary, value) in
        [(false, f32::NAN), (false, f32::INFINITY), (true, f32::NEG_INFINITY), (true, f32::NAN)]
    {
        let mut groups = Groups::random(&mut random, (40, 256), 128, binary);
        groups.scales.iter_mut().for_each(|bits| *bits = 0x3c00);
        for m in [1, 3] {
            let mut x = random.floats(m * 256, 1.0);
            x[(m - 1) * 256 + 77] = value;
            let input = GroupInput::Float(&x);
            let found = self_test::multiply_groups(gpu, &groups.matrix(), input, m)?;
            for (n, (row, _)) in groups.rows().enumerate() {
                let found = found[(m - 1) * 40 + n];
                let expected = match row[77] {
                    0 => found.is_finite(),
                    _ if value.is_nan() => found.is_nan(),
                    weight => found == f32::from(weight) * value,
                };
                if !expected {
                    let weight = row[77];
                    return Err(format!("weight {weight} × {value}: found {found}").into());
                }
            }
        }
    }
    Ok(())
}

/// The judge must object when a single weight is wrong.
fn group_corrupted(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(47);
    for int8 in [false, true] {
        let groups = Groups::random(&mut random, (70, 384), 128, true);
        let mut wrong = Groups { trits: groups.trits.clone(), ..groups };
        wrong.scales.iter_mut().for_each(|bits| *bits = 0x3c00);
        let right = Groups { scales: wrong.scales.clone(), trits: wrong.trits.clone(), ..wrong };
        wrong.trits[41 * 384 + 222] *= -1;
        let codes = vec![100i8; 384];
        let x = vec![100.0f32; 384];
        let caught = if int8 {
            let input = GroupInput::Int8 { codes: &codes, act_scales: &[1.0; 3] };
            let found = self_test::multiply_groups(gpu, &wrong.matrix(), input, 1)?;
            right.judge_int8(gpu, "corrupted", &found, (&codes, &[1.0; 3]))
        } else {
            let input = GroupInput::Float(&x);
            let found = self_test::multiply_groups(gpu, &wrong.matrix(), input, 1)?;
            right.judge_float("corrupted", &found, &x)
        };
        if caught.is_ok() {
            return Err(format!("a wrong weight went unnoticed, int8 {int8}").into());
        }
    }
    Ok(())
}

/// A matrix in two shards of tiles, the output between guard words; rows past N are not written.
fn group_shards(gpu: &Gpu, int8: bool) -> Result<(), Failed> {
    let mut random = Random::new(53);
    for (binary, m) in [(false, 1), (true, 1), (false, 5), (true, 9)] {
        let groups = Groups::random(&mut random, (150, 320), 64, binary);
        let (n, k, stride) = (150, 320, 163);
        let x = random.floats(m * k, 2.0);
        let codes = random.codes(m * k);
        let act_scales = random.floats(m * 5, 1.0);
        let x_buffer = gpu.upload("x", &x)?;
        let code_words = self_test::encode_codes(Encoding::Planes, &codes, k);
        let code_buffer = gpu.upload("codes", &code_words)?;
        let act_buffer = gpu.upload("act_scale", &act_scales)?;
        let [words, scales] = groups.words();
        let tokens_per_lane = if m == 1 { TokensPerLane::One } else { TokensPerLane::Four };
        let expected = groups.int8(&codes, &act_scales);
        for (base, count) in SHARDS {
            let of_tiles = |words: &[u32]| {
                let len = words.len() / 5;
                gpu.upload("shard", &words[base * len..(base + count) * len])
            };
            let (w, d) = (of_tiles(&words)?, of_tiles(&scales)?);
            let rows = (count * 32).min(n - base * 32);
            // The rows start somewhere in the output.
            let out = RowsOut { base: 13 + base * 32, rows, stride };
            let lens = [m * stride];
            let (call, inputs) = if int8 {
                let call = kernels::group_gemv_int8(groups.for_kernel(), out, tokens_per_lane);
                (call, vec![&w, &d, &code_buffer, &act_buffer])
            } else {
                let call = kernels::group_gemv(groups.for_kernel(), out, tokens_per_lane, false);
                (call, vec![&w, &d, &x_buffer])
            };
            let y = as_f32(&run_guarded(gpu, &call, tokens(m), &inputs, &lens)?[0]);
            let what = format!("{} shard {base} M {m} binary {binary}", call.kernel.name);
            for token in 0..m {
                let all = &y[token * stride..][..stride];
                let mine = out.base..out.base + rows;
                let untouched = f32::from_bits(0xDEAD_BEEF);
                let others = (0..stride).filter(|row| !mine.contains(row));
                if others.map(|row| all[row]).any(|value| value != untouched) {
                    return Err(format!("{what}: another row was written").into());
                }
                for (at, row) in mine.enumerate() {
                    let (row, found) = (all[row], base * 32 + at);
                    let (trits, d) = groups.rows().nth(found).expect("a row");
                    let x = &x[token * k..][..k];
                    let (expected, bound) = if int8 {
                        let expected = expected[token * n + found];
                        (expected, if rounds_like_the_reference(gpu) { 0.0 } else { 1e-2 })
                    } else {
                        (group_dot(trits, &d, x), bound(trits, &d, x))
                    };
                    close(&what, &[row], &[expected], |_| bound)?;
                }
            }
        }
    }
    Ok(())
}

fn group_embedding(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(59);
    for binary in [false, true] {
        for (size, group) in [((1, 64), 64), ((100, 320), 64), ((77, 512), 128)] {
            let groups = Groups::random(&mut random, size, group, binary);
            let (n, k) = size;
            let [words, scales] = groups.words();
            let ids: Vec<u32> = (0..5).map(|_| random.below(n) as u32).collect();
            let token_buffer = gpu.upload("tokens", &ids)?;
            let all: Vec<_> = groups.rows().collect();
            let tiles = n.div_ceil(32);
            for tile in 0..tiles {
                let of_tile = |words: &[u32]| {
                    let len = words.len() / tiles;
                    gpu.upload("shard", &words[tile * len..][..len])
                };
                let (w, d) = (of_tile(&words)?, of_tile(&scales)?);
                let rows = 32.min(n - tile * 32);
                let call = kernels::group_embedding(groups.for_kernel(), tile * 32, rows);
                let inputs = [&token_buffer, &w, &d];
                let out = run_guarded(gpu, &call, tokens(5), &inputs, &[5 * k])?.remove(0);
                let out = as_f32(&out);
                for (m, &id) in ids.iter().enumerate() {
                    let found = &out[m * k..][..k];
                    let what = format!("group_embedding {size:?} binary {binary} token {m}");
                    if id as usize / 32 != tile {
                        same(&what, found, &vec![f32::from_bits(0xDEAD_BEEF); k])?;
                        continue;
                    }
                    let (trits, d) = &all[id as usize];
                    let weights = trits.iter().enumerate();
                    let expected = weights.map(|(k, &trit)| d[k / group] * f32::from(trit));
                    same(&what, found, &expected.collect::<Vec<_>>())?;
                }
            }
        }
    }
    Ok(())
}

fn quantize_groups(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(61);
    for (k, group, m) in [(64, 64, 1), (384, 128, 3), (512, 256, 2), (576, 192, 2), (2560, 128, 1)]
    {
        let mut x = random.floats(m * k, 3.0);
        // A group of zeros, one below the floor.
        x[..64].fill(0.0);
        x[k - 64..k].iter_mut().for_each(|value| *value *= 1e-7);
        let inputs = [&gpu.upload("x", &x)?];
        let call = kernels::quantize_absmax_groups(k, group);
        let lens = [m * k / 4, m * k / group];
        let out = run_guarded(gpu, &call, tokens(m), &inputs, &lens)?;
        let act_scales = as_f32(&out[1]);
        for (token, x) in x.chunks_exact(k).enumerate() {
            let (expected, scales) = quantize_absmax_groups(x, group);
            let words = &out[0][token * k / 4..][..k / 4];
            let found = self_test::decode_codes(Encoding::Planes, words, k);
            let act_scales = &act_scales[token * k / group..][..k / group];
            let what = format!("quantize_absmax_groups K {k} group {group} token {token}");
            close(&what, act_scales, &scales, |at| 2.5 * EPS * scales[at])?;
            if rounds_like_the_reference(gpu) {
                same(&what, act_scales, &scales)?;
                same(&what, &found, &expected)?;
            }
            let far = |(a, b): (&i8, &i8)| (i32::from(*a) - i32::from(*b)).abs() > 1;
            if found.iter().zip(&expected).any(far) {
                return Err(format!("{what}: a code is more than one step off").into());
            }
        }
    }
    let mut x = vec![1.0f32; 128];
    x[3] = f32::NAN;
    let call = kernels::quantize_absmax_groups(128, 64);
    let out = run_guarded(gpu, &call, tokens(1), &[&gpu.upload("x", &x)?], &[32, 2])?;
    let scales = as_f32(&out[1]);
    if !scales[0].is_nan() || !scales[1].is_finite() {
        return Err(format!("NaN was hidden: {scales:?}").into());
    }
    Ok(())
}

fn head_norm(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(67);
    for heads in [
        Heads { query: 4, kv: 2, dim: 128 },
        Heads { query: 3, kv: 1, dim: 100 },
        Heads { query: 2, kv: 2, dim: 256 },
        Heads { query: 5, kv: 1, dim: 96 },
        Heads { query: 1, kv: 1, dim: 2 },
    ] {
        let m = 3;
        let (query_size, kv_size) = (heads.query * heads.dim, heads.kv * heads.dim);
        let n = query_size + 2 * kv_size;
        let sums = Sums::random(&mut random, m, n);
        let norms = [random.floats(heads.dim, 2.0), random.floats(heads.dim, 2.0)];
        let rows: Vec<f32> = (0..m).flat_map(|token| sums.row(token)).collect();
        let mut padded = rows.chunks_exact(n).collect::<Vec<_>>().concat();
        padded = padded.chunks_exact(n).flat_map(|row| pad(row, padded_rows(n))).collect();
        for float in [false, true] {
            let acc =
                if float { gpu.upload("acc", &padded)? } else { gpu.upload("acc", &sums.acc)? };
            let inputs = [
                &acc,
                &gpu.upload("weight_scale", &sums.weight_scale)?,
                &gpu.upload("act_scale", &sums.act_scale)?,
                &gpu.upload("norm", &norms[0])?,
                &gpu.upload("norm", &norms[1])?,
            ];
            let linear = if float { LinearRows::floats(n) } else { LinearRows::sums(n) };
            let call = kernels::head_norm(heads, 1e-6, &linear);
            let lens = [m * padded_rows(n)];
            let out = as_f32(&run_guarded(gpu, &call, tokens(m), &inputs, &lens)?[0]);
            for (token, row) in rows.chunks_exact(n).enumerate() {
                let mut expected = row.to_vec();
                for (h, head) in expected.chunks_exact_mut(heads.dim).enumerate() {
                    if h < heads.query + heads.kv {
                        let norm = &norms[usize::from(h >= heads.query)];
                        let normed = cpu_ref::rmsnorm::rmsnorm(head, norm, 1e-6);
                        head.copy_from_slice(&normed);
                    }
                }
                let found = &out[token * padded_rows(n)..][..n];
                let what = format!("head_norm {heads:?} float {float} token {token}");
                if rounds_like_the_reference(gpu) {
                    same(&what, found, &expected)?;
                }
                close(&what, found, &expected, |at| 16.0 * EPS * expected[at].abs())?;
            }
        }
    }
    Ok(())
}

fn pad(row: &[f32], len: usize) -> Vec<f32> {
    let mut row = row.to_vec();
    row.resize(len, f32::NAN);
    row
}

/// Rows of three runs with activation scales of their own, one of them f32; none a whole tile.
fn runs_of_rows(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(71);
    let (m, stride) = (2, 64);
    let runs = vec![(40, false), (33, true), (7, false)];
    let rows = LinearRows { runs: runs.clone(), act_stride: stride, order: RowOrder::Natural };
    let n = 80;
    let hidden = random.floats(m * n, 1.0);
    let mut acc = vec![0u32; m * rows.padded()];
    let mut weight_scale = vec![f32::NAN; rows.padded()];
    let act_scale = random.floats(3 * stride, 1.0);
    let mut expected = hidden.clone();
    for token in 0..m {
        let mut row = 0;
        for (run, &(len, float)) in runs.iter().enumerate() {
            for i in 0..len {
                let at = rows.first(run) + i;
                let sum = random.below(1000) as i32 - 500;
                let value = if float {
                    acc[token * rows.padded() + at] = (sum as f32).to_bits();
                    sum as f32
                } else {
                    weight_scale[at] = 0.25 + i as f32;
                    acc[token * rows.padded() + at] = sum as u32;
                    sum as f32 * (weight_scale[at] * act_scale[run * stride + token])
                };
                expected[token * n + row] += value;
                row += 1;
            }
        }
    }
    let inputs = [
        &gpu.upload("hidden", &hidden)?,
        &gpu.upload("acc", &acc)?,
        &gpu.upload("weight_scale", &weight_scale)?,
        &gpu.upload("act_scale", &act_scale)?,
    ];
    let call = kernels::residual_add(n, &rows);
    let out = as_f32(&run_guarded(gpu, &call, tokens(m), &inputs, &[m * n])?[0]);
    close("runs_of_rows", &out, &expected, |at| 4.0 * EPS * (1.0 + expected[at].abs()))
}

fn hadamard(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(73);
    for (k, block, m) in [(1, 1, 1), (2, 2, 1), (96, 32, 3), (2560, 512, 2), (8192, 4096, 2)] {
        let x = random.floats(m * k, 3.0);
        let signs: Vec<f32> = signs(&mut random, k).into_iter().map(f32::from).collect();
        let inputs = [&gpu.upload("x", &x)?, &gpu.upload("signs", &signs)?];
        for (rotate, twin) in [
            (Rotate::Input, cpu_ref::hadamard::rotate as fn(&[f32], &[f32], usize) -> Vec<f32>),
            (Rotate::Back, cpu_ref::hadamard::rotate_back),
            (Rotate::HeadInput, cpu_ref::hadamard::rotate),
        ] {
            // The head's input differs in which rows there are, and large blocks take long to compile.
            if rotate == Rotate::HeadInput && block > 32 {
                continue;
            }
            let call = kernels::hadamard(k, block, rotate);
            let params = PassParams { n_logit_rows: m as u32, ..tokens(m) };
            let out = as_f32(&run_guarded(gpu, &call, params, &inputs, &[m * k])?[0]);
            let expected: Vec<f32> =
                x.chunks_exact(k).flat_map(|x| twin(x, &signs, block)).collect();
            same(&format!("hadamard {rotate:?} K {k} block {block}"), &out, &expected)?;
        }
    }
    Ok(())
}

fn codes_embedding_and_lm_head(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(79);
    for (group, has_min) in [(16, false), (32, false), (32, true), (16, true)] {
        for (at, (n, k)) in [(1, 32), (50, 96), (300, 256)].into_iter().enumerate() {
            let tile = LogitTile::ALL[1 + at % 2];
            let codes = random.codes(n * k);
            let scale = random.floats(n * k / group, 0.01);
            let min = if has_min { random.floats(n * k / group, 0.5) } else { Vec::new() };
            let table = Codes { group, codes, scale, min };
            let words: Vec<u32> = table.codes.chunks_exact(4).map(code_word).collect();
            let shape = MatShape::new(n, k)?;
            // The first row of a shard is a constant of the kernels: the others are whole.
            let split = if n == 50 { n / 2 } else { 0 };
            let ids: Vec<u32> = (0..4).map(|_| random.below(n) as u32).collect();
            let x = random.floats(2 * k, 2.0);
            let token_buffer = gpu.upload("tokens", &ids)?;
            let x_buffer = gpu.upload("x", &x)?;
            let format = DenseFormat::Codes { group, has_min };
            for (base, rows) in [(0, split), (split, n - split)] {
                if rows == 0 {
                    continue;
                }
                let part = |all: &[f32]| -> Vec<f32> {
                    all.get(base * k / group..(base + rows) * k / group).unwrap_or(&[0.0]).to_vec()
                };
                let units = gpu.upload("table", &words[base * k / 4..(base + rows) * k / 4])?;
                let scale = gpu.upload("scale", &part(&table.scale))?;
                let min = gpu.upload("min", &part(&table.min))?;
                let shard = DenseShard { format, k, base, rows };
                let values = Table::new(shape, TableData::Codes(table.clone()));
                let row = |n: usize| {
                    let mut row = vec![0.0; k];
                    values.row(n, &mut row).map(|()| row)
                };
                let what = format!("codes {group} min {has_min} {n}×{k}");
                let inputs = [&token_buffer, &units, &scale, &min];
                let call = kernels::embedding(shard);
                let out = run_guarded(gpu, &call, tokens(4), &inputs, &[4 * k])?.remove(0);
                let mine = base..base + rows;
                for (m, &id) in ids.iter().enumerate() {
                    if mine.contains(&(id as usize)) {
                        let expected = row(id as usize)?;
                        let found = as_f32(&out[m * k..][..k]);
                        // A fused product saves one rounding of at most 1.27 + 0.5.
                        close(&format!("embedding {what}"), &found, &expected, |_| 2.0 * EPS)?;
                    }
                }
                let inputs = [&x_buffer, &units, &scale, &min];
                let out = lm_head_rows(gpu, shard, n, &inputs, 2, tile)?;
                for (m, x) in x.chunks_exact(k).enumerate() {
                    for n_row in mine.clone() {
                        let row = row(n_row)?;
                        let expected = cpu_ref::lm_head::logit(&row, x);
                        let magnitude: f32 = row.iter().zip(x).map(|(a, b)| (a * b).abs()).sum();
                        let bound = (k as f32 * EPS / 2.0) * (magnitude + 1.0);
                        let found = f32::from_bits(out[m * n + n_row]);
                        close(&format!("lm_head {what}"), &[found], &[expected], |_| bound)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn code_word(codes: &[i8]) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| codes[i] as u8))
}

/// A matrix, its input and what its rows are in the reference.
struct FusedCase {
    matrix: TernaryMatrix,
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    y: Vec<f32>,
    /// What one step of an int8 code changes in a row.
    step: f32,
}

const FUSED_EPS: f32 = 1e-5;

impl FusedCase {
    fn new(random: &mut Random, (n, k): (usize, usize), has_norm: bool) -> Self {
        let x = random.floats(k, 3.0);
        let norm = has_norm.then(|| random.floats(k, 2.0));
        Self::with_input(random, (n, k), x, norm)
    }

    fn with_input(
        random: &mut Random,
        (n, k): (usize, usize),
        x: Vec<f32>,
        norm: Option<Vec<f32>>,
    ) -> Self {
        let (trits, scale) = (random.trits(n * k), 0.01 + random.floats(1, 1.0)[0].abs());
        let normed = match &norm {
            Some(norm) => cpu_ref::rmsnorm::rmsnorm(&x, norm, FUSED_EPS),
            None => x.clone(),
        };
        let quantized = cpu_ref::quantize_absmax::quantize_absmax(&normed);
        let acc = cpu_ref::gemv::gemv(&trits, &quantized.codes);
        let y = cpu_ref::gemv::dequantize(&acc, &vec![scale; n], quantized.act_scale);
        let shape = MatShape::new(n, k).expect("small");
        let matrix = TernaryMatrix::from_trits(shape, trits, scale);
        Self { matrix, x, norm, y, step: scale * quantized.act_scale }
    }

    fn fused(&self, plan: GemvPlan, tiles: (usize, usize)) -> Fused {
        let norm = self.norm.as_ref().map(|_| FUSED_EPS);
        Fused { plan, k: self.x.len(), norm, tiles }
    }

    fn norm_weight(&self) -> Vec<f32> {
        self.norm.clone().unwrap_or_else(|| vec![f32::NAN; 4])
    }
}

/// Matrices that fit a binding.
fn one_shard(
    gpu: &Gpu,
    variant: Variant,
    parts: &[&TernaryMatrix],
    order: RowOrder,
) -> Result<self_test::FusedShard, Failed> {
    let mut shards = self_test::fused_matrix(gpu, variant.into(), parts, order)?;
    match shards.len() {
        1 => Ok(shards.remove(0)),
        n => Err(format!("{n} shards").into()),
    }
}

/// Equal bits where the device rounds like the reference; elsewhere a code may move by a step.
fn judge_fused(
    gpu: &Gpu,
    what: &str,
    found: &[f32],
    expected: &[f32],
    bound: impl Fn(usize) -> f32,
) -> Result<(), Failed> {
    if rounds_like_the_reference(gpu) {
        same(what, found, expected)?;
    }
    close(what, found, expected, bound)
}

/// N and K; 2B4T's, and what falls between tiles and chunks.
const FUSED_SHAPES: &[(usize, usize)] =
    &[(1, 1), (32, 64), (33, 65), (96, 512), (7, 577), (320, 2560), (64, 6912)];

/// Fused shapes, the longest K and 14,000 with the plans that they are tried with: the plans take
/// turns, two a shape, because each driver compiles each of them for each K; one a shape where all have
/// had their turns by then.
fn fused_cases(gpu: &Gpu, variant: Variant) -> Vec<((usize, usize), Vec<GemvPlan>)> {
    let all = plans(gpu, variant);
    // 7 and the number of plans, 15 or 3, have no common factor.
    let mut turns = (0..).map(|turn| all[7 * turn % all.len()]);
    let each = if all.len() < FUSED_SHAPES.len() { 1 } else { 2 };
    let mut cases: Vec<_> = FUSED_SHAPES
        .iter()
        .map(|&shape| (shape, turns.by_ref().take(each).collect::<Vec<_>>()))
        .collect();
    for plan in [GemvPlan::from(variant), all[all.len() - 1]] {
        cases.push(((40, plan.max_fused_k()), vec![plan]));
    }
    // With two a shape, the only plan of 15 that has had no turn.
    let plan = turns.next().expect("turns without end");
    cases.push(((40, plan.max_fused_k().min(14_000)), vec![plan]));
    cases
}

fn fused_residual(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let mut random = Random::new(81);
    for (index, ((n, k), plans)) in fused_cases(gpu, variant).into_iter().enumerate() {
        let case = FusedCase::new(&mut random, (n, k), index % 2 == 0);
        let hidden = random.floats(n, 3.0);
        let (tiles, words, rows) = one_shard(gpu, variant, &[&case.matrix], RowOrder::Natural)?;
        let inputs = [
            &words,
            &gpu.upload("x", &case.x)?,
            &gpu.upload("norm", &case.norm_weight())?,
            &rows,
            &gpu.upload("hidden", &hidden)?,
        ];
        let expected: Vec<f32> = hidden.iter().zip(&case.y).map(|(h, y)| h + y).collect();
        let bound = |at: usize| 4.0 * case.step + 8.0 * EPS * (hidden[at].abs() + case.y[at].abs());
        for plan in plans {
            let call = case.fused(plan, tiles).residual(n);
            let out = as_f32(&run_guarded(gpu, &call, tokens(1), &inputs, &[n])?[0]);
            let what = format!("{} {} {n} x {k}", call.kernel.name, label(plan));
            judge_fused(gpu, &what, &out, &expected, bound)?;
        }
    }
    // NaN and infinity reach the result.
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = random.floats(100, 1.0);
        x[77] = bad;
        let norm = Some(vec![1.0; 100]);
        let case = FusedCase::with_input(&mut random, (5, 100), x, norm);
        let (tiles, words, rows) = one_shard(gpu, variant, &[&case.matrix], RowOrder::Natural)?;
        let inputs = [
            &words,
            &gpu.upload("x", &case.x)?,
            &gpu.upload("norm", &case.norm_weight())?,
            &rows,
            &gpu.upload("hidden", &[0.0f32; 5])?,
        ];
        let call = case.fused(variant.into(), tiles).residual(5);
        let out = as_f32(&run_guarded(gpu, &call, tokens(1), &inputs, &[5])?[0]);
        if out.iter().any(|value| value.is_finite()) {
            return Err(format!("{bad} became {out:?}").into());
        }
    }
    Ok(())
}

fn fused_gated(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let mut random = Random::new(82);
    for (index, ((f, k), plans)) in fused_cases(gpu, variant).into_iter().enumerate() {
        let gate = FusedCase::new(&mut random, (f, k), index % 2 == 1);
        let up = FusedCase::with_input(&mut random, (f, k), gate.x.clone(), gate.norm.clone());
        let parts = [&gate.matrix, &up.matrix];
        let (tiles, words, rows) = one_shard(gpu, variant, &parts, RowOrder::GateUp(f))?;
        let inputs =
            [&words, &gpu.upload("x", &gate.x)?, &gpu.upload("norm", &gate.norm_weight())?, &rows];
        for activation in [Activation::Relu2, Activation::Silu] {
            let expected = cpu_ref::mlp::gated_activation(&gate.y, &up.y, activation);
            // A step of a code in either factor; the gate's enters relu² twice.
            let bound = |at: usize| {
                let (g, u) = (gate.y[at].abs() + 4.0 * gate.step, up.y[at].abs() + 4.0 * up.step);
                let slope = if activation == Activation::Relu2 { 2.0 * g } else { 2.0 };
                let of_value = 64.0 * EPS * expected[at].abs();
                slope * 4.0 * gate.step * u + g.max(g * g) * 4.0 * up.step + of_value
            };
            let odd = usize::from(activation == Activation::Silu);
            for &plan in plans.iter().skip(odd).step_by(2) {
                let call = gate.fused(plan, tiles).gated(f, activation);
                let out = as_f32(&run_guarded(gpu, &call, tokens(1), &inputs, &[f])?[0]);
                let what = format!("{} {} {activation:?} {f} x {k}", call.kernel.name, label(plan));
                judge_fused(gpu, &what, &out, &expected, bound)?;
            }
        }
    }
    Ok(())
}

fn fused_qkv(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let mut random = Random::new(83);
    for (index, (heads, k)) in [
        (Heads { query: 4, kv: 2, dim: 128 }, 512),
        (Heads { query: 1, kv: 1, dim: 32 }, 65),
        (Heads { query: 3, kv: 1, dim: 96 }, 288),
        (Heads { query: 2, kv: 1, dim: 256 }, 2560),
    ]
    .into_iter()
    .enumerate()
    {
        let (query_size, kv_size) = (heads.query * heads.dim, heads.kv * heads.dim);
        let query = FusedCase::new(&mut random, (query_size, k), true);
        let of_kv = |random: &mut Random| {
            FusedCase::with_input(random, (kv_size, k), query.x.clone(), query.norm.clone())
        };
        let (key, value) = (of_kv(&mut random), of_kv(&mut random));
        let parts = [&query.matrix, &key.matrix, &value.matrix];
        let (tiles, words, rows) = one_shard(gpu, variant, &parts, RowOrder::Pairs(heads.dim))?;
        let (position, capacity) = (3, 5);
        let frequencies =
            cpu_ref::rope::frequencies(10_000.0, heads.dim, cpu_ref::rope::Scaling::None);
        let angles: Vec<[f32; 2]> = (0..capacity)
            .flat_map(|position| {
                let (cos, sin) = cpu_ref::rope::angles(position, &frequencies);
                cos.into_iter().zip(sin).map(|(cos, sin)| [cos, sin])
            })
            .collect();
        let inputs = [
            &words,
            &gpu.upload("x", &query.x)?,
            &gpu.upload("norm", &query.norm_weight())?,
            &rows,
            &gpu.upload("angles", &angles)?,
        ];
        let (cos, sin) = cpu_ref::rope::angles(position, &frequencies);
        let rotated = |y: &[f32]| {
            let mut y = y.to_vec();
            y.chunks_exact_mut(heads.dim).for_each(|head| cpu_ref::rope::rotate(head, &cos, &sin));
            y
        };
        let expected = [rotated(&query.y), rotated(&key.y), value.y.clone()];
        let all = plans(gpu, variant);
        // Three plans a shape, all of them in turns; with each another format, in block 2 of a shard
        // that has blocks 1 and 2.
        let formats = [KvFormat::F32, KvFormat::F16, KvFormat::Int8];
        for (at, format) in formats.into_iter().enumerate() {
            let plan = all[(3 * index + at) * 7 % all.len()];
            let layout = KvLayout { heads, format };
            let shard = KvShard { layout, base: 1, blocks: 2 };
            let call = query.fused(plan, tiles).qkv(shard);
            let params = PassParams { start: position as u32, block: 2, ..tokens(1) };
            let lens = match format {
                KvFormat::Int8 => [query_size, kv_size, kv_size],
                _ => {
                    let [keys, values, _] = layout.block_words();
                    [query_size, 2 * keys, 2 * values]
                }
            };
            let out = run_guarded(gpu, &call, params, &inputs, &lens)?;
            let found = match format {
                KvFormat::Int8 => [as_f32(&out[0]), as_f32(&out[1]), as_f32(&out[2])],
                _ => {
                    let (keys, values) = cached(layout, [&out[1], &out[2]], 1, position);
                    [as_f32(&out[0]), keys, values]
                }
            };
            for (at, (name, case)) in
                [("query", &query), ("key", &key), ("value", &value)].into_iter().enumerate()
            {
                let what =
                    format!("{} {} {heads:?} {name} {format:?}", call.kernel.name, label(plan));
                let largest = case.y.iter().fold(0.0f32, |max, y| max.max(y.abs()));
                // A half has 11 bits.
                let half = if format == KvFormat::F16 && at > 0 { 1.0 / 2048.0 } else { 0.0 };
                let bound = |_| 8.0 * case.step + (16.0 * EPS + half) * largest;
                if format == KvFormat::F16 && at > 0 {
                    close(&what, &found[at], &expected[at], bound)?;
                } else {
                    judge_fused(gpu, &what, &found[at], &expected[at], bound)?;
                }
            }
        }
        if index % 2 == 1 {
            // Half of the shapes are enough for what follows, which is compiled for each.
            continue;
        }
        // A position past the angles, or in a block of another shard, writes no cache.
        let layout = KvLayout { heads, format: KvFormat::F32 };
        let mut call =
            query.fused(variant.into(), tiles).qkv(KvShard { layout, base: 1, blocks: 1 });
        // Less than it says.
        call.weights = WeightsRead::RowOf(1);
        let [keys, values, _] = layout.block_words();
        let lens = [query_size, keys, values];
        for (start, block) in [(capacity as u32, 1), (3, 0), (3, 2)] {
            let params = PassParams { start, block, ..tokens(1) };
            let out = run_guarded(gpu, &call, params, &inputs, &lens)?;
            same("past the cache", &out[1..].concat(), &vec![0xDEAD_BEEF; keys + values])?;
        }
    }
    Ok(())
}

/// Keys and values `[G, D]` of a slot of a block, f32 or f16, of the words of both.
fn cached(
    layout: KvLayout,
    [keys, values]: [&[u32]; 2],
    block: usize,
    slot: usize,
) -> (Vec<f32>, Vec<f32>) {
    let Heads { kv, dim, .. } = layout.heads;
    let number = |words: &[u32], at: usize, d: usize| match layout.format {
        KvFormat::F32 => f32::from_bits(words[at + d]),
        KvFormat::F16 => f16_to_f32((words[at + d / 2] >> (16 * (d % 2))) as u16),
        KvFormat::Int8 => unreachable!("staged"),
    };
    let unit = if layout.format == KvFormat::F32 { 4 } else { 8 };
    let each = || (0..kv).flat_map(|head| (0..dim).map(move |d| (head, d)));
    let key = |(head, d): (usize, usize)| {
        let unit_at = ((block * kv + head) * layout.key_units() + d / unit) * 64 + slot;
        number(keys, 4 * unit_at, d % unit)
    };
    let value = |(head, d): (usize, usize)| {
        number(values, ((block * kv + head) * 64 + slot) * layout.value_words(), d)
    };
    (each().map(key).collect(), each().map(value).collect())
}

/// The kernels that run unchecked give the same bits with every check.
fn unchecked(gpu: &Gpu, capabilities: Capabilities, variant: Variant) -> Result<(), Failed> {
    let checked = open(capabilities)?.with_runtime_checks();
    let all = plans(gpu, variant);
    // The fewest and the most slices and loads in flight; of few plans, which larger limits add, the most.
    let few = all.len() < FUSED_SHAPES.len();
    for &plan in [&all[0], &all[all.len() - 1]].into_iter().skip(usize::from(few)) {
        let (found, expected) = (decode_outputs(gpu, plan)?, decode_outputs(&checked, plan)?);
        let listed = UNCHECKED.iter().filter(|kernel| {
            // Of the GEMVs and GEMMs, this variant's. Attention: see attention.rs.
            let layout = variant.layout();
            let gemms = [GemmPlan::default(), GemmPlan::FEW].map(|plan| plan.kernel(layout));
            kernel.name.starts_with("fused_")
                || [&[variant.gemv()], gemms.as_slice()].concat().contains(kernel)
        });
        same("kernels", &names(&found), &listed.map(|kernel| kernel.name).collect::<Vec<_>>())?;
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            same(&format!("{name} {} unchecked", label(plan)), found, expected)?;
        }
    }
    Ok(())
}

fn names(outputs: &[(&'static str, Vec<u32>)]) -> Vec<&'static str> {
    outputs.iter().map(|&(name, _)| name).collect()
}

/// What every kernel writes with this plan, in the order of the list, parts of tiles and chunks
/// included.
fn decode_outputs(gpu: &Gpu, plan: GemvPlan) -> Result<Vec<(&'static str, Vec<u32>)>, Failed> {
    let mut random = Random::new(91);
    let (heads, k, f) = (Heads { query: 3, kv: 1, dim: 96 }, 1001, 70);
    let variant = plan.variant;
    let shape = MatShape::new(f, k)?;
    let packed = Packed::pack(variant.layout(), shape, &random.trits(shape.len()));
    let sums = self_test::multiply(gpu, plan.into(), &packed, &random.codes(k), 1)?;
    let mut outputs = vec![(variant.gemv().name, bytemuck::cast_vec(sums))];
    let codes = random.codes(11 * k);
    for kernel in [ManyTokens::Tiled(GemmPlan::default()), ManyTokens::Few(8)] {
        let call = |gemm| kernel.call(gemm);
        let (name, sums) = self_test::multiply_many(gpu, &packed, &codes, call)?;
        outputs.push((name, bytemuck::cast_vec(sums)));
    }
    let case = FusedCase::new(&mut random, (f, k), true);
    let x = gpu.upload("x", &case.x)?;
    let norm = gpu.upload("norm", &case.norm_weight())?;
    let pack = |parts: &[&TernaryMatrix], order| {
        self_test::fused_matrix(gpu, plan, parts, order).map(|mut shards| shards.remove(0))
    };
    let qkv = TernaryMatrix::from_trits(MatShape::new(480, k)?, random.trits(480 * k), 0.5);
    let (tiles, words, rows) = pack(&[&qkv], RowOrder::Pairs(heads.dim))?;
    let angles = gpu.upload("angles", &random.floats(4 * heads.dim, 1.0))?;
    let layout = KvLayout { heads, format: KvFormat::F16 };
    let call = case.fused(plan, tiles).qkv(KvShard::whole(layout));
    let params = PassParams { start: 2, ..tokens(1) };
    let [keys, values, _] = layout.block_words();
    let lens = [288, keys, values];
    let out = run_guarded(gpu, &call, params, &[&words, &x, &norm, &rows, &angles], &lens)?;
    outputs.push((call.kernel.name, out.concat()));
    let (tiles, words, rows) = pack(&[&case.matrix, &case.matrix], RowOrder::GateUp(f))?;
    let call = case.fused(plan, tiles).gated(f, Activation::Silu);
    let out = run_guarded(gpu, &call, tokens(1), &[&words, &x, &norm, &rows], &[f])?;
    outputs.push((call.kernel.name, out.concat()));
    let (tiles, words, rows) = pack(&[&case.matrix], RowOrder::Natural)?;
    let hidden = gpu.upload("hidden", &random.floats(f, 1.0))?;
    let call = case.fused(plan, tiles).residual(f);
    let out = run_guarded(gpu, &call, tokens(1), &[&words, &x, &norm, &rows, &hidden], &[f])?;
    outputs.push((call.kernel.name, out.concat()));
    Ok(outputs)
}

/// A buffer one word short of what an unchecked kernel could touch is refused.
fn short_buffer(gpu: &Gpu) -> Result<(), Failed> {
    let heads = Heads { query: 2, kv: 1, dim: 64 };
    let mut calls = Vec::new();
    for layout in [Layout::Planes, Layout::I2] {
        let shape = MatShape::new(256, 128)?;
        let gemm = Gemm { layout, shape, tile_base: 3, tiles: 2, max_tokens: 3 };
        calls.extend([gemm.few(4), gemm.few(8), gemm.tiled(GemmPlan::default())]);
    }
    for variant in Variant::ALL {
        let plan = GemvPlan::from(variant);
        calls.push(kernels::gemv(plan, MatShape::new(32, 128)?, 3, 1));
        let fused = Fused { plan, k: 128, norm: Some(FUSED_EPS), tiles: (2, 2) };
        calls.extend([
            fused.qkv(KvShard::whole(KvLayout { heads, format: KvFormat::F32 })),
            fused.gated(100, Activation::Relu2),
            fused.residual(128),
        ]);
    }
    let shard = KvShard::whole(KvLayout { heads, format: KvFormat::Int8 });
    calls.extend([
        kernels::attention(shard),
        kernels::attention_tile(shard, kernels::TileFor::Gpu, true),
        kernels::attention_blocks(shard),
        kernels::attention_merge(heads),
    ]);
    short_buffers(gpu, &calls)?;
    // An operation is not made of such buffers.
    let short = vec![gpu.storage("short", 1)?; calls[0].words().len()];
    let uniform = gpu.params_buffer();
    let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let short: Vec<_> = short.iter().collect();
        gpu.op(&gpu.pipelines(), &calls[0], &uniform, &short).is_ok()
    }));
    if made.is_ok() { Err("an unchecked kernel was given short buffers".into()) } else { Ok(()) }
}

/// Of each call, each buffer one word too short.
fn short_buffers(gpu: &Gpu, calls: &[Call]) -> Result<(), Failed> {
    for call in calls {
        let all = call.words().iter().map(|&words| gpu.storage("enough", words));
        let all = all.collect::<Result<Vec<_>, _>>()?;
        call.check_lengths(&all.iter().collect::<Vec<_>>())?;
        for (at, &words) in call.words().iter().enumerate().filter(|&(_, &words)| words > 1) {
            let short = gpu.storage("short", words - 1)?;
            let mut buffers: Vec<_> = all.iter().collect();
            buffers[at] = &short;
            if call.check_lengths(&buffers).is_ok() {
                let name = call.kernel.name;
                return Err(format!("{name}: binding {at} of {} words", words - 1).into());
            }
        }
    }
    Ok(())
}
