//! Apache Kafka: fetched, formatted, started.

use std::{
    fmt::Write,
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{Running, free_port};
use crate::Outcome;

/// Longest start.
const START: Duration = Duration::from_secs(90);
/// JVM options as Kafka's own start script has them.
const JVM: &[&str] = &[
    "-server",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
    "-Djava.awt.headless=true",
];
/// What a node says once it serves.
const STARTED: &str = "Kafka Server started";

/// Fetches Kafka's jars once.
///
/// # Errors
/// Maven is not there, or fails.
pub fn fetch(cache: &Path, version: &str) -> Outcome<PathBuf> {
    let lib = cache.join(format!("kafka-{version}"));
    if lib.join(".complete").exists() {
        return Ok(lib);
    }
    fs::create_dir_all(&lib)?;
    let lib = lib.canonicalize()?;
    let pom = lib.join("pom.xml");
    fs::write(&pom, include_str!("../../kafka/pom.xml"))?;
    fs::write(
        lib.join("log4j2.properties"),
        include_str!("../../kafka/log4j2.properties"),
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

/// How it is called in reports, and with what settings.
pub(super) fn describe(version: &str, heap: &str, nodes: usize) -> String {
    let (count, replicas) = if nodes == 1 {
        ("one node".to_owned(), ", one replica of internal topics")
    } else {
        (format!("{nodes} nodes, each broker and controller"), "")
    };
    format!(
        "Apache Kafka {version}, KRaft, {count}: `java -Xms{heap} -Xmx{heap} {} kafka.Kafka` with Kafka's defaults, one log folder{replicas}",
        JVM.join(" ")
    )
}

struct Ports {
    clients: u16,
    controller: u16,
}

/// A node's settings: Kafka's defaults, but for what a lone node cannot have, and for files that would fill the disk.
fn properties(number: usize, ports: &[Ports], data: &Path) -> Result<String, std::fmt::Error> {
    let own = &ports[number];
    let voters: Vec<String> = ports
        .iter()
        .enumerate()
        .map(|(n, p)| format!("{}@127.0.0.1:{}", n + 1, p.controller))
        .collect();
    let mut text = format!(
        "process.roles=broker,controller\nnode.id={}\ncontroller.quorum.voters={}\n\
         listeners=PLAINTEXT://127.0.0.1:{clients},CONTROLLER://127.0.0.1:{}\n\
         advertised.listeners=PLAINTEXT://127.0.0.1:{clients}\ncontroller.listener.names=CONTROLLER\n\
         inter.broker.listener.name=PLAINTEXT\nlog.dirs={}\n\
         # Deleted topics give their bytes back at once, so that rounds do not fill the disk.\n\
         log.segment.delete.delay.ms=0\n",
        number + 1,
        voters.join(","),
        own.controller,
        data.display(),
        clients = own.clients,
    );
    if ports.len() == 1 {
        for (setting, value) in [
            ("offsets.topic.replication.factor", 1),
            ("transaction.state.log.replication.factor", 1),
            ("transaction.state.log.min.isr", 1),
            ("share.coordinator.state.topic.replication.factor", 1),
            ("share.coordinator.state.topic.min.isr", 1),
        ] {
            writeln!(text, "{setting}={value}")?;
        }
    }
    Ok(text)
}

/// Starts as many nodes, each on a folder of its own in `dir`.
pub(super) fn start(lib: &Path, heap: &str, nodes: usize, dir: &Path) -> Outcome<Running> {
    let ports = (0..nodes)
        .map(|_| {
            Ok(Ports {
                clients: free_port()?,
                controller: free_port()?,
            })
        })
        .collect::<Outcome<Vec<_>>>()?;
    let mut commands = Vec::with_capacity(nodes);
    for number in 0..nodes {
        let dir = dir.join((number + 1).to_string());
        fs::create_dir_all(&dir)?;
        fs::write(
            dir.join("server.properties"),
            properties(number, &ports, &dir.join("data"))?,
        )?;
        commands.push(prepare(lib, heap, &dir)?);
    }
    let mut running = Running {
        address: format!("127.0.0.1:{}", ports[0].clients),
        start: Duration::ZERO,
        nodes: Vec::new(),
    };
    let began = Instant::now();
    for command in &mut commands {
        running.nodes.push(command.spawn()?);
    }
    for (number, own) in ports.iter().enumerate() {
        let log = dir.join((number + 1).to_string()).join("broker.log");
        let ready = || {
            fs::read_to_string(&log).unwrap_or_default().contains(STARTED)
                && TcpStream::connect(("127.0.0.1", own.clients)).is_ok()
        };
        while !ready() {
            if began.elapsed() > START || has_ended(&mut running.nodes[number]) {
                return Err(format!("Kafka did not start; see {}", log.display()).into());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
    running.start = began.elapsed();
    Ok(running)
}

fn has_ended(node: &mut Child) -> bool {
    !matches!(node.try_wait(), Ok(None))
}

/// Formats a node's folder; what starts it afterwards.
fn prepare(lib: &Path, heap: &str, dir: &Path) -> Outcome<Command> {
    let properties = dir.join("server.properties");
    let class_path = format!("{}/*", lib.display());
    let log4j = format!("-Dlog4j2.configurationFile={}", lib.join("log4j2.properties").display());
    let log_path = dir.join("broker.log");
    let log = fs::File::create(&log_path)?;
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
        return Err(format!("Kafka's folder cannot be formatted; see {}", log_path.display()).into());
    }
    let mut command = Command::new("java");
    command
        .args([format!("-Xms{heap}"), format!("-Xmx{heap}")])
        .args(JVM)
        .args([&log4j, "-cp", &class_path, "kafka.Kafka"])
        .arg(&properties)
        .stdout(log.try_clone()?)
        .stderr(log);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_know_each_other_and_a_lone_one_needs_no_others() {
        let ports = |n: u16| -> Vec<Ports> {
            (0..n)
                .map(|n| Ports {
                    clients: 10 + n,
                    controller: 20 + n,
                })
                .collect()
        };
        let second = properties(1, &ports(3), Path::new("data")).expect("a text");
        assert!(second.contains("node.id=2\n") && second.contains("PLAINTEXT://127.0.0.1:11,"));
        assert!(second.contains("voters=1@127.0.0.1:20,2@127.0.0.1:21,3@127.0.0.1:22\n"));
        assert!(!second.contains("replication.factor"), "Kafka's defaults: {second}");
        let lone = properties(0, &ports(1), Path::new("data")).expect("a text");
        assert!(lone.contains("offsets.topic.replication.factor=1\n"));
    }
}
