//! What a process and the machine use, as `/proc` says.

use std::fs;

use serde::{Deserialize, Serialize};

/// Clock ticks of `/proc` per second; the same on every Linux that Rust runs on.
const TICKS: f64 = 100.0;

/// A reading, or the difference of two.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Usage {
    /// CPU seconds of all its threads.
    pub cpu_s: f64,
    /// CPU seconds that the whole machine was busy with, the kernel's own threads among them.
    pub machine_cpu_s: f64,
    /// Resident bytes now.
    pub resident: u64,
    /// Most resident bytes so far.
    pub resident_max: u64,
    /// Bytes it caused to be written to disks.
    pub written: u64,
    /// Times its threads were switched.
    pub switches: u64,
}

impl Usage {
    /// What came between `before` and this; sizes stay as they are now.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            cpu_s: self.cpu_s - before.cpu_s,
            machine_cpu_s: self.machine_cpu_s - before.machine_cpu_s,
            resident: self.resident,
            resident_max: self.resident_max,
            written: self.written.saturating_sub(before.written),
            switches: self.switches.saturating_sub(before.switches),
        }
    }
}

fn number_after(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|l| l.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn cpu_seconds(stat: &str) -> f64 {
    // The name in parentheses may hold spaces; user and system time are the 12th and 13th field behind it.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace()
        .collect();
    let ticks = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / TICKS
}

/// Reads a process; all zero but the machine's part if there is none of that number.
pub fn usage(pid: u32) -> Usage {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let status = read("status");
    let switches = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("status")).ok())
        .map(|s| number_after(&s, "voluntary_ctxt_switches:") + number_after(&s, "nonvoluntary_ctxt_switches:"))
        .sum();
    let machine = fs::read_to_string("/proc/stat").unwrap_or_default();
    let first: Vec<f64> = machine
        .lines()
        .next()
        .unwrap_or("")
        .split_whitespace()
        .skip(1)
        .filter_map(|f| f.parse().ok())
        .collect();
    // user nice system (idle iowait) irq softirq
    let busy: f64 = first
        .iter()
        .enumerate()
        .filter(|(n, _)| [0, 1, 2, 5, 6].contains(n))
        .map(|(_, v)| v)
        .sum();
    Usage {
        cpu_s: cpu_seconds(&read("stat")),
        machine_cpu_s: busy / TICKS,
        resident: number_after(&status, "VmRSS:") << 10,
        resident_max: number_after(&status, "VmHWM:") << 10,
        written: number_after(&read("io"), "write_bytes:"),
        switches,
    }
}

/// Several processes together, the nodes of a cluster for example.
pub fn usage_of_all(pids: &[u32]) -> Usage {
    pids.iter().map(|pid| usage(*pid)).fold(usage(0), |sum, one| Usage {
        cpu_s: sum.cpu_s + one.cpu_s,
        machine_cpu_s: one.machine_cpu_s,
        resident: sum.resident + one.resident,
        resident_max: sum.resident_max + one.resident_max,
        written: sum.written + one.written,
        switches: sum.switches + one.switches,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_something() {
        let before = usage(std::process::id());
        let mut sum = 0_u64;
        let began = std::time::Instant::now();
        while began.elapsed().as_millis() < 60 {
            sum = sum.wrapping_add(std::hint::black_box(1));
        }
        let used = usage(std::process::id()).since(&before);
        assert!(used.cpu_s > 0.0 && used.machine_cpu_s > 0.0, "{used:?} {sum}");
        assert!(used.resident > 100_000);
    }
}
