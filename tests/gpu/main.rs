//! Tests that need a GPU adapter: they run the shipped WGSL on whatever adapter is there.
//!
//! Every test runs on a device limited to WebGPU's defaults without optional features. No kernel but those
//! of cooperative matrices reads the features of a device: what runs again on one with all that the adapter
//! offers is what its limits or features add (plans with larger workgroups, cooperative matrices,
//! timestamps), and whole models. Without an adapter each test is reported as ignored, by name; with
//! `STERNA_REQUIRE_GPU=1` that is a failure. So are, without a failure, those of cooperative matrices where
//! the adapter has none.

mod attention;
#[path = "../common/formats.rs"]
#[allow(dead_code, reason = "what spoils files is for other tests")]
mod formats;
#[path = "../common/golden.rs"]
mod golden;
mod head;
mod kernels;
#[cfg(feature = "measure")]
mod measure;
mod model;
#[path = "../common/prefill.rs"]
mod prefill;
mod sample;
mod tune;
mod util;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use sterna::backend::gpu::{Capabilities, Gpu};

/// A test on an open device.
type Body = Box<dyn Fn(&Gpu) -> Result<(), Failed> + Send>;

/// A test: its name and body.
type Case = (String, Body);

#[expect(clippy::print_stderr, reason = "the report names the adapter that was tested")]
fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for (label, capabilities) in
        [("webgpu-default", Capabilities::WebGpuDefault), ("adapter", Capabilities::Adapter)]
    {
        let gpu = util::open(capabilities).map(Arc::new);
        if label == "adapter" {
            match &gpu {
                Ok(gpu) => eprintln!("adapter: {}", gpu.adapter),
                Err(error) => eprintln!("no adapter: {error}"),
            }
        }
        let cases = kernels::cases(capabilities).into_iter().chain(head::cases(capabilities));
        let cases = cases.chain(sample::cases(capabilities)).chain(tune::cases(capabilities));
        let cases = cases.chain(model::cases(capabilities)).chain(attention::cases(capabilities));
        #[cfg(feature = "measure")]
        let cases = cases.chain(measure::cases(capabilities));
        let cooperative =
            kernels::cooperative_cases().into_iter().chain(model::cooperative_cases());
        let cooperative = cooperative.filter(|_| capabilities == Capabilities::Adapter);
        let cases = cases.map(|case| (case, false)).chain(cooperative.map(|case| (case, true)));
        trials.extend(cases.map(|((name, case), needs_cooperative)| {
            let name = format!("{label}::{name}");
            match &gpu {
                Ok(gpu) if needs_cooperative && gpu.cooperative().is_none() => {
                    Trial::test(name, || Ok(())).with_ignored_flag(true)
                }
                Ok(gpu) => {
                    let gpu = Arc::clone(gpu);
                    Trial::test(name, move || case(&gpu))
                }
                Err(_) => Trial::test(name, || Ok(())).with_ignored_flag(true),
            }
        }));
        if let Err(error) = gpu
            && std::env::var_os("STERNA_REQUIRE_GPU").is_some_and(|value| value == "1")
        {
            let problem = error.to_string();
            trials.push(Trial::test(format!("{label}::adapter"), move || Err(problem.into())));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
