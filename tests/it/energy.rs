//! Energy meters on fake machines: trees of files, perf events and an NVIDIA library that are given.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use sterna::Error;
use sterna::energy::{
    Channel, CountEvent, Domain, Energy, EnergyReport, Files, Found, Gpu, Host, Measured, Meter,
    MeterInfo, Method, Nvml, PerfEvent, PerfEvents, SocPart, Socket, Source, Tree, Window,
    Workload, choose, discover, overlaps, sum,
};
use tempfile::TempDir;

const POWERCAP: &str = "sys/class/powercap";
const PMU: &str = "sys/bus/event_source/devices/power";
/// Of an Intel package: 2³² − 1 steps of 2⁻¹⁴ J.
const RANGE_UJ: u64 = 262_143_328_850;

/// A machine's files.
struct Machine {
    root: TempDir,
    clock: Rc<Cell<Instant>>,
}

impl Machine {
    fn new() -> Self {
        Self { root: TempDir::new().unwrap(), clock: Rc::new(Cell::new(Instant::now())) }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn set(&self, path: &str, value: impl ToString) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value.to_string() + "\n").unwrap();
    }

    fn zone(&self, zone: &str, name: &str) {
        self.set(&format!("{POWERCAP}/{zone}/name"), name);
        self.set(&format!("{POWERCAP}/{zone}/max_energy_range_uj"), RANGE_UJ);
        self.energy(zone, 0);
    }

    fn energy(&self, zone: &str, microjoules: u64) {
        self.set(&format!("{POWERCAP}/{zone}/energy_uj"), microjoules);
    }

    fn pass(&self, seconds: f64) {
        self.clock.set(self.clock.get() + Duration::from_secs_f64(seconds));
    }

    fn host(&self) -> Host {
        let files = Rc::new(Tree(self.root.path().to_owned()));
        let nvml = Err("libnvidia-ml.so.1 not found".to_owned());
        Host { files: Some(files), perf: None, report: None, nvml }
    }

    fn discover(&self) -> Found {
        discover(&self.host())
    }

    fn start<'a>(&self, meters: &'a mut [Box<dyn Meter>]) -> Window<'a> {
        let clock = Rc::clone(&self.clock);
        Window::start_with_clock(meters, move || clock.get())
    }

    /// What the only meter measures while `change` happens.
    fn measure(&self, change: impl FnOnce(&Self, &mut Window<'_>)) -> Measured {
        let mut found = self.discover();
        assert_eq!(found.meters.len(), 1, "{}", found.summary());
        let mut window = self.start(&mut found.meters);
        change(self, &mut window);
        window.end().pop().unwrap()
    }
}

/// A machine whose only meter is an Intel package.
fn package() -> Machine {
    let machine = Machine::new();
    machine.zone("intel-rapl:0", "package-0");
    machine
}

#[track_caller]
fn assert_joules(measured: &Measured, expected: f64, seconds: f64) {
    let Energy { joules, seconds: found } =
        measured.energy.clone().unwrap_or_else(|| panic!("{:?}", measured.problems));
    assert!((joules - expected).abs() < 1e-6, "expected {expected} J, found {joules}");
    assert!((found - seconds).abs() < 1e-6, "expected {seconds} s, found {found}");
}

#[track_caller]
fn assert_fails(measured: &Measured, words: &[&str]) {
    assert_eq!(measured.energy, None);
    let problems = measured.problems.join("; ");
    assert!(words.iter().all(|word| problems.contains(word)), "{problems}");
}

/// The problem of a source, when it gives no meter.
#[track_caller]
fn missing(found: &Found, source: Source) -> String {
    let lines: Vec<_> = found.missing.iter().filter(|line| line.source == source).collect();
    assert_eq!(lines.len(), 1, "{}", found.summary());
    lines[0].problem.clone()
}

fn infos(found: &Found) -> Vec<MeterInfo> {
    found.meters.iter().map(|meter| meter.describe().clone()).collect()
}

fn domains(found: &Found) -> Vec<String> {
    infos(found).iter().map(|info| info.domain.to_string()).collect()
}

#[test]
fn a_machine_without_meters_says_what_was_looked_for() {
    let machine = Machine::new();
    let mut host = machine.host();
    host.perf = Some(Rc::new(FakePerf::default()));
    let found = discover(&host);
    assert!(found.meters.is_empty());
    assert_eq!(
        found.summary(),
        "no energy counter: \
         perf: no event energy-* of a PMU \"power\" under /sys/bus/event_source/devices/power/events; \
         powercap: no intel-rapl zone under /sys/class/powercap; \
         NVML: libnvidia-ml.so.1 not found; \
         hwmon: no amdgpu, xe or i915 sensor under /sys/class/hwmon; \
         power_supply: no battery under /sys/class/power_supply"
    );
}

#[test]
fn this_machine_answers() {
    let found = discover(&Host::this());
    assert!(!found.meters.is_empty() || !found.missing.is_empty());
    for line in &found.missing {
        assert!(!line.problem.is_empty() && !line.to_string().contains('\n'), "{line}");
    }
}

