//! Which plan multiplies which matrix on which adapter.
//!
//! No driver says whether it runs a packed dot product in one instruction or in twenty, so the plans
//! are raced: each step of a decoded token on weights that no cache holds, whole steps against whole
//! steps, within a budget of time. The winners are kept, by adapter, driver and kernels: in a file, or
//! where there are none by whoever hosts the program.
//! Where nothing is measured, a table by vendor decides. A plan that is wrong on an adapter is no
//! candidate there, however fast; and whatever is chosen is checked again before a model runs.

mod cache;
mod defaults;
mod measure;

use std::path::{Path, PathBuf};
use web_time::{Duration, Instant};

use cpu_ref::attention::Heads;
use cpu_ref::layout::TILE_ROWS;
use cpu_ref::mlp::Activation;
use serde::Serialize;

use super::device::{AdapterKind, Cooperative, Gpu};
use super::kernels::{GemmPlan, GemvPlan, RowOrder, Variant, padded_rows};
use crate::backend::Tune;
use crate::config::{Activations, ModelConfig};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::shape::MatShape;
use crate::wait::block_on;
use cache::Place;

pub use cache::{Key, directory, remember, remembered};
#[cfg(feature = "measure")]
pub(crate) use measure::copy_gb_s;

/// Time that a model's first load on an adapter may spend on measuring.
pub const AUTO_BUDGET: Duration = Duration::from_millis(1900);

/// What of it is left for the products of many tokens.
const AUTO_GEMM: Duration = Duration::from_millis(400);

/// The lists of candidates: another value is another entry. [`StepShape::is_legal`] says what goes together.
const VARIANTS: [Variant; 4] = Variant::ALL;
/// See [`GemvPlan::slices`].
const SLICES: [usize; 3] = GemvPlan::SLICES;
/// See [`GemvPlan::rows`].
const ROWS: [usize; 2] = GemvPlan::ROWS;
/// See [`GemvPlan::unroll`].
const UNROLL: [usize; 3] = GemvPlan::UNROLL;
/// See [`GemvPlan::fused`].
const FUSED: [bool; 2] = [true, false];

/// A plan has to be faster than the default by this factor: less is noise.
const MARGIN: f64 = 1.03;

const NO_DIRECTORY: &str = "there is no home directory; STERNA_CACHE may name a directory";

/// A matrix step of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Query, key and value.
    Qkv,
    /// Output of the attention.
    O,
    /// Gate and up.
    GateUp,
    /// Down.
    Down,
}

impl Step {
    /// Every step, in the order of a layer.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// As it is written in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::O => "o",
            Self::GateUp => "gate_up",
            Self::Down => "down",
        }
    }
}

/// A step as far as its speed depends on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepShape {
    /// Which one.
    pub step: Step,
    /// `[N, K]` of its matrices together.
    pub shape: MatShape,
    order: RowOrder,
    /// Whether a norm comes before it.
    norm: bool,
    /// Whether there is a fused kernel for it, if K is not too large.
    can_fuse: bool,
    heads: Heads,
    act: Activation,
}

impl StepShape {
    /// The steps of a model whose matrices have one scale each; `None` for one with scales of groups,
    /// whose kernels have one plan.
    ///
    /// # Errors
    /// [`Error::Dimension`] if a matrix is too large.
    pub fn of(config: &ModelConfig) -> Result<Option<[Self; 4]>> {
        if config.activations != Activations::Int8Token {
            return Ok(None);
        }
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let (heads, dim) = (config.heads(), config.head_dim);
        let has_sub_norms = config.has_sub_norms();
        let pairs = match dim.is_multiple_of(TILE_ROWS) && !config.has_head_norms() {
            true => RowOrder::Pairs(dim),
            false => RowOrder::Natural,
        };
        let of = |step, n, k, order, norm| {
            let can_fuse = config.linear_norm_eps.is_none()
                && (step != Step::Qkv || order != RowOrder::Natural);
            let shape = MatShape::new(n, k)?;
            Ok::<_, Error>(Self {
                step,
                shape,
                order,
                norm,
                can_fuse,
                heads,
                act: config.hidden_act,
            })
        };
        let qkv = config.query_size() + 2 * config.kv_size();
        let gate_up = RowOrder::GateUp(intermediate);
        Ok(Some([
            of(Step::Qkv, qkv, hidden, pairs, true)?,
            of(Step::O, hidden, config.query_size(), RowOrder::Natural, has_sub_norms)?,
            of(Step::GateUp, 2 * intermediate, hidden, gate_up, true)?,
            of(Step::Down, hidden, intermediate, RowOrder::Natural, has_sub_norms)?,
        ]))
    }

