//! A report as one page: no script, no network, light and dark, narrow and wide.

use std::collections::BTreeSet;
use std::fmt::{Display, Write};

use anyhow::{Context, Result};
use sterna::measure::{DeviceReport, Latencies, PhaseEnergy, PhaseKind, Report, Spread};

use super::charts::{Axis, Band, Bar, Line, PALETTE, bars, lines};

/// A device of a report, and its colour.
struct Series<'a> {
    /// With the report's letter, if there are several.
    label: String,
    color: usize,
    device: &'a DeviceReport,
}

/// The page of one report, or of several side by side.
pub(super) fn page(reports: &[Report]) -> Result<String> {
    let all = series(reports);
    let title = match reports {
        [report] => format!("{} on {}", report.model.name, report.machine.cpu),
        _ => format!("{} reports side by side", reports.len()),
    };
    let mut page = String::new();
    let out = &mut page;
    writeln!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>",
        escape(&title)
    )?;
    writeln!(out, "<header><p class=\"program\">sterna compare</p><h1>{}</h1>", escape(&title))?;
    for (index, report) in reports.iter().enumerate() {
        writeln!(out, "<p class=\"where\">{}</p>", escape(place(reports, index, report)))?;
    }
    writeln!(out, "</header>")?;
    write_verdicts(out, reports)?;
    write_table(out, &all)?;
    write_charts(out, reports, &all)?;
    for (index, report) in reports.iter().enumerate() {
        write_method(out, &letter(reports, index), report)?;
    }
    for report in reports {
        let json = serde_json::to_string(report).context("writing JSON")?;
        // Nothing in it can end the element.
        let json = json.replace('<', "\\u003c");
        writeln!(out, "<script type=\"application/json\" class=\"report\">{json}</script>")?;
    }
    writeln!(out, "</main>\n</body>\n</html>")?;
    Ok(page)
}

/// What tells reports apart: a letter, or nothing for one alone.
fn letter(reports: &[Report], index: usize) -> String {
    match reports.len() {
        1 => String::new(),
        ..=26 => format!("{}: ", char::from(b'A' + index as u8)),
        _ => format!("{}: ", index + 1),
    }
}

fn place(reports: &[Report], index: usize, report: &Report) -> String {
    let machine = &report.machine;
    let gib = machine.memory_bytes as f64 / f64::from(1u32 << 30);
    let model = match reports.len() {
        1 => String::new(),
        _ => format!("{} on ", report.model.name),
    };
    let random = if report.model.is_synthetic { ", random weights" } else { "" };
    format!(
        "{}{model}{}, {} threads, {gib:.0} GiB, {}{random} · {} · {}",
        letter(reports, index),
        machine.cpu,
        machine.logical_cores,
        machine.os,
        report.program,
        report.made
    )
}

fn series(reports: &[Report]) -> Vec<Series<'_>> {
    let mut all = Vec::new();
    for (index, report) in reports.iter().enumerate() {
        for device in &report.devices {
            let label = letter(reports, index) + &device.name;
            all.push(Series { label, color: all.len() % PALETTE, device });
        }
    }
    all
}

/// A text where markup may stand.
fn escape(text: impl Display) -> String {
    let mut escaped = String::new();
    for character in text.to_string().chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            character if character.is_control() => escaped.push('\u{fffd}'),
            character => escaped.push(character),
        }
    }
    escaped
}

/// Why devices have no energy, each reason once, after their names.
pub(super) fn energy_problems(devices: &[DeviceReport]) -> Vec<(String, &str)> {
    let mut problems: Vec<(String, &str)> = Vec::new();
    for device in devices.iter().filter(|device| device.energy.is_none()) {
        let problem = device.energy_problem.as_deref().unwrap_or("not measured");
        match problems.iter_mut().find(|(_, other)| *other == problem) {
            Some((names, _)) => *names += &format!(", {}", device.name),
            None => problems.push((device.name.clone(), problem)),
        }
    }
    problems
}

