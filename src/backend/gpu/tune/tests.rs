use std::fs;

use super::*;
use crate::synthetic::{NAMES, bitnet_2b4t, published, tiny_bonsai, tiny_normed};

const LANES: u32 = 256;
const LIMITS: Limits = Limits { lanes: LANES, cooperative: None };
const MS: Duration = Duration::from_millis(1);

fn default() -> GemvPlan {
    Variant::PackedDot.into()
}

fn steps() -> [StepShape; 4] {
    StepShape::of(&bitnet_2b4t()).unwrap().unwrap()
}

/// An adapter whose clock goes on by 10 ms a check and by 100 ms a measurement.
struct Fake<F> {
    now: Duration,
    time: F,
    wrong: Option<Variant>,
    refused: Option<Variant>,
    measured: Vec<(Step, GemvPlan)>,
    wrong_tiles: Option<(Layout, GemmPlan)>,
    measured_gemms: Vec<(Layout, GemmPlan)>,
}

impl<F: Fn(&StepShape, GemvPlan) -> u32> Fake<F> {
    /// `time` in microseconds.
    fn new(time: F) -> Self {
        Self {
            now: Duration::ZERO,
            time,
            wrong: None,
            refused: None,
            measured: Vec::new(),
            wrong_tiles: None,
            measured_gemms: Vec::new(),
        }
    }
}

fn wrong() -> Error {
    let [device, kernel, problem] =
        ["gpu:0", "gemv", "[3]: expected 1, found 2"].map(str::to_owned);
    Error::SelfTest { device, kernel, problem }
}

impl<F: Fn(&StepShape, GemvPlan) -> u32> Track for Fake<F> {
    fn elapsed(&self) -> Duration {
        self.now
    }

    async fn check(&mut self, plan: GemvPlan) -> Result<()> {
        self.now += 10 * MS;
        if self.wrong == Some(plan.variant) { Err(wrong()) } else { Ok(()) }
    }

    async fn measure(
        &mut self,
        step: &StepShape,
        plan: GemvPlan,
        end: Duration,
    ) -> Result<Option<Duration>> {
        if self.now + 100 * MS > end {
            return Ok(None);
        }
        self.now += 100 * MS;
        self.measured.push((step.step, plan));
        if self.refused == Some(plan.variant) {
            let (adapter, problem) = ("A".to_owned(), "no".to_owned());
            return Err(Error::Gpu { adapter, operation: "make a pipeline", problem });
        }
        Ok(Some(Duration::from_micros((self.time)(step, plan).into())))
    }

    async fn check_gemm(&mut self, layout: Layout, plan: GemmPlan) -> Result<()> {
        self.now += 10 * MS;
        if self.wrong_tiles == Some((layout, plan)) { Err(wrong()) } else { Ok(()) }
    }

    async fn measure_gemm(
        &mut self,
        product: &GemmShape,
        plan: GemmPlan,
        end: Duration,
    ) -> Result<Option<Duration>> {
        if self.now + 50 * MS > end {
            return Ok(None);
        }
        self.now += 50 * MS;
        self.measured_gemms.push((product.layout, plan));
        // The smaller the faster, and cooperative matrices 16 times.
        let times = if plan.cooperative.is_some() { 16 } else { 1 };
        Ok(Some(Duration::from_micros((plan.rows * plan.tokens / times) as u64)))
    }

    fn gemm_tokens(&self) -> usize {
        256
    }
}

fn race(
    steps: &[StepShape],
    default: GemvPlan,
    lanes: u32,
    budget: Duration,
    track: &mut impl Track,
) -> Vec<Race> {
    pollster::block_on(super::race(steps, default, lanes, budget, track))
}

fn race_gemms(
    products: &[GemmShape],
    defaults: GemmPlans,
    limits: Limits,
    budget: Duration,
    track: &mut impl Track,
) -> Vec<GemmRace> {
    pollster::block_on(super::race_gemms(products, defaults, limits, budget, track))
}

