//! What a run leaves behind: JSON for the report and for others, a `.hgrm` for HdrHistogram's own tools.

use std::{fmt::Write, fs, path::Path};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::{Outcome, load::Measured, process::Usage, workload::Workload};

/// Latencies in microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Values recorded.
    pub count: u64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Largest.
    pub max: f64,
    /// Quantile and value, for curves.
    pub curve: Vec<(f64, f64)>,
}

impl Latency {
    /// Of a histogram of nanoseconds; `None` if it is empty.
    pub fn of(histogram: &Histogram<u64>) -> Option<Self> {
        if histogram.is_empty() {
            return None;
        }
        let us = |q: f64| histogram.value_at_quantile(q) as f64 / 1000.0;
        // Ten points for each further nine.
        let curve = (0..=50)
            .map(|n| 1.0 - 10_f64.powf(-f64::from(n) / 10.0))
            .take_while(|q| (1.0 - q) * histogram.len() as f64 >= 1.0)
            .map(|q| (q, us(q)))
            .collect();
        Some(Self {
            count: histogram.len(),
            p50: us(0.5),
            p90: us(0.9),
            p99: us(0.99),
            p999: us(0.999),
            max: histogram.max() as f64 / 1000.0,
            curve,
        })
    }
}

/// One workload, one variant, one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunResult {
    /// What was run.
    pub workload: Workload,
    /// Against what.
    pub variant: String,
    /// Counted from 1.
    pub round: usize,
    /// Why it does not count, if it does not.
    pub invalid: Option<String>,
    /// From intended sending to acknowledgement.
    pub produce: Option<Latency>,
    /// From intended sending to receipt by a consumer.
    pub end_to_end: Option<Latency>,
    /// Acknowledged records per second.
    pub records_per_s: f64,
    /// Acknowledged megabytes (10^6) of values per second.
    pub mb_per_s: f64,
    /// Megabytes (10^6) per second that readers of the backlog got together, each until it had everything.
    pub catch_up_mb_per_s: Option<f64>,
    /// What the broker's process used in the measured time.
    pub broker: Usage,
    /// CPU seconds of the generator in the measured time.
    pub generator_cpu_s: f64,
    /// The generator's own lateness, 99th percentile, microseconds.
    pub generator_lag_us: f64,
    /// Milliseconds from the start of the broker's process to its readiness.
    pub start_ms: f64,
}

impl RunResult {
    fn bytes(&self) -> f64 {
        self.mb_per_s * self.workload.seconds as f64 * 1e6
    }

    /// CPU seconds of the broker's process for a gigabyte (10^9) of values.
    pub fn cpu_per_gb(&self) -> f64 {
        self.broker.cpu_s / (self.bytes() / 1e9)
    }

    /// The same of the whole machine but the generator: the kernel's threads work for the broker too.
    pub fn machine_cpu_per_gb(&self) -> f64 {
        (self.broker.machine_cpu_s - self.generator_cpu_s) / (self.bytes() / 1e9)
    }

    /// CPU seconds of the broker's process for a million records.
    pub fn cpu_per_million(&self) -> f64 {
        self.broker.cpu_s / (self.records_per_s * self.workload.seconds as f64 / 1e6)
    }

    /// Bytes caused to be written for a byte of values.
    pub fn write_amplification(&self) -> f64 {
        self.broker.written as f64 / self.bytes()
    }
}

/// Puts the parts together.
pub fn assemble(
    workload: &Workload,
    variant: &str,
    round: usize,
    measured: &Measured,
    (broker, generator): (Usage, Usage),
    start_ms: f64,
) -> RunResult {
    let records_per_s = measured.records as f64 / measured.seconds;
    RunResult {
        workload: workload.clone(),
        variant: variant.into(),
        round,
        invalid: measured.invalid.clone(),
        produce: Latency::of(&measured.produce),
        end_to_end: Latency::of(&measured.end_to_end),
        records_per_s,
        mb_per_s: records_per_s * workload.record_bytes as f64 / 1e6,
        catch_up_mb_per_s: measured.catch_up_mb_per_s,
        broker,
        generator_cpu_s: generator.cpu_s,
        generator_lag_us: measured.lag_p99 as f64 / 1000.0,
        start_ms,
    }
}

/// HdrHistogram's percentile distribution, in milliseconds, as its plotters read it.
fn hgrm(histogram: &Histogram<u64>) -> String {
    let mut out = String::from("       Value     Percentile TotalCount 1/(1-Percentile)\n\n");
    let ms = |v: u64| v as f64 / 1e6;
    let mut total = 0;
    for v in histogram.iter_quantiles(5) {
        total += v.count_since_last_iteration();
        let q = v.quantile_iterated_to();
        let inverse = if q < 1.0 {
            format!("{:14.2}", 1.0 / (1.0 - q))
        } else {
            String::new()
        };
        let _ = writeln!(out, "{:12.3} {q:14.12} {total:10} {inverse}", ms(v.value_iterated_to()));
    }
    let _ = writeln!(
        out,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n#[Max     = {:12.3}, Total count    = {:12}]",
        histogram.mean() / 1e6,
        histogram.stdev() / 1e6,
        ms(histogram.max()),
        histogram.len()
    );
    out
}

fn name(workload: &str, variant: &str, round: usize) -> String {
    format!("{workload}-{}-{round}", variant.replace([' ', ',', '/'], "_"))
}

/// Notes that a run ended with an error.
///
/// # Errors
/// The folder cannot be written.
pub fn store_failure(dir: &Path, workload: &str, variant: &str, round: usize, text: &str) -> Outcome<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join(format!("{}.failed", name(workload, variant, round))), text)?;
    Ok(())
}

/// Writes the files of one run.
///
/// # Errors
/// The folder cannot be written.
pub fn store(dir: &Path, result: &RunResult, measured: &Measured) -> Outcome<()> {
    fs::create_dir_all(dir)?;
    let name = name(&result.workload.name, &result.variant, result.round);
    fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(result)?)?;
    if !measured.produce.is_empty() {
        fs::write(dir.join(format!("{name}-produce.hgrm")), hgrm(&measured.produce))?;
    }
    if !measured.end_to_end.is_empty() {
        fs::write(dir.join(format!("{name}-end-to-end.hgrm")), hgrm(&measured.end_to_end))?;
    }
    Ok(())
}