fn write_verdicts(out: &mut String, reports: &[Report]) -> Result<()> {
    writeln!(out, "<section><h2>In short</h2><ul class=\"verdicts\">")?;
    for (index, report) in reports.iter().enumerate() {
        let letter = escape(letter(reports, index));
        for verdict in &report.verdicts {
            writeln!(out, "<li>{letter}{}</li>", escape(verdict))?;
        }
        match report.same_tokens {
            Some(true) => writeln!(out, "<li>{letter}All devices wrote the same tokens.</li>")?,
            Some(false) => writeln!(
                out,
                "<li class=\"wrong\">{letter}The devices did not write the same tokens.</li>"
            )?,
            None => {}
        }
        for (names, problem) in energy_problems(&report.devices) {
            let (names, problem) = (escape(names), escape(problem));
            writeln!(out, "<li class=\"minor\">{letter}{names}: {problem}</li>")?;
        }
    }
    writeln!(out, "</ul></section>")?;
    Ok(())
}

/// A row of the table: what it is, its unit, and each device's value.
type Row = (&'static str, &'static str, fn(&DeviceReport) -> Option<String>);

fn spread(spread: &Spread) -> String {
    let digits =
        |value: f64| (2.0 - value.abs().max(1e-9).log10().floor()).clamp(0.0, 6.0) as usize;
    let digits = digits(spread.median);
    let Spread { median, min, max, .. } = spread;
    format!("{median:.digits$}<small>{min:.digits$}–{max:.digits$}</small>")
}

fn number(value: f64) -> String {
    let digits = (2.0 - value.abs().max(1e-9).log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.digits$}")
}

const ROWS: [Row; 13] = [
    ("Time to first token", "ms", |d| Some(spread(&d.first_token_ms))),
    ("Prompt", "tokens/s", |d| Some(spread(&d.prompt_tokens_per_second))),
    ("Reply", "tokens/s", |d| Some(spread(&d.tokens_per_second))),
    ("Token, half take no longer", "ms", |d| Some(number(d.token_ms.p50))),
    ("Token, 95 % take no longer", "ms", |d| Some(number(d.token_ms.p95))),
    ("Energy of a reply's token, gross", "J", |d| {
        reply(d, |e| Some(spread(&e.gross_joules_per_token)))
    }),
    ("Energy of a reply's token, net of idle", "J", |d| {
        reply(d, |e| e.net_joules_per_token.as_ref().map(spread))
    }),
    ("Tokens of a reply per joule", "", |d| reply(d, |e| Some(number(e.tokens_per_joule)))),
    ("Energy of a prompt's token, gross", "J", |d| {
        Some(spread(&d.energy.as_ref()?.prompt.gross_joules_per_token))
    }),
    ("Memory of the program, at most", "MB", |d| Some(megabytes(d.memory.host_bytes?))),
    ("Buffers of the device", "MB", |d| Some(megabytes(d.memory.device_bytes?))),
    ("Read per token", "MB", |d| {
        Some(number((d.weight_bytes_per_token? + d.cache_bytes_per_token?) / 1e6))
    }),
    ("Share of measured bandwidth", "%", |d| {
        Some(number(100.0 * d.read_gb_per_second? / d.bandwidth.as_ref()?.gb_per_second))
    }),
];

