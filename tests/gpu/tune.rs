//! Races of plans on a real adapter.

use std::time::Duration;

use libtest_mimic::Failed;
use sterna::backend::gpu::tune::{GemmReport, Report, ShapeReport, StepShape, tune};
use sterna::backend::gpu::{AdapterKind, Capabilities, Gpu, Variant};
use sterna::synthetic::{tiny_bitnet, tiny_llama, tiny_normed};

use crate::Case;

pub fn cases(capabilities: Capabilities) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    // Heads that are no whole tiles, heads that are, and a norm inside the matrices.
    let mut configs =
        vec![("bitnet", tiny_bitnet()), ("llama", tiny_llama()), ("normed", tiny_normed())];
    if capabilities == Capabilities::Adapter {
        // It has more plans, whatever the model.
        configs.retain(|&(name, _)| name == "llama");
    }
    for (name, config) in configs {
        cases.push((
            format!("tune::every_variant_runs_and_is_exact::{name}"),
            Box::new(move |gpu| {
                let steps = StepShape::of(&config)?.ok_or("matrices with one scale")?;
                every_variant(gpu, &steps)
            }),
        ));
    }
    cases
}

/// Long enough for every variant as it runs by default on a software rasteriser, the last also on a busy
/// machine; the other plans are as exact (`kernels.rs`), and too many.
const BUDGETS: [Duration; 3] =
    [Duration::from_secs(10), Duration::from_secs(20), Duration::from_secs(60)];

/// Whether there was time for all that has to be measured.
fn is_complete(report: &Report) -> bool {
    let has_all = |shape: &ShapeReport| {
        Variant::ALL.into_iter().all(|variant| {
            let mut plans = shape.candidates.iter().filter(|found| found.plan.variant == variant);
            plans.any(|found| found.exact.is_some())
        })
    };
    let has_usual = |gemm: &GemmReport| gemm.candidates[0].exact.is_some();
    let is_timed = report.copy_gb_s.is_some() && report.dispatch_us.is_some();
    is_timed && report.shapes.iter().all(has_all) && report.gemms.iter().all(has_usual)
}

fn every_variant(gpu: &Gpu, steps: &[StepShape; 4]) -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let tuned = |budget| tune(gpu, steps, budget, Some(directory.path()));
    let [first, more @ ..] = BUDGETS;
    let mut report = tuned(first)?;
    for budget in more {
        if !is_complete(&report) {
            report = tuned(budget)?;
        }
    }
    let is_positive = |value: Option<f64>| value.is_some_and(|value| value > 0.0 && value < 1e9);
    if !is_positive(report.copy_gb_s) || report.dispatch_us.is_none() {
        return Err(
            format!("copy {:?}, dispatch {:?}", report.copy_gb_s, report.dispatch_us).into()
        );
    }
    if report.shapes.len() != steps.len() {
        return Err("a step has no report".into());
    }
    for shape in &report.shapes {
        let what = shape.step.name();
        for candidate in &shape.candidates {
            let is_measured = candidate.exact == Some(true) && is_positive(candidate.us);
            if !is_measured && (candidate.exact.is_some() || candidate.us.is_some()) {
                return Err(format!("{what}: {candidate:?}").into());
            }
        }
        let measured = || shape.candidates.iter().filter(|found| found.us.is_some());
        let has = |variant| measured().any(|found| found.plan.variant == variant);
        if !Variant::ALL.into_iter().all(has) {
            return Err(format!("{what}: a variant did not take part").into());
        }
        if !measured().any(|candidate| candidate.plan == shape.winner) {
            return Err(format!("{what}: {:?} was not measured", shape.winner).into());
        }
    }
    // The usual tiles of every layout that won; the others are as exact (`kernels.rs`), and a busy
    // machine may not get to them.
    let layouts = report.shapes.iter().map(|shape| shape.winner.variant.layout());
    let layouts = layouts.collect::<std::collections::HashSet<_>>().len();
    for gemm in &report.gemms {
        let measured = gemm.candidates.iter().filter(|candidate| {
            candidate.exact == Some(true)
                && is_positive(candidate.us)
                && is_positive(candidate.gop_s)
        });
        let has = |plan| measured.clone().any(|candidate| candidate.plan == plan);
        if !has(gemm.candidates[0].plan) || !has(gemm.winner) {
            return Err(format!("{gemm:?}").into());
        }
    }
    if report.gemms.len() != layouts {
        return Err(format!("{layouts} layouts, {} races of tiles", report.gemms.len()).into());
    }
    // What is known of a software rasteriser is of no use to anyone.
    let is_software = gpu.adapter.kind == AdapterKind::Software;
    let is_there =
        directory.path().join("tune").read_dir().is_ok_and(|mut files| files.next().is_some());
    if is_there == is_software || report.kept.is_some() == is_software {
        return Err(format!("kept: {:?}, {:?}", report.kept, report.not_kept).into());
    }
    Ok(())
}
