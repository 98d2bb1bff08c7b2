//! Load for brokers that speak the Kafka protocol, and what the disk beneath them can do.
//!
//! `millrace-bench produce` sends single-record batches on a schedule that does not wait for answers and counts latency from
//! the intended time of sending (open loop, no coordinated omission). `millrace-bench floor` writes and flushes the
//! same amounts by io_uring directly: no broker that flushes before it acknowledges can be faster than that.

mod floor;
mod produce;

use std::{error::Error, path::PathBuf};

use clap::{Parser, Subcommand};
use hdrhistogram::Histogram;

#[derive(Parser)]
#[command(name = "millrace-bench", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Open-loop produce latency against one broker.
    Produce(produce::Load),
    /// Write-and-flush latency of the disk itself.
    Floor {
        /// Folder on the disk in question.
        #[arg(long, default_value = ".")]
        dir: PathBuf,
        /// Bytes per write, rounded up to blocks of 4,096.
        #[arg(long, default_value_t = 1024)]
        size: usize,
        /// Writes.
        #[arg(long, default_value_t = 5000)]
        count: usize,
    },
}

/// One line: count and percentiles in microseconds.
fn summary(name: &str, histogram: &Histogram<u64>) -> String {
    let us = |q: f64| histogram.value_at_quantile(q) as f64 / 1000.0;
    format!(
        "{name}: n {} p50 {:.0} p90 {:.0} p99 {:.0} p99.9 {:.0} max {:.0} us",
        histogram.len(),
        us(0.5),
        us(0.9),
        us(0.99),
        us(0.999),
        histogram.max() as f64 / 1000.0
    )
}

fn main() -> Result<(), Box<dyn Error>> {
    match Cli::parse().command {
        Command::Produce(load) => produce::run(&load),
        Command::Floor { dir, size, count } => floor::run(&dir, size, count),
    }
}
