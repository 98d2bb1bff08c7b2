//! Load for brokers that speak the Kafka protocol, side by side, and what the machine beneath them can do.
//!
//! `compare` starts Millrace and Apache Kafka in turn and writes a report; `run` drives one broker that is there; `report`
//! makes a report of results again; `floor` writes and flushes by io_uring directly: no broker that flushes before it
//! acknowledges can be faster than that.

mod catch_up;
mod compare;
mod entrants;
mod floor;
mod floor_server;
mod load;
mod process;
mod report;
mod result;
mod target;
mod wire;
mod workload;

use std::{error::Error, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::workload::Workload;

/// Errors are for people here: they end the program.
type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

#[derive(Parser)]
#[command(name = "millrace-bench", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Millrace and Apache Kafka in turn on this machine, and a report.
    Compare(compare::Options),
    /// One workload against one broker.
    Run(Run),
    /// Makes the report of a folder of results.
    Report {
        /// Folder that `compare` wrote.
        dir: PathBuf,
    },
    /// What the disk and the network of this machine can do.
    Floor {
        /// Folder on the disk in question.
        #[arg(long, default_value = ".")]
        dir: PathBuf,
        /// Bytes per write, rounded up to blocks of 4,096, and per message.
        #[arg(long, default_value_t = 1024)]
        size: usize,
        /// Operations.
        #[arg(long, default_value_t = 5000)]
        count: usize,
    },
    /// The least that a server which flushes before it acknowledges can do; `compare` starts it as the floor.
    FloorServer {
        /// New folder for its files.
        #[arg(long)]
        dir: PathBuf,
    },
}

/// A workload on the command line; what is not given is as `bench/src/workload.rs` says.
#[derive(clap::Args)]
struct Run {
    /// Broker, HOST:PORT.
    #[arg(long, default_value = "127.0.0.1:9092")]
    target: String,
    /// A workload of this file (or of the standard ones) by its name; options given beside it change it.
    #[arg(long)]
    workload: Option<String>,
    /// File of workloads.
    #[arg(long)]
    file: Option<PathBuf>,
    /// Records per second; 0 is as fast as possible.
    #[arg(long)]
    rate: Option<u64>,
    /// Records due at the same instant.
    #[arg(long)]
    burst: Option<u64>,
    /// Bytes of a record's value.
    #[arg(long)]
    record_bytes: Option<usize>,
    /// Most bytes of a batch.
    #[arg(long)]
    batch_bytes: Option<usize>,
    /// Microseconds a record may wait for others.
    #[arg(long)]
    linger_us: Option<u64>,
    /// Partitions.
    #[arg(long)]
    partitions: Option<i32>,
    /// Replicas of each partition.
    #[arg(long)]
    replicas: Option<i16>,
    /// Producing connections.
    #[arg(long)]
    producers: Option<usize>,
    /// Consuming connections.
    #[arg(long)]
    consumers: Option<usize>,
    /// -1 all, 1 leader, 0 none.
    #[arg(long, allow_negative_numbers = true)]
    acks: Option<i16>,
    /// Requests in flight per connection.
    #[arg(long)]
    in_flight: Option<usize>,
    /// Seconds of warm-up.
    #[arg(long)]
    warm_up: Option<u64>,
    /// Seconds measured.
    #[arg(long)]
    seconds: Option<u64>,
    /// A topic's setting, NAME=VALUE.
    #[arg(long = "topic-config")]
    topic_config: Vec<String>,
    /// Number of the broker's process, to report what it uses; of all of them, where there are several.
    #[arg(long)]
    pid: Vec<u32>,
    /// Folder for the JSON and the histograms.
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Run {
    fn workload(&self) -> Outcome<Workload> {
        let mut w = match &self.workload {
            Some(name) => workload::load(self.file.as_deref())?
                .into_iter()
                .find(|w| w.name == *name)
                .ok_or_else(|| format!("no workload is called {name}"))?,
            None => Workload::default(),
        };
        macro_rules! take {
            ($($field:ident)*) => { $(if let Some(value) = self.$field { w.$field = value; })* };
        }
        take!(rate burst record_bytes batch_bytes linger_us partitions replicas producers consumers acks in_flight warm_up seconds);
        workload::check(&w)?;
        Ok(w)
    }
}

fn run(options: &Run) -> Outcome<()> {
    let w = options.workload()?;
    let configs = options
        .topic_config
        .iter()
        .map(|c| {
            let (name, value) = c.split_once('=').ok_or("--topic-config takes NAME=VALUE")?;
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect::<Outcome<Vec<_>>>()?;
    let (result, measured) = compare::one(&options.target, &options.pid, &w, "target", &configs, 1, 0.0)?;
    println!("{}", report::line(&result));
    if let Some(dir) = &options.out {
        result::store(dir, &result, &measured)?;
    }
    match result.invalid {
        Some(reason) => Err(format!("the run does not count: {reason}").into()),
        None => Ok(()),
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Compare(options) => compare::run(&options),
        Command::Run(options) => run(&options),
        Command::Report { dir } => report::write(&dir),
        Command::FloorServer { dir } => floor_server::run(&dir),
        Command::Floor { dir, size, count } => {
            floor::run(&dir, size, count).map(|floor| println!("{}", floor.lines().join("\n")))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millrace-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