    /// Rows as the kernels see them, padding of gate and up included.
    fn rows(&self) -> usize {
        self.order.rows(self.shape.n())
    }

    /// Tiles of its matrices.
    fn tiles(&self) -> usize {
        padded_rows(self.rows()) / TILE_ROWS
    }

    /// Everything that its speed depends on, in words: the name under which a winner is kept.
    fn id(&self) -> String {
        let mut id = format!("{} {}x{}", self.step.name(), self.shape.n(), self.shape.k());
        match self.step {
            Step::Qkv => {
                let Heads { query, kv, dim } = self.heads;
                id += &format!(" heads {query}/{kv}x{dim}");
            }
            Step::GateUp => {
                id += match self.act {
                    Activation::Relu2 => " relu2",
                    Activation::Silu => " silu",
                }
            }
            Step::O | Step::Down => {}
        }
        id += if self.norm { " norm" } else { "" };
        id += if self.can_fuse { "" } else { " split" };
        id
    }

    /// What runs where nothing was measured: the adapter's default, if this step can be fused.
    fn default_plan(&self, plan: GemvPlan) -> GemvPlan {
        let fused = plan.fused && self.can_fuse && self.shape.k() <= plan.max_fused_k();
        GemvPlan { fused, ..plan }
    }

    /// Whether there is a kernel that does this step exactly, on an adapter of so many lanes a
    /// workgroup.
    fn is_legal(&self, plan: GemvPlan, lanes: u32) -> bool {
        let k = self.shape.k();
        plan.lanes() <= lanes as usize
            && k <= plan.variant.max_k(plan.slices)
            && (!plan.fused || self.can_fuse && k <= plan.max_fused_k())
    }

    /// The plans that may run this step, the default first.
    fn candidates(&self, default: GemvPlan, lanes: u32) -> Vec<GemvPlan> {
        let others = VARIANTS.into_iter().filter(|&variant| variant != default.variant);
        let mut plans = vec![self.default_plan(default)];
        for variant in [default.variant].into_iter().chain(others) {
            for (fused, slices) in pairs(&FUSED, &SLICES) {
                for (rows, unroll) in pairs(&ROWS, &UNROLL) {
                    let plan = GemvPlan { variant, slices, rows, unroll, fused };
                    if self.is_legal(plan, lanes) && !plans.contains(&plan) {
                        plans.push(plan);
                    }
                }
            }
        }
        plans
    }
}

/// What an adapter can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    /// Most lanes of a workgroup.
    lanes: u32,
    cooperative: Option<Cooperative>,
}

impl Limits {
    fn of(gpu: &Gpu) -> Self {
        Self { lanes: gpu.lanes(), cooperative: gpu.cooperative() }
    }
}

/// A product of many tokens: the largest matrix of a model's layers, on which the tiles of a layout are
/// raced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GemmShape {
    layout: Layout,
    /// `[N, K]`, padding of gate and up included.
    shape: MatShape,
}

impl GemmShape {
    /// Of the steps of a model.
    fn of(steps: &[StepShape; 4], layout: Layout) -> Result<Self> {
        let step = steps.iter().max_by_key(|step| step.shape.len()).expect("four steps");
        Ok(Self { layout, shape: MatShape::new(padded_rows(step.rows()), step.shape.k())? })
    }

    /// The name under which a winner is kept.
    fn id(&self) -> String {
        let kernel = GemmPlan::default().kernel(self.layout).name;
        format!("{kernel} {}x{}", self.shape.n(), self.shape.k())
    }

    /// The plans that may run it: the default first, then those with cooperative matrices, which are
    /// likely to be faster.
    fn candidates(&self, default: GemmPlan, limits: Limits) -> Vec<GemmPlan> {
        let matrices = limits.cooperative.filter(|_| self.layout == Layout::I2);
        let cooperative = matrices.into_iter().flat_map(GemmPlan::all_of);
        let others = cooperative.chain(GemmPlan::all()).filter(|&plan| plan != default);
        let mut plans = vec![default];
        plans.extend(others.filter(|plan| plan.lanes() <= limits.lanes as usize));
        plans
    }
}

