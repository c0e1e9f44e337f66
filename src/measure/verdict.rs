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
    let begins_alike = base.first_token_ms.overlaps(&other.first_token_ms);
    let goes_alike = base.tokens_per_second.overlaps(&other.tokens_per_second);
    let (sooner, later) = match base.first_token_ms.median <= other.first_token_ms.median {
        true => (base, other),
        false => (other, base),
    };
    let faster = match base.tokens_per_second.median >= other.tokens_per_second.median {
        true => base,
        false => other,
    };
    let head_start = later.first_token_ms.median - sooner.first_token_ms.median;
    match (begins_alike, goes_alike) {
        (true, true) => "neither is done first, as far as these runs show".to_owned(),
        (false, true) => {
            format!("{} has its first token {head_start:.0} ms earlier", sooner.name)
        }
        (true, false) => format!("{} is done first with all but the shortest replies", faster.name),
        (false, false) if sooner.name == faster.name => {
            format!("{} is done first with a reply of any length", sooner.name)
        }
        (false, false) => {
            // The one that begins later catches up.
            let step = |device: &DeviceReport| 1e3 / device.tokens_per_second.median;
            let tokens = (1.0 + head_start / (step(sooner) - step(later))).ceil().max(2.0);
            format!("for replies under {tokens:.0} tokens {} is done first", sooner.name)
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Latencies, MemoryReport};

    /// A device with its first token after so many milliseconds, and so many tokens a second.
    fn device(name: &str, first_token_ms: f64, speed: f64) -> DeviceReport {
        let spread = |value: f64| Spread::of(vec![0.99 * value, value, 1.01 * value]).unwrap();
        DeviceReport {
            name: name.to_owned(),
            description: String::new(),
            kernel: String::new(),
            head: String::new(),
            kv: String::new(),
            notes: Vec::new(),
            load_seconds: 1.0,
            memory: MemoryReport { host_bytes: None, device_bytes: None },
            bandwidth: None,
            first_token_ms: spread(first_token_ms),
            prompt_tokens_per_second: spread(1e3 / first_token_ms),
            tokens_per_second: spread(speed),
            token_ms: Latencies::of_seconds(&[1.0 / speed]).unwrap(),
            weight_bytes_per_token: None,
            cache_bytes_per_token: None,
            read_gb_per_second: None,
            processors_busy: None,
            depths: Vec::new(),
            energy: None,
            energy_problem: None,
            token_ids: Vec::new(),
        }
    }

    #[track_caller]
    fn assert_says(base: DeviceReport, other: DeviceReport, words: &[&str]) {
        let [verdict] = verdicts(&[base, other]).try_into().unwrap();
        assert!(words.iter().all(|words| verdict.contains(words)), "{verdict}");
    }

    #[test]
    fn a_verdict_says_who_is_faster_and_from_where_on() {
        // 90 ms later, and 10 ms a token instead of 30: four steps and a half make up for it.
        let words = ["gpu:0 against cpu: writes 3.0 × as fast", "reads prompts 1.9 × slower"];
        let (cpu, gpu) = (device("cpu", 100.0, 100.0 / 3.0), device("gpu:0", 190.0, 100.0));
        assert_says(cpu.clone(), gpu.clone(), &words);
        assert_says(cpu.clone(), gpu.clone(), &["for replies under 6 tokens cpu is done first"]);
        assert_says(
            gpu,
            cpu.clone(),
            &["cpu against gpu:0: writes 3.0 × slower", "under 6 tokens cpu"],
        );
        let gpu = device("gpu:0", 50.0, 100.0);
        assert_says(cpu.clone(), gpu, &["gpu:0 is done first with a reply of any length"]);
        let gpu = device("gpu:0", 100.5, 100.0);
        assert_says(cpu.clone(), gpu, &["gpu:0 is done first with all but the shortest"]);
        assert_says(
            cpu,
            device("gpu:0", 20.0, 33.0),
            &["no faster and no slower", "80 ms earlier"],
        );
    }

    #[test]
    fn what_cannot_be_told_apart_is_not() {
        let words = ["writes no faster and no slower", "neither is done first", "energy cannot"];
        assert_says(device("cpu", 100.0, 50.0), device("gpu:0", 101.0, 50.4), &words);
        assert_eq!(verdicts(&[device("cpu", 1.0, 1.0)]), [""; 0]);
    }

    #[test]
    fn energy_is_a_ratio() {
        let spread = |value: f64| Spread::of(vec![0.9 * value, value, 1.1 * value]).unwrap();
        assert_eq!(energy(&spread(1.0), &spread(1.4)), "1.4 × more joules per token");
        assert_eq!(energy(&spread(3.0), &spread(1.0)), "3.0 × fewer joules per token");
        assert!(energy(&spread(1.0), &spread(1.1)).contains("as far as these runs show"));
    }
}
