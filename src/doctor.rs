//! Looks at the host: what Millrace needs, what would make it faster, and what to do about each.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::{self, ErrorKind, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
};

use crate::{
    container::{self, MEMORY_MIN},
    cpus,
};

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// As it should be.
    Good,
    /// Works, but not as well as it could.
    Warning,
    /// `serve` will not start.
    Fatal,
}

/// One finding.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// How it is.
    pub level: Level,
    /// In words; for anything but `Good`, with what to do.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.level {
            Level::Good => "ok  ",
            Level::Warning => "warn",
            Level::Fatal => "FAIL",
        };
        write!(f, "{mark}  {:<12} {}", self.what, self.text)
    }
}

fn finding(what: &'static str, level: Level, text: impl Into<String>) -> Finding {
    Finding {
        what,
        level,
        text: text.into(),
    }
}

/// Everything, in the order in which it matters. `dir` is the data folder; if it is not there, the folder that it will be made in is looked
/// at.
#[must_use]
pub fn examine(dir: &Path) -> Vec<Finding> {
    vec![
        kernel(),
        io_uring(),
        memlock(),
        open_files(),
        direct_io(dir),
        clock(),
        pinning(),
        cores(),
        memory(),
    ]
}

fn kernel() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (5, 8) {
        finding(
            "kernel",
            Level::Fatal,
            format!("Linux {release} is too old: Millrace needs 5.8 or newer for io_uring"),
        )
    } else if version < (5, 15) {
        finding(
            "kernel",
            Level::Warning,
            format!("Linux {release} works; 5.15 or newer has a faster io_uring"),
        )
    } else {
        finding("kernel", Level::Good, format!("Linux {release}"))
    }
}

/// What every shard does with its rings; the call that fails, and how.
fn try_io_uring() -> Result<(), (&'static str, io::Error)> {
    let mut ring = io_uring::IoUring::new(8).map_err(|e| ("io_uring_setup", e))?;
    let signal = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).map_err(|e| ("eventfd2", e.into()))?;
    let submitter = ring.submitter();
    let registered = (submitter.register_probe(&mut io_uring::Probe::new()))
        .and_then(|()| submitter.register_eventfd(signal.as_raw_fd()));
    registered.map_err(|e| ("io_uring_register", e))?;
    // SAFETY: an operation that does nothing refers to no memory.
    let pushed = unsafe { ring.submission().push(&io_uring::opcode::Nop::new().build()) };
    pushed.expect("the ring is empty");
    ring.submit_and_wait(1).map_err(|e| ("io_uring_enter", e))?;
    Ok(())
}

fn io_uring() -> Finding {
    match try_io_uring() {
        Ok(()) => finding("io_uring", Level::Good, "available"),
        Err((call, error)) => {
            let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
            let text = match (error.raw_os_error(), disabled.trim()) {
                (_, "1" | "2") => format!(
                    "switched off by kernel.io_uring_disabled={}: run `sysctl -w kernel.io_uring_disabled=0` as root",
                    disabled.trim()
                ),
                (Some(1 | 13), _) => format!(
                    "{call} is refused ({error}), as container runtimes do by default: run the container with a seccomp profile that \
                     allows io_uring_setup, io_uring_enter and io_uring_register (docker run --security-opt seccomp=PROFILE.json)"
                ),
                (Some(38), _) if call == "io_uring_setup" => {
                    "this kernel has no io_uring (ENOSYS): use a kernel built with CONFIG_IO_URING".into()
                }
                (Some(12), _) => "not enough locked memory (ENOMEM): raise it with `ulimit -l` or LimitMEMLOCK=".into(),
                _ => format!("cannot be used: {call}: {error}; a seccomp profile or a sandbox may be in the way"),
            };
            finding("io_uring", Level::Fatal, text)
        }
    }
}

fn memlock() -> Finding {
    const NEEDED: u64 = 512 << 10;
    match rustix::process::getrlimit(rustix::process::Resource::Memlock).current {
        Some(limit) if limit < NEEDED => finding(
            "memlock",
            Level::Fatal,
            format!(
                "{limit} bytes may be locked, {NEEDED} are needed: `ulimit -l 65536`, or LimitMEMLOCK=64M in the unit file"
            ),
        ),
        Some(limit) => finding("memlock", Level::Good, format!("{} KiB may be locked", limit >> 10)),
        None => finding("memlock", Level::Good, "unlimited"),
    }
}

fn open_files() -> Finding {
    // A broker raises its own limit to what it may be.
    match rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum {
        Some(limit) if limit < 1024 => finding(
            "open files",
            Level::Fatal,
            format!(
                "{limit} files may be open, at least 1024 are needed: `ulimit -Hn 65536`, or LimitNOFILE= in the unit file"
            ),
        ),
        Some(limit) if limit < 16_384 => finding(
            "open files",
            Level::Warning,
            format!(
                "{limit} files may be open; for many partitions or clients raise it: `ulimit -Hn 65536`, or LimitNOFILE="
            ),
        ),
        Some(limit) => finding("open files", Level::Good, format!("{limit} may be open")),
        None => finding("open files", Level::Good, "unlimited"),
    }
}

