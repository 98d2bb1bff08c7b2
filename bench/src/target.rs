//! The brokers: started on empty folders, stopped by pid.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::Outcome;

/// Longest start.
const START: Duration = Duration::from_secs(90);
/// Longest stop before the process is killed.
const STOP: Duration = Duration::from_secs(60);
/// JVM options as Kafka's own start script has them.
const JVM: &[&str] = &[
    "-server",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
    "-Djava.awt.headless=true",
];

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
    },
    /// Apache Kafka from a folder of jars.
    Kafka {
        /// The jars.
        lib: PathBuf,
        /// Its version.
        version: String,
        /// Heap, as `-Xmx` takes it.
        heap: String,
    },
    /// This program's server that does nothing but write, flush and answer.
    Floor,
    /// Whatever listens there.
    External {
        /// HOST:PORT.
        address: String,
    },
}

/// A broker that answers.
pub struct Running {
    /// Where.
    pub address: String,
    /// From the start of the process until it took connections.
    pub start: Duration,
    child: Option<Child>,
}

impl Running {
    /// Its process; none for a broker that somebody else runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Ends it as an operator would.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = Command::new("kill").arg(child.id().to_string()).status();
        let began = Instant::now();
        while began.elapsed() < STOP {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        let _ = child.wait();
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

impl Target {
    /// Starts it on an empty folder.
    ///
    /// # Errors
    /// It does not start; what it said is in `dir/broker.log`.
    pub fn start(&self, dir: &Path) -> Outcome<Running> {
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
        fs::create_dir_all(dir)?;
        match self {
            Self::External { address } => Ok(Running {
                address: address.clone(),
                start: Duration::ZERO,
                child: None,
            }),
            Self::Floor => {
                let args = [
                    "floor-server".into(),
                    "--dir".into(),
                    dir.join("data").display().to_string(),
                ];
                start_and_listen(&std::env::current_exe()?, &args, dir)
            }
            Self::Millrace { binary, .. } => start_and_listen(binary, &self.millrace_args(dir), dir),
            Self::Kafka { lib, heap, .. } => start_kafka(lib, heap, dir),
        }
    }

    /// The command of a Millrace broker.
    fn millrace_args(&self, dir: &Path) -> Vec<String> {
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
        args.into_iter().map(str::to_owned).collect()
    }

    /// How it is called in reports, and with what settings.
    pub fn describe(&self) -> String {
        match self {
            Self::Millrace { binary, .. } => {
                let version = Command::new(binary)
                    .arg("--version")
                    .output()
                    .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
                    .unwrap_or_default();
                format!(
                    "{version}: `millrace {}`",
                    self.millrace_args(Path::new("DIR")).join(" ")
                )
            }
            Self::Kafka { version, heap, .. } => format!(
                "Apache Kafka {version}, KRaft, one node: `java -Xms{heap} -Xmx{heap} {} kafka.Kafka` with Kafka's defaults, one log folder, \
                 one replica of internal topics",
                JVM.join(" ")
            ),
            Self::Floor => "the floor: `millrace-bench floor-server`, one thread a connection, one RWF_DSYNC write for what has come in, \
                            then the answers; no log, nothing to read again"
                .into(),
            Self::External { address } => format!("the broker at {address}"),
        }
    }
}

/// Starts a program that says where it listens as the last word of its first line.
fn start_and_listen(binary: &Path, args: &[String], dir: &Path) -> Outcome<Running> {
    let began = Instant::now();
    let mut child = Command::new(binary)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(fs::File::create(dir.join("broker.log"))?)
        .spawn()
        .map_err(|e| format!("{}: {e}; build it with `cargo build --release`", binary.display()))?;
    let mut line = String::new();
    let output = child.stdout.take().ok_or("no output")?;
    BufReader::new(output).read_line(&mut line)?;
    let address = line.trim().rsplit(' ').next().unwrap_or("").to_owned();
    let running = Running {
        address,
        start: began.elapsed(),
        child: Some(child),
    };
    if !line.contains("ready") {
        let log = dir.join("broker.log");
        return Err(format!("{} did not start; see {}", binary.display(), log.display()).into());
    }
    Ok(running)
}

/// Fetches Kafka's jars once.
///
/// # Errors
/// Maven is not there, or fails.
pub fn fetch_kafka(cache: &Path, version: &str) -> Outcome<PathBuf> {
    let lib = cache.join(format!("kafka-{version}"));
    if lib.join(".complete").exists() {
        return Ok(lib);
    }
    fs::create_dir_all(&lib)?;
    let lib = lib.canonicalize()?;
    let pom = lib.join("pom.xml");
    fs::write(&pom, include_str!("../kafka/pom.xml"))?;
    fs::write(
        lib.join("log4j2.properties"),
        include_str!("../kafka/log4j2.properties"),
    )?;
    eprintln!("fetching Apache Kafka {version} with Maven");
    let status = Command::new("mvn")
        .args(["-q", "-B", "-f"])
        .arg(&pom)
        .args(["dependency:copy-dependencies", "-DincludeScope=runtime"])
        .arg(format!("-Dkafka.version={version}"))
        .arg(format!("-DoutputDirectory={}", lib.display()))
        .stdout(Stdio::null())
        .status()
        .map_err(|e| format!("mvn: {e}; install Maven and a JDK of version 17 or later"))?;
    if !status.success() {
        return Err("Maven could not fetch Kafka".into());
    }
    fs::write(lib.join(".complete"), "")?;
    Ok(lib)
}

fn start_kafka(lib: &Path, heap: &str, dir: &Path) -> Outcome<Running> {
    let (port, controller) = (free_port()?, free_port()?);
    let data = dir.join("data");
    let properties = dir.join("server.properties");
    let text = format!(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
         listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
         advertised.listeners=PLAINTEXT://127.0.0.1:{port}\ncontroller.listener.names=CONTROLLER\n\
         inter.broker.listener.name=PLAINTEXT\nlog.dirs={}\noffsets.topic.replication.factor=1\n\
         transaction.state.log.replication.factor=1\ntransaction.state.log.min.isr=1\n\
         share.coordinator.state.topic.replication.factor=1\nshare.coordinator.state.topic.min.isr=1\n\
         # Deleted topics give their bytes back at once, so that rounds do not fill the disk.\n\
         log.segment.delete.delay.ms=0\n",
        data.display()
    );
    fs::write(&properties, text)?;
    let class_path = format!("{}/*", lib.display());
    let log4j = format!("-Dlog4j2.configurationFile={}", lib.join("log4j2.properties").display());
    let log = fs::File::create(dir.join("broker.log"))?;
    let formatted = Command::new("java")
        .args([
            "-Xmx256m",
            &log4j,
            "-cp",
            &class_path,
            "kafka.tools.StorageTool",
            "format",
            "-t",
            "bWlsbHJhY2UtYmVuY2gwMQ",
            "-c",
        ])
        .arg(&properties)
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .status()
        .map_err(|e| format!("java: {e}; install a JDK of version 17 or later"))?;
    if !formatted.success() {
        return Err(format!(
            "Kafka's folder cannot be formatted; see {}",
            dir.join("broker.log").display()
        )
        .into());
    }
    let began = Instant::now();
    let child = Command::new("java")
        .args([format!("-Xms{heap}"), format!("-Xmx{heap}")])
        .args(JVM)
        .args([&log4j, "-cp", &class_path, "kafka.Kafka"])
        .arg(&properties)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let mut running = Running {
        address: format!("127.0.0.1:{port}"),
        start: Duration::ZERO,
        child: Some(child),
    };
    while began.elapsed() < START {
        let said = fs::read_to_string(dir.join("broker.log")).unwrap_or_default();
        if said.contains("Kafka Server started") && TcpStream::connect(&running.address).is_ok() {
            running.start = began.elapsed();
            return Ok(running);
        }
        thread::sleep(Duration::from_millis(20));
    }
    let _ = std::io::stderr().flush();
    Err(format!("Kafka did not start; see {}", dir.join("broker.log").display()).into())
}
