//! What is sent, as files: one TOML table a workload (`bench/workloads/`).

use std::{fs, path::Path};

use crate::{Outcome, wire::Codec};

use serde::{Deserialize, Serialize};

/// One workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workload {
    /// Short name: of files, topics and rows.
    pub name: String,
    /// For people.
    pub title: String,
    /// Records per second of all producers together, on a schedule that waits for no answer. 0: as fast as
    /// `in_flight` allows (a closed loop, for throughput only).
    pub rate: u64,
    /// Several rates instead: a workload for each, called by its rate. One that a target does not hold does not count.
    pub rates: Vec<u64>,
    /// Records that are due at the same instant; the rate stays what it is.
    pub burst: u64,
    /// Bytes of a record's value, at least 8: it begins with the intended time of sending.
    pub record_bytes: usize,
    /// Most bytes of records in one batch.
    pub batch_bytes: usize,
    /// How producers pack batches: none, lz4, zstd. Anything else than none comes with values that repeat themselves.
    pub compression: Codec,
    /// How long a due record may wait for others, in microseconds.
    pub linger_us: u64,
    /// Partitions of the topic; records go around.
    pub partitions: i32,
    /// Replicas of each partition.
    pub replicas: i16,
    /// Share of the records that all go to partition 0, 0 to 1.
    pub hot_share: f64,
    /// Connections that produce, each with a schedule of its own.
    pub producers: usize,
    /// Connections that consume what is produced; latency from intended sending to receipt. Each reads the whole topic
    /// if `fan_out`, else its share of the partitions.
    pub consumers: usize,
    /// Every consumer reads everything.
    pub fan_out: bool,
    /// Megabytes (10^6) written before the warm-up, for those who read a backlog.
    pub backlog_mb: u64,
    /// Connections that all read the backlog from its beginning, from the begin of the measured time on.
    pub backlog_readers: usize,
    /// Connections that are open and say nothing.
    pub idle_connections: usize,
    /// -1 all, 1 leader, 0 none (then there is no latency to measure).
    pub acks: i16,
    /// Requests without an answer per connection, as clients limit them; due records wait and travel together.
    pub in_flight: usize,
    /// Seconds before measuring.
    pub warm_up: u64,
    /// Seconds measured.
    pub seconds: u64,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            name: "default".into(),
            title: String::new(),
            rate: 5000,
            rates: Vec::new(),
            burst: 1,
            record_bytes: 1000,
            batch_bytes: 16 << 10,
            compression: Codec::None,
            linger_us: 0,
            partitions: 8,
            replicas: 1,
            hot_share: 0.0,
            producers: 1,
            consumers: 0,
            fan_out: false,
            backlog_mb: 0,
            backlog_readers: 0,
            idle_connections: 0,
            acks: -1,
            in_flight: 5,
            warm_up: 2,
            seconds: 8,
        }
    }
}

impl Workload {
    fn each_rate(self) -> Vec<Self> {
        if self.rates.is_empty() {
            return vec![self];
        }
        let at = |rate: &u64| Self {
            name: format!("{}-{rate}", self.name),
            title: format!("{}, {rate}/s", self.title),
            rate: *rate,
            rates: Vec::new(),
            ..self.clone()
        };
        self.rates.iter().map(at).collect()
    }
}

#[derive(Deserialize)]
struct File {
    workload: Vec<Workload>,
}

/// The workloads of `compare`, in order.
const STANDARD: &str = include_str!("../workloads/standard.toml");

/// Reads a file of workloads, or the standard ones.
///
/// # Errors
/// The file cannot be read, or says something that cannot be run.
pub fn load(file: Option<&Path>) -> Outcome<Vec<Workload>> {
    let text = match file {
        Some(file) => fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?,
        None => STANDARD.to_owned(),
    };
    let workloads: Vec<Workload> = toml::from_str::<File>(&text)?
        .workload
        .into_iter()
        .flat_map(Workload::each_rate)
        .collect();
    workloads.iter().try_for_each(check)?;
    Ok(workloads)
}

/// Refuses what cannot be run.
pub fn check(w: &Workload) -> Outcome<()> {
    let refuse = |what: &str| Err(format!("workload {}: {what}", w.name).into());
    if w.record_bytes < 8 {
        return refuse("record_bytes must be at least 8: a record carries its time of sending");
    }
    if w.partitions < 1 || w.producers < 1 || w.in_flight < 1 || w.seconds < 1 || w.burst < 1 {
        return refuse("partitions, producers, in_flight, burst and seconds must be at least 1");
    }
    if w.compression != Codec::None && w.consumers > 0 {
        return refuse("consumers do not unpack: compression goes without them");
    }
    if w.backlog_mb > 0 && w.consumers > 0 {
        return refuse("consumers would read the backlog too: give backlog_readers alone");
    }
    if (w.backlog_mb == 0) != (w.backlog_readers == 0) {
        return refuse("backlog_mb and backlog_readers go together");
    }
    if w.acks == 0 && w.consumers == 0 {
        return refuse("acks = 0 has no answers to time: add consumers");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_workloads_can_be_run() {
        let workloads = load(None).expect("they parse");
        assert!(workloads.len() > 5);
    }

    #[test]
    fn a_sweep_is_a_workload_for_each_rate() {
        let swept = Workload {
            name: "sweep".into(),
            rates: vec![10, 20],
            ..Workload::default()
        };
        let names: Vec<_> = swept.each_rate().into_iter().map(|w| (w.name, w.rate)).collect();
        assert_eq!(names, [("sweep-10".to_owned(), 10), ("sweep-20".to_owned(), 20)]);
    }

    #[test]
    fn unknown_words_are_refused() {
        assert!(toml::from_str::<File>("[[workload]]\nname = \"x\"\nrecord_size = 3").is_err());
    }
}