#[test]
fn known_energies_are_counted() {
    let machine = Machine::new();
    let zones = [
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "uncore"),
        ("intel-rapl:0:2", "dram"),
        ("intel-rapl:1", "psys"),
    ];
    for (zone, name) in zones {
        machine.zone(zone, name);
    }
    // The control type itself and the second view of a package are no zones.
    machine.set(&format!("{POWERCAP}/intel-rapl/enabled"), 1);
    machine.zone("intel-rapl-mmio:0", "package-0");
    let mut found = machine.discover();
    assert!(!found.summary().contains("powercap"), "{}", found.summary());
    assert_eq!(domains(&found), ["package 0", "core 0", "uncore 0", "dram 0", "platform"]);
    assert!(infos(&found).iter().all(|info| info.source == Source::Powercap
        && info.method == Method::Counter
        && info.resolution.step_joules == Some(1e-6)));

    let window = machine.start(&mut found.meters);
    for (index, (zone, _)) in zones.iter().enumerate() {
        machine.energy(zone, (index as u64 + 1) * 100_000_001);
    }
    machine.pass(20.0);
    let measured = window.end();
    for (index, measured) in measured.iter().enumerate() {
        assert_joules(measured, (index + 1) as f64 * 100.000001, 20.0);
        assert_eq!(measured.problems, [""; 0]);
    }
    let watts = measured[0].energy.as_ref().unwrap().mean_watts().unwrap();
    assert!((watts - 5.00000005).abs() < 1e-9, "{watts}");
    // Package and memory; the parts and psys would count joules twice.
    let infos: Vec<_> = measured.iter().map(|measured| measured.info.clone()).collect();
    assert_eq!(choose(Workload::Package, &infos), [0, 3]);
    assert!((sum(&[&measured[0], &measured[3]]).unwrap() - 500.000005).abs() < 1e-6);
    for parts in [[0, 1], [0, 2], [4, 0], [3, 4], [0, 0]] {
        let error = sum(&parts.map(|part| &measured[part])).unwrap_err().to_string();
        assert!(error.contains("overlap; their energies cannot be added"), "{error}");
    }
}

#[test]
fn a_wrap_is_exact() {
    let machine = package();
    machine.energy("intel-rapl:0", RANGE_UJ - 700_000_123);
    let measured = machine.measure(|machine, _| {
        machine.pass(20.0);
        machine.energy("intel-rapl:0", 1_300_000_000);
    });
    assert_joules(&measured, 2000.000123, 20.0);
    assert_eq!(measured.problems, [""; 0]);
}

#[test]
fn wraps_between_polls_add_up() {
    let machine = package();
    machine.energy("intel-rapl:0", RANGE_UJ - 1_000_000);
    let measured = machine.measure(|machine, window| {
        let mut at = RANGE_UJ - 1_000_000;
        // 3 kJ every 2 s, until the counter has been round twice.
        for _ in 0..180 {
            machine.pass(2.0);
            at = (at + 3_000_000_000) % RANGE_UJ;
            machine.energy("intel-rapl:0", at);
            assert!(window.poll());
        }
    });
    assert_joules(&measured, 540_000.0, 360.0);
    assert_eq!(measured.problems, [""; 0]);
    assert_eq!(measured.samples.len(), 182);
}

#[test]
fn a_long_gap_may_hide_wraps() {
    let machine = package();
    machine.energy("intel-rapl:0", 5_000_000);
    let measured = machine.measure(|machine, _| {
        machine.pass(600.0);
        machine.energy("intel-rapl:0", 4_000_000);
    });
    // One wrap is the least that explains it; that there may be more is said.
    assert_joules(&measured, RANGE_UJ as f64 * 1e-6 - 1.0, 600.0);
    assert!(measured.problems[0].contains("wraps may be missing"), "{:?}", measured.problems);
}

#[test]
fn a_counter_that_jumps_back_is_refused() {
    let machine = package();
    machine.energy("intel-rapl:0", 9_000_000_000);
    let mut found = machine.discover();
    let mut window = machine.start(&mut found.meters);
    machine.pass(10.0);
    machine.energy("intel-rapl:0", 5);
    assert!(window.poll());
    // It does not help that the counter passes its old value later.
    machine.pass(10.0);
    machine.energy("intel-rapl:0", 9_500_000_000);
    let measured = &window.end()[0];
    assert_fails(measured, &["intel-rapl:0", "fell from 9000000000 to 5 µJ", "measure again"]);
    assert_eq!(measured.problems.len(), 1, "{:?}", measured.problems);
    assert!(sum(&[measured]).unwrap_err().to_string().contains("not measured: "));

    // The next window starts afresh.
    let window = machine.start(&mut found.meters);
    machine.pass(10.0);
    machine.energy("intel-rapl:0", 9_600_000_000);
    assert_joules(&window.end()[0], 100.0, 10.0);
}

#[test]
fn a_counter_that_leaps_is_refused() {
    let machine = package();
    let measured = machine.measure(|machine, _| {
        machine.pass(10.0);
        machine.energy("intel-rapl:0", 200_000_000_000);
    });
    assert_fails(&measured, &["grew by 200000 J in 10.0 s, more than 2000 W"]);
}

