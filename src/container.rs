//! How much memory this process may use: what its host has, or less where control groups (cgroups, versions 1 and 2) say so.
//! Whoever uses more is killed by the kernel.

use std::{
    fmt, fs,
    path::{Component, Path, PathBuf},
};

/// Smallest memory budget that leaves every part something to work with.
pub const MEMORY_MIN: u64 = 64 << 20;
/// Budget where nobody says another and there is room for it.
const MEMORY_USUAL: u64 = 1 << 30;

/// A limit that a host sets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limit {
    /// So much may be used.
    pub bytes: u64,
    /// What says so.
    pub by: String,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB ({})", self.bytes >> 20, self.by)
    }
}

impl Limit {
    /// The memory budget that a broker takes by itself. Half is left: the budget does not count the program, what the kernel holds for
    /// its sockets and files, and what the allocator has free.
    #[must_use]
    pub fn default_memory(&self) -> u64 {
        (self.bytes / 2).clamp(MEMORY_MIN, MEMORY_USUAL)
    }

    /// Whether a budget would have the broker killed once it is used.
    #[must_use]
    pub fn is_exceeded_by(&self, memory: u64) -> bool {
        memory > self.bytes
    }

    /// Whether a budget leaves little for what it does not count.
    #[must_use]
    pub fn is_tight_for(&self, memory: u64) -> bool {
        memory > self.bytes / 4 * 3
    }
}

/// The memory that this process may use, by the files below `root`, which is `/` but for tests; `None` if they do not say.
#[must_use]
pub fn memory(root: &Path) -> Option<Limit> {
    let read = |path: &Path| {
        let below: PathBuf = path
            .components()
            .filter(|c| matches!(c, Component::Normal(_)))
            .collect();
        fs::read_to_string(root.join(below)).unwrap_or_default()
    };
    let of_proc = |name: &str| read(&Path::new("proc").join(name));
    let host = memory_of_host(&of_proc("meminfo")).map(|bytes| Limit {
        bytes,
        by: "this host".into(),
    });
    let mut limits: Vec<Limit> = host.into_iter().collect();
    for group in groups(&of_proc("self/cgroup"), &of_proc("self/mountinfo")) {
        let folder = group.mount.join(&group.below);
        for folder in folder.ancestors().take_while(|f| f.starts_with(&group.mount)) {
            for file in group.files {
                let path = folder.join(file);
                // "max", or no such file: no limit.
                if let Ok(bytes) = read(&path).trim().parse() {
                    let by = format!("the control group's {}", path.display());
                    limits.push(Limit { bytes, by });
                }
            }
        }
    }
    limits.into_iter().min_by_key(|limit| limit.bytes)
}

/// `/proc/meminfo`.
fn memory_of_host(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A control group that may limit this process's memory.
#[derive(PartialEq, Eq, Debug)]
struct Group {
    /// Where its hierarchy is to be seen.
    mount: PathBuf,
    /// Its folder there; those above it limit it, too.
    below: PathBuf,
    /// What states a limit.
    files: &'static [&'static str],
}

/// Those that `/proc/self/cgroup` names and `/proc/self/mountinfo` shows (cgroups(7), proc_pid_mountinfo(5)).
fn groups(cgroup: &str, mountinfo: &str) -> Vec<Group> {
    let mut found = Vec::new();
    for line in cgroup.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (kind, files): (_, &[&str]) = match controllers {
            "" => ("cgroup2", &["memory.max", "memory.high"]),
            _ if controllers.split(',').any(|c| c == "memory") => ("cgroup", &["memory.limit_in_bytes"]),
            _ => continue,
        };
        for mount in mountinfo.lines() {
            let Some((place, system)) = mount.split_once(" - ") else {
                continue;
            };
            let mut system = system.split(' ');
            let is_kind = system.next() == Some(kind);
            let options = system.nth(1).unwrap_or_default();
            if !is_kind || (kind == "cgroup" && !options.split(',').any(|o| o == "memory")) {
                continue;
            }
            let mut place = place.split(' ').skip(3);
            let (Some(root), Some(point)) = (place.next(), place.next()) else {
                continue;
            };
            // A container sees a part of the hierarchy, which may be its own group or another.
            let below = Path::new(path).strip_prefix(unescape(root)).unwrap_or(Path::new(""));
            let is_inside = below.components().all(|c| matches!(c, Component::Normal(_)));
            found.push(Group {
                mount: unescape(point).into(),
                below: if is_inside { below.into() } else { PathBuf::new() },
                files,
            });
        }
    }
    found
}

