//! Runs simulated histories of a replicated partition: `millrace-sim [--seeds N] [--from SEED]`, or `millrace-sim --seed SEED` for
//! one that failed, with all that happens in it.

use std::{process::ExitCode, time::Instant};

use millrace_cluster::simulation::{Bug, explain, run};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (mut from, mut seeds) = (1_u64, 1_000_u64);
    while let Some(name) = arguments.next() {
        let value = arguments.next().and_then(|v| v.parse().ok());
        match (name.as_str(), value) {
            ("--seeds", Some(n)) => seeds = n,
            ("--from", Some(n)) => from = n,
            ("--seed", Some(n)) => (from, seeds) = (n, 1),
            _ => {
                eprintln!("millrace-sim [--seeds N] [--from SEED] | --seed SEED");
                return ExitCode::FAILURE;
            }
        }
    }
    let began = Instant::now();
    let mut failed = 0;
    let (mut acknowledged, mut elections, mut cuts, mut commits) = (0, 0, 0, 0);
    for seed in from..from + seeds {
        let ended = if seeds == 1 {
            explain(seed, Bug::None, |text| println!("{text}"))
        } else {
            run(seed, Bug::None)
        };
        match ended {
            Ok(outcome) => {
                acknowledged += outcome.acknowledged;
                elections += outcome.elections;
                cuts += outcome.cuts;
                commits += outcome.commits;
            }
            Err(violation) => {
                failed += 1;
                println!("seed {seed}: {violation}\n  again: millrace-sim --seed {seed}");
            }
        }
    }
    let per_minute = seeds as f64 / began.elapsed().as_secs_f64() * 60.0;
    println!(
        "{seeds} histories, {failed} failed: {acknowledged} records acknowledged, {elections} leaderships, {cuts} logs cut, {commits} commits; {per_minute:.0} histories a minute"
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
