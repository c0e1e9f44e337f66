//! `sterna devices`: what there is to run on.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;
use sterna::backend::AvailableDevice;
use sterna::energy::{self, Found, Host, MeterInfo};

use super::{print, print_json};

/// List what sterna can run on, what "auto" takes, and the energy meters
///
/// Lists every adapter that wgpu finds and the CPU, under the names that --device takes; "*" marks
/// what "auto" takes, and each line says why. Then come the energy meters that can be read here,
/// and one line about those that cannot.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Write JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints for each device.
#[derive(Serialize)]
struct Device<'a> {
    name: &'a str,
    description: &'a str,
    auto: &'a str,
    chosen: bool,
}

impl<'a> From<&'a AvailableDevice> for Device<'a> {
    fn from(device: &'a AvailableDevice) -> Self {
        let AvailableDevice { name, description, auto, chosen } = device;
        Self { name, description, auto, chosen: *chosen }
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Listing<'a> {
    devices: Vec<Device<'a>>,
    energy: Energy<'a>,
}

#[derive(Serialize)]
struct Energy<'a> {
    meters: Vec<Meter<'a>>,
    missing: Vec<String>,
}

/// An energy meter.
#[derive(Serialize)]
struct Meter<'a> {
    name: &'a str,
    domain: String,
    covers: &'a str,
    source: String,
    method: String,
    step_joules: Option<f64>,
    update_seconds: f64,
    min_window_seconds: f64,
}

impl<'a> From<&'a MeterInfo> for Meter<'a> {
    fn from(info: &'a MeterInfo) -> Self {
        Self {
            name: &info.name,
            domain: info.domain.to_string(),
            covers: info.covers(),
            source: info.source.to_string(),
            method: info.method.to_string(),
            step_joules: info.resolution.step_joules,
            update_seconds: info.resolution.update.as_secs_f64(),
            min_window_seconds: info.min_window.as_secs_f64(),
        }
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let devices = sterna::backend::devices()?;
    let found = energy::discover(&Host::this());
    if arguments.json {
        return print_json(&Listing {
            devices: devices.iter().map(Device::from).collect(),
            energy: Energy {
                meters: found.meters.iter().map(|meter| meter.describe().into()).collect(),
                missing: found.missing.iter().map(ToString::to_string).collect(),
            },
        });
    }
    let mut text = String::new();
    for device in &devices {
        let mark = if device.chosen { '*' } else { ' ' };
        writeln!(text, "{mark} {:6} {} [{}]", device.name, device.description, device.auto)?;
    }
    write_meters(&mut text, &found)?;
    print(&text)
}

fn write_meters(text: &mut String, found: &Found) -> Result<()> {
    for meter in &found.meters {
        let MeterInfo { name, domain, source, method, .. } = meter.describe();
        writeln!(text, "energy: {domain} by {source}: {name} [{method}]")?;
    }
    if !found.missing.is_empty() {
        writeln!(text, "{}", found.summary())?;
    }
    Ok(())
}