/// Every pair of two lists' values.
fn pairs<A: Copy, B: Copy>(first: &[A], second: &[B]) -> impl Iterator<Item = (A, B)> {
    first.iter().flat_map(|&a| second.iter().map(move |&b| (a, b)))
}

/// What came of a candidate.
#[derive(Debug, Clone, PartialEq)]
enum Outcome {
    /// Of one step.
    Time(Duration),
    /// Why it is not used: wrong results, or the driver's refusal.
    Refused(String),
    /// It has not had its turn.
    Waiting,
    /// It had its turn, and too little time.
    NotReached,
}

/// A step's candidates and the fastest of them.
#[derive(Debug, Clone, PartialEq)]
struct Race {
    step: StepShape,
    /// The default first.
    candidates: Vec<(GemvPlan, Outcome)>,
}

/// The default, unless it was refused, or another is faster by more than the margin; with the default
/// not measured, nothing is known.
fn winner<P: Copy>(candidates: &[(P, Outcome)]) -> P {
    let (default, outcome) = &candidates[0];
    let bar = match outcome {
        Outcome::Time(time) => time.as_secs_f64() / MARGIN,
        Outcome::Refused(_) => f64::INFINITY,
        Outcome::Waiting | Outcome::NotReached => return *default,
    };
    let timed = candidates.iter().filter_map(|(plan, outcome)| match outcome {
        Outcome::Time(time) if time.as_secs_f64() < bar => Some((time, *plan)),
        _ => None,
    });
    timed.min_by_key(|(time, _)| **time).map_or(*default, |(_, plan)| plan)
}

/// Whether a second race would find nothing new.
fn is_settled<P>(candidates: &[(P, Outcome)]) -> bool {
    let mut outcomes = candidates.iter().map(|(_, outcome)| outcome);
    outcomes.clone().any(|outcome| matches!(outcome, Outcome::Time(_)))
        || outcomes.all(|outcome| matches!(outcome, Outcome::Refused(_)))
}

impl Race {
    /// See [`winner`].
    fn winner(&self) -> GemvPlan {
        winner(&self.candidates)
    }

    /// Whose turn it is: the default's; then each variant's as it runs by default, fused and split; then
    /// of the others the one that has most in common with the fastest so far.
    fn next(&self) -> Option<usize> {
        let fastest = self.winner();
        let merit = |plan: GemvPlan| {
            let is_tuned = differences(plan, plan.variant.into()) > usize::from(!plan.fused);
            if is_tuned { (true, differences(plan, fastest)) } else { (false, 0) }
        };
        let waiting = self.candidates.iter().enumerate();
        let waiting = waiting.filter(|(_, (_, outcome))| *outcome == Outcome::Waiting);
        waiting.min_by_key(|(at, (plan, _))| (merit(*plan), *at)).map(|(at, _)| at)
    }
}

/// The tiles of a product of many tokens and the fastest of them.
#[derive(Debug, Clone, PartialEq)]
struct GemmRace {
    product: GemmShape,
    /// The default first.
    candidates: Vec<(GemmPlan, Outcome)>,
}

/// In how many of its values a plan is another.
fn differences(a: GemvPlan, b: GemvPlan) -> usize {
    let differ = [
        a.variant != b.variant,
        a.slices != b.slices,
        a.rows != b.rows,
        a.unroll != b.unroll,
        a.fused != b.fused,
    ];
    differ.into_iter().filter(|&differ| differ).count()
}

/// Where a race is run: an adapter, or a test's idea of one.
trait Track {
    /// Since the budget began.
    fn elapsed(&self) -> Duration;
    /// Whether a plan is exact here.
    async fn check(&mut self, plan: GemvPlan) -> Result<()>;
    /// The time of one step; `None` if there is not enough left until `end`.
    async fn measure(
        &mut self,
        step: &StepShape,
        plan: GemvPlan,
        end: Duration,
    ) -> Result<Option<Duration>>;
    /// Whether the kernels of many tokens of a layout are exact here.
    async fn check_gemm(&mut self, layout: Layout, plan: GemmPlan) -> Result<()>;
    /// The time of one product of [`Self::gemm_tokens`]; `None` if there is not enough left until
    /// `end`.
    async fn measure_gemm(
        &mut self,
        product: &GemmShape,
        plan: GemmPlan,
        end: Duration,
    ) -> Result<Option<Duration>>;
    /// Tokens of a product that is measured.
    fn gemm_tokens(&self) -> usize;
}

