//! Rounds: each target in turn, started on an empty folder and a disk with nothing left to write, warmed, driven, stopped.
//!
//! Fair by construction: the same client, workloads, disk and cores; every target's defaults; topics made with the same
//! number of partitions; and a second pair at equal durability, by the topic setting that both have (`flush.messages`).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::{
    Outcome,
    entrants::{self, Entrant},
    floor,
    load::{self, Measured},
    process, report,
    result::{self, RunResult},
    target::{Running, Target},
    wire,
    workload::{self, Workload},
};

/// How to compare.
#[derive(clap::Args)]
pub struct Options {
    /// What is compared.
    #[command(flatten)]
    choice: entrants::Choice,
    /// Folder for results and report; also the disk that is used.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    /// Rounds; every target runs once in each.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// File of workloads [default: the standard ones]
    #[arg(long)]
    file: Option<PathBuf>,
    /// Only these workloads, by name.
    #[arg(long = "only")]
    only: Vec<String>,
    /// Seconds of load before the first workload of a start, so that a JVM has compiled what it runs.
    #[arg(long, default_value_t = 15)]
    warm_up: u64,
    /// Seconds measured, instead of what the workloads say.
    #[arg(long)]
    seconds: Option<u64>,
}

/// Pause between two targets, after all is written.
const SETTLE: Duration = Duration::from_secs(1);
/// Workloads with more partitions have rounds of their own, after all others: file systems answer late for minutes after thousands of
/// files were removed, and that is not to be what the next target is measured by.
const FEW_PARTITIONS: i32 = 1000;

/// What a report says of the circumstances.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Circumstances {
    /// The command that repeats it.
    pub command: String,
    /// Seconds since 1970 at the start.
    pub started: u64,
    /// Processor, cores, memory, kernel, file system.
    pub machine: Vec<String>,
    /// Each target, with how it was started.
    pub targets: Vec<String>,
    /// Each variant's name with its topic settings.
    pub variants: Vec<(String, String)>,
    /// Pairs to compare: ours, theirs, and what makes the pair fair.
    pub pairs: Vec<(String, String, String)>,
    /// What disk and network did before the first round.
    pub floor: Vec<String>,
    /// Seconds of warm-up load after each start.
    pub warm_up: u64,
    /// Rounds asked for.
    pub rounds: usize,
}

static TOPICS: AtomicU64 = AtomicU64::new(0);

/// One workload against a broker that is there.
///
/// # Errors
/// The broker refuses or fails.
pub fn one(
    address: &str,
    pids: &[u32],
    w: &Workload,
    variant: &str,
    configs: &[(String, String)],
    round: usize,
    start_ms: f64,
) -> Outcome<(RunResult, Measured)> {
    // Unique on a broker that outlives this process, too.
    let topic = format!(
        "bench-{}-{}-{}",
        w.name,
        std::process::id(),
        TOPICS.fetch_add(1, Ordering::Relaxed)
    );
    wire::create_topic(address, &topic, w.partitions, w.replicas, configs)?;
    let mut readings = Vec::with_capacity(2);
    let measured = load::run(address, &topic, w, || {
        readings.push((process::usage_of_all(pids), process::usage(std::process::id())));
    })?;
    wire::delete_topic(address, &topic)?;
    let used = match readings.as_slice() {
        [(broker, generator), (broker_end, generator_end)] => {
            (broker_end.since(broker), generator_end.since(generator))
        }
        _ => Default::default(),
    };
    let result = result::assemble(w, variant, round, &measured, used, start_ms);
    Ok((result, measured))
}

fn machine(dir: &Path) -> Vec<String> {
    let read = |p: &str| fs::read_to_string(p).unwrap_or_default();
    let after = |text: &str, name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name))
            .map(|l| l.trim_start_matches([' ', '\t', ':']).trim().to_owned())
            .unwrap_or_default()
    };
    let cpu = read("/proc/cpuinfo");
    let cores = cpu.lines().filter(|l| l.starts_with("processor")).count();
    let file_system = Command::new("stat")
        .args(["-f", "-c", "%T"])
        .arg(dir)
        .output()
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
        .unwrap_or_default();
    vec![
        format!("{cores} cores, {}", after(&cpu, "model name")),
        format!("memory {}", after(&read("/proc/meminfo"), "MemTotal")),
        format!("kernel {}", read("/proc/sys/kernel/osrelease").trim()),
        format!("file system {file_system}"),
    ]
}

