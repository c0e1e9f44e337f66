//! Several devices with one model, in turns.

use std::time::{Duration, Instant};

use super::bandwidth::Bandwidth;
use super::energy::{energy_of, meters_of};
use super::machine::{Machine, MemoryMark, processor_seconds};
use super::runs::{Runner, tell};
use super::verdict::verdicts;
use super::{
    DepthReport, DeviceReport, Event, FORMAT, Latencies, MemoryReport, MeterReport, Method,
    ModelReport, OnEvent, PhaseKind, PowerTrace, Report, Spread, WindowReport,
};
use crate::backend::gpu::{AdapterKind, adapters};
use crate::backend::{Device, LoadOptions, OnProgress, Traffic};
use crate::config::ModelConfig;
use crate::energy::{Found, Meter, MeterInfo, Window};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::session::snapshot::format_name;
use crate::weights::{MemorySummary, WeightSource};

/// The length of a window where no meter asks for more.
const WINDOW: Duration = Duration::from_secs(3);
/// After work, a machine is not idle at once.
const SETTLE: Duration = Duration::from_secs(1);
/// Between looks at the meters of an idle machine.
const TICK: Duration = Duration::from_millis(100);
/// Baselines that differ by more than this share are reported.
const IDLE_DRIFT: f64 = 0.1;
/// Fewer windows of a kind are reported.
const MIN_ROUNDS: usize = 5;

/// What is run, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompareOptions {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of a reply after its first.
    pub reply: usize,
    /// Tokens in the KV cache at which the speed is measured, beside the prompt's length.
    pub depths: Vec<usize>,
    /// Windows of each kind on each device.
    pub rounds: usize,
    /// Length of a window; `None`: the longest that a meter in use asks for, 3 s without one.
    pub window: Option<Duration>,
    /// How long each device works before anything counts.
    pub warm_up: Duration,
    /// Length of the idle baselines, before and after; 0 is none.
    pub idle: Duration,
}

impl CompareOptions {
    /// Fails where a context does not hold the runs, or there is nothing to run.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::Dimension`] or [`Error::ContextOverflow`].
    pub fn check(&self, capacity: usize) -> Result<()> {
        if self.prompt == 0 {
            return Err(Error::EmptyPrompt);
        }
        for (name, found) in [("tokens of a reply", self.reply), ("rounds", self.rounds)] {
            if found == 0 {
                return Err(Error::Dimension { name, found, max: capacity });
            }
        }
        let deepest = self.depths.iter().copied().max().unwrap_or_default().max(self.prompt);
        let needed = deepest + 1 + self.reply;
        if needed > capacity {
            return Err(Error::ContextOverflow { needed, capacity });
        }
        Ok(())
    }
}

/// Where a model runs, as far as the choice of its meters goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// The processor.
    Host,
    /// A GPU.
    Adapter {
        /// Of which kind.
        kind: AdapterKind,
        /// Its PCI address; empty where that is not known.
        pci: String,
    },
}

/// A model that was loaded on a device and has run there once.
pub struct Subject {
    transformer: Transformer,
    placement: Placement,
    load_seconds: f64,
    memory: MemoryReport,
    bandwidth: Option<Bandwidth>,
    token_ids: Vec<u32>,
}

impl Subject {
    /// Loads a model on a device and has it reply to the text once.
    ///
    /// # Errors
    /// If the device is not there, a tensor is malformed, the runs do not fit the context, or the
    /// device fails.
    pub fn load(
        source: &dyn WeightSource,
        device: Device,
        load: &LoadOptions,
        (text, options): (&[u32], &CompareOptions),
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        options.check(load.capacity(source.config())?)?;
        let (mark, start) = (MemoryMark::set(), Instant::now());
        let transformer = Transformer::load(source, device, load, progress)?;
        let load_seconds = start.elapsed().as_secs_f64();
        let mut subject = Self::new(transformer, placement(device)?, (text, options))?;
        subject.load_seconds = load_seconds;
        subject.memory.host_bytes = mark.peak();
        Ok(subject)
    }