/// Races the candidates of all steps until the budget ends: one of each step, then another of each,
/// and so on, in the order of [`Race::next`]; those who beat the default do it once more.
///
/// A candidate that fails is refused, not the race: the driver may reject one kernel only.
async fn race(
    steps: &[StepShape],
    default: GemvPlan,
    lanes: u32,
    budget: Duration,
    track: &mut impl Track,
) -> Vec<Race> {
    let start = |step: &StepShape| {
        let plans = step.candidates(default, lanes).into_iter();
        Race { step: *step, candidates: plans.map(|plan| (plan, Outcome::Waiting)).collect() }
    };
    let mut races: Vec<Race> = steps.iter().map(start).collect();
    let mut longest = Duration::ZERO;
    let mut is_over = false;
    while !is_over {
        is_over = true;
        for race in &mut races {
            let Some(at) = race.next() else { continue };
            let begin = track.elapsed();
            // What took so long before may take as long again.
            if begin + longest >= budget {
                return races;
            }
            is_over = false;
            let plan = race.candidates[at].0;
            race.candidates[at].1 = run(&race.step, plan, budget, track).await;
            longest = longest.max(track.elapsed().saturating_sub(begin));
        }
    }
    for race in &mut races {
        let (default, winner) = (race.candidates[0].0, race.winner());
        if winner == default {
            continue;
        }
        for (plan, outcome) in &mut race.candidates {
            let again = [default, winner].contains(plan) && track.elapsed() + longest < budget;
            if let (true, Outcome::Time(time)) = (again, &mut *outcome)
                && let Outcome::Time(second) = run(&race.step, *plan, budget, track).await
            {
                *time = (*time).min(second);
            }
        }
    }
    races
}

/// Races the tiles of products of many tokens until the budget ends, the defaults first.
async fn race_gemms(
    products: &[GemmShape],
    defaults: GemmPlans,
    limits: Limits,
    budget: Duration,
    track: &mut impl Track,
) -> Vec<GemmRace> {
    let start = |product: &GemmShape| {
        let plans = product.candidates(defaults.of(product.layout), limits).into_iter();
        GemmRace { product: *product, candidates: plans.map(|p| (p, Outcome::Waiting)).collect() }
    };
    let mut races: Vec<GemmRace> = products.iter().map(start).collect();
    let mut longest = Duration::ZERO;
    let most = races.iter().map(|race| race.candidates.len()).max().unwrap_or_default();
    for at in 0..most {
        for GemmRace { product, candidates } in &mut races {
            let Some((plan, outcome)) = candidates.get_mut(at) else { continue };
            let begin = track.elapsed();
            // What took so long before may take as long again.
            if begin + longest >= budget {
                return races;
            }
            let measured = match track.check_gemm(product.layout, *plan).await {
                Ok(()) => track.measure_gemm(product, *plan, budget).await,
                Err(error) => Err(error),
            };
            *outcome = outcome_of(measured);
            longest = longest.max(track.elapsed().saturating_sub(begin));
        }
    }
    races
}

async fn run(
    step: &StepShape,
    plan: GemvPlan,
    budget: Duration,
    track: &mut impl Track,
) -> Outcome {
    outcome_of(match track.check(plan).await {
        Ok(()) => track.measure(step, plan, budget).await,
        Err(error) => Err(error),
    })
}

fn outcome_of(measured: Result<Option<Duration>>) -> Outcome {
    match measured {
        Ok(Some(time)) => Outcome::Time(time),
        Ok(None) => Outcome::NotReached,
        Err(error) => Outcome::Refused(error.to_string()),
    }
}