fn kept_or_measured(
    steps: &[StepShape; 4],
    adapter: &Adapter,
    directory: Option<&Path>,
    measure: impl FnOnce(
        &[StepShape],
        &dyn Fn(&[Race]) -> Vec<GemmShape>,
    ) -> Result<(Vec<Race>, Vec<GemmRace>)>,
) -> Result<([GemvPlan; 4], GemmPlans, Vec<String>)> {
    let place = directory.map(|directory| Place::Directory(directory.to_owned()));
    let measure = async |missing: &[StepShape], products: &dyn Fn(&[Race]) -> Vec<GemmShape>| {
        measure(missing, products)
    };
    pollster::block_on(super::kept_or_measured(steps, adapter, place.as_ref(), measure))
}

#[test]
fn candidates_are_legal_and_begin_with_the_default() {
    for name in NAMES {
        let config = published(name).unwrap();
        let Some(steps) = StepShape::of(&config).unwrap() else {
            assert!(name.contains("bonsai"), "{name}");
            continue;
        };
        assert_eq!(steps.map(|step| step.step), Step::ALL);
        for step in steps {
            for lanes in [256, 1024] {
                let plans = step.candidates(default(), lanes);
                assert_eq!(plans[0], step.default_plan(default()), "{name}");
                assert!(plans.len() >= VARIANTS.len(), "{name}: {plans:?}");
                for (at, plan) in plans.iter().enumerate() {
                    assert!(step.is_legal(*plan, lanes) && !plans[..at].contains(plan), "{plan:?}");
                    assert!(step.can_fuse || !plan.fused, "{name}: {plan:?}");
                }
            }
        }
    }
    let plans = steps()[0].candidates(default(), 128);
    assert!(plans[1..].iter().all(|plan| plan.rows * plan.slices <= 128), "{plans:?}");
}

#[test]
fn what_no_fused_kernel_takes_is_split() {
    // Falcon3 7B's down has 23,040 columns; a norm inside the matrix has to come first.
    let falcon = StepShape::of(&published("falcon3-7b").unwrap()).unwrap().unwrap();
    let fused = |step: StepShape| step.default_plan(default()).fused;
    assert_eq!(falcon.map(fused), [true, true, true, false]);
    let normed = StepShape::of(&tiny_normed()).unwrap().unwrap();
    assert!(!normed.into_iter().any(fused));
    assert!(StepShape::of(&tiny_bonsai(2, 128)).unwrap().is_none());
}

