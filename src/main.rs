//! The command line.

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
    panic,
    path::PathBuf,
    process::{self, ExitCode},
};

use clap::{Parser, Subcommand};
use millrace::{
    admin::{client::AdminError, nodes},
    config::{self, ConfigError, ENTRIES, Scope, Settings},
    doctor, export,
    peers::{
        ca::{Ca, NODE_DAYS},
        credentials::{CredentialsError, write_new},
    },
    server,
};
use tracing_appender::non_blocking::NonBlockingBuilder;

mod memory;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A distributed message queue that speaks the Kafka protocol.
#[derive(Parser)]
#[command(name = "millrace", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts a broker.
    Serve(Serve),
    /// Looks at this host: what a broker needs, and what to do where it is missing.
    Doctor {
        /// Folder that would hold the data.
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
    },
    /// Saves what can be read of a stopped broker's records, past any damage, as Kafka log files.
    Export {
        /// Folder of the stopped broker.
        #[arg(long, value_name = "DIR", default_value = "millrace-data")]
        data_dir: PathBuf,
        /// New folder, which gets one folder per partition.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// Only this topic.
        #[arg(long, value_name = "NAME")]
        topic: Option<String>,
    },
    /// Nodes of a cluster, and their certificates.
    #[command(subcommand)]
    Cluster(Cluster),
    /// Lists every setting with its default.
    Settings,
}