/// What was measured on an adapter. As JSON, its fields and theirs are stable: more may come, none
/// goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// As `--device` takes it.
    pub device: String,
    /// The adapter's name.
    pub adapter: String,
    /// discrete GPU, integrated GPU, software rasteriser …
    pub kind: String,
    /// vulkan, metal, dx12 …
    pub api: String,
    /// Driver name and version.
    pub driver: String,
    /// Version of wgpu.
    pub wgpu: String,
    /// Hash of all kernels, in hexadecimal.
    pub kernels: String,
    /// Who timed: the device (`timestamps`), or the host (`wall`) less the time of an empty submit.
    pub clock: &'static str,
    /// Bytes of weights that take turns, so that no cache holds them.
    pub rotated_bytes: u64,
    /// Copy of one buffer to another, bytes read and bytes written together, 10⁹ a second; `null` if
    /// there was no time.
    pub copy_gb_s: Option<f64>,
    /// What a dispatch costs that does next to nothing and waits for the one before it, in
    /// microseconds; `null` if there was no time.
    pub dispatch_us: Option<f64>,
    /// How long all of it took.
    pub seconds: f64,
    /// The file that holds the winners from now on.
    pub kept: Option<PathBuf>,
    /// Why there is none.
    pub not_kept: Option<String>,
    /// One a step.
    pub shapes: Vec<ShapeReport>,
    /// One for each layout of the winners.
    pub gemms: Vec<GemmReport>,
}

/// The candidates of one step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShapeReport {
    /// Which step of a layer.
    pub step: Step,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// The default first.
    pub candidates: Vec<CandidateReport>,
    /// The plan that is used from now on.
    pub winner: GemvPlan,
}

/// What was measured of a candidate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CandidateReport {
    /// Its `variant`, `slices`, `rows`, `unroll` and `fused`.
    #[serde(flatten)]
    pub plan: GemvPlan,
    /// Microseconds of the whole step: norm, quantisation, matrix and what comes after.
    pub us: Option<f64>,
    /// Bytes of weights, 10⁹ a second of the whole step.
    pub gb_s: Option<f64>,
    /// `gb_s` of `copy_gb_s`.
    pub share: Option<f64>,
    /// Whether its results are those of the reference; `null` if the time was up before.
    pub exact: Option<bool>,
    /// Why it was not measured.
    pub refused: Option<String>,
}

/// The tiles of a product of many tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GemmReport {
    /// The tiled kernel of the layout.
    pub kernel: &'static str,
    /// Tokens.
    pub m: usize,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// The default first.
    pub candidates: Vec<GemmCandidateReport>,
    /// The plan that is used from now on.
    pub winner: GemmPlan,
}

/// What was measured of tiles.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GemmCandidateReport {
    /// Their `rows`, `tokens` and `cooperative`.
    #[serde(flatten)]
    pub plan: GemmPlan,
    /// Microseconds of the product.
    pub us: Option<f64>,
    /// Multiplications and additions, 10⁹ a second.
    pub gop_s: Option<f64>,
    /// See [`CandidateReport::exact`].
    pub exact: Option<bool>,
    /// Why they were not measured.
    pub refused: Option<String>,
}

/// Whether the results were exact, and why a plan was not measured.
fn verdict(outcome: &Outcome) -> (Option<bool>, Option<String>) {
    match outcome {
        Outcome::Time(_) => (Some(true), None),
        Outcome::Refused(problem) => (Some(false), Some(problem.clone())),
        Outcome::Waiting | Outcome::NotReached => (None, None),
    }
}

/// Seconds, if it was measured.
fn seconds(outcome: &Outcome) -> Option<f64> {
    match outcome {
        Outcome::Time(time) => Some(time.as_secs_f64()),
        _ => None,
    }
}

impl GemmReport {
    /// Of a race in which `m` tokens and `n` rows were measured.
    fn new(race: &GemmRace, m: usize, n: usize) -> Self {
        let k = race.product.shape.k();
        let ops = 2.0 * m as f64 * n as f64 * k as f64;
        let candidates = race.candidates.iter().map(|(plan, outcome)| {
            let (exact, refused) = verdict(outcome);
            let time = seconds(outcome);
            let (us, gop_s) = (time.map(|s| s * 1e6), time.map(|s| ops / s / 1e9));
            GemmCandidateReport { plan: *plan, us, gop_s, exact, refused }
        });
        Self {
            kernel: GemmPlan::default().kernel(race.product.layout).name,
            m,
            n,
            k,
            candidates: candidates.collect(),
            winner: winner(&race.candidates),
        }
    }
}