/// Blanks and the like are in octal in mountinfo.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, is)| text.replace(code, is))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       24684084 kB\nMemFree:        12669404 kB\n";
    const HOST: u64 = 24_684_084 << 10;

    /// A host's files, by their paths.
    fn host(files: &[(&str, &str)]) -> Option<Limit> {
        let root = tempfile::tempdir().expect("temporary folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, text).expect("written");
        }
        memory(root.path())
    }

    fn bytes(files: &[(&str, &str)]) -> Option<u64> {
        host(files).map(|limit| limit.bytes)
    }

    #[test]
    fn a_host_without_control_groups_has_what_it_has() {
        assert_eq!(bytes(&[("proc/meminfo", MEMINFO)]), Some(HOST));
        assert_eq!(bytes(&[]), None);
        assert_eq!(bytes(&[("proc/meminfo", "MemTotal: x kB\n")]), None);
    }

    #[test]
    fn a_container_of_version_2_sees_its_own_group_as_the_root() {
        let limited = |max| {
            host(&[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/\n"),
                (
                    "proc/self/mountinfo",
                    "2041 2036 0:27 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate\n",
                ),
                ("sys/fs/cgroup/memory.max", max),
            ])
            .expect("known")
        };
        let limit = limited("536870912\n");
        assert_eq!(limit.bytes, 512 << 20);
        assert!(limit.by.contains("/sys/fs/cgroup/memory.max"), "{limit}");
        assert_eq!(limited("max\n").bytes, HOST);
    }

    #[test]
    fn the_least_of_all_groups_above_counts() {
        let of = |outer, inner, high| {
            bytes(&[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/kubepods/pod1/c1\n"),
                (
                    "proc/self/mountinfo",
                    "31 24 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
                ),
                ("sys/fs/cgroup/kubepods/pod1/memory.max", outer),
                ("sys/fs/cgroup/kubepods/pod1/c1/memory.max", inner),
                ("sys/fs/cgroup/kubepods/pod1/c1/memory.high", high),
            ])
        };
        assert_eq!(of("3000000000", "2000000000", "max"), Some(2_000_000_000));
        assert_eq!(of("1000000000", "max", "max"), Some(1_000_000_000));
        assert_eq!(of("1000000000", "max", "900000000"), Some(900_000_000));
        assert_eq!(of("", "rubbish", "-1"), Some(HOST));
    }

    #[test]
    fn version_1_is_read_where_its_memory_hierarchy_is_mounted() {
        let docker = |root, limit| {
            bytes(&[
                ("proc/meminfo", MEMINFO),
                (
                    "proc/self/cgroup",
                    "9:name=systemd:/docker/ab\n4:memory:/docker/ab\n1:cpu,cpuacct:/docker/ab\n0::/system.slice\n",
                ),
                (
                    "proc/self/mountinfo",
                    &format!(
                        "34 31 0:31 {root} /sys/fs/cgroup/cpu rw shared:1 - cgroup cgroup rw,cpu,cpuacct\n\
                         35 31 0:32 {root} /sys/fs/cgroup/memory rw shared:2 master:1 - cgroup cgroup rw,memory\n"
                    ),
                ),
                (limit, "402653184\n"),
            ])
        };
        // With a view of the whole hierarchy, of the container's own, and of another's.
        assert_eq!(
            docker("/", "sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes"),
            Some(384 << 20)
        );
        assert_eq!(
            docker("/docker/ab", "sys/fs/cgroup/memory/memory.limit_in_bytes"),
            Some(384 << 20)
        );
        assert_eq!(
            docker("/docker/cd", "sys/fs/cgroup/memory/memory.limit_in_bytes"),
            Some(384 << 20)
        );
        // Other hierarchies say nothing of memory.
        assert_eq!(
            docker("/", "sys/fs/cgroup/cpu/docker/ab/memory.limit_in_bytes"),
            Some(HOST)
        );
    }

    #[test]
    fn no_limit_of_version_1_is_a_large_number() {
        let files = [
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "4:memory:/\n"),
            (
                "proc/self/mountinfo",
                "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ];
        assert_eq!(host(&files).expect("known").by, "this host");
    }

    #[test]
    fn paths_with_blanks_and_out_of_the_view_do_not_confuse() {
        let found = groups(
            "0::/../../other\n",
            "1 2 0:1 / /sys/my\\040groups rw - cgroup2 none rw\nhalf a line\n3 4 - cgroup2\n",
        );
        assert_eq!(found.len(), 1);
        assert_eq!(
            (&*found[0].mount, &*found[0].below),
            (Path::new("/sys/my groups"), Path::new(""))
        );
    }

    #[test]
    fn a_broker_takes_half_and_no_more_than_a_gibibyte() {
        let limit = |mib: u64| Limit {
            bytes: mib << 20,
            by: String::new(),
        };
        for (mib, taken) in [(65_536, 1024), (2_048, 1024), (512, 256), (100, 64), (32, 64)] {
            assert_eq!(limit(mib).default_memory() >> 20, taken, "of {mib} MiB");
        }
        assert!(limit(512).is_exceeded_by((512 << 20) + 1) && !limit(512).is_exceeded_by(512 << 20));
        assert!(limit(512).is_tight_for(400 << 20) && !limit(512).is_tight_for(384 << 20));
    }
}
