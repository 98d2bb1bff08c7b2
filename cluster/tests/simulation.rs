//! Thousands of simulated histories of a replicated partition, and mistakes planted to show that they would be found.

use millrace_cluster::simulation::{Bug, run};

#[test]
fn nothing_acknowledged_is_lost_in_any_history() {
    let (mut acknowledged, mut elections, mut cuts, mut commits) = (0, 0, 0, 0);
    let (mut duplicates, mut renumberings, mut deletions) = (0, 0, 0);
    for seed in 1..=4_000 {
        let outcome = run(seed, Bug::None)
            .unwrap_or_else(|violation| panic!("seed {seed}: {violation}\nagain: millrace-sim --seed {seed}"));
        acknowledged += outcome.acknowledged;
        elections += outcome.elections;
        cuts += outcome.cuts;
        commits += outcome.commits;
        deletions += outcome.deletions;
        duplicates += outcome.duplicates;
        renumberings += outcome.renumberings;
    }
    // The histories are worth something only if things happen in them.
    assert!(
        acknowledged > 1_000_000 && elections > 10_000 && cuts > 3_000 && commits > 100_000,
        "{acknowledged} {elections} {cuts} {commits}"
    );
    assert!(duplicates > 10_000 && deletions > 100_000, "{duplicates} {deletions}");
    assert_eq!(renumberings, 0, "nobody is told of a gap that closes by itself");
}

#[test]
fn planted_mistakes_are_found() {
    for bug in [
        Bug::HighWatermarkEarly,
        Bug::TruncateToHighWatermark,
        Bug::AckBeforeFlush,
        Bug::IgnoresMinInsync,
        Bug::CommitsEarly,
        Bug::ZombiesCommit,
        Bug::GapsAfterHandover,
        Bug::GapsAfterRefusal,
        Bug::ObeysLateOrders,
        Bug::RecallsTooMuch,
        Bug::DeletesAlone,
    ] {
        let found = (1..=2_000).find_map(|seed| run(seed, bug).err().map(|violation| (seed, violation)));
        let (seed, violation) = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
        println!("{bug:?} found with seed {seed}: {violation}");
    }
}