impl ShapeReport {
    fn new(race: &Race, bytes: u64, copy_gb_s: Option<f64>) -> Self {
        let candidates = race.candidates.iter().map(|(plan, outcome)| {
            let time = seconds(outcome);
            let gb_s = time.map(|seconds| bytes as f64 / seconds / 1e9);
            let (exact, refused) = verdict(outcome);
            let share = gb_s.zip(copy_gb_s).map(|(gb_s, copy)| gb_s / copy);
            CandidateReport { plan: *plan, us: time.map(|s| s * 1e6), gb_s, share, exact, refused }
        });
        Self {
            step: race.step.step,
            n: race.step.shape.n(),
            k: race.step.shape.k(),
            candidates: candidates.collect(),
            winner: race.winner(),
        }
    }
}

/// Measures everything there is to know about an adapter and these steps, and keeps the winners in
/// `directory`; those of a software rasteriser are not kept, as its speed says nothing about GPUs.
///
/// # Errors
/// [`Error::Gpu`] if the driver fails. That the winners cannot be kept is in the report.
pub fn tune(
    gpu: &Gpu,
    steps: &[StepShape; 4],
    budget: Duration,
    directory: Option<&Path>,
) -> Result<Report> {
    block_on(tune_async(gpu, steps, budget, directory))
}

async fn tune_async(
    gpu: &Gpu,
    steps: &[StepShape; 4],
    budget: Duration,
    directory: Option<&Path>,
) -> Result<Report> {
    let start = Instant::now();
    let mut bench = measure::Bench::new(gpu, steps, start).await?;
    // The races are what the budget is for; what is left is enough for the rest.
    let default = defaults::plan(&gpu.adapter);
    let races = race(steps, default, gpu.lanes(), budget * 7 / 10, &mut bench).await;
    let products = products_of(steps, races.iter().map(Race::winner))?;
    let gemms = defaults::gemms(&gpu.adapter);
    let gemms = race_gemms(&products, gemms, Limits::of(gpu), budget * 9 / 10, &mut bench).await;
    let copy_gb_s = bench.copy_gb_s(budget).await?;
    let dispatch_us = bench.dispatch_us(budget).await?;
    let key = Key::of(gpu);
    let kept = match directory {
        _ if gpu.adapter.kind == AdapterKind::Software => {
            Err("the speed of a software rasteriser says nothing about GPUs".to_owned())
        }
        None => Err(NO_DIRECTORY.to_owned()),
        Some(directory) => {
            let (mut kept, _) = cache::Kept::read(&Place::Directory(directory.to_owned()), &key);
            kept.add(&winners(&races));
            kept.add_gemms(&gemm_winners(&gemms));
            kept.write_file(directory).map_err(|error| error.to_string())
        }
    };
    let (kept, not_kept) = match kept {
        Ok(path) => (Some(path), None),
        Err(problem) => (None, Some(problem)),
    };
    let Key { wgpu, kernels, .. } = key;
    let shapes = races.iter().map(|race| {
        let bytes = bench.step_bytes(&race.step);
        ShapeReport::new(race, bytes, copy_gb_s)
    });
    let gemms = gemms
        .iter()
        .map(|race| GemmReport::new(race, bench.gemm_tokens(), bench.gemm_rows(&race.product)));
    Ok(Report {
        gemms: gemms.collect(),
        device: format!("gpu:{}", gpu.adapter.index),
        adapter: gpu.adapter.name.clone(),
        kind: gpu.adapter.kind.to_string(),
        api: gpu.adapter.api.clone(),
        driver: gpu.adapter.driver.clone(),
        wgpu,
        kernels,
        clock: bench.clock(),
        rotated_bytes: bench.rotated_bytes(),
        copy_gb_s,
        dispatch_us,
        shapes: shapes.collect(),
        seconds: start.elapsed().as_secs_f64(),
        kept,
        not_kept,
    })
}

/// The winners of the races that settled something.
fn winners(races: &[Race]) -> Vec<(String, GemvPlan)> {
    let settled = races.iter().filter(|race| is_settled(&race.candidates));
    settled.map(|race| (race.step.id(), race.winner())).collect()
}