#[test]
fn a_vanished_file_is_said() {
    let machine = package();
    let file = machine.path("sys/class/powercap/intel-rapl:0/energy_uj");
    let vanished = "/sys/class/powercap/intel-rapl:0/energy_uj: no such file";
    let measured = machine.measure(|machine, _| {
        machine.pass(10.0);
        fs::remove_file(&file).unwrap();
    });
    assert_fails(&measured, &[vanished]);
    // Back before the end: the counter has gone on, and nothing is lost.
    machine.energy("intel-rapl:0", 0);
    let measured = machine.measure(|machine, window| {
        machine.pass(10.0);
        fs::remove_file(&file).unwrap();
        assert!(window.poll());
        machine.pass(10.0);
        machine.energy("intel-rapl:0", 40_000_000);
    });
    assert_joules(&measured, 40.0, 20.0);
    assert_eq!(measured.problems, [vanished]);
    // Gone before the start of a window.
    let mut found = machine.discover();
    fs::remove_file(&file).unwrap();
    let mut window = machine.start(&mut found.meters);
    machine.energy("intel-rapl:0", 1);
    assert!(window.poll());
    assert_fails(&window.end()[0], &[vanished]);
}

/// Files that may not be read.
struct Denied {
    tree: Tree,
    name: &'static str,
}

impl Files for Denied {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        match path.ends_with(self.name) {
            true => Err(io::ErrorKind::PermissionDenied.into()),
            false => self.tree.read(path),
        }
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.tree.list(path)
    }
    fn target_name(&self, path: &Path) -> io::Result<String> {
        self.tree.target_name(path)
    }
}

#[test]
fn no_permission_comes_with_the_fix() {
    let machine = package();
    let denied = |name| {
        let tree = Tree(machine.root.path().to_owned());
        discover(&Host { files: Some(Rc::new(Denied { tree, name })), ..machine.host() })
    };
    let found = denied("energy_uj");
    assert!(found.meters.is_empty());
    let words = "/sys/class/powercap/intel-rapl:0/energy_uj: permission denied; \
                 sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj";
    assert!(missing(&found, Source::Powercap).starts_with(words), "{}", found.summary());
    // One line, whatever the number of zones.
    machine.zone("intel-rapl:0:0", "core");
    machine.zone("intel-rapl:1", "package-1");
    let line = missing(&denied("energy_uj"), Source::Powercap);
    assert!(line.starts_with(words) && line.ends_with("(2 more like it)"), "{line}");
    // Other files are no less needed.
    assert!(missing(&denied("name"), Source::Powercap).contains("intel-rapl:0/name"));
}

#[test]
fn garbage_is_no_meter() {
    let huge = "1".repeat(5000);
    let values = ["", "-5", "12 µJ", "1e6", "0x10", "NaN", "18446744073709551616", huge.as_str()];
    for value in values {
        for file in ["energy_uj", "max_energy_range_uj"] {
            let machine = package();
            machine.set(&format!("{POWERCAP}/intel-rapl:0/{file}"), value);
            let found = machine.discover();
            assert!(found.meters.is_empty(), "{file} {value:?}");
            let problem = missing(&found, Source::Powercap);
            assert!(problem.contains(&format!("{file}: expected a whole number")), "{problem}");
            assert!(problem.len() < 300, "{problem}");
        }
    }
    let machine = package();
    machine.set(&format!("{POWERCAP}/intel-rapl:0/max_energy_range_uj"), 0);
    assert!(missing(&machine.discover(), Source::Powercap).contains("expected more than 0"));
    machine.set(&format!("{POWERCAP}/intel-rapl:0/max_energy_range_uj"), 100);
    machine.energy("intel-rapl:0", 101);
    assert!(missing(&machine.discover(), Source::Powercap).contains("expected 0 to 100"));
    for name in ["package", "package-", "package--1", "package-0-die-", "cpu", "package-4294967296"]
    {
        let machine = Machine::new();
        machine.zone("intel-rapl:0", name);
        let problem = missing(&machine.discover(), Source::Powercap);
        assert!(problem.contains("intel-rapl:0/name: expected package-N"), "{problem}");
    }
    let machine = Machine::new();
    machine.zone("intel-rapl:0", "package-0");
    machine.zone("intel-rapl:0:0", "cache");
    machine.zone("intel-rapl:7:0", "core");
    let found = machine.discover();
    assert_eq!(domains(&found), ["package 0"]);
    assert!(found.summary().contains("expected core, uncore or dram, found \"cache\""));
    assert!(found.summary().contains("/sys/class/powercap/intel-rapl:7/name: no such file"));
}

#[test]
fn what_is_no_file_is_no_meter() {
    let machine = package();
    let file = machine.path("sys/class/powercap/intel-rapl:0/energy_uj");
    fs::write(&file, "12").unwrap();
    assert_eq!(machine.discover().meters.len(), 1, "a newline is not needed");
    fs::write(&file, [0xff, 0xfe, 0]).unwrap();
    assert!(missing(&machine.discover(), Source::Powercap).contains("no UTF-8"));
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert!(missing(&machine.discover(), Source::Powercap).contains("energy_uj: "));
    fs::remove_dir(&file).unwrap();
    std::os::unix::fs::symlink(&file, &file).unwrap();
    assert!(missing(&machine.discover(), Source::Powercap).contains("energy_uj: "));
    // No more is read than a value can need.
    machine.set("endless", "1".repeat(1 << 20));
    let tree = Tree(machine.root.path().to_owned());
    assert_eq!(tree.read(Path::new("endless")).unwrap().len(), 4096);
    // A name that would break the line.
    machine.zone("intel-rapl:1\n", "garbage");
    let found = machine.discover();
    assert!(
        !found.summary().contains('\n')
            && found.missing.iter().all(|line| !line.problem.contains("garbage"))
    );
    // A file in the place of each directory.
    for class in ["sys/class/powercap", "sys/class/hwmon", "sys/class/power_supply"] {
        let machine = Machine::new();
        machine.set(class, "no directory");
        let found = machine.discover();
        assert!(found.meters.is_empty() && found.summary().contains(&format!("/{class}: ")));
    }
    // In the middle of a window.
    let machine = package();
    let measured = machine.measure(|machine, window| {
        machine.set(&format!("{POWERCAP}/intel-rapl:0/energy_uj"), "garbage");
        for _ in 0..100 {
            machine.pass(1.0);
            assert!(window.poll());
        }
    });
    assert_fails(&measured, &["energy_uj: expected a whole number, found \"garbage\""]);
    assert_eq!(measured.problems.len(), 1);
}

