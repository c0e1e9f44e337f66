//! What a comparison means, in words.

use super::Spread;
use super::report::DeviceReport;

/// The first device against each of the others; one sentence each.
pub(super) fn verdicts(devices: &[DeviceReport]) -> Vec<String> {
    let Some((first, others)) = devices.split_first() else { return Vec::new() };
    others.iter().map(|other| verdict(first, other)).collect()
}

fn verdict(base: &DeviceReport, other: &DeviceReport) -> String {
    let mut parts = vec![
        speed(&base.tokens_per_second, &other.tokens_per_second, "writes"),
        speed(&base.prompt_tokens_per_second, &other.prompt_tokens_per_second, "reads prompts"),
    ];
    let joules = |device: &DeviceReport| {
        device.energy.as_ref().map(|energy| energy.reply.gross_joules_per_token.clone())
    };
    match (joules(base), joules(other)) {
        (Some(base), Some(other)) => parts.push(energy(&base, &other)),
        _ => parts.push("energy cannot be compared".to_owned()),
    }
    parts.push(first_answer(base, other));
    format!("{} against {}: {}", other.name, base.name, parts.join("; "))
}

fn speed(base: &Spread, other: &Spread, verb: &str) -> String {
    if base.overlaps(other) {
        return format!("{verb} no faster and no slower, as far as these runs show");
    }
    match other.median > base.median {
        true => format!("{verb} {} × as fast", times(other.median / base.median)),
        false => format!("{verb} {} × slower", times(base.median / other.median)),
    }
}

fn energy(base: &Spread, other: &Spread) -> String {
    if base.overlaps(other) {
        return "takes as many joules per token, as far as these runs show".to_owned();
    }
    match other.median > base.median {
        true => format!("{} × more joules per token", times(other.median / base.median)),
        false => format!("{} × fewer joules per token", times(base.median / other.median)),
    }
}

/// Which device is done first with a reply of how many tokens.
fn first_answer(base: &DeviceReport, other: &DeviceReport) -> String {
    let line = |device: &DeviceReport| {
        (device.first_token_ms.median, 1e3 / device.tokens_per_second.median)
    };
    let ((base_first, base_step), (other_first, other_step)) = (line(base), line(other));
    let (sooner, later) = match base_first <= other_first {
        true => (&base.name, &other.name),
        false => (&other.name, &base.name),
    };
    // The one that begins later catches up if its tokens take less time.
    let (head_start, gain) = match base_first <= other_first {
        true => (other_first - base_first, base_step - other_step),
        false => (base_first - other_first, other_step - base_step),
    };
    if gain <= 0.0 {
        return format!("{sooner} is done first with a reply of any length");
    }
    match (1.0 + head_start / gain).ceil() {
        tokens if tokens <= 2.0 => {
            format!("{later} is done first with all but the shortest replies")
        }
        tokens => format!("for replies under {tokens:.0} tokens {sooner} is done first"),
    }
}

/// A ratio with two digits or so.
fn times(ratio: f64) -> String {
    match ratio {
        ratio if ratio < 1.095 => format!("{ratio:.2}"),
        ratio if ratio < 99.5 => format!("{ratio:.1}"),
        ratio => format!("{ratio:.0}"),
    }
}
