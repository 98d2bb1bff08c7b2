//! One page for people: `report.md`, and `report.html` with the curves. Ratios are taken within a round and shown with
//! their spread over the rounds; runs that do not count are named and left out.

mod chart;
mod html;

use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use crate::{
    Outcome,
    compare::Circumstances,
    result::{Latency, RunResult},
};

/// One line about a run.
pub fn line(r: &RunResult) -> String {
    let latency = |name: &str, l: &Option<Latency>| match l {
        Some(l) => format!(
            "  {name} p50 {:.0} p99 {:.0} p99.9 {:.0} max {:.0} us",
            l.p50, l.p99, l.p999, l.max
        ),
        None => String::new(),
    };
    let broker = if r.broker.resident > 0 {
        format!(
            "  broker {:.2} CPU, {} MiB",
            r.broker.cpu_s / r.workload.seconds as f64,
            r.broker.resident >> 20
        )
    } else {
        String::new()
    };
    let invalid = r
        .invalid
        .as_ref()
        .map_or(String::new(), |why| format!("  DOES NOT COUNT: {why}"));
    let catch_up = r
        .catch_up_mb_per_s
        .map_or(String::new(), |mb| format!("  catch-up {mb:.0} MB/s"));
    format!(
        "{} | {} | round {}:  {:.0} records/s, {:.1} MB/s{}{}{catch_up}{broker}{invalid}",
        r.workload.name,
        r.variant,
        r.round,
        r.records_per_s,
        r.mb_per_s,
        latency("produce", &r.produce),
        latency("end to end", &r.end_to_end),
    )
}

/// Median, least and most.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    median: f64,
    low: f64,
    high: f64,
}

fn spread(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
    let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let median = match values.len() {
        0 => return None,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    };
    Some(Spread {
        median,
        low: values[0],
        high: values[values.len() - 1],
    })
}

/// Something measured of a run.
struct Metric {
    name: &'static str,
    /// Whether more is better.
    more: bool,
    of: fn(&RunResult) -> Option<f64>,
}

const METRICS: &[Metric] = &[
    Metric {
        name: "produce p50 µs",
        more: false,
        of: |r| open_loop(r).map(|l| l.p50),
    },
    Metric {
        name: "produce p99 µs",
        more: false,
        of: |r| open_loop(r).map(|l| l.p99),
    },
    Metric {
        name: "produce p99.9 µs",
        more: false,
        of: |r| open_loop(r).map(|l| l.p999),
    },
    Metric {
        name: "end-to-end p50 µs",
        more: false,
        of: |r| r.end_to_end.as_ref().map(|l| l.p50),
    },
    Metric {
        name: "end-to-end p99 µs",
        more: false,
        of: |r| r.end_to_end.as_ref().map(|l| l.p99),
    },
    Metric {
        name: "end-to-end p99.9 µs",
        more: false,
        of: |r| r.end_to_end.as_ref().map(|l| l.p999),
    },
    Metric {
        name: "MB/s",
        more: true,
        of: |r| (r.workload.rate == 0).then_some(r.mb_per_s),
    },
    Metric {
        name: "catch-up MB/s",
        more: true,
        of: |r| r.catch_up_mb_per_s,
    },
    Metric {
        name: "broker CPU s/GB",
        more: false,
        of: |r| own(r).map(RunResult::cpu_per_gb),
    },
    Metric {
        name: "broker CPU s/million records",
        more: false,
        of: |r| own(r).map(RunResult::cpu_per_million),
    },
    Metric {
        name: "machine CPU s/GB, generator apart",
        more: false,
        of: |r| own(r).map(RunResult::machine_cpu_per_gb),
    },
    Metric {
        name: "resident MiB",
        more: false,
        of: |r| own(r).map(|r| r.broker.resident as f64 / 1048576.0),
    },
    Metric {
        name: "bytes written per byte",
        more: false,
        of: |r| own(r).map(RunResult::write_amplification),
    },
    Metric {
        name: "switches/s",
        more: false,
        of: |r| own(r).map(|r| r.broker.switches as f64 / r.workload.seconds as f64),
    },
    Metric {
        name: "start ms",
        more: false,
        of: |r| own(r).map(|r| r.start_ms),
    },
];

/// Latency under a schedule; that of a closed loop says nothing.
fn open_loop(r: &RunResult) -> Option<&Latency> {
    r.produce.as_ref().filter(|_| r.workload.rate > 0)
}