#[test]
fn amd_and_multi_socket_packages() {
    let machine = Machine::new();
    machine.zone("intel-rapl:0", "package-0");
    machine.zone("intel-rapl:0:0", "core");
    assert_eq!(domains(&machine.discover()), ["package 0", "core 0"]);
    assert_eq!(choose(Workload::Package, &infos(&machine.discover())), [0]);

    machine.zone("intel-rapl:1", "package-1");
    machine.zone("intel-rapl:1:0", "core");
    let mut found = machine.discover();
    let both = choose(Workload::Package, &infos(&found));
    assert_eq!(both, [0, 2]);
    let window = machine.start(&mut found.meters);
    machine.energy("intel-rapl:0", 1_000_000);
    machine.energy("intel-rapl:1", 2_500_000);
    machine.pass(10.0);
    let measured = window.end();
    assert_eq!(sum(&both.iter().map(|&i| &measured[i]).collect::<Vec<_>>()).unwrap(), 3.5);

    let machine = Machine::new();
    machine.zone("intel-rapl:0", "package-0-die-0");
    machine.zone("intel-rapl:1", "package-0-die-1");
    let found = machine.discover();
    assert_eq!(domains(&found), ["package 0 die 0", "package 0 die 1"]);
    assert_eq!(choose(Workload::Package, &infos(&found)), [0, 1]);
}

/// Perf events by PMU, event and CPU; an event that is not there may not be opened.
#[derive(Default)]
struct FakePerf {
    counts: HashMap<(u32, u64, usize), Rc<Cell<u64>>>,
}

impl PerfEvents for FakePerf {
    fn open(&self, event: PerfEvent) -> io::Result<CountEvent> {
        let count = self.counts.get(&(event.pmu, event.config, event.cpu));
        let count = Rc::clone(count.ok_or(io::ErrorKind::PermissionDenied)?);
        Ok(Box::new(move || match count.get() {
            u64::MAX => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }))
    }
}

/// A PMU with `energy-pkg` on the CPUs 0 and 28.
fn perf_machine() -> (Machine, Host, [Rc<Cell<u64>>; 2]) {
    let machine = Machine::new();
    machine.set(&format!("{PMU}/type"), 23);
    machine.set(&format!("{PMU}/cpumask"), "0,28");
    machine.set(&format!("{PMU}/events/energy-pkg"), "event=0x02");
    machine.set(&format!("{PMU}/events/energy-pkg.unit"), "Joules");
    machine.set(&format!("{PMU}/events/energy-pkg.scale"), "2.3283064365386962890625e-10");
    machine.set("proc/sys/kernel/perf_event_paranoid", 2);
    for (cpu, package) in [(0, 0), (28, 1)] {
        machine
            .set(&format!("sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"), package);
        machine.set(&format!("sys/devices/system/cpu/cpu{cpu}/topology/die_id"), 0);
    }
    let counts = [Rc::new(Cell::new(0)), Rc::new(Cell::new(0))];
    let of_event = [((23, 2, 0), Rc::clone(&counts[0])), ((23, 2, 28), Rc::clone(&counts[1]))];
    let perf = FakePerf { counts: HashMap::from(of_event) };
    let host = Host { perf: Some(Rc::new(perf)), ..machine.host() };
    (machine, host, counts)
}

#[test]
fn perf_events_count_by_their_scale() {
    let (machine, host, counts) = perf_machine();
    // The same packages by powercap.
    machine.zone("intel-rapl:0", "package-0");
    let mut found = discover(&host);
    assert_eq!(domains(&found), ["package 0", "package 1", "package 0"]);
    assert_eq!(choose(Workload::Package, &infos(&found)), [0, 1]);
    let mut infos = infos(&found);
    assert_eq!(infos[1].name, "power/energy-pkg/ on CPU 28");
    // Perf comes before powercap, whatever the order.
    infos.reverse();
    assert_eq!(choose(Workload::Package, &infos), [1, 2]);
    let window = machine.start(&mut found.meters);
    counts[0].set(5 << 32);
    counts[1].set(7 << 31);
    machine.pass(10.0);
    let measured = window.end();
    assert_joules(&measured[0], 5.0, 10.0);
    assert_joules(&measured[1], 3.5, 10.0);
    // 64 bits do not wrap.
    let window = machine.start(&mut found.meters);
    counts[0].set(1);
    counts[1].set(u64::MAX);
    machine.pass(10.0);
    let measured = window.end();
    assert_fails(&measured[0], &["fell from 21474836480 to 1 counts (it does not wrap)"]);
    assert_fails(&measured[1], &["power/energy-pkg/ on CPU 28: unexpected end of file"]);
}

