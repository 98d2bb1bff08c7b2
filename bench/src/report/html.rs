//! The page: self-contained, no script.

use std::fmt::Write;

use super::{
    METRICS, Results, Table,
    chart::{self, Series, XAxis},
    metric_table, ratio_tables, shown, where_they_win,
};
use crate::Outcome;
use crate::result::{Latency, RunResult};
use crate::wire::Codec;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1c1c1c}\
h1{font-size:1.6rem}h2{margin-top:2.5rem;border-bottom:1px solid #ddd}h3{margin-top:2rem}\
table{border-collapse:collapse;margin:.6rem 0 1.4rem;font-variant-numeric:tabular-nums;font-size:13px;display:block;overflow-x:auto}\
th,td{padding:.25rem .6rem;border-bottom:1px solid #e5e5e5;text-align:right;white-space:nowrap}\
th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}code{background:#f4f4f4;padding:0 .25em}";

fn escape(text: &str) -> String {
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // The texts' one mark-up.
    let mut parts = escaped.split('`');
    let mut out = parts.next().unwrap_or("").to_owned();
    for (n, part) in parts.enumerate() {
        out.push_str(if n % 2 == 0 { "<code>" } else { "</code>" });
        out.push_str(part);
    }
    out
}

fn table(out: &mut String, t: &Table) -> std::fmt::Result {
    writeln!(out, "<h3>{}</h3><table><tr>", escape(&t.title))?;
    for cell in &t.head {
        write!(out, "<th>{}</th>", escape(cell))?;
    }
    writeln!(out, "</tr>")?;
    for row in &t.rows {
        let cells: String = row.iter().map(|c| format!("<td>{}</td>", escape(c))).collect();
        writeln!(out, "<tr>{cells}</tr>")?;
    }
    writeln!(out, "</table>")
}

fn list(out: &mut String, lines: impl IntoIterator<Item = String>) -> std::fmt::Result {
    writeln!(out, "<ul>")?;
    for line in lines {
        writeln!(out, "<li>{}</li>", escape(&line))?;
    }
    writeln!(out, "</ul>")
}

/// The round in the middle by p99, whose curve stands for the variant.
fn typical<'a>(results: &'a Results, workload: &'a str, variant: &'a str, of: Pick) -> Option<&'a Latency> {
    let mut latencies: Vec<&Latency> = results.of(workload, variant).filter_map(of).collect();
    latencies.sort_by(|a, b| a.p99.total_cmp(&b.p99));
    latencies.get(latencies.len() / 2).copied()
}

type Pick = fn(&RunResult) -> Option<&Latency>;

fn curves(results: &Results, workload: &str, of: Pick) -> Vec<Series> {
    results
        .circumstances
        .variants
        .iter()
        .filter_map(|(variant, _)| {
            let latency = typical(results, workload, variant, of)?;
            Some(Series {
                name: variant.clone(),
                points: latency.curve.iter().map(|(q, us)| (1.0 / (1.0 - q), *us)).collect(),
            })
        })
        .collect()
}

/// Latency against load: workloads that differ in nothing but their rate.
fn against_load(results: &Results) -> Vec<Series> {
    let p99 = &METRICS[1];
    let plain = |r: &&RunResult| {
        let w = &r.workload;
        w.rate > 0
            && w.consumers == 0
            && w.partitions == 8
            && w.hot_share == 0.0
            && w.idle_connections == 0
            && w.backlog_readers == 0
            && w.compression == Codec::None
            && w.record_bytes == 1000
    };
    results
        .circumstances
        .variants
        .iter()
        .filter_map(|(variant, _)| {
            let mut points: Vec<(f64, f64)> = results
                .workloads()
                .iter()
                .filter_map(|(name, _)| {
                    let rate = results.of(name, variant).find(plain)?.workload.rate;
                    Some((rate as f64, results.metric(name, variant, p99)?.median))
                })
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            (points.len() > 1).then(|| Series {
                name: variant.clone(),
                points,
            })
        })
        .collect()
}

/// The whole page.
pub(super) fn page(results: &Results) -> Outcome<String> {
    let c = &results.circumstances;
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Millrace beside others</title><style>{STYLE}</style><h1>Millrace beside others</h1>"
    );
    writeln!(
        out,
        "<p><code>{}</code>, {} rounds asked for, {} s of warm-up load after each start. Median (least–most) over the rounds; \
         ratios are taken within a round, below 1 means that the first needs less. Latency counts from the time a record was \
         due on a schedule that waits for no answer.</p>",
        escape(&c.command),
        c.rounds,
        c.warm_up
    )?;
    list(&mut out, c.machine.iter().chain(&c.targets).cloned())?;
    let configured = c.variants.iter().filter(|(_, configs)| !configs.is_empty());
    list(
        &mut out,
        configured.map(|(name, configs)| format!("{name}: topics with `{configs}`")),
    )?;
    writeln!(
        out,
        "<h2>The floor</h2><p>What disk and network do without a broker, measured before the first round.</p>"
    )?;
    list(&mut out, c.floor.iter().cloned())?;
    writeln!(out, "<h2>Ratios</h2>")?;
    for t in ratio_tables(results) {
        table(&mut out, &t)?;
    }
    let wins = where_they_win(results);
    if !wins.is_empty() {
        writeln!(out, "<h2>Where the other side is ahead</h2>")?;
        list(&mut out, wins)?;
    }
    out.push_str(&chart::lines(
        "Produce p99 against load",
        "records per second",
        "µs",
        XAxis::Number,
        &against_load(results),
    )?);
    writeln!(out, "<h2>Workloads</h2>")?;
    for (name, title) in results.workloads() {
        table(&mut out, &metric_table(results, &name, &title))?;
        let produce: Pick = |r| r.produce.as_ref().filter(|_| r.workload.rate > 0);
        for (what, of) in [
            ("produce", produce),
            ("end to end", |r: &RunResult| r.end_to_end.as_ref()),
        ] {
            let title = format!("{name}: {what} latency by percentile (round in the middle by p99)");
            out.push_str(&chart::lines(
                &title,
                "percentile",
                "µs",
                XAxis::Percentile,
                &curves(results, &name, of),
            )?);
        }
    }
    let not_counted = results.not_counted();
    if !not_counted.is_empty() {
        writeln!(out, "<h2>Runs that do not count</h2>")?;
        list(&mut out, not_counted)?;
    }
    writeln!(
        out,
        "<p>CPU of the broker: {}</p></html>",
        escape(&cpu_summary(results))
    )?;
    Ok(out)
}

fn cpu_summary(results: &Results) -> String {
    let Some(metric) = METRICS.iter().find(|m| m.name == "broker CPU s/GB") else {
        return String::new();
    };
    results
        .circumstances
        .variants
        .iter()
        .map(|(variant, _)| {
            let all = results.workloads().into_iter().filter(|(w, _)| w.starts_with("full"));
            let values: Vec<String> = all
                .map(|(w, _)| format!("`{w}` {}", shown(results.metric(&w, variant, metric))))
                .collect();
            format!("{variant}: {} s/GB", values.join(", "))
        })
        .collect::<Vec<_>>()
        .join("; ")
}
