//! The brokers: started on empty folders, stopped by pid.

pub mod kafka;

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::Outcome;

/// Longest stop before the process is killed.
const STOP: Duration = Duration::from_secs(60);
/// What is compared.
#[derive(Clone, Debug)]
pub enum Target {
    /// A binary of this project.
    Millrace {
        /// The program.
        binary: PathBuf,
        /// Memory given to it, as `--memory` takes it.
        memory: String,
        /// Whether every core has a shard and clients are told of each as a broker of its own (`core.endpoints`).
        core_endpoints: bool,
        /// Nodes of the cluster; 1 for a broker alone.
        nodes: usize,
    },
    /// Apache Kafka from a folder of jars.
    Kafka {
        /// The jars.
        lib: PathBuf,
        /// Its version.
        version: String,
        /// Heap, as `-Xmx` takes it.
        heap: String,
        /// Nodes of the cluster; 1 for a broker alone.
        nodes: usize,
    },
    /// This program's server that does nothing but write, flush and answer.
    Floor,
    /// Whatever listens there.
    External {
        /// HOST:PORT.
        address: String,
    },
}

/// A broker that answers, or a cluster of them.
pub struct Running {
    /// Where; the first node's, in a cluster.
    pub address: String,
    /// From the start of the processes until all took connections.
    pub start: Duration,
    nodes: Vec<Child>,
}

impl Running {
    /// Its processes; none for a broker that somebody else runs.
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().map(Child::id).collect()
    }

    /// Ends it as an operator would.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        for node in &self.nodes {
            let _ = Command::new("kill").arg(node.id().to_string()).status();
        }
        let began = Instant::now();
        for mut node in self.nodes.drain(..) {
            while matches!(node.try_wait(), Ok(None)) {
                if began.elapsed() > STOP {
                    let _ = node.kill();
                    let _ = node.wait();
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

fn free_port() -> Outcome<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A broker's shards take the ports behind its own.
const PORTS_OF_NODE: u16 = 100;

/// Ports with room behind each.
fn free_ports(count: usize) -> Outcome<Vec<u16>> {
    let mut ports: Vec<u16> = Vec::new();
    while ports.len() < count {
        let port = free_port()?;
        if port < u16::MAX - PORTS_OF_NODE && ports.iter().all(|p| p.abs_diff(port) >= PORTS_OF_NODE) {
            ports.push(port);
        }
    }
    Ok(ports)
}

impl Target {
    /// Starts it on an empty folder.
    ///
    /// # Errors
    /// It does not start; what it said is in a `broker.log` below `dir`, which the error names.
    pub fn start(&self, dir: &Path) -> Outcome<Running> {
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
        fs::create_dir_all(dir)?;
        match self {
            Self::External { address } => Ok(Running {
                address: address.clone(),
                start: Duration::ZERO,
                nodes: Vec::new(),
            }),
            Self::Floor => {
                let args = [
                    "floor-server".into(),
                    "--dir".into(),
                    dir.join("data").display().to_string(),
                ];
                start_and_listen(&[Program::new(&std::env::current_exe()?, &args, dir)])
            }
            Self::Millrace { binary, nodes, .. } => {
                let ports = free_ports(*nodes)?;
                let programs: Vec<Program> = (0..*nodes)
                    .map(|number| {
                        let dir = dir.join((number + 1).to_string());
                        Program::new(binary, &self.millrace_args(number, &ports, &dir), &dir)
                    })
                    .collect();
                start_and_listen(&programs)
            }
            Self::Kafka { lib, heap, nodes, .. } => kafka::start(lib, heap, *nodes, dir),
        }
    }

    /// The command of a Millrace broker, the `number`th of those whose nodes hear each other on `ports`.
    fn millrace_args(&self, number: usize, ports: &[u16], dir: &Path) -> Vec<String> {
        let Self::Millrace {
            memory, core_endpoints, ..
        } = self
        else {
            return Vec::new();
        };
        let data = dir.join("data").display().to_string();
        let cores = thread::available_parallelism().map_or(1, usize::from).to_string();
        let mut args = vec![
            "serve",
            "--kafka-listen",
            "127.0.0.1:0",
            "--memory",
            memory,
            "--data-dir",
            &data,
        ];
        if *core_endpoints {
            args.extend(["--cores", &cores, "--set", "core.endpoints=true"]);
        }
        let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        if ports.len() > 1 {
            let at: Vec<String> = ports.iter().map(|p| format!("127.0.0.1:{p}")).collect();
            let peers: Vec<String> = at.iter().enumerate().map(|(n, at)| format!("{}@{at}", n + 1)).collect();
            args.extend(["--node-id".into(), (number + 1).to_string()]);
            args.extend(["--cluster-listen".into(), at[number].clone()]);
            args.extend(["--peers".into(), peers.join(",")]);
        }
        args
    }

    /// How it is called in reports, and with what settings.
    pub fn describe(&self) -> String {
        match self {
            Self::Millrace { binary, nodes, .. } => {
                let version = Command::new(binary)
                    .arg("--version")
                    .output()
                    .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
                    .unwrap_or_default();
                let count = if *nodes == 1 {
                    String::new()
                } else {
                    format!(", {nodes} nodes, the first")
                };
                let ports: Vec<u16> = (9192..).step_by(PORTS_OF_NODE.into()).take(*nodes).collect();
                format!(
                    "{version}{count}: `millrace {}`",
                    self.millrace_args(0, &ports, Path::new("DIR")).join(" ")
                )
            }
            Self::Kafka {
                version, heap, nodes, ..
            } => kafka::describe(version, heap, *nodes),
            Self::Floor => "the floor: `millrace-bench floor-server`, one thread a connection, one RWF_DSYNC write for what has come in, \
                            then the answers; no log, nothing to read again"
                .into(),
            Self::External { address } => format!("the broker at {address}"),
        }
    }
}

/// A program that says where it listens as the last word of its first line.
struct Program {
    binary: PathBuf,
    args: Vec<String>,
    /// Where its log goes.
    dir: PathBuf,
}

impl Program {
    fn new(binary: &Path, args: &[String], dir: &Path) -> Self {
        Self {
            binary: binary.into(),
            args: args.to_vec(),
            dir: dir.into(),
        }
    }

    fn log(&self) -> PathBuf {
        self.dir.join("broker.log")
    }

    fn spawn(&self) -> Outcome<Child> {
        fs::create_dir_all(&self.dir)?;
        let child = Command::new(&self.binary)
            .args(&self.args)
            .stdout(Stdio::piped())
            .stderr(fs::File::create(self.log())?)
            .spawn();
        child.map_err(|e| {
            let binary = self.binary.display();
            format!("{binary}: {e}; build it with `cargo build --release`").into()
        })
    }
}

/// Starts programs together, and waits until all listen.
fn start_and_listen(programs: &[Program]) -> Outcome<Running> {
    let began = Instant::now();
    let mut running = Running {
        address: String::new(),
        start: Duration::ZERO,
        nodes: Vec::new(),
    };
    for program in programs {
        running.nodes.push(program.spawn()?);
    }
    for (node, program) in running.nodes.iter_mut().zip(programs) {
        let mut line = String::new();
        let output = node.stdout.take().ok_or("no output")?;
        BufReader::new(output).read_line(&mut line)?;
        if !line.contains("ready") {
            let (binary, log) = (program.binary.display(), program.log());
            return Err(format!("{binary} did not start; see {}", log.display()).into());
        }
        if running.address.is_empty() {
            running.address = line.trim().rsplit(' ').next().unwrap_or("").to_owned();
        }
    }
    running.start = began.elapsed();
    Ok(running)
}