    /// A model that is loaded already; what its load took is not known.
    ///
    /// # Errors
    /// If the runs do not fit the context, or the device fails.
    pub fn new(
        mut transformer: Transformer,
        placement: Placement,
        (text, options): (&[u32], &CompareOptions),
    ) -> Result<Self> {
        options.check(transformer.capacity())?;
        let mut runner = Runner::new(&mut transformer, text)?;
        let goes_on = &mut |_: Event<'_>| std::ops::ControlFlow::Continue(());
        let token_ids = runner.reply(options.prompt, options.reply, goes_on)?.tokens;
        let device_bytes = transformer.device_bytes();
        let memory = MemoryReport { host_bytes: None, device_bytes };
        let (load_seconds, bandwidth) = (0.0, None);
        Ok(Self { transformer, placement, load_seconds, memory, bandwidth, token_ids })
    }

    /// The same, with what the device's memory gives.
    #[must_use]
    pub fn with_bandwidth(self, bandwidth: Bandwidth) -> Self {
        Self { bandwidth: Some(bandwidth), ..self }
    }

    fn name(&self) -> &str {
        &self.transformer.device().name
    }
}

/// Where a device is; `auto` has been resolved.
fn placement(device: Device) -> Result<Placement> {
    let Device::Gpu(index) = device else { return Ok(Placement::Host) };
    let all = adapters();
    let adapter = match index {
        Some(index) => all.get(index),
        None => all.iter().filter(|a| a.api != "gl").min_by_key(|a| (a.kind, a.index)),
    };
    let adapter = adapter.ok_or_else(|| Error::NoAdapter {
        wanted: "gpu".to_owned(),
        found: "the adapter is gone".to_owned(),
    })?;
    Ok(Placement::Adapter { kind: adapter.kind, pci: adapter.pci.clone() })
}

impl ModelReport {
    /// Of a model.
    pub fn new(
        name: &str,
        config: &ModelConfig,
        memory: MemorySummary,
        is_synthetic: bool,
    ) -> Self {
        Self {
            name: name.to_owned(),
            is_synthetic,
            layers: config.num_hidden_layers,
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            ternary_bytes: memory.ternary,
            embedding_bytes: memory.embedding,
            lm_head_bytes: memory.lm_head,
            norms_bytes: memory.norms,
        }
    }
}

/// The measurement as it goes on.
struct Session<'a> {
    options: &'a CompareOptions,
    text: &'a [u32],
    meters: &'a mut [Box<dyn Meter>],
    start: Instant,
    window: Duration,
    windows: Vec<WindowReport>,
    power: Vec<PowerTrace>,
}

/// What a device's windows have shown.
#[derive(Default)]
struct Collected {
    first_token_ms: Vec<f64>,
    prompt_speeds: Vec<f64>,
    reply_speeds: Vec<f64>,
    token_seconds: Vec<f64>,
    /// Of the last reply.
    traffic: Option<Traffic>,
    /// Processor seconds and seconds, of replies.
    processors: Option<(f64, f64)>,
    depths: Vec<DepthReport>,
}

/// A run within a window: its tokens, and their number a second.
type Run = (usize, f64);