fn reply(device: &DeviceReport, value: impl Fn(&PhaseEnergy) -> Option<String>) -> Option<String> {
    value(&device.energy.as_ref()?.reply)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn write_table(out: &mut String, all: &[Series<'_>]) -> Result<()> {
    writeln!(out, "<section><div class=\"scroll\"><table><thead><tr><th></th>")?;
    for Series { label, color, .. } in all {
        writeln!(out, "<th><i style=\"background:var(--s{color})\"></i>{}</th>", escape(label))?;
    }
    writeln!(out, "</tr></thead><tbody>")?;
    for (name, unit, value) in ROWS {
        let values: Vec<_> = all.iter().map(|series| value(series.device)).collect();
        if values.iter().all(Option::is_none) {
            continue;
        }
        let unit = if unit.is_empty() { String::new() } else { format!(" <small>{unit}</small>") };
        writeln!(out, "<tr><th>{name}{unit}</th>")?;
        for value in values {
            writeln!(out, "<td>{}</td>", value.as_deref().unwrap_or("–"))?;
        }
        writeln!(out, "</tr>")?;
    }
    writeln!(out, "</tbody></table></div>")?;
    writeln!(out, "<p class=\"minor\">Medians; small: the least and the largest.</p></section>")?;
    Ok(())
}

fn figure(out: &mut String, svg: &str, caption: &str) -> Result<()> {
    // The library gives its drawings a size; the page gives them a width.
    let label = caption.split(" <").next().unwrap_or_default();
    let drawing = format!("<svg role=\"img\" aria-label=\"{label}\"");
    let svg = svg.replacen("<svg width=\"440\" height=\"300\"", &drawing, 1);
    writeln!(out, "<figure>{svg}<figcaption>{caption}</figcaption></figure>")?;
    Ok(())
}

fn write_charts(out: &mut String, reports: &[Report], all: &[Series<'_>]) -> Result<()> {
    writeln!(out, "<section><p class=\"legend\">")?;
    for Series { label, color, .. } in all {
        writeln!(
            out,
            "<span><i style=\"background:var(--s{color})\"></i>{}</span>",
            escape(label)
        )?;
    }
    writeln!(out, "</p><div class=\"charts\">")?;
    write_latencies(out, all)?;
    write_reply_times(out, all)?;
    write_depths(out, all)?;
    write_energy(out, all)?;
    for (index, report) in reports.iter().enumerate() {
        let first = reports[..index].iter().map(|report| report.devices.len()).sum();
        write_power(out, &letter(reports, index), report, first)?;
    }
    writeln!(out, "</div></section>")?;
    Ok(())
}

fn write_latencies(out: &mut String, all: &[Series<'_>]) -> Result<()> {
    /// Of tokens that come together, all but the first take no time that a reader would notice.
    const SHORTEST: f64 = 0.01;
    let values = all.iter().flat_map(|series| &series.device.token_ms.quantiles);
    let values = values.map(|ms| ms.max(SHORTEST));
    let axes = (
        Axis::log("milliseconds from token to token", values),
        Axis::linear("% of tokens that took no longer", [100.0].into_iter()),
    );
    let line = |series: &Series<'_>| {
        let times = series.device.token_ms.quantiles.iter().enumerate();
        let share = |step: usize| 100.0 * step as f64 / Latencies::STEPS as f64;
        let points = times.map(|(step, &ms)| (ms, share(step))).collect();
        Line { color: series.color, points, bars: Vec::new() }
    };
    let all: Vec<Line> = all.iter().map(line).collect();
    figure(out, &lines(axes, &[], &all)?, "Latency: how long a reader waits for the next token.")
}

fn write_reply_times(out: &mut String, all: &[Series<'_>]) -> Result<()> {
    const LENGTHS: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
    let line = |series: &Series<'_>| {
        let device = series.device;
        let (first, speed) = (device.first_token_ms.median, device.tokens_per_second.median);
        let point = |n| (n, first / 1e3 + (n - 1.0) / speed);
        // The sum of a constant and a line is a curve where steps are factors.
        let steps = LENGTHS.windows(2).flat_map(|pair| {
            (0..8).map(|step| pair[0] * (pair[1] / pair[0]).powf(f64::from(step) / 8.0))
        });
        let points = steps.chain([512.0]).map(point).collect();
        Line { color: series.color, points, bars: Vec::new() }
    };
    let all: Vec<Line> = all.iter().map(line).collect();
    let values = all.iter().flat_map(|line| &line.points).map(|point| point.1);
    let axes =
        (Axis::log("tokens of the reply", LENGTHS.into_iter()), Axis::log("seconds", values));
    figure(
        out,
        &lines(axes, &[], &all)?,
        "Time to the end of a reply, by the medians: where lines cross, the other device is done first.",
    )
}

fn write_depths(out: &mut String, all: &[Series<'_>]) -> Result<()> {
    let depths = || all.iter().flat_map(|series| &series.device.depths);
    if depths().next().is_none() {
        return Ok(());
    }
    let speeds = depths().flat_map(|at| [at.tokens_per_second.min, at.tokens_per_second.max]);
    let axes = (
        Axis::linear("tokens in the KV cache", depths().map(|at| at.depth as f64)),
        Axis::fitting("tokens/s", speeds),
    );
    let line = |series: &Series<'_>| {
        let depths = series.device.depths.iter().map(|at| (at.depth as f64, &at.tokens_per_second));
        Line {
            color: series.color,
            points: depths.clone().map(|(x, speed)| (x, speed.median)).collect(),
            bars: depths.map(|(x, speed)| (x, speed.min, speed.max)).collect(),
        }
    };
    let all: Vec<Line> = all.iter().map(line).collect();
    figure(
        out,
        &lines(axes, &[], &all)?,
        "Speed of replies against what is in the KV cache; bars from the least to the largest.",
    )
}

fn write_energy(out: &mut String, all: &[Series<'_>]) -> Result<()> {
    let group = |phase: fn(&DeviceReport) -> Option<&PhaseEnergy>| -> Vec<Bar> {
        let bar = |series: &Series<'_>| {
            let energy = phase(series.device)?;
            let gross = &energy.gross_joules_per_token;
            Some(Bar {
                color: series.color,
                all: gross.median,
                part: energy.net_joules_per_token.as_ref().map(|net| net.median),
                ends: (gross.min, gross.max),
            })
        };
        all.iter().filter_map(bar).collect()
    };
    let groups = [
        ("reply", group(|device| Some(&device.energy.as_ref()?.reply))),
        ("prompt", group(|device| Some(&device.energy.as_ref()?.prompt))),
    ];
    if groups.iter().all(|(_, bars)| bars.is_empty()) {
        return Ok(());
    }
    figure(
        out,
        &bars("joules per token", &groups)?,
        "Energy of a token: gross, and solid the part that is not idle power; lines from the least to the largest.",
    )
}

fn write_power(out: &mut String, letter: &str, report: &Report, first: usize) -> Result<()> {
    if report.power.iter().all(|trace| trace.points.is_empty()) {
        return Ok(());
    }
    let points = || report.power.iter().flat_map(|trace| &trace.points);
    let ends = report.windows.iter().map(|window| window.start_seconds + window.seconds);
    let axes =
        (Axis::linear("seconds", ends), Axis::linear("watts", points().map(|point| point[1])));
    // Meters take their colours from the other end.
    let color = |meter: usize| PALETTE - 1 - meter % PALETTE;
    // The line of a meter has gaps where there was no window.
    let line = |meter: usize, from: f64, to: f64| {
        let inside =
            report.power[meter].points.iter().filter(|point| point[0] >= from && point[0] <= to);
        Line {
            color: color(meter),
            points: inside.map(|p| (p[0], p[1])).collect(),
            bars: Vec::new(),
        }
    };
    let all: Vec<Line> = report
        .windows
        .iter()
        .flat_map(|window| {
            let (from, to) = (window.start_seconds, window.start_seconds + window.seconds + 1e-3);
            (0..report.power.len()).map(move |meter| line(meter, from, to))
        })
        .collect();
    let bands: Vec<Band> = report
        .windows
        .iter()
        .filter(|window| window.phase != PhaseKind::Idle)
        .filter_map(|window| {
            let (from, to) = (window.start_seconds, window.start_seconds + window.seconds);
            Some(Band { color: (first + window.device?) % PALETTE, from, to })
        })
        .collect();
    let mut meters = String::new();
    for (index, trace) in report.power.iter().enumerate() {
        let domain = report.meters.get(trace.meter).map_or("", |meter| &meter.domain);
        let color = color(index);
        write!(
            meters,
            " <span class=\"name\"><i style=\"background:var(--s{color})\"></i>{}</span>",
            escape(domain)
        )?;
    }
    let caption =
        format!("{}Power over time; shaded: which device worked. {meters}", escape(letter));
    figure(out, &lines(axes, &bands, &all)?, &caption)
}

fn write_method(out: &mut String, letter: &str, report: &Report) -> Result<()> {
    let Report { method, machine, model, .. } = report;
    writeln!(out, "<section class=\"method\"><h2>{}How it was measured</h2>", escape(letter))?;
    if !method.cautions.is_empty() {
        writeln!(out, "<ul class=\"cautions\">")?;
        for caution in &method.cautions {
            writeln!(out, "<li>{}</li>", escape(caution))?;
        }
        writeln!(out, "</ul>")?;
    }
    writeln!(out, "<ul>")?;
    for step in &method.steps {
        writeln!(out, "<li>{}</li>", escape(step))?;
    }
    writeln!(out, "</ul><dl>")?;
    let mut item = |name: &str, value: String| {
        writeln!(out, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value))
    };
    item(
        "Runs",
        format!(
            "prompts of {} tokens, replies of {} after the first; {} rounds, windows of {:.1} s or more; warm-up {:.1} s; idle {:.1} s before and after",
            method.prompt_tokens,
            method.reply_tokens,
            method.rounds,
            method.window_seconds,
            method.warm_up_seconds,
            method.idle_seconds
        ),
    )?;
    item(
        "Model",
        format!(
            "{}: {} layers, width {}, vocabulary {}; matrices {} MB, embedding {} MB, LM head {} MB",
            model.name,
            model.layers,
            model.hidden_size,
            model.vocab_size,
            megabytes(model.ternary_bytes),
            megabytes(model.embedding_bytes),
            megabytes(model.lm_head_bytes)
        ),
    )?;
    let cores = machine.physical_cores.map_or("?".to_owned(), |cores| cores.to_string());
    item(
        "Machine",
        format!(
            "{}, {cores} cores, {} threads, of which the CPU used {}; {}, kernel {}, {}",
            machine.cpu,
            machine.logical_cores,
            method.threads,
            machine.os,
            machine.kernel,
            machine.arch
        ),
    )?;
    for device in &report.devices {
        let bandwidth = device
            .bandwidth
            .as_ref()
            .map(|b| format!("; bandwidth {:.1} GB/s, {}", b.gb_per_second, b.method));
        let busy = device
            .processors_busy
            .map(|busy| format!("; {:.0} % of a processor busy during replies", 100.0 * busy));
        item(
            &device.name,
            format!(
                "{}; {}, {}; KV cache {}; loaded in {:.2} s{}{}",
                device.description,
                device.kernel,
                device.head,
                device.kv,
                device.load_seconds,
                bandwidth.unwrap_or_default(),
                busy.unwrap_or_default()
            ),
        )?;
        if let Some(energy) = &device.energy {
            let watts = |watts: Option<f64>| watts.map_or("?".to_owned(), |w| format!("{w:.2} W"));
            item(
                &format!("{} energy", device.name),
                format!(
                    "{}; idle {} before and {} after; {:.2} W while it replied",
                    energy.domain,
                    watts(energy.idle_watts_before),
                    watts(energy.idle_watts_after),
                    energy.reply.watts.median
                ),
            )?;
        }
        for note in &device.notes {
            item(&format!("{} note", device.name), note.clone())?;
        }
    }
    for meter in &report.meters {
        item(
            "Meter",
            format!(
                "{} by {}: {} [{}], windows of {:.0} s or more; {}",
                meter.domain,
                meter.source,
                meter.name,
                meter.method,
                meter.min_window_seconds,
                meter.covers
            ),
        )?;
    }
    if let Some(missing) = &report.no_meters {
        item("Not there", missing.clone())?;
    }
    let problems: BTreeSet<_> = report.windows.iter().flat_map(|window| &window.problems).collect();
    for problem in problems {
        item("Problem", problem.clone())?;
    }
    writeln!(
        out,
        "</dl><p class=\"minor\">All values are in this page, in elements <code>script.report</code>, as docs/report.schema.json describes them.</p></section>"
    )?;
    Ok(())
}

const STYLE: &str = include_str!("report.css");