#[derive(Subcommand)]
enum Cluster {
    /// Makes the CA of a new cluster: ca.pem, which every node gets, and ca.key, which stays with you.
    InitCa {
        /// Folder for the two files.
        #[arg(long, value_name = "DIR", default_value = "millrace-ca")]
        dir: PathBuf,
    },
    /// Makes a node's certificate and key, node-N.pem and node-N.key, for cluster.tls.cert and cluster.tls.key.
    Issue {
        /// Folder of the CA; the files are put there, too.
        #[arg(long, value_name = "DIR", default_value = "millrace-ca")]
        dir: PathBuf,
        /// The node's number.
        #[arg(long, value_name = "N")]
        node_id: i32,
        /// How long it is valid.
        #[arg(long, value_name = "N", default_value_t = NODE_DAYS, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
    /// Puts a certificate on the CA's list of revoked ones, ca.crl, for cluster.tls.crl.
    Revoke {
        /// Folder of the CA; the list is put there, too.
        #[arg(long, value_name = "DIR", default_value = "millrace-ca")]
        dir: PathBuf,
        /// The certificate, as `issue` made it.
        #[arg(value_name = "NODE.PEM")]
        certificate: PathBuf,
    },
    /// Shows who is in the cluster, what each leads and holds, and what is not as it should be.
    Status {
        #[command(flatten)]
        at: At,
    },
    /// Makes a node that has joined (started with --peers that name nodes of the cluster) a voter of the metadata quorum.
    AddNode {
        /// The node's number.
        node: i32,
        #[command(flatten)]
        at: At,
    },
    /// Moves all replicas of a node to others while they serve, and puts no new ones there.
    Drain {
        /// The node's number.
        node: i32,
        /// Let new replicas be put there again.
        #[arg(long)]
        undo: bool,
        #[command(flatten)]
        at: At,
    },
    /// Says that a node will not run again with the data folder that it had: another machine with an empty one may take its place.
    ReplaceNode {
        /// The node's number.
        node: i32,
        #[command(flatten)]
        at: At,
    },
    /// Takes a node that is drained and stopped out of the cluster for good.
    RemoveNode {
        /// The node's number.
        node: i32,
        #[command(flatten)]
        at: At,
    },
}

/// Whom to ask.
#[derive(clap::Args)]
struct At {
    /// A broker of the cluster; more than one, with commas, if some may be down.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9092")]
    bootstrap: String,
}

/// Why a command about the cluster failed.
#[derive(Debug, thiserror::Error)]
enum ClusterError {
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Admin(#[from] AdminError),
}

impl Cluster {
    /// Does it, and returns what there is to say of it.
    fn run(self) -> Result<String, ClusterError> {
        Ok(match self {
            Self::Status { at } => nodes::status(&at.bootstrap)?,
            Self::AddNode { node, at } => nodes::add(&at.bootstrap, node)?,
            Self::Drain { node, undo: true, at } => nodes::undrain(&at.bootstrap, node)?,
            Self::Drain { node, undo: false, at } => nodes::drain(&at.bootstrap, node)?,
            Self::RemoveNode { node, at } => nodes::remove(&at.bootstrap, node)?,
            Self::ReplaceNode { node, at } => nodes::replace(&at.bootstrap, node)?,
            Self::InitCa { dir } => {
                Ca::new()?.store(&dir)?;
                format!(
                    "{0}/ca.pem is for every node (cluster.tls.ca); keep {0}/ca.key to yourself\n",
                    dir.display()
                )
            }
            Self::Revoke { dir, certificate } => {
                let listed = Ca::load(&dir)?.revoke(&dir, &certificate)?;
                format!(
                    "{0}/ca.crl lists {listed} revoked certificates. Give it to every node (cluster.tls.crl) and start them again, one by one\n",
                    dir.display()
                )
            }
            Self::Issue { dir, node_id, days } => {
                let (certificate, key) = Ca::load(&dir)?.issue(node_id, days)?;
                let path = |end: &str| dir.join(format!("node-{node_id}.{end}"));
                write_new(&path("pem"), &certificate)?;
                write_new(&path("key"), &key)?;
                format!("node {node_id}: {}, {}\n", path("pem").display(), path("key").display())
            }
        })
    }
}

#[derive(clap::Args)]
struct Serve {
    /// TOML file of settings, or one of Java properties if it is called ….properties, as Kafka's server.properties.
    #[arg(long, value_name = "FILE", env = "MILLRACE_CONFIG")]
    config: Option<PathBuf>,
    /// Any setting by its name; `millrace settings` lists them. May be given more than once.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    sets: Vec<String>,
    /// Folder of all data [default: millrace-data]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Address that Kafka clients connect to [default: 127.0.0.1:9092]
    #[arg(long, value_name = "HOST:PORT")]
    kafka_listen: Option<String>,
    /// Address told to clients, if it is another
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Shards, one per core [default: all cores this process may use but one]
    #[arg(long, value_name = "N")]
    cores: Option<String>,
    /// Memory for batches, caches and requests [default: 1GiB, or half of what this process may use]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Number of this broker [default: 0]
    #[arg(long, value_name = "N")]
    node_id: Option<String>,
    /// Address that other nodes reach this one at, by QUIC over UDP
    #[arg(long, value_name = "HOST:PORT")]
    cluster_listen: Option<String>,
    /// The nodes that a new cluster begins with, or of the one to be joined; this one among them, for example 1@10.0.0.1:9192,2@10.0.0.2:9192
    #[arg(long, value_name = "ID@HOST:PORT,…")]
    peers: Option<String>,
}

impl Serve {
    fn settings(&self) -> Result<Settings, ConfigError> {
        let mut settings = Settings::default();
        if let Some(file) = &self.config {
            settings.load_file(file)?;
        }
        settings.load_environment(std::env::vars())?;
        for set in &self.sets {
            let (name, value) = set.split_once('=').ok_or_else(|| ConfigError::Invalid {
                reason: format!("--set {set}: write NAME=VALUE"),
            })?;
            settings.set(name.trim(), value)?;
        }
        for (name, value) in [
            ("data.dir", &self.data_dir),
            ("kafka.listen", &self.kafka_listen),
            ("advertise", &self.advertise),
            ("cores", &self.cores),
            ("memory", &self.memory),
            ("node.id", &self.node_id),
            ("cluster.listen", &self.cluster_listen),
            ("peers", &self.peers),
        ] {
            if let Some(value) = value {
                settings.set(name, value)?;
            }
        }
        settings.finish()?;
        Ok(settings)
    }
}

/// Log lines that wait for whoever reads them. Those that come when so many wait are dropped: a terminal that is held, a pipe
/// that nobody empties or a full disk behind standard error stops no shard.
const LOG_LINES: usize = 8192;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("MILLRACE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let (log, _writes_what_is_left_when_dropped) = NonBlockingBuilder::default()
        .buffered_lines_limit(LOG_LINES)
        .finish(io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(log)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match Cli::parse().command {
        Command::Serve(serve) => {
            end_with_the_first_panic();
            if let Err(error) = memory::give_back_in_background() {
                tracing::warn!(%error, "no thread to give memory back: shards do it themselves");
            }
            let result = serve
                .settings()
                .map_err(server::ServeError::from)
                .and_then(server::serve);
            result.map_or_else(fail, |()| ExitCode::SUCCESS)
        }
        Command::Doctor { data_dir } => {
            let dir = data_dir.unwrap_or_else(|| PathBuf::from("."));
            let findings = doctor::examine(&dir);
            let fatal = findings.iter().any(|f| f.level == doctor::Level::Fatal);
            let text: String = findings.iter().map(|f| format!("{f}\n")).collect();
            say(&text, if fatal { ExitCode::FAILURE } else { ExitCode::SUCCESS })
        }
        Command::Export { data_dir, to, topic } => match export::export(&data_dir, &to, topic) {
            Ok(exported) => {
                for damage in &exported.damage {
                    complain(&format_args!("damage: {damage}"));
                }
                let whole = exported.damage.is_empty();
                let lines = exported.partitions.into_iter().map(|(folder, from, until, records)| {
                    format!("{folder}: offsets {from} to {until}, {records} records\n")
                });
                say(
                    &lines.collect::<String>(),
                    if whole { ExitCode::SUCCESS } else { ExitCode::from(2) },
                )
            }
            Err(error) => fail(error),
        },
        Command::Cluster(cluster) => match cluster.run() {
            Ok(text) => say(&text, ExitCode::SUCCESS),
            Err(error) => fail(error),
        },
        Command::Settings => {
            let scope = |name: &str| {
                let entries = ENTRIES
                    .iter()
                    .filter(|e| matches!(e.scope, Scope::Topic { .. }) == (name == "topic"))
                    .map(|e| format!("{} = {}\n    {}\n", e.name, e.default, e.doc));
                format!("# {name} settings\n{}\n", entries.collect::<String>())
            };
            let of_kafka = format!("# names of Kafka's that say the same\n{}\n", config::names_of_kafka());
            say(&(scope("broker") + &scope("topic") + &of_kafka), ExitCode::SUCCESS)
        }
    }
}

/// A shard that has panicked is not missed by the others: its partitions would have a leader that answers nobody. A broker that
/// is gone is followed by other brokers, and finds all that it acknowledged when it starts again.
fn end_with_the_first_panic() {
    let tell = panic::take_hook();
    panic::set_hook(Box::new(move |what| {
        tell(what);
        process::abort();
    }));
}

/// Prints what a command found; `done` is its exit code, if that can be printed or whoever reads it has seen enough.
fn say(text: &str, done: ExitCode) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => fail(format_args!("cannot print: {error}")),
        _ => done,
    }
}

fn fail(error: impl Display) -> ExitCode {
    complain(&format_args!("millrace: {error}"));
    ExitCode::FAILURE
}

/// A line to standard error, where that takes it.
fn complain(line: &dyn Display) {
    _ = writeln!(io::stderr(), "{line}");
}