impl Session<'_> {
    /// Repeats a run until the window is full.
    fn window(
        &mut self,
        (device, phase): (Option<usize>, PhaseKind),
        length: Duration,
        observe: OnEvent<'_>,
        mut run: impl FnMut(OnEvent<'_>) -> Result<Option<Run>>,
    ) -> Result<&WindowReport> {
        let begin = Instant::now();
        let mut window = Window::start(self.meters);
        let (mut tokens, mut speeds) = (0, Vec::new());
        loop {
            let done = run(&mut |event| {
                window.poll();
                observe(event)
            })?;
            if let Some((count, speed)) = done {
                tokens += count;
                speeds.push(speed);
            }
            if begin.elapsed() >= length {
                break;
            }
        }
        let measured = window.end();
        let seconds = begin.elapsed().as_secs_f64();
        let start_seconds = (begin - self.start).as_secs_f64();
        for (trace, measured) in self.power.iter_mut().zip(&measured) {
            trace.points.extend(measured.samples.windows(2).filter_map(|pair| {
                let (joules, time) =
                    (pair[1].joules - pair[0].joules, pair[1].seconds - pair[0].seconds);
                // Two readings at once have no power between them.
                (time > 1e-3).then(|| [start_seconds + pair[1].seconds, joules / time])
            }));
        }
        let problems = measured.iter().flat_map(|meter| {
            meter.problems.iter().map(|problem| format!("{}: {problem}", meter.info.domain))
        });
        self.windows.push(WindowReport {
            device,
            phase,
            start_seconds,
            seconds,
            tokens,
            tokens_per_second: Spread::of(speeds).map(|spread| spread.median),
            problems: problems.collect(),
            joules: measured.iter().map(|m| m.energy.as_ref().map(|e| e.joules)).collect(),
        });
        Ok(self.windows.last().expect("it was just put there"))
    }

    fn idle(&mut self, observe: OnEvent<'_>) -> Result<()> {
        if self.options.idle.is_zero() {
            return Ok(());
        }
        tell(observe, Event::Stage("idle"))?;
        std::thread::sleep(SETTLE);
        self.window((None, PhaseKind::Idle), self.options.idle, observe, |observe| {
            std::thread::sleep(TICK);
            tell(observe, Event::Idle)?;
            Ok(None)
        })?;
        Ok(())
    }

    fn warm_up(&self, subject: &mut Subject, observe: OnEvent<'_>) -> Result<()> {
        tell(observe, Event::Stage(&format!("{}: warming up", subject.name())))?;
        let CompareOptions { prompt, reply, warm_up, .. } = *self.options;
        let mut runner = Runner::new(&mut subject.transformer, self.text)?;
        let start = Instant::now();
        loop {
            runner.prompt(0, prompt, observe)?;
            runner.reply(prompt, reply, observe)?;
            if start.elapsed() >= warm_up {
                return Ok(());
            }
        }
    }

    /// A window of prompts and one of replies.
    fn round(
        &mut self,
        index: usize,
        subject: &mut Subject,
        collected: &mut Collected,
        observe: OnEvent<'_>,
    ) -> Result<()> {
        let CompareOptions { prompt, reply, .. } = *self.options;
        let stage = |what| format!("{}: {what}", subject.name());
        let (prompts, replies) = (stage("prompts"), stage("replies"));
        let mut runner = Runner::new(&mut subject.transformer, self.text)?;
        tell(observe, Event::Stage(&prompts))?;
        let mut seconds = Vec::new();
        self.window((Some(index), PhaseKind::Prompt), self.window, observe, |observe| {
            let run = runner.prompt(0, prompt, observe)?;
            seconds.push(run.seconds);
            Ok(Some((prompt, prompt as f64 / run.seconds)))
        })?;
        let seconds = Spread::of(seconds).expect("a window has one run or more").median;
        collected.first_token_ms.push(1e3 * seconds);
        collected.prompt_speeds.push(prompt as f64 / seconds);

        tell(observe, Event::Stage(&replies))?;
        runner.fill(prompt, observe)?;
        let before = processor_seconds();
        let window =
            self.window((Some(index), PhaseKind::Reply), self.window, observe, |observe| {
                let run = runner.reply(prompt, reply, observe)?;
                collected.token_seconds.extend(run.token_seconds);
                collected.traffic = run.traffic;
                Ok(Some((run.tokens.len(), reply as f64 / run.seconds)))
            })?;
        collected.reply_speeds.extend(window.tokens_per_second);
        let busy = processor_seconds().zip(before).map(|(after, before)| after - before);
        let (all_busy, all) = collected.processors.unwrap_or_default();
        collected.processors = busy.map(|busy| (all_busy + busy, all + window.seconds));
        Ok(())
    }

    fn depths(
        &self,
        subject: &mut Subject,
        collected: &mut Collected,
        observe: OnEvent<'_>,
    ) -> Result<()> {
        let mut depths = self.options.depths.clone();
        depths.sort_unstable();
        depths.dedup();
        let name = subject.name().to_owned();
        let mut runner = Runner::new(&mut subject.transformer, self.text)?;
        for depth in depths {
            tell(observe, Event::Stage(&format!("{name}: replies after {depth} tokens")))?;
            let mut speeds = Vec::new();
            for _ in 0..self.options.rounds {
                let run = runner.reply(depth, self.options.reply, observe)?;
                speeds.push(self.options.reply as f64 / run.seconds);
            }
            let tokens_per_second = Spread::of(speeds).expect("one round or more");
            collected.depths.push(DepthReport { depth, tokens_per_second });
        }
        Ok(())
    }
}