fn direct_io(dir: &Path) -> Finding {
    const O_DIRECT: i32 = 0o40000;
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let is_folder = |d: &&Path| d.as_os_str().is_empty() || d.exists();
    let there = dir.ancestors().find(is_folder).unwrap_or(dir);
    let name = there.join(".doctor");
    let tried = rustix::fs::statfs(if there.as_os_str().is_empty() {
        Path::new(".")
    } else {
        there
    });
    let tried = tried.map_err(io::Error::from).and_then(|_| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(O_DIRECT)
            .open(&name)?;
        file.write_all(&Block([0; 4096]).0)?;
        file.sync_data()
    });
    let _ = fs::remove_file(&name);
    match tried {
        Ok(()) => finding("direct I/O", Level::Good, format!("works in {}", dir.display())),
        // It opened: a broker whose disk is full starts, for topics to be deleted.
        Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => finding(
            "direct I/O",
            Level::Warning,
            format!(
                "the disk of {} is full: free some room, or delete topics",
                dir.display()
            ),
        ),
        Err(e) if e.raw_os_error() == Some(22) => finding(
            "direct I/O",
            Level::Fatal,
            format!(
                "the file system of {} has no O_DIRECT: use ext4 or xfs with --data-dir",
                dir.display()
            ),
        ),
        Err(e) => finding(
            "direct I/O",
            Level::Fatal,
            format!(
                "{} cannot be written: {e}; give another folder with --data-dir",
                dir.display()
            ),
        ),
    }
}

fn clock() -> Finding {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    match fs::read_to_string(path).as_deref().map(str::trim) {
        Ok(source @ ("tsc" | "kvm-clock" | "arch_sys_counter" | "hyperv_clocksource_tsc_page")) => {
            finding("clock", Level::Good, source)
        }
        Ok(source) => finding(
            "clock",
            Level::Warning,
            format!(
                "{source} is read by a system call each time; if `dmesg` does not say why, boot with clocksource=tsc"
            ),
        ),
        Err(_) => finding("clock", Level::Good, "not shown on this system"),
    }
}

/// Each shard's thread is bound to a core.
fn pinning() -> Finding {
    use rustix::thread::{sched_getaffinity, sched_setaffinity};
    // What holds already.
    match sched_getaffinity(None).and_then(|cores| sched_setaffinity(None, &cores)) {
        Ok(()) => finding("pinning", Level::Good, "threads can be bound to cores"),
        Err(error) => finding(
            "pinning",
            Level::Fatal,
            format!(
                "sched_setaffinity is refused ({error}): run the container with a seccomp profile that allows it (docker run --security-opt \
                 seccomp=PROFILE.json), or the unit without a SystemCallFilter= that leaves @resources out"
            ),
        ),
    }
}

fn cores() -> Finding {
    let (allowed, usable) = (cpus::allowed().len(), cpus::usable());
    let of = match usable < allowed {
        true => format!("the time of {usable} may be used, by a CPU quota (of {allowed} to run on)"),
        false => format!("{usable} may be used"),
    };
    let text = match usable {
        1 => format!("{of}, by a shard and all else"),
        _ => format!(
            "{of}; shards take {} unless --cores says otherwise",
            cpus::shards(usable, 0)
        ),
    };
    finding("cores", Level::Good, text)
}

fn memory() -> Finding {
    let Some(limit) = container::memory(Path::new("/")) else {
        return finding("memory", Level::Good, "not shown on this system");
    };
    if limit.is_exceeded_by(MEMORY_MIN) {
        let text = format!(
            "{limit} may be used, and at least {} MiB are needed: raise the limit to twice that",
            MEMORY_MIN >> 20
        );
        return finding("memory", Level::Fatal, text);
    }
    let taken = limit.default_memory();
    let text = format!(
        "{limit} may be used; a broker takes {} MiB for batches, caches and requests unless --memory says otherwise",
        taken >> 20
    );
    match limit.is_tight_for(taken) {
        true => finding(
            "memory",
            Level::Warning,
            format!("{text}: that leaves little for all else, raise the limit to twice that"),
        ),
        false => finding("memory", Level::Good, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_written_is_fatal_and_says_what_to_do() {
        let found = direct_io(Path::new("/proc/no-such-folder"));
        assert_eq!(found.level, Level::Fatal);
        assert!(found.text.contains("--data-dir"), "{}", found.text);
    }

    #[test]
    fn this_host_is_fit_for_the_tests() {
        let dir = tempfile::tempdir().expect("temporary folder");
        for found in examine(dir.path()) {
            assert_ne!(found.level, Level::Fatal, "{found}");
        }
        assert_eq!(
            fs::read_dir(dir.path()).expect("there").count(),
            0,
            "nothing is left behind"
        );
    }
}
