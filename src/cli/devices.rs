//! `sterna devices`: what there is to run on.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;
use sterna::backend::AvailableDevice;

use super::{print, print_json};

/// List what sterna can run on, and what "auto" takes
///
/// Lists every adapter that wgpu finds and the CPU, under the names that --device takes; "*" marks
/// what "auto" takes, and each line says why.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Write a JSON list
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

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let devices = sterna::backend::devices()?;
    if arguments.json {
        return print_json(&devices.iter().map(Device::from).collect::<Vec<_>>());
    }
    let mut text = String::new();
    for device in &devices {
        let mark = if device.chosen { '*' } else { ' ' };
        writeln!(text, "{mark} {:6} {} [{}]", device.name, device.description, device.auto)?;
    }
    print(&text)
}