/// Measures devices in turns: idle, warm-up, then rounds of a window of prompts and a window of replies
/// on each device, in an order that turns with each round, then idle again.
///
/// `found` are the machine's meters, `text` what is read, again and again where more is needed.
/// `threads` is for the report.
///
/// # Errors
/// If a device fails, or `observe` ends it. A meter that fails does not: its energy is missing, with
/// the reason.
pub fn compare(
    subjects: &mut [Subject],
    (model, text, threads): (ModelReport, &[u32], usize),
    found: &mut Found,
    options: &CompareOptions,
    observe: OnEvent<'_>,
) -> Result<Report> {
    let no_meters = (!found.missing.is_empty() || found.meters.is_empty()).then(|| found.summary());
    let infos: Vec<MeterInfo> = found.meters.iter().map(|m| m.describe().clone()).collect();
    let chosen: Vec<Vec<usize>> =
        subjects.iter().map(|subject| meters_of(&subject.placement, &infos)).collect();
    let wanted = chosen.iter().flatten().map(|&meter| infos[meter].min_window).max();
    let window = options.window.unwrap_or(wanted.unwrap_or(WINDOW));
    let power = (0..infos.len()).map(|meter| PowerTrace { meter, points: Vec::new() }).collect();
    let mut session = Session {
        options,
        text,
        meters: &mut found.meters,
        start: Instant::now(),
        window,
        windows: Vec::new(),
        power,
    };

    session.idle(observe)?;
    for subject in &mut *subjects {
        session.warm_up(subject, observe)?;
    }
    let mut collected: Vec<Collected> = subjects.iter().map(|_| Collected::default()).collect();
    for round in 0..options.rounds {
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            session.round(index, &mut subjects[index], &mut collected[index], observe)?;
        }
    }
    session.idle(observe)?;
    for (subject, collected) in subjects.iter_mut().zip(&mut collected) {
        session.depths(subject, collected, observe)?;
    }

    let Session { windows, power, .. } = session;
    let meters: Vec<MeterReport> = infos.iter().map(MeterReport::from).collect();
    let mut devices = Vec::new();
    for (index, (subject, collected)) in subjects.iter().zip(collected).enumerate() {
        let report = device_report(subject, collected);
        devices.push(with_energy(report, index, &chosen[index], (&meters, &windows), &no_meters));
    }
    let same_tokens = (devices.len() > 1)
        .then(|| devices.windows(2).all(|pair| pair[0].token_ids == pair[1].token_ids));
    let cautions = cautions(&model, subjects, &devices, options, (window, wanted));
    Ok(Report {
        format: FORMAT,
        program: concat!("sterna ", env!("CARGO_PKG_VERSION")).to_owned(),
        made: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        machine: Machine::this(),
        method: method(options, threads, window, cautions),
        model,
        no_meters,
        meters,
        same_tokens,
        verdicts: verdicts(&devices),
        devices,
        windows,
        power,
    })
}

fn device_report(subject: &Subject, collected: Collected) -> DeviceReport {
    let device = subject.transformer.device();
    let spread = |values| Spread::of(values).expect("one round or more");
    let tokens_per_second = spread(collected.reply_speeds);
    // The first token of a reply is not timed.
    let n = (subject.token_ids.len() - 1) as f64;
    let weights = collected.traffic.map(|traffic| traffic.weights as f64 / n);
    let cache = collected.traffic.map(|traffic| traffic.cache as f64 / n);
    let bytes = weights.zip(cache).map(|(weights, cache)| weights + cache);
    DeviceReport {
        name: device.name.clone(),
        description: device.description.clone(),
        kernel: device.gemv.clone(),
        head: device.head.clone(),
        kv: format_name(subject.transformer.kv_format()).to_owned(),
        notes: device.notes.clone(),
        load_seconds: subject.load_seconds,
        memory: subject.memory.clone(),
        bandwidth: subject.bandwidth.clone(),
        first_token_ms: spread(collected.first_token_ms),
        prompt_tokens_per_second: spread(collected.prompt_speeds),
        read_gb_per_second: bytes.map(|bytes| bytes * tokens_per_second.median / 1e9),
        tokens_per_second,
        token_ms: Latencies::of_seconds(&collected.token_seconds).expect("one token or more"),
        weight_bytes_per_token: weights,
        cache_bytes_per_token: cache,
        processors_busy: collected.processors.map(|(busy, all)| busy / all),
        depths: collected.depths,
        energy: None,
        energy_problem: None,
        token_ids: subject.token_ids.clone(),
    }
}