/// The same of tiles.
fn gemm_winners(races: &[GemmRace]) -> Vec<(String, GemmPlan)> {
    let settled = races.iter().filter(|race| is_settled(&race.candidates));
    settled.map(|race| (race.product.id(), winner(&race.candidates))).collect()
}

/// The products that tell which tiles are fastest for matrices of these plans: one for each layout.
fn products_of(
    steps: &[StepShape; 4],
    plans: impl IntoIterator<Item = GemvPlan>,
) -> Result<Vec<GemmShape>> {
    let mut products: Vec<GemmShape> = Vec::new();
    for plan in plans {
        let layout = plan.variant.layout();
        if !products.iter().any(|product| product.layout == layout) {
            products.push(GemmShape::of(steps, layout)?);
        }
    }
    Ok(products)
}

/// Which tiles the matrices of each layout get for many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct GemmPlans {
    /// Of [`Layout::Planes`].
    pub planes: GemmPlan,
    /// Of [`Layout::I2`].
    pub i2: GemmPlan,
}

impl GemmPlans {
    /// Those of a layout.
    pub fn of(self, layout: Layout) -> GemmPlan {
        match layout {
            Layout::Planes => self.planes,
            Layout::I2 => self.i2,
        }
    }

    /// These with another plan for a layout.
    pub fn with(mut self, layout: Layout, plan: GemmPlan) -> Self {
        match layout {
            Layout::Planes => self.planes = plan,
            Layout::I2 => self.i2 = plan,
        }
        self
    }
}

/// Which plans a model's matrices get.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Plans {
    /// This one and no other.
    Asked(GemvPlan),
    /// One for each of [`Step::ALL`]; where it is not exact, the first variant that is.
    Preferred([GemvPlan; 4], Vec<Variant>),
}

/// Which plans a model gets on an adapter, and what there is to say about it.
///
/// A software rasteriser gets the defaults: its speed says nothing, and measuring it takes long. The
/// race is on a device of its own, so that a kernel that brings a driver down costs its own chances
/// only.
///
/// # Errors
/// [`Error::Dimension`] if a matrix is too large.
pub(super) async fn choose(
    gpu: &Gpu,
    config: &ModelConfig,
    tune: Tune,
) -> Result<(Plans, GemmPlans, Vec<String>)> {
    let (default, order) = (defaults::plan(&gpu.adapter), defaults::order(&gpu.adapter));
    let gemms = defaults::gemms(&gpu.adapter);
    let Some(steps) = StepShape::of(config)? else {
        return Ok((Plans::Preferred([default; 4], order), gemms, Vec::new()));
    };
    let defaults = steps.map(|step| step.default_plan(default));
    if tune == Tune::Off || gpu.adapter.kind == AdapterKind::Software {
        return Ok((Plans::Preferred(defaults, order), gemms, Vec::new()));
    }
    let lanes = gpu.lanes();
    let measure = async |missing: &[StepShape], products: &dyn Fn(&[Race]) -> Vec<GemmShape>| {
        let start = Instant::now();
        let gpu = gpu.open_again().await?;
        let raced = async {
            let mut bench = measure::Bench::new(&gpu, missing, start).await?;
            let races = race(missing, default, lanes, AUTO_BUDGET - AUTO_GEMM, &mut bench).await;
            let products = products(&races);
            let gemms =
                race_gemms(&products, gemms, Limits::of(&gpu), AUTO_BUDGET, &mut bench).await;
            Ok((races, gemms))
        };
        let raced = raced.await;
        gpu.destroy();
        raced
    };
    let place = Place::of_this_program();
    let adapter = Adapter { default, gemms, limits: Limits::of(gpu), key: Key::of(gpu) };
    let (plans, gemms, notes) = kept_or_measured(&steps, &adapter, place.as_ref(), measure).await?;
    Ok((Plans::Preferred(plans, order), gemms, notes))
}

/// What is known of an adapter before anything is measured.
struct Adapter {
    default: GemvPlan,
    gemms: GemmPlans,
    limits: Limits,
    key: Key,
}

