//! The meters of a device, and what a window's joules are by its tokens.

use super::Spread;
use super::compare::Placement;
use super::report::{EnergyReport, MeterReport, PhaseEnergy, PhaseKind, WindowReport};
use crate::backend::gpu::AdapterKind;
use crate::energy::{MeterInfo, Workload, choose};

impl From<&MeterInfo> for MeterReport {
    fn from(info: &MeterInfo) -> Self {
        Self {
            name: info.name.clone(),
            domain: info.domain.to_string(),
            covers: info.covers().to_owned(),
            source: info.source.to_string(),
            method: info.method.to_string(),
            min_window_seconds: info.min_window.as_secs_f64(),
        }
    }
}

/// The meters whose sum is a device's energy.
pub(super) fn meters_of(placement: &Placement, meters: &[MeterInfo]) -> Vec<usize> {
    let workload = match placement {
        Placement::Adapter { kind: AdapterKind::Discrete, pci } => {
            Workload::DiscreteGpu(Some(pci.as_str()).filter(|pci| !pci.is_empty()))
        }
        Placement::Adapter { .. } | Placement::Host => Workload::Package,
    };
    choose(workload, meters)
}

/// The joules of some meters in a window; `None` if one of them failed.
fn joules(window: &WindowReport, meters: &[usize]) -> Option<f64> {
    meters.iter().map(|&meter| window.joules[meter]).sum()
}

fn watts(window: &WindowReport, meters: &[usize]) -> Option<f64> {
    joules(window, meters).map(|joules| joules / window.seconds).filter(|watts| watts.is_finite())
}

/// The energy of a device by its meters, or why there is none.
pub(super) fn energy_of(
    device: usize,
    meters: &[usize],
    all: &[MeterReport],
    windows: &[WindowReport],
) -> Result<EnergyReport, String> {
    let domains: Vec<&str> = meters.iter().map(|&meter| all[meter].domain.as_str()).collect();
    let idle: Vec<_> = windows.iter().filter(|window| window.phase == PhaseKind::Idle).collect();
    let (before, after) = match idle.as_slice() {
        [before, after] => (watts(before, meters), watts(after, meters)),
        _ => (None, None),
    };
    // A baseline has two ends.
    let idle_watts = before.zip(after).map(|(before, after)| f64::midpoint(before, after));
    let of = |phase| {
        let of_device = |w: &&WindowReport| w.device == Some(device) && w.phase == phase;
        let of_phase: Vec<_> = windows.iter().filter(of_device).collect();
        phase_energy(&of_phase, meters, idle_watts)
    };
    Ok(EnergyReport {
        meters: meters.to_vec(),
        domain: domains.join(" and "),
        idle_watts_before: before,
        idle_watts_after: after,
        prompt: of(PhaseKind::Prompt)?,
        reply: of(PhaseKind::Reply)?,
    })
}

fn phase_energy(
    windows: &[&WindowReport],
    meters: &[usize],
    idle_watts: Option<f64>,
) -> Result<PhaseEnergy, String> {
    let (mut gross, mut net, mut powers) = (Vec::new(), Vec::new(), Vec::new());
    for window in windows {
        let failed = || format!("a meter failed: {}", window.problems.join("; "));
        let all = joules(window, meters).ok_or_else(failed)?;
        let tokens = window.tokens as f64;
        gross.push(all / tokens);
        powers.push(all / window.seconds);
        net.extend(idle_watts.map(|idle| (all - idle * window.seconds) / tokens));
    }
    let none = || "there was no window".to_owned();
    let gross = Spread::of(gross).ok_or_else(none)?;
    let by_meter = meters.iter().map(|&meter| {
        let of_meter = windows.iter().filter_map(|w| Some(w.joules[meter]? / w.tokens as f64));
        Spread::of(of_meter.collect()).map(|spread| spread.median).ok_or_else(none)
    });
    if gross.median <= 0.0 {
        return Err("the meters stood still: the windows were too short for them".to_owned());
    }
    Ok(PhaseEnergy {
        tokens_per_joule: 1.0 / gross.median,
        gross_joules_per_token: gross,
        net_joules_per_token: Spread::of(net),
        watts: Spread::of(powers).ok_or_else(none)?,
        joules_per_token_by_meter: by_meter.collect::<Result<_, _>>()?,
    })
}