/// Runs whose broker's process was watched.
fn own(r: &RunResult) -> Option<&RunResult> {
    (r.broker.resident > 0).then_some(r)
}

/// Everything that a report is made of.
struct Results {
    circumstances: Circumstances,
    /// Those that count.
    runs: Vec<RunResult>,
    invalid: Vec<RunResult>,
    /// What was said of runs that ended with an error.
    failed: Vec<String>,
}

impl Results {
    fn read(dir: &Path) -> Outcome<Self> {
        let path = dir.join("circumstances.json");
        let text =
            fs::read(&path).map_err(|e| format!("{}: {e}; is this a folder that compare wrote?", path.display()))?;
        let circumstances = serde_json::from_slice(&text)?;
        let mut runs = Vec::new();
        let mut failed = Vec::new();
        for entry in fs::read_dir(dir.join("runs")).into_iter().flatten() {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json") {
                runs.push(serde_json::from_slice::<RunResult>(&fs::read(&path)?)?);
            } else if path.extension().is_some_and(|e| e == "failed") {
                failed.push(fs::read_to_string(&path)?);
            }
        }
        runs.sort_by(|a, b| (a.round, &a.variant).cmp(&(b.round, &b.variant)));
        let (invalid, runs) = runs.into_iter().partition(|r| r.invalid.is_some());
        Ok(Self {
            circumstances,
            runs,
            invalid,
            failed,
        })
    }

    /// A line for each run that does not count.
    fn not_counted(&self) -> Vec<String> {
        let mut lines: Vec<String> = self
            .invalid
            .iter()
            .map(line)
            .chain(self.failed.iter().cloned())
            .collect();
        lines.sort();
        lines
    }

    /// Names of workloads with their titles, slow schedules first and closed loops last.
    fn workloads(&self) -> Vec<(String, String)> {
        let mut seen = BTreeMap::new();
        for r in self.runs.iter().chain(&self.invalid) {
            let w = &r.workload;
            let order = (
                w.rate == 0,
                w.consumers,
                w.rate,
                w.partitions,
                w.record_bytes,
                w.batch_bytes,
            );
            seen.insert((order, w.name.clone()), w.title.clone());
        }
        seen.into_iter().map(|((_, name), title)| (name, title)).collect()
    }

    fn of<'a>(&'a self, workload: &'a str, variant: &'a str) -> impl Iterator<Item = &'a RunResult> {
        self.runs
            .iter()
            .filter(move |r| r.workload.name == workload && r.variant == variant)
    }

    fn metric(&self, workload: &str, variant: &str, metric: &Metric) -> Option<Spread> {
        spread(self.of(workload, variant).filter_map(metric.of))
    }

    /// Ours to theirs, round by round.
    fn ratio(&self, workload: &str, ours: &str, theirs: &str, metric: &Metric) -> Option<Spread> {
        let theirs: BTreeMap<usize, f64> = self
            .of(workload, theirs)
            .filter_map(|r| Some((r.round, (metric.of)(r)?)))
            .collect();
        spread(
            self.of(workload, ours)
                .filter_map(|r| Some((metric.of)(r)? / theirs.get(&r.round)?)),
        )
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn shown(spread: Option<Spread>) -> String {
    spread.map_or("–".into(), |s| {
        if s.low == s.high {
            number(s.median)
        } else {
            format!("{} ({}–{})", number(s.median), number(s.low), number(s.high))
        }
    })
}

/// A table: its title, head and rows.
struct Table {
    title: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

fn metric_table(results: &Results, workload: &str, title: &str) -> Table {
    let used: Vec<&Metric> = METRICS
        .iter()
        .filter(|m| {
            results
                .circumstances
                .variants
                .iter()
                .any(|(v, _)| results.metric(workload, v, m).is_some())
        })
        .collect();
    let rows = results
        .circumstances
        .variants
        .iter()
        .map(|(v, _)| {
            let counted = results.of(workload, v).count();
            let mut row = vec![v.clone(), counted.to_string()];
            row.extend(used.iter().map(|m| shown(results.metric(workload, v, m))));
            row
        })
        .collect();
    let mut head = vec!["".to_owned(), "rounds".to_owned()];
    head.extend(used.iter().map(|m| m.name.to_owned()));
    Table {
        title: format!("{title} (`{workload}`)"),
        head,
        rows,
    }
}

fn ratio_tables(results: &Results) -> Vec<Table> {
    const SHOWN: &[&str] = &[
        "produce p50 µs",
        "produce p99 µs",
        "produce p99.9 µs",
        "end-to-end p99 µs",
        "MB/s",
        "catch-up MB/s",
        "broker CPU s/GB",
        "resident MiB",
    ];
    results
        .circumstances
        .pairs
        .iter()
        .map(|(ours, theirs, why)| {
            let rows = results
                .workloads()
                .iter()
                .map(|(w, _)| {
                    let mut row = vec![w.clone()];
                    row.extend(SHOWN.iter().map(|name| {
                        let metric = METRICS.iter().find(|m| m.name == *name);
                        shown(metric.and_then(|m| results.ratio(w, ours, theirs, m)))
                    }));
                    row
                })
                .collect();
            let mut head = vec!["workload".to_owned()];
            head.extend(SHOWN.iter().map(|s| s.trim_end_matches(" µs").to_owned()));
            Table {
                title: format!("{ours} : {theirs} — {why}"),
                head,
                rows,
            }
        })
        .collect()
}

/// Where the other side is ahead, in words.
fn where_they_win(results: &Results) -> Vec<String> {
    let mut lines = Vec::new();
    for (ours, theirs, _) in &results.circumstances.pairs {
        for (workload, _) in results.workloads() {
            for metric in METRICS {
                if let Some(ratio) = results.ratio(&workload, ours, theirs, metric)
                    && (ratio.median > 1.0) != metric.more
                    && (ratio.median - 1.0).abs() > 0.005
                {
                    lines.push(format!(
                        "{theirs} is ahead of {ours} in {} of `{workload}`: ratio {}",
                        metric.name,
                        shown(Some(ratio))
                    ));
                }
            }
        }
    }
    lines
}

fn markdown(results: &Results) -> Result<String, std::fmt::Error> {
    let c = &results.circumstances;
    let mut out = String::from("# Millrace beside others\n\n");
    writeln!(
        out,
        "`{}`, {} rounds asked for, {} s of warm-up load after each start. Median (least–most) over the rounds; ratios are taken within a round.\n",
        c.command, c.rounds, c.warm_up
    )?;
    for line in c.machine.iter().chain(&c.targets) {
        writeln!(out, "- {line}")?;
    }
    for (name, configs) in c.variants.iter().filter(|(_, c)| !c.is_empty()) {
        writeln!(out, "- {name}: topics with `{configs}`")?;
    }
    writeln!(out, "\nThe floor, before the first round:\n")?;
    for line in &c.floor {
        writeln!(out, "- {line}")?;
    }
    writeln!(out, "\n## Ratios\n")?;
    let table = |out: &mut String, t: &Table| -> std::fmt::Result {
        writeln!(out, "**{}**\n", t.title)?;
        writeln!(
            out,
            "| {} |\n|{}|",
            t.head.join(" | "),
            "---|".repeat(t.head.len()).trim_end_matches('|')
        )?;
        for row in &t.rows {
            writeln!(out, "| {} |", row.join(" | "))?;
        }
        writeln!(out)
    };
    for t in ratio_tables(results) {
        table(&mut out, &t)?;
    }
    let wins = where_they_win(results);
    if !wins.is_empty() {
        writeln!(out, "## Where the other side is ahead\n")?;
        for line in wins {
            writeln!(out, "- {line}")?;
        }
        writeln!(out)?;
    }
    writeln!(out, "## Workloads\n")?;
    for (name, title) in results.workloads() {
        table(&mut out, &metric_table(results, &name, &title))?;
    }
    let not_counted = results.not_counted();
    if !not_counted.is_empty() {
        writeln!(out, "## Runs that do not count\n")?;
        for line in not_counted {
            writeln!(out, "- {line}")?;
        }
    }
    Ok(out)
}

/// Writes `report.md` and `report.html` beside the results.
///
/// # Errors
/// The folder holds no results, or cannot be written.
pub fn write(dir: &Path) -> Outcome<()> {
    let results = Results::read(dir)?;
    fs::write(dir.join("report.md"), markdown(&results)?)?;
    fs::write(dir.join("report.html"), html::page(&results)?)?;
    eprintln!("{}", dir.join("report.html").display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(
            spread([3.0, 1.0, 2.0]).map(|s| (s.median, s.low, s.high)),
            Some((2.0, 1.0, 3.0))
        );
        assert_eq!(spread([4.0, 1.0]).map(|s| s.median), Some(2.5));
        assert_eq!(spread([f64::NAN]), None);
    }
}