/// The plans in the cache, those of a race for what is not in it, and the defaults for what was not
/// reached. What goes wrong with measuring is not worth failing for: it is a note.
async fn kept_or_measured(
    steps: &[StepShape; 4],
    adapter: &Adapter,
    place: Option<&Place>,
    measure: impl AsyncFnOnce(
        &[StepShape],
        &dyn Fn(&[Race]) -> Vec<GemmShape>,
    ) -> Result<(Vec<Race>, Vec<GemmRace>)>,
) -> Result<([GemvPlan; 4], GemmPlans, Vec<String>)> {
    let Adapter { default, gemms, limits, ref key } = *adapter;
    let mut notes = Vec::new();
    let mut kept = match place {
        Some(place) => {
            let (kept, problem) = cache::Kept::read(place, key);
            notes.extend(problem);
            kept
        }
        None => cache::Kept::new(key),
    };
    // A file may say anything: only what could have been measured is taken from it.
    let known = |kept: &cache::Kept, step: &StepShape| {
        kept.plan(&step.id()).filter(|plan| step.candidates(default, limits.lanes).contains(plan))
    };
    let known_gemm = |kept: &cache::Kept, product: &GemmShape| {
        let candidates = product.candidates(gemms.of(product.layout), limits);
        kept.gemm(&product.id()).filter(|plan| candidates.contains(plan))
    };
    let products = [Layout::Planes, Layout::I2].map(|layout| GemmShape::of(steps, layout));
    let [planes, i2] = products;
    let products = [planes?, i2?];
    let plan_of = |kept: &cache::Kept, step: &StepShape| {
        known(kept, step).unwrap_or_else(|| step.default_plan(default))
    };
    // The layouts that matrices have after a race, and whose tiles are not known.
    let before = kept.clone();
    let missing_gemms = |races: &[Race]| {
        let mut kept = before.clone();
        kept.add(&winners(races));
        let layouts: Vec<Layout> =
            steps.iter().map(|step| plan_of(&kept, step).variant.layout()).collect();
        let mut products = products.to_vec();
        products.retain(|product| layouts.contains(&product.layout));
        products.retain(|product| known_gemm(&kept, product).is_none());
        products
    };
    let missing: Vec<StepShape> =
        steps.iter().filter(|step| known(&kept, step).is_none()).copied().collect();
    if !missing.is_empty() || !missing_gemms(&[]).is_empty() {
        let start = Instant::now();
        match measure(&missing, &missing_gemms).await {
            Ok((races, gemm_races)) => {
                let (winners, gemm_winners) = (winners(&races), gemm_winners(&gemm_races));
                let count = winners.len() + gemm_winners.len();
                let seconds = start.elapsed().as_secs_f64();
                let name = &key.adapter;
                notes.push(format!("tuned {count} matrix steps for {name} in {seconds:.1} s"));
                notes.extend(refusals(&races));
                notes.extend(gemm_refusals(&gemm_races));
                kept.add(&winners);
                kept.add_gemms(&gemm_winners);
                let problem = match place.map(|place| kept.write(place)) {
                    Some(Ok(_)) => None,
                    Some(Err(error)) => Some(error.to_string()),
                    None => Some(NO_DIRECTORY.to_owned()),
                };
                notes.extend(problem.map(|problem| format!("this is not kept: {problem}")));
            }
            Err(error) => notes.push(format!("not tuned: {error}")),
        }
    }
    let plans = steps.map(|step| plan_of(&kept, &step));
    let mut tiles = gemms;
    for product in &products {
        if let Some(plan) = known_gemm(&kept, product) {
            tiles = tiles.with(product.layout, plan);
        }
    }
    Ok((plans, tiles, notes))
}

/// Each refusal of tiles.
fn gemm_refusals(races: &[GemmRace]) -> Vec<String> {
    let mut problems = Vec::new();
    for race in races {
        for (plan, outcome) in &race.candidates {
            if let Outcome::Refused(problem) = outcome {
                let kernel = plan.kernel(race.product.layout).name;
                problems.push(format!("{kernel} {plan} is not used: {problem}"));
            }
        }
    }
    problems
}

/// Each refusal once.
fn refusals(races: &[Race]) -> Vec<String> {
    let mut problems = Vec::new();
    for (plan, outcome) in races.iter().flat_map(|race| &race.candidates) {
        if let Outcome::Refused(problem) = outcome {
            let problem = format!("{plan} is not used: {problem}");
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests;