/// Compares.
///
/// # Errors
/// A target does not start, or the folder cannot be written. What was done stays, and is reported.
pub fn run(options: &Options) -> Outcome<()> {
    let mut workloads = workload::load(options.file.as_deref())?;
    if let Some(unknown) = options.only.iter().find(|o| workloads.iter().all(|w| w.name != **o)) {
        return Err(format!("no workload is called {unknown}").into());
    }
    workloads.retain(|w| options.only.is_empty() || options.only.contains(&w.name));
    for w in &mut workloads {
        w.seconds = options.seconds.unwrap_or(w.seconds);
        w.replicas = options.choice.replicas().unwrap_or(w.replicas);
    }
    let entrants = entrants::all(&options.choice)?;
    fs::create_dir_all(&options.dir)?;
    let runs = options.dir.join("runs");
    if runs.exists() {
        fs::remove_dir_all(&runs)?;
    }
    let circumstances = Circumstances {
        command: std::env::args()
            .enumerate()
            .map(|(n, a)| if n == 0 { "millrace-bench".into() } else { a })
            .collect::<Vec<_>>()
            .join(" "),
        started: std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)?
            .as_secs(),
        machine: machine(&options.dir),
        targets: entrants
            .iter()
            .map(|e| e.target.describe())
            .chain(
                options
                    .choice
                    .replicas()
                    .map(|n| format!("every partition has {n} replicas")),
            )
            .collect(),
        variants: entrants
            .iter()
            .flat_map(|e| &e.variants)
            .map(|v| {
                let configs: Vec<String> = v.configs.iter().map(|(k, v)| format!("{k}={v}")).collect();
                (v.name.clone(), configs.join(" "))
            })
            .collect(),
        pairs: entrants::pairs(&options.choice),
        floor: floor::run(&options.dir, 1024, 3000)?.lines(),
        warm_up: options.warm_up,
        rounds: options.rounds,
    };
    fs::write(
        options.dir.join("circumstances.json"),
        serde_json::to_vec_pretty(&circumstances)?,
    )?;

    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&stop))?;
    let (few, many): (Vec<_>, Vec<_>) = workloads.into_iter().partition(|w| w.partitions <= FEW_PARTITIONS);
    let series: Vec<_> = [few, many].into_iter().filter(|w| !w.is_empty()).collect();
    let seconds: u64 = series.iter().map(|w| seconds_of_a_round(w, &entrants, options)).sum();
    let bar = ProgressBar::new(seconds * options.rounds as u64);
    bar.set_style(ProgressStyle::with_template(
        "{wide_bar} {elapsed_precise} of about {duration_precise}, {eta_precise} left  {msg}",
    )?);
    let result = (|| -> Outcome<()> {
        for (workloads, round) in series
            .iter()
            .flat_map(|w| (1..=options.rounds).map(move |round| (w, round)))
        {
            // There and back again: whoever is slowed down by what another leaves to the disk is not always the same one.
            let mut order: Vec<_> = entrants.iter().collect();
            if round % 2 == 0 {
                order.reverse();
            }
            for entrant in order {
                bar.set_message(format!("round {round}: {} starts", entrant.name));
                let folder = options.dir.join("broker").join(&entrant.name);
                let running = entrant.target.start(&folder)?;
                drive(&running, entrant, workloads, options, round, &runs, &bar, &stop)?;
                running.stop();
                settle(&folder)?;
                if stop.load(Ordering::Acquire) {
                    return Ok(());
                }
            }
        }
        Ok(())
    })();
    bar.finish_and_clear();
    let _ = fs::remove_dir_all(options.dir.join("broker"));
    // Whatever was done is worth a report.
    let reported = report::write(&options.dir);
    result.and(reported)
}

fn seconds_of_a_round(workloads: &[Workload], entrants: &[Entrant], options: &Options) -> u64 {
    let loads: u64 = workloads.iter().map(|w| w.warm_up + w.seconds + 1).sum();
    let starts = entrants
        .iter()
        .map(|e| options.warm_up + 4 + loads * e.variants.len() as u64);
    starts.sum()
}

/// The next target is not to wait for what the last one left to the kernel: gigabytes that are still to be written, where it did not
/// flush.
fn settle(folder: &Path) -> Outcome<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    if !Command::new("sync").status()?.success() {
        return Err("sync failed".into());
    }
    std::thread::sleep(SETTLE);
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "one place calls it, with everything it knows")]
fn drive(
    running: &Running,
    entrant: &Entrant,
    workloads: &[Workload],
    options: &Options,
    round: usize,
    runs: &Path,
    bar: &ProgressBar,
    stop: &AtomicBool,
) -> Outcome<()> {
    let floor = matches!(entrant.target, Target::Floor);
    // Nothing there needs to be warmed.
    if options.warm_up > 0 && !floor {
        let warm = Workload {
            name: "warm-up".into(),
            rate: 10_000,
            warm_up: 0,
            seconds: options.warm_up,
            // What copies records is warmed, too.
            replicas: options.choice.replicas().unwrap_or(1),
            ..Workload::default()
        };
        one(&running.address, &[], &warm, "", &[], round, 0.0)?;
        bar.inc(options.warm_up + 4);
    }
    for w in workloads {
        for variant in &entrant.variants {
            if stop.load(Ordering::Acquire) {
                return Ok(());
            }
            // It keeps nothing that could be read.
            if floor && w.consumers + w.backlog_readers > 0 {
                continue;
            }
            bar.set_message(format!("round {round}: {}, {}", variant.name, w.name));
            let start_ms = running.start.as_secs_f64() * 1000.0;
            let outcome = one(
                &running.address,
                &running.pids(),
                w,
                &variant.name,
                &variant.configs,
                round,
                start_ms,
            );
            match outcome {
                Ok((result, measured)) => {
                    // Also where no bar can be drawn.
                    bar.suspend(|| println!("{}", report::line(&result)));
                    result::store(runs, &result, &measured)?;
                }
                // A target that breaks under a load is a result; the others go on.
                Err(error) => {
                    let text = format!("{} | {} | round {round}: FAILED: {error}", w.name, variant.name);
                    bar.suspend(|| println!("{text}"));
                    result::store_failure(runs, &w.name, &variant.name, round, &text)?;
                }
            }
            bar.inc(w.warm_up + w.seconds + 1);
        }
    }
    Ok(())
}
