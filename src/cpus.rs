//! Which cores shards run on.

/// The cores that this process may use, at least one.
pub fn allowed() -> Vec<usize> {
    let of_process = rustix::thread::sched_getaffinity(None).map(|set| {
        (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|c| set.is_set(*c))
            .collect()
    });
    match of_process {
        Ok(cpus) if !Vec::is_empty(&cpus) => cpus,
        _ => vec![0],
    }
}

/// As many cores as this process has the time of: fewer than it may run on where a CPU quota says so.
#[must_use]
pub fn usable() -> usize {
    std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(allowed().len())
}

/// Number of shards: `wanted`, or for 0 all cores `usable` but one.
#[must_use]
pub fn shards(usable: usize, wanted: usize) -> usize {
    match wanted {
        // What the kernel does for disk and network, and everybody else, has a core, too (kernel-notes.md).
        0 => usable.saturating_sub(1).max(1),
        wanted => wanted,
    }
}

/// A core for each of `count` shards, of those `allowed`. More shards than cores share them.
///
/// Which ones depends on the node: several on one machine begin behind each other, and do not all use the same cores while
/// others are idle.
pub fn of_shards(allowed: &[usize], count: usize, node_id: i32) -> Vec<usize> {
    let before = i64::from(node_id).saturating_sub(1).max(0) as usize;
    let first = before.saturating_mul(count) % allowed.len().max(1);
    allowed.iter().copied().cycle().skip(first).take(count).collect()
}

/// Cores for work that may keep one for long, the file system's above all: those `allowed` that no shard has, or all.
pub fn beside(allowed: &[usize], shards: &[usize]) -> Vec<usize> {
    let free: Vec<usize> = allowed.iter().copied().filter(|c| !shards.contains(c)).collect();
    if free.is_empty() { allowed.to_vec() } else { free }
}

#[cfg(test)]
mod tests {
    use super::{beside, of_shards, shards};

    #[test]
    fn what_takes_long_is_beside_the_shards_where_it_can_be() {
        assert_eq!(beside(&[0, 1, 4], &[0, 4]), [1]);
        assert_eq!(beside(&[0, 1], &[1, 0, 1]), [0, 1]);
    }

    #[test]
    fn one_core_is_left_by_default() {
        assert_eq!([1, 2, 4].map(|usable| shards(usable, 0)), [1, 1, 3]);
        assert_eq!(shards(2, 3), 3);
        assert_eq!(of_shards(&[2, 3, 6, 7], 3, 1), [2, 3, 6]);
        assert_eq!(of_shards(&[0, 1], 3, 1), [0, 1, 0]);
    }

    #[test]
    fn nodes_of_one_machine_begin_behind_each_other() {
        let of = |cores: usize, wanted| {
            let all: Vec<usize> = (0..cores).collect();
            (1..=3)
                .map(|n| of_shards(&all, shards(cores, wanted), n))
                .collect::<Vec<_>>()
        };
        assert_eq!(of(2, 0), [[0], [1], [0]]);
        assert_eq!(of(6, 2), [[0, 1], [2, 3], [4, 5]]);
        assert_eq!(of(4, 0), [[0, 1, 2], [3, 0, 1], [2, 3, 0]]);
        assert_eq!(of_shards(&[0, 1], 1, i32::MAX), [0]);
        assert_eq!(of_shards(&[0, 1], 1, -5), [0]);
    }
}