#[test]
fn ids_tell_steps_apart() {
    let mut ids: Vec<String> = Vec::new();
    for name in NAMES {
        let steps = StepShape::of(&published(name).unwrap()).unwrap();
        for step in steps.into_iter().flatten() {
            ids.push(step.id());
        }
    }
    let id = "qkv 3840x2560 heads 20/5x128 norm";
    assert_eq!(ids[0], id);
    assert_eq!(ids.iter().filter(|other| *other == id).count(), 1);
    assert_eq!(ids[..4].iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
}

#[test]
fn the_fastest_wins_if_it_is_faster_by_more_than_noise() {
    let fast = GemvPlan { slices: 4, fused: false, ..GemvPlan::from(Variant::BitSerial) };
    for (time, winner) in [(960, fast), (980, default()), (1000, default())] {
        let mut track = Fake::new(|_, plan| if plan == fast { time } else { 1000 });
        let races = race(&steps(), default(), LANES, 1000 * 1000 * MS, &mut track);
        assert!(races.iter().all(|race| race.winner() == winner), "{time}");
        // Every candidate, and where one beats the default those two again.
        let all: usize = races.iter().map(|race| race.candidates.len()).sum();
        let again = if winner == fast { 8 } else { 0 };
        assert_eq!(track.measured.len(), all + again);
    }
    // Each step for itself.
    let mut track = Fake::new(
        |step, plan| {
            if (step.step == Step::Down) == (plan == fast) { 500 } else { 1000 }
        },
    );
    let races = race(&steps(), default(), LANES, 1000 * 1000 * MS, &mut track);
    let winners = races.iter().map(Race::winner).collect::<Vec<_>>();
    assert_eq!(winners[3], fast);
    assert!(winners[..3].iter().all(|winner| *winner == default()), "{winners:?}");
}

#[test]
fn what_resembles_the_fastest_comes_before_the_rest() {
    let split = GemvPlan { fused: false, ..Variant::BitSerial.into() };
    let mut track = Fake::new(|_, plan| if plan == split { 500 } else { 1000 });
    race(&steps()[..1], default(), LANES, 1000 * 1000 * MS, &mut track);
    let order: Vec<GemvPlan> = track.measured.iter().map(|(_, plan)| *plan).collect();
    let is_default = |plan: &GemvPlan| GemvPlan { fused: true, ..*plan } == plan.variant.into();
    // Every variant as it is, then the winner's relatives.
    let variants = 2 * VARIANTS.len();
    assert!(order[..variants].iter().all(is_default), "{order:?}");
    assert_eq!(order[0], default());
    assert!(order[variants..].iter().take(4).all(|plan| differences(*plan, split) == 1));
}

#[test]
fn a_win_that_does_not_repeat_is_none() {
    let fast = GemvPlan { fused: false, ..default() };
    // The default is slow the first time only.
    let count = std::cell::Cell::new(0);
    let mut track = Fake::new(|_, plan| {
        count.set(count.get() + u32::from(plan == default()));
        if plan == default() && count.get() <= 4 { 2000 } else { 1000 + u32::from(plan != fast) }
    });
    let races = race(&steps(), default(), LANES, 1000 * 1000 * MS, &mut track);
    assert!(races.iter().all(|race| race.winner() == default()));
}

#[test]
fn the_budget_ends_the_race() {
    for (budget, reached) in [(0, 0), (50, 0), (250, 2), (460, 4), (600, 5)] {
        let budget = budget * MS;
        let mut track = Fake::new(|_, plan| if plan == default() { 1000 } else { 1 });
        let races = race(&steps(), default(), LANES, budget, &mut track);
        assert!(track.now <= budget + 10 * MS, "{:?} of {budget:?}", track.now);
        assert_eq!(track.measured.len(), reached);
        // The defaults come first, and where only they were measured they win.
        let defaults = Step::ALL.map(|step| (step, default()));
        let first = reached.min(4);
        assert_eq!(track.measured[..first], defaults[..first]);
        let others = races.iter().filter(|race| race.winner() != default()).count();
        assert_eq!(others, reached.saturating_sub(4));
        assert_eq!(winners(&races).len(), first);
    }
}

#[test]
fn a_wrong_plan_does_not_take_part_and_is_reported() {
    for is_wrong in [true, false] {
        let mut track =
            Fake::new(|_, plan| 1000 - 500 * u32::from(plan.variant == Variant::BitSerial));
        let slow = Some(Variant::BitSerial);
        if is_wrong {
            track.wrong = slow
        } else {
            track.refused = slow
        }
        let races = race(&steps(), default(), LANES, 1000 * 1000 * MS, &mut track);
        let measured = |(_, plan): &(Step, GemvPlan)| plan.variant == Variant::BitSerial;
        assert_eq!(track.measured.iter().any(measured), !is_wrong);
        for race in &races {
            assert_eq!(race.winner().variant, Variant::PackedDot);
        }
        let problems = refusals(&races);
        // Each of the variant's plans once, not once a step.
        let plans = races[0].candidates.iter().filter(|(plan, _)| Some(plan.variant) == slow);
        assert_eq!(problems.len(), plans.count());
        let words = if is_wrong { "expected 1, found 2" } else { "make a pipeline" };
        assert!(problems.iter().all(|problem| problem.contains(words)), "{problems:?}");
        let report = ShapeReport::new(&races[0], 1000, Some(2.0));
        let refused = report.candidates.iter().filter(|candidate| candidate.exact == Some(false));
        assert!(refused.clone().count() == problems.len());
        assert!(refused.into_iter().all(|candidate| candidate.us.is_none()));
    }
    // A default that is wrong does not win by having been first.
    let mut track = Fake::new(|_, _| 1000);
    track.wrong = Some(Variant::PackedDot);
    let races = race(&steps(), default(), LANES, 1000 * 1000 * MS, &mut track);
    assert!(races.iter().all(|race| race.winner().variant == Variant::BitSerial));
}

#[test]
fn a_report_has_the_shape_that_is_promised() {
    let mut track = Fake::new(|_, _| 10);
    let races = race(&steps(), default(), LANES, 250 * MS, &mut track);
    let shape = |at: usize| serde_json::to_value(ShapeReport::new(&races[at], 100_000, Some(20.0)));
    let qkv = shape(0).unwrap();
    assert_eq!((&qkv["step"], &qkv["n"], &qkv["k"]), (&"qkv".into(), &3840.into(), &2560.into()));
    let expected = serde_json::json!({
        "variant": "packed_dot", "slices": 8, "rows": 32, "unroll": 1, "fused": true,
        "us": 10.0, "gb_s": 10.0, "share": 0.5, "exact": true, "refused": null,
    });
    assert_eq!(qkv["candidates"][0], expected);
    let winner = serde_json::json!({ "variant": "packed_dot", "slices": 8, "rows": 32, "unroll": 1, "fused": true });
    assert_eq!(qkv["winner"], winner);
    let down = shape(3).unwrap();
    assert!(down["candidates"][0]["us"].is_null() && down["candidates"][0]["exact"].is_null());
    assert_eq!(down["winner"], winner);
}

fn key() -> Key {
    let [adapter, driver, api, wgpu, kernels, capabilities] = ["A"; 6].map(str::to_owned);
    Key { adapter, driver, api, wgpu, kernels, capabilities }
}

const SPLIT: GemvPlan =
    GemvPlan { variant: Variant::BitSerial, slices: 4, rows: 32, unroll: 1, fused: false };

fn adapter() -> Adapter {
    Adapter { default: default(), gemms: GemmPlans::default(), limits: LIMITS, key: key() }
}

/// What a race on a fake adapter finds, on which one plan is twice as fast.
fn measured(
    steps: &[StepShape],
    products: &dyn Fn(&[Race]) -> Vec<GemmShape>,
) -> Result<(Vec<Race>, Vec<GemmRace>)> {
    let mut track = Fake::new(|_, plan| if plan == SPLIT { 500 } else { 1000 });
    let budget = 1000 * 1000 * MS;
    let races = race(steps, default(), LANES, budget, &mut track);
    let products = products(&races);
    let gemms = race_gemms(&products, GemmPlans::default(), LIMITS, budget, &mut track);
    Ok((races, gemms))
}

/// Measuring where everything is known.
fn never(
    _: &[StepShape],
    _: &dyn Fn(&[Race]) -> Vec<GemmShape>,
) -> Result<(Vec<Race>, Vec<GemmRace>)> {
    panic!("everything is known")
}

/// What [`measured`] finds for the layout that wins.
fn measured_tiles() -> GemmPlans {
    GemmPlans { planes: GemmPlan::FEW, ..GemmPlans::default() }
}

#[test]
fn tiles_are_raced_for_each_layout_within_the_budget() {
    let products = products_of(&steps(), [default(), SPLIT, default()]).unwrap();
    assert_eq!(products.iter().map(|p| p.layout).collect::<Vec<_>>(), [Layout::I2, Layout::Planes]);
    assert_eq!(products[0].shape, MatShape::new(13_824, 2560).unwrap());
    assert_eq!(products[0].id(), "gemm_i2 13824x2560");
    let all = GemmPlan::all().len();
    for (budget, reached) in [(0, 0), (70, 1), (130, 2), (1_000_000, 2 * all)] {
        let mut track = Fake::new(|_, _| 1);
        let races = race_gemms(&products, GemmPlans::default(), LIMITS, budget * MS, &mut track);
        assert!(track.now <= (budget + 10) * MS, "{:?} of {budget} ms", track.now);
        assert_eq!(track.measured_gemms.len(), reached);
        assert_eq!(gemm_winners(&races).len(), reached.min(2));
        let expected = if reached > 2 { GemmPlan::FEW } else { GemmPlan::default() };
        assert!(races.iter().all(|race| winner(&race.candidates) == expected));
    }
    // Few lanes a workgroup leave what fits, and the default.
    let few = Limits { lanes: 64, ..LIMITS };
    let candidates = products[0].candidates(GemmPlan::default(), few);
    assert_eq!(candidates, [GemmPlan::default(), GemmPlan::tile(64, 32)]);
}

#[test]
fn cooperative_matrices_race_where_there_are_some() {
    let matrices = Cooperative { size: 16, subgroup: 32 };
    let limits = Limits { cooperative: Some(matrices), ..LIMITS };
    let products = products_of(&steps(), [default(), SPLIT]).unwrap();
    let candidates = |at: usize| products[at].candidates(GemmPlan::default(), limits);
    let [first, second] = GemmPlan::all_of(matrices);
    assert_eq!(candidates(0)[..3], [GemmPlan::default(), first, second]);
    assert_eq!(candidates(0).len(), 2 + GemmPlan::all().len());
    // Bit planes are not for them, and a workgroup may be too large.
    assert!(candidates(1).iter().all(|plan| plan.cooperative.is_none()));
    let wide = Cooperative { size: 8, subgroup: 64 };
    let limits = Limits { cooperative: Some(wide), ..LIMITS };
    let fits = products[0].candidates(GemmPlan::default(), limits);
    let fits: Vec<_> = fits.into_iter().filter(|plan| plan.cooperative.is_some()).collect();
    assert_eq!(fits, [GemmPlan::all_of(wide)[1]]);
    // A wrong one takes no part, the other wins and is kept.
    let limits = Limits { cooperative: Some(matrices), ..LIMITS };
    let mut track = Fake::new(|_, _| 1);
    track.wrong_tiles = Some((Layout::I2, first));
    let budget = 1000 * 1000 * MS;
    let races = race_gemms(&products[..1], GemmPlans::default(), limits, budget, &mut track);
    assert_eq!(winner(&races[0].candidates), second);
    let problems = gemm_refusals(&races);
    assert!(problems[0].contains("gemm_i2_coop16 64x64 of 16x16"), "{problems:?}");
    let report = serde_json::to_value(GemmReport::new(&races[0], 256, 13_824)).unwrap();
    let cooperative = serde_json::json!({ "size": 16, "subgroup": 32 });
    assert_eq!(report["winner"]["cooperative"], cooperative);
    let directory = tempfile::tempdir().unwrap();
    let mut kept = cache::Kept::new(&key());
    kept.add(&steps().map(|step| (step.id(), default())));
    kept.add_gemms(&gemm_winners(&races));
    kept.write_file(directory.path()).unwrap();
    let offers = Adapter { limits, ..adapter() };
    let (_, tiles, _) = kept_or_measured(&steps(), &offers, Some(directory.path()), never).unwrap();
    assert_eq!(tiles.i2, second);
    // The file's plan is not for an adapter without them.
    let (_, tiles, _) =
        kept_or_measured(&steps(), &adapter(), Some(directory.path()), measured).unwrap();
    assert_eq!(tiles.i2.cooperative, None);
}

#[test]
fn wrong_tiles_do_not_take_part_and_are_reported() {
    let products = products_of(&steps(), [default()]).unwrap();
    let mut track = Fake::new(|_, _| 1);
    track.wrong_tiles = Some((Layout::I2, GemmPlan::FEW));
    let races = race_gemms(&products, GemmPlans::default(), LIMITS, 1000 * 1000 * MS, &mut track);
    assert_eq!(winner(&races[0].candidates), GemmPlan::tile(64, 32));
    let problems = gemm_refusals(&races);
    assert!(problems.len() == 1 && problems[0].contains("gemm_i2_few 32x8"), "{problems:?}");
    let report = GemmReport::new(&races[0], 256, 13_824);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((&json["kernel"], &json["m"]), (&"gemm_i2".into(), &256.into()));
    assert_eq!(
        json["winner"],
        serde_json::json!({ "rows": 64, "tokens": 32, "cooperative": null })
    );
    let ops = 2.0 * 256.0 * 13_824.0 * 2560.0;
    let expected = serde_json::json!({
        "rows": 64, "tokens": 64, "cooperative": null, "us": 4096.0, "gop_s": ops / 4096e-6 / 1e9, "exact": true,
        "refused": null,
    });
    assert_eq!(json["candidates"][0], expected);
    assert_eq!(json["candidates"][3]["exact"], false);
}

#[test]
fn winners_are_kept_and_not_measured_again() {
    let directory = tempfile::tempdir().unwrap();
    let directory = Some(directory.path());
    let (plans, tiles, notes) =
        kept_or_measured(&steps(), &adapter(), directory, measured).unwrap();
    assert_eq!((plans, tiles), ([SPLIT; 4], measured_tiles()));
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].starts_with("tuned 5 matrix steps for A in "), "{notes:?}");
    let again = kept_or_measured(&steps(), &adapter(), directory, never).unwrap();
    assert_eq!(again, ([SPLIT; 4], measured_tiles(), Vec::new()));
    // Another model adds its steps.
    let other = StepShape::of(&published("bitnet-large").unwrap()).unwrap().unwrap();
    kept_or_measured(&other, &adapter(), directory, measured).unwrap();
    for steps in [steps(), other] {
        let (plans, tiles, _) = kept_or_measured(&steps, &adapter(), directory, never).unwrap();
        assert_eq!((plans, tiles), ([SPLIT; 4], measured_tiles()));
    }
    // New kernels are measured anew.
    let new = Adapter { key: Key { kernels: "B".to_owned(), ..key() }, ..adapter() };
    let (_, _, notes) = kept_or_measured(&steps(), &new, directory, measured).unwrap();
    assert!(notes.len() == 2 && notes[0].contains("kernels"), "{notes:?}");
}