#[test]
fn perf_without_permission_comes_with_the_fix() {
    let (_machine, mut host, _) = perf_machine();
    host.perf = Some(Rc::new(FakePerf::default()));
    let found = discover(&host);
    assert_eq!(
        missing(&found, Source::Perf),
        "power/energy-pkg/ on CPU 0: permission denied (perf_event_paranoid is 2); sudo sysctl \
         kernel.perf_event_paranoid=0, or give the program the capability CAP_PERFMON (1 more like it)"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn the_kernel_opens_events() {
    let events = Host::this().perf.unwrap();
    // The clock of a CPU, which is there without any hardware.
    match events.open(PerfEvent { pmu: 1, config: 0, cpu: 0 }) {
        Ok(mut count) => {
            let before = count().unwrap();
            std::thread::sleep(Duration::from_millis(50));
            let nanoseconds = count().unwrap() - before;
            assert!((40_000_000..60_000_000_000).contains(&nanoseconds), "{nanoseconds} ns");
        }
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}"),
    }
    assert!(events.open(PerfEvent { pmu: u32::MAX, config: 0, cpu: 0 }).is_err());
}

#[test]
fn perf_garbage_is_no_meter() {
    let cases = [
        ("type", "-1", "type: expected a whole number"),
        ("type", "4294967296", "type: expected the number of a PMU"),
        ("cpumask", "", "cpumask: expected a list of CPUs"),
        ("cpumask", "0-4294967295", "cpumask: expected a list of CPUs"),
        ("cpumask", "5-2", "cpumask: expected a list of CPUs"),
        ("cpumask", "0-18446744073709551615", "cpumask: expected a list of CPUs"),
        ("cpumask", "3", "cpu3/topology/physical_package_id: no such file"),
        ("events/energy-pkg", "umask=0x02", "energy-pkg: expected event=0x"),
        ("events/energy-pkg.unit", "Watts", "energy-pkg.unit: expected Joules"),
        ("events/energy-pkg.scale", "inf", "energy-pkg.scale: expected joules"),
        ("events/energy-pkg.scale", "NaN", "energy-pkg.scale: expected joules"),
        ("events/energy-pkg.scale", "-1", "energy-pkg.scale: expected joules"),
    ];
    for (file, value, words) in cases {
        let (machine, host, _) = perf_machine();
        machine.set(&format!("{PMU}/{file}"), value);
        let found = discover(&host);
        assert!(found.meters.is_empty(), "{file} {value}");
        assert!(found.summary().contains(words), "{file} {value}: {}", found.summary());
    }
}

/// A GPU's name, address and energy.
type FakeGpu = (&'static str, &'static str, Result<u64, &'static str>);

/// An NVIDIA library.
struct FakeNvml(RefCell<Vec<FakeGpu>>);

impl Nvml for FakeNvml {
    fn count(&self) -> Result<u32, String> {
        Ok(self.0.borrow().len() as u32)
    }
    fn gpu(&self, index: u32) -> Result<Gpu, String> {
        let (name, pci, _) = self.0.borrow()[index as usize];
        Ok(Gpu { name: name.to_owned(), pci: pci.to_owned() })
    }
    fn millijoules(&self, index: u32) -> Result<u64, String> {
        self.0.borrow()[index as usize].2.map_err(str::to_owned)
    }
}

#[test]
fn nvml_counts_boards() {
    let nvml = Rc::new(FakeNvml(RefCell::new(vec![
        ("NVIDIA H200", "00000000:65:00.0", Ok(7_000_000_000)),
        ("Tesla P4", "00000000:66:00.0", Err("not available on the target device")),
        ("NVIDIA L4", "00010000:0A:00.0", Ok(0)),
    ])));
    let machine = package();
    let host = Host { nvml: Ok(nvml.clone()), ..machine.host() };
    let mut found = discover(&host);
    assert_eq!(domains(&found), ["package 0", "board 0000:65:00.0", "board 00010000:0a:00.0"]);
    let problem = missing(&found, Source::Nvml);
    assert_eq!(
        problem,
        "Tesla P4: not available on the target device (energy is counted on Volta and newer)"
    );
    // The board and, beside it, the package that feeds it.
    let infos = infos(&found);
    assert_eq!(choose(Workload::DiscreteGpu(Some("0000:65:00.0")), &infos), [1, 0]);
    assert_eq!(choose(Workload::DiscreteGpu(None), &infos), [1, 2, 0]);
    assert_eq!(choose(Workload::DiscreteGpu(Some("0000:01:00.0")), &infos), [0; 0]);

    let window = machine.start(&mut found.meters);
    machine.pass(30.0);
    nvml.0.borrow_mut()[0].2 = Ok(7_000_012_345);
    nvml.0.borrow_mut()[2].2 = Err("device fell off the bus");
    let measured = window.end();
    assert_joules(&measured[1], 12.345, 30.0);
    assert_fails(&measured[2], &["NVIDIA L4: device fell off the bus"]);
    // The driver was loaded again: the counter starts at 0, which is no wrap.
    let window = machine.start(&mut found.meters[1..2]);
    machine.pass(30.0);
    nvml.0.borrow_mut()[0].2 = Ok(5);
    assert_fails(&window.end()[0], &["NVIDIA H200: the counter fell", "it does not wrap"]);
}

/// What IOReport counted since the last report: group, channel, joules.
type Report = Vec<(&'static str, &'static str, f64)>;

struct FakeReport(Rc<RefCell<Result<Report, &'static str>>>);

impl EnergyReport for FakeReport {
    fn advance(&mut self) -> Result<Vec<Channel>, String> {
        let channels = self.0.borrow().clone()?;
        let channel = |(group, name, joules): (&str, &str, f64)| Channel {
            group: group.to_owned(),
            name: name.to_owned(),
            joules,
        };
        Ok(channels.into_iter().map(channel).collect())
    }
}

#[test]
fn apple_chips_count_their_parts() {
    const MODEL: &str = "Energy Model";
    let first = vec![
        ("CLPC", "CPU Energy", 1.0),
        // Frozen where CLPC counts.
        (MODEL, "CPU Energy", 0.0),
        (MODEL, "GPU Energy", 0.25),
        (MODEL, "DIE_0_CPU Energy", 7.0),
        (MODEL, "ANE0", 0.5),
        (MODEL, "ANE1", 0.5),
        (MODEL, "DRAM0", 2.0),
        (MODEL, "GPU SRAM0", 9.0),
        (MODEL, "ECPU0", 9.0),
    ];
    let report = Rc::new(RefCell::new(Ok(first)));
    let machine = Machine::new();
    let opened = Rc::clone(&report);
    let open = move || Ok(Box::new(FakeReport(Rc::clone(&opened))) as Box<dyn EnergyReport>);
    let host = Host { files: None, report: Some(Rc::new(open)), ..machine.host() };
    let mut found = discover(&host);
    let parts = ["chip's CPU", "chip's GPU", "chip's neural engine", "chip's memory"];
    assert_eq!(domains(&found), parts);
    assert_eq!(choose(Workload::Package, &infos(&found)), [0, 1, 2, 3]);
    let mut window = machine.start(&mut found.meters);
    for _ in 0..10 {
        machine.pass(1.0);
        assert!(window.poll());
    }
    let measured = window.end();
    // Ten reports and a last one.
    for (measured, joules) in measured.iter().zip([11.0, 2.75, 11.0, 22.0]) {
        assert_joules(measured, joules, 10.0);
    }
    assert_eq!(sum(&measured.iter().collect::<Vec<_>>()).unwrap(), 46.75);

    let mut fails = |during: Result<Report, &'static str>, words: &str| {
        let fine = vec![("CLPC", "CPU Energy", 1.0)];
        *report.borrow_mut() = Ok(fine.clone());
        let mut window = machine.start(&mut found.meters[..1]);
        machine.pass(10.0);
        *report.borrow_mut() = during;
        assert!(window.poll());
        *report.borrow_mut() = Ok(fine);
        assert_fails(&window.end()[0], &["energy of the CPU: ", words]);
    };
    fails(Ok(vec![("CLPC", "CPU Energy", -1.0)]), "moved by -1 J in 10.0 s");
    fails(Ok(vec![("CLPC", "CPU Energy", 1e6)]), "moved by 1000000 J in 10.0 s");
    fails(Ok(vec![("CLPC", "CPU Energy", f64::NAN)]), "moved by NaN J");
    fails(Ok(vec![(MODEL, "CPU Energy", 0.0)]), "the counter stands still on this system");
    fails(Ok(Vec::new()), "its counter is gone");
    fails(Err("no samples"), "no samples");
    *report.borrow_mut() = Ok(vec![("PMP", "CPU Energy", 1.0)]);
    let found = discover(&host);
    let nothing = "no energy counter in the groups CLPC and Energy Model";
    assert_eq!(missing(&found, Source::IoReport), nothing);
}

fn amdgpu(machine: &Machine, file: &str, microwatts: u64) {
    let device = machine.path("sys/devices/pci0000:00/0000:03:00.0");
    fs::create_dir_all(&device).unwrap();
    machine.set("sys/class/hwmon/hwmon3/name", "amdgpu");
    machine.set(&format!("sys/class/hwmon/hwmon3/{file}"), microwatts);
    std::os::unix::fs::symlink(device, machine.path("sys/class/hwmon/hwmon3/device")).unwrap();
}

#[test]
fn power_is_integrated_by_trapezoids() {
    let machine = Machine::new();
    amdgpu(&machine, "power1_average", 100_000_000);
    let file = "sys/class/hwmon/hwmon3/power1_average";
    let measured = machine.measure(|machine, window| {
        // 100 W to 200 W in half a second, then constant.
        for step in 1..=5 {
            machine.pass(0.1);
            machine.set(file, 100_000_000 + step * 20_000_000);
            assert!(window.poll());
            machine.pass(0.05);
            assert!(!window.poll(), "ten readings a second are enough");
            machine.pass(0.05);
            assert!(window.poll());
        }
        for _ in 0..290 {
            machine.pass(0.1);
            assert!(window.poll());
        }
    });
    assert_eq!(measured.info.domain, Domain::Board("0000:03:00.0".into()));
    assert_eq!(measured.info.method.to_string(), "integrated from power samples");
    // Five times 0.1 s of rise and 0.1 s of standing, then 29 s at 200 W.
    let rise: f64 = (0..5).map(|i| 0.1 * (110.0 + 20.0 * i as f64)).sum();
    let stand: f64 = (1..=5).map(|i| 0.1 * (100.0 + 20.0 * i as f64)).sum();
    assert_joules(&measured, rise + stand + 29.0 * 200.0, 30.0);
    assert_eq!(measured.problems, [""; 0]);

    let measured = machine.measure(|machine, _| machine.pass(40.0));
    assert_joules(&measured, 8000.0, 40.0);
    assert_eq!(measured.problems, ["no power sample for 40.0 s"]);
    let measured = machine.measure(|machine, _| machine.set(file, 6_000_000_000u64));
    assert_fails(&measured, &["expected at most 5000 W, found 6000 W"]);
}

#[test]
fn an_apu_covers_its_package() {
    let machine = package();
    amdgpu(&machine, "power1_input", 15_000_000);
    machine.set("sys/class/hwmon/hwmon3/in1_label", "vddnb");
    let found = machine.discover();
    assert_eq!(domains(&found), ["package 0", "APU 0000:03:00.0"]);
    let infos = infos(&found);
    assert!(overlaps(&infos[0].domain, &infos[1].domain));
    assert_eq!(choose(Workload::Package, &infos), [0]);
    assert_eq!(choose(Workload::Package, &infos[1..]), [0]);
    assert_eq!(choose(Workload::DiscreteGpu(None), &infos), [0; 0]);
}

#[test]
fn intel_gpus_count_card_and_chip() {
    let machine = Machine::new();
    machine.set("sys/class/hwmon/hwmon0/name", "nvme");
    machine.set("sys/class/hwmon/hwmon1/name", "xe");
    for (n, label) in [(1, "card"), (2, "pkg")] {
        machine.set(&format!("sys/class/hwmon/hwmon1/energy{n}_label"), label);
        machine.set(&format!("sys/class/hwmon/hwmon1/energy{n}_input"), 1_000_000);
    }
    machine.set("sys/class/hwmon/hwmon2/name", "i915");
    machine.set("sys/class/hwmon/hwmon2/energy1_input", 3_000_000);
    // A tile of the i915 is a part of it.
    machine.set("sys/class/hwmon/hwmon4/name", "i915_gt0");
    machine.set("sys/class/hwmon/hwmon4/energy1_input", 3_000_000);
    let mut found = machine.discover();
    assert_eq!(domains(&found), ["board hwmon1", "GPU hwmon1", "GPU hwmon2"]);
    assert_eq!(choose(Workload::DiscreteGpu(None), &infos(&found)), [0, 2]);
    let window = machine.start(&mut found.meters);
    machine.set("sys/class/hwmon/hwmon1/energy1_input", 43_000_000);
    machine.set("sys/class/hwmon/hwmon2/energy1_input", 2_000_000);
    machine.pass(30.0);
    let measured = window.end();
    assert_joules(&measured[0], 42.0, 30.0);
    assert_fails(&measured[2], &["i915 hwmon2: the counter fell"]);

    machine.set("sys/class/hwmon/hwmon1/energy1_label", "fan");
    assert!(machine.discover().summary().contains("expected card or pkg, found \"fan\""));
}

const BATTERY: &str = "sys/class/power_supply/BAT0";

fn battery(files: &[(&str, u64)]) -> Machine {
    let machine = Machine::new();
    machine.set("sys/class/power_supply/AC/type", "Mains");
    machine.set(&format!("{BATTERY}/type"), "Battery");
    machine.set(&format!("{BATTERY}/status"), "Discharging");
    for (file, value) in files {
        machine.set(&format!("{BATTERY}/{file}"), value);
    }
    machine
}

#[test]
fn a_battery_counts_while_it_discharges() {
    let machine = battery(&[("energy_now", 50_000_000), ("power_now", 1)]);
    let measured = machine.measure(|machine, _| {
        machine.set(&format!("{BATTERY}/energy_now"), 49_900_000);
        machine.pass(60.0);
    });
    // 0.1 Wh.
    assert_joules(&measured, 360.0, 60.0);
    assert_eq!(measured.problems, [""; 0]);
    let measured = machine.measure(|machine, _| machine.pass(59.0));
    assert_eq!(measured.problems, ["59.0 s are short: this meter needs 60 s"]);

    // 10 mAh at 12 V falling to 11 V.
    let machine = battery(&[("charge_now", 4_000_000), ("voltage_now", 12_000_000)]);
    let measured = machine.measure(|machine, _| {
        machine.set(&format!("{BATTERY}/charge_now"), 3_990_000);
        machine.set(&format!("{BATTERY}/voltage_now"), 11_000_000);
        machine.pass(60.0);
    });
    assert_joules(&measured, 36.0 * 11.5, 60.0);

    let machine = battery(&[("power_now", 8_000_000)]);
    let measured = machine.measure(|machine, window| {
        for _ in 0..60 {
            machine.pass(1.0);
            assert!(window.poll());
        }
    });
    assert_joules(&measured, 480.0, 60.0);
    assert_eq!(measured.info.method, Method::PowerSamples);
}

#[test]
fn a_battery_that_charges_measures_nothing() {
    let status = format!("{BATTERY}/status");
    for other in ["Charging", "Full", "Not charging", "Unknown", ""] {
        let machine = battery(&[("energy_now", 50_000_000)]);
        machine.set(&status, other);
        let found = machine.discover();
        assert!(found.meters.is_empty());
        let problem = missing(&found, Source::PowerSupply);
        let words = format!("expected a battery that is discharging, found status {other:?}");
        assert!(problem.contains(&words), "{problem}");
    }
    let machine = battery(&[("energy_now", 50_000_000)]);
    let measured = machine.measure(|machine, window| {
        machine.set(&status, "Charging");
        machine.pass(30.0);
        assert!(window.poll());
        // Too late: some of the window is not in the gauge.
        machine.set(&status, "Discharging");
        machine.pass(30.0);
    });
    assert_fails(&measured, &["BAT0: expected a battery that is discharging"]);
    let measured = machine.measure(|machine, window| {
        machine.set(&format!("{BATTERY}/energy_now"), 50_000_001);
        machine.pass(30.0);
        assert!(window.poll());
        machine.set(&format!("{BATTERY}/energy_now"), 40_000_000);
    });
    assert_fails(&measured, &["gauge rose from 50000000 to 50000001"]);
    let machine = battery(&[("energy_now", 90_000_000)]);
    let measured = machine.measure(|machine, _| {
        machine.set(&format!("{BATTERY}/energy_now"), 0);
        machine.pass(60.0);
    });
    assert_fails(&measured, &["grew by 324000 J in 60.0 s"]);
}

#[test]
fn what_is_no_battery_of_this_machine_is_left_out() {
    for (file, value) in [("type", "UPS"), ("scope", "Device"), ("present", "0")] {
        let machine = battery(&[("energy_now", 50_000_000)]);
        machine.set(&format!("{BATTERY}/{file}"), value);
        let problem = missing(&machine.discover(), Source::PowerSupply);
        assert_eq!(problem, "no battery under /sys/class/power_supply");
    }
    let problem = missing(&battery(&[]).discover(), Source::PowerSupply);
    assert!(problem.contains("expected energy_now, charge_now with voltage_now, or power_now"));
    let machine = battery(&[("energy_now", u64::MAX)]);
    assert!(missing(&machine.discover(), Source::PowerSupply).contains("at most 1000000000000"));
}

#[test]
fn overlaps_are_symmetric_and_as_the_hardware_is() {
    let of = |package| Socket { package, die: None };
    let gpu = |address: &str| address.to_owned();
    let all = [
        Domain::Package(of(0)),
        Domain::Package(of(1)),
        Domain::Core(of(0)),
        Domain::Uncore(of(0)),
        Domain::Dram(of(0)),
        Domain::Platform,
        Domain::Board(gpu("a")),
        Domain::Board(gpu("b")),
        Domain::GpuChip(gpu("a")),
        Domain::Battery("BAT0".into()),
        Domain::Battery("BAT1".into()),
        Domain::Apu(gpu("c")),
        Domain::Soc(SocPart::Cpu),
    ];
    // A row and a column each, in the order above.
    let table = [
        "1.11.1...111.",
        ".1...1...111.",
        "1.1..1...111.",
        "1..1.1...111.",
        "....11...11..",
        "1111111111111",
        ".....11.111..",
        ".....1.1.11..",
        ".....11.111..",
        "1111111111.11",
        "111111111.111",
        "1111.1...111.",
        ".....1...11.1",
    ];
    for (a, row) in all.iter().zip(table) {
        for (b, expected) in all.iter().zip(row.chars()) {
            assert_eq!(overlaps(a, b), expected == '1', "{a} and {b}");
        }
    }
    for (index, part) in SocPart::ALL.into_iter().enumerate() {
        for other in &SocPart::ALL[..index] {
            assert!(!overlaps(&Domain::Soc(part), &Domain::Soc(*other)));
        }
    }
    let die = |die| Domain::Package(Socket { package: 0, die: Some(die) });
    assert!(overlaps(&die(0), &Domain::Package(of(0))) && overlaps(&die(1), &die(1)));
    assert!(!overlaps(&die(0), &die(1)));
}

#[test]
fn a_part_never_stands_for_the_whole() {
    let machine = Machine::new();
    machine.zone("intel-rapl:0", "package-0");
    machine.zone("intel-rapl:0:0", "core");
    machine.zone("intel-rapl:0:1", "dram");
    machine.zone("intel-rapl:1", "psys");
    let infos = infos(&machine.discover());
    assert_eq!(choose(Workload::Package, &infos[1..3]), [0; 0]);
    // Without the package psys counts, and the memory in it does not count again.
    assert_eq!(choose(Workload::Package, &infos[1..]), [2]);
}

#[test]
fn errors_keep_their_causes() {
    let machine = package();
    let mut found = machine.discover();
    let meter = &mut found.meters[0];
    let start = Instant::now();
    meter.start(start).unwrap();
    machine.energy("intel-rapl:0", 2_000_000);
    assert_eq!(meter.read(start + Duration::from_secs(1)).unwrap().joules, 2.0);
    machine.energy("intel-rapl:0", 1_000_000);
    for _ in 0..2 {
        let error = meter.read(start + Duration::from_secs(2)).unwrap_err();
        assert!(matches!(error, Error::CounterFell { before: 2_000_000, after: 1_000_000, .. }));
    }
}