/// Adds the energy of a device's meters, or why there is none.
fn with_energy(
    report: DeviceReport,
    index: usize,
    chosen: &[usize],
    (meters, windows): (&[MeterReport], &[WindowReport]),
    no_meters: &Option<String>,
) -> DeviceReport {
    if chosen.is_empty() {
        let problem = match no_meters {
            Some(summary) => summary.clone(),
            None => "no energy counter: none of the meters covers this device".to_owned(),
        };
        return DeviceReport { energy_problem: Some(problem), ..report };
    }
    match energy_of(index, chosen, meters, windows) {
        Ok(energy) => DeviceReport { energy: Some(energy), ..report },
        Err(problem) => DeviceReport { energy_problem: Some(problem), ..report },
    }
}

fn method(
    options: &CompareOptions,
    threads: usize,
    window: Duration,
    cautions: Vec<String>,
) -> Method {
    let mut steps = vec![
        "Every device loads the same weights and replies once to the same prompt; the tokens are \
         compared."
            .to_owned(),
        "Rounds: a window of prompts and a window of replies on each device; every second round in \
         the opposite order. A window is filled with whole runs."
            .to_owned(),
        "The time to the first token is that of the whole prompt and the choice of the token; the \
         speed of a reply is from its first token to its last."
            .to_owned(),
        "Values are medians, with the least and the largest; nothing is left out.".to_owned(),
    ];
    if !options.idle.is_zero() {
        steps.push(
            "Net joules are those of the window less the mean idle power, before and after, times \
             its seconds."
                .to_owned(),
        );
    }
    Method {
        prompt_tokens: options.prompt,
        reply_tokens: options.reply,
        rounds: options.rounds,
        window_seconds: window.as_secs_f64(),
        warm_up_seconds: options.warm_up.as_secs_f64(),
        idle_seconds: options.idle.as_secs_f64(),
        threads,
        steps,
        cautions,
    }
}

/// What makes the numbers less certain.
fn cautions(
    model: &ModelReport,
    subjects: &[Subject],
    devices: &[DeviceReport],
    options: &CompareOptions,
    (window, wanted): (Duration, Option<Duration>),
) -> Vec<String> {
    let mut cautions = Vec::new();
    if model.is_synthetic {
        cautions.push(
            "the weights are random: speed and energy are those of the shapes, the texts mean \
             nothing"
                .to_owned(),
        );
    }
    for subject in subjects {
        if matches!(subject.placement, Placement::Adapter { kind: AdapterKind::Software, .. }) {
            let name = subject.name();
            cautions.push(format!(
                "{name} is a software rasteriser, which runs on the CPU: it says nothing about GPUs"
            ));
        }
    }
    if options.rounds < MIN_ROUNDS {
        cautions.push(format!("{} rounds: {MIN_ROUNDS} or more say more", options.rounds));
    }
    let Some(wanted) = wanted else { return cautions };
    if window < wanted {
        cautions.push(format!(
            "a window of {:.1} s is shorter than the {:.0} s that a meter asks for",
            window.as_secs_f64(),
            wanted.as_secs_f64()
        ));
    }
    if options.idle.is_zero() {
        cautions.push("there is no idle baseline, and so no net energy".to_owned());
    }
    for device in devices {
        let Some(energy) = &device.energy else { continue };
        let (Some(before), Some(after)) = (energy.idle_watts_before, energy.idle_watts_after)
        else {
            continue;
        };
        if (before - after).abs() > IDLE_DRIFT * before.max(after) {
            cautions.push(format!(
                "{}: {before:.1} W idle before and {after:.1} W after: the machine was not idle",
                device.name
            ));
        }
    }
    cautions
}