#[test]
fn a_file_cannot_ask_for_what_there_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let good = GemvPlan { slices: 8, ..SPLIT };
    let product = products_of(&steps(), [good]).unwrap()[0];
    for wrong in [
        GemvPlan { slices: usize::MAX, ..SPLIT },
        GemvPlan { slices: 5, ..SPLIT },
        GemvPlan { rows: 0, ..SPLIT },
        GemvPlan { unroll: 3, ..SPLIT },
    ] {
        let mut kept = cache::Kept::new(&key());
        kept.add(&steps().map(|step| (step.id(), good)));
        kept.add(&[(steps()[1].id(), wrong)]);
        kept.add_gemms(&[(product.id(), GemmPlan::FEW)]);
        kept.write_file(directory.path()).unwrap();
        let (plans, _, _) =
            kept_or_measured(&steps(), &adapter(), Some(directory.path()), |missing, products| {
                assert_eq!(missing, &steps()[1..2]);
                measured(missing, products)
            })
            .unwrap();
        assert_eq!(plans, [good, SPLIT, good, good], "{wrong:?}");
    }
    for wrong in [
        GemmPlan::tile(0, 64),
        GemmPlan::tile(128, usize::MAX),
        GemmPlan::all_of(Cooperative { size: 0, subgroup: usize::MAX })[0],
    ] {
        let mut kept = cache::Kept::new(&key());
        kept.add(&steps().map(|step| (step.id(), good)));
        kept.add_gemms(&[(product.id(), wrong)]);
        kept.write_file(directory.path()).unwrap();
        let measure = |missing: &[StepShape], products: &dyn Fn(&[Race]) -> Vec<GemmShape>| {
            assert_eq!((missing.len(), products(&[])), (0, vec![product]));
            measured(missing, products)
        };
        let directory = Some(directory.path());
        let (plans, tiles, _) = kept_or_measured(&steps(), &adapter(), directory, measure).unwrap();
        assert_eq!((plans, tiles), ([good; 4], measured_tiles()), "{wrong:?}");
    }
}

#[test]
fn what_fails_is_a_note() {
    // A file where the directory should be.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let (plans, tiles, notes) =
        kept_or_measured(&steps(), &adapter(), Some(&file), measured).unwrap();
    assert_eq!((plans, tiles), ([SPLIT; 4], measured_tiles()));
    assert!(notes.last().is_some_and(|note| note.contains("not kept")), "{notes:?}");
    let (plans, _, notes) = kept_or_measured(&steps(), &adapter(), None, measured).unwrap();
    assert_eq!(plans, [SPLIT; 4]);
    assert!(notes[1].contains("STERNA_CACHE"), "{notes:?}");
    let (plans, tiles, notes) =
        kept_or_measured(&steps(), &adapter(), None, |_, _| Err(wrong())).unwrap();
    assert_eq!((plans, tiles), ([default(); 4], GemmPlans::default()));
    assert!(notes.len() == 1 && notes[0].starts_with("not tuned: "), "{notes:?}");
}
