//! Measuring: what runs are, what meters make of them, and the documents that come of it.

use std::cell::Cell;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sterna::backend::{Device, HeadChoice, LoadOptions};
use sterna::config::ModelConfig;
use sterna::energy::{Files, Found, Host, Tree, discover};
use sterna::measure::bench::{BenchOptions, Kind, bench, profile};
use sterna::measure::compare::{CompareOptions, Placement, Subject, compare};
use sterna::measure::{Event, ModelReport, PhaseKind, Report};
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_bonsai, tiny_llama, tiny_normed};
use sterna::tensor_names::LINEARS;
use sterna::weights::MemorySummary;
use sterna::{Error, Transformer};
use tempfile::TempDir;

use crate::cli::{GOLDEN, failure, json, stdout, sterna};

const TEXT: [u32; 7] = [3, 1, 4, 1, 5, 9, 2];
const SCHEMA: &str = include_str!("../../docs/report.schema.json");

fn goes_on(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn load(config: ModelConfig, device: Device, options: &LoadOptions) -> Transformer {
    let source = SyntheticModel::new(config, 5);
    Transformer::load(&source, device, options, &mut |_| {}).unwrap()
}

fn bench_options() -> BenchOptions {
    BenchOptions { prompts: vec![11, 0], replies: vec![6], depths: vec![0, 9], repetitions: 3 }
}

#[test]
fn a_bench_times_every_test_and_counts_its_tokens() {
    let mut model = load(tiny_bitnet(), Device::Cpu, &LoadOptions::default());
    let (mut fed, mut made, mut stages) = (0, 0, Vec::new());
    let results = bench(&mut model, &TEXT, &bench_options(), &mut |event| {
        match event {
            Event::Stage(stage) => stages.push(stage.to_owned()),
            Event::Fed(tokens) => fed += tokens,
            Event::Token => made += 1,
            Event::Idle => panic!("nothing is idle"),
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(stages, ["pp11", "tg6", "pp11 @ 9", "tg6 @ 9"]);
    // One run of each does not count; of a reply the first token is fed alone. Depth is filled once,
    // and the token before it is there already.
    assert_eq!((fed, made), (2 * 4 * 11 + 2 * 4 + 8, 2 * 4 * 6));
    for result in &results {
        assert_eq!(result.seconds.values.len(), 3);
        let speeds = result.seconds.values.iter().map(|seconds| result.tokens as f64 / seconds);
        assert_eq!(speeds.collect::<Vec<_>>(), result.tokens_per_second.values);
        assert_eq!(result.first_token_ms.is_some(), result.kind == Kind::Prompt);
        assert_eq!(result.token_ms.is_some(), result.kind == Kind::Reply);
    }
    let times = results[1].token_ms.as_ref().unwrap();
    assert_eq!(times.count, 3 * 6);
    let error = bench(&mut model, &[], &bench_options(), &mut goes_on).unwrap_err();
    assert!(matches!(error, Error::EmptyPrompt));
    let error =
        bench(&mut model, &TEXT, &bench_options(), &mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
}

/// What a stopwatch beside the runs shows: what is not timed is the first token of each reply.
#[test]
fn speeds_are_those_of_a_stopwatch() {
    const TOKENS: usize = 120;
    let mut model = load(tiny_bitnet(), Device::Cpu, &LoadOptions::default());
    let options =
        BenchOptions { prompts: vec![], replies: vec![TOKENS], depths: vec![0], repetitions: 8 };
    let mut seen = Vec::new();
    let results = bench(&mut model, &TEXT, &options, &mut |event| {
        if event == Event::Token {
            seen.push(Instant::now());
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(seen.len(), 9 * TOKENS);
    // From the end of the run that does not count to the end of the last.
    let stopwatch = (seen[9 * TOKENS - 1] - seen[TOKENS - 1]).as_secs_f64();
    let timed: f64 = results[0].seconds.values.iter().sum();
    assert!((0.95..=1.0).contains(&(timed / stopwatch)), "{timed} s of {stopwatch} s");
    let mean = 8.0 * TOKENS as f64 / stopwatch;
    let speed = &results[0].tokens_per_second;
    assert!(speed.min * 0.95 <= mean && mean <= speed.max, "{mean}: {speed:?}");
}

/// Measuring leaves a text as it is without: the tokens are those of a plain greedy run.
#[test]
fn what_is_measured_is_what_the_model_says() {
    let options = CompareOptions { depths: vec![4], ..options() };
    let text: Vec<u32> = TEXT.iter().cycle().take(options.prompt + 1).copied().collect();
    let mut plain = load(tiny_llama(), Device::Reference, &LoadOptions::default());
    plain.prompt(&text).unwrap();
    let tokens: Vec<u32> = (0..=options.reply).map(|_| plain.next_token(1).unwrap()).collect();
    let subjects = [Device::Reference, Device::Cpu].map(|device| {
        let model = load(tiny_llama(), device, &LoadOptions::default());
        Subject::new(model, Placement::Host, (&TEXT, &options)).unwrap()
    });
    let report = run(&mut { subjects }, &mut Found::default(), &options, &mut goes_on);
    assert_eq!(report.same_tokens, Some(true));
    assert!(report.devices.iter().all(|device| device.token_ids == tokens));
}

/// A model that was loaded wrongly is found out.
#[test]
fn other_tokens_are_said_to_be_others() {
    let options = options();
    let subject = |seed| {
        let source = SyntheticModel::new(tiny_bitnet(), seed);
        let load = LoadOptions::default();
        Subject::load(&source, Device::Cpu, &load, (&TEXT, &options), &mut |_| {}).unwrap()
    };
    let mut subjects = [subject(1), subject(2)];
    let report = run(&mut subjects, &mut Found::default(), &options, &mut goes_on);
    assert_eq!(report.same_tokens, Some(false));
    assert_ne!(report.devices[0].token_ids, report.devices[1].token_ids);
    assert!(report.devices[0].load_seconds > 0.0);
}

/// The bytes that a pass is counted to read are those that `inspect` shows.
#[test]
fn bytes_are_those_of_the_weights() {
    // Rows in whole tiles: what is packed together has no other padding than what is packed alone.
    let whole = |config| ModelConfig { vocab_size: 320, ..config };
    let square = |config| ModelConfig {
        hidden_size: 128,
        intermediate_size: 256,
        num_attention_heads: 4,
        head_dim: 32,
        ..whole(config)
    };
    for config in [
        square(tiny_bitnet()),
        square(tiny_llama()),
        square(tiny_normed()),
        whole(tiny_bonsai(2, 128)),
        whole(tiny_bonsai(1, 128)),
    ] {
        let memory = MemorySummary::synthetic(&config);
        let options = LoadOptions { head: HeadChoice::Exact, ..LoadOptions::default() };
        let mut model = load(config.clone(), Device::Cpu, &options);
        let tests = BenchOptions { prompts: vec![], repetitions: 1, ..bench_options() };
        let results = bench(&mut model, &TEXT, &tests, &mut goes_on).unwrap();
        let layers = config.num_hidden_layers as u64;
        let rows: u64 = LINEARS.iter().map(|linear| (linear.shape)(&config).0 as u64).sum();
        let widths: u64 = LINEARS.iter().map(|linear| (linear.shape)(&config).1 as u64).sum();
        // Beside the weights, the scale of each row, or nothing where groups have theirs.
        let is_packed = memory.embedding < 2 * (config.vocab_size * config.hidden_size) as u64;
        let scales = if is_packed { 0 } else { 4 * layers * rows };
        let head = if memory.lm_head > 0 { memory.lm_head } else { memory.embedding };
        let looked_up = memory.embedding / config.vocab_size as u64;
        let expected = memory.ternary + memory.norms + scales + head + looked_up;
        let found = results[0].weight_bytes_per_token.unwrap();
        // The norms inside linear layers are none of the model's own norms; matrices with one input
        // share one.
        let inner = if config.linear_norm_eps.is_some() { 4 * layers * widths } else { 0 };
        assert!(
            found >= expected as f64 && found <= (expected + inner) as f64,
            "{config:?}: expected {expected} to {}, found {found}",
            expected + inner
        );
        // Positions 1 to 7 of f32 keys and values, by six tokens.
        let position = 2 * 4 * config.num_hidden_layers * config.kv_size();
        let mean = (2..=7).sum::<usize>() as f64 / 6.0;
        assert_eq!(results[0].cache_bytes_per_token, Some(mean * position as f64));
    }
}

#[test]
fn a_profile_has_every_step() {
    let mut model = load(tiny_bitnet(), Device::Cpu, &LoadOptions::default());
    let profile = profile(&mut model, &TEXT, (5, 4), &mut goes_on).unwrap().unwrap();
    assert_eq!(profile.clock, "the host's");
    let mut calls: Vec<_> =
        profile.parts.iter().map(|part| (part.name, part.calls_per_token)).collect();
    calls.sort_by_key(|(name, _)| *name);
    let each = |name| (name, 3.0);
    let layers = ["attend", "down", "gate_up", "project_out", "qkv"].map(each);
    let mut expected = vec![("choose", 1.0), ("embed", 1.0), ("head", 1.0)];
    expected.extend(layers);
    expected.sort_by_key(|(name, _)| *name);
    assert_eq!(calls, expected);
    let shares: f64 = profile.parts.iter().map(|part| part.share).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{shares}");
    // Nothing is timed afterwards.
    assert_eq!(model.end_profile().unwrap(), []);
}

fn options() -> CompareOptions {
    CompareOptions {
        prompt: 6,
        reply: 8,
        depths: vec![],
        rounds: 2,
        window: Some(Duration::ZERO),
        warm_up: Duration::ZERO,
        idle: Duration::ZERO,
    }
}

fn model_report(config: &ModelConfig) -> ModelReport {
    ModelReport::new("m", config, MemorySummary::synthetic(config), true)
}

fn run(
    subjects: &mut [Subject],
    found: &mut Found,
    options: &CompareOptions,
    observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Report {
    let about = (model_report(&tiny_bitnet()), &TEXT[..], 1);
    compare(subjects, about, found, options, observe).unwrap()
}

/// A machine of one package whose counter goes up by what it is told.
struct Meters {
    root: TempDir,
    microjoules: Rc<Cell<u64>>,
}

const ZONE: &str = "sys/class/powercap/intel-rapl:0";

impl Meters {
    fn new() -> Self {
        let meters =
            Self { root: TempDir::new().unwrap(), microjoules: Rc::new(Cell::new(5_000_000)) };
        meters.write("name", "package-0");
        meters.write("max_energy_range_uj", "262143328850");
        meters.use_joules(0.0);
        meters
    }

    fn write(&self, file: &str, text: &str) {
        let directory = self.root.path().join(ZONE);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(file), format!("{text}\n")).unwrap();
    }

    fn use_joules(&self, joules: f64) {
        self.microjoules.set(self.microjoules.get() + (joules * 1e6).round() as u64);
        self.write("energy_uj", &self.microjoules.get().to_string());
    }

    fn discover(&self) -> Found {
        let files: Rc<dyn Files> = Rc::new(Tree(self.root.path().to_owned()));
        let nvml = Err("libnvidia-ml.so.1 not found".to_owned());
        discover(&Host { files: Some(files), perf: None, report: None, nvml })
    }
}

/// A package that uses so much for each token of a prompt and of a reply.
fn energy_report(prompt: f64, reply: f64, idle: f64, options: &CompareOptions) -> Report {
    let meters = Meters::new();
    let mut found = meters.discover();
    assert_eq!(found.meters.len(), 1, "{}", found.summary());
    let model = load(tiny_bitnet(), Device::Cpu, &LoadOptions::default());
    let mut subjects = [Subject::new(model, Placement::Host, (&TEXT, options)).unwrap()];
    let mut observe = |event: Event<'_>| {
        match event {
            Event::Fed(tokens) => meters.use_joules(prompt * tokens as f64),
            Event::Token => meters.use_joules(reply),
            Event::Idle => meters.use_joules(idle),
            Event::Stage(_) => {}
        }
        ControlFlow::Continue(())
    };
    run(&mut subjects, &mut found, options, &mut observe)
}

#[test]
fn known_joules_are_the_joules_per_token() {
    let options = CompareOptions { rounds: 3, ..options() };
    let report = energy_report(0.002, 0.01, 0.0, &options);
    let energy = report.devices[0].energy.as_ref().unwrap();
    assert_eq!((energy.domain.as_str(), &energy.meters[..]), ("package 0", &[0][..]));
    // A run of a reply feeds one token of the prompt, hands out one at once and eight on the clock.
    let reply = (0.002 + 8.0 * 0.01) / 9.0;
    for (phase, expected) in [(&energy.prompt, 0.002), (&energy.reply, reply)] {
        let gross = &phase.gross_joules_per_token;
        assert_eq!(gross.values.len(), 3);
        assert!(gross.values.iter().all(|joules| (joules - expected).abs() < 1e-9), "{gross:?}");
        assert!((phase.tokens_per_joule * expected - 1.0).abs() < 1e-6);
        assert_eq!(phase.net_joules_per_token, None);
        assert_eq!(phase.joules_per_token_by_meter.len(), 1);
    }
    assert_eq!(report.devices[0].energy_problem, None);
    let cautions = report.method.cautions.join("; ");
    assert!(cautions.contains("shorter than the 10 s"), "{cautions}");
    assert!(cautions.contains("no idle baseline"), "{cautions}");
    // The windows hold the same joules as the trace of power.
    let all: f64 = report.windows.iter().map(|window| window.joules[0].unwrap()).sum();
    let expected = 3.0 * (6.0 * 0.002 + 9.0 * reply);
    assert!((all - expected).abs() < 1e-9, "{all}");
    // Nothing but that they are shorter than the meter would have them.
    let problems: Vec<_> = report.windows.iter().flat_map(|window| &window.problems).collect();
    assert!(problems.iter().all(|problem| problem.contains("are short")), "{problems:?}");
}

/// An idle machine's power is taken off for as long as a window lasted.
#[test]
fn net_joules_are_without_idle_power() {
    let options = CompareOptions { idle: Duration::from_millis(350), ..options() };
    let report = energy_report(0.001, 0.002, 0.25, &options);
    let energy = report.devices[0].energy.as_ref().unwrap();
    let idle: Vec<_> =
        report.windows.iter().filter(|window| window.phase == PhaseKind::Idle).collect();
    let watts: Vec<f64> =
        idle.iter().map(|window| window.joules[0].unwrap() / window.seconds).collect();
    assert_eq!(
        [energy.idle_watts_before, energy.idle_watts_after],
        [Some(watts[0]), Some(watts[1])]
    );
    // Ticks of 0.1 s and 0.25 J; a busy machine is late.
    assert!(watts.iter().all(|watts| (0.5..=2.6).contains(watts)), "{watts:?}");
    let replies: Vec<_> =
        report.windows.iter().filter(|window| window.phase == PhaseKind::Reply).collect();
    let net = energy.reply.net_joules_per_token.as_ref().unwrap();
    for (window, net) in replies.iter().zip(&net.values) {
        let used = window.joules[0].unwrap() - (watts[0] + watts[1]) / 2.0 * window.seconds;
        assert!((net - used / window.tokens as f64).abs() < 1e-12, "{net}");
    }
}

#[test]
fn a_meter_that_stands_still_or_fails_gives_no_joules() {
    let report = energy_report(0.0, 0.0, 0.0, &options());
    assert_eq!(report.devices[0].energy, None);
    let problem = report.devices[0].energy_problem.as_ref().unwrap();
    assert!(problem.contains("stood still"), "{problem}");

    let meters = Meters::new();
    let mut found = meters.discover();
    let options = options();
    let model = load(tiny_bitnet(), Device::Cpu, &LoadOptions::default());
    let mut subjects = [Subject::new(model, Placement::Host, (&TEXT, &options)).unwrap()];
    let report = run(&mut subjects, &mut found, &options, &mut |event| {
        if event == Event::Token {
            meters.write("energy_uj", "broken");
        }
        ControlFlow::Continue(())
    });
    assert_eq!(report.devices[0].energy, None);
    let problem = report.devices[0].energy_problem.as_ref().unwrap();
    assert!(problem.contains("a meter failed") && problem.contains("broken"), "{problem}");
    assert!(report.devices[0].tokens_per_second.median > 0.0);
}

#[test]
fn a_discrete_gpu_needs_a_meter_of_its_own() {
    let options = options();
    let kind = sterna::backend::gpu::AdapterKind::Discrete;
    let placement = Placement::Adapter { kind, pci: "0000:65:00.0".to_owned() };
    let model = load(tiny_bitnet(), Device::Cpu, &LoadOptions::default());
    let mut subjects = [Subject::new(model, placement, (&TEXT, &options)).unwrap()];
    let report = run(&mut subjects, &mut Meters::new().discover(), &options, &mut goes_on);
    let problem = report.devices[0].energy_problem.as_ref().unwrap();
    assert!(problem.contains("libnvidia-ml.so.1 not found"), "{problem}");
    assert_eq!(report.devices[0].energy, None);
}

fn validator() -> jsonschema::Validator {
    jsonschema::validator_for(&serde_json::from_str(SCHEMA).unwrap()).unwrap()
}

#[track_caller]
fn assert_valid(report: &Value) {
    let validator = validator();
    let problems: Vec<_> =
        validator.iter_errors(report).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(problems.is_empty(), "{problems:?}");
}

#[test]
fn reports_are_what_the_schema_says() {
    let options =
        CompareOptions { idle: Duration::from_millis(120), depths: vec![0, 3], ..options() };
    let with_energy = serde_json::to_value(energy_report(0.01, 0.01, 0.001, &options)).unwrap();
    assert_valid(&with_energy);
    assert!(with_energy["power"][0]["points"].as_array().is_some_and(|points| !points.is_empty()));
    let command = format!(
        "compare -m {GOLDEN}/bitnet-a-packed --devices ref,cpu -p 5 -n 4 -d 0,7 -r 2 --window 0 \
         --warm-up 0 --json"
    );
    let without = json(sterna(&command));
    assert_valid(&without);
    assert_eq!(without["same_tokens"], true);
    assert_eq!(without["devices"][1]["name"], "cpu");
    // The schema can object.
    for (path, wrong) in [
        ("/format", json!(2)),
        ("/made", json!("yesterday")),
        ("/devices/0/token_ms/p95", json!("fast")),
        ("/devices/0/first_token_ms/median", json!(null)),
        ("/windows/0/phase", json!("lunch")),
        ("/devices", json!([])),
    ] {
        let mut report = with_energy.clone();
        *report.pointer_mut(path).unwrap() = wrong;
        assert!(!validator().is_valid(&report), "{path}");
        let error = Report::from_json("r.json", report.to_string().as_bytes());
        // Dates are for the schema only.
        assert_eq!(error.is_err(), path != "/made", "{path}");
    }
    let mut report = with_energy;
    report["extra"] = json!(1);
    assert!(!validator().is_valid(&report));
    assert!(Report::from_json("r.json", report.to_string().as_bytes()).is_err());
}

#[test]
fn reports_that_are_none_are_refused_by_file_and_key() {
    let report = serde_json::to_value(energy_report(0.01, 0.01, 0.0, &options())).unwrap();
    let changed = |path: &str, wrong: Value| {
        let mut report = report.clone();
        *report.pointer_mut(path).expect(path) = wrong;
        report.to_string()
    };
    let directory = TempDir::new().unwrap();
    let (bad, out) = (directory.path().join("bad.json"), directory.path().join("out.html"));
    for (text, words) in [
        (String::new(), &["the file", "EOF"][..]),
        ("[]".to_owned(), &["the file", "expected"]),
        ("{\"format\": 1".to_owned(), &["EOF"]),
        (report.to_string() + "{}", &["the file", "trailing"]),
        (changed("/format", json!(9)), &["format: expected 1, found 9"]),
        (changed("/format", json!(-1)), &["format", "u32", "-1"]),
        (
            changed("/devices/0/load_seconds", json!("x")),
            &["devices[0].load_seconds", "\"x\"", "f64"],
        ),
        (changed("/devices/0/name", json!(7)), &["devices[0].name", "expected a string", "7"]),
        (changed("/windows/0/device", json!(4)), &["windows[0].device", "less than 1", "found 4"]),
        (changed("/windows/1/joules", json!([])), &["windows[1].joules", "1 values", "found 0"]),
        (changed("/power/0/meter", json!(1)), &["power[0].meter", "less than 1", "found 1"]),
        (changed("/devices/0/energy/meters", json!([3])), &["devices[0].energy.meters", "found 3"]),
        (
            changed("/devices/0/token_ms/quantiles", json!([1.0])),
            &["quantiles", "201 values", "found 1"],
        ),
        (
            changed("/devices/0/tokens_per_second/min", json!(-1)),
            &["tokens_per_second", "0 < min", "-1"],
        ),
        (
            changed("/power/0/points", json!([[1.0, 1e300]])),
            &["power[0].points[0][1]", "1e18", "1e+300"],
        ),
        (
            changed("/windows", json!(vec![&report["windows"][0]; 5000])),
            &["windows", "at most 4096", "5000"],
        ),
        (changed("/devices/0/first_token_ms/max", json!(0)), &["first_token_ms", "max"]),
    ] {
        fs::write(&bad, text).unwrap();
        let (bad, out) = (bad.display(), out.display());
        let message = failure(sterna(&format!("compare --merge {bad} --report {out}")), 1);
        assert!(message.contains("bad.json"), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
    }
    let nowhere = directory.path().join("nowhere.json");
    let command = format!("compare --merge {} --report {}", nowhere.display(), out.display());
    let message = failure(sterna(&command), 1);
    assert!(message.contains("nowhere.json"), "{message}");
    // Nothing is left behind.
    let names: Vec<_> =
        fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["bad.json"]);
}

fn page(directory: &Path, reports: &[Value]) -> String {
    let mut files = Vec::new();
    for (index, report) in reports.iter().enumerate() {
        let path = directory.join(format!("{index}.json"));
        fs::write(&path, report.to_string()).unwrap();
        files.push(path.display().to_string());
    }
    let out = directory.join("out.html");
    stdout(sterna(&format!("compare --merge {} --report {}", files.join(" "), out.display())));
    fs::read_to_string(out).unwrap()
}

/// The texts of the page's reports.
fn embedded(page: &str) -> Vec<Value> {
    let scripts = page.split("<script type=\"application/json\" class=\"report\">").skip(1);
    scripts.map(|s| serde_json::from_str(s.split("</script>").next().unwrap()).unwrap()).collect()
}

#[test]
fn a_page_has_charts_and_its_data_and_needs_nothing_else() {
    let options =
        CompareOptions { idle: Duration::from_millis(120), depths: vec![0, 3], ..options() };
    let report = serde_json::to_value(energy_report(0.01, 0.02, 0.001, &options)).unwrap();
    let directory = TempDir::new().unwrap();
    let page = page(directory.path(), &[report.clone(), report.clone()]);
    assert_eq!(embedded(&page), [report.clone(), report]);
    // Latency, length, depth, energy, and the power of each.
    assert_eq!(page.matches("<svg").count(), 6);
    assert_eq!(page.matches("<figcaption>").count(), 6);
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("currentColor"));
    // A drawing's colours are the page's.
    let drawings: String =
        page.split("<svg").skip(1).map(|s| s.split("</svg>").next().unwrap()).collect();
    assert!(!drawings.contains("=\"#"), "{drawings}");
    for loads in ["http://", "https://", " src=", "@import", "url(", "<link"] {
        let page = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!page.contains(loads), "{loads}");
    }
}

#[test]
fn markup_in_a_report_is_text() {
    const EVIL: &str = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>&\"\u{1b}";
    fn poison(value: &mut Value) {
        match value {
            Value::String(text) if !["idle", "prompt", "reply"].contains(&text.as_str()) => {
                *text = EVIL.to_owned();
            }
            Value::Array(values) => values.iter_mut().for_each(poison),
            Value::Object(map) => map.values_mut().for_each(poison),
            _ => {}
        }
    }
    let mut report = serde_json::to_value(energy_report(0.01, 0.02, 0.0, &options())).unwrap();
    report["devices"][0]["notes"] = json!(["x"]);
    report["verdicts"] = json!(["x"]);
    report["no_meters"] = json!("x");
    report["windows"][0]["problems"] = json!(["x"]);
    poison(&mut report);
    let directory = TempDir::new().unwrap();
    let page = page(directory.path(), &[report.clone(), report.clone()]);
    assert_eq!(embedded(&page), [report.clone(), report]);
    assert!(page.contains("&lt;/script&gt;&lt;script&gt;alert(1)"), "it is shown");
    for live in ["<script>", "<img", "onerror='", "\u{1b}"] {
        let scripts = page.split("<script type=\"application/json\"").skip(1);
        let outside = page.split("<script type=\"application/json\"").next().unwrap();
        assert!(!outside.contains(live), "{live:?}");
        // Data may hold quotes, but nothing that ends it.
        assert!(scripts.clone().all(|s| !s.contains("<script>") && !s.contains("<img")));
    }
}

#[test]
fn compare_and_bench_refuse_what_makes_no_sense() {
    let directory = TempDir::new().unwrap();
    let json = directory.path().join("x.json").display().to_string();
    for (arguments, code, part) in [
        ("compare --devices cpu,cpu", 2, "twice"),
        ("compare --devices cuda", 2, "expected auto, gpu, gpu:N, cpu or ref"),
        ("compare --synthetic gpt-2", 2, "gpt-2"),
        ("compare --synthetic bitnet-2b4t -m x", 2, "--model"),
        ("compare --merge x", 2, "--report"),
        ("compare --merge x --report y.html --json", 2, "--json"),
        ("compare --window -1", 2, "--window"),
        ("compare --rounds 0", 2, "--rounds"),
        ("compare --devices cpu -p 2000", 1, "context"),
        ("compare --devices cpu -d 1000", 1, "context"),
        ("compare --devices gpu:99", 1, "gpu:99"),
        ("compare --report no-such-directory/r.html", 1, "no-such-directory"),
        ("bench --json --csv", 2, "--csv"),
        ("bench -p 0 -n 0", 2, "nothing to measure"),
        ("bench -p x", 2, "--prompt"),
        ("bench --device cpu -d 1000", 1, "context"),
        ("bench --gemv gemv_planes", 2, "--dry-run"),
        ("bench --dry-run -d 5", 2, "--depth"),
        ("bench --dry-run -p 1,2", 2, "--prompt"),
        ("bench --device ref --synthetic llama3-8b --context 99999", 1, "99999"),
        ("inspect --synthetic bitnet-2b4t --sparsity", 2, "--sparsity"),
    ] {
        let message = failure(sterna(arguments), code);
        assert!(message.contains(part), "{arguments}: {message}");
    }
    let message = failure(sterna(&format!("compare --report {json}")), 2);
    assert!(message.contains("FILE.html"), "{message}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn bench_prints_tables_and_json() {
    let command = format!("bench -m {GOLDEN}/bitnet-a-packed --device cpu -p 5,9 -n 4 -d 0,3 -r 2");
    let tests = ["pp5", "pp9", "tg4", "pp5 @ 3", "pp9 @ 3", "tg4 @ 3"];
    let report = json(sterna(&format!("{command} --profile --json")));
    let names: Vec<_> =
        report["tests"].as_array().unwrap().iter().map(|t| t["test"].clone()).collect();
    assert_eq!(names, tests);
    let test = &report["tests"][2];
    assert_eq!(
        (&test["kind"], &test["tokens"], &test["depth"]),
        (&json!("reply"), &json!(4), &json!(0))
    );
    assert_eq!(test["tokens_per_second"]["values"].as_array().unwrap().len(), 2);
    let speed = test["read_gb_per_second"].as_f64().unwrap();
    let roof = report["bandwidth"]["gb_per_second"].as_f64().unwrap();
    assert!((test["share_of_bandwidth"].as_f64().unwrap() - speed / roof).abs() < 1e-12);
    assert!(!report["profile"]["parts"].as_array().unwrap().is_empty());
    let inspected = json(sterna(&format!("inspect {GOLDEN}/bitnet-a-packed --json")));
    assert_eq!(report["model"]["ternary_bytes"], inspected["memory"]["ternary_bytes"]);
    assert_eq!(report["model"]["embedding_bytes"], inspected["memory"]["embedding_bytes"]);

    if cfg!(target_os = "linux") {
        let weights = inspected["memory"]["ternary_bytes"].as_u64().unwrap();
        let memory = report["memory"]["host_bytes"].as_u64().unwrap();
        // What is measured before the load takes 256 MiB, which are none of the model's.
        assert!(memory > weights && memory < 200 << 20, "{memory}");
    }

    let table = stdout(sterna(&format!("{command} --csv")));
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 1 + tests.len());
    let markdown = stdout(sterna(&format!("{command} --markdown")));
    let text = stdout(sterna(&command));
    for test in tests {
        assert!(markdown.contains(&format!("| {test} |")), "{markdown}");
        assert!(text.lines().any(|line| line.starts_with(&format!("{test} "))), "{text}");
        assert!(lines.iter().any(|line| line.contains(&format!(",{test},"))), "{table}");
    }
}

#[test]
fn inspect_knows_the_shapes_that_are_filled_at_random() {
    let report = json(sterna("inspect --synthetic bitnet-2b4t --json"));
    // Two bits for each of 2.08 × 10⁹ weights; 128,256 × 2560 of bf16.
    assert_eq!(report["memory"]["ternary_bytes"], 521_011_200);
    assert_eq!(report["memory"]["embedding_bytes"], 128_256 * 2560 * 2);
    assert!(stdout(sterna("inspect --synthetic falcon-e-1b")).contains("24 layers"));
}
